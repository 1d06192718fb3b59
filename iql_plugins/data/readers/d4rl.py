"""HDF5 files in the style of D4RL."""

from pathlib import Path

from iql_plugins.data import hdf5
from iql_plugins.data.arrays import Column, Transitions
from iql_plugins.data.columns import readable, require_any
from iql_plugins.data.dataset import Dataset, Options, file_of
from iql_plugins.hookspecs import hookimpl

__all__: list[str] = []


@hookimpl
def iql_read_dataset(source: object, options: Options) -> Dataset | None:
    """Takes the path of an HDF5 file, if it has one of the columns that are read.

    Raises:
        UnknownSourceError: if it has none of them; another reader may know it.
    """
    path = file_of(source, ".hdf5", ".h5")
    if path is None:
        return None
    with hdf5.opened(path) as file:
        require_any(str(path), file)
    return _load(path, options)


def _load(path: Path, options: Options) -> Dataset:
    """The dataset of a file with ``observations``, ``actions``, ``rewards``, ``terminals`` and, if there are, more.

    That is ``timeouts``, and ``next_observations``, without which the last transition of each episode that was cut
    is left out: see :class:`~iql_plugins.data.arrays.Transitions`. ``observations`` may be a group, of Dict
    observations. The other names that are read, ``episode_terminals`` of d3rlpy 1 among them, and those of metadata,
    which are not, are those of :mod:`iql_plugins.data.columns`. With ``memmap_dir``, no column needs to fit into
    memory.

    In D4RL's maze2d files ``timeouts`` mark that the goal was reached and changes: each such part is an episode
    here, which is cut and goes on; returns of these parts are not returns of whole episodes.

    Raises:
        DatasetError: if it is no such file, or has a column that is neither read nor metadata.
    """
    name = str(path)
    with hdf5.opened(path) as file:
        found: dict[str, Column] = {}
        for key in readable(name, file):
            found |= hdf5.columns(file, key, path)
        return Transitions.from_columns(name, found, set(file) - set(found)).load(options)
