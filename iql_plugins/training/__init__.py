"""What trains and what is trained: agent, learner, gradients, several seeds, several processes."""
