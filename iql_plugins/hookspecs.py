"""What a plugin can implement: few hooks, each with a caller in :mod:`iql_plugins.plugins`."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

# Plugins are listed without torch.
if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from iql_plugins.data import Dataset, Options
    from iql_plugins.losses.objectives import Objective
    from iql_plugins.training.agent import Agent

__all__ = ["PROJECT", "Adapter", "Command", "Training", "hookimpl", "hookspec"]

#: The pluggy project, and the group of entry points in which plugins are found.
PROJECT = "iql_plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Training:
    """How the command line trains with an adapter, and moves agents in and out of its framework.

    The framework's own object (below: the algorithm) holds the very loss, learner, normalisers and generator of the
    agent that it was made from: nothing is copied, so that nothing has to be kept in step.

    Attributes:
        from_agent: the algorithm around an agent.
        to_agent: the agent in an algorithm; may be called at any time, also from ``fit``'s callback.
        fit: ``fit(algorithm, dataset, n_steps, callback)``: takes that many further gradient steps on a dataset by the
            key layout in the environment's units, in batches of ``agent.config.batch_size`` that
            ``agent.generator`` draws, and calls ``callback(agent.learner.step_count)`` after each. What ``agent.check``
            refuses is refused before the first.
        save: ``save(algorithm, path)`` writes the framework's native file.
        load: ``load(path)`` reads it; where there is no ``load_agent``, without running anything that is in it.
        suffix: of native files.
        fit_together: ``fit_together(algorithms, dataset, n_steps, callback)``: as ``fit``, for several algorithms whose
            agents differ in their seeds alone, each step of theirs in one; the callback is called once a step. None if
            there is no faster way than one after the other.
        load_agent: ``load_agent(path)``: the agent in a native file that ``load`` would run code of, a pickle's say,
            read without that; raises ``ValueError`` for a file that it cannot be read from so. Whoever trusts a file
            has the command line call ``load`` by ``--trust-pickle``.
    """

    from_agent: "Callable[[Agent], Any]"
    to_agent: "Callable[[Any], Agent]"
    fit: "Callable[[Any, TensorDictBase, int, Callable[[int], None]], object]"
    save: Callable[[Any, str | os.PathLike[str]], None]
    load: Callable[[str | os.PathLike[str]], Any]
    suffix: str
    fit_together: "Callable[[Sequence[Any], TensorDictBase, int, Callable[[int], None]], object] | None" = None
    load_agent: "Callable[[str | os.PathLike[str]], Agent] | None" = None


@dataclass(frozen=True)
class Adapter:
    """What a framework's users get.

    Attributes:
        name: the adapter's name, which is that of its entry point and of the extra that installs its framework.
        framework: the framework's import name; None for an adapter that needs none.
        algorithms: the classes that users build, by name.
        training: how the command line trains with it; None if it only maps batches or loads datasets.
    """

    name: str
    framework: str | None
    algorithms: Mapping[str, type] = field(default_factory=dict)
    training: Training | None = None


@dataclass(frozen=True)
class Command:
    """A subcommand of ``iql-plugins``, of a plugin's own.

    Attributes:
        name: what the user types; none of the commands that ship.
        summary: one line for ``iql-plugins --help``.
        run: takes the arguments behind the name, and prints for people. With ``--json`` among them what it returns is
            printed as the one JSON document instead; None is an empty one. Import what it needs in there.
    """

    name: str
    summary: str
    run: Callable[[Sequence[str]], Mapping[str, Any] | None]


@hookspec
def iql_adapter() -> Adapter:  # type: ignore[empty-body]
    """Describes the adapter. Called once, when the adapter is asked for; may import its framework."""


@hookspec(firstresult=True)
def iql_map_batch(batch: object) -> "TensorDictBase | None":
    """A framework's batch in the key layout, sharing memory where it can; None when it is not yours.

    Called for every adapter that is installed: recognise a foreign batch without importing anything.

    Args:
        batch: whatever a framework hands to an algorithm.
    """


@hookspec(firstresult=True)
def iql_read_dataset(source: object, options: "Options") -> "Dataset | None":
    """A dataset in the key layout, and what its source says of the environment; None when it is not yours.

    Called for every reader until one knows the source: first for the built-in ones, then for those of plugins.
    Recognise a foreign object without importing anything. A :class:`~iql_plugins.data.DatasetError` and an
    ``ImportError`` are final: the source is yours, and this is what is wrong with it. An
    :class:`~iql_plugins.data.UnknownSourceError` says why a source that looks like yours is not; others are asked.

    Args:
        source: a path, a name or an object.
        options: how it is to be read.
    """


@hookspec
def iql_commands() -> Sequence[Command]:  # type: ignore[empty-body]
    """A plugin's own subcommands. Called for ``--help``, and for a command that is none of those that ship."""


@hookspec
def iql_objectives() -> "Sequence[Objective]":  # type: ignore[empty-body]
    """Value objectives and policy extractions of a plugin's own, see :mod:`iql_plugins.losses.objectives`.

    Called when one is asked for by a name that is none of those that ship.
    """
