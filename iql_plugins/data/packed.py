"""Where batches come from: a dataset as rows of few matrices, so that a batch is one gather."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from tensordict import MemoryMappedTensor, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data.summary import CHUNK
from iql_plugins.keys import flat_name

__all__ = ["BatchSource", "MappedDataset", "PackedDataset", "batch_source"]

#: Of tensors by the key layout.
Transform = Callable[[dict[NestedKey, Tensor]], dict[NestedKey, Tensor]]


class BatchSource(Protocol):
    """A dataset from which batches are drawn.

    Attributes:
        on_disk: whether rows are read from a file when they are drawn.
    """

    on_disk: bool

    def __len__(self) -> int:
        """Number of transitions."""

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The transitions ``index`` (``[B]`` int64) by keyword name, each ``[B, ...]``."""


def batch_source(
    dataset: TensorDictBase, transform: Transform | None = None, device: torch.device | str | None = None
) -> BatchSource:
    """A dataset ready to be sampled: packed on ``device``, or left on disk if it is memory-mapped.

    Args:
        dataset: transitions by the key layout, batch size ``[N]``.
        transform: applied to the transitions, :class:`~iql_plugins.data.normalizers.Normalizers` above all.
        device: where batches are needed; None for the dataset's own.
    """
    device = torch.device(device) if device is not None else dataset.device
    if any(isinstance(tensor, MemoryMappedTensor) for tensor in dataset.values(True, True)):
        return MappedDataset(dataset, transform, device)
    return PackedDataset(dataset, transform, device)


class PackedDataset:
    """All entries of one storage type side by side in one matrix; sampling gathers rows of it.

    A million transitions of 17 observations and 6 actions take 172 MB, once: pieces of the dataset are transformed and
    written one after the other.

    Args:
        dataset: transitions by the key layout, batch size ``[N]``. No reference to it is kept.
        transform: applied to it, piece by piece.
        device: where the matrices are; None for the dataset's own.

    Raises:
        ValueError: for an empty dataset.
    """

    on_disk = False

    def __init__(
        self, dataset: TensorDictBase, transform: Transform | None = None, device: torch.device | None = None
    ) -> None:
        self._length = len(dataset)
        if self._length == 0:
            raise ValueError("the dataset is empty: it has no transition to draw")
        first = _sorted_leaves(dataset[:1], transform, device)
        self._matrices: dict[torch.dtype, Tensor] = {}
        # name, matrix, shape of one entry, dtype
        self._columns: list[tuple[str, torch.dtype, torch.Size, torch.dtype]] = []
        self._widths: dict[torch.dtype, list[int]] = {}
        for key, tensor in first.items():
            storage = _storage(tensor)
            self._widths.setdefault(storage, []).append(tensor[0].numel())
            self._columns.append((flat_name(key), storage, tensor.shape[1:], tensor.dtype))
        device = next(iter(first.values())).device
        for storage, widths in self._widths.items():
            self._matrices[storage] = torch.empty(self._length, sum(widths), dtype=storage, device=device)
        for start in range(0, self._length, CHUNK):
            stop = min(start + CHUNK, self._length)
            piece = _sorted_leaves(dataset[start:stop], transform, device)
            whole = {storage: matrix[start:stop] for storage, matrix in self._matrices.items()}
            for own, tensor in zip(self._split(whole), piece.values(), strict=True):
                own.copy_(tensor.reshape(stop - start, -1))

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes that the matrices take."""
        return sum(matrix.nbytes for matrix in self._matrices.values())

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The transitions ``index`` (``[B]`` int64) by keyword name, each ``[B, ...]``."""
        rows = {storage: matrix.index_select(0, index) for storage, matrix in self._matrices.items()}
        result = {}
        for (name, storage, shape, dtype), columns in zip(self._columns, self._split(rows), strict=True):
            columns = columns if len(shape) == 1 else columns.reshape(len(index), *shape)
            result[name] = columns if dtype == storage else columns.to(dtype)
        return result

    def _split(self, rows: dict[torch.dtype, Tensor]) -> Iterator[Tensor]:
        """The columns of each entry, in rows of the matrices."""
        parts = {storage: iter(matrix.split(self._widths[storage], 1)) for storage, matrix in rows.items()}
        return (next(parts[storage]) for _, storage, _, _ in self._columns)


class MappedDataset:
    """A memory-mapped dataset that stays on disk; batches are read, then transformed.

    Args:
        dataset: transitions by the key layout, batch size ``[N]``, memory-mapped.
        transform: applied to each batch.
        device: where batches are needed.
    """

    on_disk = True

    def __init__(
        self, dataset: TensorDictBase, transform: Transform | None = None, device: torch.device | None = None
    ) -> None:
        self._length = len(dataset)
        # Plain tensors of the same memory: a memory-mapped one takes twice as long to find its rows.
        self._tensors = {key: tensor.as_subclass(Tensor) for key, tensor in dataset.items(True, True)}
        self._transform = transform
        there = all(tensor.device == device for tensor in self._tensors.values())
        self._device = None if there else device

    def __len__(self) -> int:
        return self._length

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The transitions ``index`` (``[B]`` int64) by keyword name, each ``[B, ...]``."""
        index = index.cpu()
        rows = {key: tensor.index_select(0, index) for key, tensor in self._tensors.items()}
        return {flat_name(key): tensor for key, tensor in _leaves(rows, self._transform, self._device).items()}


def _leaves(
    piece: dict[NestedKey, Tensor], transform: Transform | None, device: torch.device | None
) -> dict[NestedKey, Tensor]:
    # First there, then transformed: the normalisers' numbers are where the networks are.
    piece = piece if device is None else {key: tensor.to(device) for key, tensor in piece.items()}
    return piece if transform is None else transform(piece)


def _sorted_leaves(
    piece: TensorDictBase, transform: Transform | None, device: torch.device | None
) -> dict[NestedKey, Tensor]:
    leaves = _leaves(dict(piece.items(True, True)), transform, device)
    return dict(sorted(leaves.items(), key=lambda item: flat_name(item[0])))


def _storage(tensor: Tensor) -> torch.dtype:
    # Flags go with the numbers: one gather more costs more than a comparison. Integers keep their own matrix, because
    # a float32 holds them up to 2**24 only.
    return torch.get_default_dtype() if tensor.dtype == torch.bool else tensor.dtype
