"""A trained agent moves between all adapters: it acts the same, and its training goes on as if it had stayed."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("d3rlpy")
pytest.importorskip("stable_baselines3")
pytest.importorskip("torchrl")

from agents import NETWORKS, OBJECTIVES, SPACES, make_agent, make_dataset, observations, same, weights
from tensordict import TensorDict
from torch import Tensor, nn

import iql_d3rlpy
import iql_plugins
import iql_sb3
import iql_tensor
import iql_torchrl
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.cli import main
from iql_plugins.config import IQLConfig
from iql_plugins.hookspecs import Training
from iql_plugins.networks import critic, value_function
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent, build_loss

ADAPTERS = ("tensor", "sb3", "d3rlpy", "torchrl")
PAIRS = list(itertools.permutations(ADAPTERS, 2))
BEFORE, AFTER = 12, 10


@pytest.fixture(autouse=True)
def device() -> None:
    """The CPU alone, where native files are read to."""


def training_of(name: str) -> Training:
    training = iql_plugins.load(name).training
    assert training is not None
    return training


def trained(name: str, kind: str, dataset: TensorDict, **options: Any) -> Any:
    """An adapter's algorithm, in the middle of its training."""
    agent = make_agent(
        kind, dataset, normalize_observations=True, reward_scale=2.0, reward_shift=-0.5, actor_dropout=0.1, **options
    )
    algorithm = training_of(name).from_agent(agent)
    training_of(name).fit(algorithm, dataset, BEFORE, lambda step: None)
    return algorithm


def moved(algorithm: Any, source: str, target: str, folder: Path) -> Any:
    """The target adapter's algorithm, by way of the native files of both."""
    files = {name: folder / f"{name}{training_of(name).suffix}" for name in (source, target)}
    training_of(source).save(algorithm, files[source])
    agent = training_of(source).to_agent(training_of(source).load(files[source]))
    training_of(target).save(training_of(target).from_agent(agent), files[target])
    return training_of(target).load(files[target])


def losses_of(name: str, algorithm: Any, dataset: TensorDict) -> Tensor:
    """``[10, 4]`` losses and entropies of the next updates."""
    learner, losses = training_of(name).to_agent(algorithm).learner, []

    def callback(step: int) -> None:
        assert learner.last_losses is not None
        losses.append(learner.last_losses)

    training_of(name).fit(algorithm, dataset, AFTER, callback)
    return torch.stack(losses)


def as_float(action: Any) -> Tensor:
    return torch.as_tensor(action, device="cpu").double()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_moved_agent_acts_the_same_and_trains_on_alike(source: str, target: str, kind: str, tmp_path: Path) -> None:
    dataset = make_dataset(SPACES[kind])
    algorithm = trained(source, kind, dataset)
    other = moved(algorithm, source, target, tmp_path)
    agent, moved_agent = training_of(source).to_agent(algorithm), training_of(target).to_agent(other)
    states = observations(SPACES[kind], 1000)
    torch.testing.assert_close(as_float(moved_agent.act(states)), as_float(agent.act(states)), rtol=0.0, atol=1e-6)
    assert moved_agent.learner.step_count == BEFORE
    expected = losses_of(source, algorithm, dataset)
    torch.testing.assert_close(losses_of(target, other, dataset), expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(expected[0], expected[-1])
    assert moved_agent.learner.step_count == agent.learner.step_count == BEFORE + AFTER


#: Channels first, as Stable-Baselines3 hands images to its policies, and with the bounds that it gives them.
CAMERA = Box((3, 36, 36), "uint8", (0.0,) * (3 * 36 * 36), (255.0,) * (3 * 36 * 36))
MIXED = Spaces({"camera": CAMERA, "gear": Discrete(3, start=-1), "speed": Box((2,))}, Discrete(3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dict", {}),
        ("mixed", {}),
        *[(name, options) for name in ("continuous", "discrete") for options in OBJECTIVES.values()],
        *[("continuous", options) for options in NETWORKS.values()],
        *[(name, NETWORKS["all"]) for name in ("discrete", "dict", "mixed")],
    ],
    ids=str,
)
def test_an_agent_of_any_spaces_goes_through_all_adapters_and_comes_back(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPACES, "mixed", MIXED)
    dataset = make_dataset(SPACES[name])
    algorithm = trained("tensor", name, dataset, **options)
    expected = weights(algorithm.agent)
    other, states = algorithm, observations(SPACES[name], 100)
    for source, target in itertools.pairwise([*ADAPTERS, "tensor"]):
        other = moved(other, source, target, tmp_path)
    back = training_of("tensor").to_agent(other)
    assert same(weights(back), expected)
    assert torch.equal(as_float(back.act(states)), as_float(algorithm.act(states)))
    assert (back.spaces, back.config) == (algorithm.agent.spaces, algorithm.agent.config)
    torch.testing.assert_close(
        losses_of("tensor", other, dataset), losses_of("tensor", algorithm, dataset), rtol=0.0, atol=0.0
    )


@pytest.mark.parametrize("algorithm", [iql_tensor.IQL, iql_sb3.IQL, iql_d3rlpy.IQL, iql_torchrl.IQL])
def test_every_adapter_saves_and_loads_the_common_checkpoint(algorithm: Any, kind: str, tmp_path: Path) -> None:
    dataset = make_dataset(SPACES[kind])
    agent = make_agent(kind, dataset)
    agent.fit(dataset, 3)
    agent.extra["note"] = "kept"
    agent.save(tmp_path / "agent.safetensors")
    loaded = algorithm.from_agent(Agent.load(tmp_path / "agent.safetensors"))
    loaded.to_agent().save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "agent.safetensors").read_bytes()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_command_line_converts(
    source: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(SPACES["continuous"])
    algorithm = trained(source, "continuous", dataset)
    old, new = (tmp_path / f"agent{training_of(name).suffix}" for name in (source, target))
    training_of(source).save(algorithm, old)
    assert main(["convert", str(old), str(new), "--to", target]) == 0
    assert f"wrote {new}" in capsys.readouterr().out
    converted = training_of(target).to_agent(training_of(target).load(new))
    agent = training_of(source).to_agent(algorithm)
    assert same(weights(converted), weights(agent))
    assert converted.config == agent.config


# The default networks


def agents_of_the_defaults(spaces: Spaces) -> Iterator[tuple[str, Agent]]:
    """What each adapter's own interface builds when nothing is said of the networks."""
    dataset = make_dataset(spaces)
    yield "tensor", iql_tensor.IQL.build(dataset=dataset, compile="no").to_agent()
    yield "torchrl", iql_torchrl.IQL(Agent(spaces, IQLConfig(compile="no"))).to_agent()
    yield "sb3", iql_sb3.IQL("MlpPolicy", dataset=dataset, compile="no").to_agent()
    config: Any = iql_d3rlpy.DiscreteIQLConfig if spaces.discrete else iql_d3rlpy.IQLConfig
    algorithm = config().create()
    algorithm.build_with_dataset(iql_d3rlpy.to_replay_buffer(dataset))
    yield "d3rlpy", algorithm.to_agent()


def test_the_default_networks_are_the_same_in_all_adapters(kind: str) -> None:
    spaces = Spaces(Box((3,)), Discrete(4)) if kind == "discrete" else SPACES[kind]
    with torch.device("meta"):
        default = build_loss(spaces, IQLConfig())
    for name, agent in agents_of_the_defaults(spaces):
        assert agent.custom_parts() == [], name
        for network in ("actor_network", "value_network", "qvalue_network"):
            assert repr(getattr(agent.loss, network)) == repr(getattr(default, network)), (name, network)
        hidden = [tuple(p.shape) for p in agent.loss.value_network.parameters() if p.ndim == 2]
        assert hidden == [(256, 3), (256, 256), (1, 256)], name


# Networks that cannot move


def agent_with_a_network_of_its_own() -> Agent:
    """Its V has another width than its configuration says."""
    agent = make_agent("continuous")
    loss = iql_plugins.IQLLoss(
        agent.loss.actor_network,
        build_critics(agent),
        value_function(3, hidden_sizes=(5,)),
        loss_function="l2",
        temperature=3.0,
        expectile=0.7,
    )
    loss.make_value_estimator("TD0", gamma=0.99)
    return Agent(agent.spaces, agent.config, loss=loss, seed=0)


def build_critics(agent: Agent) -> list[nn.Module]:
    return [critic(3, 2, hidden_sizes=agent.config.hidden_sizes) for _ in range(agent.config.n_critics)]


@pytest.mark.parametrize("name", ADAPTERS)
def test_networks_that_cannot_move_are_refused_by_name(name: str, tmp_path: Path) -> None:
    agent, training = agent_with_a_network_of_its_own(), training_of(name)

    def move(path: Path) -> None:
        training.save(training.from_agent(agent), path)
        training.load(path)

    with pytest.raises(ValueError, match=r"^value_network .*not the default ones"):
        move(tmp_path / f"agent{training.suffix}")


@pytest.mark.parametrize("target", ADAPTERS)
def test_the_command_line_says_which_network_cannot_move(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent_with_a_network_of_its_own().save(tmp_path / "agent.safetensors")
    new = tmp_path / f"new{training_of(target).suffix}"
    assert main(["convert", str(tmp_path / "agent.safetensors"), str(new), "--to", target]) == 2
    error = capsys.readouterr().err
    assert "value_network of" in error
    assert "not the default ones" in error
    assert not new.exists()


def test_networks_of_ones_own_load_into_networks_like_them(tmp_path: Path) -> None:
    agent = agent_with_a_network_of_its_own()
    agent.save(tmp_path / "agent.safetensors")
    iql_torchrl.IQL(agent).save(tmp_path / "agent.pt")
    for load, file in ((Agent.load, "agent.safetensors"), (iql_torchrl.IQL.load, "agent.pt")):
        other = agent_with_a_network_of_its_own()
        assert not same(weights(other), weights(agent))
        load(tmp_path / file, loss=other.loss)
        assert same(weights(other), weights(agent))


#: V has widths of its own, which no other framework's V has.
OF_ITS_OWN = {"net_arch": {"pi": [4], "qf": [5], "vf": [6]}}


def test_networks_of_ones_own_in_one_framework_move_to_no_other(tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["continuous"])
    model = iql_sb3.IQL("MlpPolicy", dataset=dataset, policy_kwargs=OF_ITS_OWN)
    agent = model.to_agent()
    with pytest.raises(ValueError, match="value_network"):
        iql_d3rlpy.from_agent(agent).save(tmp_path / "agent.d3")
    iql_torchrl.IQL(agent).save(tmp_path / "agent.pt")
    with pytest.raises(CheckpointError, match="value_network"):
        iql_torchrl.IQL.load(tmp_path / "agent.pt")
    assert np.isfinite(agent.act(np.zeros(3, np.float32))).all()


def test_a_file_of_another_framework_whose_networks_cannot_move_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(SPACES["continuous"])
    iql_sb3.IQL("MlpPolicy", dataset=dataset, policy_kwargs=OF_ITS_OWN).save(tmp_path / "own.zip")
    for target in ("tensor", "torchrl"):
        new = tmp_path / f"new{training_of(target).suffix}"
        assert main(["convert", str(tmp_path / "own.zip"), str(new), "--to", target]) == 2
        error = capsys.readouterr().err
        assert f"value_network of {tmp_path / 'own.zip'} are not the default ones" in error
        assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["own.zip"]


def test_a_folder_is_no_file_to_convert_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_agent("continuous").save(tmp_path / "agent.safetensors")
    (tmp_path / "agent.pt").mkdir()
    arguments = ["convert", str(tmp_path / "agent.safetensors"), str(tmp_path / "agent.pt"), "--to", "torchrl"]
    assert main(arguments) == 2
    assert "is a folder, no file to write" in capsys.readouterr().err


@pytest.mark.parametrize("hyperparameters", [{"average_rewards": True}, {"shifted": True}])
def test_an_estimator_of_ones_own_goes_by_no_name_of_ours(hyperparameters: Any, tmp_path: Path) -> None:
    agent = make_agent("continuous")
    loss = iql_torchrl.IQLLoss.from_core(agent.loss).make_value_estimator("TD0", gamma=0.99, **hyperparameters)
    other = Agent(agent.spaces, agent.config, loss=loss, seed=0)
    assert other.custom_parts() == ["value_type"]
    other.save(tmp_path / "agent.safetensors")
    with pytest.raises(CheckpointError, match=r"^value_type of"):
        Agent.load(tmp_path / "agent.safetensors")


class Blind(iql_plugins.IQLLoss):
    """Computes something else."""

    def _target(self, *arguments: Any) -> Tensor:
        return super()._target(*arguments) * 0.0


def test_a_class_of_ones_own_is_refused(tmp_path: Path) -> None:
    agent = make_agent("continuous")
    critics = build_critics(agent)
    networks = (agent.loss.actor_network, critics, agent.loss.value_network)
    loss = Blind(*networks, loss_function="l2", temperature=3.0, expectile=0.7)
    other = Agent(agent.spaces, agent.config, loss=loss, seed=0)
    assert other.custom_parts() == ["class"]
    other.save(tmp_path / "agent.safetensors")
    with pytest.raises(CheckpointError, match=r"^class of"):
        Agent.load(tmp_path / "agent.safetensors")


# Other dtypes


def agent_of(dtype: torch.dtype, kind: str, dataset: TensorDict) -> Agent:
    agent = make_agent(kind, dataset, normalize_observations=True)
    agent.loss.to(dtype)
    agent.normalizers.to(dtype)
    return Agent(agent.spaces, agent.config, normalizers=agent.normalizers, loss=agent.loss, seed=0)


@pytest.mark.parametrize("target", ["tensor", "torchrl"])
def test_double_precision_is_kept(target: str, kind: str, tmp_path: Path) -> None:
    dataset = make_dataset(SPACES[kind])
    agent = agent_of(torch.float64, kind, dataset)
    agent.fit(dataset, BEFORE)
    other = training_of(target).to_agent(moved(agent_in(agent, "tensor"), "tensor", target, tmp_path))
    assert same(weights(other), weights(agent))
    assert {parameter.dtype for parameter in other.loss.parameters()} == {torch.float64}
    state = observations(SPACES[kind], 100).double()
    assert torch.equal(other.act(state), agent.act(state))
    agent.fit(dataset, AFTER)
    other.fit(dataset, AFTER)
    assert same(weights(other), weights(agent))


def agent_in(agent: Agent, name: str) -> Any:
    return training_of(name).from_agent(agent)


def test_the_dtype_is_the_files_whatever_the_default_is(kind: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        agent = make_agent(kind)
        agent.save(tmp_path / "agent.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(weights(Agent.load(tmp_path / "agent.safetensors")), weights(agent))


@pytest.mark.parametrize("target", ["sb3", "d3rlpy"])
def test_a_framework_whose_files_have_single_precision_refuses_double(target: str, kind: str, tmp_path: Path) -> None:
    agent = agent_of(torch.float64, kind, make_dataset(SPACES[kind]))
    with pytest.raises(ValueError, match=r"^dtype .*not the default ones"):
        training_of(target).save(agent_in(agent, target), tmp_path / f"agent{training_of(target).suffix}")
    assert not list(tmp_path.iterdir())


def test_a_loss_of_another_dtype_than_the_file_is_left_alone(tmp_path: Path) -> None:
    make_agent("continuous").save(tmp_path / "agent.safetensors")
    loss = make_agent("continuous").loss.double()
    before = {name: tensor.clone() + 0.0 for name, tensor in loss.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"is torch\.float32, that of the loss torch\.float64"):
        Agent.load(tmp_path / "agent.safetensors", loss=loss)
    assert same(dict(loss.state_dict()), before)


# Documents that nobody wrote


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", 3), ("config", None), ("spaces", []), ("normalizers", "x"), ("learner", 3), ("extra", 3),
        ("custom", {"a": 1}), ("learner.step_count", float("inf")), ("learner.target_updater", 3),
        ("learner.optimizers", [3]), ("learner.optimizers", {}),
    ],
)  # fmt: skip
def test_a_forged_document_is_refused_by_one_error(name: str, value: Any) -> None:
    document, tensors = make_agent("continuous").state()
    *parents, last = name.split(".")
    entry = document
    for parent in parents:
        entry = entry[parent]
    entry[last] = value
    with pytest.raises(CheckpointError, match="forged"):
        Agent.from_state(document, tensors, name="forged")


def test_images_with_channels_last_do_not_move_to_stable_baselines3() -> None:
    agent = make_agent("image")
    with pytest.raises(
        ValueError, match=r"'camera'.* must be uint8 of shape \(36, 36, 3\), got uint8 of shape \(3, 36,"
    ):
        iql_sb3.IQL.from_agent(agent)
