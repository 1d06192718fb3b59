"""NumPy archives (``.npz``) with the columns of D4RL."""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy as copied
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo, is_zipfile

import numpy as np
from tensordict import TensorDictBase

from iql_plugins.checkpoint import existing_parent, naming
from iql_plugins.data.arrays import Array, Transitions
from iql_plugins.data.columns import readable, require_any
from iql_plugins.data.dataset import Dataset, DatasetError, Options, file_of, one_line, reading
from iql_plugins.hookspecs import hookimpl
from iql_plugins.limits import DEEPEST_PROVENANCE, MOST_PROVENANCE, parse_json
from iql_plugins.spaces import Spaces

__all__ = ["PROVENANCE", "load"]

#: The member that says how `iql-plugins make-dataset` made the others: a JSON object, as text.
PROVENANCE = "metadata"

#: NumPy's own limit of a header, and its length and magic before it; a longer one is not even unpacked.
_HEADER_BYTES = 12 + 10_000
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@hookimpl
def iql_read_dataset(source: object, options: Options) -> Dataset | None:
    """Takes the path of an ``.npz`` file."""
    path = file_of(source, ".npz")
    return None if path is None else load(path, options)


def load(path: Path, options: Options) -> Dataset:
    """The dataset of an archive with ``observations``, ``actions``, ``rewards``, ``terminals`` and, if there are, more.

    That is ``timeouts``, and ``next_observations``, without which the last transition of each episode that was cut
    is left out: see :class:`~iql_plugins.data.arrays.Transitions`. Dict observations are
    ``observations/NAME`` and ``next_observations/NAME``. The other names that are read, and those of metadata, which
    are not, are those of :mod:`iql_plugins.data.columns`. Whole numbers from 0 on in a single column of actions are
    discrete actions. Pickled objects are never loaded. With ``memmap_dir``, no column needs to fit into memory.

    Raises:
        UnknownSourceError: if none of its columns is read; another reader may know it.
        DatasetError: if it is no such archive, or has a column that is neither read nor metadata.
    """
    name = str(path)
    with reading(name):
        with path.open("rb") as file:
            archive = is_zipfile(file)
        if not archive:
            raise DatasetError(f"{name} is no .npz archive, or a truncated one")
        with ExitStack() as stack:
            members, metadata = _members(path, options, stack)
            unpacked = sum(member.nbytes for member in members.values())
            dataset = Transitions.from_columns(name, members, metadata).load(options, unpacked)
            return replace(dataset, **_described(path, dataset.tensors))


def _members(path: Path, options: Options, stack: ExitStack) -> tuple[dict[str, "_Member"], list[str]]:
    archive = stack.enter_context(ZipFile(path))
    folder = None
    if options.memmap_dir is not None:
        # An array that is compressed can be mapped only once it is unpacked.
        parent = existing_parent(Path(options.memmap_dir))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".unpacked-")))
    files = [(info.filename.removesuffix(".npy"), info) for info in archive.infolist() if not info.is_dir()]
    require_any(str(path), [key for key, _ in files])
    read = readable(str(path), [key for key, _ in files])
    members: dict[str, _Member] = {}
    for key, info in files:
        if key in read:
            copy = None if folder is None else folder / f"{len(members)}.npy"
            members[key] = _Member(archive, info, f"{path}: {key!r}", copy)
    return members, [key for key, _ in files if key not in read]


def _described(path: Path, tensors: TensorDictBase) -> dict[str, Any]:
    """How a file says that it was made; and in which environment, with which spaces, if its data are of them."""
    described: dict[str, Any] = {}
    # A stranger's document: whatever it is, and has in the place of these two.
    with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        document = described["provenance"] = _provenance(path)
        spaces, env = Spaces.from_json(document["spaces"]), document["env"]
        spaces.check(tensors)
        if isinstance(env, str):
            described |= {"spaces": spaces, "env": env}
    return described


def _provenance(path: Path) -> dict[str, Any]:
    """What ``make-dataset`` says in a file of how it made it; empty for other files.

    Raises:
        TypeError, ValueError: for something else of that name.
        OSError: if it cannot be read.
    """
    with ZipFile(path) as archive:
        info = archive.NameToInfo.get(f"{PROVENANCE}.npy")
        if info is None or info.file_size > MOST_PROVENANCE:
            return {}
        member = _Member(archive, info, f"{path}: {PROVENANCE!r}", None)
        if member.dtype.kind != "U" or member.shape != ():
            return {}
        return dict(parse_json(str(member._array), DEEPEST_PROVENANCE))


class _Member:
    """An array of an archive as a column: its header is read at once, its numbers when they are asked for.

    Args:
        archive: an open one.
        info: of the member.
        name: for errors.
        copy: the file that it is unpacked to, and mapped from; None for memory.

    Raises:
        DatasetError: unless the archive holds as much as the array's header says.
    """

    def __init__(self, archive: ZipFile, info: ZipInfo, name: str, copy: Path | None) -> None:
        self._archive, self._name, self._copy, self.nbytes = archive, name, copy, info.file_size
        # One byte more than the archive says: it is there if the archive says too little.
        self._info = copied(info)
        self._info.file_size += 1
        with self._reading():
            # Other methods unpack as much as they like at a time.
            if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
                raise ValueError("it is compressed as NumPy never does; np.savez_compressed does it well")
            with archive.open(self._info) as stream:
                start = BytesIO(stream.read(_HEADER_BYTES))
            version = np.lib.format.read_magic(start)
            if version not in _HEADERS:
                raise ValueError(f"it has version {version} of NumPy's format, which numbers do not need")
            self.shape, _, self.dtype = _HEADERS[version](start)
        if self.dtype.hasobject:
            raise DatasetError(
                f"{name} holds pickled Python objects, which can run any code; they are never loaded from an .npz"
            )
        claimed = start.tell() + math.prod(self.shape) * self.dtype.itemsize
        if min(self.shape, default=0) < 0 or claimed != info.file_size:
            raise DatasetError(
                f"{name} has {info.file_size:,} bytes, which are not the {self.dtype} of shape {list(self.shape)} "
                "that its header says"
            )

    def __getitem__(self, rows: slice, /) -> Array:
        part: Array = self._array[rows]
        return part

    @cached_property
    def _array(self) -> Array:
        with self._reading(), self._archive.open(self._info) as stream:
            array: Array
            if self._copy is None:
                array = np.lib.format.read_array(stream, allow_pickle=False)
            else:
                with naming(self._copy), self._copy.open("wb") as file:
                    shutil.copyfileobj(stream, file)
                array = np.load(self._copy, mmap_mode="r", allow_pickle=False)
            # Read to its end, a member is also held against its checksum.
            if stream.read(1) or (self._copy is not None and self._copy.stat().st_size != self.nbytes):
                raise ValueError(f"it unpacks to another size than the {self.nbytes:,} bytes that the archive says")
            return array

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise DatasetError(f"{self._name} cannot be read: {one_line(error)}") from error
