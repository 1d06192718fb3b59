"""The installed plugins through one :class:`~iql_plugins.registry.Registry`, made when it is first needed."""

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from iql_plugins.hookspecs import Adapter
    from iql_plugins.registry import PluginInfo, Registry

__all__ = ["available", "load", "load_dataset", "map_batch"]


@cache
def _registry() -> "Registry":
    from iql_plugins.registry import Registry

    return Registry()


def available() -> "dict[str, PluginInfo]":
    """The installed adapters by name, from metadata alone: none of them is imported, and no framework.

    >>> available()["tensor"].distribution
    'iql-plugins'

    Raises:
        PluginError: in strict mode, if a name is taken twice.
    """
    return _registry().available()


def load(name: str) -> "Adapter":
    """The adapter of that name; imports its framework.

    >>> sorted(load("tensor").algorithms)
    ['IQL']

    Raises:
        AdapterNotFoundError: if there is none; suggests the closest.
        PluginError: if it is broken, or its framework is not installed.
    """
    return _registry().load(name)


def map_batch(batch: object) -> "TensorDictBase":
    """A batch of any framework whose adapter is installed, in the layout of :mod:`iql_plugins.keys`.

    Raises:
        TypeError: if no adapter knows it.
        PluginError: in strict mode, if a plugin is broken.
    """
    return _registry().map_batch(batch)


def load_dataset(
    source: object,
    *,
    trust_pickle: bool = False,
    discrete: bool | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
) -> "TensorDictBase":
    """A dataset in the key layout: by the formats of :func:`iql_plugins.data.load_dataset`, else by an adapter.

    >>> load_dataset("pendulum-v1-sac").batch_size
    torch.Size([20000])

    Args:
        source: a path, a name or an object.
        trust_pickle: whether a ``.pkl`` may be loaded, which can run any code.
        discrete: see :func:`iql_plugins.data.load_dataset`; as ``memmap_dir``, for the formats that are built in.
        memmap_dir: likewise.

    Raises:
        DatasetError: one line, if nobody knows the source, or what it holds is no dataset.
        ImportError: for a package that is missing; says how to install it.
        PluginError: in strict mode, if a plugin is broken.
    """
    from iql_plugins import data
    from iql_plugins.registry import NotRecognizedError

    built_in = data.builtin(source, trust_pickle=trust_pickle, discrete=discrete, memmap_dir=memmap_dir)
    if built_in is not None:
        return built_in
    try:
        dataset = _registry().load_dataset(source)
    except NotRecognizedError as error:
        raise data.DatasetError(f"{data.unknown_source(source)}; {error}") from None
    data.check_dataset(dataset, str(source) if isinstance(source, str | os.PathLike) else type(source).__qualname__)
    return dataset
