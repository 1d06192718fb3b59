"""The datasets that ship with the package."""

from dataclasses import replace
from pathlib import Path

from iql_plugins.data.dataset import Dataset, Options
from iql_plugins.data.readers import npz
from iql_plugins.hookspecs import hookimpl
from iql_plugins.spaces import Box, Spaces

__all__ = ["NAMES"]

_FOLDER = Path(__file__).parent.parent / "datasets"

#: The environments that they were recorded in, and these ones' spaces.
_ENVIRONMENTS = {
    # The transitions that an SAC agent met while it learned from scratch.
    "pendulum-v1-sac": (
        "Pendulum-v1",
        Spaces(Box((3,), low=(-1.0, -1.0, -8.0), high=(1.0, 1.0, 8.0)), Box((1,), low=(-2.0,), high=(2.0,))),
    ),
}

#: What :func:`iql_plugins.data.load_dataset` knows by name.
NAMES = tuple(_ENVIRONMENTS)


@hookimpl
def iql_read_dataset(source: object, options: Options) -> Dataset | None:
    """Takes one of :data:`NAMES`."""
    if not isinstance(source, str) or source not in NAMES:
        return None
    env, spaces = _ENVIRONMENTS[source]
    return replace(npz.load(_FOLDER / f"{source}.npz", options), source=source, spaces=spaces, env=env)
