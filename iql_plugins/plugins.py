"""The plugin host: finds plugins by their entry points, loads them one at a time, calls their hooks.

Listing reads metadata and imports nothing. A plugin that is broken, misspelt or there twice is
reported with the distribution it came from, and all others work. :func:`available`, :func:`load`, :func:`map_batch` and
:func:`iql_plugins.data.load_dataset` ask one host, made when it is first needed.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from inspect import isfunction, ismethod
from threading import RLock
from typing import TYPE_CHECKING, Any

import pluggy

from iql_plugins import hookspecs
from iql_plugins.hookspecs import PROJECT, Adapter, Command

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from iql_plugins.data import Dataset, Options
    from iql_plugins.losses.objectives import Objective

__all__ = [
    "AdapterNotFoundError",
    "Host",
    "NotRecognizedError",
    "PluginError",
    "PluginInfo",
    "available",
    "framework_later",
    "host",
    "load",
    "map_batch",
]

#: Comma-separated names; only these plugins are looked at.
ALLOW_VARIABLE = "IQL_PLUGINS_ALLOW"
#: Any value but an empty one or 0 makes a broken plugin an error at once.
STRICT_VARIABLE = "IQL_PLUGINS_STRICT"


class PluginError(RuntimeError):
    """A plugin that cannot be loaded; the message names it and its distribution."""


class NotRecognizedError(TypeError):
    """A batch that no plugin knows."""


class AdapterNotFoundError(LookupError):
    """No plugin of that name is installed; the message lists those that are."""


@dataclass(frozen=True)
class PluginInfo:
    """What the metadata says of a plugin.

    Attributes:
        name: the name of its entry point.
        value: the module that it names.
        distribution: the distribution that declares it.
        version: that distribution's version.
        error: why it cannot be used, as far as is known: a duplicate, or a failed import. None when nothing is wrong.
    """

    name: str
    value: str
    distribution: str
    version: str
    error: str | None = None


class Host:
    """The installed plugins.

    Args:
        strict: whether a broken plugin raises where it is met, and not only when it is asked for by name.
            None asks the environment variable ``IQL_PLUGINS_STRICT``.
        allow: the names of the plugins to look at, all others being ignored. None asks the environment
            variable ``IQL_PLUGINS_ALLOW``, and allows all without it.
        find: where entry points come from; the installed distributions by default.

    Attributes:
        loading: what surrounds each import of a plugin, and of its framework: a context manager for what is imported.
            Nothing does, unless a program tells its user what takes long.
    """

    def __init__(
        self,
        *,
        strict: bool | None = None,
        allow: Collection[str] | None = None,
        find: Callable[[], Iterable[EntryPoint]] = lambda: entry_points(group=PROJECT),
    ) -> None:
        if allow is None and ALLOW_VARIABLE in os.environ:
            allow = [name.strip() for name in os.environ[ALLOW_VARIABLE].split(",") if name.strip()]
        self.strict = os.environ.get(STRICT_VARIABLE, "") not in ("", "0") if strict is None else strict
        self.allow = None if allow is None else frozenset(allow)
        self.loading: Callable[[PluginInfo], AbstractContextManager[object]] = nullcontext
        self._find = find
        self._imported = False
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._failed: dict[str, PluginError] = {}
        self._entries: dict[str, EntryPoint] = {}
        self._adapters: dict[str, Adapter] = {}
        self._built_in: Mapping[str, object] = {}
        self._lock = RLock()

    def available(self) -> dict[str, PluginInfo]:
        """The plugins that may be used, by name and sorted; from metadata alone.

        Raises:
            PluginError: in strict mode, if a name is taken twice.
        """
        found: dict[str, list[EntryPoint]] = {}
        for entry in self._find():
            if self.allow is None or entry.name in self.allow:
                found.setdefault(entry.name, []).append(entry)
        infos = {}
        for name, entries in sorted(found.items()):
            # One distribution on the path twice (an editable install beside a wheel) is no conflict.
            distinct = list({(_origin(entry), entry.value): entry for entry in entries}.values())
            error = str(self._failed[name]) if name in self._failed else None
            if len(distinct) > 1:
                owners = " and ".join(sorted(f"{_origin(entry)} ({entry.value})" for entry in distinct))
                error = f"plugin {name!r} is declared by {owners}: uninstall all but one"
                if self.strict:
                    raise PluginError(error)
            version = distinct[0].dist.version if distinct[0].dist else "unknown"
            self._entries[name] = distinct[0]
            infos[name] = PluginInfo(name, distinct[0].value, _origin(distinct[0]), version, error)
        return infos

    def check(self) -> dict[str, PluginInfo]:
        """As :meth:`available`, after importing every plugin: those that cannot be say why. No hook is called.

        Raises:
            PluginError: in strict mode, for a plugin that is broken.
        """
        infos = self.available()
        for name in infos:
            try:
                self._plugin(name, infos)
            except PluginError:
                if self.strict:
                    raise
        return self.available()

    def load(self, name: str) -> Adapter:
        """The adapter of that name; imports its plugin and, with it, its framework.

        Raises:
            AdapterNotFoundError: if there is none; suggests the closest.
            PluginError: if it is broken, or its framework is not installed.
        """
        with self._lock:
            if name not in self._adapters:
                plugin = self._plugin(name)
                if not hasattr(plugin, "iql_adapter"):
                    raise self._broken(name, "has no iql_adapter(): it is no adapter")
                try:
                    with self.loading(self.available()[name]):
                        [adapter] = self._hook_of("iql_adapter", plugin)()
                except ImportError as error:
                    raise self._missing(name, error) from error
                except (Exception, SystemExit) as error:
                    raise self._broken(name, f"failed in iql_adapter(): {type(error).__name__}: {error}") from error
                if not isinstance(adapter, Adapter):
                    raise self._broken(name, f"must return an Adapter from iql_adapter(), got {type(adapter).__name__}")
                if adapter.name != name:
                    raise self._broken(name, f"describes itself as {adapter.name!r}: the two names must be equal")
                if adapter.framework is not None and find_spec(adapter.framework) is None:
                    raise self._missing(name, None)
                self._adapters[name] = adapter
        return self._adapters[name]

    def map_batch(self, batch: object) -> "TensorDictBase":
        """A batch of any framework in the key layout, by the first plugin that knows it.

        Raises:
            NotRecognizedError: if none does.
            PluginError: in strict mode, if a plugin is broken.
        """
        # A loop asks at every step; metadata are read as long as it takes to import all.
        if not self._imported:
            self.check()
            self._imported = True
        mapped: TensorDictBase | None = self._manager.hook.iql_map_batch(batch=batch)
        if mapped is None:
            # One that was installed since may know it.
            self.check()
            mapped = self._manager.hook.iql_map_batch(batch=batch)
        if mapped is None:
            kind = type(batch).__qualname__
            raise NotRecognizedError(f"no adapter knows this batch, {kind}; {self._installed()}")
        return mapped

    def read_dataset(self, source: object, options: "Options") -> "Dataset":
        """A dataset by the first reader that knows its source: the built-in ones are asked first, then plugins.

        What a plugin reads is checked here. If a plugin fails by anything but an error of the data, the others are
        asked, and it is named if none of them knows the source.

        Raises:
            UnknownSourceError: if none does; lists the readers, and what it would take.
            DatasetError: if the source, or what a plugin read, is no dataset.
            ImportError: for a package that is missing.
            PluginError: for a plugin that returns anything else; in strict mode, for any that is broken or fails.
        """
        from iql_plugins.data.dataset import UnknownSourceError
        from iql_plugins.data.readers import built_in, unknown

        with self._lock:
            if not self._built_in:
                own = built_in(self.read_dataset)
                for name, reader in own.items():
                    self._manager.register(reader, f"built-in {name}")
                self._built_in = own
        reasons: list[str] = []
        for reader in self._built_in.values():
            try:
                dataset: Dataset | None = self._hook_of("iql_read_dataset", reader)(source=source, options=options)
            except UnknownSourceError as error:
                reasons.append(str(error))
                continue
            if dataset is not None:
                return dataset
        failures: list[PluginError] = []
        for name in self.check():
            if (plugin := self._manager.get_plugin(name)) is None:
                continue
            try:
                dataset = self._read_by(name, plugin, source, options)
            except UnknownSourceError as error:
                reasons.append(str(error))
            except PluginError as error:
                if self.strict:
                    raise
                failures.append(error)
            else:
                if dataset is not None:
                    return dataset
        reason = "; ".join(reasons) or unknown(source)
        failed = "".join(f"; {failure}" for failure in failures)
        readers = ", ".join(self._built_in)
        message = f"{reason}; readers are built in for {readers}; {self._installed()}{failed}"
        raise UnknownSourceError(message) from (failures[0] if failures else None)

    def _read_by(self, name: str, plugin: object, source: object, options: "Options") -> "Dataset | None":
        from tensordict import TensorDictBase

        from iql_plugins.data.dataset import Dataset, DatasetError, check_dataset

        try:
            dataset = self._hook_of("iql_read_dataset", plugin)(source=source, options=options)
        except (DatasetError, ImportError):
            raise
        # As in _plugin(): a stranger's code.
        except (Exception, SystemExit) as error:
            raise self._error(name, f"failed in iql_read_dataset(): {type(error).__name__}: {error}") from error
        if dataset is None:
            return None
        if not isinstance(dataset, Dataset) or not isinstance(dataset.tensors, TensorDictBase):
            kind = type(dataset).__name__
            kind += f" of {type(dataset.tensors).__name__}" if isinstance(dataset, Dataset) else ""
            raise self._error(name, f"must return a Dataset or None from iql_read_dataset(), got {kind}")
        check_dataset(dataset.tensors, dataset.source, finite=options.finite)
        action = dataset.tensors.get("action")
        if options.discrete is not None and action.is_floating_point() == options.discrete:
            asked = "discrete" if options.discrete else "continuous"
            raise DatasetError(f"{dataset.source} must have {asked} actions, plugin {name!r} read {action.dtype}")
        return dataset

    def commands(self, taken: Collection[str] = ()) -> dict[str, Command]:
        """The subcommands of all plugins by name; a plugin whose commands cannot be had is left out, and reported.

        Args:
            taken: names that are not to be had.

        Raises:
            PluginError: in strict mode, for a plugin that is broken.
        """

        def check(commands: Sequence[Command]) -> None:
            names = [*taken, *(command.name for command in commands)]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{', '.join(twice)} is taken")

        return {command.name: command for command in self._contributed("iql_commands", check)}

    def objectives(self, check: "Callable[[Sequence[Objective]], None]") -> "list[Objective]":
        """The objectives of all plugins; a plugin whose objectives cannot be had is left out, and reported.

        Args:
            check: raises for entries that do not go together.

        Raises:
            PluginError: in strict mode, for a plugin that is broken.
        """
        return self._contributed("iql_objectives", check)

    def _contributed(self, hook: str, check: Callable[[list[Any]], None]) -> list[Any]:
        """What all plugins return for a hook that returns sequences."""
        found: list[Any] = []
        for name in self.check():
            plugin = self._manager.get_plugin(name)
            if not hasattr(plugin, hook):
                continue
            try:
                own: list[Any] = list(*self._hook_of(hook, plugin)())
                check([*found, *own])
            # As in _plugin(): a stranger's code.
            except (Exception, SystemExit) as error:
                broken = self._broken(name, f"failed in {hook}(): {type(error).__name__}: {error}")
                if self.strict:
                    raise broken from error
                continue
            found += own
        return found

    def _hook_of(self, hook: str, plugin: object) -> pluggy.HookCaller:
        """A hook as that plugin alone implements it."""
        with self._lock:
            return self._manager.subset_hook_caller(hook, [p for p in self._manager.get_plugins() if p is not plugin])

    def _plugin(self, name: str, infos: Mapping[str, PluginInfo] | None = None) -> object:
        """The plugin of that name, imported once.

        Args:
            name: of its entry point.
            infos: what :meth:`available` says, for who has just asked: it reads the metadata of all distributions.
        """
        with self._lock:
            return self._loaded(name, infos)

    def _loaded(self, name: str, infos: Mapping[str, PluginInfo] | None) -> object:
        if (plugin := self._manager.get_plugin(name)) is not None:
            return plugin
        if name in self._failed:
            raise self._failed[name]
        infos = self.available() if infos is None else infos
        if name not in infos:
            close = get_close_matches(name, infos, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise AdapterNotFoundError(
                f"no adapter {name!r} is installed: {hint}there are {', '.join(infos) or 'none'}"
            )
        if (error := infos[name].error) is not None:
            raise PluginError(error)
        try:
            with self.loading(infos[name]), _framework_later():
                plugin = self._entries[name].load()
        # A plugin is a stranger's code: whatever it raises, SystemExit included, must not take the host down.
        except (Exception, SystemExit) as error:
            raise self._broken(name, f"cannot be imported: {type(error).__name__}: {error}") from error
        self._register(name, plugin)
        return plugin

    def _register(self, name: str, plugin: object) -> None:
        hooks = [hook for hook in dir(hookspecs) if hook.startswith("iql_")]
        functions = [
            hook
            for hook in dir(plugin)
            if hook.startswith("iql_") and (isfunction(f := getattr(plugin, hook)) or ismethod(f))
        ]
        if unknown := [hook for hook in functions if hook not in hooks]:
            raise self._broken(name, f"implements {', '.join(unknown)}; the hooks are {', '.join(hooks)}")
        if unmarked := [hook for hook in functions if not hasattr(getattr(plugin, hook), f"{PROJECT}_impl")]:
            raise self._broken(name, f"does not mark {', '.join(unmarked)} with iql_plugins.hookspecs.hookimpl")
        try:
            self._manager.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            raise self._broken(name, f"does not fit the hooks: {error}") from error

    def _broken(self, name: str, what: str) -> PluginError:
        self._failed[name] = self._error(name, what)
        return self._failed[name]

    def _error(self, name: str, what: str) -> PluginError:
        info = self.available()[name]
        return PluginError(f"plugin {name!r} of {info.distribution} {info.version} ({info.value}) {what}")

    def _missing(self, name: str, error: ImportError | None) -> PluginError:
        info = self.available()[name]
        reason = f" ({error})" if error else ""
        return PluginError(
            f"adapter {name!r} needs a package that is not installed{reason}: pip install '{info.distribution}[{name}]'"
        )

    def _installed(self) -> str:
        """The plugins that were asked, and why others were not."""
        infos = self.available()
        broken = [info.error for info in infos.values() if info.error]
        allowed = "" if self.allow is None else f" ({ALLOW_VARIABLE} allows no others)"
        hint = f"; not asked were: {'; '.join(broken)}" if broken else ""
        return f"installed plugins are {', '.join(infos) or 'none'}{allowed}{hint}"


_later = ContextVar("_later", default=False)


def framework_later() -> bool:
    """Whether a package is imported for its hooks alone, which need no framework: importing one takes seconds."""
    return _later.get()


@contextmanager
def _framework_later() -> Iterator[None]:
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown distribution"


@cache
def host() -> Host:
    """The host of this process."""
    return Host()


def available() -> dict[str, PluginInfo]:
    """The installed adapters by name, from metadata alone: none of them is imported, and no framework.

    >>> available()["tensor"].distribution
    'iql-plugins'

    Raises:
        PluginError: in strict mode, if a name is taken twice.
    """
    return host().available()


def load(name: str) -> Adapter:
    """The adapter of that name; imports its framework.

    >>> sorted(load("tensor").algorithms)
    ['IQL']

    Raises:
        AdapterNotFoundError: if there is none; suggests the closest.
        PluginError: if it is broken, or its framework is not installed.
    """
    return host().load(name)


def map_batch(batch: object) -> "TensorDictBase":
    """A batch of any framework whose adapter is installed, in the layout of :mod:`iql_plugins.keys`.

    Raises:
        TypeError: if no adapter knows it.
        PluginError: in strict mode, if a plugin is broken.
    """
    return host().map_batch(batch)
