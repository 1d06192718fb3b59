"""The key layout: one documented table of names, and the reading and checking of a batch by it.

========================== ============================= =====================================
key                        shape, dtype                  meaning
========================== ============================= =====================================
``observation``            ``[*B, *obs]``                s
``action``                 ``[*B, act]`` float;          a
                           discrete: ``[*B]``,
                           ``[*B, 1]`` or one-hot
                           ``[*B, n]``
``("next", "reward")``     ``[*B, 1]`` float             r
``("next", "done")``       ``[*B, 1]`` bool              the episode ended, for any reason
``("next", "terminated")`` ``[*B, 1]`` bool              it ended in a terminal state
``("next", "observation")````[*B, *obs]``                s'
``steps_to_next_obs``      ``[*B, 1]`` integer, optional n of an n-step transition
``("next", "discount")``   ``[*B, 1]`` float, optional   γⁿ itself; wins over the line above
``priority_weight``        ``[*B]`` float, optional      importance weight of the sample
``("collector", "mask")``, ``[*B, 1]`` bool, optional    False where the entry is padding
``shifted_valid``
========================== ============================= =====================================

``*B`` is any batch shape; ``[*B]`` is accepted wherever ``[*B, 1]`` stands, and never broadcast. As
keyword arguments the keys are flattened with an underscore: ``next_reward``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Size, Tensor

__all__ = ["AcceptedKeys", "Batch", "flat_name", "next_key"]

STEPS_TO_NEXT_OBS = "steps_to_next_obs"
DISCOUNT: NestedKey = ("next", "discount")
# The masks that TorchRL's samplers and value estimators write; all that are found count together.
AUTO_MASK_KEYS: tuple[NestedKey, ...] = (("collector", "mask"), "shifted_valid")


@dataclass
class AcceptedKeys:
    """The names that ``set_keys`` can change, with their defaults.

    Attributes:
        value: where the value network writes V(s).
        action: the dataset's action.
        log_prob: where the log-probability of the dataset's action is written into the input.
        priority: where the priority is written into the input.
        priority_weight: importance weights of a prioritised replay buffer.
        state_action_value: where the critics write Q(s, a).
        reward: the reward, under ``"next"``.
        done: whether the episode ended, under ``"next"``.
        terminated: whether it ended in a terminal state, under ``"next"``.
    """

    value: NestedKey = "state_value"
    action: NestedKey = "action"
    log_prob: NestedKey = "_log_prob"
    priority: NestedKey = "td_error"
    priority_weight: NestedKey = "priority_weight"
    state_action_value: NestedKey = "state_action_value"
    reward: NestedKey = "reward"
    done: NestedKey = "done"
    terminated: NestedKey = "terminated"

    def replaced(self, **names: NestedKey | None) -> "AcceptedKeys":
        """A copy with some names changed; None restores a default.

        Raises:
            ValueError: for a name that is not one of the attributes, or a key that is not nested strings.
        """
        defaults = {field.name: field.default for field in fields(AcceptedKeys)}
        keys = dict(vars(self))
        for name, key in names.items():
            if name not in defaults:
                raise ValueError(f"{name!r} is not an accepted key; the accepted keys are {', '.join(defaults)}")
            if key is None:
                keys[name] = defaults[name]
            elif is_key(key):
                keys[name] = unravel_key(key)
            else:
                raise ValueError(f"{name} must be a string or a tuple of strings, got {key!r}")
        return AcceptedKeys(**keys)


def is_key(key: object) -> bool:
    """Whether ``key`` is a string, or a non-empty tuple of keys."""
    return isinstance(key, str) or (isinstance(key, tuple) and bool(key) and all(is_key(part) for part in key))


def next_key(key: NestedKey) -> NestedKey:
    """The key under ``"next"``: ``("a", "b")`` gives ``("next", "a", "b")``."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def flat_name(key: NestedKey) -> str:
    """The keyword name of a key: ``("next", "reward")`` gives ``"next_reward"``."""
    return key if isinstance(key, str) else "_".join(key)


def shown(key: NestedKey) -> str:
    """A key as an error message shows it."""
    return repr(key)


@dataclass
class Batch:
    """The tensors that a loss reads, checked, with what was found out about their common shape.

    Attributes:
        tensors: by key; the optional ones are absent when the caller gave none.
        shape: ``*B``, or a prefix of it.
        mask: ``[*shape]`` bool, True where an entry counts; None when all do.
        time_dim: index of the dimension named ``"time"``, None without one.
    """

    tensors: dict[NestedKey, Tensor]
    shape: Size
    mask: Tensor | None = None
    time_dim: int | None = None

    def select(self, keys: Iterable[NestedKey], source: Callable[[NestedKey], NestedKey] = lambda key: key) -> dict:  # type: ignore[type-arg]
        """The tensors of ``keys``, each read from ``source(key)``."""
        return {key: self.tensors[source(key)] for key in keys}


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
    event = tensor.shape[mask.ndim :]
    rows = tensor.reshape(-1, *event)
    flat_mask = mask.reshape(-1)
    valid = rows.index_select(0, flat_mask.to(torch.uint8).argmax().reshape(1))[0]
    valid = torch.where(flat_mask.any(), valid, torch.zeros_like(valid))
    return torch.where(mask.reshape(*mask.shape, *[1] * len(event)), tensor, valid)


def check_finite(key: NestedKey, tensor: Tensor) -> None:
    """Raises ``ValueError`` with the first row of ``tensor`` that is not finite. Reads it on the host."""
    if tensor.is_floating_point() and not tensor.is_meta:
        bad = (~tensor.isfinite()).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            raise ValueError(
                f"{shown(key)} is not finite in row {index[0] if index else 0}: {tensor[index].item()} at index {index}"
            )
