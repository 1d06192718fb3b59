"""`iql-plugins train --adapter`: the same options, the same table, the same way to go on, whoever trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from iql_plugins.agent import Agent
from iql_plugins.cli import main, training

OPTIONS = [
    *("--n-steps", "40", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "20", "--log-every", "10"),
    *("--episodes", "2", "--evaluation-episodes", "2", "--workers", "1", "--actor-dropout", "0.1"),
    *("--baseline", "none", "--device", "cpu", "--env", "short_pendulum:ShortPendulum-v0"),
]


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


@pytest.mark.parametrize(
    ("adapter", "framework"), [("sb3", "stable_baselines3"), ("d3rlpy", "d3rlpy"), ("torchrl", "torchrl")]
)
def test_every_adapter_trains_from_the_command_line_and_goes_on_after_ctrl_c(
    adapter: str, framework: str, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(framework)
    run = tmp_path / "run"
    stop_at(23, monkeypatch)
    assert main(["train", *OPTIONS, "--adapter", adapter, "--run-dir", str(run)]) == 130
    torch.manual_seed(99)
    assert main(["train", "--resume", str(run), "--env", "short_pendulum:ShortPendulum-v0"]) == 0
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
