"""HDF5 files in the style of D4RL."""

from dataclasses import replace
from pathlib import Path

from iql_plugins.data import hdf5
from iql_plugins.data.arrays import Column, Transitions
from iql_plugins.data.dataset import Loaded, Options

__all__ = ["load"]


def load(path: Path, options: Options) -> Loaded:
    """The dataset of a file with ``observations``, ``actions``, ``rewards``, ``terminals`` and, if there are, more.

    That is ``timeouts``, and ``next_observations``, without which the last transition of each episode that was cut
    is left out: see :class:`~iql_plugins.data.arrays.Transitions`. ``observations`` may be a group, of
    Dict observations; ``infos`` and ``metadata`` are not read. A file of d3rlpy 1, which has ``episode_terminals``
    in place of ``timeouts``, is read likewise. With ``memmap_dir``, no column needs to fit into memory.

    In D4RL's maze2d files ``timeouts`` mark that the goal was reached and changes: each such part is an episode
    here, which is cut and goes on; returns of these parts are not returns of whole episodes.

    Raises:
        DatasetError: if it is no such file.
    """
    with hdf5.opened(path) as file:
        found: dict[str, Column] = {}
        for key in ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts"):
            if hdf5.has(file, key):
                found |= hdf5.columns(file, key, path)
        if "timeouts" in found or not hdf5.has(file, "episode_terminals"):
            return Transitions.from_columns(str(path), found).load(options)
        found["timeouts"] = hdf5.member(file, "episode_terminals", path)
        # Set at terminal states as well: no contradiction here.
        return replace(Transitions.from_columns(str(path), found).load(options), both=0, both_row=None)
