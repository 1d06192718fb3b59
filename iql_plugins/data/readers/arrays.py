"""NumPy arrays in a dictionary, as D4RL's own loader returns them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from iql_plugins.data.arrays import Transitions
from iql_plugins.data.columns import readable, require_any
from iql_plugins.data.dataset import Dataset, DatasetError, Options, reading
from iql_plugins.hookspecs import hookimpl

__all__: list[str] = []


@hookimpl
def iql_read_dataset(source: object, options: Options) -> Dataset | None:
    """Takes a mapping of NumPy arrays by the names of columns that an ``.npz`` has; Dict observations may be nested.

    Raises:
        UnknownSourceError: if none of its columns is read; another reader may know it.
        DatasetError: for a column that is missing, is neither read nor metadata, or has the wrong shape.
    """
    columns = _flat(source) if isinstance(source, Mapping) else {}
    if not any(isinstance(column, np.ndarray) for column in columns.values()):
        return None
    name = options.name or f"the {type(source).__name__} of arrays"
    with reading(name):
        require_any(name, columns)
        read = readable(name, columns)
        for key, column in columns.items():
            if key in read and not isinstance(column, np.ndarray):
                raise DatasetError(f"{name} must have arrays, got {type(column).__name__} under {key!r}")
        return Transitions.from_columns(name, columns).load(options)


def _flat(columns: Mapping[Any, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, column in columns.items():
        name = f"{path}{key}"
        flat |= _flat(column, f"{name}/") if isinstance(column, Mapping) else {name: column}
    return flat
