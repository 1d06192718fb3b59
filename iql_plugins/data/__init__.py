"""Datasets of many formats in one layout, and what can be said of them.

:func:`load_dataset` reads a dataset, :func:`iql_plugins.data.inspection.inspect` says what is wrong with one, and
:mod:`iql_plugins.data.episodes` has the lengths and returns of its episodes.
"""

import os

from tensordict import TensorDictBase

from iql_plugins import plugins
from iql_plugins.data.dataset import Dataset, DatasetError, Options, UnknownSourceError, check_dataset

__all__ = [
    "Dataset",
    "DatasetError",
    "Options",
    "UnknownSourceError",
    "check_dataset",
    "load_dataset",
    "read_dataset",
]


def load_dataset(
    source: object,
    *,
    trust_pickle: bool = False,
    discrete: bool | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
) -> TensorDictBase:
    """A dataset in the key layout, from a file, a folder, a name or an object. Nothing is ever downloaded.

    Whatever a source has is read, known by its name to be metadata, or an error: :mod:`iql_plugins.data.columns`.
    Each format has a reader, and plugins add theirs, :func:`iql_plugins.hookspecs.iql_read_dataset`. There are

    ============================================ ==================================================
    source                                       see
    ============================================ ==================================================
    the name of a dataset that ships             :data:`iql_plugins.data.readers.shipped.NAMES`
    ``.npz``                                     :mod:`iql_plugins.data.readers.npz`
    ``.parquet``, folder of such parts           :mod:`iql_plugins.data.readers.parquet`
    ``.hdf5``, ``.h5`` in D4RL's style           :mod:`iql_plugins.data.readers.d4rl`
    id or folder of a local Minari dataset       :mod:`iql_plugins.data.readers.minari`
    TensorDict, folder of a memory-mapped one    :mod:`iql_plugins.data.readers.tensordicts`
    dictionary of NumPy arrays                   :mod:`iql_plugins.data.readers.arrays`
    ``.pkl`` of an object in this table          :mod:`iql_plugins.data.readers.pickles`
    d3rlpy ``ReplayBuffer``, its ``.h5``         :mod:`iql_d3rlpy.reader`
    Stable-Baselines3 ``ReplayBuffer``           :mod:`iql_sb3.reader`
    TorchRL ``ReplayBuffer``                     :mod:`iql_torchrl.reader`
    ============================================ ==================================================

    >>> dataset = load_dataset("pendulum-v1-sac")
    >>> dataset["observation"].shape, dataset["next", "done"].sum().item(), dataset["next", "terminated"].any().item()
    (torch.Size([20000, 3]), 100, False)

    Args:
        source: one of the above; a path as a string or a ``Path``.
        trust_pickle: whether a ``.pkl`` may be loaded, which can run any code.
        discrete: whether actions are discrete. None finds out: by the environment's action space where the source
            has it, else by the dtype; in a file also a single float column of whole numbers from 0 on is discrete.
        memmap_dir: a new or empty folder to write the dataset to, a chunk at a time. It stays there, and is read
            from there: for data larger than memory. A TensorDict's own folder needs no other, and what ``iql-plugins
            convert-dataset`` wrote is not even looked through again.

    Returns:
        Batch size ``[N]``, transitions in time order, episode after episode, checked by :func:`check_dataset`.
        On the CPU, but for a TensorDict or TorchRL buffer that is elsewhere.

    Raises:
        DatasetError: one line that names the source, and the key and row where one is to blame. For a source that
            nobody knows an :class:`UnknownSourceError`, which lists the readers that are installed.
        ImportError: for a package that is missing; says how to install it.
        PluginError: for a plugin that breaks its word; in strict mode, for any that is broken.
    """
    return read_dataset(source, trust_pickle=trust_pickle, discrete=discrete, memmap_dir=memmap_dir).tensors


def read_dataset(
    source: object,
    *,
    trust_pickle: bool = False,
    discrete: bool | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
    finite: bool = True,
) -> Dataset:
    """As :func:`load_dataset`, with what the source says beside: spaces, environment, provenance.

    >>> dataset = read_dataset("pendulum-v1-sac")
    >>> dataset.env, dataset.sha256[:12]
    ('Pendulum-v1', '3d8efdc2baf8')

    Args:
        source: see :func:`load_dataset`, as the others.
        trust_pickle: likewise.
        discrete: likewise.
        memmap_dir: likewise.
        finite: whether values that are not finite are an error.
    """
    return plugins.host().read_dataset(source, Options(trust_pickle, discrete, memmap_dir, finite))
