"""From arrays, as files and buffers have them, to the key layout: the only place that knows both."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.checkpoint import new_folder, vacant, write_bytes
from iql_plugins.data.columns import OGBENCH_METADATA, readable
from iql_plugins.data.dataset import (
    DONE,
    REWARD,
    TERMINATED,
    Dataset,
    DatasetError,
    Options,
    check_dataset,
    chunks,
    one_line,
    require_single_steps,
    require_space,
    row_bytes,
)
from iql_plugins.keys import shown
from iql_plugins.spaces import Spaces

__all__ = ["Column", "Concatenated", "Transitions", "assemble"]

Array = np.ndarray[Any, np.dtype[Any]]
Block = dict[NestedKey, Tensor]
Blocks = Callable[[int], Iterable[Block]]
Names = tuple[str, ...]

#: Whole numbers from 0 to this in a single float column are taken for discrete actions.
MOST_ACTIONS = 1024

_OF_A_TASK = (
    "; if it is OGBench's: 'rewards' and 'masks' are those of a task, with which its own loader labels the data: "
    "_, train, _ = ogbench.make_env_and_datasets('cube-double-play-singletask-v0'); np.savez('labelled.npz', **train)"
)


class Column(Protocol):
    """One value a transition, read by slices of rows: an array, a memory-mapped one, an HDF5 dataset."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, ...)``."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's."""

    def __getitem__(self, rows: slice, /) -> Array: ...


class Concatenated:
    """Columns one after another, as one column; nothing is copied until it is read.

    Args:
        parts: at least one, of equal dtypes and shapes but for the first dimension.
        name: of the dataset, for the message.
        key: of the column, for the message.

    Raises:
        DatasetError: if they differ.
    """

    def __init__(self, parts: Sequence[Column], name: str, key: str) -> None:
        for number, part in enumerate(parts):
            if len(part.shape) == 0 or part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype:
                raise DatasetError(
                    f"{name}: {key!r} is {part.dtype} of shape {list(part.shape)} in episode {number}, "
                    f"and {parts[0].dtype} of {list(parts[0].shape)} in the first"
                )
        self._parts = parts
        self._ends = np.cumsum([part.shape[0] for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __getitem__(self, rows: slice, /) -> Array:
        start, stop, _ = rows.indices(self.shape[0])
        pieces = []
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            offset = int(self._ends[part]) - self._parts[part].shape[0]
            end = min(stop, int(self._ends[part]))
            pieces.append(self._parts[part][start - offset : end - offset])
            start, part = end, part + 1
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)


@dataclass(frozen=True)
class Transitions:
    """Columns of N transitions in time order, episode after episode, named as in D4RL.

    Without ``next_observations`` they are the following row's. The last step of an episode that was cut has no
    following row: its final observation is missing, and that transition is left out; the one before it then ends
    the episode, as a time-out. Terminal steps are kept with their own observation as the next one, which nothing
    reads: a terminal state has no future. At the end of the data an episode that is neither terminated nor cut
    loses its last transition, too. A step marked both as terminal and as time-out is terminal.

    Five columns, of which each is ``[N]`` or ``[N, 1]``, 0 or 1, tell where episodes end, and how:

    - ``terminals``: the step reached a terminal state;
    - ``timeouts``: it was the last before a cut;
    - ``dones``: it was an episode's last, for either reason;
    - ``masks``: its value goes on, which it does but in terminal states;
    - ``valids``: it is a step at all, and no final observation in a row of its own, which is left out.

    ``terminals`` are enough where no step was cut. ``masks`` can be in place of them, and ``dones`` in place of
    either of the two others, but not alone: they do not tell the two apart. What is said twice must agree, but for
    OGBench's ``masks``, with which ``terminals`` mark the last steps of trajectories, terminal states or not. That
    is so where they are called ``terminals``, and there are neither ``timeouts`` nor ``dones``; with ``masks`` of 1
    alone, where the two readings differ in everything, it is refused, unless what only OGBench has is there, too.
    It is also refused if such a file has no ``masks``, and ``terminals`` after equal numbers of steps.
    With ``valids``, of OGBench's compact files, ``terminals`` are in the last two rows of each trajectory, and without
    ``masks`` no state is terminal.

    Attributes:
        name: of the source, for messages.
        observations: ``[N, *obs]`` under the path ``()``, or one for each entry of a Dict observation.
        actions: ``[N, act]``, or discrete ``[N]``, ``[N, 1]`` or one-hot ``[N, n]``.
        rewards: ``[N]`` or ``[N, 1]``.
        ends: some of the five columns above, by their names.
        next_observations: as ``observations``; None to take the following row's.
        spaces: the environment's, where they are known.
        names: what the source calls columns, by the names of these attributes, where it has others.
        metadata: the names of what else the source has.
    """

    name: str
    observations: Mapping[Names, Column]
    actions: Column
    rewards: Column
    ends: Mapping[str, Column]
    next_observations: Mapping[Names, Column] | None = None
    spaces: Spaces | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    metadata: Collection[str] = ()

    @classmethod
    def from_columns(cls, name: str, columns: Mapping[str, Column], metadata: Iterable[str] = ()) -> "Transitions":
        """The transitions of columns by any of the names in :mod:`iql_plugins.data.columns`.

        Args:
            name: of the source, for messages.
            columns: by their names.
            metadata: the names of what else the source has.

        Raises:
            DatasetError: for a column that is missing, or is not one that is read; names it.
        """
        names = {ours: given for given, ours in readable(name, columns).items()}
        found = {ours: columns[given] for ours, given in names.items()}
        has = f"it has {', '.join(sorted(names.values())) or 'nothing'}"
        ends: dict[str, Column] = {
            key: found[key] for key in ("terminals", "timeouts", "dones", "masks", "valids") if key in found
        }
        for key in ("actions", "rewards"):
            if key not in found:
                hint = _OF_A_TASK if key == "rewards" and ends.keys() <= {"terminals", "valids"} else ""
                raise DatasetError(f"{name} has no {key!r}; {has}{hint}")
        if ends.keys() == {"dones"}:
            raise DatasetError(
                f"{name} has {names['dones']!r}, which do not tell terminal states from time-outs, and neither "
                "'terminals' nor 'timeouts', which would: add one of them"
            )
        if ends.keys() <= {"timeouts", "valids"}:
            raise DatasetError(f"{name} has no 'terminals'; {has}")
        observations, following = (_by_path(name, key, found) for key in ("observations", "next_observations"))
        if not observations:
            raise DatasetError(f"{name} has no 'observations'; {has}")
        metadata = {*metadata, *columns} - set(names.values())
        return cls(
            name,
            observations,
            found["actions"],
            found["rewards"],
            ends,
            following or None,
            names=names,
            metadata=metadata,
        )

    def load(self, options: Options, unpacked: int = 0) -> Dataset:
        """The dataset.

        Args:
            options: how it is to be loaded.
            unpacked: bytes that the columns themselves take where the dataset goes, once they are read.

        Raises:
            DatasetError: for anything that does not fit together, or does not fit; before any column is read where
                shapes and dtypes tell; names the column.
        """
        rows = self._rows()
        # Flags and row numbers are in memory even if nothing else is, and at least a row of the columns.
        row = sum(map(_row_bytes, self._columns().values()))
        require_space(max(16 * rows, 2 * row), self.name, replace(options, memmap_dir=None))
        require_space(unpacked + rows * self._smallest_row(), self.name, options)
        terminals, timeouts = self._ends(rows)
        both = np.flatnonzero(terminals & timeouts)
        timeouts &= ~terminals
        lost = np.zeros(rows, bool)
        if self.next_observations is None:
            lost |= timeouts
            lost[-1] |= not terminals[-1]
        kept = np.flatnonzero(~lost)
        if len(kept) == 0:
            raise DatasetError(
                f"{self.name} has no transition left: it has no 'next_observations', "
                "and each of its episodes is one step that was cut"
            )
        cut = timeouts.copy()
        cut[:-1] |= lost[1:] & timeouts[1:]
        discrete = self._discrete(options)
        blocks = partial(self._blocks, kept, terminals, cut & ~terminals, discrete)
        tensors = assemble(blocks, len(kept), self.name, options)
        return Dataset(
            tensors,
            self.name,
            # Rows that are not valid were no transitions.
            dropped=int((lost & self._valid(rows)).sum()),
            both=len(both),
            both_row=int(both[0]) if len(both) else None,
            spaces=self.spaces,
            rows=torch.from_numpy(kept) if len(kept) < rows else None,
        )

    def _valid(self, rows: int) -> Array:
        """``[rows]`` whether each row is a transition."""
        if "valids" not in self.ends:
            return np.ones(rows, bool)
        valid: Array = np.asarray(self.ends["valids"][0:rows]).reshape(-1) != 0
        return valid

    def _columns(self) -> dict[str, Column]:
        named = {"rewards": self.rewards, "actions": self.actions, **self.ends}
        for key, group in (("observations", self.observations), ("next_observations", self.next_observations or {})):
            named |= {"/".join((key, *path)): column for path, column in group.items()}
        return named

    def _called(self, key: str) -> str:
        return self.names.get(key, key)

    def _ends(self, rows: int) -> tuple[Array, Array]:
        """Which steps reached a terminal state, and which were cut."""
        given = {key: _flags(self.name, self._called(key), column) for key, column in self.ends.items()}

        def agree(right: Array) -> None:
            wrong = np.flatnonzero(~right)
            if len(wrong):
                values = " and ".join(f"{self._called(key)!r} {int(flags[wrong[0]])}" for key, flags in given.items())
                raise DatasetError(
                    f"{self.name}: {values} in row {wrong[0]} contradict each other, as in {len(wrong)} rows in all"
                )

        ends, none = dict(given), np.zeros(rows, bool)
        if "valids" in given:
            return self._compact_ends(given, agree)
        ogbenchs = OGBENCH_METADATA.intersection(self.metadata)
        unclear = self._called("terminals") == "terminals"
        if unclear and ogbenchs and given.keys() == {"terminals"} and (length := _period(given["terminals"])):
            raise DatasetError(
                f"{self.name}: 'terminals' are 1 after every {length} steps, and 'masks' are missing: with "
                f"{min(ogbenchs)!r} it looks like OGBench's, where they mark the last steps of trajectories, terminal "
                "states or not: add 'masks', 0 where a state is terminal and 1 elsewhere; if they do mark terminal "
                "states, call them 'terminations'"
            )
        if "masks" in given:
            masks = given["masks"]
            if unclear and given.keys() == {"terminals", "masks"}:
                if masks.all() and given["terminals"].any() and not ogbenchs:
                    raise DatasetError(
                        f"{self.name}: 'masks' is 1 in every row, so that 'terminals', {int(given['terminals'].sum())} "
                        "of them, would be no terminal states: drop 'masks' if they are, as in D4RL's files; rename "
                        "'terminals' to 'timeouts' if they are not, as in a task of OGBench's that no row solves"
                    )
                return ~masks, given["terminals"] & masks
            agree(given.get("terminals", ~masks) == ~masks)
            ends["terminals"] = ~masks
        if "dones" in given:
            dones = given["dones"]
            ends.setdefault("terminals", dones & ~ends.get("timeouts", none))
            ends.setdefault("timeouts", dones & ~ends["terminals"])
            agree(dones == (ends["terminals"] | ends["timeouts"]))
        return ends["terminals"], ends.get("timeouts", none)

    def _compact_ends(self, given: Mapping[str, Array], agree: Callable[[Array], None]) -> tuple[Array, Array]:
        """Likewise, where final observations have rows of their own."""
        more = [key for key in ("timeouts", "dones") if key in given]
        more += ["next_observations"] if self.next_observations is not None else []
        if more:
            raise DatasetError(
                f"{self.name} has 'valids', of OGBench's compact files, whose next observations are the following "
                f"row's and whose ends 'terminals' and 'masks' tell, and {self._called(more[0])!r}: drop one of the two"
            )
        valid = given["valids"]
        last = ~valid
        last[:-1] |= last[1:]
        if "terminals" in given:
            # Of the last row nobody knows whether its trajectory went on.
            last[-1] |= given["terminals"][-1]
            agree(given["terminals"] == last)
        masks = given.get("masks", np.ones_like(valid))
        return ~masks & valid, ~valid

    def _rows(self) -> int:
        columns = self._columns()
        for key, column in columns.items():
            if not column.shape:
                raise DatasetError(
                    f"{self.name}: {self._called(key)!r} must have a row for each transition, got a single value"
                )
        rows = self.rewards.shape[0]
        for key, column in columns.items():
            if column.shape[0] != rows:
                raise DatasetError(
                    f"{self.name}: {self._called(key)!r} has {column.shape[0]} rows, "
                    f"{self._called('rewards')!r} has {rows}"
                )
        if rows == 0:
            raise DatasetError(f"{self.name} is empty: it has no transition")
        if self.next_observations is not None and set(self.next_observations) != set(self.observations):
            entries = sorted("/".join(path) for path in set(self.next_observations) ^ set(self.observations))
            raise DatasetError(
                f"{self.name}: 'observations' and 'next_observations' must have the same entries; "
                f"not in both is {entries[0]!r}"
            )
        return rows

    def _smallest_row(self) -> int:
        """Bytes of a transition of the dataset, at least: reward, action and two flags beside the observations."""
        following = self.observations if self.next_observations is None else self.next_observations
        observed = [*self.observations.values(), *following.values()]
        return 10 + sum(math.prod(column.shape[1:]) * (1 if column.dtype == np.uint8 else 4) for column in observed)

    def _discrete(self, options: Options) -> bool:
        if options.discrete is not None:
            return options.discrete
        if self.spaces is not None:
            return self.spaces.discrete
        if self.actions.dtype.kind != "f":
            return True
        if len(self.actions.shape) > 1 and self.actions.shape[1:] != (1,):
            return False
        # Discrete actions are often stored in a column of floats, as everything else is.
        for rows in chunks(self.actions.shape[0], self.actions.dtype.itemsize):
            values = self.actions[rows]
            if not ((values >= 0) & (values < MOST_ACTIONS) & (values == np.floor(values))).all():
                return False
        return True

    def _blocks(self, kept: Array, terminals: Array, cut: Array, discrete: bool, start: int) -> Iterator[Block]:
        size = sum(_row_bytes(column) for column in self._columns().values())
        for part in chunks(len(kept), size, start):
            rows = kept[part]
            done = torch.from_numpy((terminals | cut)[rows])
            yield {
                **{
                    entry("observation", *path): self._observation("", path, column, rows)
                    for path, column in self.observations.items()
                },
                "action": action(self._tensor("actions", self.actions, rows), discrete, self.name),
                REWARD: reward(self._tensor("rewards", self.rewards, rows), self.name),
                DONE: done.unsqueeze(-1),
                TERMINATED: torch.from_numpy(terminals[rows]).unsqueeze(-1),
                **self._next_observations(rows, terminals),
            }

    def _next_observations(self, rows: Array, terminals: Array) -> Block:
        if self.next_observations is not None:
            return {
                ("next", "observation", *path): self._observation("next_", path, column, rows)
                for path, column in self.next_observations.items()
            }
        following = rows + ~terminals[rows]
        return {
            ("next", "observation", *path): self._observation("", path, column, following)
            for path, column in self.observations.items()
        }

    def _observation(self, prefix: str, path: Names, column: Column, rows: Array) -> Tensor:
        return observation(self._tensor("/".join((f"{prefix}observations", *path)), column, rows))

    def _tensor(self, key: str, column: Column, rows: Array) -> Tensor:
        low, high = int(rows[0]), int(rows[-1]) + 1
        window = column[low:high]
        if len(window) != len(rows) or not np.array_equal(rows, np.arange(low, high)):
            window = window[rows - low]
        return tensor(window, self.name, self._called(key))


def entry(*names: str) -> NestedKey:
    """A nested key; a string if there is one name."""
    return names if len(names) > 1 else names[0]


def _by_path(name: str, group: str, columns: Mapping[str, Column]) -> dict[Names, Column]:
    paths = {tuple(key.split("/"))[1:]: column for key, column in columns.items() if key.split("/")[0] == group}
    for path in paths:
        if path and (() in paths or not all(path)):
            raise DatasetError(f"{name}: {'/'.join((group, *path))!r} must be an entry of {group!r}, and the only kind")
    return paths


def _period(flags: Array) -> int | None:
    """The number of rows from each flag to the next, if there are at least two, and no other number anywhere."""
    places = np.flatnonzero(flags)
    lengths = np.diff(places, prepend=-1)
    if len(lengths) < 2 or (lengths != lengths[0]).any() or len(flags) - 1 - places[-1] > lengths[0]:
        return None
    return int(lengths[0]) if lengths[0] > 1 else None


def _row_bytes(column: Column) -> int:
    return math.prod(column.shape[1:]) * column.dtype.itemsize


def _flags(name: str, key: str, column: Column) -> Array:
    if len(column.shape) > 2 or (len(column.shape) == 2 and column.shape[1] != 1):
        raise DatasetError(f"{name}: {key!r} must have shape [N] or [N, 1], got {list(column.shape)}")
    if column.dtype.kind not in "biuf":
        raise DatasetError(f"{name}: {key!r} must be 0 or 1, got dtype {column.dtype}")
    values = np.asarray(column[0 : column.shape[0]]).reshape(-1)
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise DatasetError(f"{name}: {key!r} must be 0 or 1, got {values[wrong[0]]} in row {wrong[0]}")
    flags: Array = values != 0
    return flags


def tensor(array: Array, name: str, key: str) -> Tensor:
    """An array of numbers as a tensor: floats as float32, integers as int64 or uint8, bool.

    Raises:
        DatasetError: if it holds anything else.
    """
    kind = array.dtype.kind
    if kind not in "fiub":
        raise DatasetError(f"{name}: {key!r} must be numbers, got dtype {array.dtype}")
    dtype = {"f": np.float32, "b": np.bool_}.get(kind, np.uint8 if array.dtype == np.uint8 else np.int64)
    # What float32 cannot hold becomes infinite, and is then reported with its row.
    with np.errstate(over="ignore", invalid="ignore"):
        # A copy where none was needed: the source may be read-only, which torch has no notion of.
        return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def observation(values: Tensor) -> Tensor:
    """Observations by the key layout: float32 ``[N, *obs]``, uint8 images, discrete ones int64 ``[N, 1]``.

    Args:
        values: ``[N, *obs]``; ``[N]`` is taken for ``[N, 1]``.
    """
    if values.ndim == 1:
        values = values.unsqueeze(-1)
    single = values.ndim == 2 and values.shape[1] == 1
    if values.is_floating_point() or values.dtype == torch.bool:
        return values.float()
    if single:
        return values.long()
    return values if values.dtype == torch.uint8 else values.float()


def action(values: Tensor, discrete: bool, name: str) -> Tensor:
    """Actions by the key layout: float32 ``[N, act]``, or int64 ``[N, 1]``.

    Args:
        values: ``[N]`` is taken for ``[N, 1]``; discrete ones may be one-hot, ``[N, n]``.
        discrete: whether they are discrete.
        name: of the dataset, for the message.

    Raises:
        DatasetError: for any other shape, and for discrete actions that are no whole numbers.
    """
    if values.ndim == 1:
        values = values.unsqueeze(-1)
    if values.ndim != 2 or values.shape[1] == 0:
        raise DatasetError(f"{name}: actions must have shape [N, act], or [N] if discrete, got {list(values.shape)}")
    if not discrete:
        return values.float()
    if values.shape[1] == 1:
        indices = values.long()
        if values.is_floating_point() and not bool((indices == values).all()):
            wrong = float(values[indices != values][0])
            raise DatasetError(f"{name}: discrete actions must be whole numbers, got {wrong}")
        return indices
    if bool((((values == 0) | (values == 1)).all(1) & (values != 0).sum(1).eq(1)).all()):
        return values.long().argmax(1, keepdim=True)
    raise DatasetError(
        f"{name}: discrete actions must be one number of shape [N] or [N, 1], or one-hot, "
        f"got {values.dtype} of {list(values.shape)}"
    )


def reward(values: Tensor, name: str) -> Tensor:
    """Rewards by the key layout: float32 ``[N, 1]``, from ``[N]`` or ``[N, 1]``.

    Raises:
        DatasetError: for any other shape.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        return values.float()
    if values.ndim == 1:
        return values.float().unsqueeze(-1)
    raise DatasetError(f"{name}: rewards must have shape [N] or [N, 1], got {list(values.shape)}")


def assemble(blocks: Blocks, rows: int, name: str, options: Options) -> TensorDict:
    """Blocks of consecutive transitions as one checked dataset, in memory or memory-mapped.

    Args:
        blocks: tensors by the key layout, in order, from a row on with which one began before.
        rows: transitions in all blocks together.
        name: of the dataset, for messages.
        options: with ``memmap_dir``, the dataset is written there block by block, and appears there only once it is
            complete and checked. With ``resume``, it is there from the first block on, and how far it has come stands
            beside it, in ``progress.json``.

    Raises:
        DatasetError: if blocks do not fit together, or the dataset does not pass its check.
    """
    if options.memmap_dir is None:
        dataset = _filled(blocks, rows, name, options, None)
        check_dataset(dataset, name, finite=options.finite)
        return dataset
    target = Path(options.memmap_dir)
    if options.resume is not None:
        check_dataset(_filled(blocks, rows, name, options, target), name, finite=options.finite)
        return TensorDict.load_memmap(target, allow_pickle=False)
    if not vacant(target):
        raise DatasetError(
            f"memmap_dir must be a new or an empty folder, {target} is not: "
            "a dataset that was written there can be loaded by that folder's name"
        )
    with new_folder(target) as folder:
        check_dataset(_filled(blocks, rows, name, options, folder), name, finite=options.finite)
    return TensorDict.load_memmap(target, allow_pickle=False)


def _filled(blocks: Blocks, rows: int, name: str, options: Options, folder: Path | None) -> TensorDict:
    progress = None if folder is None or options.resume is None else _Progress(folder, rows, options.resume)
    dataset: TensorDict | None = None
    start = 0
    if progress is not None and (start := progress.start()) > 0:
        dataset = TensorDict.load_memmap(folder, allow_pickle=False)
    for block in blocks(start):
        if dataset is None:
            if options.single_steps is not None:
                require_single_steps(block, options.single_steps)
            dataset = _allocated(block, rows, name, options, folder)
        stop = start + len(block[REWARD])
        if stop > rows:
            raise DatasetError(f"{name} has more transitions than the {rows} that it says it has")
        for key, values in block.items():
            into = dataset.get(key, None)
            if into is None or values.shape[1:] != into.shape[1:] or values.dtype != into.dtype:
                was = "missing" if into is None else f"{into.dtype} of {list(into.shape[1:])}"
                raise DatasetError(
                    f"{name}: {shown(key)} is {values.dtype} of {list(values.shape[1:])} a row from row {start} on, "
                    f"and {was} before"
                )
            if len(values) != stop - start:
                raise DatasetError(f"{name}: {shown(key)} has {len(values)} rows, the rewards {stop - start}")
            into[start:stop] = values
        if progress is not None:
            progress.reached(stop)
        start = stop
    if dataset is None or start != rows:
        raise DatasetError(f"{name} has {start} transitions, {rows} were expected")
    return dataset


_SECONDS_BETWEEN_NOTES = 1.0


class _Progress:
    """How far a folder is filled, which stands beside it.

    Args:
        folder: of the dataset.
        rows: transitions that it gets.
        source: what it is made of.
    """

    def __init__(self, folder: Path, rows: int, source: str) -> None:
        self._folder, self._file = folder, folder.parent / "progress.json"
        self._kind = {"rows": rows, "source": source}
        self._noted = time.monotonic()

    def start(self) -> int:
        """The row to go on from; what was made of something else is thrown away."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(self._file.read_text())
            row = found.pop("filled")
            if found == self._kind and self._folder.is_dir():
                return int(row)
        shutil.rmtree(self._folder, ignore_errors=True)
        return 0

    def reached(self, row: int) -> None:
        """Notes that all before a row is on the disk; once a second, because a block may be a short episode."""
        if time.monotonic() - self._noted < _SECONDS_BETWEEN_NOTES:
            return
        for file in self._folder.rglob("*.memmap"):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        write_bytes(self._file, json.dumps(self._kind | {"filled": row}).encode())
        self._noted = time.monotonic()


def _allocated(block: Block, rows: int, name: str, options: Options, folder: Path | None) -> TensorDict:
    require_space(rows * sum(map(row_bytes, block.values())), name, options)
    if folder is None:
        return TensorDict(
            {key: torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device="cpu") for key, t in block.items()},
            batch_size=[rows],
        )
    # One row that stands for all of them: only the files get the real size.
    shapes = TensorDict({key: t[:1].expand(rows, *t.shape[1:]) for key, t in block.items()}, batch_size=[rows])
    try:
        mapped = shapes.memmap_like(folder)
        if hasattr(os, "posix_fallocate"):
            # A file with holes has its size and no space: a disk that fills while it is written to kills the process.
            for path in folder.rglob("*.memmap"):
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"{name} cannot be written to {options.memmap_dir}: {one_line(error)}") from error
    return mapped
