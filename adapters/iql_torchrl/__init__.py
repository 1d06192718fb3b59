"""The adapter for TorchRL: IQL's losses as its ``LossModule``, and agents trained from its replay buffers.

>>> from iql_torchrl import IQLLoss
>>> from torchrl.objectives import LossModule
>>> issubclass(IQLLoss, LossModule)
True
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iql_torchrl.losses import DiscreteIQLLoss, IQLLoss
    from iql_torchrl.training import IQL

__all__ = ["IQL", "DiscreteIQLLoss", "IQLLoss"]


def __getattr__(name: str) -> Any:
    # TorchRL takes seconds to import, and whoever maps a batch of another framework never needs it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from iql_torchrl import losses, training
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchrl":
            raise
        raise ImportError("iql_torchrl needs TorchRL: pip install 'iql-plugins[torchrl]'") from error
    return getattr(training if name == "IQL" else losses, name)
