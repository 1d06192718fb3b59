"""Opening HDF5 files that come from strangers."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iql_plugins.data.arrays import Array
from iql_plugins.data.dataset import CHUNK_BYTES, DatasetError, Options, reading, require_space

__all__ = ["Stored", "columns", "group_bytes", "has", "member", "number", "opened"]

_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32_000
#: How many times as large as its input the output of a filter can be; of any other filter, nobody knows.
_GROWTH = {_DEFLATE: 1032, _SHUFFLE: 1, _FLETCHER32: 1, _LZF: 88}
#: Of Fletcher32, behind a chunk.
_CHECKSUM_BYTES = 4


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An HDF5 file, open for reading.

    Raises:
        ImportError: without h5py; says how to install it.
        DatasetError: for whatever goes wrong while it is open.
    """
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'iql-plugins[cli]'") from error
    with reading(str(path)):
        # Says so if the file may not be read; is_hdf5() would say that it is none.
        path.open("rb").close()
        if not h5py.is_hdf5(path):
            raise DatasetError(f"{path} is no HDF5 file, or a truncated one")
        with h5py.File(path, "r") as file:
            yield file


def has(group: Any, key: str) -> bool:
    """Whether there is something under a key. ``key in group`` would open the file that a link leads to."""
    found: bool = group.id.links.exists(key.encode())
    return found


def member(group: Any, key: str, path: Path) -> Any:
    """The group under a key, or the dataset of numbers, as :class:`Stored`.

    Raises:
        DatasetError: if it is missing, or if its data are in another file, which this one could name at will; and as
            :class:`Stored`.
    """
    return _member(group, key, path, numbers=True)


def _member(group: Any, key: str, path: Path, *, numbers: bool) -> Any:
    import h5py

    full = f"{group.name}/{key}".lstrip("/")
    if not has(group, key):
        raise DatasetError(f"{path} has no {full!r}")
    found = group[key] if group.id.links.get_info(key.encode()).type == h5py.h5l.TYPE_HARD else None
    if found is None or (isinstance(found, h5py.Dataset) and (found.external or found.is_virtual)):
        raise DatasetError(f"{path}: {full!r} is a link, or data in another file; only data in the file itself is read")
    return Stored(found, f"{path}: {full!r}", numbers=numbers) if isinstance(found, h5py.Dataset) else found


def columns(group: Any, key: str, path: Path, met: set[int] | None = None) -> "dict[str, Stored]":
    """The dataset under a key or, if there is a group, all datasets in it, by their names ``key/...``.

    Args:
        group: the file, or a group of it.
        key: of the member.
        path: of the file, for errors.
        met: addresses of the groups that were met already.

    Raises:
        DatasetError: as :func:`member`, and for a group that is there twice.
    """
    import h5py

    found = member(group, key, path)
    if isinstance(found, Stored):
        return {key: found}
    if not isinstance(found, h5py.Group):
        raise DatasetError(f"{path}: {key!r} must be a dataset or a group")
    met = _with(found, path, met)
    return {f"{key}/{name}": column for inner in found for name, column in columns(found, inner, path, met).items()}


def _with(group: Any, path: Path, met: set[int] | None) -> set[int]:
    """The groups that were met, with one more. Links would make millions of a few, and rings of one."""
    import h5py

    met, address = set() if met is None else met, h5py.h5o.get_info(group.id).addr
    if address in met:
        raise DatasetError(f"{path}: {group.name!r} is there under another name, too: store it once")
    met.add(address)
    return met


def number(group: Any, key: str, path: Path) -> int:
    """The single number under a key.

    Raises:
        DatasetError: if it is missing, or something else.
    """
    found = member(group, key, path)
    if not isinstance(found, Stored) or math.prod(found.shape) != 1:
        raise DatasetError(f"{path}: {key!r} must be a single number")
    return int(found[...].reshape(-1)[0])


def group_bytes(group: Any, key: str, path: Path, met: set[int] | None = None) -> int:
    """Bytes that all datasets under a key unpack to, texts and images among them; arguments as of :func:`columns`.

    Raises:
        DatasetError: as :func:`columns`, and if the file has not as much.
    """
    found = _member(group, key, path, numbers=False)
    if not isinstance(found, Stored):
        met = _with(found, path, met)
        return sum(group_bytes(found, name, path, met) for name in found)
    return found.unpacked_bytes(path.stat().st_size)


class Stored:
    """A dataset as a column; it is known before it is read what it unpacks to.

    Args:
        dataset: h5py's.
        name: for errors.
        numbers: whether it must be numbers.

    Raises:
        DatasetError: if it is empty or holds anything but numbers, if its chunks are larger than itself or than
            memory, or if nobody knows beforehand how much its filters unpack to.
    """

    def __init__(self, dataset: Any, name: str, *, numbers: bool = True) -> None:
        if dataset.shape is None:
            raise DatasetError(f"{name} is empty")
        self._dataset, self._name, self._chunks_checked = dataset, name, dataset.chunks is None
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype[Any] = dataset.dtype
        if numbers and self.dtype.kind not in "fiub":
            raise DatasetError(f"{name} must be numbers, got dtype {self.dtype}")
        if dataset.chunks is None:
            return
        item_bytes = dataset.id.get_type().get_size()
        self._chunk_bytes = math.prod(dataset.chunks) * item_bytes
        if self._chunk_bytes > max(CHUNK_BYTES, math.prod(self.shape) * item_bytes):
            raise DatasetError(f"{name} has chunks of {self._chunk_bytes:,} bytes, which is more than all of it has")
        # The chunk and what it is made of, whatever part of it is read.
        require_space(2 * self._chunk_bytes, name, Options())
        properties = dataset.id.get_create_plist()
        self._filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
        known, packers = set(self._filters) & set(_GROWTH), set(self._filters) & {_DEFLATE, _LZF}
        if len(known) < len(self._filters) or len(packers) > 1:
            raise DatasetError(
                f"{name} has the filters {self._filters}, of which nobody knows beforehand how much they unpack to: "
                "write it anew, 'h5repack -f GZIP=4' does"
            )

    def __getitem__(self, rows: Any, /) -> Array:
        self._check_chunks()
        part: Array = self._dataset[rows]
        return part

    def unpacked_bytes(self, file_bytes: int) -> int:
        """Bytes that all of it takes; ``DatasetError`` for texts that are more than the file."""
        self._check_chunks()
        size = math.prod(self.shape) * self.dtype.itemsize
        if self.dtype.kind != "O":
            return size
        texts = 0
        # One at a time: many may be the same bytes of the file.
        for index in np.ndindex(self.shape) if size <= file_bytes else ():
            texts += len(self._dataset[index])
            if texts > file_bytes:
                break
        if size > file_bytes or texts > file_bytes:
            raise DatasetError(f"{self._name} holds more than the {file_bytes:,} bytes of the file")
        return size + texts

    def _check_chunks(self) -> None:
        """Raises for a chunk that unpacks to more than a chunk: the library unpacks it to its end, wherever that is."""
        if self._chunks_checked:
            return
        growth = math.prod(map(_GROWTH.__getitem__, self._filters))
        doubtful: list[Any] = []
        self._dataset.id.chunk_iter(
            lambda chunk: doubtful.append(chunk.chunk_offset) if chunk.size * growth > CHUNK_BYTES else None
        )
        for offset in doubtful:
            mask, content = self._dataset.id.read_direct_chunk(offset)
            used = {code for index, code in enumerate(self._filters) if not mask >> index & 1}
            if _LZF in used:
                require_space(len(content) * _GROWTH[_LZF], self._name, Options())
            if _DEFLATE in used and _inflates_beyond(content, self._chunk_bytes + _CHECKSUM_BYTES):
                raise DatasetError(
                    f"{self._name} has a chunk that unpacks to more than its {self._chunk_bytes:,} bytes"
                )
        self._chunks_checked = True


def _inflates_beyond(content: bytes, most: int) -> bool:
    """Whether a stream of DEFLATE unpacks to more bytes."""
    unpacker, size = zlib.decompressobj(), 0
    while content and size <= most:
        size += len(unpacker.decompress(content, 2**20))
        content = unpacker.unconsumed_tail
    return size > most
