"""`iql-plugins train --adapter`: the same options, the same table, the same way to go on, whoever trains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iql_plugins import load_dataset
from iql_plugins.cli import main, training
from iql_plugins.training.agent import Agent

ENV = "short_pendulum:ShortPendulum-v0"
#: A run's own environment, which no file can make the command line import.
AGAIN = ["--env", ENV]
OPTIONS = [
    *("--n-steps", "40", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "20", "--log-every", "10"),
    *("--episodes", "2", "--evaluation-episodes", "2", "--workers", "1", "--actor-dropout", "0.1"),
    *("--baseline", "none", "--device", "cpu", "--env", ENV),
]
FRAMEWORKS = [("sb3", "stable_baselines3"), ("d3rlpy", "d3rlpy"), ("torchrl", "torchrl")]


@pytest.fixture(autouse=True)
def device() -> None:
    """The CPU alone; the command line chooses devices itself."""


def results(run: Path) -> Any:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the adapter for plain tensors."""
    folder = tmp_path_factory.mktemp("runs") / "tensor"
    assert main(["train", *OPTIONS, "--run-dir", str(folder)]) == 0
    return folder


def stop_at(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next training end with Ctrl-C after a gradient step."""
    after_step = training._Trainer.after_step

    def interrupted(self: Any, step: int) -> None:
        after_step(self, step)
        if step == wanted:
            monkeypatch.setattr(training._Trainer, "after_step", after_step)
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Trainer, "after_step", interrupted)


@pytest.mark.parametrize(("adapter", "framework"), FRAMEWORKS)
def test_every_adapter_trains_from_the_command_line_and_goes_on_after_ctrl_c(
    adapter: str, framework: str, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(framework)
    run = tmp_path / "run"
    stop_at(23, monkeypatch)
    assert main(["train", *OPTIONS, "--adapter", adapter, "--run-dir", str(run)]) == 130
    torch.manual_seed(99)
    assert main(["train", "--resume", str(run), *AGAIN]) == 0
    document, other = results(run), results(expected)
    assert document["adapter"] == adapter
    assert list(other["results"]) == ["data", "IQL final", "IQL best"]
    for name, result in other["results"].items():
        assert document["results"][name]["mean_return"] == pytest.approx(result["mean_return"], rel=1e-4), name
    agents = [Agent.load(folder / "policy.safetensors") for folder in (expected, run)]
    assert [agent.learner.step_count for agent in agents] == [40, 40]
    state = torch.randn(100, 3, device="cpu")
    torch.testing.assert_close(agents[1].act(state), agents[0].act(state), rtol=1e-4, atol=1e-4)
    assert (run / "metrics.csv").read_text().splitlines()[0] == (expected / "metrics.csv").read_text().splitlines()[0]


@pytest.fixture
def beyond(tmp_path: Path) -> Path:
    """A file as of a policy that explores: a quarter of its actions are more than the environment executes."""
    dataset = load_dataset("pendulum-v1-sac")[:400]
    generator = np.random.default_rng(0)
    names = {"observations": "observation", "actions": "action", "rewards": ("next", "reward")}
    columns = {name: dataset[key].numpy() for name, key in names.items()}
    columns["actions"] = columns["actions"] + generator.normal(0.0, 0.7, (400, 1)).astype(np.float32)
    columns |= {"terminals": np.zeros(400), "timeouts": dataset["next", "done"].numpy()}
    np.savez(tmp_path / "explored.npz", **columns, next_observations=dataset["next", "observation"].numpy())
    return tmp_path / "explored.npz"


@pytest.mark.parametrize(("adapter", "framework"), [("tensor", "torch"), *FRAMEWORKS])
def test_every_adapter_clips_actions_to_what_was_executed_and_the_command_says_so_once(
    adapter: str, framework: str, beyond: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(framework)
    assert main(["inspect", str(beyond), "--env", ENV, "--json"]) == 0
    findings = {finding["code"]: finding for finding in json.loads(capfd.readouterr().out)["findings"]}
    found = findings["actions-outside-bounds"]
    assert 0 < found["count"] < 200
    options = [*OPTIONS, "--baseline", "bc", "--dataset", str(beyond), "--adapter", adapter]
    assert main(["train", *options, "--run-dir", str(tmp_path / "run")]) == 0
    told = f"'action' is beyond the bounds in {found['count']} of 400 rows, first in row {found['row']}: "
    assert capfd.readouterr().err.count(told) == 1
    assert results(tmp_path / "run")["results"]["IQL final"]["mean_return"] < 0


def test_actions_that_no_clipping_explains_end_the_command_before_there_is_a_run(
    beyond: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with np.load(beyond) as file:
        columns = dict(file)
    columns["actions"][123] = 1e9
    np.savez(beyond, **columns)
    options = ["train", *OPTIONS, "--dataset", str(beyond), "--run-dir", str(tmp_path / "run")]
    assert main(options) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "ten times over in row 123: 1e+09 in entry 0, whose bounds are -2 and 2" in last
    assert "clip_all_actions=True" in last
    assert not (tmp_path / "run").exists()
    assert main([*options, "--clip-all-actions"]) == 0
    assert Agent.load(tmp_path / "run" / "policy.safetensors").config.clip_all_actions
    assert main(["train", "--resume", str(tmp_path / "run"), *AGAIN]) == 0


@pytest.mark.parametrize(("adapter", "framework"), [("tensor", "torch"), *FRAMEWORKS])
def test_weights_that_are_not_finite_are_never_written_over_good_ones(
    adapter: str,
    framework: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(framework)
    run, before = tmp_path / "run", dict[str, bytes]()
    after_step = training._Trainer.after_step

    def spoilt(self: Any, step: int) -> None:
        # The losses of this step are finite still.
        if step == 40:
            before.update({path.name: path.read_bytes() for path in run.glob("*.safetensors")})
            with torch.no_grad():
                next(self.agent.loss.actor_network.parameters()).fill_(torch.nan)
        after_step(self, step)

    monkeypatch.setattr(training._Trainer, "after_step", spoilt)
    assert main(["train", *OPTIONS, "--adapter", adapter, "--run-dir", str(run)]) == 1
    assert "IQL, seed 0: " in (last := capfd.readouterr().err.splitlines()[-1])
    assert "the actor's weights not finite at step 40" in last
    assert set(before) == {"checkpoint.safetensors", "policy_best.safetensors"}
    assert {path.name: path.read_bytes() for path in run.glob("*.safetensors")} == before
    monkeypatch.setattr(training._Trainer, "after_step", after_step)
    assert main(["train", "--resume", str(run), *AGAIN]) == 0
    assert (run / "policy.safetensors").exists()


def test_a_training_that_diverges_in_a_stack_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [option for option in OPTIONS if option != "0.1"]
    options.remove("--actor-dropout")
    options += ["--critic-learning-rate", "1e38", "--seeds", "2", "--stack", "2", "--run-dir", str(tmp_path / "run")]
    assert main(["train", *options]) == 1
    assert "IQL, seed 0: loss_actor" in capfd.readouterr().err.splitlines()[-1]
