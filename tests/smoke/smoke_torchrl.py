"""A gradient step on a sample of TorchRL's replay buffer, as it comes: its keys are ours."""

import torch
from gradient_step import check_gradient_step
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv

STEPS = 300

if __name__ == "__main__":
    torch.manual_seed(0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(STEPS), batch_size=64)
    buffer.extend(GymEnv("Pendulum-v1").rollout(STEPS, break_when_any_done=False))
    check_gradient_step(buffer.sample())
