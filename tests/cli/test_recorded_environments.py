"""Ids of environments that files hold: one with a module is imported for nobody who did not ask for it."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from recorded import agent_for, minari_dataset, saved

from iql_plugins.cli import main
from iql_plugins.cli.errors import UserError
from iql_plugins.cli.rollouts import recorded_environment

ENV = "canary_environments:Canary-v0"
MODULE = """
import gymnasium
open({canary!r}, "a").close()
gymnasium.register(
    "Canary-v0", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=10
)
"""
TINY = [
    *("--n-steps", "4", "--hidden-sizes", "8", "--batch-size", "16", "--episodes", "2", "--evaluation-episodes", "2"),
    *("--baseline", "none", "--device", "cpu", "--compile", "no"),
]

Run = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def device() -> None:
    """The CPU alone, where files are read to."""


def forget(canary: Path) -> None:
    """As if the module had never been imported."""
    canary.unlink(missing_ok=True)
    sys.modules.pop("canary_environments", None)
    gymnasium.registry.pop("Canary-v0", None)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that is there once the module of :data:`ENV` has been imported."""
    path = tmp_path / "imported"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "canary_environments.py").write_text(MODULE.format(canary=str(path)))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    forget(path)
    yield path
    forget(path)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; status, and the document or the error."""

    def call(*arguments: str | Path) -> tuple[int, Any]:
        capfd.readouterr()
        status = main([*map(str, arguments), "--json"])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        document = json.loads(captured.out)
        if status == 0:
            return status, document
        assert captured.err.splitlines()[-1] == f"iql-plugins: {document['error']}"
        return status, document["error"]

    return call


@pytest.mark.parametrize(
    ("adapter", "suffix", "framework"),
    [
        ("tensor", ".safetensors", "torch"),
        ("sb3", ".zip", "stable_baselines3"),
        ("d3rlpy", ".d3", "d3rlpy"),
        ("torchrl", ".pt", "torchrl"),
    ],
)
def test_a_policys_environment_with_a_module_is_given_by_hand(
    adapter: str, suffix: str, framework: str, run: Run, canary: Path, tmp_path: Path
) -> None:
    pytest.importorskip(framework)
    path = saved(agent_for(ENV), adapter, tmp_path / f"policy{suffix}")
    status, error = run("evaluate", path)
    assert status == 2
    assert f"{path} names the environment {ENV}" in error
    assert error.endswith(f"give --env {ENV} if you trust it")
    assert not canary.exists()
    assert run("evaluate", path, "--env", ENV, "--episodes", "1")[0] == 0
    assert canary.exists()


def test_an_environment_without_a_module_is_still_the_policys(run: Run, tmp_path: Path) -> None:
    path = saved(agent_for("Pendulum-v1"), "tensor", tmp_path / "policy.safetensors")
    assert run("evaluate", path, "--episodes", "1")[1]["env"] == "Pendulum-v1"


@pytest.mark.parametrize(("option", "workers"), [("--resume", "2"), ("--config", "1")])
@pytest.mark.slow
def test_a_runs_environment_with_a_module_is_given_again(
    option: str, workers: str, run: Run, canary: Path, tmp_path: Path
) -> None:
    assert (
        run("train", *TINY, "--seeds", "2", "--stack", "1", "--workers", "1", "--env", ENV, "--run-dir", "run")[0] == 0
    )
    forget(canary)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    more = ["--workers", workers, *(["--run-dir", "again"] if option == "--config" else [])]
    status, error = run("train", option, "run", *more)
    assert status == 2
    assert f"run names the environment {ENV}" in error
    assert error.endswith(f"give --env {ENV} if you trust it")
    status, error = run("train", option, "run", "--env", "Pendulum-v1", *more)
    assert status == 2
    assert "--env Pendulum-v1 is not the environment of run, which is 'canary_environments:Canary-v0'" in error
    assert not canary.exists()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert not (tmp_path / "again").exists()
    document = run("train", option, "run", "--env", ENV, *more)[1]
    assert document["env"] == ENV
    assert canary.exists()


def test_an_evaluated_run_with_a_module_needs_it_again(run: Run, canary: Path) -> None:
    assert run("train", *TINY, "--env", ENV, "--run-dir", "run")[0] == 0
    forget(canary)
    status, error = run("evaluate", "run")
    assert (status, canary.exists()) == (2, False)
    assert error.endswith(f"give --env {ENV} if you trust it")
    assert run("evaluate", "run", "--env", ENV, "--episodes", "1")[0] == 0


def test_an_environment_that_is_edited_into_a_configuration_is_not_imported(
    run: Run, canary: Path, tmp_path: Path
) -> None:
    assert run("train", *TINY, "--run-dir", "run")[0] == 0
    path = tmp_path / "run" / "config.json"
    document = json.loads(path.read_text())
    assert document["settings"]["env"] == "Pendulum-v1"
    # The run's own is not in the way, another one is.
    assert run("train", "--resume", "run", "--env", "Pendulum-v1")[0] == 0
    assert "which is 'Pendulum-v1'" in run("train", "--resume", "run", "--env", ENV)[1]
    document["settings"]["env"] = ENV
    path.write_text(json.dumps(document))
    for arguments in (["--resume", "run"], ["--config", "run"], ["--config", "run/config.json"]):
        status, error = run("train", *arguments)
        assert status == 2
        assert f"give --env {ENV} if you trust it" in error
    assert not canary.exists()


def test_a_datasets_environment_with_a_module_is_given_by_hand(run: Run, canary: Path, tmp_path: Path) -> None:
    path = minari_dataset(tmp_path / "walk", {"id": ENV})
    status, error = run("train", *TINY, "--dataset", path, "--run-dir", "run")
    assert status == 2
    assert f"{path} names the environment {ENV}" in error
    assert error.endswith(f"give --env {ENV} if you trust it")
    assert run("inspect", path)[0] == 0
    assert not canary.exists()
    assert not (tmp_path / "run").exists()
    assert run("train", *TINY, "--dataset", path, "--run-dir", "run", "--env", ENV)[1]["env"] == ENV
    assert canary.exists()


def test_a_datasets_entry_point_is_not_imported(run: Run, canary: Path, tmp_path: Path) -> None:
    specification = {"id": "Nothing-v0", "entry_point": "canary_environments:Environment"}
    path = minari_dataset(tmp_path / "walk", specification, eval_env_spec=specification)
    assert run("inspect", path)[0] == 0
    # One that cannot be made is no reason not to train.
    assert run("train", *TINY, "--dataset", path, "--run-dir", "run")[1]["env"] is None
    metadata = path / "data" / "metadata.json"
    document = json.loads(metadata.read_text())
    del document["observation_space"]
    metadata.write_text(json.dumps(document))
    for command in (["inspect", path], ["train", *TINY, "--dataset", path]):
        status, error = run(*command)
        assert status == 2
        assert "does not say its 'observation_space'" in error
    assert not canary.exists()


@pytest.mark.parametrize(
    "env", [3, True, ["Pendulum-v1"], {"entry_point": ENV}, "Pendulum\n-v1", "\x1b[2Jcanary:Canary-v0"], ids=repr
)
def test_what_is_no_id_is_refused_in_one_printable_line(env: object, run: Run, tmp_path: Path) -> None:
    path = saved(agent_for(env), "tensor", tmp_path / "policy.safetensors")
    status, error = run("evaluate", path)
    assert status == 2
    assert "must name its environment by gymnasium's id" in error
    assert error.isprintable()


@pytest.mark.parametrize("run_state", [3, ["env"], {}, None], ids=repr)
def test_a_policy_whose_run_says_nothing_of_an_environment_needs_one(
    run_state: object, run: Run, tmp_path: Path
) -> None:
    agent = agent_for(None)
    agent.extra["run"] = run_state
    status, error = run("evaluate", saved(agent, "tensor", tmp_path / "policy.safetensors"))
    assert status == 2
    assert "does not say which environment it is for: give --env" in error


@pytest.mark.parametrize("env", ["os:Pendulum-v1", "a.b.c:x/Y-v0", "a:b:c", ":Pendulum-v1", "Pendulum-v1:"])
def test_every_id_that_gymnasium_would_import_for_is_refused(env: str) -> None:
    with pytest.raises(UserError, match="a module that would be imported"):
        recorded_environment(env, "a file")


@pytest.mark.parametrize("env", ["Pendulum-v1", "ALE/Pong-v5", "Pendulum", "phys2d/CartPole-v0"])
def test_namespaces_and_versions_are_no_modules(env: str) -> None:
    assert recorded_environment(env, "a file") == env


def test_an_id_that_a_shell_would_run_is_quoted() -> None:
    with pytest.raises(UserError, match=r"give --env 'a:\$\(touch x\)' if"):
        recorded_environment("a:$(touch x)", "a file")


def test_the_help_says_that_a_module_is_given_again(run: Run) -> None:
    for command, text in (
        ("train", "One with a module is never taken from a file, so that --resume and --config need it again"),
        ("evaluate", "the one that the policy was trained for, if it has no module"),
    ):
        assert text in " ".join(run(command, "--help")[1]["help"].replace("│", " ").split())
