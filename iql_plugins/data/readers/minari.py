"""Minari datasets that are on this machine already."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iql_plugins.data import hdf5
from iql_plugins.data.arrays import Block, Names, action, assemble, entry, observation, reward, tensor
from iql_plugins.data.columns import METADATA, require_read, unread
from iql_plugins.data.dataset import DONE, REWARD, TERMINATED, Dataset, DatasetError, Options, reading, require_space
from iql_plugins.hookspecs import hookimpl
from iql_plugins.limits import parse_json, read_json
from iql_plugins.spaces import Spaces

__all__ = ["is_identifier"]

_IDENTIFIER = re.compile(r"(?:[-\w]+/)*[-\w]+-v\d+")
_METADATA, _HDF5 = "metadata.json", "main_data.hdf5"
_NUMBERS = re.compile(r"bool|(?:u?int|float)\d{1,3}")
_READ = ("observations", "actions", "rewards", "terminations", "truncations")


def is_identifier(source: str) -> bool:
    """Whether it reads like the id of a Minari dataset, ``namespace/name-v0``."""
    return _IDENTIFIER.fullmatch(source) is not None


@hookimpl
def iql_read_dataset(source: object, options: Options) -> Dataset | None:
    """Takes the id of a dataset that is on this machine, or its folder."""
    if not isinstance(source, str | os.PathLike):
        return None
    data = _found(source if isinstance(source, str) else Path(source))
    return None if data is None else _load(data, options)


def _found(source: str | Path) -> Path | None:
    """The folder with the data of a dataset, by its folder or by its id; None if there is none on this machine."""
    folders = [Path(source)]
    if isinstance(source, str) and is_identifier(source):
        # Asking Minari for this folder would make it.
        root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
        folders.append(Path(root) / source)
    for folder in folders:
        for data in (folder, folder / "data"):
            if (data / _METADATA).is_file():
                return data
    return None


def _load(path: Path, options: Options) -> Dataset:
    """The dataset in a folder of Minari's, which is read an episode at a time. Nothing is ever downloaded.

    Episodes have one observation more than steps, so that every transition has its final observation. An episode
    that ends neither terminated nor truncated was cut: its last step is marked done.

    Args:
        path: the folder of ``metadata.json``.
        options: with ``memmap_dir``, only one episode at a time needs to fit into memory.

    Raises:
        ImportError: without Minari; says how to install it.
        DatasetError: if it is no such dataset, is not stored as HDF5, has spaces other than Box, Discrete and Dict
            of these, or a column that is neither read nor metadata.
    """
    name = str(path)
    with reading(name), ExitStack() as stack:
        metadata = read_json(path / _METADATA)
        for key in ("observation_space", "action_space"):
            if not isinstance(metadata.get(key), str):
                raise DatasetError(
                    f"{name} does not say its {key!r}: it would take to build the environment that it names, "
                    "which can run any code"
                )
            _check_space(parse_json(metadata[key]), name)
        # The specification also has an entry point, which could run any code: only the id is taken.
        specification = metadata.get("env_spec")
        env = parse_json(specification).get("id") if isinstance(specification, str) else None
        try:
            import minari  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("Minari datasets need minari: pip install 'iql-plugins[minari]'") from error
        if metadata.get("data_format") != "hdf5":
            # What its other formats claim, and which columns they have, is known once Minari has read them whole.
            raise DatasetError(
                f"{name} stores its episodes as {metadata.get('data_format')!r}: only 'hdf5' is read; write it again "
                "with Minari's data_format='hdf5'"
            )
        stored = stack.enter_context(hdf5.opened(path / _HDF5))
        if not 0 <= metadata.get("total_episodes", 0) <= len(stored):
            raise DatasetError(f"{name} has {len(stored)} episodes at most, {metadata['total_episodes']} were expected")
        dataset = minari.MinariDataset(path)
        _require_read(stored, path / _HDF5)
        try:
            spaces = Spaces.from_gymnasium(dataset.observation_space, dataset.action_space)
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{name}: {error}") from error
        discrete = spaces.discrete if options.discrete is None else options.discrete
        reader = _Episodes(name, dataset, discrete, stored)
        tensors = assemble(reader.blocks, int(dataset.total_steps), name, options)
        env = env if isinstance(env, str) else None
        return Dataset(tensors, name, spaces, env, both=reader.both, both_row=reader.both_row)


def _require_read(stored: Any, path: Path) -> None:
    """Looks at the names in Minari's HDF5 file itself, as Minari reads no other than those that it expects."""
    for episode in stored:
        columns = hdf5.member(stored, episode, path)
        if not isinstance(columns, Mapping):
            raise unread(str(path), episode, ["episode_0"])
        require_read(f"{path}: {episode}", columns, _READ, METADATA)


class _Episodes:
    """The blocks of a Minari dataset, an episode each, and what was met on the way."""

    def __init__(self, name: str, dataset: Any, discrete: bool, stored: Any) -> None:
        self.both = 0
        self.both_row: int | None = None
        self._name, self._dataset, self._discrete, self._stored = name, dataset, discrete, stored

    def _indices(self) -> Iterator[int]:
        """The episodes, each after a look at what Minari is about to read."""
        for index in self._dataset.episode_indices:
            size = hdf5.group_bytes(self._stored, f"episode_{index}", Path(self._stored.filename))
            require_space(size, self._name, Options())
            yield index

    def blocks(self, first: int) -> Iterator[Block]:
        start = 0
        for number, episode in enumerate(self._dataset.iterate_episodes(self._indices())):
            steps = len(episode.rewards)
            if steps == 0:
                continue
            terminated = np.asarray(episode.terminations, bool)
            truncated = np.asarray(episode.truncations, bool)
            observations = {
                path: self._observation(number, path, values, steps)
                for path, values in _arrays(episode.observations).items()
            }
            if not len(terminated) == len(truncated) == len(episode.actions) == steps:
                raise DatasetError(
                    f"{self._name}: episode {number} has {steps} rewards, {len(episode.actions)} actions, "
                    f"{len(terminated)} terminations and {len(truncated)} truncations"
                )
            both = np.flatnonzero(terminated & truncated)
            if len(both) and self.both_row is None:
                self.both_row = start + int(both[0])
            self.both += len(both)
            done = terminated | truncated
            done[-1] = True
            actions = tensor(np.asarray(episode.actions), self._name, "actions")
            rewards = tensor(np.asarray(episode.rewards), self._name, "rewards")
            if start < first:
                start += steps
                continue
            yield {
                **{entry("observation", *path): values[:-1] for path, values in observations.items()},
                "action": action(actions, self._discrete, self._name),
                REWARD: reward(rewards, self._name),
                DONE: torch.from_numpy(done).unsqueeze(-1),
                TERMINATED: torch.from_numpy(terminated).unsqueeze(-1),
                **{entry("next", "observation", *path): values[1:] for path, values in observations.items()},
            }
            start += steps

    def _observation(self, number: int, path: Names, values: Any, steps: int) -> torch.Tensor:
        if len(values) != steps + 1:
            raise DatasetError(
                f"{self._name}: episode {number} of {steps} steps must have {steps + 1} observations, got {len(values)}"
            )
        return observation(tensor(np.asarray(values), self._name, "/".join(("observations", *path))))


def _check_space(space: Any, name: str) -> None:
    """Raises for the dtype of a Box that is no number's: NumPy would make room for texts of any length."""
    if isinstance(space, dict):
        if not _NUMBERS.fullmatch(str(space.get("dtype", "bool"))):
            raise DatasetError(f"{name}: a space has dtype {str(space['dtype'])[:50]!r}, which is no number's")
        space = list(space.values())
    for inner in space if isinstance(space, list) else ():
        _check_space(inner, name)


def _arrays(observations: Any, path: Names = ()) -> dict[Names, Any]:
    if isinstance(observations, Mapping):
        nested: dict[Names, Any] = {}
        for name, inner in observations.items():
            nested |= _arrays(inner, (*path, str(name)))
        return nested
    return {path: observations}
