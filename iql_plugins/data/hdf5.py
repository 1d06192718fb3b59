"""Opening HDF5 files that come from strangers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iql_plugins.data.dataset import DatasetError, reading

__all__ = ["columns", "member", "opened"]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An HDF5 file, open for reading.

    Raises:
        ImportError: without h5py; says how to install it.
        DatasetError: for whatever goes wrong while it is open.
    """
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'iql-plugins[cli]'") from error
    with reading(str(path)):
        # Says so if the file may not be read; is_hdf5() would say that it is none.
        path.open("rb").close()
        if not h5py.is_hdf5(path):
            raise DatasetError(f"{path} is no HDF5 file, or a truncated one")
        with h5py.File(path, "r") as file:
            yield file


def member(group: Any, key: str, path: Path) -> Any:
    """The group or dataset under a key.

    Raises:
        DatasetError: if it is missing, or if its data are in another file, which this one could name at will.
    """
    import h5py

    full = f"{group.name}/{key}".lstrip("/")
    link = group.get(key, getlink=True)
    if link is None:
        raise DatasetError(f"{path} has no {full!r}")
    found = group[key] if isinstance(link, h5py.HardLink) else None
    if found is None or (isinstance(found, h5py.Dataset) and (found.external or found.is_virtual)):
        raise DatasetError(f"{path}: {full!r} is a link, or data in another file; only data in the file itself is read")
    if isinstance(found, h5py.Dataset) and found.shape is None:
        raise DatasetError(f"{path}: {full!r} is empty")
    return found


def columns(group: Any, key: str, path: Path) -> dict[str, Any]:
    """The dataset under a key or, if there is a group, all datasets in it, by their names ``key/...``."""
    import h5py

    found = member(group, key, path)
    if isinstance(found, h5py.Dataset):
        return {key: found}
    if not isinstance(found, h5py.Group):
        raise DatasetError(f"{path}: {key!r} must be a dataset or a group")
    return {f"{key}/{name}": column for inner in found for name, column in columns(found, inner, path).items()}
