"""Pickles, of the objects that other readers know: a replay buffer, say."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from iql_plugins.data.dataset import Dataset, DatasetError, Options, UnknownSourceError, file_of, reading
from iql_plugins.hookspecs import hookimpl

__all__ = ["Pickles"]


class Pickles:
    """Reads what is in a pickle.

    Args:
        read: the host's, which asks every reader.
    """

    def __init__(self, read: Callable[[object, Options], Dataset]) -> None:
        self._read = read

    @hookimpl
    def iql_read_dataset(self, source: object, options: Options) -> Dataset | None:
        """Takes the path of a ``.pkl`` file.

        Raises:
            DatasetError: if the caller has not said that it is to be trusted, or nobody knows what is in it.
            ImportError: if it needs a package that is not installed.
        """
        path = file_of(source, ".pkl")
        if path is None:
            return None
        held = _unpickled(path, options)
        if isinstance(held, str | os.PathLike):
            raise DatasetError(f"{path} holds no replay buffer, but a {type(held).__name__}")
        try:
            return self._read(held, replace(options, name=options.name or str(path)))
        except UnknownSourceError as error:
            raise DatasetError(f"{path} holds no replay buffer: {error}") from error


def _unpickled(path: Path, options: Options) -> object:
    if not options.trust_pickle:
        raise DatasetError(
            f"{path} is a pickle, which can run any code when it is loaded: pass trust_pickle=True (--trust-pickle) if "
            "you trust it"
        )
    with reading(str(path)):
        try:
            with path.open("rb") as file:
                return pickle.load(file)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{path} needs {error.name}, for a replay buffer: pip install 'iql-plugins[sb3]'"
            ) from error
