"""What every reader returns, and the one check that every dataset passes."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.checkpoint import existing_parent
from iql_plugins.data import summary
from iql_plugins.keys import DISCOUNT, STEPS_TO_NEXT_OBS, shown
from iql_plugins.limits import available_memory
from iql_plugins.spaces import Spaces

__all__ = ["Dataset", "DatasetError", "Options", "UnknownSourceError", "check_dataset"]

#: Bytes that are read at a time from a dataset that may be larger than memory.
CHUNK_BYTES = 2**26

REWARD: NestedKey = ("next", "reward")
DONE: NestedKey = ("next", "done")
TERMINATED: NestedKey = ("next", "terminated")


class DatasetError(ValueError):
    """A dataset that cannot be used; one line that names the file or object, and the key."""


class UnknownSourceError(DatasetError):
    """A source of data that no reader knows; the message lists those that are installed."""


@dataclass(frozen=True)
class Options:
    """How a dataset is to be read; see :func:`iql_plugins.data.load_dataset`.

    Attributes:
        trust_pickle: whether pickles may be loaded, which can run any code.
        discrete: whether actions are discrete; None finds out.
        memmap_dir: the folder that the dataset is written to, to stay there; None keeps it in memory.
        finite: whether values that are not finite are an error.
        name: what errors call the source; None leaves that to its reader.
        resume: what the source is told by: a copy in ``memmap_dir`` that was killed while it was made of the same one
            is gone on with. The folder is then the caller's to put away. None makes it whole, or not at all.
        single_steps: why n-step transitions are an error, if they are, before anything is written.
    """

    trust_pickle: bool = False
    discrete: bool | None = None
    memmap_dir: str | os.PathLike[str] | None = None
    finite: bool = True
    name: str | None = None
    resume: str | None = None
    single_steps: str | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Transitions, and what their source said that the key layout cannot say.

    Attributes:
        tensors: batch size ``[N]``, by the key layout, transitions in time order, episode after episode.
        source: where they come from, for messages.
        spaces: the environment's, where the source has them.
        env: Gymnasium's id of the environment, where the source has it. It is a stranger's word.
        dropped: transitions left out because their episode was cut and its final observation is missing.
        both: steps that the source marks as terminal and as time-out.
        both_row: the first of them, as a row of the source.
        timeouts_recorded: whether the source keeps time-outs apart from terminals at all.
        provenance: how it was made, as JSON values, where the source says so. It is a stranger's word.
        rows: ``[N]`` int64, the source's row of each transition; None where they are all of them, in its order.
    """

    tensors: TensorDictBase
    source: str
    spaces: Spaces | None = None
    env: str | None = None
    dropped: int = 0
    both: int = 0
    both_row: int | None = None
    timeouts_recorded: bool = True
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rows: Tensor | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content: names, shapes and numbers, whatever file they came from."""
        if (known := summary.of(self.tensors)) is not None and known.sha256 is not None:
            return known.sha256
        result = hashlib.sha256()
        for name, tensor in sorted(
            (key if isinstance(key, str) else "/".join(key), tensor) for key, tensor in self.tensors.items(True, True)
        ):
            result.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            for rows in chunks(len(tensor), row_bytes(tensor)):
                result.update(tensor[rows].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return result.hexdigest()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Makes whatever goes wrong inside a :class:`DatasetError`: a stranger's file makes libraries raise anything."""
    try:
        yield
    except (DatasetError, ImportError):
        raise
    except Exception as error:
        raise DatasetError(f"{name} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


def one_line(error: object) -> str:
    """The text of an error, cut to one short line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def leaves(dataset: TensorDictBase, key: NestedKey) -> dict[NestedKey, Tensor]:
    """The tensors at or under a key, by their keys."""
    prefix = (key,) if isinstance(key, str) else key
    entry = dataset.get(key)
    if not isinstance(entry, TensorDictBase):
        return {key: entry}
    return {
        (*prefix, *((name,) if isinstance(name, str) else name)): tensor
        for name, tensor in sorted(entry.items(True, True), key=lambda item: str(item[0]))
    }


def chunks(rows: int, row_bytes: int, start: int = 0) -> Iterator[slice]:
    """Slices that together are all rows from ``start`` on, each of a size that fits into memory."""
    size = max(1, CHUNK_BYTES // max(1, row_bytes))
    for first in range(start, rows, size):
        yield slice(first, min(first + size, rows))


def row_bytes(tensor: Tensor) -> int:
    """Bytes of one row."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def non_finite(tensor: Tensor) -> tuple[int | None, int]:
    """The first row that is not finite, and how many there are; reads a chunk at a time.

    Args:
        tensor: ``[N, ...]``.
    """
    first, count = None, 0
    if tensor.is_floating_point():
        for rows in chunks(len(tensor), 64 * row_bytes(tensor)):
            bad = (~tensor[rows].isfinite()).reshape(rows.stop - rows.start, -1).any(1).nonzero()
            if len(bad):
                first = rows.start + int(bad[0]) if first is None else first
                count += len(bad)
    return first, count


def not_finite(name: str, key: NestedKey, row: int, count: int) -> str:
    """What to say of values that are not finite: the first row that has one, and how many there are."""
    return f"{name}: {shown(key)} is not finite in row {row}, and in {count} rows in all"


def require_space(size: int, name: str, options: Options) -> None:
    """Raises :class:`DatasetError` unless that many bytes fit: on the disk of ``memmap_dir``, or into memory."""
    if options.memmap_dir is not None:
        folder = existing_parent(Path(options.memmap_dir))
        free = shutil.disk_usage(folder).free
        if size > free:
            raise DatasetError(f"{name} needs {size:,} bytes, of which {folder} has {free:,} left")
    elif size > (memory := available_memory()):
        raise DatasetError(
            f"{name} needs {size:,} bytes, more than the {memory:,} that are left of the memory: "
            "pass memmap_dir, a folder to write it to, where it stays memory-mapped"
        )


def is_of(source: object, package: str, name: str) -> bool:
    """Whether a source is an instance of a package's class, or of a subclass, without importing the package."""
    return any(kind.__name__ == name and kind.__module__.split(".")[0] == package for kind in type(source).__mro__)


def file_of(source: object, *suffixes: str) -> Path | None:
    """The file that a source is the path of, if it ends in one of these suffixes; else None.

    Raises:
        DatasetError: if there is no such file.
    """
    if not isinstance(source, str | os.PathLike) or Path(source).suffix.lower() not in suffixes:
        return None
    path = Path(source)
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    return path


def require_single_steps(dataset: TensorDictBase | Mapping[NestedKey, Tensor], instead: str) -> None:
    """Raises :class:`DatasetError` for n-step transitions, of which the reader would drop the n.

    Args:
        dataset: by the key layout.
        instead: how the reader makes n-step transitions itself.
    """
    for key in (STEPS_TO_NEXT_OBS, DISCOUNT):
        if dataset.get(key, None) is not None:
            raise DatasetError(f"the dataset has {shown(key)}: give single steps, {instead}")


def check_dataset(dataset: TensorDictBase, name: str = "the dataset", *, finite: bool = True) -> None:
    """Raises unless a dataset has the key layout.

    That is: batch size ``[N]`` with N >= 1; ``observation`` and ``("next", "observation")`` of equal shapes and
    dtypes (float32, uint8 or int64, or nested entries of these); ``action`` float32 ``[N, act]`` or int64
    ``[N, 1]`` >= 0; reward float32, done and terminated bool, ``[N, 1]``; no terminal state that does not end its
    episode; all finite. A memory-mapped dataset is read a chunk at a time, and not at all where its summary says so
    (:mod:`iql_plugins.data.summary`).

    Args:
        dataset: transitions in time order, episode after episode.
        name: what errors call it.
        finite: whether to look for values that are not finite.

    Raises:
        DatasetError: one line that names the key, and the first row where one is to blame.
    """
    if dataset.ndim != 1:
        raise DatasetError(f"{name} must have batch size [N], got {list(dataset.batch_size)}")
    rows = len(dataset)
    if rows == 0:
        raise DatasetError(f"{name} is empty: it has no transition")
    for key in ("observation", "action", REWARD, DONE, TERMINATED, ("next", "observation")):
        if dataset.get(key, None) is None:
            raise DatasetError(f"{name} has no {shown(key)}")
    for key, dtype in ((REWARD, torch.float32), (DONE, torch.bool), (TERMINATED, torch.bool)):
        _check_entry(name, key, dataset.get(key), dtype, (rows, 1))
    _check_observations(name, dataset)
    known = summary.of(dataset) is not None
    _check_action(name, dataset.get("action"), known=known)
    if known:
        return
    lost = (dataset.get(TERMINATED) & ~dataset.get(DONE)).nonzero()
    if len(lost):
        raise DatasetError(
            f"{name}: {shown(TERMINATED)} is True and {shown(DONE)} False in row {int(lost[0, 0])}: "
            "a terminal state ends its episode"
        )
    if finite:
        for key in ("observation", "action", REWARD, ("next", "observation")):
            for leaf, tensor in leaves(dataset, key).items():
                row, count = non_finite(tensor)
                if row is not None:
                    raise DatasetError(not_finite(name, leaf, row, count))


def _check_entry(name: str, key: NestedKey, entry: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(entry, Tensor):
        raise DatasetError(f"{name}: {shown(key)} must be a tensor, got {type(entry).__name__}")
    if entry.dtype != dtype or tuple(entry.shape) != shape:
        raise DatasetError(
            f"{name}: {shown(key)} must be {dtype} of shape {list(shape)}, got {entry.dtype} of {list(entry.shape)}"
        )


def _check_observations(name: str, dataset: TensorDictBase) -> None:
    observations = leaves(dataset, "observation")
    following = leaves(dataset, ("next", "observation"))
    names = [key for key in following if _under_next(key) not in observations]
    names += [key for key in observations if all(_under_next(other) != key for other in following)]
    if names or not observations:
        one = f": {shown(names[0])} has no counterpart" if names else ""
        raise DatasetError(f"{name}: 'observation' and ('next', 'observation') must have the same entries{one}")
    for key, after in following.items():
        before = observations[_under_next(key)]
        if before.dtype not in (torch.float32, torch.uint8, torch.int64) or before.ndim < 2 or 0 in before.shape:
            raise DatasetError(
                f"{name}: {shown(_under_next(key))} must be float32, uint8 or int64 of shape [N, ...], "
                f"got {before.dtype} of {list(before.shape)}"
            )
        _check_entry(name, key, after, before.dtype, tuple(before.shape))


def _under_next(key: NestedKey) -> NestedKey:
    rest: NestedKey = key[1:]
    return rest[0] if len(rest) == 1 else rest


def _check_action(name: str, action: object, *, known: bool) -> None:
    if not isinstance(action, Tensor):
        raise DatasetError(f"{name}: 'action' must be a tensor, got {type(action).__name__}")
    discrete = action.dtype == torch.int64
    if (not discrete and action.dtype != torch.float32) or action.ndim != 2 or action.shape[1] < 1:
        raise DatasetError(
            f"{name}: 'action' must be float32 of shape [N, act], or int64 of [N, 1] for discrete ones, "
            f"got {action.dtype} of {list(action.shape)}"
        )
    if discrete:
        if action.shape[1] != 1:
            raise DatasetError(f"{name}: discrete 'action' must have shape [N, 1], got {list(action.shape)}")
        if not known and len(negative := (action < 0).nonzero()):
            row = int(negative[0, 0])
            raise DatasetError(f"{name}: discrete 'action' must be >= 0, got {int(action[row, 0])} in row {row}")
