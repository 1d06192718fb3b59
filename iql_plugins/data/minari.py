"""Minari datasets that are on this machine already."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iql_plugins.data import hdf5
from iql_plugins.data.arrays import Block, Names, action, assemble, entry, observation, reward, tensor
from iql_plugins.data.columns import METADATA, require_read, unread
from iql_plugins.data.dataset import DONE, REWARD, TERMINATED, DatasetError, Loaded, Options, reading
from iql_plugins.spaces import Spaces

__all__ = ["found", "is_identifier", "load"]

_IDENTIFIER = re.compile(r"(?:[-\w]+/)*[-\w]+-v\d+")
_METADATA = "metadata.json"
_READ = ("observations", "actions", "rewards", "terminations", "truncations")


def is_identifier(source: str) -> bool:
    """Whether it reads like the id of a Minari dataset, ``namespace/name-v0``."""
    return _IDENTIFIER.fullmatch(source) is not None


def found(source: str | Path) -> Path | None:
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


def load(path: Path, options: Options) -> Loaded:
    """The dataset in a folder of Minari's, which is read an episode at a time. Nothing is ever downloaded.

    Episodes have one observation more than steps, so that every transition has its final observation. An episode
    that ends neither terminated nor truncated was cut: its last step is marked done.

    Args:
        path: the folder of ``metadata.json``.
        options: with ``memmap_dir``, only one episode at a time needs to fit into memory.

    Raises:
        ImportError: without Minari; says how to install it.
        DatasetError: if it is no such dataset, has spaces other than Box, Discrete and Dict of these, or a column
            that is neither read nor metadata.
    """
    name = str(path)
    with reading(name):
        metadata = json.loads((path / _METADATA).read_text())
        for key in ("observation_space", "action_space"):
            if not isinstance(metadata.get(key), str):
                raise DatasetError(
                    f"{name} does not say its {key!r}: it would take to build the environment that it names, "
                    "which can run any code"
                )
        try:
            import minari  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("Minari datasets need minari: pip install 'iql-plugins[minari]'") from error
        dataset = minari.MinariDataset(path)
        _require_read(path / "main_data.hdf5")
        try:
            spaces = Spaces.from_gymnasium(dataset.observation_space, dataset.action_space)
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{name}: {error}") from error
        discrete = spaces.discrete if options.discrete is None else options.discrete
        reader = _Episodes(name, dataset, discrete)
        data = assemble(reader.blocks(), int(dataset.total_steps), name, options)
        return Loaded(data, name, both=reader.both, both_row=reader.both_row, spaces=spaces)


def _require_read(file_path: Path) -> None:
    """Looks at the names in Minari's HDF5 file itself, as Minari reads no other than those that it expects."""
    if file_path.is_file():
        with hdf5.opened(file_path) as file:
            for episode in file:
                columns = hdf5.member(file, episode, file_path)
                if not isinstance(columns, Mapping):
                    raise unread(str(file_path), episode, ["episode_0"])
                require_read(f"{file_path}: {episode}", columns, _READ, METADATA)


class _Episodes:
    """The blocks of a Minari dataset, an episode each, and what was met on the way."""

    def __init__(self, name: str, dataset: Any, discrete: bool) -> None:
        self.both = 0
        self.both_row: int | None = None
        self._name, self._dataset, self._discrete = name, dataset, discrete

    def blocks(self) -> Iterator[Block]:
        start = 0
        for number, episode in enumerate(self._dataset.iterate_episodes()):
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


def _arrays(observations: Any, path: Names = ()) -> dict[Names, Any]:
    if isinstance(observations, Mapping):
        nested: dict[Names, Any] = {}
        for name, inner in observations.items():
            nested |= _arrays(inner, (*path, str(name)))
        return nested
    return {path: observations}
