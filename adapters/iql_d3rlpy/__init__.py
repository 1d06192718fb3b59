"""The adapter for d3rlpy: IQL as registered algorithms, continuous and discrete, and a replay buffer that is fast.

>>> import d3rlpy, iql_d3rlpy
>>> iql_d3rlpy.DiscreteIQLConfig(gamma=0.9).create().gamma
0.9
"""

from typing import TYPE_CHECKING, Any

from iql_plugins.plugins import framework_later

if TYPE_CHECKING:
    from iql_d3rlpy.algorithm import IQL, DiscreteIQL, DiscreteIQLConfig, IQLConfig, from_agent, load, to_agent
    from iql_d3rlpy.buffer import FastReplayBuffer, as_fast_buffer
    from iql_d3rlpy.datasets import to_replay_buffer
    from iql_d3rlpy.scalers import BoundedActionScaler

_MODULES = {
    "IQL": "algorithm",
    "IQLConfig": "algorithm",
    "DiscreteIQL": "algorithm",
    "DiscreteIQLConfig": "algorithm",
    "from_agent": "algorithm",
    "to_agent": "algorithm",
    "FastReplayBuffer": "buffer",
    "as_fast_buffer": "buffer",
    "to_replay_buffer": "datasets",
    "load": "algorithm",
    "BoundedActionScaler": "scalers",
}

__all__ = [
    "IQL",
    "BoundedActionScaler",
    "DiscreteIQL",
    "DiscreteIQLConfig",
    "FastReplayBuffer",
    "IQLConfig",
    "as_fast_buffer",
    "from_agent",
    "load",
    "to_agent",
    "to_replay_buffer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_imported(_MODULES[name]), name)


def _imported(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "d3rlpy":
            raise
        raise ImportError("iql_d3rlpy needs d3rlpy: pip install 'iql-plugins[d3rlpy]'") from error


# The import registers the algorithms with d3rlpy. Whoever asks all plugins whose batch this is needs neither.
if not framework_later():
    _imported("algorithm")
