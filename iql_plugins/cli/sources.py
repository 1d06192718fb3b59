"""Where a training's transitions come from, and which environment they are of."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict import TensorDictBase

from iql_plugins.cli.errors import UserError, mistakes
from iql_plugins.data import DatasetError, check_dataset, minari, read, unknown_source
from iql_plugins.data.dataset import Options, chunks, row_bytes
from iql_plugins.limits import parse_json, read_json
from iql_plugins.plugins import NotRecognizedError, PluginError, host
from iql_plugins.spaces import Spaces

__all__ = ["SHIPPED", "Shipped", "Source", "digest", "load_source", "plugin_dataset"]


class Shipped(NamedTuple):
    """What is known of a dataset that ships.

    Attributes:
        env: the environment that it was recorded in.
        preset: the hyper-parameters that it is trained with unless others are asked for.
    """

    env: str
    preset: str


SHIPPED = {"pendulum-v1-sac": Shipped("Pendulum-v1", "pendulum")}


@dataclass(frozen=True)
class Source:
    """A dataset, and what its source says of the environment.

    Attributes:
        dataset: by the key layout.
        spaces: None where the source does not tell.
        env: gymnasium's id; None where the source does not tell.
    """

    dataset: TensorDictBase
    spaces: Spaces | None
    env: str | None


def load_source(
    source: str, *, trust_pickle: bool = False, discrete: bool | None = None, memmap_dir: str | None = None
) -> Source:
    """A dataset in any format that is built in, or that a plugin knows.

    Args:
        source: path or name.
        trust_pickle: see :func:`iql_plugins.data.load_dataset`.
        discrete: likewise.
        memmap_dir: likewise.

    Raises:
        UserError: if it cannot be loaded; one line.
    """
    with mistakes(DatasetError, ImportError):
        loaded = read(source, Options(trust_pickle, discrete, memmap_dir))
        if loaded is not None:
            return Source(loaded.dataset, loaded.spaces, _environment(source))
        dataset = plugin_dataset(source)
        if dataset is None:
            raise UserError(unknown_source(source))
        check_dataset(dataset, source)
        return Source(dataset, None, None)


def plugin_dataset(source: str) -> TensorDictBase | None:
    """A dataset that an installed plugin knows; None if none does."""
    with mistakes(PluginError):
        try:
            return host().load_dataset(source)
        except NotRecognizedError:
            return None


def digest(dataset: TensorDictBase) -> str:
    """SHA-256 of a dataset's content: names, shapes and numbers, whatever file they came from."""
    result = hashlib.sha256()
    for name, tensor in sorted(
        (key if isinstance(key, str) else "/".join(key), tensor) for key, tensor in dataset.items(True, True)
    ):
        result.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        for rows in chunks(len(tensor), row_bytes(tensor)):
            result.update(tensor[rows].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _environment(source: str) -> str | None:
    """The id of the environment that a dataset was recorded in, where that is on record."""
    if source in SHIPPED:
        return SHIPPED[source].env
    folder = minari.found(source)
    if folder is None:
        return None
    specification = read_json(folder / "metadata.json").get("env_spec")
    # The specification also has an entry point, which could run any code: only the id is taken.
    name = parse_json(specification).get("id") if isinstance(specification, str) else None
    return name if isinstance(name, str) else None
