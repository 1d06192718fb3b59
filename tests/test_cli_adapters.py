"""`iql-plugins train --adapter`: the same options, the same table, the same way to go on, whoever trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iql_plugins.agent import Agent
from iql_plugins.cli import main, training

OPTIONS = [
    *("--n-steps", "40", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "20", "--log-every", "10"),
    *("--episodes", "2", "--evaluation-episodes", "2", "--workers", "1", "--actor-dropout", "0.1"),
    *("--env", "short_pendulum:ShortPendulum-v0"),
]

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, in a folder of its own; status and stdout."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        status = main(list(arguments))
        return status, capfd.readouterr().out

    return call


def stop_at(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next training end with Ctrl-C after a gradient step."""
    after_step = training._Trainer.after_step

    def interrupted(self: Any, step: int) -> None:
        after_step(self, step)
        if step == wanted:
            monkeypatch.setattr(training._Trainer, "after_step", after_step)
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Trainer, "after_step", interrupted)


@pytest.mark.parametrize("adapter", ["sb3", "d3rlpy", "torchrl"])
def test_every_adapter_trains_from_the_command_line_and_goes_on_after_ctrl_c(
    adapter: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out = run("train", *OPTIONS, "--run-dir", "tensor", "--json")
    assert status == 0
    expected = json.loads(out)
    stop_at(23, monkeypatch)
    assert run("train", *OPTIONS, "--adapter", adapter, "--run-dir", "other")[0] == 130
    torch.manual_seed(99)
    status, out = run("train", "--resume", "other", "--json")
    assert status == 0
    document = json.loads(out)
    assert document["adapter"] == adapter
    assert set(document["results"]) == set(expected["results"]) == {"data", "behaviour cloning", "IQL final", "IQL best"}
    for name, result in expected["results"].items():
        assert document["results"][name]["mean"] == pytest.approx(result["mean"], rel=1e-4), name
    for name in ("metrics.csv", "policy.safetensors", "policy_best.safetensors"):
        assert (tmp_path / "other" / name).exists()
    agents = [Agent.load(tmp_path / folder / "policy.safetensors") for folder in ("tensor", "other")]
    assert [agent.learner.step_count for agent in agents] == [40, 40]
    state = torch.randn(100, 3, device="cpu")
    torch.testing.assert_close(agents[1].act(state), agents[0].act(state), rtol=1e-4, atol=1e-4)
