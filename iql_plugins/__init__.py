"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv:2110.06169), one loss for every framework."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iql_plugins.data import load_dataset, read_dataset
    from iql_plugins.keys import AcceptedKeys
    from iql_plugins.loss import DiscreteIQLLoss, IQLLoss
    from iql_plugins.plugins import available, load, map_batch
    from iql_plugins.targets import HardUpdate, SoftUpdate
    from iql_plugins.value_estimators import ValueEstimators, default_value_kwargs
else:
    # Torch takes seconds to import; listing plugins and asking for the version do without it.
    _HOMES = {
        "AcceptedKeys": "keys",
        "DiscreteIQLLoss": "loss",
        "HardUpdate": "targets",
        "IQLLoss": "loss",
        "SoftUpdate": "targets",
        "ValueEstimators": "value_estimators",
        "available": "plugins",
        "default_value_kwargs": "value_estimators",
        "load": "plugins",
        "load_dataset": "data",
        "map_batch": "plugins",
        "read_dataset": "data",
    }

    #: Modules that come with an attribute above, for who writes iql_plugins.functional without importing it.
    _MODULES = ("functional", "keys", "loss", "networks", "targets", "value_estimators")

    def __getattr__(name):
        from importlib import import_module

        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name in _MODULES:
            value = import_module(f"{__name__}.{name}")
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
