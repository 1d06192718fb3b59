"""TorchRL's batches: they have the key layout already."""

from collections.abc import Mapping

from tensordict import TensorDictBase

from iql_plugins.keys import AcceptedKeys

__all__ = ["map_batch"]


def map_batch(batch: object) -> TensorDictBase | None:
    """What a replay buffer or a collector returned, in the key layout; None if it is neither's.

    Args:
        batch: a TensorDict, or the pair of one and a dictionary that ``ReplayBuffer.sample(return_info=True)``
            returns. The importance weights of a prioritised buffer are in that dictionary, and come along.
    """
    if isinstance(batch, TensorDictBase):
        return batch
    if isinstance(batch, tuple) and len(batch) == 2:
        samples, info = batch
        if isinstance(samples, TensorDictBase) and isinstance(info, Mapping):
            weight = AcceptedKeys().priority_weight
            return samples.copy().set(weight, info[weight]) if weight in info else samples
    return None
