"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv:2110.06169), one loss for every framework."""

from iql_plugins.host import available, load, load_dataset, map_batch
from iql_plugins.keys import AcceptedKeys
from iql_plugins.loss import DiscreteIQLLoss, IQLLoss
from iql_plugins.targets import HardUpdate, SoftUpdate
from iql_plugins.value_estimators import ValueEstimators, default_value_kwargs

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
]

__version__ = "0.1.0"
