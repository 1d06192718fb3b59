"""Readers of datasets: a file a format, each a plugin that implements ``iql_read_dataset``. Order is of no account."""

import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path

from iql_plugins.data.dataset import Dataset, Options
from iql_plugins.data.readers import arrays, d4rl, foreign, minari, npz, parquet, shipped, tensordicts
from iql_plugins.data.readers.pickles import Pickles

__all__ = ["built_in", "unknown"]


def built_in(read: Callable[[object, Options], Dataset]) -> Mapping[str, object]:
    """The readers that are always there, by name.

    Args:
        read: asks every reader, also those of plugins: for sources that hold another one.
    """
    return {
        "shipped": shipped,
        "npz": npz,
        "parquet": parquet,
        "d4rl": d4rl,
        "minari": minari,
        "tensordicts": tensordicts,
        "arrays": arrays,
        "pickles": Pickles(read),
    }


def unknown(source: object) -> str:
    """What a source is that no reader knows, and what it would take to read it: one line."""
    if not isinstance(source, str | os.PathLike):
        kind = type(source)
        needed = "" if kind.__module__ == "builtins" else f"; it takes a plugin for {kind.__module__.split('.')[0]}"
        return f"a {kind.__module__}.{kind.__qualname__} is no dataset that load_dataset knows{needed}"
    path = Path(source)
    if path.exists() and (conversion := foreign.conversion(path)) is not None:
        return f"{path} {conversion}"
    if path.is_dir():
        return (
            f"{path} is neither the folder of a TensorDict (no meta.json) nor Minari's (no data/metadata.json) "
            "nor one of Parquet's (no *.parquet)"
        )
    if path.exists():
        needed = f"; it takes a plugin for {path.suffix}" if path.suffix else ""
        return f"{path} is no .npz, .parquet, .hdf5, .h5 or .pkl file{needed}"
    names = ", ".join(shipped.NAMES)
    close = get_close_matches(str(source), shipped.NAMES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; the datasets that ship are {names}"
    if minari.is_identifier(str(source)):
        hint += f"; if it is Minari's: nothing is downloaded here, run 'minari download {source}'"
    return f"there is no dataset, file or folder {str(source)!r}{hint}"
