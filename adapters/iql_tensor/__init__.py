"""The adapter for plain tensors: a loop of your own, with batches that are mappings of tensors."""

from iql_tensor.algorithm import IQL
from iql_tensor.batches import map_batch

__all__ = ["IQL", "map_batch"]
