"""The agent beside the pickles in Stable-Baselines3's zip, for readers that run nothing of a file."""

import json
import os
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import Tensor, nn
from torch.optim import Optimizer

from iql_plugins import checkpoint
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.config import IQLConfig
from iql_plugins.limits import WeightLimit
from iql_plugins.networks.builders import uninitialized
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent
from iql_sb3.policies import AgentPolicy, CnnPolicy, IQLPolicy, MultiInputPolicy, layer_sizes, set_hyperparameters
from iql_sb3.spaces import gymnasium_spaces

__all__ = ["add_agent", "load_agent"]

#: A common checkpoint whose document has the policy's class and arguments as well. Everything in it is also in the
#: pickles of ``data`` and the ``.pth`` members, which the framework's own loaders need: the file is twice as large.
MEMBER = "iql_plugins.safetensors"
_POLICY, _BEHIND = "policy", "normalized_by_env"
_POLICIES = {kind.__name__: kind for kind in (IQLPolicy, CnnPolicy, MultiInputPolicy, AgentPolicy)}
#: Classes that a policy's arguments may name: none that was not written down here is ever looked up.
_CLASSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(FlattenExtractor, NatureCNN, CombinedExtractor),
        *(getattr(nn.modules.activation, name) for name in nn.modules.activation.__all__),
        *(kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)),
    )
}


def add_agent(archive: IO[bytes], agent: Agent, policy: IQLPolicy, *, normalized_by_env: bool) -> None:
    """Adds an agent to a saved model, if its networks can be described without Python.

    Args:
        archive: the zip, open for reading and writing.
        agent: the model's.
        policy: the model's.
        normalized_by_env: whether the networks take what a ``VecNormalize`` makes of observations, which is in a file
            of its own.

    Raises:
        TypeError, ValueError: if they cannot; the zip is as it was.
    """
    arguments = policy._get_constructor_parameters()
    del arguments["observation_space"], arguments["action_space"]
    if _POLICIES.get(type(policy).__name__) is not type(policy):
        raise TypeError(f"{type(policy).__name__} is a policy class of the user's own")
    document, tensors = agent.state()
    described = json.loads(json.dumps(arguments, default=_class_name))
    document[_POLICY] = {"class": type(policy).__name__, "arguments": described, _BEHIND: normalized_by_env}
    content = checkpoint.packed(document, tensors)
    with ZipFile(archive, "a") as file:
        file.writestr(MEMBER, content)


def load_agent(path: str | os.PathLike[str]) -> Agent:
    """The agent in a model's zip, on the CPU; no pickle is read.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is no such zip, damaged, has nothing but pickles, or was trained behind a
            ``VecNormalize``.
    """
    name = os.fspath(path)
    content = _member(Path(path))
    document, tensors = checkpoint.unpacked(content, name)
    try:
        spaces, config = Spaces.from_json(document["spaces"]), IQLConfig.from_json(document["config"])
        described = document[_POLICY]
        if described.get(_BEHIND):
            raise CheckpointError(
                f"{name!r} was trained behind a VecNormalize, whose statistics it does not hold: load it by IQL.load "
                "with VecNormalize.load(path, env), or train with normalize_observations=True in its place"
            )
        _check_counts(described["arguments"], spaces, tensors, len(content))
        limit = WeightLimit.of_file(sum(tensor.nbytes for tensor in tensors.values()))
        # Weights are loaded into it; the caller's random state, of which an extractor may draw, is his own.
        with limit, torch.random.fork_rng(devices=[]), uninitialized():
            policy = _policy(described, spaces)
        policy.loss.to(tensors[f"loss.{next(iter(policy.loss.state_dict()))}"].dtype)
        set_hyperparameters(policy.loss, config)
        return Agent.from_state(document, tensors, name=name, loss=policy.loss, make_optimizers=policy.make_optimizers)
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever a framework's classes raise for arguments that they do not take.
        raise CheckpointError(f"{name!r} does not hold a whole agent: {type(error).__name__}: {error}") from error


def _member(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with ZipFile(path) as archive:
            if MEMBER not in archive.namelist():
                raise CheckpointError(
                    f"'{path}' has nothing but pickles, which can run any code: it is of an older release, or its "
                    "networks are of classes of your own; if you trust it, give --trust-pickle, or load it by IQL.load"
                )
            # What is compressed could unpack to more than memory holds.
            if archive.getinfo(MEMBER).compress_type != ZIP_STORED:
                raise CheckpointError(f"{MEMBER} of '{path}' is compressed: it is not as it was written")
            return archive.read(MEMBER)
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"'{path}' is no zip of Stable-Baselines3, or damaged: {error}") from error


def _policy(described: Any, spaces: Spaces) -> IQLPolicy:
    arguments = json.loads(json.dumps(described["arguments"]), object_hook=_named_class)
    return _POLICIES[described["class"]](*gymnasium_spaces(spaces), **arguments)


def _class_name(value: Any) -> dict[str, str]:
    name = getattr(value, "__name__", None)
    if name is None or _CLASSES.get(name) is not value:
        raise TypeError(f"{value!r} cannot be described")
    return {"class": name}


def _named_class(entry: dict[str, Any]) -> Any:
    return _CLASSES[entry["class"]] if entry.keys() == {"class"} else entry


def _check_counts(arguments: dict[str, Any], spaces: Spaces, tensors: dict[str, Tensor], size: int) -> None:
    """Raises ``ValueError`` for more entries or layers than a file of this size and these tensors can have."""
    entries = sum(space.size for space in spaces.observations.values() if isinstance(space, Box))
    _require(entries <= size, f"observations of {entries} entries")
    own = [arguments.get(f"{name}_hidden_sizes") for name in ("actor", "critic")]
    layers = max(map(len, layer_sizes(arguments["net_arch"], *own).values()))
    _require(layers <= len(tensors), f"{layers} layers")


def _require(held: bool, claimed: str) -> None:
    if not held:
        raise ValueError(f"it claims {claimed}, and does not hold that")
