"""The hooks of the adapter for Stable-Baselines3."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from iql_plugins.hookspecs import Adapter, Training, hookimpl

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from iql_plugins.data import Dataset, Options
    from iql_sb3.iql import IQL


@hookimpl
def iql_adapter() -> Adapter:
    """The algorithm is what Stable-Baselines3's users build; its native file is the framework's zip."""
    from iql_sb3.files import load_agent
    from iql_sb3.iql import IQL

    training = Training(
        from_agent=IQL.from_agent,
        to_agent=IQL.to_agent,
        fit=_fit,
        save=_save,
        load=_load,
        suffix=".zip",
        load_agent=load_agent,
    )
    return Adapter("sb3", framework="stable_baselines3", algorithms={"IQL": IQL}, training=training)


@hookimpl
def iql_map_batch(batch: object) -> "TensorDictBase | None":
    """Takes what the replay buffers of Stable-Baselines3 sample."""
    from iql_sb3.batches import map_batch

    return map_batch(batch)


@hookimpl
def iql_read_dataset(source: object, options: "Options") -> "Dataset | None":
    """Takes the replay buffers of Stable-Baselines3."""
    from iql_sb3.reader import read_dataset

    return read_dataset(source, options)


def _fit(model: "IQL", dataset: "TensorDictBase", n_steps: int, callback: Callable[[int], None]) -> None:
    def called(local_variables: dict[str, Any], global_variables: dict[str, Any]) -> bool:
        callback(model.learner.step_count)
        return True

    model.load_dataset(dataset)
    model.learn_offline(n_steps, callback=called, log_interval=None, reset_num_timesteps=False)


def _save(model: "IQL", path: str | os.PathLike[str]) -> None:
    model.save(os.fspath(path))


def _load(path: str | os.PathLike[str]) -> "IQL":
    from iql_sb3.iql import IQL

    # As all adapters do: an agent that is converted must act where the original does.
    return IQL.load(os.fspath(path), device="cpu")
