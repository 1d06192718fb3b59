"""The hooks of the adapter for plain tensors."""

from tensordict import TensorDictBase

from iql_plugins.hookspecs import Adapter, Training, hookimpl
from iql_tensor.algorithm import IQL
from iql_tensor.batches import map_batch


@hookimpl
def iql_adapter() -> Adapter:
    """Plain tensors need no framework, and their native file is the common checkpoint."""
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
def iql_map_batch(batch: object) -> TensorDictBase | None:
    """Takes TensorDicts, which have the layout already, and mappings of tensors."""
    return map_batch(batch)
