"""What is known of a dataset on disk once and for all, so that nobody reads all of it again before the first step."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins import checkpoint
from iql_plugins.limits import read_json

__all__ = ["CHUNK", "Summary", "moments", "of", "statistics", "write"]

FILE, VERSION = "summary.json", 1
#: Rows of a dataset that are looked at together, so that a memory-mapped one stays mapped.
CHUNK = 65_536
#: Modification time of the files that a summary is of, in seconds: 1980, as in archives that can be made again, and a
#: number of the content, by which copies by size and time tell two conversions apart. Whatever writes to them
#: afterwards gives them another one.
_SEAL = 315_532_800


def _seal(sha256: str) -> int:
    return _SEAL + int(sha256[:7], 16)


@dataclass(frozen=True)
class Summary:
    """Of a dataset that has passed :func:`~iql_plugins.data.dataset.check_dataset`: all of it is finite.

    Attributes:
        rows: transitions.
        sha256: as :attr:`iql_plugins.data.Dataset.sha256`; None for a part of the keys.
        returns: mean, smallest and largest of the episodes.
        episodes: how many there are.
        columns: by key, ``low``, ``high``, ``mean`` and ``std`` over the rows; of integers the first two.
        env: the environment's id, where the source had it.
        spaces: its spaces as JSON values, likewise.
        provenance: how it was made, as JSON values, likewise.
    """

    rows: int
    sha256: str | None
    returns: tuple[float, float, float]
    episodes: int
    columns: Mapping[NestedKey, Mapping[str, Tensor]]
    env: str | None
    spaces: Mapping[str, Any] | None
    provenance: Mapping[str, Any]


def write(
    folder: Path,
    dataset: TensorDictBase,
    *,
    sha256: str,
    returns: Tensor,
    env: str | None,
    spaces: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> None:
    """Writes the summary of a memory-mapped dataset beside its files, and seals these.

    Args:
        folder: of the dataset.
        dataset: what is in it, checked.
        sha256: of the dataset.
        returns: of its episodes.
        env: the environment's id, if it is known.
        spaces: its spaces as JSON values, likewise.
        provenance: how it was made, as JSON values, likewise.
    """
    columns = {_name(key): _statistics(tensor) for key, tensor in dataset.items(True, True)}
    document = {
        "version": VERSION,
        "rows": len(dataset),
        "sha256": sha256,
        "returns": [float(returns.double().mean()), float(returns.min()), float(returns.max())],
        "episodes": len(returns),
        "columns": columns,
        "env": env,
        "spaces": spaces,
        "provenance": dict(provenance),
    }
    checkpoint.write_bytes(folder / FILE, (json.dumps(document, sort_keys=True, allow_nan=False) + "\n").encode())
    for file in folder.rglob("*.memmap"):
        # What is still to be written would be written later, and change the time.
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        os.utime(file, (_seal(sha256), _seal(sha256)))


def of(dataset: TensorDictBase) -> Summary | None:
    """The summary of a memory-mapped dataset, or of some of its keys; None if it has none, or has changed since.

    A dataset that somebody changed, or copied without its times, is one without a summary. What is written by way of
    a mapping of a file in ``tmpfs`` changes no time.
    """
    entries = dict(dataset.items(True, True))
    files = {key: getattr(tensor, "filename", None) for key, tensor in entries.items()}
    folders = {None if file is None else Path(file).parents[_depth(key)] for key, file in files.items()}
    folder = folders.pop() if len(folders) == 1 else None
    if folder is None or not (folder / FILE).is_file():
        return None
    try:
        document = read_json(folder / FILE)
        rows, columns, seal = document["rows"], document["columns"], _seal(document["sha256"])
        for key, tensor in entries.items():
            status = os.stat(str(files[key]))
            own = Path(str(files[key])) == folder.joinpath(*_name(key).split("/")).with_suffix(".memmap")
            whole = len(tensor) == rows and tensor.is_contiguous() and status.st_size == tensor.nbytes
            if document["version"] != VERSION or not own or not whole or status.st_mtime_ns != seal * 10**9:
                return None
        mean, low, high = map(float, document["returns"])
        return Summary(
            rows,
            str(document["sha256"]) if columns.keys() == {_name(key) for key in entries} else None,
            (mean, low, high),
            int(document["episodes"]),
            {key: _tensors(columns[_name(key)], tensor) for key, tensor in entries.items()},
            document["env"] if isinstance(document["env"], str) else None,
            document["spaces"] if isinstance(document["spaces"], dict) else None,
            dict(document["provenance"]),
        )
    # It is no summary of ours, and of no use.
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, RuntimeError):
        return None


def moments(pieces: Callable[[], Iterable[Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the first dimension, float64 on the CPU.

    Args:
        pieces: the numbers, a part of them at a time; asked for twice.
    """
    sums = [(len(piece), piece.to("cpu", torch.float64).sum(0)) for piece in pieces()]
    count = sum(length for length, _ in sums)
    mean = sum((part for _, part in sums), torch.zeros_like(sums[0][1])) / count
    squares = torch.zeros_like(mean)
    for piece in pieces():
        squares += (piece.to("cpu", torch.float64) - mean).square().sum(0)
    return mean, (squares / count).sqrt()


def statistics(dataset: TensorDictBase, key: NestedKey, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Two numbers of each entry of a column: those stored with a dataset, or else a pass over it, a piece at a time.

    Args:
        dataset: batch size ``[N]``.
        key: of the column.
        names: ``("mean", "std")``, float64 on the CPU, or ``("low", "high")``, of the column's dtype.
    """
    known = of(dataset)
    stored = {} if known is None else known.columns[key]
    if stored.keys() >= set(names):
        return stored[names[0]], stored[names[1]]
    values = dataset.get(key)
    return moments(lambda: values.split(CHUNK)) if names == ("mean", "std") else _extremes(values)


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each entry over the first dimension; reads pieces of it."""
    pieces = [piece.aminmax(dim=0) for piece in values.split(CHUNK)]
    low, high = (torch.stack([getattr(piece, name) for piece in pieces]) for name in ("min", "max"))
    return low.amin(0), high.amax(0)


def _statistics(values: Tensor) -> dict[str, Any]:
    found: dict[str, Tensor] = {}
    if values.dtype in (torch.float32, torch.int64):
        found["low"], found["high"] = _extremes(values)
    if values.is_floating_point():
        found["mean"], found["std"] = moments(lambda: values.split(CHUNK))
    return {name: tensor.tolist() for name, tensor in found.items()}


def _tensors(column: Mapping[str, Any], values: Tensor) -> dict[str, Tensor]:
    exact = {"low": values.dtype, "high": values.dtype}
    found = {name: torch.tensor(numbers, dtype=exact.get(name, torch.float64)) for name, numbers in column.items()}
    if any(tensor.shape != values.shape[1:] or not bool(tensor.isfinite().all()) for tensor in found.values()):
        raise ValueError("statistics that are not of this column")
    return found


def _depth(key: NestedKey) -> int:
    return 0 if isinstance(key, str) else len(key) - 1


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else "/".join(key)
