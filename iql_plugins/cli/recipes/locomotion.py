"""MuJoCo's runners under Stable-Baselines3's SAC, trained here to a return that is stated."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

from iql_plugins import checkpoint
from iql_plugins.cli.errors import UserError, imported
from iql_plugins.cli.recipes.recipe import Columns, Parts, Recipe, Rows, archive

__all__ = ["RECIPES"]

#: Environment steps of SAC from one checkpoint to the next. Each chunk begins with what the one before it has saved,
#: killed or not: that is why a run that was killed ends with the same bytes.
_CHUNK = 10_000
#: Chunks after which a training that has not come to its return is given up.
_MOST_CHUNKS = 100
_EVALUATION_EPISODES = 10
_ROLLOUT_PARTS, _ROLLOUT_ROWS = 10, 10_000


class _Task(NamedTuple):
    env: str
    #: The mean return at which SAC stops: about that of D4RL's medium policies.
    target: float


TASKS = {
    "hopper": _Task("Hopper-v5", 1500.0),
    "halfcheetah": _Task("HalfCheetah-v5", 4800.0),
    "walker2d": _Task("Walker2d-v5", 2500.0),
}


def _trained(task: _Task, seed: int, parts: Parts) -> int:
    """Trains SAC until its return is reached, chunk after chunk; returns the number of the last one."""
    for chunk in range(_MOST_CHUNKS):
        name = f"chunk-{chunk:03}"
        if not parts.has(name):
            what = f"SAC until a mean return of {task.target:.0f}: {_progress(parts, chunk)}"
            parts.report(chunk, _MOST_CHUNKS, what)
            checkpoint.write_bytes(parts.path(name), archive(_chunk(task, seed, chunk, parts)))
        if parts.read(name)["mean_return"] >= task.target:
            return chunk
    raise UserError(
        f"SAC came to a mean return of {_progress(parts, _MOST_CHUNKS)} in {_MOST_CHUNKS * _CHUNK:,} steps, and not to "
        f"{task.target:.0f}: take another --seed"
    )


def _progress(parts: Parts, chunk: int) -> str:
    return f"{parts.read(f'chunk-{chunk - 1:03}')['mean_return']:.0f} so far" if chunk else "none so far"


def _chunk(task: _Task, seed: int, chunk: int, parts: Parts) -> Columns:
    """What SAC met in a chunk, as its replay buffer has it; the model behind it, and that one's mean return."""
    with _one_thread(), contextlib.closing(gymnasium.make(task.env)) as env:
        start = int(np.random.default_rng([seed, chunk]).integers(2**31))
        if chunk == 0:
            sac = imported("stable_baselines3", "sb3").SAC
            model = sac("MlpPolicy", env, buffer_size=_MOST_CHUNKS * _CHUNK, seed=start, device="cpu")
        else:
            model = _model(parts.read(f"chunk-{chunk - 1:03}"), env)
            for number in range(chunk):
                met = parts.read(f"chunk-{number:03}")
                for name in _BUFFER:
                    getattr(model.replay_buffer, name)[number * _CHUNK : (number + 1) * _CHUNK, 0] = met[name]
            model.replay_buffer.pos = chunk * _CHUNK
            model.set_random_seed(start)
        model.learn(_CHUNK, reset_num_timesteps=chunk == 0)
        saved = io.BytesIO()
        model.save(saved)
        rows = slice(chunk * _CHUNK, (chunk + 1) * _CHUNK)
        met = {name: getattr(model.replay_buffer, name)[rows, 0].copy() for name in _BUFFER}
        returns = [sum(_episode(env, model, start + episode, Rows())) for episode in range(_EVALUATION_EPISODES)]
    # The next chunk begins with an episode of its own.
    met["timeouts"][-1], met["dones"][-1] = float(not met["dones"][-1] or met["timeouts"][-1]), 1.0
    return {**met, "model": np.frombuffer(saved.getvalue(), np.uint8), "mean_return": np.array(np.mean(returns))}


#: Of Stable-Baselines3's replay buffer.
_BUFFER = ("observations", "actions", "rewards", "next_observations", "dones", "timeouts")


def _model(chunk: Columns, env: Any) -> Any:
    return imported("stable_baselines3", "sb3").SAC.load(io.BytesIO(chunk["model"].tobytes()), env=env, device="cpu")


def _episode(env: Any, model: Any, seed: int, rows: Rows) -> list[float]:
    """The rewards of an episode under samples of the policy, as D4RL's medium data are; its transitions into rows."""
    torch.manual_seed(seed)
    observation, _ = env.reset(seed=seed)
    rewards: list[float] = []
    ended = False
    while not ended:
        action, _ = model.predict(observation)
        following, reward, terminal, timeout, _ = env.step(action)
        rows.add(observation, action, float(reward), following, terminal, timeout)
        rewards.append(float(reward))
        observation, ended = following, terminal or timeout
    return rewards


def _medium(task: _Task) -> Callable[[int, Parts], Columns]:
    def make(seed: int, parts: Parts) -> Columns:
        last = parts.read(f"chunk-{_trained(task, seed, parts):03}")

        def rollouts(number: int) -> Columns:
            draw = np.random.default_rng([seed, _MOST_CHUNKS, number])
            rows = Rows()
            with _one_thread(), contextlib.closing(gymnasium.make(task.env)) as env:
                model = _model(last, env)
                while len(rows) < _ROLLOUT_ROWS:
                    _episode(env, model, int(draw.integers(2**31)), rows)
            return rows.columns()

        names = [f"rollout-{number:02}" for number in range(_ROLLOUT_PARTS)]
        return parts.columns(names, rollouts, f"rollouts of {_ROLLOUT_ROWS:,} transitions each")

    return make


def _replay(task: _Task) -> Callable[[int, Parts], Columns]:
    def make(seed: int, parts: Parts) -> Columns:
        chunks = [parts.read(f"chunk-{number:03}") for number in range(_trained(task, seed, parts) + 1)]
        met = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in _BUFFER}
        timeouts = met["timeouts"] > 0
        ends = {"terminals": (met.pop("dones") > 0) & ~timeouts, "timeouts": timeouts}
        return {name: rows.astype(np.float32) for name, rows in met.items()} | ends

    return make


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums do not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


RECIPES: Sequence[Recipe] = tuple(
    Recipe(
        f"{name}-{kind}",
        task.env,
        f"{what} of SAC at a mean return of {task.target:.0f}, trained here: minutes to hours",
        make(task),
        packages=("mujoco", "stable_baselines3"),
        extra="mujoco,sb3",
        shares=f"{name}-sac",
    )
    for name, task in TASKS.items()
    for kind, what, make in (
        ("medium", f"{_ROLLOUT_PARTS * _ROLLOUT_ROWS:,} transitions of rollouts", _medium),
        ("replay", "all that was met on the way", _replay),
    )
)
