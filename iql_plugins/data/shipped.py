"""The datasets that ship with the package."""

from dataclasses import replace
from pathlib import Path

from iql_plugins.data import npz
from iql_plugins.data.dataset import Loaded, Options
from iql_plugins.spaces import Box, Spaces

__all__ = ["NAMES", "load"]

_FOLDER = Path(__file__).parent / "datasets"

#: The names that :func:`iql_plugins.data.load_dataset` knows, and the spaces of their environments.
_SPACES = {
    # Gymnasium's Pendulum-v1: the transitions that an SAC agent met while it learned from scratch.
    "pendulum-v1-sac": Spaces(
        Box((3,), low=(-1.0, -1.0, -8.0), high=(1.0, 1.0, 8.0)), Box((1,), low=(-2.0,), high=(2.0,))
    ),
}

NAMES = tuple(_SPACES)


def load(name: str, options: Options) -> Loaded:
    """The dataset of that name, one of :data:`NAMES`."""
    loaded = npz.load(_FOLDER / f"{name}.npz", options)
    return replace(loaded, name=name, spaces=_SPACES[name])
