"""``iql-plugins export --format hub``: a folder for the Hugging Face hub."""

import json
import re
from pathlib import Path
from typing import Any

import gymnasium
import huggingface_hub as hub
import numpy as np
import pytest
import torch
from safetensors import safe_open

from iql_plugins.cli import hub as cards
from iql_plugins.cli import main
from iql_plugins.cli.rollouts import with_module
from iql_plugins.config import IQLConfig
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent

SPACES = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))
TRAINING = (
    *("train", "--dataset", "data.npz", "--env", "Pendulum-v1", "--preset", "pendulum", "--run-dir", "run"),
    *("--n-steps", "4", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "4", "--log-every", "4"),
    *("--episodes", "3", "--evaluation-episodes", "1", "--baseline", "none", "--workers", "1"),
)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in this process; status and document."""

    def call(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        status = main([*map(str, arguments), "--json"])
        return status, json.loads(capfd.readouterr().out)

    return call


def agent() -> Agent:
    return Agent(SPACES, IQLConfig(n_steps=10, hidden_sizes=(8,), compile="no"), seed=0)


def python_lines(folder: Path) -> str:
    """The code of a card."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 5
    return str(code)


def test_a_run_becomes_a_folder_that_the_hub_and_this_package_read(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from iql_plugins.cli.recipes.recipe import archive

    random = np.random.default_rng(0)
    numbers = {"observations": (400, 3), "actions": (400, 1), "rewards": (400,)}
    columns: dict[str, Any] = {name: random.uniform(-1, 1, shape).astype("f4") for name, shape in numbers.items()}
    columns["terminals"] = np.zeros(400, bool)
    columns["timeouts"] = np.arange(400) % 100 == 99
    from iql_plugins import read_dataset

    sha256 = read_dataset(columns).sha256
    columns["metadata"] = np.array(json.dumps({"recipe": "coin-tosses", "seed": 7, "sha256": sha256}))
    Path("data.npz").write_bytes(archive(columns))
    status, trained = run(*TRAINING)
    assert status == 0, trained
    # The run has recorded how the data were made: they may be elsewhere by now.
    Path("data.npz").unlink()
    status, document = run("export", "run", "--format", "hub", "-o", "out/hub", "--episodes", "3")
    assert status == 0, document
    folder = Path("out/hub")
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "config.json", "policy.safetensors", "results.json"
    ]  # fmt: skip

    # The hub's own classes read the card: the evaluation is the run's last one.
    card = hub.ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "iql-plugins"
    assert {"Pendulum-v1", "reinforcement-learning"} <= set(card.data.tags)
    [result] = card.data.eval_results
    returns = trained["by_seed"][0]["final_returns"]
    assert (result.task_type, result.dataset_type, result.metric_type) == (
        "reinforcement-learning", "Pendulum-v1", "mean_reward"
    )  # fmt: skip
    assert result.metric_value == f"{np.mean(returns):.2f} +/- {np.std(returns):.2f}"
    assert card.data.model_name == "IQL"
    assert result.metric_value in card.text

    # Where the data come from is there, and nothing of where they lay.
    described = json.loads((folder / "config.json").read_text())
    assert described["dataset"] == {
        "name": "data.npz", "sha256": sha256, "transitions": 396, "recipe": "coin-tosses", "seed": 7
    }  # fmt: skip
    assert '"recipe": "coin-tosses"' in card.text
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    with safe_open(folder / "policy.safetensors", "pt") as weights:
        assert weights.keys()

    # It is a policy like any other, exported once more as well.
    status, measured = run("evaluate", folder, "--episodes", "3")
    assert (status, measured["returns"]) == (0, returns)
    assert run("convert", folder, "policy.zip", "--to", "sb3")[0] == 0
    assert run("export", folder, "--format", "hub", "-o", "again", "--episodes", "3")[0] == 0
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name

    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(python_lines(Path()), names)
    assert names["action"] == Agent.load("policy.safetensors").act(gymnasium.make("Pendulum-v1").reset(seed=0)[0])


def test_a_policy_without_an_environment_has_a_card_without_an_evaluation(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent().save(tmp_path / "policy.safetensors")
    status, document = run("export", tmp_path / "policy.safetensors", "--format", "hub")
    assert (status, document["evaluation"]) == (0, None)
    card = hub.ModelCard.load(tmp_path / "hub" / "README.md", ignore_metadata_errors=False)
    assert card.data.eval_results is None
    assert not (tmp_path / "hub" / "results.json").exists()
    monkeypatch.chdir(tmp_path / "hub")
    names: dict[str, Any] = {}
    exec(python_lines(Path()), names)
    assert names["action"].shape == (1, 1)


def test_a_folder_for_the_hub_is_written_whole_or_not_at_all(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.safetensors"
    agent().save(path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        (["--format", "hub", "-o", tmp_path / "full"], "must be a new or an empty folder"),
        (["--format", "hub", "-o", tmp_path / "full" / "file" / "new"], "must be a new or an empty folder"),
        (["--format", "hub", "--env", "CartPole-v1"], "the policy's observation space"),
        (["--format", "hub", "--env", "Pendulum-v1", "--episodes", "0"], "--episodes must be at least 1"),
        (["--format", "torch", "--env", "Pendulum-v1"], "--env is of the hub's card"),
        (["--format", "torch", "--episodes", "3"], "--episodes is of the hub's card"),
    ):
        status, document = run("export", path, *arguments)
        assert status == 2
        assert message in document["error"]

    def act(self: Agent, observation: Any, deterministic: bool = True) -> Any:
        return torch.rand(len(observation), 1)

    monkeypatch.setattr(Agent, "act", act)
    assert run("export", path, "--format", "hub")[0] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full", "policy.safetensors"]


def test_environments_of_other_packages_are_named_with_their_module() -> None:
    assert with_module("PointMaze_UMaze-v3") == "gymnasium_robotics:PointMaze_UMaze-v3"
    assert with_module("Pendulum-v1") == "Pendulum-v1"


def test_what_is_said_of_other_data_is_no_provenance_of_these() -> None:
    run = {"settings": {"dataset": "folder/data.npz", "dataset_sha256": "abc", "transitions": 7}}
    known = {"name": "data.npz", "sha256": "abc", "transitions": 7}
    assert cards._data_of(run, {"recipe": "walk", "sha256": "abc"}) == known | {"recipe": "walk"}
    assert cards._data_of(run, {"recipe": "walk", "sha256": "def"}) == known
    assert cards._data_of(run, {}) == known
