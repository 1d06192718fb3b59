"""Gymnasium's spaces and the core's, and an environment that has spaces and nothing else."""

from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from iql_plugins.spaces import Box, Discrete, Space, Spaces

__all__ = ["SpacesEnv", "check_fits", "gymnasium_spaces", "is_stand_in", "layout_spaces", "stand_in"]


def layout_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Spaces:
    """The core's spaces for an environment's; several integers or bits are a Box of them.

    Raises:
        TypeError: for a space that neither the core nor Stable-Baselines3 takes.
    """
    observation: Space | dict[str, Space]
    if isinstance(observation_space, spaces.Dict):
        observation = {name: _observation(space) for name, space in observation_space.spaces.items()}
    else:
        observation = _observation(observation_space)
    if isinstance(action_space, spaces.Box):
        low, high = (bound.reshape(-1).astype(np.float32) for bound in (action_space.low, action_space.high))
        action_space = spaces.Box(low, high)
    return Spaces(observation, Spaces.from_gymnasium(spaces.Discrete(1), action_space).action)


def _observation(space: spaces.Space[Any]) -> Space:
    if isinstance(space, spaces.MultiDiscrete):
        low, high = space.start, space.start + space.nvec - 1
        return Box((len(space.nvec),), "int64", tuple(map(float, low)), tuple(map(float, high)))
    if isinstance(space, spaces.MultiBinary):
        return Box(tuple(space.shape), "int8")
    observation: Any = Spaces.from_gymnasium(space, spaces.Discrete(1)).observation
    return observation  # type: ignore[no-any-return]


def gymnasium_spaces(known: Spaces) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """Gymnasium's observation and action space for the core's."""
    observation = known.observation
    if isinstance(observation, Box | Discrete):
        return _gymnasium(observation), _gymnasium(known.action)
    return spaces.Dict({name: _gymnasium(space) for name, space in observation.items()}), _gymnasium(known.action)


def _gymnasium(space: Space) -> spaces.Space[Any]:
    if isinstance(space, Discrete):
        return spaces.Discrete(space.n, start=space.start)
    if space.dtype == "int8":
        return spaces.MultiBinary(space.shape)
    if space.dtype == "int64" and space.low is not None and space.high is not None:
        low, high = (np.asarray(bound, np.int64) for bound in (space.low, space.high))
        return spaces.MultiDiscrete(high - low + 1, start=low)
    if space.dtype == "uint8" and space.low is None:
        return spaces.Box(0, 255, space.shape, np.uint8)
    dtype: Any = np.dtype(space.dtype)
    low, high = (
        np.full(space.shape, default, dtype) if bound is None else np.asarray(bound, dtype).reshape(space.shape)
        for bound, default in ((space.low, -np.inf), (space.high, np.inf))
    )
    return spaces.Box(low, high, dtype=dtype)


class SpacesEnv(gym.Env[Any, Any]):
    """An environment of which nothing but the spaces is known.

    Args:
        observation_space: of the environment that is missing.
        action_space: likewise.
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> NoReturn:
        """Raises ``RuntimeError``."""
        raise RuntimeError("this model was made without an environment: give it one with set_env(env)")

    def step(self, action: Any) -> NoReturn:
        """Raises ``RuntimeError``."""
        self.reset()


def stand_in(observation_space: spaces.Space[Any], action_space: spaces.Space[Any], n_envs: int = 1) -> VecEnv:
    """What callbacks find in the place of a training environment when there is none."""
    return DummyVecEnv([lambda: SpacesEnv(observation_space, action_space)] * n_envs)


def is_stand_in(env: VecEnv | None) -> bool:
    """Whether a vectorised environment is one of :func:`stand_in`."""
    return env is not None and isinstance(env.unwrapped, DummyVecEnv) and isinstance(env.unwrapped.envs[0], SpacesEnv)


def check_fits(given: Spaces, own: Spaces) -> None:
    """Raises ``ValueError`` that names the first difference that matters to networks: bounds of observations do not."""
    if given.observations.keys() != own.observations.keys():
        names = [sorted(map(str, spaces_.observations)) for spaces_ in (given, own)]
        raise ValueError(f"the observations must be {names[1]}, got {names[0]}")
    for key, space in own.observations.items():
        other = given.observations[key]
        same = (
            isinstance(other, Box) and other.shape == space.shape and other.dtype == space.dtype
            if isinstance(space, Box)
            else other == space
        )
        if not same:
            # Without the bounds: an image has one for each of its pixels.
            named = [f"{s.dtype} of shape {s.shape}" if isinstance(s, Box) else str(s) for s in (space, other)]
            raise ValueError(f"the space of {key!r} must be {named[0]}, got {named[1]}")
    if not _equal_actions(given.action, own.action):
        raise ValueError(
            f"the action space must be {own.action}, got {given.action}; a dataset alone does not tell the bounds: "
            "pass observation_space and action_space with it"
        )


def _equal_actions(first: Space, second: Space) -> bool:
    if not isinstance(first, Box) or not isinstance(second, Box) or first.shape != second.shape:
        return first == second
    # Gymnasium keeps bounds in float32.
    bounds, others = ([box.low or (), box.high or ()] for box in (first, second))
    return bool(np.allclose(bounds, others, rtol=1e-6, atol=0.0))
