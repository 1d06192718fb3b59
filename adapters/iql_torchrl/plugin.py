"""The hooks of the adapter for TorchRL."""

from tensordict import TensorDictBase

from iql_plugins.hookspecs import Adapter, hookimpl
from iql_torchrl.batches import map_batch


@hookimpl
def iql_adapter() -> Adapter:
    """The losses are what TorchRL's users build; its trainers take them."""
    from iql_torchrl.losses import DiscreteIQLLoss, IQLLoss

    return Adapter("torchrl", framework="torchrl", algorithms={"IQLLoss": IQLLoss, "DiscreteIQLLoss": DiscreteIQLLoss})


@hookimpl
def iql_map_batch(batch: object) -> TensorDictBase | None:
    """Takes what TorchRL's replay buffers and collectors return."""
    return map_batch(batch)
