"""`iql-plugins label`: a row a transition, from which anyone's behaviour cloning is the actor's training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import BOUNDS, SPACES
from pyarrow import parquet
from torch import Tensor, nn

from iql_plugins import load_dataset
from iql_plugins.cli import main
from iql_plugins.config import IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.training.agent import Agent

Label = Callable[..., tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]]
ROWS = 60


@pytest.fixture
def label(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Label:
    """Labels a dataset; the command's document, and the columns of the file."""

    def call(agent: Agent, dataset: Path | str, *options: str) -> tuple[dict[str, Any], Any]:
        agent.save(tmp_path / "agent.safetensors")
        output = tmp_path / "labels.parquet"
        given = ["label", tmp_path / "agent.safetensors", dataset, "-o", output, *options, "--json"]
        assert main(list(map(str, given))) == 0
        document = json.loads(capfd.readouterr().out)
        table = parquet.read_table(output)
        assert json.loads(table.schema.metadata[b"iql_plugins"])["dataset_sha256"] == document["dataset_sha256"]
        return document, {name: table[name].to_numpy().copy() for name in table.column_names}

    return call


def write(path: Path, discrete: bool = False, *, following: bool = True) -> Path:
    random = np.random.default_rng(0)
    number = np.arange(ROWS)
    columns = {
        "observations": random.normal(2.0, 3.0, size=(ROWS, 3)).astype(np.float32),
        "actions": random.integers(1, 5, ROWS)
        if discrete
        else random.uniform(BOUNDS.low, BOUNDS.high, (ROWS, 2)).astype(np.float32),
        "rewards": random.normal(size=ROWS).astype(np.float32),
        "terminals": number % 20 == 9,
        "timeouts": number % 20 == 19,
    }
    if following:
        columns["next_observations"] = random.normal(size=(ROWS, 3)).astype(np.float32)
    np.savez(path, **columns)
    return path


def trained(dataset: Path, kind: str, **hyperparameters: Any) -> Agent:
    tensors = load_dataset(dataset, discrete=SPACES[kind].discrete)
    config = IQLConfig(
        n_steps=20, batch_size=16, hidden_sizes=(16, 16), compile="no", normalize_observations=True,
        reward_scale=2.0, reward_shift=-0.5, actor_learning_rate=1e-2, critic_learning_rate=1e-2,
    ).replace(**hyperparameters)  # fmt: skip
    agent = Agent(SPACES[kind], config, normalizers=Normalizers.fit(tensors, SPACES[kind], config), seed=0)
    agent.fit(tensors, 20)
    return agent


def plain_log_likelihood(agent: Agent, network: nn.Module, log_std: Tensor | None, columns: Any) -> Tensor:
    """Of the data's actions, as whoever has the networks and PyTorch writes it."""
    observation = torch.as_tensor(columns["observations"])
    mean, std = observation.mean(0), observation.std(0, correction=0)
    output = network((observation - mean) / std)
    action = torch.as_tensor(columns["actions"])
    if log_std is None:
        return torch.distributions.Categorical(logits=output).log_prob(action - 1)
    low, high = torch.tensor(BOUNDS.low), torch.tensor(BOUNDS.high)
    unit = 2.0 * (action - low) / (high - low) - 1.0
    return torch.distributions.Normal(output.tanh(), log_std.exp()).log_prob(unit).sum(-1)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"value_objective": "sparse"},
        {"temperature": 10.0, "max_weight": 2.0},
        {"objective_options": {"noise_threshold": 0.5}},
    ],
)
def test_weighted_behaviour_cloning_from_labels_is_the_actors_training(
    kind: str, options: dict[str, Any], label: Label, tmp_path: Path
) -> None:
    discrete = kind == "discrete"
    dataset = write(tmp_path / "data.npz", discrete)
    agent = trained(dataset, kind, **options)
    _, labels = label(agent, dataset)
    columns = dict(np.load(dataset))
    assert np.ptp(labels["weight"]) > 0.1

    batch = agent.normalizers(load_dataset(dataset, discrete=discrete))
    agent.loss.zero_grad()
    agent.loss.actor_loss(batch)[0].backward()
    head = agent.loss.actor_network.module[0].module
    body = (head if discrete else head.body).layers
    network = nn.Sequential(
        *[nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4 if discrete else 2)]
    )
    network.load_state_dict(body.state_dict())
    log_std = None if discrete else head.log_std.detach().clone().requires_grad_()
    likelihood = plain_log_likelihood(agent, network, log_std, columns)
    (-(torch.as_tensor(labels["weight"]) * likelihood).mean()).backward()

    expected = dict(body.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-6)
    if log_std is not None:
        torch.testing.assert_close(log_std.grad, head.log_std.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_rows_are_those_of_the_source_in_its_order(
    threshold: float, label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write(tmp_path / "data.npz")
    agent = trained(dataset, "continuous", objective_options={"noise_threshold": threshold})
    document, whole = label(agent, dataset)
    assert document["rows"] == ROWS
    for name, expected in {
        "row": np.arange(ROWS),
        "episode": np.arange(ROWS) // 10,
        "step": np.arange(ROWS) % 10,
    }.items():
        np.testing.assert_array_equal(whole[name], expected)
    np.testing.assert_allclose(whole["advantage"], whole["qvalue"] - whole["value"], atol=1e-6)
    plain = np.minimum(np.exp(3.0 * whole["advantage"]), 100.0)
    assert np.allclose(whole["weight"], plain, rtol=1e-5) == (threshold == 0.0)
    assert document["means"]["weight"] == pytest.approx(whole["weight"].mean(), rel=1e-5)
    # A row's labels are that row's, however many are computed together.
    from iql_plugins.ope import criteria

    monkeypatch.setattr(criteria, "CHUNK", 7)
    _, streamed = label(agent, dataset)
    assert parquet.ParquetFile(tmp_path / "labels.parquet").num_row_groups == 9
    for name, column in whole.items():
        np.testing.assert_allclose(streamed[name], column, rtol=1e-5, atol=1e-6)


def test_rows_that_are_no_transitions_have_no_labels(label: Label, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data.npz", following=False)
    document, labels = label(trained(dataset, "continuous"), dataset)
    # The last row of a cut episode has no next observation.
    assert document["dropped"] == 3
    np.testing.assert_array_equal(labels["row"], [row for row in range(ROWS) if row % 20 != 19])
    np.testing.assert_array_equal(labels["step"], [row % 10 for row in range(ROWS) if row % 20 != 19])


def test_actions_of_an_extraction_that_weighs_none_weigh_one(label: Label, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data.npz")
    _, labels = label(trained(dataset, "continuous", policy_extraction="ddpg_bc"), dataset)
    assert (labels["weight"] == 1.0).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["agent.safetensors", "data.npz", "-o", "labels.csv"], "--output must be a .parquet file"),
        (["agent.safetensors", "data.npz", "-o", "nowhere/labels.parquet"], "no folder 'nowhere'"),
        (["agent.safetensors", "pendulum-v1-sac"], "shape"),
        (["missing.safetensors", "data.npz"], "no policy"),
    ],
)
def test_mistakes_are_named_and_leave_no_file(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(write(tmp_path / "data.npz"), "continuous").save("agent.safetensors")
    assert main(["label", *arguments]) == 2
    assert expected in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"agent.safetensors", "data.npz"}
