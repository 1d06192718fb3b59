"""The adapter for Stable-Baselines3: IQL as one of its off-policy algorithms.

>>> from iql_sb3 import IQL
>>> from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
>>> issubclass(IQL, OffPolicyAlgorithm)
True
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iql_sb3.iql import IQL
    from iql_sb3.policies import AgentPolicy, CnnPolicy, IQLPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["IQL", "AgentPolicy", "CnnPolicy", "IQLPolicy", "MlpPolicy", "MultiInputPolicy"]


def __getattr__(name: str) -> Any:
    # Stable-Baselines3 takes seconds to import, and whoever maps a batch of another framework never needs it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from iql_sb3 import iql, policies
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "stable_baselines3":
            raise
        raise ImportError("iql_sb3 needs Stable-Baselines3: pip install 'iql-plugins[sb3]'") from error
    return getattr(iql if name == "IQL" else policies, name)
