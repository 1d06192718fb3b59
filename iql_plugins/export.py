"""Policies for elsewhere: one file that takes the environment's observations and returns its actions."""

import copy
import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn

from iql_plugins.checkpoint import naming
from iql_plugins.keys import flat_name
from iql_plugins.networks.calls import distribution
from iql_plugins.ranges import choice
from iql_plugins.spaces import Box, Discrete, Space
from iql_plugins.training.agent import Agent

__all__ = [
    "ExportError",
    "Format",
    "PolicyModule",
    "as_one",
    "export_policy",
    "exporters_quiet",
    "onnx_content",
    "random_observations",
    "torchscript_content",
]

Format = Literal["onnx", "torchscript", "torch"]

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts", "torch": ".pt2"}
#: The largest difference between an exported policy's actions and the agent's, relative to the range of actions.
TOLERANCE = 1e-5
#: Observations that the two are compared on.
CHECKS = 1000
#: A space's bounds that are further apart say nothing of the observations.
WIDEST_RANGE = 1e6


class ExportError(RuntimeError):
    """A policy that cannot be exported, or does not act like the agent once it is."""


class PolicyModule(nn.Module):
    """A frozen copy of an agent's deterministic policy: the environment's observations in, its actions out.

    The normalisers are inside, dropout is off, no parameter asks for a gradient. It is a copy, on the CPU: the agent
    trains on as it did.

    Args:
        agent: whose policy it is.

    >>> from iql_plugins.config import IQLConfig
    >>> from iql_plugins.spaces import Spaces
    >>> agent = Agent(Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,))), IQLConfig(n_steps=10), seed=0)
    >>> PolicyModule(agent)(torch.zeros(5, 3)).shape
    torch.Size([5, 1])
    """

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.spaces = agent.spaces
        self.normalizers = copy.deepcopy(agent.normalizers).cpu()
        self.actor = copy.deepcopy(agent.loss.actor_network).cpu()
        self.requires_grad_(False).eval()

    @property
    def input_names(self) -> list[str]:
        """The keyword name of each observation, in the order of :meth:`forward`'s arguments."""
        return [flat_name(key) for key in self.spaces.observations]

    def forward(self, *observations: Tensor) -> Tensor:
        """``[B, act]`` actions, or ``[B]`` discrete ones.

        Args:
            *observations: ``[B, *obs]`` (``[B]`` of a Discrete space) each, one for each entry of
                ``spaces.observations``, in that order.
        """
        # No batch size: that of an exported policy may vary, and tensordict would want a number.
        inputs = TensorDict(dict(self._inputs(observations)), batch_size=[])
        with set_interaction_type(InteractionType.DETERMINISTIC):
            action: Tensor = self.actor(inputs).get("action")
        return self.normalizers.environment_action(action)

    def log_prob(self, observations: Sequence[Tensor], action: Tensor) -> Tensor:
        """``[B]`` log-probabilities (nats) of discrete actions ``[B]`` in the environment's units."""
        policy = distribution(self.actor, self._inputs(observations), torch.Size([len(action)]))
        log_prob: Tensor = policy.log_prob(self.normalizers.policy_action(action))
        return log_prob

    def _inputs(self, observations: Sequence[Tensor]) -> dict[NestedKey, Tensor]:
        spaces = self.spaces.observations
        if len(observations) != len(spaces):
            raise ValueError(f"the policy takes {', '.join(self.input_names)}, got {len(observations)} observations")
        inputs: dict[NestedKey, Tensor] = {}
        dtype = next(self.actor.parameters()).dtype
        for (key, space), value in zip(spaces.items(), observations, strict=True):
            if isinstance(space, Discrete):
                value = value.unsqueeze(-1)
            elif space.dtype != "uint8":
                value = value.to(dtype)
            inputs[key] = self.normalizers.observation(key, value)
        return inputs


def random_observations(agent: Agent, count: int, seed: int = 0) -> list[Tensor]:
    """Observations that look like the environment's: by the dataset's mean and deviation, or by the space's bounds.

    Args:
        agent: has the spaces and the normalisers.
        count: B, of each.
        seed: of the draws.

    Returns:
        One tensor for each observation key, ``[B, *obs]``, on the CPU; ``[B]`` of a Discrete space.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    normalizers = copy.deepcopy(agent.normalizers).cpu()

    def draw(key: NestedKey, space: Space) -> Tensor:
        if isinstance(space, Discrete):
            return torch.randint(space.start, space.start + space.n, (count,), generator=generator)
        shape = (count, *space.shape)
        if space.dtype == "uint8":
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        noise = torch.randn(shape, generator=generator)
        if key in normalizers.standardized:
            index = normalizers.standardized.index(key)
            return normalizers.get_buffer(f"mean_{index}") + normalizers.get_buffer(f"std_{index}") * noise
        if space.low is None or space.high is None:
            return noise
        low, high = (torch.tensor(bound).reshape(space.shape) for bound in (space.low, space.high))
        uniform = low + torch.rand(shape, generator=generator) * (high - low)
        # CartPole's bounds, among others, are those of float32.
        return torch.where(high - low < WIDEST_RANGE, uniform, noise)

    return [draw(key, space) for key, space in agent.spaces.observations.items()]


def as_one(agent: Agent, observations: Sequence[Tensor]) -> Any:
    """A tensor for each observation key as :meth:`~iql_plugins.training.agent.Agent.act` takes them."""
    if not isinstance(agent.spaces.observation, Mapping):
        return observations[0]
    return {key[-1]: tensor for key, tensor in zip(agent.spaces.observations, observations, strict=True)}


def export_policy(agent: Agent, path: str | os.PathLike[str], format: Format = "onnx") -> float:
    """Writes the deterministic policy, normalisers included, as one file that needs nothing of this package.

    What was written is loaded and compared with ``agent.act`` on 1000 random observations before it gets its name. The
    agent is left as it was, on any error as well.

    =============== ============================================================================================
    format          how to run it
    =============== ============================================================================================
    ``onnx``        ``onnxruntime.InferenceSession(path).run(None, {"observation": array})[0]``; a Dict observation
                    has an input for each entry, ``observation_NAME``
    ``torch``       ``torch.export.load(path).module()(tensor)``; a Dict observation has an argument for each entry,
                    sorted by name
    ``torchscript`` ``torch.jit.load(path)(tensor)``, likewise
    =============== ============================================================================================

    Observations are float32 (uint8 images, int64 integers) with a batch dimension of any size.

    Args:
        agent: whose policy it is.
        path: replaced in one step.
        format: see above.

    Returns:
        The largest difference of an action, relative to the range of actions; 0 for discrete actions.

    Raises:
        ValueError: for another format.
        ImportError: for a missing package; says how to install it.
        ExportError: if the policy's networks cannot be exported, or the exported policy acts differently.
        FileNotFoundError: if the folder of ``path`` does not exist.
        IsADirectoryError: if ``path`` is a folder itself.
    """
    choice(Format).check("format", format)
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write {target.name!r} to")
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a folder: give the file to write")
    policy = PolicyModule(agent)
    write, load = _FORMATS[format]
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as folder:
        temporary = Path(folder) / f"policy{SUFFIXES[format]}"
        with _exporting(format):
            content = write(policy, random_observations(agent, 2, seed=1))
        with naming(target):
            temporary.write_bytes(content)
        with _exporting(format):
            act = load(temporary)
        difference = _compare(agent, policy, act)
        os.replace(temporary, target)
    return difference


@contextmanager
def _exporting(format: str) -> Iterator[None]:
    """Makes whatever exporters raise an :class:`ExportError`."""
    try:
        with exporters_quiet():
            yield
    except ImportError:
        raise
    except Exception as error:
        raise ExportError(f"the policy cannot be exported to {format}: {type(error).__name__}: {error}") from error


def onnx_content(
    policy: nn.Module, example: Sequence[Tensor], *, inputs: Sequence[str], output: str, packages: Sequence[str]
) -> bytes:
    """A module of several observations and one output as ONNX, of batches of any size.

    Args:
        policy: takes one tensor ``[B, ...]`` for each of ``inputs``.
        example: what it is traced with.
        inputs: their names.
        output: the output's name.
        packages: what must be installed.

    Raises:
        ImportError: for a missing package; says how to install it.
    """
    for package in packages:
        _imported(package)
    program = torch.onnx.export(
        policy,
        tuple(example),
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes=_dynamic(example),
        dynamo=True,
        verbose=False,
    )
    content: bytes = program.model_proto.SerializeToString()  # type: ignore[union-attr]
    return content


def torchscript_content(policy: nn.Module, example: Sequence[Tensor]) -> bytes:
    """A module as TorchScript; weights are constants of it."""

    def act(*observations: Tensor) -> Tensor:
        action: Tensor = policy(*observations)
        return action

    file = io.BytesIO()
    with torch.no_grad():
        # The trace of a function: that of a module looks at all attributes of tensordict's, some of which raise.
        torch.jit.save(torch.jit.trace(act, tuple(example), check_trace=False), file)
    return file.getvalue()


def _write_onnx(policy: PolicyModule, example: Sequence[Tensor]) -> bytes:
    packages = ("onnx", "onnxscript", "onnxruntime")
    return onnx_content(policy, example, inputs=policy.input_names, output="action", packages=packages)


def _load_onnx(path: Path) -> Callable[..., Tensor]:
    session = _imported("onnxruntime").InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def act(*observations: Tensor) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(names, observations, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return act


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"ONNX files need {package}: pip install 'iql-plugins[onnx]'") from error


def _write_torch(policy: PolicyModule, example: Sequence[Tensor]) -> bytes:
    program = torch.export.export(policy, tuple(example), dynamic_shapes=_dynamic(example), strict=False)
    # In memory first: where torch cannot write to a file, it ends the process.
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _load_torch(path: Path) -> Callable[..., Tensor]:
    module: Callable[..., Tensor] = torch.export.load(path).module()
    return module


def _load_torchscript(path: Path) -> Callable[..., Tensor]:
    module: Callable[..., Tensor] = torch.jit.load(path, map_location="cpu")
    return module


_FORMATS: Mapping[
    str, tuple[Callable[[PolicyModule, Sequence[Tensor]], bytes], Callable[[Path], Callable[..., Tensor]]]
]
_FORMATS = {
    "onnx": (_write_onnx, _load_onnx),
    "torchscript": (torchscript_content, _load_torchscript),
    "torch": (_write_torch, _load_torch),
}


def _dynamic(example: Sequence[Tensor]) -> Any:
    batch = torch.export.Dim("batch")
    # One entry for forward's one variadic argument.
    return (tuple({0: batch} for _ in example),)


def _compare(agent: Agent, policy: PolicyModule, act: Callable[..., Tensor]) -> float:
    observations = random_observations(agent, CHECKS)
    expected = agent.act(as_one(agent, observations)).cpu()
    got = act(*observations)
    if got.shape != expected.shape:
        raise ExportError(f"the exported policy's actions have shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    action = agent.spaces.action
    if isinstance(action, Box):
        low, high = (torch.tensor(bound) for bound in (action.low, action.high))
        difference = float(((got - expected).abs() / (high - low)).max())
        if not difference <= TOLERANCE:
            raise ExportError(f"the exported policy's actions differ by {difference:.1e} of the range of actions")
        return difference
    # Rounding may turn a tie over.
    with torch.no_grad():
        loss = policy.log_prob(observations, expected) - policy.log_prob(observations, got)
    if not float(loss.max()) <= TOLERANCE:
        raise ExportError(
            f"the exported policy takes other actions in {int((got != expected).sum())} of {CHECKS} states"
        )
    return 0.0


@contextmanager
def exporters_quiet() -> Iterator[None]:
    """Without what exporters have to say about their own parts."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
