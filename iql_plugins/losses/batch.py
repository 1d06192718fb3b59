"""Reading a batch by the key layout, and checking it before anything is computed from it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Size, Tensor

from iql_plugins.keys import AUTO_MASK_KEYS, DISCOUNT, STEPS_TO_NEXT_OBS, AcceptedKeys, flat_name, next_key, shown
from iql_plugins.networks.encoders import Evaluations

__all__ = ["Batch", "BatchReader"]


@dataclass
class Batch:
    """The tensors that a loss reads, checked, with what was found out about their common shape.

    Attributes:
        tensors: by key; the optional ones are absent when the caller gave none.
        shape: ``*B``, or a prefix of it.
        mask: ``[*shape]`` bool, True where an entry counts; None when all do.
        batch_dims: how many dimensions the batch size of a TensorDict has, None for keyword tensors.
        time_dim: index of the dimension named ``"time"``, None without one.
        action_index: ``[*B]`` discrete actions as indices, once the critics have told how many there are.
        all_losses: whether all losses will be computed of it.
        evaluations: of encoders that networks share, by the name of the network that trains one.
    """

    tensors: dict[NestedKey, Tensor]
    shape: Size
    mask: Tensor | None = None
    batch_dims: int | None = None
    time_dim: int | None = None
    action_index: Tensor | None = None
    all_losses: bool = False
    evaluations: dict[str, Evaluations] = field(default_factory=dict)

    def select(self, keys: Iterable[NestedKey]) -> dict[NestedKey, Tensor]:
        """The tensors of ``keys``."""
        return {key: self.tensors[key] for key in keys}


@dataclass(frozen=True)
class BatchReader:
    """What a loss reads, and how it checks it.

    Attributes:
        keys: the names in force.
        mask_key: ``"auto"``, a key, or None: which masks count.
        weighted: whether importance weights are read.
        device: where the loss's parameters are; None if it has none.
        finite: whether to check that all is finite, on the host.
    """

    keys: AcceptedKeys
    mask_key: NestedKey | None = "auto"
    weighted: bool = True
    device: torch.device | None = None
    finite: bool = False

    @property
    def reward(self) -> NestedKey:
        """The reward's key."""
        return next_key(self.keys.reward)

    @property
    def done(self) -> NestedKey:
        """The key of the flag that an episode ended."""
        return next_key(self.keys.done)

    @property
    def terminated(self) -> NestedKey:
        """The key of the flag that it ended in a terminal state."""
        return next_key(self.keys.terminated)

    @property
    def masks(self) -> tuple[NestedKey, ...]:
        """The keys of the masks that count."""
        if self.mask_key is None:
            return ()
        return AUTO_MASK_KEYS if self.mask_key == "auto" else (self.mask_key,)

    @property
    def optional(self) -> list[NestedKey]:
        """The keys that a batch may have."""
        weight = [self.keys.priority_weight] if self.weighted else []
        return [STEPS_TO_NEXT_OBS, DISCOUNT, *weight, *self.masks]

    def read(self, source: TensorDictBase | Mapping[NestedKey, Tensor], required: Iterable[NestedKey]) -> Batch:
        """The tensors under ``required`` and the optional ones, checked; masked entries replaced.

        Raises:
            KeyError: for a missing key.
            TypeError: for an entry that is no tensor or has the wrong dtype.
            ValueError: for a wrong shape or device, an empty batch, or (if asked for) a value that is not finite.
        """
        required = list(dict.fromkeys(required))
        given = {key: source.get(key, None) for key in (*required, *self.optional)}
        tensors: dict[NestedKey, Tensor] = {key: tensor for key, tensor in given.items() if tensor is not None}
        self._check_present(tensors, required)
        batch_size, batch_dims, names = Size(), None, []
        if isinstance(source, TensorDictBase):
            batch_size, batch_dims, names = source.batch_size, source.batch_dims, source.names
        # What is not required still tells the batch's shape, if it is there.
        outcomes = {key: source.get(key, None) for key in (self.reward, self.done, self.terminated)}
        shape = self._shape(batch_size, outcomes)
        for key, tensor in tensors.items():
            self._check(key, tensor, shape)
        time_dim = names.index("time") if "time" in names else None
        batch = Batch(tensors, shape, batch_dims=batch_dims, time_dim=time_dim)
        masks = [_expand_mask(tensors[key], shape, key) for key in self.masks if key in tensors]
        if masks:
            batch.mask = torch.stack(masks).all(0)
            for key, tensor in tensors.items():
                if key not in self.masks:
                    tensors[key] = mask_rows(tensor, batch.mask)
        if self.finite:
            if torch.compiler.is_compiling():
                raise RuntimeError("check_finite=True reads the batch on the host and cannot be compiled: turn it off")
            for key, tensor in tensors.items():
                check_finite(key, tensor)
        return batch

    def _check_present(self, tensors: Mapping[NestedKey, Tensor], required: Sequence[NestedKey]) -> None:
        missing = [key for key in required if key not in tensors]
        if self.mask_key is not None and self.mask_key != "auto" and self.mask_key not in tensors:
            missing.append(self.mask_key)
        if not missing:
            return
        hint = "set_keys renames the loss's keys; a network's are its in_keys"
        if self.terminated in missing:
            hint = (
                f"{shown(self.terminated)} must say where an episode ended in a terminal state: it is never taken "
                f"from {shown(self.done)}, because a time limit would then stop the bootstrap"
            )
        raise KeyError(
            f"the batch has no {', '.join(map(shown, missing))}; of the keys that the loss reads it has "
            f"{', '.join(map(shown, tensors)) or 'none'}. {hint}"
        )

    def _shape(self, given: Size, outcomes: Mapping[NestedKey, Tensor | None]) -> Size:
        """``*B``, or a prefix of it where the shapes leave it open, from the reward and the flags."""
        shapes = {}
        for key, tensor in outcomes.items():
            if isinstance(tensor, Tensor):
                is_row = tensor.shape[-1:] != (1,) or (len(given) and tensor.shape == given)
                shapes[key] = tensor.shape if is_row else tensor.shape[:-1]
        if not shapes:
            return given
        # Dynamo knows no max() with a key, nor count() of sizes that are symbols.
        votes = [(sum(shape == other for other in shapes.values()), shape) for shape in shapes.values()]
        most, common = votes[0]
        for count, shape in votes[1:]:
            if count > most:
                most, common = count, shape
        for key, shape in shapes.items():
            if shape != common:
                raise ValueError(
                    f"{shown(key)} must have shape {(*common, 1)} or {tuple(common)}, got {tuple(outcomes[key].shape)}"  # type: ignore[union-attr]
                )
        return common

    def _check(self, key: NestedKey, tensor: Tensor | TensorDictBase, shape: Size) -> None:
        if isinstance(tensor, TensorDictBase) and key == self.keys.action:
            # Several parts, as a composite distribution takes them.
            for leaf, part in tensor.items(True, True):
                self._check(unravel_key((key, leaf)), part, shape)
            return
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{shown(key)} must be a tensor, got {type(tensor).__name__}")
        if tensor.numel() == 0:
            raise ValueError(f"the batch is empty: {shown(key)} has shape {tuple(tensor.shape)}")
        if self.device is not None and tensor.device != self.device:
            raise ValueError(
                f"{shown(key)} must be on {self.device}, where the loss's parameters are, got {tensor.device}"
            )
        expected = self._dtype_kind(key)
        if expected is not None and dtype_kind(tensor) != expected:
            raise TypeError(f"{shown(key)} must have a {expected} dtype, got {tensor.dtype}")
        if key not in self.masks and tensor.shape[: len(shape)] != shape:
            raise ValueError(
                f"{shown(key)} must begin with the batch shape {tuple(shape)}, as {shown(self.reward)} does, "
                f"got {tuple(tensor.shape)}"
            )

    def _dtype_kind(self, key: NestedKey) -> str | None:
        if key in (self.reward, DISCOUNT, self.keys.priority_weight):
            return "floating"
        if key in (self.done, self.terminated, *self.masks):
            return "bool"
        return "integer" if key == STEPS_TO_NEXT_OBS else None


def dtype_kind(tensor: Tensor) -> str:
    """``"bool"``, ``"floating"`` or ``"integer"``."""
    if tensor.dtype == torch.bool:
        return "bool"
    return "floating" if tensor.is_floating_point() else "integer"


def keyword_tensors(tensors: dict[str, Tensor], keys: Iterable[NestedKey]) -> dict[NestedKey, Tensor]:
    """Keyword tensors by key.

    Raises:
        TypeError: for a name that no key has; names the closest.
    """
    names = {flat_name(key): key for key in keys}
    unknown = [name for name in tensors if name not in names]
    if unknown:
        close = get_close_matches(unknown[0], names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"unexpected tensor {unknown[0]!r}{hint} Accepted are {', '.join(sorted(names))}")
    return {names[name]: tensor for name, tensor in tensors.items()}


def to_batch_shape(tensor: Tensor, shape: Size, key: NestedKey) -> Tensor:
    """``tensor`` as ``[*B]``, from ``[*B]`` or ``[*B, 1]``.

    Raises:
        ValueError: for any other shape.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.shape == (*shape, 1):
        return tensor.squeeze(-1)
    raise ValueError(
        f"{shown(key)} must have shape {(*shape, 1)} or {tuple(shape)}, the batch shape that the value "
        f"network's output implies, got {tuple(tensor.shape)}"
    )


def mask_rows(tensor: Tensor, mask: Tensor) -> Tensor:
    """``tensor`` with each masked entry replaced by the first valid one (zeros where none is).

    A masked entry may hold anything, NaN included, which no zero gradient stops: 0 * NaN is NaN. A real
    sample in its place is safe for every network, distribution and index.

    Args:
        tensor: ``[*shape, ...]``.
        mask: ``[*shape]`` bool, True where an entry is valid.
    """
    if isinstance(tensor, TensorDictBase):
        parts: Tensor = tensor.apply(lambda part: mask_rows(part, mask))
        return parts
    event = tensor.shape[mask.ndim :]
    rows = tensor.reshape(-1, *event)
    flat_mask = mask.reshape(-1)
    valid = rows.index_select(0, flat_mask.to(torch.uint8).argmax().reshape(1))[0]
    valid = torch.where(flat_mask.any(), valid, torch.zeros_like(valid))
    return torch.where(mask.reshape(*mask.shape, *[1] * len(event)), tensor, valid)


def check_finite(key: NestedKey, tensor: Tensor) -> None:
    """Raises ``ValueError`` with the first row of ``tensor`` that is not finite. Reads it on the host."""
    if isinstance(tensor, TensorDictBase):
        for leaf, part in tensor.items(True, True):
            check_finite(unravel_key((key, leaf)), part)
        return
    if tensor.is_floating_point() and not tensor.is_meta:
        bad = (~tensor.isfinite()).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            raise ValueError(
                f"{shown(key)} is not finite in row {index[0] if index else 0}: {tensor[index].item()} at index {index}"
            )


def _expand_mask(mask: Tensor, shape: Size, key: NestedKey) -> Tensor:
    """A mask as ``[*shape]``: trailing singletons dropped, missing trailing dimensions expanded."""
    squeezed = mask
    while squeezed.ndim > 1 and squeezed.shape[-1] == 1 and squeezed.shape != shape[: squeezed.ndim]:
        squeezed = squeezed.squeeze(-1)
    if squeezed.ndim > len(shape) or squeezed.shape != shape[: squeezed.ndim]:
        raise ValueError(f"{shown(key)} must have shape {(*shape, 1)} or {tuple(shape)}, got {tuple(mask.shape)}")
    return squeezed.reshape(*squeezed.shape, *[1] * (len(shape) - squeezed.ndim)).expand(shape)
