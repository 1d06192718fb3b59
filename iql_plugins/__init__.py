"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv:2110.06169), one loss for every framework."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iql_plugins.data import load_dataset, read_dataset
    from iql_plugins.keys import AcceptedKeys
    from iql_plugins.losses.bootstrap import ValueEstimators, default_value_kwargs
    from iql_plugins.losses.iql import DiscreteIQLLoss, IQLLoss
    from iql_plugins.losses.targets import HardUpdate, SoftUpdate
    from iql_plugins.plugins import available, load, map_batch
else:
    # Torch takes seconds to import; listing plugins and asking for the version do without it.
    _HOMES = {
        "AcceptedKeys": "keys",
        "DiscreteIQLLoss": "losses.iql",
        "HardUpdate": "losses.targets",
        "IQLLoss": "losses.iql",
        "SoftUpdate": "losses.targets",
        "ValueEstimators": "losses.bootstrap",
        "available": "plugins",
        "default_value_kwargs": "losses.bootstrap",
        "load": "plugins",
        "load_dataset": "data",
        "map_batch": "plugins",
        "read_dataset": "data",
    }

    #: Modules that come with an attribute above, for who writes iql_plugins.functional without importing it.
    _MODULES = {"functional": "losses.functional", "keys": "keys", "losses": "losses", "networks": "networks"}

    def __getattr__(name):
        from importlib import import_module

        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name in _MODULES:
            value = import_module(f"{__name__}.{_MODULES[name]}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_HOMES, *_MODULES})


__all__ = [
    "AcceptedKeys",
    "DiscreteIQLLoss",
    "HardUpdate",
    "IQLLoss",
    "SoftUpdate",
    "ValueEstimators",
    "available",
    "default_value_kwargs",
    "load",
    "load_dataset",
    "map_batch",
    "read_dataset",
]

__version__ = "0.1.0"
