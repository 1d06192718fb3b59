"""What a benchmark compares: gradient steps of this package through its adapters, and of the libraries installed.

Each maker takes the size of the problem and a dataset of keyword tensors, and returns a function that takes a number
of gradient steps, from drawing the batch to the update of the targets, on the device of the dataset.
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax_iql
import numpy as np
import plain_iql
import torch
from interleaved import Steps
from tensordict import TensorDict
from torch import Tensor

from iql_plugins.cli.errors import UserError
from iql_plugins.cli.training import adapter_training
from iql_plugins.config import Compile, IQLConfig
from iql_plugins.hookspecs import Training
from iql_plugins.keys import flat_name
from iql_plugins.networks import critic, gaussian_actor, value_function
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent, Observer
from iql_plugins.training.learner import Learner

Maker: TypeAlias = "Callable[[Size, TensorDict], Steps]"


@dataclass(frozen=True)
class Size:
    """How large a benchmark's problem is; the defaults are the usual ones of offline RL.

    Attributes:
        observation: entries of an observation.
        action: entries of an action.
        batch: transitions a step.
        hidden: width of both hidden layers.
        transitions: in the dataset.
    """

    observation: int = 17
    action: int = 6
    batch: int = 256
    hidden: int = 256
    transitions: int = 100_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def multiplications(self) -> int:
        """Floating-point operations of a step's matrix products with two critics, additions counted.

        Forward, the actor, V(s), V(s') and both critics and their targets; backward, the actor, V(s) and both critics,
        without the gradient of the inputs.
        """
        hidden, inputs = self.hidden, self.observation + self.action
        total = 0
        for count, first, last, trained in (
            (1, self.observation, self.action, True),
            (1, self.observation, 1, True),
            (1, self.observation, 1, False),
            (2, inputs, 1, True),
            (2, inputs, 1, False),
        ):
            forward = first * hidden + hidden * hidden + hidden * last
            backward = forward + hidden * hidden + hidden * last if trained else 0
            total += count * (forward + backward)
        return 2 * self.batch * total


def dataset_of(size: Size) -> TensorDict:
    """Random transitions by the key layout; a hundredth of them terminal, episodes of a hundred steps on average."""
    generator = torch.Generator().manual_seed(0)
    count = size.transitions

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    terminated = torch.rand(count, 1, generator=generator) < 0.01
    terminated[-1] = True
    observation = normal(size.observation)
    return TensorDict(
        {
            "observation": observation,
            "action": (normal(size.action) / 2).clamp(-0.99, 0.99),
            "next": {
                "observation": torch.where(terminated, normal(size.observation), observation.roll(-1, 0)),
                "reward": normal(1),
                "done": terminated,
                "terminated": terminated.clone(),
            },
        },
        batch_size=[count],
    )


def spaces_of(size: Size) -> Spaces:
    """The spaces of :func:`dataset_of`."""
    bounds = (-1.0,) * size.action, (1.0,) * size.action
    return Spaces(Box((size.observation,)), Box((size.action,), "float32", *bounds))


def config_of(size: Size, compile: Compile) -> IQLConfig:
    """The paper's hyper-parameters at a size."""
    return IQLConfig(batch_size=size.batch, hidden_sizes=(size.hidden, size.hidden), compile=compile)


def ours(adapter: str, compile: Compile, *, mode: str | None = None, capture: bool = False) -> Maker:
    """The maker of this package's steps through an adapter, as the command line trains with it.

    Args:
        adapter: its name.
        compile: whether losses and gradients are compiled.
        mode: see :class:`~iql_plugins.training.learner.Learner`; the command line trains with none.
        capture: likewise.

    Raises:
        UserError: for an adapter that is unknown, broken or does not train.
    """
    training = adapter_training(adapter)

    def make(size: Size, data: TensorDict) -> Steps:
        agent = Agent(spaces_of(size), config_of(size, compile), seed=0, device=_device(data))
        agent.learner = Learner.from_config(agent.loss, agent.config, seed=0, mode=mode, capture=capture)
        return fit(training, agent, data)

    return make


def fit(training: Training, agent: Agent, data: TensorDict) -> Steps:
    """Steps of an agent through an adapter."""
    algorithm = training.from_agent(agent)
    return lambda count: training.fit(algorithm, data, count, Observer(_ignore))


def _ignore(step: int) -> None:
    """No callback."""


def _keyword_tensors(data: TensorDict) -> dict[str, Tensor]:
    return {flat_name(key): tensor for key, tensor in data.items(True, True)}


def _device(data: TensorDict) -> torch.device:
    device: torch.device = data["observation"].device
    return device


def _torchrl(size: Size, data: TensorDict) -> Steps:
    """TorchRL's loss in the loop that its documentation shows."""
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.objectives import IQLLoss, SoftUpdate

    hidden, device = (size.hidden, size.hidden), _device(data)
    loss = IQLLoss(
        gaussian_actor(size.observation, size.action, hidden_sizes=hidden).to(device),
        critic(size.observation, size.action, hidden_sizes=hidden).to(device),
        value_function(size.observation, hidden_sizes=hidden).to(device),
        loss_function="l2",
        temperature=3.0,
        expectile=0.7,
    )
    loss.make_value_estimator(gamma=0.99)
    updater = SoftUpdate(loss, tau=0.005)
    optimizers = [
        torch.optim.Adam(parameters.values(True, True), lr=3e-4)
        for parameters in (loss.actor_network_params, loss.qvalue_network_params, loss.value_network_params)
    ]
    storage = LazyTensorStorage(size.transitions, device=device)
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=size.batch)
    buffer.extend(data)

    def steps(count: int) -> None:
        for _ in range(count):
            losses = loss(buffer.sample())
            (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            updater.step()

    return steps


def _plain(size: Size, data: TensorDict) -> Steps:
    """Plain PyTorch, in one file."""
    return plain_iql.peer(_keyword_tensors(data), size.batch, size.hidden)


def _d3rlpy(size: Size, data: TensorDict) -> Steps:
    """``fit`` of d3rlpy's IQL, without its messages."""
    device = _device(data)
    return d3rlpy_fit(d3rlpy_iql(size, f"{device.type}:{device.index or 0}"), mdp_dataset(data.cpu()))


def d3rlpy_iql(size: Size, device: str, **options: Any) -> Any:
    """d3rlpy's IQL at a size, with perceptrons unless ``options`` of its configuration say otherwise."""
    # The first message comes when it is imported.
    with contextlib.redirect_stdout(io.StringIO()):
        import d3rlpy

    encoder = d3rlpy.models.VectorEncoderFactory([size.hidden, size.hidden])
    options = options or {f"{role}_encoder_factory": encoder for role in ("actor", "critic", "value")}
    return d3rlpy.algos.IQLConfig(batch_size=size.batch, **options).create(device=device)


def mdp_dataset(data: TensorDict) -> Any:
    """A dataset of :func:`dataset_of` as d3rlpy's."""
    import d3rlpy
    import structlog

    with structlog.testing.capture_logs():
        return d3rlpy.dataset.MDPDataset(
            observations=data["observation"].numpy(),
            actions=data["action"].numpy(),
            rewards=data["next", "reward"].numpy(),
            terminals=data["next", "terminated"].numpy().astype(np.float32),
        )


def d3rlpy_fit(algorithm: Any, dataset: Any) -> Steps:
    """``fit`` for a number of steps, without messages, files and progress bars."""
    import d3rlpy
    import structlog

    def steps(count: int) -> None:
        with structlog.testing.capture_logs():
            algorithm.fit(
                dataset,
                n_steps=count,
                n_steps_per_epoch=count,
                logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
                show_progress=False,
                save_interval=count + 1,
            )

    return steps


def _stable_baselines3(size: Size, data: TensorDict) -> Steps:
    """``train`` of Stable-Baselines3's SAC, which has the same number of networks to train."""
    return sb3_train(sb3_sac(size, data, _device(data)), size)


def sb3_environment(size: Size, observations: Any = None) -> Any:
    """An environment with the spaces of :func:`spaces_of`, or a space of other observations, which is never stepped."""
    import gymnasium
    from stable_baselines3.common.env_util import make_vec_env

    class Still(gymnasium.Env[Any, Any]):
        observation_space = observations or gymnasium.spaces.Box(-np.inf, np.inf, (size.observation,))
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (size.action,))

    return make_vec_env(Still, 1)


def sb3_replay_buffer(size: Size, data: TensorDict, env: Any) -> Any:
    """A dataset of :func:`dataset_of` in Stable-Baselines3's replay buffer."""
    from stable_baselines3.common.buffers import ReplayBuffer

    buffer = ReplayBuffer(size.transitions, env.observation_space, env.action_space)
    data = data.cpu()
    buffer.observations[:, 0] = data["observation"].numpy()
    buffer.next_observations[:, 0] = data["next", "observation"].numpy()
    buffer.actions[:, 0] = data["action"].numpy()
    buffer.rewards[:] = data["next", "reward"].numpy()
    buffer.dones[:] = data["next", "terminated"].numpy()
    buffer.full = True
    return buffer


def sb3_sac(size: Size, data: TensorDict, device: torch.device | str) -> Any:
    """SAC at a size, with its data."""
    arch = {"net_arch": [size.hidden, size.hidden]}
    return sac(size, data, sb3_environment(size), policy="MlpPolicy", policy_kwargs=arch, device=device)


def sac(size: Size, data: TensorDict, env: Any, **options: Any) -> Any:
    """SAC with ``options`` of its own, and its data."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import configure

    model = SAC(env=env, buffer_size=1, batch_size=size.batch, **options)
    model.set_logger(configure(None, []))
    model.replay_buffer = sb3_replay_buffer(size, data, env)
    model.replay_buffer.device = model.device
    return model


def sb3_train(model: Any, size: Size, at_once: int | None = None) -> Steps:
    """``train``, so many gradient steps a call; None takes all in one."""

    def steps(count: int) -> None:
        for _ in range(count // (at_once or count)):
            model.train(gradient_steps=at_once or count, batch_size=size.batch)

    return steps


def _jax(size: Size, data: TensorDict) -> Steps:
    return jax_iql.peer(_keyword_tensors(data), size.batch, size.hidden)


#: Peers by name, with the module that each needs.
PEERS: Mapping[str, tuple[str, Maker]] = {
    "plain": ("torch", _plain),
    "torchrl": ("torchrl", _torchrl),
    "d3rlpy": ("d3rlpy", _d3rlpy),
    "sb3-sac": ("stable_baselines3", _stable_baselines3),
    "jax": ("jax, in an environment of its own: python tests/benchmarks/jax_iql.py makes it,", _jax),
}


def installed() -> list[str]:
    """The names of the peers whose library is there."""
    return [name for name in PEERS if _is_there(name)]


def _is_there(name: str) -> bool:
    return jax_iql.PYTHON.exists() if name == "jax" else importlib.util.find_spec(PEERS[name][0]) is not None


def makers(peers: Sequence[str]) -> dict[str, Maker]:
    """The makers of peers by the names that a table has for them.

    Args:
        peers: each is one of :data:`PEERS`, or a Python file with a function ``peer(data, batch_size, hidden)`` from
            keyword tensors, on the device to train on, to a function that takes a number of gradient steps.

    Raises:
        UserError: for an unknown name, a name that is there twice, a library that is not installed, or a file that
            cannot be imported.
    """
    found: dict[str, Maker] = {}
    for peer in peers:
        name = peer if peer in PEERS else Path(peer).stem
        if name in found:
            raise UserError(f"the peer {name!r} is there twice")
        found[name] = _library(peer) if peer in PEERS else _file(peer)
    return found


def _library(name: str) -> Maker:
    module, make = PEERS[name]
    if not _is_there(name):
        raise UserError(f"the peer {name!r} needs {module}, which is not installed")
    return make


def _file(name: str) -> Maker:
    path = Path(name)
    spec = importlib.util.spec_from_file_location(f"iql_plugins_peer_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"there is no peer {name!r}: give one of {', '.join(PEERS)}, or a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not callable(getattr(module, "peer", None)):
        raise UserError(f"{path} has no function peer(data, batch_size, hidden)")

    def make(size: Size, data: TensorDict) -> Steps:
        steps: Steps = module.peer(_keyword_tensors(data), size.batch, size.hidden)
        return steps

    return make
