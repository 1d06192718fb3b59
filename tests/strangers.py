"""Plugins of strangers, which are not installed."""

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iql_plugins.hookspecs import PROJECT, Adapter, hookimpl
from iql_plugins.plugins import Host


class Distribution:
    """What the host reads of a distribution."""

    def __init__(self, name: str, version: str = "1.0") -> None:
        self.name, self.version = name, version


class Entry:
    """An entry point of a distribution that is not installed."""

    def __init__(self, name: str, load: Callable[[], object], distribution: str | None = None) -> None:
        self.name, self.value, self.load = name, f"{name}.plugin", load
        self.dist = Distribution(distribution or f"iql-{name}")


def plugin(name: str, **hooks: Any) -> types.ModuleType:
    """A well-behaved plugin with hooks of its own."""
    module = types.ModuleType(name)
    for hook, function in ({"iql_adapter": lambda: Adapter(name, None)} | hooks).items():
        setattr(module, hook, hookimpl(function))
    return module


def host_of(*entries: Entry, **options: Any) -> Host:
    """A host that sees these plugins alone."""
    return Host(find=lambda: entries, **options)


def good(name: str = "good", **hooks: Any) -> Entry:
    """An entry point of a well-behaved plugin."""
    return Entry(name, lambda: plugin(name, **hooks))


def write_distribution(folder: Path, name: str, code: str, requires: Sequence[str] = ()) -> None:
    """A plugin as pip installs it: a module of that code, and the metadata that declare it."""
    (folder / f"stranger_{name}.py").write_text(code)
    metadata = folder / f"stranger_{name}-1.0.dist-info"
    metadata.mkdir()
    needed = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: stranger-{name}\nVersion: 1.0\n{needed}")
    (metadata / "entry_points.txt").write_text(f"[{PROJECT}]\n{name} = stranger_{name}\n")
