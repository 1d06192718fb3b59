"""What a plugin can implement: few hooks, each with a caller in :mod:`iql_plugins.registry`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pluggy
from tensordict import TensorDictBase

__all__ = ["PROJECT", "Adapter", "hookimpl", "hookspec"]

#: The pluggy project, and the group of entry points in which plugins are found.
PROJECT = "iql_plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Adapter:
    """What a framework's users get.

    Attributes:
        name: the adapter's name, which is that of its entry point and of the extra that installs its framework.
        framework: the framework's import name; None for an adapter that needs none.
        algorithms: the classes that users build, by name.
    """

    name: str
    framework: str | None
    algorithms: Mapping[str, type] = field(default_factory=dict)


@hookspec
def iql_adapter() -> Adapter:  # type: ignore[empty-body]
    """Describes the adapter. Called once, when the adapter is asked for; may import its framework."""


@hookspec(firstresult=True)
def iql_map_batch(batch: object) -> TensorDictBase | None:
    """A framework's batch in the key layout, sharing memory where it can; None when it is not yours.

    Called for every adapter that is installed: recognise a foreign batch without importing anything.

    Args:
        batch: whatever a framework hands to an algorithm.
    """


@hookspec(firstresult=True)
def iql_load_dataset(source: object) -> TensorDictBase | None:
    """A dataset in the key layout, transitions along its one batch dimension; None when it is not yours.

    Args:
        source: a path, a name or an object.
    """
