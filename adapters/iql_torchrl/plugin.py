"""The hooks of the adapter for TorchRL."""

from typing import TYPE_CHECKING

from iql_plugins.hookspecs import Adapter, Training, hookimpl

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from iql_plugins.data import Dataset, Options


@hookimpl
def iql_adapter() -> Adapter:
    """The losses, which TorchRL's users build and its trainers take, and an algorithm that holds a whole agent."""
    from iql_torchrl.losses import DiscreteIQLLoss, IQLLoss
    from iql_torchrl.training import IQL

    algorithms = {"IQL": IQL, "IQLLoss": IQLLoss, "DiscreteIQLLoss": DiscreteIQLLoss}
    training = Training(
        from_agent=IQL.from_agent, to_agent=IQL.to_agent, fit=IQL.fit, save=IQL.save, load=IQL.load, suffix=".pt"
    )
    return Adapter("torchrl", framework="torchrl", algorithms=algorithms, training=training)


@hookimpl
def iql_map_batch(batch: object) -> "TensorDictBase | None":
    """Takes what TorchRL's replay buffers and collectors return."""
    from iql_torchrl.batches import map_batch

    return map_batch(batch)


@hookimpl
def iql_read_dataset(source: object, options: "Options") -> "Dataset | None":
    """Takes TorchRL's replay buffers."""
    from iql_torchrl.reader import read_dataset

    return read_dataset(source, options)
