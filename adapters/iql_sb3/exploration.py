"""Epsilon-greedy exploration of discrete actions, by DQN's arguments and meanings."""

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.utils import LinearSchedule

from iql_plugins.ranges import SHARE, Range

if TYPE_CHECKING:
    from iql_sb3.iql import IQL

__all__ = ["check", "explored", "schedule"]

#: Of a policy that begins untrained, as DQN's.
INITIAL_EPS, FINAL_EPS = 1.0, 0.05
_FRACTION = Range("in (0, 1]", lambda v: 0.0 < v <= 1.0)


def check(model: "IQL") -> None:
    """Looks at a model's arguments.

    Raises:
        ValueError: for one out of range, or that asks for random actions where actions are continuous; names it.
    """
    _FRACTION.check("exploration_fraction", model.exploration_fraction)
    for name in ("exploration_initial_eps", "exploration_final_eps"):
        rate = getattr(model, name)
        if rate is None:
            continue
        SHARE.check(name, rate)
        if rate and isinstance(model.action_space, spaces.Box):
            raise ValueError(
                f"{name} is for discrete actions, got {rate} for {model.action_space}: leave it None, and pass "
                "action_noise to explore more"
            )


def schedule(model: "IQL", restart: bool) -> LinearSchedule:
    """The rate of random actions over the remaining progress of a training that begins.

    An untrained policy begins as DQN's does. A trained one would be lost in random actions: it goes on with the rate
    at which its exploration ended, which is 0 if it has learned offline only, unless the arguments say otherwise.

    Args:
        model: has the arguments, and the schedule of its last training.
        restart: whether the training is counted from its beginning.
    """
    check(model)
    last = model.exploration_schedule
    untrained = not model.learner.step_count and isinstance(model.action_space, spaces.Discrete)
    start, end = model.exploration_initial_eps, model.exploration_final_eps
    if end is None:
        end = FINAL_EPS if untrained else last.end
    if start is None:
        start = INITIAL_EPS if untrained else end if restart else last.start
    return LinearSchedule(start, end, model.exploration_fraction)


def explored(actions: np.ndarray[Any, Any], rate: float, space: spaces.Space[Any]) -> np.ndarray[Any, Any]:
    """Actions ``[n_envs]``, each of which a random one has replaced with the given probability."""
    random = np.random.random(len(actions)) < rate
    return np.array([space.sample() if drawn else action for drawn, action in zip(random, actions, strict=True)])
