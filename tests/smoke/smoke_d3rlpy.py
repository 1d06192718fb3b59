"""A gradient step on a mini-batch of a d3rlpy dataset."""

import d3rlpy
import gymnasium
import numpy as np
import torch
from gradient_step import check_gradient_step
from tensordict import TensorDict

MAX_TORQUE = 2.0


def random_dataset(steps: int) -> d3rlpy.dataset.MDPDataset:
    """Transitions of ``Pendulum-v1`` under random actions."""
    env = gymnasium.make("Pendulum-v1")
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    rows = []
    for _ in range(steps):
        action = env.action_space.sample()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action / MAX_TORQUE, reward, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else next_observation
    # d3rlpy wants the last episode to end as well.
    rows[-1] = (*rows[-1][:-1], True)
    observations, actions, rewards, terminals, timeouts = map(np.array, zip(*rows, strict=True))
    return d3rlpy.dataset.MDPDataset(observations, actions, rewards, terminals.astype(float), timeouts.astype(float))


if __name__ == "__main__":
    samples = random_dataset(400).sample_transition_batch(64)
    terminated = torch.as_tensor(samples.terminals).bool()
    batch = {
        "observation": torch.as_tensor(samples.observations),
        "action": torch.as_tensor(samples.actions).float(),
        "steps_to_next_obs": torch.as_tensor(samples.intervals).long(),
        "next": {
            "observation": torch.as_tensor(samples.next_observations),
            "reward": torch.as_tensor(samples.rewards).float(),
            "done": terminated,
            "terminated": terminated,
        },
    }
    check_gradient_step(TensorDict(batch, [64]))
