"""Data of many kinds of tasks that nothing is wrong with: inspection has nothing to say but what is true of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from iql_plugins.data.inspection import inspect
from iql_plugins.spaces import Spaces

Array = np.ndarray
Random = np.random.Generator

#: What is true of any data whose returns or features have other scales, that a time limit ends, or whose actions reach
#: 1.
TRUE = {"no-terminals", "early-timeouts", "reward-scale", "actions-on-bounds", "uneven-scales"}

_WEIGHTS = np.random.default_rng(0)
DRIFT = 0.95 * np.eye(6) + 0.04 * _WEIGHTS.normal(size=(6, 6))
PUSH = 0.3 * _WEIGHTS.normal(size=(6, 2))
GAIN = 0.4 * _WEIGHTS.normal(size=(2, 6))
MOVES = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])


@dataclass(frozen=True)
class Task:
    """A Markov decision process and a policy, whose last argument is the part of the data that is behind it."""

    step: Callable[[Array, Any, Random], Array] = lambda s, a, random: DRIFT @ s + PUSH @ a
    reset: Callable[[Random], Array] = lambda random: random.normal(size=6)
    observe: Callable[[Array, int], Array] = lambda s, t: s
    policy: Callable[[Array, Random, float], Any] = lambda s, random, part: random.uniform(-0.99, 0.99, 2)
    reward: Callable[[Array, Any, Array], float] = lambda s, a, after: -(s**2).sum() - 0.1 * np.square(a).sum()
    terminal: Callable[[Array], bool] = lambda s: False
    limit: int = 100
    #: What a collector that resets by itself stores after the last step: the next episode's first observation.
    resets: bool = False
    dtype: Any = field(default=torch.float32)


def smooth(size: int) -> Callable[[Array, Random, float], Array]:
    state = np.zeros(size)

    def policy(s: Array, random: Random, part: float) -> Array:
        state[:] = 0.95 * state + 0.2 * random.normal(size=size)
        return state.clip(-0.99, 0.99)

    return policy


def noisy(deviation: float) -> Callable[[Array, Any, Random], Array]:
    return lambda s, a, random: DRIFT @ s + PUSH @ a + deviation * random.normal(size=6)


def toward(s: Array, random: Random, part: float) -> Array:
    """Learns to go where the last two features are."""
    return (3 * part * (s[2:] - s[:2]) + (1 - part) * random.normal(size=2)).clip(-1, 1)


GOAL = Task(
    step=lambda s, a, random: np.append(0.97 * s[:2] + 0.1 * a, s[2:]),
    reset=lambda random: random.normal(size=4),
    reward=lambda s, a, after: -float(np.linalg.norm(after[:2] - after[2:])),
)
SERVO = Task(
    # Commands are carried out slowly: they show in later steps.
    step=lambda s, a, random: s + 0.1 * (a - s),
    reset=lambda random: np.zeros(3),
    policy=smooth(3),
    reward=lambda s, a, after: -float(np.square(after - 0.5).sum()),
)
INERT = Task(
    # Explicit Euler from rest: the position does not move in the first step.
    step=lambda s, a, random: np.append(s[:2] + 0.1 * s[2:], 0.95 * s[2:] + 0.3 * a),
    reset=lambda random: np.append(random.normal(size=2), [0, 0]),
    policy=lambda s, random, part: (random.normal(size=2) - s[:2]).clip(-1, 1),
    reward=lambda s, a, after: -float(np.abs(s[:2]).sum()),
)
GRID = Task(
    step=lambda s, a, random: (s + MOVES[a] / 10).clip(0, 1),
    reset=lambda random: random.integers(0, 11, 2) / 10,
    policy=lambda s, random, part: int(random.integers(4)),
    reward=lambda s, a, after: float(after.sum() > 1.95),
    terminal=lambda s: s.sum() > 1.95,
)
TASKS = {
    "deterministic": Task(),
    "stochastic": Task(step=noisy(0.3)),
    "hardly predictable": Task(step=noisy(2.0)),
    "a deterministic policy": Task(policy=lambda s, random, part: np.tanh(GAIN @ s)),
    "a deterministic policy in noise": Task(step=noisy(0.3), policy=lambda s, random, part: np.tanh(GAIN @ s)),
    "an agent that learns": Task(
        step=noisy(0.1),
        policy=lambda s, random, part: (1 - part) * random.uniform(-1, 1, 2) + part * np.tanh(GAIN @ s),
    ),
    "smooth actions": Task(step=noisy(0.05), policy=smooth(2)),
    "actions of a few values": Task(policy=lambda s, random, part: random.integers(-4, 5, 2) / 5),
    "a clock": Task(observe=lambda s, t: np.append(s, t / 100)),
    "clipped observations": Task(step=noisy(0.3), observe=lambda s, t: s.clip(-1, 1)),
    "collisions": Task(step=noisy(0.3), observe=lambda s, t: np.append(s, [100 * max(s[0] - 2, 0), s[1] > 1])),
    "one start": Task(step=noisy(0.1), reset=lambda random: np.zeros(6)),
    "one long episode": Task(step=noisy(0.1), limit=10**9),
    "short episodes": Task(step=noisy(0.1), limit=6),
    "bandits": Task(limit=1),
    "episodes of other sizes": Task(reset=lambda random: random.normal(size=6) * random.choice([0.1, 1, 5])),
    "rewards of progress": replace(
        GOAL,
        reward=lambda s, a, after: float(np.linalg.norm(s[:2] - s[2:]) - np.linalg.norm(after[:2] - after[2:])),
    ),
    "rewards of stages": Task(step=noisy(0.3), reward=lambda s, a, after: float(after[0] > 0) + 10 * (after[1] > 1.5)),
    "sparse rewards": replace(GOAL, reward=lambda s, a, after: float(np.linalg.norm(after[:2] - after[2:]) < 0.3)),
    "sparse rewards of an agent that learns": replace(
        GOAL, policy=toward, reward=lambda s, a, after: float(np.linalg.norm(after[:2] - after[2:]) < 0.3)
    ),
    "goals that end the episode": replace(
        GOAL, policy=toward, terminal=lambda s: bool(np.linalg.norm(s[:2] - s[2:]) < 0.3)
    ),
    "falls": Task(step=noisy(0.3), terminal=lambda s: abs(s[0]) > 2),
    "falls, and automatic resets": Task(step=noisy(0.3), terminal=lambda s: abs(s[0]) > 2, resets=True, limit=10**9),
    "deaths at random": Task(step=noisy(0.3), terminal=lambda s: abs(s[2]) * 1e4 % 1 < 0.02),
    "a slow servo": SERVO,
    "from rest": INERT,
    "positions without velocities": replace(INERT, observe=lambda s, t: s[:2]),
    "prices": Task(
        step=lambda s, a, random: np.array([0, s[1], s[2] + a[0] / 10]) + random.normal(size=3) * [1, 0.01, 0],
        reset=lambda random: np.append(random.normal(size=2), 0),
        reward=lambda s, a, after: float(s[2] * after[0]),
        policy=lambda s, random, part: random.uniform(-0.99, 0.99, 1),
    ),
    "a grid": GRID,
    "a grid with one start": replace(GRID, reset=lambda random: np.zeros(2)),
    "fields of a grid": replace(
        GRID, observe=lambda s, t: np.array([round(110 * s[0] + 10 * s[1])]), dtype=torch.int64
    ),
}


def rolled_out(task: Task, rows: int, seed: int) -> TensorDict:
    random = np.random.default_rng(seed)
    steps: list[tuple[Any, ...]] = []
    state, length = task.reset(random), 0
    for row in range(rows):
        observation = task.observe(state, length)
        action = task.policy(observation, random, row / rows)
        after = task.step(state, action, random)
        length += 1
        terminated, done = bool(task.terminal(after)), row == rows - 1 or length == task.limit
        reward, following = task.reward(state, action, after), task.observe(after, length)
        state = after
        if terminated or done:
            state, length = task.reset(random), 0
            following = task.observe(state, 0) if task.resets else following
        steps.append((observation, action, reward, following, terminated or done, terminated))
    return dataset(steps, task.dtype)


def dataset(steps: list[tuple[Any, ...]], dtype: torch.dtype = torch.float32) -> TensorDict:
    before, action, reward, after, done, terminated = (np.array(column) for column in zip(*steps, strict=True))

    def flag(values: Array) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.bool, device="cpu").unsqueeze(-1)

    return TensorDict(
        {
            "observation": torch.tensor(before, dtype=dtype, device="cpu"),
            "action": torch.tensor(action, dtype=torch.float32, device="cpu")
            if action.ndim > 1
            else torch.tensor(action, dtype=torch.int64, device="cpu").unsqueeze(-1),
            "next": {
                "observation": torch.tensor(after, dtype=dtype, device="cpu"),
                "reward": torch.tensor(reward, dtype=torch.float32, device="cpu").unsqueeze(-1),
                "done": flag(done),
                "terminated": flag(terminated),
            },
        },
        [len(steps)],
    )


def codes(data: TensorDict, **options: Any) -> set[str]:
    return {finding.code for finding in inspect(data, **options).findings}


@pytest.mark.parametrize("name", TASKS)
def test_nothing_is_found_in_what_a_task_and_a_policy_make(name: str) -> None:
    for seed in range(2):
        assert codes(rolled_out(TASKS[name], 2500, seed)) <= TRUE


@pytest.mark.parametrize(
    ("env", "known"),
    [
        ("Pendulum-v1", {"no-terminals", "early-timeouts"}),
        ("CartPole-v1", {"reward-scale"}),
        ("MountainCar-v0", {"no-terminals", "early-timeouts", "reward-scale"}),
        ("MountainCarContinuous-v0", {"no-terminals", "early-timeouts", "reward-scale"}),
        ("Acrobot-v1", {"no-terminals", "early-timeouts", "reward-scale"}),
        ("FrozenLake-v1", {"reward-scale"}),
    ],
)
def test_nothing_is_found_in_what_random_actions_make_of_an_environment(env: str, known: set[str]) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    made = gymnasium.make(env)
    made.action_space.seed(0)
    observation, _ = made.reset(seed=0)
    steps: list[tuple[Any, ...]] = []
    for row in range(2500):
        action = made.action_space.sample()
        after, reward, terminated, truncated, _ = made.step(action)
        done = terminated or truncated or row == 2499
        steps.append((np.atleast_1d(observation), action, reward, np.atleast_1d(after), done, terminated))
        observation = made.reset()[0] if done else after
    spaces = Spaces.from_gymnasium(made.observation_space, made.action_space)
    dtype = torch.int64 if steps[0][0].dtype.kind == "i" else torch.float32
    assert codes(dataset(steps, dtype), spaces=spaces) <= known


def test_nothing_is_found_in_images_and_dict_observations() -> None:
    data = rolled_out(TASKS["stochastic"], 2500, 0)
    assert codes(pictured(data)) <= TRUE
    both = data.clone()
    for key in ("observation", ("next", "observation")):
        pixels = pictured(data)[key]
        both[key] = TensorDict({"place": data[key], "camera": pixels}, [2500])
    assert codes(both) <= TRUE
    both["action"] = both["action"].roll(1, 0)
    assert "shifted-actions" in codes(both)


def pictured(data: TensorDict) -> TensorDict:
    """With 8 by 8 pixels for observations."""
    images = data.clone()
    place = torch.arange(8, device="cpu")
    for key in ("observation", ("next", "observation")):
        centre = (data[key][:, :2] + 4).reshape(-1, 2, 1)
        across, down = (255 * torch.exp(-((place - centre[:, axis]) ** 2))[:, None] for axis in (0, 1))
        images[key] = (across * down.transpose(1, 2) / 255).to(torch.uint8).unsqueeze(1)
    return images
