"""One dataset, one seed, the same weights: every way into the loss gives the same losses, gradients and parameters."""

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("d3rlpy")
pytest.importorskip("stable_baselines3")
pytest.importorskip("torchrl")

import torchrl.objectives
from agents import NETWORKS, OBJECTIVES
from conftest import keywords
from d3rlpy.dataset import BasicTransitionPicker, TransitionMiniBatch
from stable_baselines3.common.buffers import ReplayBuffer
from tensordict import TensorDict
from torch import Tensor

import iql_d3rlpy
import iql_d3rlpy.training
import iql_sb3
import iql_sb3.plugin
import iql_tensor
import iql_torchrl
from iql_plugins.config import IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent
from iql_plugins.training.learner import adam

STEPS, BATCH, EPISODE, EPISODES = 50, 8, 10, 8
SPACES = {
    "continuous": Spaces(Box((3,)), Box((2,), low=(-1.0, 0.0), high=(3.0, 2.0))),
    "discrete": Spaces(Box((3,)), Discrete(4, start=1)),
}
#: The frameworks keep data in float32: on this grid it holds all numbers exactly, normalised ones, too.
GRID = 64


@dataclass
class Record:
    """What a training did, step by step."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, loss: torch.nn.Module, losses: Tensor) -> None:
        named = dict(loss.named_parameters())
        self.losses.append(losses)
        self.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        self.parameters.append({name: tensor.clone() for name, tensor in loss.state_dict().items()})


def on_grid(tensor: Tensor) -> Tensor:
    return (tensor * GRID).round() / GRID


def make_dataset(kind: str) -> TensorDict:
    """Walks that end in terminal states and at time limits by turns."""
    rows = EPISODES * EPISODE
    torch.manual_seed(0)
    walk = on_grid(0.3 * torch.randn(EPISODES, EPISODE + 1, 3)).cumsum(1)
    action = SPACES[kind].action
    if isinstance(action, Discrete):
        actions = torch.randint(action.start, action.start + action.n, (rows, 1))
    else:
        low, high = torch.tensor(action.low), torch.tensor(action.high)
        actions = on_grid(low + (high - low) * (0.05 + 0.9 * torch.rand(rows, 2)))
    number = torch.arange(rows).unsqueeze(-1)
    last = number % EPISODE == EPISODE - 1
    return TensorDict(
        {
            "observation": walk[:, :-1].reshape(rows, 3),
            "action": actions,
            "next": {
                "observation": walk[:, 1:].reshape(rows, 3),
                "reward": on_grid(torch.randn(rows, 1)),
                "done": last,
                "terminated": last & (number // EPISODE % 2 == 1),
            },
        },
        batch_size=[rows],
    )


def make_agent(kind: str, **hyperparameters: Any) -> Agent:
    spaces = SPACES[kind]
    moments = {"observation": (torch.tensor([0.5, -0.25, 0.125]), torch.tensor([0.5, 2.0, 1.0]))}
    normalizers = Normalizers(spaces, observation_moments=moments, reward_scale=2.0, reward_shift=-0.5)
    config = IQLConfig(
        n_steps=2 * STEPS,
        batch_size=BATCH,
        hidden_sizes=(8, 8),
        normalize_observations=True,
        reward_scale=2.0,
        reward_shift=-0.5,
        compile="no",
        **hyperparameters,
    )
    return Agent(spaces, config, normalizers=normalizers, seed=0, device=torch.empty(0).device)


def indices(agent: Agent) -> Iterator[Tensor]:
    """The transitions of each batch, as an agent draws them."""
    for _ in range(STEPS):
        yield torch.randint(EPISODES * EPISODE, (BATCH,), generator=agent.generator, device=agent.generator.device)


Path = Callable[[Agent, TensorDict], Record]


def by_steps(agent: Agent) -> tuple[Record, Callable[[int], None]]:
    """A record, and the callback that writes it."""
    record = Record()

    def callback(step: int) -> None:
        assert agent.learner.last_losses is not None
        assert step == agent.learner.step_count == len(record.losses) + 1
        record.add(agent.loss, agent.learner.last_losses)

    return record, callback


def tensor_updates(agent: Agent, dataset: TensorDict) -> Record:
    """Keyword tensors in the environment's units."""
    record, callback = by_steps(agent)
    iql = iql_tensor.IQL(agent)
    for index in indices(agent):
        iql.update(**keywords(dataset[index]))
        callback(agent.learner.step_count)
    return record


def tensor_fit(agent: Agent, dataset: TensorDict) -> Record:
    record, callback = by_steps(agent)
    iql_tensor.IQL(agent).fit(dataset, STEPS, callback)
    return record


def sb3_dataset(agent: Agent, dataset: TensorDict) -> Record:
    """The dataset beside the replay buffer."""
    record, callback = by_steps(agent)
    iql_sb3.plugin.iql_adapter().training.fit(iql_sb3.IQL.from_agent(agent), dataset, STEPS, callback)
    return record


def sb3_buffer_as_dataset(agent: Agent, dataset: TensorDict) -> Record:
    """A replay buffer, whose actions are scaled, loaded as a dataset."""
    record, callback = by_steps(agent)
    model = iql_sb3.IQL.from_agent(agent)
    model.load_dataset(filled_buffer(model, dataset))
    model.learn_offline(STEPS, callback=lambda *_: callback(agent.learner.step_count) or True)
    return record


def sb3_buffer(agent: Agent, dataset: TensorDict) -> Record:
    """The samples of the model's own replay buffer."""
    record, callback = by_steps(agent)
    model = iql_sb3.IQL.from_agent(agent)
    model.replay_buffer = filled_buffer(model, dataset)
    drawn = list(indices(agent))
    model.replay_buffer.sample = lambda batch_size, env=None: model.replay_buffer._get_samples(  # type: ignore[method-assign]
        drawn.pop(0).cpu().numpy(), env
    )
    for _ in range(STEPS):
        model.train(1)
        callback(agent.learner.step_count)
    return record


def filled_buffer(model: iql_sb3.IQL, dataset: TensorDict) -> ReplayBuffer:
    buffer = ReplayBuffer(len(dataset), model.observation_space, model.action_space, model.device)
    for row in dataset.cpu():
        next_ = row["next"]
        action = row["action"].numpy()
        action = action if model.policy.spaces.discrete else model.policy.scale_action(action)
        buffer.add(
            row["observation"].numpy(),
            next_["observation"].numpy(),
            action,
            next_["reward"].numpy(),
            next_["done"].numpy(),
            [{"TimeLimit.truncated": bool(next_["done"] & ~next_["terminated"])}],
        )
    return buffer


def d3rlpy_fit(agent: Agent, dataset: TensorDict) -> Record:
    """d3rlpy's own fit on the fast buffer."""
    record, callback = by_steps(agent)
    iql_d3rlpy.training.fit(iql_d3rlpy.from_agent(agent), dataset, STEPS, callback)
    return record


def d3rlpy_mini_batches(agent: Agent, dataset: TensorDict) -> Record:
    """d3rlpy's own mini-batches, of transitions that it picks."""
    record, callback = by_steps(agent)
    algorithm = iql_d3rlpy.from_agent(agent)
    episodes = iql_d3rlpy.to_replay_buffer(dataset).episodes
    pick = BasicTransitionPicker()
    for index in indices(agent):
        rows = [divmod(int(row), EPISODE) for row in index]
        batch = TransitionMiniBatch.from_transitions([pick(episodes[episode], step) for episode, step in rows])
        algorithm.update(batch)
        callback(agent.learner.step_count)
    return record


def torchrl_fit(agent: Agent, dataset: TensorDict) -> Record:
    """TorchRL's replay buffer."""
    record, callback = by_steps(agent)
    iql_torchrl.IQL(agent).fit(dataset, STEPS, callback)
    return record


def torchrl_loop(agent: Agent, dataset: TensorDict) -> Record:
    """A script for TorchRL's loss: its ``LossModule``, its replay buffer, its updater, torch's Adam, no learner."""
    record = Record()
    iql = iql_torchrl.IQL(agent)
    loss, buffer, config = iql.loss, iql.replay_buffer(dataset), agent.config
    networks = {"actor": loss.actor_network, "critic": loss.qvalue_network, "value": loss.value_network}
    optimizers = adam(
        [
            {"params": list(network.parameters()), "lr": getattr(config, f"{name}_learning_rate")}
            for name, network in networks.items()
        ]
    )
    updater = torchrl.objectives.SoftUpdate(loss, tau=config.polyak)
    for _ in range(STEPS):
        losses = loss(buffer.sample())
        loss.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        for optimizer in optimizers:
            optimizer.step()
        updater.step()
        record.add(loss, torch.stack([losses[name].detach() for name in loss.out_keys]))
    return record


PATHS: list[Path] = [
    tensor_fit,
    sb3_dataset,
    sb3_buffer_as_dataset,
    sb3_buffer,
    d3rlpy_fit,
    d3rlpy_mini_batches,
    torchrl_fit,
    torchrl_loop,
]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Of the networks, and of the dataset."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@cache
def expected_record(kind: str, dtype: torch.dtype, options: str) -> Record:
    """That of keyword tensors and of options in JSON; one for all paths. The default dtype is ``dtype``."""
    return tensor_updates(make_agent(kind, **json.loads(options)), make_dataset(kind))


def assert_equal_records(record: Record, expected: Record, dtype: torch.dtype) -> None:
    assert len(record.losses) == len(expected.losses) == STEPS
    losses, expected_losses = torch.stack(record.losses), torch.stack(expected.losses)
    assert losses.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
        return
    torch.testing.assert_close(losses, expected_losses, rtol=0.0, atol=1e-9)
    for name in ("gradients", "parameters"):
        torch.testing.assert_close(getattr(record, name), getattr(expected, name), rtol=0.0, atol=1e-9)


PLAIN = {"actor_schedule": "constant"}
ALL = {
    "actor_schedule": "cosine",
    "actor_dropout": 0.1,
    "max_grad_norm": 0.5,
    "discount": 0.95,
    "loss_function": "huber_0.5",
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_every_adapter_trains_the_same(path: Path, kind: str, dtype: torch.dtype) -> None:
    expected = expected_record(kind, dtype, json.dumps(PLAIN))
    assert_equal_records(path(make_agent(kind, **PLAIN), make_dataset(kind)), expected, dtype)
    names = expected.gradients[0].keys()
    assert {name.split(".")[0] for name in names} == {f"{n}_network_params" for n in ("actor", "qvalue", "value")}
    assert all(not torch.equal(expected.parameters[0][name], expected.parameters[-1][name]) for name in names)


@pytest.mark.parametrize("path", [sb3_dataset, d3rlpy_fit, torchrl_loop], ids=lambda path: path.__name__)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_every_adapter_trains_every_objective_the_same(
    path: Path, kind: str, objective: str, dtype: torch.dtype
) -> None:
    options = PLAIN | OBJECTIVES[objective]
    expected = expected_record(kind, dtype, json.dumps(options))
    assert_equal_records(path(make_agent(kind, **options), make_dataset(kind)), expected, dtype)


@pytest.mark.parametrize("path", [sb3_dataset, d3rlpy_fit, torchrl_fit], ids=lambda path: path.__name__)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_every_adapter_trains_every_network_the_same(path: Path, kind: str, name: str, dtype: torch.dtype) -> None:
    expected = expected_record(kind, dtype, json.dumps(PLAIN | NETWORKS[name]))
    assert_equal_records(path(make_agent(kind, **PLAIN, **NETWORKS[name]), make_dataset(kind)), expected, dtype)


@pytest.mark.parametrize("path", [sb3_dataset, d3rlpy_fit, torchrl_fit], ids=lambda path: path.__name__)
def test_every_adapter_has_the_same_schedule_dropout_and_clipping(path: Path, kind: str, dtype: torch.dtype) -> None:
    expected = expected_record(kind, dtype, json.dumps(ALL))
    agent, dataset = make_agent(kind, **ALL), make_dataset(kind)
    # What random numbers are drawn elsewhere does not matter.
    torch.manual_seed(1)
    np.random.seed(1)
    assert_equal_records(path(agent, dataset), expected, dtype)


def test_every_adapter_keeps_the_policys_rate_unless_it_is_told_otherwise() -> None:
    assert IQLConfig().actor_schedule == "constant"
    assert inspect.signature(iql_sb3.IQL).parameters["actor_schedule"].default == "constant"
    for config in (iql_d3rlpy.IQLConfig(), iql_d3rlpy.DiscreteIQLConfig()):
        assert config.actor_schedule_steps is None


def test_a_time_limit_bootstraps_in_every_adapter_and_a_terminal_state_in_none(kind: str) -> None:
    dataset = make_dataset(kind)
    dataset["next", "terminated"] = dataset["next", "done"].clone()
    other = dataset.clone()
    other["next", "terminated"] = torch.zeros_like(dataset["next", "done"])
    for path in (tensor_fit, sb3_dataset, d3rlpy_fit, torchrl_fit):
        losses, other_losses = (torch.stack(path(make_agent(kind), data).losses) for data in (dataset, other))
        assert not torch.equal(losses, other_losses), path.__name__
