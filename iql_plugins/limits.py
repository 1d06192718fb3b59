"""How much is believed of a file that anybody may have written: memory that is there, JSON that is flat."""

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = [
    "DEEPEST_PROVENANCE",
    "MOST_PROVENANCE",
    "WeightLimit",
    "available_memory",
    "load_torch",
    "parse_json",
    "read_json",
]

#: Documents of ours and of those whose files are read nest less than ten deep.
DEEPEST = 100
#: Bytes of what a file says of how it was made, and how deep that may be nested: other documents hold it.
MOST_PROVENANCE, DEEPEST_PROVENANCE = 2**20, 20
#: What a character of JSON takes at most once it is parsed: an empty list of two characters and a comma.
_PARSED_BYTES = 24


def available_memory() -> int:
    """Bytes that this process can still take: of the machine's memory, its container's and its own limit."""
    bounds = [sys.maxsize]
    if hasattr(os, "sysconf"):
        bounds.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError):
        bounds += [1024 * int(free) for free in re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())]
    with contextlib.suppress(OSError):
        bounds += map(int, re.findall(r"\d+", Path("/sys/fs/cgroup/memory.max").read_text()))
    with contextlib.suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            taken = 0
            with contextlib.suppress(OSError):
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            bounds.append(max(limit - taken, 0))
    return min(bounds)


def read_json(path: Path) -> Any:
    """The document in a JSON file; see :func:`parse_json`.

    Raises:
        OSError: if it cannot be read.
        ValueError: as :func:`parse_json`.
    """
    _check_size(path.stat().st_size)
    return parse_json(path.read_text())


def parse_json(text: str, deepest: int = DEEPEST) -> Any:
    """A JSON document.

    Args:
        text: of it.
        deepest: how deep it may be nested.

    Raises:
        ValueError: if it is none, is nested too deep for whoever walks through it, or needs more memory than there is.
    """
    _check_size(len(text))
    nested = ValueError(f"its JSON is nested more than {deepest} deep")
    try:
        document = json.loads(text)
    except RecursionError:
        raise nested from None
    level = [document]
    for _ in range(deepest):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise nested
    return document


def load_torch(source: str | os.PathLike[str] | IO[bytes]) -> Any:
    """What ``torch.save`` wrote, on the CPU: no code of the file is run, and no tensor is larger than its bytes.

    Raises:
        Exception: whatever torch and zipfile raise for a file that is none of theirs.
        ValueError: for an archive that unpacks to more than it holds.
    """
    with ZipFile(source) as archive:
        members = archive.infolist()
        stored = all(info.compress_type == ZIP_STORED and info.file_size == info.compress_size for info in members)
        if not stored or sum(info.file_size for info in members) > archive.start_dir:
            raise ValueError("it is compressed, which torch's files are not: it may unpack to any size")
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
    return torch.load(source, map_location="cpu", weights_only=True)


class WeightLimit(TorchFunctionMode):
    """Inside, networks are built of so many numbers at most, copies included: more is a ``ValueError``.

    Args:
        numbers: how many.
        why: what the error says of more.
    """

    def __init__(self, numbers: int, why: str) -> None:
        super().__init__()
        self._left, self._why = numbers, why

    @classmethod
    def of_file(cls, size: int) -> "WeightLimit":
        """No more than a file of so many bytes overwrites: two or more are a number, and critics are copied once."""
        return cls(size, f"its configuration names networks of more weights than the {size:,} bytes of its tensors are")

    @classmethod
    def of_memory(cls) -> "WeightLimit":
        """No more than memory holds, of four bytes each."""
        memory = available_memory()
        return cls(memory // 4, f"the networks do not fit into the {memory:,} bytes that are left of the memory")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts what is about to be allocated."""
        kwargs = kwargs or {}
        if func is Tensor.clone:
            self._take(args[0].numel())
        elif func in _FACTORIES:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            self._take(math.prod(size))
        return func(*args, **kwargs)

    def _take(self, numbers: int) -> None:
        self._left -= numbers
        if self._left < 0:
            raise ValueError(self._why)


_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


def _check_size(size: int) -> None:
    if size * _PARSED_BYTES > (memory := available_memory()):
        raise ValueError(f"its {size:,} bytes of JSON may take more than the {memory:,} that are left of the memory")
