"""Parquet: a file, or a folder of parts."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from iql_plugins.data.arrays import Array, Concatenated, Transitions
from iql_plugins.data.columns import component, readable, require_any
from iql_plugins.data.dataset import Dataset, DatasetError, Options, file_of, one_line, reading
from iql_plugins.data.parquet_pages import unpacked
from iql_plugins.data.readers import foreign
from iql_plugins.hookspecs import hookimpl
from iql_plugins.limits import DEEPEST_PROVENANCE, MOST_PROVENANCE, available_memory, parse_json
from iql_plugins.spaces import Spaces

__all__ = ["described"]

#: The entry of a file's metadata that is ours.
_METADATA = "iql_plugins"


@hookimpl
def iql_read_dataset(source: object, options: Options) -> Dataset | None:
    """Takes the path of a ``.parquet`` file, or of a folder with some, but for those of a format of its own."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source)
    if path.is_dir():
        # What begins so is no part, but about the parts.
        found = (part for part in path.glob("*.parquet") if part.name[0] not in "._" and part.is_file())
        parts = sorted(found, key=_number_aware)
    else:
        parts = [path] if file_of(source, ".parquet") is not None else []
    if not parts or foreign.conversion(parts[0]) is not None:
        return None
    return _load(path, parts, options)


def _number_aware(path: Path) -> list[tuple[int, str]]:
    """Orders ``part.10`` behind ``part.9``."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", path.name)]


def _load(path: Path, parts: Sequence[Path], options: Options) -> Dataset:
    """The dataset of files of the same columns, one after another, by the names that an ``.npz`` has.

    A column is numbers, or lists of as many in each row (observations, actions, images). Or there is one for each
    component: ``observation.0`` or ``observation_0``, from 0 on. The names of the key layout, ``next.reward``, are
    read, too, also as fields of a struct. Other names behind a dot are entries of a Dict observation. Files of a
    folder are in the order of their names, of which numbers count as such. Of each column one row group at a time is
    in memory.

    Raises:
        ImportError: without pyarrow; says how to install it.
        UnknownSourceError: if none of its columns is read; another reader may know it.
        DatasetError: if it is no such file, or has a column that is neither read nor metadata, or is anything but
            numbers, or a value that is missing.
    """
    name = str(path)
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'iql-plugins[parquet]'") from error
    with reading(name):
        metadata = []
        for part in parts:
            with reading(str(part)):
                metadata.append(pyarrow.parquet.read_metadata(part))
        leaves = _leaves(metadata[0].schema.to_arrow_schema())
        for part, other in zip(parts, metadata, strict=True):
            if _leaves(other.schema.to_arrow_schema()) != leaves:
                raise DatasetError(
                    f"{part} must have the columns of {parts[0].name}, of the same types and in that order"
                )
        groups = _groups(parts, metadata)
        if not groups:
            raise DatasetError(f"{name} is empty: it has no transition")
        columns = _by_key(name, leaves)
        if {"episode_index", "frame_index"} <= columns.keys():
            raise DatasetError(f"{name} {foreign.LEROBOT_FRAMES}")
        require_any(name, columns)
        read = readable(name, columns)
        stored = {key: _Stored(f"{name}: {key!r}", columns[key], groups) for key in read}
        whole = {
            key: Concatenated([_Part(column, group) for group in groups], name, key) for key, column in stored.items()
        }
        known = _known(metadata[0])
        if options.discrete is None and isinstance(known.get("discrete"), bool):
            options = replace(options, discrete=known["discrete"])
        dataset = Transitions.from_columns(name, whole, columns.keys() - read.keys()).load(options)
        # A stranger's document: whatever it has in their place.
        with suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            dataset = replace(dataset, provenance=dict(known.get("provenance") or {}))
            spaces = None if known["spaces"] is None else Spaces.from_json(known["spaces"])
            if spaces is not None:
                spaces.check(dataset.tensors)
            env = known["env"] if isinstance(known["env"], str) else None
            dataset = replace(dataset, env=env, spaces=spaces)
        return dataset


def described(dataset: Dataset) -> dict[str, str]:
    """What a file's metadata say of a dataset beside its columns."""
    document = {
        "discrete": not dataset.tensors.get("action").is_floating_point(),
        "env": dataset.env,
        "spaces": None if dataset.spaces is None else dataset.spaces.to_json(),
        "provenance": dict(dataset.provenance),
    }
    return {_METADATA: json.dumps(document, sort_keys=True)}


def _known(footer: Any) -> dict[str, Any]:
    """What :func:`described` wrote, if anything."""
    text = (footer.metadata or {}).get(_METADATA.encode(), b"")
    if len(text) > MOST_PROVENANCE:
        return {}
    with suppress(ValueError, TypeError):
        return dict(parse_json(text.decode(), DEEPEST_PROVENANCE + 2))
    return {}


@dataclass(frozen=True)
class _Leaf:
    """A column as Arrow has it: its name, or a field's of a struct, and its type."""

    path: tuple[str, ...]
    type: Any


@dataclass(frozen=True, eq=False)
class _Group:
    """A row group: its file, that file's footer, its number there, and its rows among those of all files."""

    file: Path
    metadata: Any
    number: int
    rows: range


def _groups(parts: Sequence[Path], metadata: Sequence[Any]) -> list[_Group]:
    groups: list[_Group] = []
    start = 0
    for part, footer in zip(parts, metadata, strict=True):
        lengths = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        if min(lengths, default=0) < 0 or sum(lengths) != footer.num_rows:
            raise DatasetError(f"{part} says it has {footer.num_rows} rows, and {sum(lengths)} in its row groups")
        for number, rows in enumerate(lengths):
            if rows:
                groups.append(_Group(part, footer, number, range(start, start + rows)))
            start += rows
    return groups


def _leaves(fields: Any, path: tuple[str, ...] = ()) -> list[_Leaf]:
    import pyarrow

    found: list[_Leaf] = []
    for field in fields:
        inner = (*path, field.name)
        found += _leaves(field.type, inner) if pyarrow.types.is_struct(field.type) else [_Leaf(inner, field.type)]
    return found


def _by_key(name: str, leaves: Sequence[_Leaf]) -> dict[str, list[_Leaf]]:
    """Leaves by the names that :mod:`iql_plugins.data.columns` has, all components of a column under one."""
    whole: dict[str, list[_Leaf]] = {}
    components: dict[str, dict[int, _Leaf]] = {}
    for leaf in leaves:
        first, *rest = ".".join(leaf.path).replace("/", ".").split(".")
        # The key layout's "next.reward" is one name.
        key = "/".join([f"{first}.{rest[0]}", *rest[1:]] if first == "next" and rest else [first, *rest])
        found = None if _is_list(leaf.type) else component(key)
        if found is None:
            twice, whole[key] = key in whole, [leaf]
        else:
            group = components.setdefault(found[0], {})
            twice, group[found[1]] = found[1] in group, leaf
        if twice:
            raise DatasetError(f"{name} has {'.'.join(leaf.path)!r} twice: drop one of them")
    for key, group in components.items():
        if key in whole or sorted(group) != list(range(len(group))):
            numbers = ", ".join(map(str, sorted(group)[:10]))
            raise DatasetError(
                f"{name}: {key!r} must be one column, or a column for each component from 0 on, "
                f"got components {numbers}{' and the column' if key in whole else ''}"
            )
        whole[key] = [group[number] for number in range(len(group))]
    return whole


class _Stored:
    """A column of all files, read a row group at a time.

    Args:
        name: for errors.
        leaves: the column, or its components.
        groups: at least one.

    Raises:
        DatasetError: for anything but numbers and lists of numbers.
    """

    def __init__(self, name: str, leaves: Sequence[_Leaf], groups: Sequence[_Group]) -> None:
        self._name, self._leaves = name, leaves
        self.dtype: np.dtype[Any] = np.result_type(*(self._dtype(leaf) for leaf in leaves))
        #: The one that was read last stays in memory: rows are asked for in order.
        self.read = lru_cache(maxsize=1)(self._read)
        self.row_shape: tuple[int, ...] | None = None
        if any(_is_list(leaf.type) for leaf in leaves):
            self.row_shape = self.read(groups[0]).shape[1:]
        else:
            self.row_shape = (len(leaves),) if len(leaves) > 1 else ()

    def _dtype(self, leaf: _Leaf) -> np.dtype[Any]:
        import pyarrow

        kind = leaf.type
        while _is_list(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)):
            raise DatasetError(f"{self._name} must be numbers, or lists of numbers, got {one_line(leaf.type)}")
        dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
        return dtype

    def _read(self, group: _Group) -> Array:
        import pyarrow.parquet

        names = [".".join(leaf.path) for leaf in self._leaves]
        with reading(self._name):
            footer = group.metadata.row_group(group.number)
            chunks = [footer.column(index) for index in range(footer.num_columns)]
            chunks = [chunk for chunk in chunks if _is_of(chunk.path_in_schema, names)]
            size = 0
            for chunk in chunks:
                values, pages = unpacked(group.file, chunk)
                # The pages, places in lists, and the numbers as Arrow has them and as NumPy has them.
                size += pages + max(values, len(group.rows)) * (4 + 2 * self.dtype.itemsize)
            if size > (memory := available_memory()):
                raise DatasetError(
                    f"{self._name} needs {size:,} bytes for a row group, more than the {memory:,} that are left of the "
                    "memory: write it anew with smaller row groups"
                )
            with pyarrow.parquet.ParquetFile(
                group.file, metadata=group.metadata, pre_buffer=False, page_checksum_verification=True
            ) as file:
                table = file.read_row_group(group.number, columns=names, use_threads=False)
            columns = [self._numbers(table, leaf, group) for leaf in self._leaves]
            array: Array = columns[0] if len(columns) == 1 else np.stack(columns, axis=1).astype(self.dtype, copy=False)
            if len(array) != len(group.rows) or (self.row_shape is not None and array.shape[1:] != self.row_shape):
                raise DatasetError(
                    f"{self._name} has {list(array.shape)} numbers in the rows from {group.rows.start} on, "
                    f"expected {[len(group.rows), *(array.shape[1:] if self.row_shape is None else self.row_shape)]}"
                )
            return array

    def _numbers(self, table: Any, leaf: _Leaf, group: _Group) -> Array:
        pieces = [
            self._unpacked(piece, leaf.path[1:], start + group.rows.start)
            for start, piece in _enumerated(table.column(leaf.path[0]).chunks)
        ]
        shapes = {piece.shape[1:] for piece in pieces}
        if len(shapes) > 1:
            raise DatasetError(f"{self._name} has lists of different lengths: {sorted(shapes)}")
        return np.concatenate(pieces)

    def _unpacked(self, values: Any, fields: Sequence[str], start: int) -> Array:
        """The numbers of an array of Arrow's whose first row is ``start``."""
        rows, shape = len(values), [len(values)]

        def require_all(values: Any) -> None:
            if values.null_count:
                missing = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
                row = start + int(missing[0]) * rows // max(1, len(values))
                raise DatasetError(f"{self._name} has no value in row {row}: drop or fill such rows")

        for field in fields:
            require_all(values)
            values = values.field(field)
        require_all(values)
        while _is_list(values.type):
            lengths = values.value_lengths().to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(lengths != lengths[0])
            if len(wrong):
                row = start + int(wrong[0]) * rows // len(lengths)
                raise DatasetError(
                    f"{self._name} must have as many numbers in each row, got {lengths[wrong[0]]} in row {row} and "
                    f"{lengths[0]} before"
                )
            shape.append(int(lengths[0]))
            values = values.flatten()
            if len(values) == 0:
                raise DatasetError(f"{self._name} has no numbers in its lists")
            require_all(values)
        array: Array = values.to_numpy(zero_copy_only=False).reshape(shape)
        return array


class _Part:
    """The rows of a column in one row group.

    Args:
        column: of all files.
        group: which.
    """

    def __init__(self, column: _Stored, group: _Group) -> None:
        self._column, self._group = column, group
        self.shape = (len(group.rows), *(column.row_shape or ()))
        self.dtype = column.dtype

    def __getitem__(self, rows: slice, /) -> Array:
        return self._column.read(self._group)[rows]


def _is_list(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_of(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _enumerated(pieces: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Pieces that have rows, each with the number of its first one."""
    start = 0
    for piece in pieces:
        if len(piece):
            yield start, piece
        start += len(piece)
