"""Mappings of tensors in the key layout."""

from collections.abc import Collection, Mapping

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.keys import DISCOUNT, STEPS_TO_NEXT_OBS, AcceptedKeys, next_key
from iql_plugins.losses.batch import keyword_tensors

__all__ = ["map_batch"]

_KEYS = AcceptedKeys()
#: The keys of the layout but for the observations'.
_OTHERS: tuple[NestedKey, ...] = (
    _KEYS.action,
    *(next_key(key) for key in (_KEYS.reward, _KEYS.done, _KEYS.terminated)),
    STEPS_TO_NEXT_OBS,
    DISCOUNT,
    _KEYS.priority_weight,
)


def map_batch(batch: object, observations: Collection[NestedKey] = ("observation",)) -> TensorDictBase | None:
    """A mapping of keyword tensors as a TensorDict of the key layout, without a copy; None for anything else.

    >>> map_batch({"next_reward": torch.zeros(5, 1), "action": torch.zeros(5, 2)})["next", "reward"].shape
    torch.Size([5, 1])

    Args:
        batch: tensors by keyword name (``observation``, ``next_reward``, ...), all of the same length; or a TensorDict,
            which has the layout already, and is returned.
        observations: the observations' keys; those of Dict observations are nested.

    Returns:
        A TensorDict of batch size ``[length]``.

    Raises:
        TypeError: for a name that the layout does not have.
        ValueError: for tensors of different lengths, or none.
    """
    if isinstance(batch, TensorDictBase):
        return batch
    if not isinstance(batch, Mapping) or not batch or not all(isinstance(value, Tensor) for value in batch.values()):
        return None
    tensors = keyword_tensors(dict(batch), [*observations, *map(next_key, observations), *_OTHERS])
    lengths = {tuple(tensor.shape[:1]) for tensor in tensors.values()}
    if len(lengths) != 1 or lengths == {()}:
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        raise ValueError(f"the tensors of a batch must share their first dimension, got {shapes}")
    return TensorDict(dict(tensors.items()), batch_size=torch.Size(lengths.pop()))
