"""The adapter for plain tensors: a loop of your own, with batches that are mappings of tensors."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iql_tensor.algorithm import IQL
    from iql_tensor.batches import map_batch

__all__ = ["IQL", "map_batch"]


def __getattr__(name: str) -> Any:
    # What trains takes a second to import, and whoever asks plugins for their commands never needs it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from iql_tensor import algorithm, batches

    return getattr(algorithm if name == "IQL" else batches, name)
