"""Datasets of many formats in one layout, and what can be said of them.

:func:`load_dataset` reads a dataset, :func:`iql_plugins.data.doctor.examine` examines one, and
:mod:`iql_plugins.data.episodes` has the lengths and returns of its episodes.
"""

import os
from difflib import get_close_matches
from pathlib import Path

from tensordict import TensorDict, TensorDictBase

from iql_plugins.data import d3rlpy, d4rl, hdf5, minari, npz, replay_buffers, shipped, tensordicts
from iql_plugins.data.dataset import DatasetError, Loaded, Options, check_dataset

__all__ = ["DatasetError", "builtin", "check_dataset", "load_dataset", "unknown_source"]


def load_dataset(
    source: object,
    *,
    trust_pickle: bool = False,
    discrete: bool | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
) -> TensorDict:
    """A dataset in the key layout, from a file, a folder, a name or an object. Nothing is ever downloaded.

    Whatever a source has is read, known by its name to be metadata, or an error: :mod:`iql_plugins.data.columns`.

    ============================================ ==================================================
    source                                       see
    ============================================ ==================================================
    the name of a dataset that ships             :data:`iql_plugins.data.shipped.NAMES`
    ``.npz``                                     :func:`iql_plugins.data.npz.load`
    ``.hdf5``, ``.h5`` in D4RL's style           :func:`iql_plugins.data.d4rl.load`
    ``.h5`` of d3rlpy                            :func:`iql_plugins.data.d3rlpy.load_file`
    ``.pkl`` of a replay buffer                  :func:`iql_plugins.data.replay_buffers.unpickled`
    id or folder of a local Minari dataset       :func:`iql_plugins.data.minari.load`
    folder of a memory-mapped TensorDict         :func:`iql_plugins.data.tensordicts.load_folder`
    TensorDict                                   :func:`iql_plugins.data.tensordicts.load`
    d3rlpy ``ReplayBuffer``, ``MDPDataset``      :func:`iql_plugins.data.d3rlpy.load`
    Stable-Baselines3 ``ReplayBuffer``           :func:`iql_plugins.data.replay_buffers.load_stable_baselines3`
    TorchRL ``ReplayBuffer``                     :func:`iql_plugins.data.replay_buffers.load_torchrl`
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
            from there: for data larger than memory. A TensorDict's own folder needs no other.

    Returns:
        Batch size ``[N]``, transitions in time order, episode after episode, checked by :func:`check_dataset`.
        On the CPU, but for a TensorDict or TorchRL buffer that is elsewhere.

    Raises:
        DatasetError: one line that names the source, and the key and row where one is to blame.
        ImportError: for a package that is missing; says how to install it.
    """
    dataset = builtin(source, trust_pickle=trust_pickle, discrete=discrete, memmap_dir=memmap_dir)
    if dataset is None:
        raise DatasetError(unknown_source(source))
    return dataset


def builtin(
    source: object,
    *,
    trust_pickle: bool = False,
    discrete: bool | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
) -> TensorDict | None:
    """As :func:`load_dataset`; None for a source that is none of the formats above, which may be a plugin's."""
    loaded = read(source, Options(trust_pickle, discrete, memmap_dir))
    return None if loaded is None else loaded.dataset


def unknown_source(source: object) -> str:
    """Why a source is none of the formats that :func:`load_dataset` knows: one line."""
    if not isinstance(source, str | os.PathLike):
        return f"a {type(source).__module__}.{type(source).__qualname__} is no dataset that load_dataset knows"
    path = Path(source)
    if path.is_dir():
        return f"{path} is neither the folder of a TensorDict (no meta.json) nor Minari's (no data/metadata.json)"
    if path.exists():
        return f"{path} is no .npz, .hdf5, .h5 or .pkl file"
    names = ", ".join(shipped.NAMES)
    close = get_close_matches(str(source), shipped.NAMES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; the datasets that ship are {names}"
    if minari.is_identifier(str(source)):
        hint += f"; if it is Minari's: nothing is downloaded here, run 'minari download {source}'"
    return f"there is no dataset, file or folder {str(source)!r}{hint}"


def read(source: object, options: Options) -> Loaded | None:
    """A dataset and what its source says of it; None for an unknown format."""
    if isinstance(source, str | os.PathLike):
        return _read_path(source, options)
    if isinstance(source, TensorDictBase):
        return tensordicts.load(source, options)
    return _read_object(source, options)


def _read_path(source: str | os.PathLike[str], options: Options) -> Loaded | None:
    if isinstance(source, str) and source in shipped.NAMES:
        return shipped.load(source, options)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".npz", ".hdf5", ".h5", ".pkl") and not path.is_file():
        raise DatasetError(f"there is no file {path}")
    if suffix == ".npz":
        return npz.load(path, options)
    if suffix in (".hdf5", ".h5"):
        with hdf5.opened(path) as file:
            of_d3rlpy = hdf5.has(file, "num_episodes")
        return d3rlpy.load_file(path, options) if of_d3rlpy else d4rl.load(path, options)
    if suffix == ".pkl":
        loaded = _read_object(replay_buffers.unpickled(path, options), options, str(path))
        if loaded is None:
            raise DatasetError(f"{path} holds no replay buffer")
        return loaded
    if path.is_dir() and tensordicts.is_folder(path):
        return tensordicts.load_folder(path, options)
    data = minari.found(source if isinstance(source, str) else path)
    return None if data is None else minari.load(data, options)


def _read_object(source: object, options: Options, name: str | None = None) -> Loaded | None:
    for base in type(source).__mro__:
        match (base.__module__.split(".")[0], base.__name__):
            case ("stable_baselines3", "ReplayBuffer"):
                return replay_buffers.load_stable_baselines3(source, options, name)
            case ("d3rlpy", "ReplayBufferBase"):
                return d3rlpy.load(source, options)
            case ("torchrl", "ReplayBuffer"):
                return replay_buffers.load_torchrl(source, options)
    return None
