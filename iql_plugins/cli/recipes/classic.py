"""Pendulum and CartPole under controllers of many strengths: mixtures that take seconds."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from iql_plugins.cli.recipes.recipe import Array, Columns, Parts, Recipe, Rows

__all__ = ["RECIPES"]

#: The share of random actions in each part; the last part has no others.
_RANDOM_SHARES = (0.1, 0.3, 0.5, 0.7, 1.0)
_EPISODES = {"Pendulum-v1": 50, "CartPole-v1": 100}
#: Steps for which a random action of the pendulum is held: single ones hardly move it.
_HELD = 5


def swing_up(observation: Array) -> Array:
    """A torque for the pendulum: pumps energy in, and balances at the top.

    With gymnasium's g = 10 and m = l = 1 the energy is E = θ̇² / 6 + 5 cos θ, and 5 upright at rest; a torque along θ̇
    raises it. The energy is led a little beyond 5, so that the pendulum arrives.

    >>> swing_up(np.array([-1.0, 0.0, 0.5])), swing_up(np.array([1.0, 0.0, 0.0]))
    (array([2.]), array([-0.]))

    Args:
        observation: ``[3]`` cos θ, sin θ, θ̇.
    """
    cosine, sine, speed = observation
    energy = speed**2 / 6 + 5 * cosine
    if cosine > 0.9 and abs(speed) < 3.5:
        torque = -(12.0 * np.arctan2(sine, cosine) + 3.0 * speed)
    else:
        torque = 4.0 * (5.3 - energy) * (1.0 if speed >= 0 else -1.0)
    clipped: Array = np.clip([torque], -2.0, 2.0)
    return clipped


def balance(observation: Array) -> int:
    """A push for CartPole: to the side that the pole falls to, and a little against where the cart goes.

    >>> balance(np.array([0.0, 0.0, 0.1, 0.0])), balance(np.array([0.0, 0.0, -0.1, 0.0]))
    (1, 0)

    Args:
        observation: ``[4]`` x, ẋ, θ, θ̇.
    """
    position, speed, angle, turning = observation
    return int(0.05 * position + 0.15 * speed + angle + 0.3 * turning > 0)


def _mixture(env_id: str, controller: Callable[[Array], Any], held: int) -> Callable[[int, Parts], Columns]:
    def episodes(seed: int, number: int) -> Columns:
        draw = np.random.default_rng([seed, number])
        env: Any = gymnasium.make(env_id)
        env.action_space.seed(int(draw.integers(2**31)))
        rows = Rows()
        for _ in range(_EPISODES[env_id]):
            observation, _ = env.reset(seed=int(draw.integers(2**31)))
            ended, left, random = False, 0, None
            while not ended:
                if left == 0:
                    random = env.action_space.sample() if draw.random() < _RANDOM_SHARES[number] else None
                    left = held
                left -= 1
                action = controller(observation) if random is None else random
                following, reward, terminal, timeout, _ = env.step(action)
                rows.add(observation, action, float(reward), following, terminal, timeout)
                observation, ended = following, terminal or timeout
        env.close()
        return rows.columns()

    def make(seed: int, parts: Parts) -> Columns:
        names = [f"random-{share}" for share in _RANDOM_SHARES]
        return parts.columns(names, lambda number: episodes(seed, number), "shares of random actions")

    return make


RECIPES: Sequence[Recipe] = (
    Recipe(
        "pendulum-mixed",
        "Pendulum-v1",
        f"a swing-up controller whose actions are random now and then, shares {_RANDOM_SHARES}, 250 episodes",
        _mixture("Pendulum-v1", swing_up, _HELD),
    ),
    Recipe(
        "cartpole-mixed",
        "CartPole-v1",
        f"a linear controller whose actions are random now and then, shares {_RANDOM_SHARES}, 500 episodes",
        _mixture("CartPole-v1", balance, 1),
    ),
)
