"""An agent in TorchRL's hands: the same loss, TorchRL's replay buffer, torch's files."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchrl")

from agents import SPACES, make_agent, make_dataset, observations, same, weights
from conftest import make_batch, make_loss
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives import LossModule, SoftUpdate, ValueEstimators
from torchrl.objectives.value import TDLambdaEstimator

import iql_plugins
import iql_torchrl
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.networks import critic, value_function
from iql_plugins.training.agent import Agent
from iql_torchrl import IQL, IQLLoss, plugin

NORMALIZED = {"normalize_observations": True, "reward_scale": 2.0, "reward_shift": -0.5, "actor_dropout": 0.1}


def agents(name: str, dataset: TensorDict, count: int = 2, **hyperparameters: Any) -> list[Agent]:
    """Equal agents, each of its own."""
    return [make_agent(name, dataset, **NORMALIZED, **hyperparameters) for _ in range(count)]


# The loss of an agent as a LossModule


def test_the_loss_of_an_agent_is_a_loss_module_over_the_very_same_networks(kind: str) -> None:
    agent = make_agent(kind)
    loss = IQL(agent).loss
    assert isinstance(loss, LossModule)
    assert isinstance(loss, iql_torchrl.DiscreteIQLLoss) == (kind == "discrete")
    assert type(agent.loss).__module__ == "iql_plugins.losses.iql"
    ours, theirs = dict(loss.named_parameters()), dict(agent.loss.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert loss.state_dict().keys() == agent.loss.state_dict().keys()


def test_a_loss_of_the_core_as_a_loss_module_gives_its_losses(kind: str) -> None:
    core = make_loss(kind, expectile=0.8, temperature=2.0, max_weight=7.0, loss_function="l1", reduction="sum")
    core.make_value_estimator("TDLambda", gamma=0.9, lmbda=0.7, time_dim=1)
    core.set_keys(priority="priority")
    core.select_out_keys("loss_value", "loss_qvalue")
    loss = IQLLoss.from_core(core)
    batch, other = make_batch(kind, (3, 4)), make_batch(kind, (3, 4))
    other.update(batch)
    torch.testing.assert_close(dict(loss(batch).items()), dict(core(other).items()))
    torch.testing.assert_close(batch["priority"], other["priority"])
    assert loss.out_keys == ["loss_value", "loss_qvalue"]
    assert isinstance(loss.value_estimator, TDLambdaEstimator)
    assert loss.value_type == ValueEstimators.TDLambda
    assert loss.value_estimator.gamma.item() == pytest.approx(0.9)


def test_training_the_loss_module_trains_the_agent_and_settings_are_its_own(kind: str) -> None:
    dataset = make_dataset(SPACES[kind])
    agent = make_agent(kind, dataset)
    iql, before = IQL(agent), weights(agent)
    loss = iql.loss
    optimizer, updater = torch.optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.5)
    losses = loss(iql.replay_buffer(dataset).sample())
    (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
    optimizer.step()
    updater.step()
    for name, tensor in weights(agent).items():
        assert torch.equal(tensor, before[name]) == name.startswith("_value_estimator"), name
    loss.expectile = 0.9
    loss.make_value_estimator(gamma=0.5)
    assert agent.loss.expectile == agent.config.expectile
    assert float(agent.loss.value_estimator.gamma) == pytest.approx(agent.config.discount)


def test_a_loss_module_stays_itself() -> None:
    loss = make_loss("continuous")
    module = IQLLoss.from_core(loss)
    assert module is not loss
    assert IQLLoss.from_core(module) is module


def test_an_agent_may_hold_a_loss_module(tmp_path: Path, kind: str) -> None:
    dataset = make_dataset(SPACES[kind])
    agent, other = agents(kind, dataset)
    held = Agent(other.spaces, other.config, normalizers=other.normalizers, loss=IQLLoss.from_core(other.loss), seed=0)
    assert held.custom_parts() == []
    assert IQL(held).loss is held.loss
    agent.fit(dataset, 5)
    held.fit(dataset, 5)
    assert same(weights(held), weights(agent))
    held.save(tmp_path / "agent.safetensors")
    loaded = Agent.load(tmp_path / "agent.safetensors", device=agent.device)
    assert same(weights(loaded), weights(agent))


# Training


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("mapped", [False, True])
def test_training_from_the_replay_buffer_is_that_of_the_agent_bit_for_bit(
    name: str, mapped: bool, tmp_path: Path
) -> None:
    dataset = make_dataset(SPACES[name])
    expected, agent = agents(name, dataset)
    expected.fit(dataset, 6)
    steps: list[int] = []
    iql = IQL.from_agent(agent)
    assert iql.fit(dataset.cpu().memmap(str(tmp_path)) if mapped else dataset, 6, steps.append) is iql
    assert steps == [1, 2, 3, 4, 5, 6]
    assert same(weights(agent), weights(expected))
    assert torch.equal(agent.generator.get_state(), expected.generator.get_state())
    assert iql.to_agent() is agent


def test_the_replay_buffer_is_torchrls_and_samples_in_the_networks_units() -> None:
    dataset = make_dataset(SPACES["continuous"])
    (agent,) = agents("continuous", dataset, 1)
    before = dataset.clone()
    buffer = IQL(agent).replay_buffer(dataset)
    assert isinstance(buffer, TensorDictReplayBuffer)
    assert len(buffer) == len(dataset)
    sample = buffer.sample()
    assert sample.batch_size == torch.Size([agent.config.batch_size])
    rows = agent.normalizers(dataset[sample["index"]])
    for key in ("observation", "action", ("next", "reward"), ("next", "observation"), ("next", "terminated")):
        torch.testing.assert_close(sample[key], rows[key])
    assert bool((dataset == before).all())


def test_a_memory_mapped_dataset_stays_on_disk(tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["continuous"]).cpu().memmap(str(tmp_path))
    (agent,) = agents("continuous", dataset.to(torch.empty(0).device), 1)
    buffer = IQL(agent).replay_buffer(dataset)
    kept = buffer._storage._storage
    assert all(isinstance(tensor, MemoryMappedTensor) for tensor in kept.values(True, True))
    # However it is read, it is in the networks' units.
    rows = agent.normalizers(dataset[2:5].to(agent.device))
    for index in (slice(2, 5), torch.arange(2, 5), torch.arange(2, 5) - len(dataset), [2, 3, 4]):
        torch.testing.assert_close(buffer[index]["observation"], rows["observation"])
    torch.testing.assert_close(buffer[2]["action"], rows["action"][0])
    # What is written is in the environment's units, and in what is drawn next, of a copy as well.
    buffer.set_at_(("next", "reward"), torch.full((3, 1), 9.0, device="cpu"), slice(2, 5))
    for written in (buffer, copy.deepcopy(buffer)):
        reward = written._storage[torch.arange(2, 5, device="cpu")]["next", "reward"]
        assert torch.equal(reward, torch.full((3, 1), 9.0, device="cpu"))


def test_a_dataset_that_does_not_fit_trains_nothing() -> None:
    dataset = make_dataset(SPACES["continuous"])
    (agent,) = agents("continuous", dataset, 1)
    before = weights(agent)
    with pytest.raises(ValueError, match="the dataset is empty"):
        IQL(agent).fit(dataset[:0], 1)
    with pytest.raises(ValueError, match="action"):
        IQL(agent).fit(make_dataset(SPACES["discrete"]), 1)
    assert same(weights(agent), before)


def test_it_acts_as_its_agent(kind: str) -> None:
    agent = make_agent(kind)
    states = observations(SPACES[kind])
    assert torch.equal(IQL(agent).act(states), agent.act(states))


class OwnLoss(iql_plugins.IQLLoss):
    """May compute something else."""


def test_a_class_of_ones_own_is_not_replaced_by_ours() -> None:
    agent = make_agent("continuous")
    networks = (agent.loss.actor_network, [critic(3, 2), critic(3, 2)], value_function(3))
    with pytest.raises(TypeError, match=r"got OwnLoss: derive your class from iql_torchrl's"):
        IQLLoss.from_core(OwnLoss(*networks))


# Files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    dataset = make_dataset(SPACES["continuous"])
    (agent,) = agents("continuous", dataset, 1)
    path = tmp_path / "agent.pt"
    IQL(agent).fit(dataset, 3).save(path)
    return path


@pytest.mark.parametrize("name", SPACES)
def test_a_file_holds_everything(name: str, tmp_path: Path) -> None:
    dataset = make_dataset(SPACES[name])
    (agent,) = agents(name, dataset, 1)
    agent.extra["note"] = "kept"
    iql = IQL(agent).fit(dataset, 5)
    iql.save(tmp_path / "agent.pt")
    loaded = IQL.load(tmp_path / "agent.pt", device=agent.device)
    other = loaded.to_agent()
    assert same(weights(other), weights(agent))
    assert (other.spaces, other.config, other.extra) == (agent.spaces, agent.config, agent.extra)
    iql.fit(dataset, 5)
    loaded.fit(dataset, 5)
    assert same(weights(other), weights(agent))


def test_torch_reads_the_file_without_pickle_and_a_loss_takes_its_weights(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    expected = IQL.load(path, device=torch.empty(0).device).agent.loss
    first, second = agents("continuous", make_dataset(SPACES["continuous"]))
    for loss in (first.loss, IQLLoss.from_core(second.loss)):
        loss.load_state_dict(content["loss"])
        assert same(loss.state_dict(), expected.state_dict())


def test_equal_agents_give_equal_files(path: Path, tmp_path: Path) -> None:
    IQL.load(path).save(tmp_path / "again.pt")
    first, second = (torch.load(file, weights_only=True) for file in (path, tmp_path / "again.pt"))
    assert first["checksum"] == second["checksum"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.pt"):
        IQL.load(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        IQL(make_agent("continuous")).save(tmp_path / "nowhere" / "agent.pt")


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_file_that_was_cut_is_refused(length: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"agent\.pt' is no file of torch, or damaged"):
        IQL.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "has version '2' of the format, known is '1'"),
        ({"format": "another"}, "is a file of torch, but no checkpoint of iql-plugins"),
        ({"document": "{}"}, "is not as it was written: its checksum is another one"),
        ({"loss": {}}, "is not as it was written"),
        ({"loss": 3, "tensors": None}, "is not as it was written"),
        ({"document": 3}, "is not as it was written"),
    ],
)
def test_content_that_was_changed_is_refused(changes: dict[str, Any], message: str, path: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | changes, path)
    with pytest.raises(CheckpointError, match=message):
        IQL.load(path)


def test_one_weight_that_was_changed_is_found(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    next(iter(content["loss"].values())).view(-1)[0] += 1e-3
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="its checksum is another one"):
        IQL.load(path)


@pytest.mark.parametrize("content", [3, [1], {}, {"loss": {"a": torch.zeros(1)}}])
def test_a_file_of_something_else_is_refused(content: Any, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="is a file of torch, but no checkpoint of iql-plugins"):
        IQL.load(path)


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda tensor: tensor.to("meta"), lambda tensor: [1.0]])
def test_weights_that_are_no_ordinary_tensors_are_refused(change: Any, path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["loss"] = {name: change(tensor) for name, tensor in content["loss"].items()}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"no checkpoint has|checksum"):
        IQL.load(path)


class Trap:
    """Unpickled, it would make a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def test_no_code_of_a_file_is_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": Trap()}, path)
    with pytest.raises(CheckpointError, match="is no file of torch, or damaged"):
        IQL.load(path)
    assert not (tmp_path / "trapped").exists()


def test_a_save_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        IQL(make_agent("continuous")).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# The plugin


def test_the_plugin_describes_how_the_command_line_trains() -> None:
    adapter = plugin.iql_adapter()
    assert (adapter.name, adapter.framework) == ("torchrl", "torchrl")
    assert adapter.algorithms == {
        "IQL": IQL,
        "IQLLoss": iql_torchrl.IQLLoss,
        "DiscreteIQLLoss": iql_torchrl.DiscreteIQLLoss,
    }
    assert adapter.training is not None
    assert adapter.training.suffix == ".pt"
    assert iql_plugins.load("torchrl").algorithms == adapter.algorithms
