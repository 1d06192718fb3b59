"""TensorDicts that have the key layout already, and their memory-mapped folders."""

import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase, is_leaf_nontensor
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data import summary
from iql_plugins.data.arrays import Block, action, assemble, observation, reward
from iql_plugins.data.columns import TORCHRL_METADATA, unread
from iql_plugins.data.dataset import (
    DONE,
    REWARD,
    TERMINATED,
    Dataset,
    DatasetError,
    Options,
    check_dataset,
    chunks,
    leaves,
    reading,
    require_space,
    row_bytes,
)
from iql_plugins.hookspecs import hookimpl
from iql_plugins.keys import AUTO_MASK_KEYS, DISCOUNT, STEPS_TO_NEXT_OBS, shown
from iql_plugins.limits import read_json
from iql_plugins.spaces import Spaces

__all__ = ["load"]

_METADATA = "meta.json"
#: Of the numbers and flags of a row while rows are brought into order.
_ROW_BYTES = 32
_TRAJECTORY: NestedKey = ("collector", "traj_ids")
_TRUNCATED: NestedKey = ("next", "truncated")
_REQUIRED: tuple[NestedKey, ...] = ("observation", "action", REWARD, DONE, TERMINATED, ("next", "observation"))
_OPTIONAL: tuple[NestedKey, ...] = (STEPS_TO_NEXT_OBS, DISCOUNT, _TRUNCATED)


@hookimpl
def iql_read_dataset(source: object, options: Options) -> Dataset | None:
    """Takes a TensorDict, or the folder of a memory-mapped one."""
    if isinstance(source, TensorDictBase):
        return load(source, options, options.name or "the TensorDict")
    if isinstance(source, str | os.PathLike) and _is_folder(Path(source)):
        return _load_folder(Path(source), options)
    return None


def _is_folder(path: Path) -> bool:
    return (path / _METADATA).is_file()


def _load_folder(path: Path, options: Options) -> Dataset:
    """The dataset in the folder of a memory-mapped TensorDict, which stays memory-mapped: see :func:`load`.

    Raises:
        DatasetError: if it is no such folder, or a file in it is missing or has not the size that it must have.
    """
    name = str(path)
    with reading(name):
        shapes = TensorDict.load_memmap(path, device=torch.device("meta"), allow_pickle=False)
        # Opening a file that is too short would make it longer, and fill up with zeros.
        _check_files(path, shapes, name)
        mapped = TensorDict.load_memmap(path, allow_pickle=False)
    return load(mapped, options, name)


def load(dataset: TensorDictBase, options: Options, name: str) -> Dataset:
    """The dataset in a TensorDict with TorchRL's keys, of batch size ``[N]``, or ``[*B, T]`` with time last.

    Its tensors are shared as far as they have the layout's shapes and dtypes. The keys of n-step transitions are
    kept. What TorchRL writes beside transitions is left out: :data:`~iql_plugins.data.columns.TORCHRL_METADATA`.
    Masked steps (padding) are left out. The end of each of the ``B`` rows ends an episode, and so does, where there
    are ``("collector", "traj_ids")``, the end of each trajectory, which are brought together: there
    ``("next", "done")`` becomes True, without a terminal state.

    Raises:
        DatasetError: for any other key; for a missing one (``("next", "terminated")`` in particular is never taken
            from ``done``); for a step that is ``("next", "truncated")`` and not ``("next", "done")``; and for a
            dataset that does not pass :func:`~iql_plugins.data.dataset.check_dataset`.
    """
    with reading(name):
        if dataset.ndim == 0:
            raise DatasetError(f"{name} must have batch size [N] or [*B, T], got []")
        if dataset.numel() == 0:
            raise DatasetError(f"{name} is empty: it has no transition")
        # Row numbers are in memory even if nothing else is.
        known = None if options.memmap_dir is not None else summary.of(dataset)
        if known is not None and options.discrete in (None, not dataset.get("action").is_floating_point()):
            check_dataset(dataset, name)
            spaces = _spaces(known, dataset)
            return Dataset(dataset, name, env=known.env, spaces=spaces, provenance=known.provenance)
        require_space(_ROW_BYTES * dataset.numel(), name, replace(options, memmap_dir=None))
        _require_read(dataset, name)
        flat = _selected(dataset, name)
        length = dataset.batch_size[-1]
        rows = torch.arange(len(flat), device=flat.get(DONE).device)
        ends = (rows % length == length - 1) & (rows < len(flat) - 1)
        rows, ends = _without_padding(dataset, rows, ends)
        rows, ends = _by_trajectory(dataset, rows, ends, name)
        if len(rows) == 0:
            raise DatasetError(f"{name} is empty: its mask leaves no transition")
        if len(rows) < len(flat) or not bool((rows[1:] > rows[:-1]).all()):
            require_space(sum(len(rows) * row_bytes(tensor) for tensor in flat.values(True, True)), name, options)
            flat = flat[rows]
        _check_truncated(flat, rows, name)
        if bool(ends.any()):
            flat.set(DONE, flat.get(DONE) | ends.reshape(-1, *[1] * (flat.get(DONE).ndim - 1)))
        return Dataset(_converted(flat, options, name), name)


def _spaces(known: summary.Summary, dataset: TensorDictBase) -> Spaces | None:
    """The environment's, if a summary has them, and the dataset is of them."""
    if known.spaces is None:
        return None
    spaces = Spaces.from_json(known.spaces)
    spaces.check(dataset)
    return spaces


def _check_files(folder: Path, shapes: TensorDictBase, name: str) -> None:
    metadata = read_json(folder / _METADATA)
    files = {unquote(file.name.removesuffix(".memmap")): file for file in folder.glob("*.memmap")}
    folders = {unquote(inner.name): inner for inner in folder.iterdir() if inner.is_dir()}
    for key, entry in metadata.items():
        if not isinstance(entry, dict):
            continue
        value = shapes.get(key, None)
        if isinstance(value, TensorDictBase) and key in folders and _is_folder(folders[key]):
            _check_files(folders[key], value, name)
        elif isinstance(value, Tensor) and key in files:
            expected, size = value.numel() * value.element_size(), files[key].stat().st_size
            if size != expected:
                raise DatasetError(f"{name}: {files[key].name} of {key!r} must have {expected} bytes, it has {size}")
        elif "type" in entry or "shape" in entry:
            raise DatasetError(f"{name}: the file of {key!r} is missing")


def _require_read(dataset: TensorDictBase, name: str) -> None:
    read = (*_REQUIRED, *_OPTIONAL, *AUTO_MASK_KEYS, _TRAJECTORY)
    paths = [_path(key) for key in read]
    # A lazy stack shows only the keys that all of its parts have.
    for part in dataset.tensordicts if isinstance(dataset, LazyStackedTensorDict) else (dataset,):
        for path in map(_path, part.keys(True, True, is_leaf=is_leaf_nontensor)):
            following = path[0] == "next" and len(path) > 1
            if not any(path[: len(other)] == other for other in paths) and path[following] not in TORCHRL_METADATA:
                # Of two keys of one last name, the one on the same side of the step.
                likely = sorted(read, key=lambda key: (_path(key)[0] == "next") == following)
                raise unread(name, path if len(path) > 1 else path[0], read, likely)


def _path(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _check_truncated(flat: TensorDict, rows: Tensor, name: str) -> None:
    truncated = flat.pop(_TRUNCATED, None)
    if truncated is not None:
        wrong = ((truncated.reshape(-1) != 0) & (flat.get(DONE).reshape(-1) == 0)).nonzero()
        if len(wrong):
            raise DatasetError(
                f"{name}: {shown(_TRUNCATED)} is True and {shown(DONE)} False in row {int(rows[wrong[0, 0]])}: "
                "what a time limit cuts ends its episode"
            )


def _selected(dataset: TensorDictBase, name: str) -> TensorDict:
    entries: dict[NestedKey, Tensor] = {}
    for key in _REQUIRED:
        if dataset.get(key, None) is None:
            hint = "; done is no substitute: it is also set at time-outs" if key == TERMINATED else ""
            raise DatasetError(f"{name} has no {shown(key)}{hint}")
        entries |= leaves(dataset, key)
    for key in _OPTIONAL:
        if dataset.get(key, None) is not None:
            entries[key] = dataset.get(key)
    for key, tensor in entries.items():
        if not isinstance(tensor, Tensor):
            raise DatasetError(f"{name}: {shown(key)} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_complex() or tensor.is_quantized:
            raise DatasetError(f"{name}: {shown(key)} must be real numbers, got {tensor.dtype}")
    if dataset.ndim == 1:
        return TensorDict(entries, batch_size=dataset.batch_size, device=dataset.device)
    rows = dataset.numel()
    flat = {key: tensor.reshape(rows, *tensor.shape[dataset.ndim :]) for key, tensor in entries.items()}
    return TensorDict(flat, batch_size=[rows], device=dataset.device)


def _without_padding(dataset: TensorDictBase, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    valid = torch.ones_like(ends)
    for key in AUTO_MASK_KEYS:
        mask = dataset.get(key, None)
        if mask is not None:
            valid &= mask.reshape(len(rows), -1).all(1)
    if bool(valid.all()):
        return rows, ends
    # Where padding follows, a row's last valid step is its end.
    ends = ends | torch.cat([~valid[1:] & valid[:-1], valid.new_zeros(1)])
    return rows[valid], ends[valid]


def _by_trajectory(dataset: TensorDictBase, rows: Tensor, ends: Tensor, name: str) -> tuple[Tensor, Tensor]:
    identifiers = dataset.get(_TRAJECTORY, None)
    if identifiers is None:
        return rows, ends
    if identifiers.numel() != dataset.numel():
        raise DatasetError(
            f"{name}: {shown(_TRAJECTORY)} must have one number for each transition, got {list(identifiers.shape)}"
        )
    trajectory = identifiers.reshape(-1)[rows]
    order = trajectory.argsort(stable=True)
    trajectory = trajectory[order]
    changes = torch.cat([trajectory[1:] != trajectory[:-1], torch.zeros_like(ends[:1])])
    return rows[order], changes


def _converted(flat: TensorDict, options: Options, name: str) -> TensorDict:
    given = flat.get("action")
    discrete = options.discrete if options.discrete is not None else not given.is_floating_point()

    def block(rows: slice) -> Block:
        part: Block = {}
        for key, tensor in flat.items(True, True):
            values = tensor[rows] if rows != slice(0, len(flat)) else tensor
            if key == "action":
                part[key] = action(values, discrete, name)
            elif key == REWARD:
                part[key] = reward(values, name)
            elif key in (DONE, TERMINATED, STEPS_TO_NEXT_OBS, DISCOUNT):
                part[key] = values.unsqueeze(-1) if values.ndim == 1 else values
            else:
                part[key] = observation(values)
        return part

    if options.memmap_dir is not None:
        size = sum(map(row_bytes, flat.values(True, True)))
        return assemble(lambda start: map(block, chunks(len(flat), size, start)), len(flat), name, options)
    converted = TensorDict(block(slice(0, len(flat))), batch_size=[len(flat)], device=flat.device)
    check_dataset(converted, name, finite=options.finite)
    return converted
