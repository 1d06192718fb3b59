"""The hooks of the adapter for plain tensors."""

from typing import TYPE_CHECKING

from iql_plugins.hookspecs import Adapter, Training, hookimpl

if TYPE_CHECKING:
    from tensordict import TensorDictBase


@hookimpl
def iql_adapter() -> Adapter:
    """Plain tensors need no framework, and their native file is the common checkpoint."""
    from iql_tensor.algorithm import IQL

    training = Training(
        from_agent=IQL.from_agent,
        to_agent=IQL.to_agent,
        fit=IQL.fit,
        save=IQL.save,
        load=IQL.load,
        suffix=".safetensors",
        fit_together=IQL.fit_together,
    )
    return Adapter("tensor", framework=None, algorithms={"IQL": IQL}, training=training)


@hookimpl
def iql_map_batch(batch: object) -> "TensorDictBase | None":
    """Takes TensorDicts, which have the layout already, and mappings of tensors."""
    from iql_tensor.batches import map_batch

    return map_batch(batch)
