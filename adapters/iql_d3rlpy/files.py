"""d3rlpy's ``.d3`` files of our algorithms."""

import io
import os
import pickle
import pickletools
from typing import Any, BinaryIO

import torch
from d3rlpy import __version__
from d3rlpy.base import LearnableConfig, LearnableConfigWithShape

from iql_d3rlpy._compat import device_name
from iql_plugins import checkpoint
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.limits import WeightLimit

__all__ = ["Registered", "load", "save"]


class Registered(str):
    """The configuration in a file. To find this class, who unpickles it imports the adapter, which registers its names.

    So ``d3rlpy.load_learnable`` works in a process that never imported the adapter, and names ``iql_d3rlpy`` where it
    is not installed. Files have its checksum with it, but for those of earlier releases.

    Args:
        text: d3rlpy's JSON.
        checksum: what it must be, if it is known.

    Raises:
        CheckpointError: for another checksum.
    """

    __slots__ = ()

    def __new__(cls, text: str, checksum: str | None = None) -> "Registered":
        """The text itself, once it is known to be as it was written."""
        if checksum not in (None, checkpoint.checksum(text)):
            raise CheckpointError("the configuration is not as it was written: its checksum is another one")
        return super().__new__(cls, text)

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """What a file has of it."""
        return str(self), checkpoint.checksum(str(self))


def save(algorithm: Any, path: str | os.PathLike[str]) -> None:
    """Writes what ``d3rlpy.load_learnable`` reads: all of it, or nothing.

    Args:
        algorithm: of ours; has an implementation.
        path: replaced in one step.
    """
    model = io.BytesIO()
    algorithm.impl.save_model(model)
    config = LearnableConfigWithShape(algorithm.impl.observation_shape, algorithm.impl.action_size, algorithm.config)
    document = {"torch": model.getvalue(), "config": Registered(config.serialize()), "version": __version__}
    checkpoint.write_bytes(path, pickle.dumps(document))


def load(path: str | os.PathLike[str], device: Any, kind: type[LearnableConfig]) -> Any:
    """The algorithm of a file that :func:`save` wrote. As d3rlpy's loader, but that no code of the file is run.

    Args:
        path: the file.
        device: as that of ``d3rlpy.load_learnable``.
        kind: of the configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, no such file, or that of another algorithm.
        RuntimeError, AssertionError: torch's own, for a device that is not there.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    # A device that is not there is no fault of the file.
    device = device_name(device)
    torch.empty(0, device=device)
    try:
        with open(path, "rb") as file:
            _check_memo(file)
            document = _Reader(file).load()
        config = LearnableConfigWithShape.deserialize(document["config"])
        if not isinstance(config.config, kind):
            raise TypeError(
                f"it holds a {type(config.config).__name__} of {type(config.config).__module__}, which "
                "d3rlpy.load_learnable loads"
            )
        with WeightLimit.of_file(len(document["torch"])):
            algorithm = config.create(device)
        algorithm.impl.load_model(io.BytesIO(document["torch"]))
    except Exception as error:
        raise CheckpointError(
            f"{os.fspath(path)!r} is no d3rlpy file of iql_d3rlpy's algorithms, or damaged: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    return algorithm


def _check_memo(file: BinaryIO) -> None:
    """Raises for a pickle that numbers what it keeps beyond its own length: there would be room for all of it."""
    size = os.fstat(file.fileno()).st_size
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name.endswith("PUT") and argument > size:
            raise pickle.UnpicklingError(f"it keeps {argument} objects in {size} bytes")
    file.seek(0)


class _Reader(pickle.Unpickler):
    """Reads dictionaries, texts and bytes, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != (Registered.__module__, Registered.__qualname__):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; d3rlpy.load_learnable loads it if you trust it")
        return Registered
