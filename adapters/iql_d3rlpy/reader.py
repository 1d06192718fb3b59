"""d3rlpy's replay buffers and ``.h5`` files as datasets. Imports no d3rlpy, so that any source can be looked at."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from iql_plugins.data import hdf5
from iql_plugins.data.arrays import Column, Concatenated, Transitions
from iql_plugins.data.columns import require_read, unread
from iql_plugins.data.dataset import Dataset, DatasetError, Options, file_of, is_of, reading, require_space

__all__ = ["read_dataset"]

_READ = ("observations", "actions", "rewards", "terminated")
_BUFFER, _COUNT = "ReplayBufferBase", "num_episodes"
_METADATA = frozenset({"columns", _COUNT, "version"})


def read_dataset(source: object, options: Options) -> Dataset | None:
    """The dataset in a ``ReplayBuffer`` or ``MDPDataset``, or in the file that either dumped; None for anything else.

    Raises:
        DatasetError: for episodes that do not fit together, and for data that are not read.
        ImportError: for a file, without h5py; says how to install it.
    """
    if is_of(source, "d3rlpy", _BUFFER):
        return _read_buffer(source, options)
    path = file_of(source, ".hdf5", ".h5")
    if path is None:
        return None
    with hdf5.opened(path) as file:
        return _read_file(file, path, options) if hdf5.has(file, _COUNT) else None


def _read_file(file: Any, path: Path, options: Options) -> Dataset:
    """The dataset of a file that ``ReplayBuffer.dump()`` wrote, or ``MDPDataset.dump()``.

    An episode of T steps has T observations. So one that was cut gives T - 1 transitions, as d3rlpy itself samples
    it: the observation after its last step was never stored. One that terminated gives T. Tuple observations get
    the entries ``"0"``, ``"1"``, ...
    """
    columns: list[dict[str, Column]] = []
    terminated = []
    for episode in range(hdf5.number(file, _COUNT, path)):
        entries: dict[str, Column] = {}
        for key in ("observations", "actions", "rewards"):
            entries |= _entries(file, key, episode, path)
        columns.append(entries)
        terminated.append(bool(hdf5.number(file, f"terminated_{episode}", path)))
    transitions = _transitions(str(path), columns, terminated)
    _require_read(path, file, columns)
    return transitions.load(options)


def _read_buffer(buffer: Any, options: Options) -> Dataset:
    name = options.name or f"the d3rlpy {type(buffer).__name__}"
    with reading(name):
        columns: list[dict[str, Column]] = []
        terminated = []
        for episode in buffer.episodes:
            require_read(name, episode.serialize(), _READ)
            observations = episode.observations
            parts = (
                {f"observations/{index}": np.asarray(part) for index, part in enumerate(observations)}
                if isinstance(observations, list | tuple)
                else {"observations": np.asarray(observations)}
            )
            columns.append({**parts, "actions": np.asarray(episode.actions), "rewards": np.asarray(episode.rewards)})
            terminated.append(bool(episode.terminated))
        if options.discrete is None:
            options = replace(options, discrete=buffer.dataset_info.action_space.name == "DISCRETE")
        return _transitions(name, columns, terminated).load(options)


def _require_read(path: Path, names: Iterable[str], episodes: Sequence[dict[str, Column]]) -> None:
    members = {
        "_".join((column, str(number), *index))
        for number, episode in enumerate(episodes)
        for column, *index in (key.split("/") for key in ("terminated", *episode))
    }
    for key in names:
        if key in members or key in _METADATA:
            continue
        if key.split("_")[0] in _READ:
            raise DatasetError(f"{path}: {key!r} belongs to none of its {len(episodes)} episodes: drop it")
        raise unread(str(path), key, _READ)


def _entries(file: Any, key: str, episode: int, path: Path) -> dict[str, Column]:
    if hdf5.has(file, f"{key}_{episode}") or key != "observations":
        return {key: hdf5.member(file, f"{key}_{episode}", path)}
    entries: dict[str, Column] = {}
    for index in count():
        if not hdf5.has(file, f"{key}_{episode}_{index}"):
            break
        entries[f"{key}/{index}"] = hdf5.member(file, f"{key}_{episode}_{index}", path)
    if not entries:
        raise DatasetError(f"{path} has no '{key}_{episode}'")
    return entries


def _transitions(name: str, episodes: Sequence[dict[str, Column]], terminated: Sequence[bool]) -> Transitions:
    if not episodes:
        raise DatasetError(f"{name} is empty: it has no episode")
    for number, episode in enumerate(episodes):
        if set(episode) != set(episodes[0]):
            raise DatasetError(f"{name}: episode {number} must have the entries of the first, {sorted(episodes[0])}")
        for key, column in episode.items():
            if not column.shape or column.shape[0] == 0 or column.shape[0] != episode["rewards"].shape[0]:
                raise DatasetError(
                    f"{name}: {key!r} and 'rewards' must be as long in episode {number}, "
                    f"got shapes {list(column.shape)} and {list(episode['rewards'].shape)}"
                )
    joined = {key: Concatenated([episode[key] for episode in episodes], name, key) for key in episodes[0]}
    rows = joined["rewards"].shape[0]
    require_space(2 * rows, name, Options())
    ends = np.cumsum([episode["rewards"].shape[0] for episode in episodes]) - 1
    terminals = np.zeros(rows, bool)
    terminals[ends] = terminated
    timeouts = np.zeros_like(terminals)
    timeouts[ends] = ~terminals[ends]
    return Transitions.from_columns(name, {**joined, "terminals": terminals, "timeouts": timeouts})
