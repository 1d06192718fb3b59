"""Environments and policies of Stable-Baselines3's kinds."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from iql_sb3 import IQLPolicy

SMALL: dict[str, Any] = {"batch_size": 8, "buffer_size": 100, "learning_starts": 10, "seed": 0}


NETWORKS = {"net_arch": [8]}


class RandomEnv(gym.Env[Any, Any]):
    """Random observations of any space; episodes of 8 steps."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any] | None = None) -> None:
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (2,))
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), self.steps == 8, False, {}


OBSERVATIONS = {
    "box": spaces.Box(-1.0, 1.0, (3,)),
    "matrix": spaces.Box(-1.0, 1.0, (3, 2)),
    "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "integers": spaces.Box(0, 5, (3,), np.int64),
    "bytes": spaces.Box(0, 3, (3,), np.uint8),
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(5),
}


class Widened(torch.nn.Module):
    """A features extractor of the user's own."""

    features_dim = 6

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(observation_space.shape[0], 6)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.linear(observations).relu()


class SmallPolicy(IQLPolicy):
    """A policy of the user's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "net_arch": [4]})
