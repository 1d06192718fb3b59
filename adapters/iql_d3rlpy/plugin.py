"""The hooks of the adapter for d3rlpy."""

from typing import TYPE_CHECKING

from iql_plugins.hookspecs import Adapter, hookimpl

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from iql_plugins.data import Dataset, Options


@hookimpl
def iql_adapter() -> Adapter:
    """The algorithms that the import registers with d3rlpy, and how the command line trains with them."""
    from iql_d3rlpy.algorithm import DiscreteIQLConfig, IQLConfig
    from iql_d3rlpy.training import TRAINING

    algorithms = {"IQLConfig": IQLConfig, "DiscreteIQLConfig": DiscreteIQLConfig}
    return Adapter("d3rlpy", framework="d3rlpy", algorithms=algorithms, training=TRAINING)


@hookimpl
def iql_map_batch(batch: object) -> "TensorDictBase | None":
    """Takes d3rlpy's ``TransitionMiniBatch`` and ``TorchMiniBatch``."""
    from iql_d3rlpy.batches import map_batch

    return map_batch(batch)


@hookimpl
def iql_read_dataset(source: object, options: "Options") -> "Dataset | None":
    """Takes d3rlpy's ``ReplayBuffer`` and ``MDPDataset``, and the ``.h5`` files that they dump."""
    from iql_d3rlpy.reader import read_dataset

    return read_dataset(source, options)
