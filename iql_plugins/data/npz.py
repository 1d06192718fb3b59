"""NumPy archives (``.npz``) with the columns of D4RL."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import numpy as np

from iql_plugins.data.arrays import Column, Transitions
from iql_plugins.data.columns import readable
from iql_plugins.data.dataset import DatasetError, Loaded, Options, existing_parent, one_line, reading, require_space

__all__ = ["load"]


def load(path: Path, options: Options) -> Loaded:
    """The dataset of an archive with ``observations``, ``actions``, ``rewards``, ``terminals`` and, if there are, more.

    That is ``timeouts``, and ``next_observations``, without which the last transition of each episode that was cut
    is left out: see :class:`~iql_plugins.data.arrays.Transitions`. Dict observations are
    ``observations/NAME`` and ``next_observations/NAME``. The other names that are read, and those of metadata, which
    are not, are those of :mod:`iql_plugins.data.columns`. Whole numbers from 0 on in a single column of actions are
    discrete actions. Pickled objects are never loaded. With ``memmap_dir``, no column needs to fit into memory.

    Raises:
        DatasetError: if it is no such archive, or has a column that is neither read nor metadata.
    """
    name = str(path)
    with reading(name):
        with path.open("rb") as file:
            archive = is_zipfile(file)
        if not archive:
            raise DatasetError(f"{name} is no .npz archive, or a truncated one")
        with ExitStack() as stack:
            return Transitions.from_columns(name, _columns(path, options, stack)).load(options)


def _columns(path: Path, options: Options, stack: ExitStack) -> dict[str, Column]:
    archive = stack.enter_context(ZipFile(path))
    files = [(info.filename.removesuffix(".npy"), info) for info in archive.infolist() if not info.is_dir()]
    read = readable(str(path), [key for key, _ in files])
    members = {key: info for key, info in files if key in read}
    require_space(sum(info.file_size for info in members.values()), str(path), options)
    columns: dict[str, Column] = {}
    if options.memmap_dir is None:
        arrays = stack.enter_context(np.load(path, allow_pickle=False))
        for key in members:
            with _reading_column(path, key):
                columns[key] = arrays[key]
        return columns
    # An array that is compressed can be mapped only once it is unpacked.
    parent = existing_parent(Path(options.memmap_dir))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".unpacked-")))
    for number, (key, info) in enumerate(members.items()):
        unpacked = folder / f"{number}.npy"
        with _reading_column(path, key):
            with archive.open(info) as source, unpacked.open("wb") as copy:
                shutil.copyfileobj(source, copy)
            columns[key] = np.load(unpacked, mmap_mode="r", allow_pickle=False)
    return columns


@contextmanager
def _reading_column(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if "allow_pickle" in str(error):
            raise DatasetError(
                f"{path}: {key!r} holds pickled Python objects, which can run any code; they are never loaded from "
                "an .npz"
            ) from error
        raise DatasetError(f"{path}: {key!r} cannot be read: {one_line(error)}") from error
