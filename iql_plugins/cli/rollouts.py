"""Episodes of gymnasium's environments under a policy."""

import contextlib
import os
import re
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.spaces import Spaces

__all__ = ["Episode", "environment_spaces", "quiet", "record", "recorded_environment", "rollouts", "with_module"]

#: Environments that are stepped side by side, so that the policy acts on a batch.
WIDTH = 32
#: Steps after which an episode is cut in an environment that has no time limit of its own.
LONGEST_EPISODE = 10_000


class Episode(NamedTuple):
    """What an episode came to.

    Attributes:
        total: undiscounted return.
        length: steps.
    """

    total: float
    length: int


def environment_spaces(env: str) -> Spaces:
    """The spaces of an environment.

    Args:
        env: gymnasium's id, ``Pendulum-v1``, or ``module:Name-v0`` to import the module that registers it.

    Raises:
        UserError: if it cannot be made, or has spaces that are not supported.
    """
    made = _make(env)
    try:
        with mistakes(TypeError, ValueError):
            return Spaces.from_gymnasium(made.observation_space, made.action_space)
    finally:
        made.close()


def recorded_environment(env: object, file: object) -> str | None:
    """The environment's id that a file holds, unless it is one that makes gymnasium import a module.

    Args:
        env: what the file holds; None for none.
        file: for errors.

    Raises:
        UserError: if it names a module, and says how to give it by hand; if it is no id.
    """
    if env is None:
        return None
    if not isinstance(env, str) or not env.isprintable():
        raise UserError(f"{file} must name its environment by gymnasium's id, got {env!r}")
    if ":" in env:
        raise UserError(
            f"{file} names the environment {env}, a module that would be imported, which can run any code: "
            f"give --env {shlex.quote(env)} if you trust it"
        )
    return env


def rollouts(act: Callable[[Any], Any], env: str, seeds: Sequence[int]) -> list[Episode]:
    """One episode for each seed; its environment is reset with that seed.

    Each environment is stepped to the end of its own episode and no further, so that short episodes count as often as
    long ones, and no convention of automatic resets matters.

    Args:
        act: actions for a batch of observations: an array ``[B, ...]``, or one for each entry of a Dict space.
        env: see :func:`environment_spaces`.
        seeds: one for each episode.

    Raises:
        UserError: if the environment cannot be made.
    """
    episodes: list[Episode] = []
    with contextlib.ExitStack() as stack, quiet():
        envs = [stack.enter_context(contextlib.closing(_make(env))) for _ in range(min(WIDTH, len(seeds)))]
        for start in range(0, len(seeds), WIDTH):
            episodes += _side_by_side(act, envs, seeds[start : start + WIDTH])
    return episodes


def record(act: Callable[[Any], Any], env: str, seed: int, path: Path) -> None:
    """Films the episode that :func:`rollouts` plays for a seed.

    Args:
        act: see :func:`rollouts`.
        env: see :func:`rollouts`.
        seed: of the episode.
        path: of the ``.mp4``, replaced in one step.

    Raises:
        UserError: if the environment cannot be made, or draws no pictures, or a package is missing.
    """
    imported("moviepy", "video")
    recorder = imported("gymnasium.wrappers").RecordVideo
    gymnasium = imported("gymnasium")
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder, quiet():
        # An environment that cannot draw raises what it likes.
        with mistakes(gymnasium.error.Error, ImportError, TypeError, ValueError):
            made = recorder(_make(env, render_mode="rgb_array"), folder, name_prefix="video", disable_logger=True)
        with contextlib.closing(made), mistakes(gymnasium.error.Error, ImportError):
            _side_by_side(act, [made], [seed])
        [film] = Path(folder).glob("*.mp4")
        os.replace(film, path)


def _side_by_side(act: Callable[[Any], Any], envs: Sequence[Any], seeds: Sequence[int]) -> list[Episode]:
    observations = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=False)]
    totals, lengths = [0.0] * len(seeds), [0] * len(seeds)
    active = list(range(len(seeds)))
    limited = envs[0].spec is not None and envs[0].spec.max_episode_steps is not None
    discrete = envs[0].action_space.shape == ()
    while active:
        actions = act(_stacked([observations[index] for index in active]))
        remaining = []
        for index, action in zip(active, actions, strict=True):
            step = envs[index].step(int(action) if discrete else action)
            observations[index], reward, terminated, truncated, _ = step
            totals[index] += float(reward)
            lengths[index] += 1
            if not (terminated or truncated or (not limited and lengths[index] >= LONGEST_EPISODE)):
                remaining.append(index)
        active = remaining
    return [Episode(total, length) for total, length in zip(totals, lengths, strict=True)]


def _stacked(observations: Sequence[Any]) -> Any:
    if isinstance(observations[0], Mapping):
        return {name: np.stack([observation[name] for observation in observations]) for name in observations[0]}
    return np.stack(observations)


def _make(env: str, **options: Any) -> Any:
    gymnasium = imported("gymnasium")
    with quiet():
        try:
            _register(env)
            return gymnasium.make(env, disable_env_checker=True, **options)
        except (gymnasium.error.Error, ImportError) as error:
            # gymnasium's own errors say what to do.
            hint = _missing(env) if isinstance(error, ImportError) else ""
            raise UserError(f"the environment {env!r} cannot be made: {' '.join(str(error).split())}{hint}") from error


#: Packages that register environments when they are imported, and the ids of these. D4RL's end otherwise.
_REGISTRARS = {
    "gymnasium_robotics": r"(Point|Ant)Maze_\w+-v\d+",
    "ogbench": r"(point|ant|humanoid)maze-(medium|large|giant|teleport)(-singletask(-task\d)?)?-v0",
}


def with_module(env: str) -> str:
    """An environment's id as ``gymnasium.make`` takes it, with the module that registers it where that is known."""
    return next((f"{package}:{env}" for package, ids in _REGISTRARS.items() if re.fullmatch(ids, env)), env)


def _register(env: str) -> None:
    """Imports the package that knows an id that gymnasium does not, if it is one of the known ones."""
    module, separator, _ = with_module(env).partition(":")
    if env not in imported("gymnasium").registry and ":" not in env and separator:
        imported(module, "benchmarks")


def _missing(env: str) -> str:
    """What installs the packages of an environment, if it is one of gymnasium's own."""
    gymnasium = imported("gymnasium")
    registered = gymnasium.registry.get(env)
    entry_point = getattr(registered, "entry_point", None)
    family = re.match(r"gymnasium\.envs\.(\w+)\.", entry_point if isinstance(entry_point, str) else "")
    if family is None:
        return ""
    extra = family[1].replace("_", "-")
    if extra not in (metadata("gymnasium").get_all("Provides-Extra") or ()):
        return ""
    package = "iql-plugins[mujoco]" if extra == "mujoco" else f"gymnasium[{extra}]"
    return f": pip install '{package}'"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without gymnasium's warnings that a newer version of an environment exists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
