"""`iql-plugins train`: what it learns from, what it leaves behind, and how it goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import short_pendulum  # noqa: F401 - registers the environment
import torch
from processes import alive, assert_all_end
from requirements import data_of_others, needs_compiler, needs_proc

from iql_plugins import _compat, checkpoint, load_dataset, ope
from iql_plugins.cli import main, train, training, workers
from iql_plugins.cli.errors import UserError
from iql_plugins.cli.output import Result
from iql_plugins.cli.settings import CHANGEABLE, Settings, Unit, available_cores
from iql_plugins.cli.training import SELECTION_SEED, adapter_training, metrics_rows
from iql_plugins.config import IQLConfig
from iql_plugins.data.episodes import episode_ends, held_out
from iql_plugins.losses import targets
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent

ENV = "short_pendulum:ShortPendulum-v0"
#: A run's own environment, which no file can make the command line import.
AGAIN = ["--env", ENV]
#: Small, so that a run takes no second.
TINY = [
    *("--n-steps", "40", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "20", "--log-every", "10"),
    *("--episodes", "2", "--evaluation-episodes", "2", "--workers", "1", "--actor-dropout", "0.1"),
]
SMALL = [*TINY, "--env", ENV, "--baseline", "none"]
BOTH = [*TINY, "--env", ENV]
BITWISE = ("checkpoint.safetensors", "policy.safetensors", "policy_best.safetensors", "metrics.csv")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, in a folder of its own; status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes trainings end with Ctrl-C after a gradient step."""

    def stop(wanted: int) -> None:
        after_step = training._Trainer.after_step

        def interrupted(self: Any, step: int) -> None:
            after_step(self, step)
            if step == wanted:
                monkeypatch.setattr(training._Trainer, "after_step", after_step)
                raise KeyboardInterrupt

        monkeypatch.setattr(training._Trainer, "after_step", interrupted)

    return stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of :data:`BOTH` that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *BOTH, "--run-dir", str(folder)]) == 0
    return folder


def write_dataset(path: Path, **arrays: Any) -> Path:
    random = np.random.default_rng(0)
    ends = np.tile([0, 0, 0, 1], 10).astype(np.float32)
    columns = {
        "observations": random.normal(size=(40, 3)).astype(np.float32),
        "next_observations": random.normal(size=(40, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(40, 2)).astype(np.float32),
        "rewards": random.normal(size=40).astype(np.float32),
        "terminals": ends,
        "timeouts": np.zeros_like(ends),
    }
    np.savez(path, **(columns | arrays))
    return path


def assert_same_run(folder: Path, other: Path, *subfolders: str) -> None:
    for subfolder in ("", *subfolders):
        for name in BITWISE:
            assert (folder / subfolder / name).read_bytes() == (other / subfolder / name).read_bytes(), (
                f"{subfolder}/{name}"
            )


# What a run leaves


def test_without_arguments_it_is_about_the_dataset_that_ships() -> None:
    from iql_plugins.cli.arguments import Train, parse
    from iql_plugins.config import preset

    arguments = parse(["train"])
    assert isinstance(arguments, Train)
    assert arguments.dataset == "pendulum-v1-sac"
    assert arguments.hyperparameters == preset("pendulum")
    assert arguments.baseline == "bc"


def test_options_win_over_the_preset_and_the_preset_over_the_defaults() -> None:
    from iql_plugins.cli.arguments import Train, parse
    from iql_plugins.config import IQLConfig, preset

    def hyperparameters(*options: str) -> IQLConfig:
        arguments = parse(["train", *options])
        assert isinstance(arguments, Train)
        return arguments.hyperparameters

    assert hyperparameters("--dataset", "mine.npz") == IQLConfig()
    assert hyperparameters("--dataset", "mine.npz", "--preset", "antmaze") == preset("antmaze")
    given = hyperparameters("--preset=antmaze", "--temperature", "2", "--hidden-sizes", "3", "4")
    assert given == preset("antmaze", temperature=2.0, hidden_sizes=(3, 4))
    networks = ["--critic-hidden-sizes", "5", "6", "--critic-layer-norm", "--activation", "gelu"]
    assert hyperparameters("--dataset", "mine.npz", *networks, "--value-dropout", "0.5") == IQLConfig(
        critic_hidden_sizes=(5, 6), critic_layer_norm=True, activation="gelu", value_dropout=0.5
    )
    assert hyperparameters("--temperature", "auto_0.5").temperature == "auto_0.5"
    assert hyperparameters("--reward-scale", "0.5", "--max-grad-norm", "1").reward_scale == 0.5
    sparse = ["--preset", "antmaze", "--value-objective", "sparse"]
    assert hyperparameters(*sparse) == preset("antmaze", value_objective="sparse")
    assert hyperparameters(*sparse).objective_options == {"alpha": 0.1}
    # Either spelling, and a value behind an equals sign.
    for spelled in (["--value_objective", "sparse"], ["--value_objective=sparse"], ["--value-objective=sparse"]):
        assert hyperparameters("--preset=antmaze", *spelled) == preset("antmaze", value_objective="sparse")
    assert hyperparameters(*sparse, "--objective-options", "alpha", "3").objective_options == {"alpha": 3.0}
    climbing = ["--preset", "maze2d", "--policy-extraction", "ddpg_bc"]
    assert hyperparameters(*climbing) == preset("maze2d", policy_extraction="ddpg_bc")
    assert hyperparameters(*climbing).objective_options == {"bc_coefficient": 0.003}
    with pytest.raises(UserError, match=r"value_objective must be one of 'expectile', .* got 'tilt'"):
        hyperparameters("--preset", "antmaze", "--value-objective", "tilt")


def test_a_run_leaves_policy_picture_metrics_and_its_configuration(run: Run, tmp_path: Path) -> None:
    status, out, err = run("train", *TINY)
    assert status == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"pendulum-v1-sac-\d{8}-\d{6}", folder.name)
    for line in ("data ", "behaviour cloning ", "IQL final ", "IQL best "):
        assert re.search(rf"^ ?{line}\s+-[\d.]+ +-[\d.]+ to -[\d.]+", out, re.MULTILINE), line
    assert "IQL, seed 0: step 20 of 40" in err
    assert "behaviour cloning, seed 0: step 40 of 40" in err
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp"))
    for method in ("", "bc"):
        rows = metrics_rows(folder / method / "metrics.csv")
        assert [row["step"] for row in rows] == [10, 20, 30, 40]
        assert ["mean_return" in row for row in rows] == [False, True, False, True]
        assert all(np.isfinite(list(row.values())).all() for row in rows)
        assert Agent.load(folder / method / "checkpoint.safetensors").learner.step_count == 40
    assert Agent.load(folder / "policy.safetensors").config.temperature == 3.0
    assert Agent.load(folder / "bc" / "policy.safetensors").config.temperature == 0.0
    document = json.loads((folder / "config.json").read_text())
    assert document["settings"]["hyperparameters"]["compile"] in ("yes", "no")  # not "auto"
    assert document["settings"]["threads"] >= 1
    assert document["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__


def test_behaviour_cloning_is_that_whatever_the_objectives(run: Run, tmp_path: Path) -> None:
    objectives = ["--value-objective", "sparse", "--policy-extraction", "ddpg_bc", "--objective-options", "alpha", "2"]
    folder = tmp_path / "run"
    assert run("train", *BOTH, *objectives, "--run-dir", folder)[0] == 0
    trained, cloned = (Agent.load(folder / name / "policy.safetensors").config for name in ("", "bc"))
    assert (trained.value_objective, trained.policy_extraction) == ("sparse", "ddpg_bc")
    assert trained.objective_options == {"alpha": 2.0}
    assert cloned == IQLConfig(
        **trained.of()
        | {"temperature": 0.0, "value_objective": "expectile", "policy_extraction": "awr", "objective_options": {}}
    )


def test_json_has_the_table_and_every_seed(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("train", *BOTH, "--seeds", "2", "--seed", "3", "--run-dir", "many", "--json")
    assert status == 0
    document = json.loads(out)
    assert set(document["results"]) == {"data", "behaviour cloning", "IQL final", "IQL best"}
    assert document["results"]["data"]["mean_return"] == pytest.approx(-325.8, abs=0.1)
    low, high = document["results"]["IQL final"]["confidence_95"]
    assert low <= document["results"]["IQL final"]["mean_return"] <= high
    assert [(unit["seed"], unit["method"]) for unit in document["by_seed"]] == [
        *((3, "IQL"), (3, "behaviour cloning")),
        *((4, "IQL"), (4, "behaviour cloning")),
    ]
    for seed in (3, 4):
        assert (tmp_path / "many" / f"seed-{seed}" / "policy.safetensors").exists()
        assert (tmp_path / "many" / f"seed-{seed}" / "bc" / "policy.safetensors").exists()
    assert json.loads((tmp_path / "many" / "results.json").read_text())["results"] == document["results"]


def test_the_table_is_what_evaluate_measures(run: Run) -> None:
    document = json.loads(run("train", *SMALL, "--run-dir", "run", "--json")[1])
    assert set(document["results"]) == {"data", "IQL final", "IQL best"}
    measured = json.loads(run("evaluate", "run", *AGAIN, "--episodes", "2", "--json")[1])
    assert measured["env"] == ENV
    np.testing.assert_allclose(measured["returns"], document["by_seed"][0]["final_returns"], rtol=1e-6)


def test_the_best_policy_is_measured_by_other_episodes_than_it_was_chosen_by(run: Run) -> None:
    unit = json.loads(run("train", *SMALL, "--run-dir", "run", "--json")[1])["by_seed"][0]
    chosen = dict(unit["evaluations"])[unit["best_step"]]
    assert np.mean(chosen) == max(np.mean(returns) for _, returns in unit["evaluations"])
    path = "run/policy_best.safetensors"
    for seed, returns in ((0, unit["best_returns"]), (SELECTION_SEED, chosen)):
        measured = json.loads(run("evaluate", path, *AGAIN, "--episodes", "2", "--seed", str(seed), "--json")[1])
        np.testing.assert_allclose(measured["returns"], returns, rtol=1e-6)


def test_tensorboards_events_are_written_when_asked_for(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert run("train", *SMALL, "--tensorboard", "--run-dir", "run")[0] == 0
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_tensorboard_is_asked_for_before_anything_is_trained(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = run("train", *SMALL, "--tensorboard")
    assert status == 2
    assert "pip install 'iql-plugins[tensorboard]'" in err
    assert not list(tmp_path.iterdir())


# Data and environments of one's own


def test_without_an_environment_there_are_losses_and_no_evaluations(run: Run, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "mine.npz")
    status, out, err = run("train", *TINY, "--dataset", dataset, "--run-dir", "run")
    assert status == 0
    assert "there will be no evaluations" in err
    assert "behaviour cloning, seed 0: loss_actor" in out
    assert "IQL final" not in out
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "policy_best.safetensors").exists()
    assert run("evaluate", "run")[0] == 2


def test_held_out_episodes_are_left_aside_and_judge_the_policies(run: Run, tmp_path: Path) -> None:
    status, out, err = run("train", *SMALL, "--hold-out", "0.1", "--normalize-observations", "--run-dir", "run")
    assert status == 0
    evaluated = [line for line in err.splitlines() if " steps/s, " in line]
    assert ["held_out_value" in line for line in evaluated] == [True, True]
    assert "held-out episodes, IQL, seed 0: held_out_td_error" in out
    source = load_dataset("pendulum-v1-sac")
    aside = held_out(source, 0.1)
    assert int(aside.sum()) == 2000
    assert int((episode_ends(source)[None] == aside.nonzero()).sum()) == 10
    assert not torch.equal(aside, held_out(source, 0.1, seed=1))
    agent = Agent.load("run/policy.safetensors")
    trained_on = source[~aside]["observation"].double()
    torch.testing.assert_close(agent.normalizers.get_buffer("mean_0").double(), trained_on.mean(0), atol=1e-6, rtol=0.0)
    rows = metrics_rows(tmp_path / "run" / "metrics.csv")
    assert ["held_out_value" in row for row in rows] == [False, True, False, True]
    [unit] = json.loads((tmp_path / "run" / "results.json").read_text())["by_seed"]
    for name, criterion in {
        "held_out_td_error": ope.td_error(agent, source[aside]),
        "held_out_agreement": ope.action_agreement(ope.Policy.of(agent), source[aside], agent.spaces),
        "held_out_value": ope.initial_qvalue(agent, source[aside]),
    }.items():
        assert unit["held_out"][name]["value"] == pytest.approx(criterion.value, rel=1e-5)
        assert rows[-1][name] == pytest.approx(criterion.value, rel=1e-5)


@pytest.mark.parametrize("adapter", ["tensor", "sb3", "d3rlpy", "torchrl"])
def test_of_shards_the_same_episodes_are_held_out_and_the_others_stay_on_disk(
    adapter: str, run: Run, tmp_path: Path
) -> None:
    file, shards = (str(tmp_path / name) for name in ("data.parquet", "data"))
    for out in (file, shards):
        assert run("convert-dataset", "pendulum-v1-sac", out)[0] == 0
    given = [*TINY, "--actor-dropout", "0", "--adapter", adapter, "--n-steps", "12", "--episodes", "1"]
    given += ["--hold-out", "0.3", "--normalize-observations"]
    given += ["--baseline", "none", "--reward-scale", "return_range"]
    if adapter == "tensor":
        given += ["--seeds", "2", "--stack", "2"]
    options: dict[str, list[str]] = {"in memory": [file], "shards": [shards], "mapped": [file, "--memmap-dir", "m"]}
    for name, more in options.items():
        status, _, err = run("train", *given, "--run-dir", name, "--dataset", *more)
        assert status == 0, err
    found = {name: json.loads(Path(name, "results.json").read_text())["by_seed"] for name in options}
    assert found["in memory"][0]["held_out"]
    for name in ("shards", "mapped"):
        for ours, theirs in zip(found[name], found["in memory"], strict=True):
            assert ours["held_out"] == theirs["held_out"]
            assert ours["metrics"] == theirs["metrics"]


def test_a_run_with_held_out_episodes_goes_on_bit_for_bit(
    run: Run, stop_at: Callable[[int], None], tmp_path: Path
) -> None:
    given = [*SMALL, "--hold-out", "0.1"]
    assert run("train", *given, "--run-dir", "whole")[0] == 0
    stop_at(30)
    assert run("train", *given, "--run-dir", "stopped")[0] == 130
    assert run("train", "--resume", "stopped", *AGAIN)[0] == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize(("options", "settled"), [(["--polyak", "0.5", "--discount", "0.5"], 12), ([], 60_000)])
def test_without_an_environment_held_out_episodes_choose_the_best_policy_once_values_have_settled(
    options: list[str], settled: int, run: Run, tmp_path: Path
) -> None:
    # Its values fall from 0 on: that of the first step is the highest of all.
    dataset = write_dataset(tmp_path / "data.npz", rewards=-np.ones(40, np.float32))
    given = [*TINY, "--baseline", "none", "--dataset", dataset, "--hold-out", "0.2", "--evaluate-every", "4", *options]
    assert run("train", *given, "--n-steps", "20", "--critic-learning-rate", "0.01", "--run-dir", "run")[0] == 0
    rows = [row for row in metrics_rows(tmp_path / "run" / "metrics.csv") if "held_out_value" in row]
    assert len(rows) == 5
    assert rows[0] == max(rows, key=lambda row: row["held_out_value"])
    counted = [row for row in rows if row["step"] >= settled or row == rows[-1]]
    best = max(counted, key=lambda row: row["held_out_value"])
    assert Agent.load("run/policy_best.safetensors").learner.step_count == best["step"]


def test_a_prolonged_run_forgets_a_policy_that_was_best_before_values_had_settled(run: Run, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data.npz", rewards=-np.ones(40, np.float32))
    given = [*TINY, "--baseline", "none", "--dataset", dataset, "--hold-out", "0.2", "--evaluate-every", "4"]
    given += ["--polyak", "0.5", "--discount", "0.5", "--critic-learning-rate", "0.01"]
    assert run("train", *given, "--n-steps", "8", "--run-dir", "run")[0] == 0
    assert Agent.load("run/policy_best.safetensors").learner.step_count == 8
    assert run("train", "--resume", "run", "--n-steps", "20")[0] == 0
    rows = [row for row in metrics_rows(tmp_path / "run" / "metrics.csv") if "held_out_value" in row]
    settled = [row for row in rows if row["step"] >= 12]
    best = max(settled, key=lambda row: row["held_out_value"])
    # That of the earlier end was higher, and is none.
    assert rows[1]["held_out_value"] > best["held_out_value"]
    assert Agent.load("run/policy_best.safetensors").learner.step_count == best["step"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--hold-out", "1.0"], "--hold-out must be a share of the episodes, in [0, 1), got 1.0"),
        (["--hold-out", "0.1", "--dataset", "one.npz"], "at least two"),
    ],
)
def test_episodes_that_cannot_be_held_out_are_a_mistake(
    options: list[str], expected: str, run: Run, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "one.npz", terminals=np.zeros(40))
    status, _, err = run("train", *TINY, "--baseline", "none", *options, "--run-dir", "run")
    assert status == 2
    assert expected in err
    assert not (tmp_path / "run").exists()


def test_discrete_actions_train_to_the_end(run: Run, tmp_path: Path) -> None:
    actions = np.tile([0.0, 1.0], 20).astype(np.float32)
    observations = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    dataset = write_dataset(
        tmp_path / "discrete.npz", actions=actions, observations=observations, next_observations=observations
    )
    options = ["--dataset", dataset, "--env", "CartPole-v1", "--baseline", "none"]
    status, out, _ = run("train", *TINY, *options, "--run-dir", "run", "--json")
    assert status == 0
    assert json.loads(out)["results"]["IQL final"]["mean_return"] >= 8
    assert Agent.load(tmp_path / "run" / "policy.safetensors").spaces.discrete


def test_the_environment_says_what_the_bounds_are(run: Run, tmp_path: Path) -> None:
    observations = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    # Beyond the torque limits of 2, as in real logs.
    actions = np.linspace(-3.4, 3.4, 40, dtype=np.float32)[:, None]
    dataset = write_dataset(tmp_path / "d.npz", observations=observations, actions=actions)
    assert run("train", *SMALL, "--dataset", dataset, "--run-dir", "run")[0] == 0
    action = Agent.load(tmp_path / "run" / "policy.safetensors").spaces.action
    assert (action.low, action.high) == ((-2.0,), (2.0,))  # type: ignore[union-attr]


def test_a_dataset_that_does_not_fit_the_environment_is_a_mistake(run: Run, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.npz")
    status, _, err = run("train", *SMALL, "--dataset", dataset, "--run-dir", "run")
    assert status == 2
    assert "shape (2,), the space (1,)" in err
    assert not (tmp_path / "run").exists()


def test_a_memory_mapped_dataset_trains_the_same(run: Run, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.npz")
    assert run("train", *TINY, "--dataset", dataset, "--run-dir", "plain")[0] == 0
    assert run("train", *TINY, "--dataset", dataset, "--memmap-dir", "mapped", "--run-dir", "run")[0] == 0
    rows, others = (metrics_rows(tmp_path / name / "metrics.csv") for name in ("plain", "run"))
    assert [list(row) for row in rows] == [list(row) for row in others]
    for row, other in zip(rows, others, strict=True):
        np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_dataset_is_not_trained_on(run: Run, tmp_path: Path) -> None:
    first, second = (write_dataset(tmp_path / f"{name}.npz", rewards=np.full(40, name)) for name in (1, 2))
    options = [*TINY, "--baseline", "none", "--memmap-dir", "mapped"]
    assert run("train", *options, "--dataset", first, "--run-dir", "run")[0] == 0
    status, _, err = run("train", *options, "--dataset", second, "--run-dir", "other")
    assert status == 2
    assert "memmap_dir must be a new or an empty folder" in err
    assert not (tmp_path / "other").exists()
    # The run itself goes on with what it has written there, as long as that is what it was.
    first.unlink()
    assert run("train", "--resume", "run")[0] == 0
    reward = tmp_path / "mapped" / "next" / "reward.memmap"
    reward.write_bytes(np.full(40, 3, np.float32).tobytes())
    status, _, err = run("train", "--resume", "run")
    assert status == 2
    assert "mapped is not the dataset that the run was made with" in err


def test_a_name_that_ships_wins_over_a_folder_of_that_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pendulum-v1-sac").mkdir()
    assert run("train", *SMALL, "--run-dir", "run")[0] == 0
    assert Settings.read(tmp_path / "run")[0].dataset == "pendulum-v1-sac"


def test_a_framework_that_does_not_take_the_spaces_is_a_mistake(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(agent: Agent) -> None:
        raise ValueError("no framework takes this space")

    training = replace(adapter_training("tensor"), from_agent=refuse)
    monkeypatch.setattr(train, "adapter_training", lambda name: training)
    status, _, err = run("train", *SMALL, "--run-dir", "run")
    assert status == 2
    assert err.endswith("iql-plugins: no framework takes this space\n")
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_ends_with_an_error(run: Run, tmp_path: Path) -> None:
    status, out, err = run("train", *SMALL, "--critic-learning-rate", "1e38", "--run-dir", "run", "--json")
    assert status == 1
    assert re.search("not finite at step .*, set --max-grad-norm, try a lower --expectile", json.loads(out)["error"])
    assert "Traceback" not in err


def test_a_run_directory_is_never_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    status, _, err = run("train", *SMALL, "--run-dir", "mine")
    assert status == 2
    assert "mine exists" in err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.time, "strftime", lambda format: "now")
    assert [str(train.made_folder(None, "a dataset")) for _ in range(3)] == [
        f"runs/a-dataset-now{end}" for end in ("", "-2", "-3")
    ]


def test_a_folder_that_cannot_be_written_to_is_a_mistake(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = run("train", *SMALL, "--run-dir", "file/run")
    assert status == 2
    assert "Not a directory: 'file/run'" in err
    assert "Traceback" not in err


# Going on, and repeating


@pytest.mark.parametrize(("step", "processes"), [(3, 1), (33, 2)])
@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on_bit_for_bit(
    step: int, processes: int, whole: Path, run: Run, stop_at: Callable[[int], None], tmp_path: Path
) -> None:
    stop_at(step)
    status, _, err = run("train", *BOTH, "--run-dir", "stopped")
    assert status == 130
    again = f"iql-plugins train --resume stopped --env {ENV}"
    assert err.splitlines()[-1] == f"iql-plugins: interrupted: go on with {again}"
    torch.manual_seed(99)
    assert run("train", "--resume", "stopped", *AGAIN, "--workers", str(processes))[0] == 0
    assert_same_run(whole, tmp_path / "stopped", "bc")
    picture = (tmp_path / "stopped" / "learning_curve.png").read_bytes()
    assert (whole / "learning_curve.png").read_bytes() == picture


def test_rows_after_the_checkpoint_and_leftovers_of_a_killed_write_are_dropped(
    run: Run, stop_at: Callable[[int], None], tmp_path: Path
) -> None:
    assert run("train", *SMALL, "--run-dir", "whole")[0] == 0
    stop_at(33)
    run("train", *SMALL, "--run-dir", "killed")
    with (tmp_path / "killed" / "metrics.csv").open("a") as file:
        file.write("40,0.5,0.")
    (tmp_path / "killed" / ".checkpoint.safetensors.abc.tmp").write_bytes(b"half of it")
    assert run("train", "--resume", "killed", *AGAIN)[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_a_run_that_is_over_is_measured_again(run: Run, tmp_path: Path) -> None:
    first = json.loads(run("train", *SMALL, "--run-dir", "run", "--json")[1])
    before = {name: (tmp_path / "run" / name).read_bytes() for name in BITWISE}
    again = json.loads(run("train", "--resume", "run", *AGAIN, "--json")[1])
    assert again["results"] == first["results"]
    assert {name: (tmp_path / "run" / name).read_bytes() for name in BITWISE} == before


def test_a_configuration_repeats_its_run_bit_for_bit(run: Run, tmp_path: Path) -> None:
    assert run("train", *SMALL, "--expectile", "0.8", "--run-dir", "first")[0] == 0
    assert run("train", "--config", "first", *AGAIN, "--run-dir", "second")[0] == 0  # or first/config.json
    assert_same_run(tmp_path / "first", tmp_path / "second")
    assert Settings.read(tmp_path / "second" / "config.json")[0].hyperparameters.expectile == 0.8


def test_what_auto_came_to_is_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "resolve_compile", lambda choice, n_steps, device: "no")
    assert (
        run("train", *SMALL, "--hidden-sizes", "130", "--n-steps", "4", "--threads", "auto", "--run-dir", "first")[0]
        == 0
    )
    settings, _ = Settings.read(tmp_path / "first" / "config.json")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("iql_plugins.cli.settings.available_cores", lambda: 64)
    monkeypatch.setattr("iql_plugins.cli.train.available_cores", lambda: 64)
    assert run("train", "--config", "first/config.json", *AGAIN, "--run-dir", "second", "--workers", "1")[0] == 0
    assert Settings.read(tmp_path / "second" / "config.json")[0] == settings
    assert settings.hyperparameters.compile == "no"
    assert settings.threads == available_cores()


@pytest.mark.parametrize(
    ("wanted", "workers", "hidden", "threads"),
    [("auto", 1, 256, 64), ("auto", 2, 256, 1), ("auto", 1, 64, 1), (3, 2, 256, 3)],
)
def test_several_processes_have_one_thread_each(
    wanted: Any, workers: int, hidden: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "available_cores", lambda: 64)
    assert train._threads(wanted, workers, (hidden,)) == threads


def test_torchs_threads_and_random_state_are_left_alone(run: Run) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert run("train", *SMALL, "--threads", "2")[0] == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_changed_dataset_is_not_gone_on_with(run: Run, stop_at: Callable[[int], None], tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.npz")
    stop_at(25)
    run("train", *TINY, "--dataset", dataset, "--run-dir", "run")
    write_dataset(dataset, rewards=np.ones(40, np.float32))
    status, _, err = run("train", "--resume", "run")
    assert status == 2
    assert "is not the dataset that the run was made with" in err


def test_a_damaged_checkpoint_is_named(run: Run, stop_at: Callable[[int], None], tmp_path: Path) -> None:
    stop_at(25)
    run("train", *SMALL, "--run-dir", "run")
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    status, _, err = run("train", "--resume", "run", *AGAIN)
    assert status == 2
    assert "checkpoint.safetensors" in err
    assert "Traceback" not in err
    (tmp_path / "run" / "metrics.csv").write_text("step,loss_actor\n20,half\n")
    Agent.load(tmp_path / "run" / "policy_best.safetensors").save(path)
    status, _, err = run("train", "--resume", "run", *AGAIN)
    assert status == 2
    assert "metrics.csv is damaged in line 2" in err
    agent = Agent.load(path)
    agent.extra = {}
    agent.save(path)
    status, _, err = run("train", "--resume", "run", *AGAIN)
    assert status == 2
    assert "checkpoint.safetensors is not this run's" in err
    (tmp_path / "run" / "config.json").write_text('{"format": 1}')
    status, _, err = run("train", "--resume", "run", *AGAIN)
    assert status == 2
    assert "config.json is no configuration of a run" in err


def test_two_processes_do_not_train_in_one_directory(run: Run, tmp_path: Path) -> None:
    assert run("train", *SMALL, "--run-dir", "run")[0] == 0
    with workers.locked(tmp_path / "run"):
        status, _, err = run("train", "--resume", "run", *AGAIN)
    assert status == 2
    assert "another process is training in run" in err


# Processes


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "iql_plugins.cli", "train", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        # Who runs the tests in a shell's background ignores Ctrl-C, and so would all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.fixture
def long_run(tmp_path: Path) -> tuple[list[str], Path]:
    """Options of a run that takes long enough to be stopped on the way."""
    options = [*BOTH, "--n-steps", "300", "--evaluate-every", "30", "--workers", "2", "--run-dir"]
    return options, tmp_path / "run"


@needs_proc
@pytest.mark.slow
def test_kill_9_leaves_no_process_and_a_run_that_goes_on_bit_for_bit(
    run: Run, long_run: tuple[list[str], Path], tmp_path: Path
) -> None:
    options, folder = long_run
    process = start(*options, folder)
    wait_for(folder / "bc" / "checkpoint.safetensors", process)
    time.sleep(float(np.random.default_rng().uniform(0.0, 0.3)))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert_all_end(process.pid)
    assert run("train", "--resume", folder, *AGAIN, "--workers", "1")[0] == 0
    # One process or several, stopped or not: the same.
    assert run("train", *options, "whole", "--workers", "1")[0] == 0
    assert_same_run(tmp_path / "whole", folder, "bc")


@needs_proc
@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_status_130(long_run: tuple[list[str], Path]) -> None:
    options, folder = long_run
    # It never comes to its end, however late the signal is.
    process = start(*options, folder, "--json", "--n-steps", "1000000")
    wait_for(folder / "bc" / "checkpoint.safetensors", process)
    # As a terminal does: to all processes of the group.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["error"].startswith("interrupted: go on with iql-plugins train --resume")
    assert "Traceback" not in err
    assert_all_end(process.pid)


@pytest.mark.slow
def test_an_error_in_another_process_is_reported(run: Run, tmp_path: Path) -> None:
    options = [*BOTH, "--critic-learning-rate", "1e38", "--workers", "2", "--run-dir", "run"]
    status, _, err = run("train", *options)
    assert status == 1
    assert "not finite at step" in err


def test_a_process_that_dies_is_noticed(run: Run, tmp_path: Path) -> None:
    class Dead:
        exitcode = -signal.SIGKILL

    class Nothing:
        def get(self, timeout: float) -> Any:
            import queue

            raise queue.Empty

    with pytest.raises(workers.WorkerError, match="signal 9, out of memory"):
        workers._collect([Unit(0, "iql")], [Dead()], Nothing(), lambda progress: None)


# Seeds that take their steps together

SEEDS = [*TINY, "--env", ENV, "--seeds", "3"]
SUBFOLDERS = [f"seed-{seed}{method}" for seed in range(3) for method in ("", "/bc")]


@pytest.mark.slow
def test_seeds_that_are_stacked_end_where_each_would_have_alone(run: Run, tmp_path: Path) -> None:
    documents = {
        stack: json.loads(run("train", *SEEDS, "--stack", stack, "--run-dir", stack, "--json")[1]) for stack in "132"
    }
    for stack in "32":
        assert documents[stack]["stack"] == int(stack)
        for subfolder in SUBFOLDERS:
            agent, alone = (
                Agent.load(tmp_path / folder / subfolder / "checkpoint.safetensors") for folder in (stack, "1")
            )
            assert agent.learner.step_count == 40
            torch.testing.assert_close(agent.loss.state_dict(), alone.loss.state_dict(), atol=1e-5, rtol=1e-5)
            rows, alone_rows = (metrics_rows(tmp_path / folder / subfolder / "metrics.csv") for folder in (stack, "1"))
            assert [row.keys() for row in rows] == [row.keys() for row in alone_rows]
            for row, alone_row in zip(rows, alone_rows, strict=True):
                assert row == pytest.approx(alone_row, rel=1e-3, abs=1e-3)
        for unit, alone_unit in zip(documents[stack]["by_seed"], documents["1"]["by_seed"], strict=True):
            assert (unit["seed"], unit["method"]) == (alone_unit["seed"], alone_unit["method"])
            assert unit["final_returns"] == pytest.approx(alone_unit["final_returns"], rel=1e-3)


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.slow
def test_a_stacked_run_that_was_stopped_goes_on_bit_for_bit(
    processes: str, run: Run, stop_at: Callable[[int], None], tmp_path: Path
) -> None:
    assert run("train", *SEEDS, "--stack", "3", "--run-dir", "whole", "--workers", processes)[0] == 0
    stop_at(33)
    assert run("train", *SEEDS, "--stack", "3", "--run-dir", "stopped")[0] == 130
    assert run("train", "--resume", "stopped", *AGAIN)[0] == 0
    for subfolder in SUBFOLDERS:
        assert_same_run(tmp_path / "whole" / subfolder, tmp_path / "stopped" / subfolder)


@pytest.mark.slow
def test_a_stack_that_was_killed_between_its_checkpoints_goes_on(
    run: Run, stop_at: Callable[[int], None], tmp_path: Path, whole_stack: Path
) -> None:
    stop_at(33)
    run("train", *SEEDS, "--stack", "3", "--run-dir", "killed")
    # As if the last of three checkpoints had not been written any more, nor any before it.
    (tmp_path / "killed" / "seed-2" / "checkpoint.safetensors").unlink()
    assert run("train", "--resume", "killed", *AGAIN)[0] == 0
    for subfolder in SUBFOLDERS:
        agent, other = (
            Agent.load(folder / subfolder / "checkpoint.safetensors") for folder in (tmp_path / "killed", whole_stack)
        )
        assert agent.learner.step_count == 40
        torch.testing.assert_close(agent.loss.state_dict(), other.loss.state_dict(), atol=1e-5, rtol=1e-5)


@pytest.fixture
def whole_stack(run: Run, tmp_path: Path) -> Path:
    """A stacked run that nobody stopped."""
    assert run("train", *SEEDS, "--stack", "3", "--run-dir", "whole")[0] == 0
    return tmp_path / "whole"


def test_what_the_command_looks_at_between_steps_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So steps do not look whether it has."""
    looks, look = [], targets._Pairs.are_those_of
    monkeypatch.setattr(targets._Pairs, "are_those_of", lambda self, loss: looks.append(loss) or look(self, loss))
    assert run("train", *SMALL, "--seeds", "1", "--run-dir", "run")[0] == 0
    assert looks == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "sb3"], "adapter 'sb3' trains one seed at a time"),
    ],
)
def test_a_training_that_cannot_be_stacked_is_a_mistake_before_it_starts(
    options: list[str], message: str, run: Run, tmp_path: Path
) -> None:
    status, _, err = run("train", *SEEDS, "--stack", "2", *options, "--run-dir", "run")
    assert status == 2
    assert f"--stack 2: {message}; use --stack 1" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "device", "stack"),
    [
        (["--seeds", "5", "--hidden-sizes", "64"], "cpu", 5),
        (["--seeds", "5", "--hidden-sizes", "64", "--workers", "4"], "cpu", 3),
        (["--seeds", "5", "--hidden-sizes", "64", "--baseline", "none"], "cpu", 3),
        (["--seeds", "5", "--hidden-sizes", "64", "--workers", "20"], "cpu", 1),
        (["--seeds", "5", "--hidden-sizes", "64", "--compile", "yes"], "cpu", 5),
        (["--seeds", "5", "--hidden-sizes", "128", "--compile", "yes"], "cpu", 1),
        (["--seeds", "5", "--hidden-sizes", "128", "--compile", "no"], "cpu", 5),
        (["--seeds", "5", "--hidden-sizes", "64", "256"], "cpu", 1),
        (["--seeds", "5", "--hidden-sizes", "64", "--critic-hidden-sizes", "256"], "cpu", 1),
        (["--seeds", "5", "--hidden-sizes", "64", "--value-dropout", "0.1"], "cuda", 5),
        (["--seeds", "5", "--hidden-sizes", "256"], "cuda", 5),
        (["--seeds", "5", "--hidden-sizes", "64", "--actor-dropout", "0.1"], "cpu", 5),
        (["--seeds", "5", "--hidden-sizes", "64", "--adapter", "d3rlpy"], "cuda", 1),
        (["--seeds", "5", "--hidden-sizes", "256", "--stack", "2"], "cpu", 2),
        (["--seeds", "5", "--hidden-sizes", "64", "--stack", "9"], "cpu", 5),
    ],
)
def test_seeds_are_stacked_where_that_is_faster(
    options: list[str], device: str, stack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iql_plugins.cli.arguments import Train, parse

    monkeypatch.setattr(train, "available_cores", lambda: 2)
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: True)
    arguments = parse(["train", *options])
    assert isinstance(arguments, Train)
    methods = 1 if arguments.baseline == "none" else 2
    assert train.stack_size(arguments, methods, Spaces(Box((3,)), Box((1,))), device) == stack
    if arguments.stack == "auto":
        images = Spaces(Box((3, 64, 64), "uint8"), Box((1,)))
        assert train.stack_size(arguments, methods, images, device) == 1


@pytest.mark.parametrize(("stack", "threads"), [("4", 64), ("2", 1)])
def test_a_single_stack_has_all_cores(
    stack: str, threads: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "available_cores", lambda: 64)
    monkeypatch.setattr(train, "_train", lambda *arguments: Result({}, []))
    options = ["--seeds", "4", "--baseline", "none", "--stack", stack, "--workers", "auto", "--hidden-sizes", "130"]
    assert run("train", *SEEDS, *options, "--run-dir", "run")[0] == 0
    assert Settings.read(tmp_path / "run")[0].threads == threads


def test_each_process_trains_a_stack_of_one_method(run: Run, tmp_path: Path) -> None:
    run("train", *SEEDS, "--stack", "2", "--run-dir", "run")
    settings, _ = Settings.read(tmp_path / "run")
    assert settings.groups == [
        [Unit(0, "iql"), Unit(1, "iql")],
        [Unit(0, "bc"), Unit(1, "bc")],
        [Unit(2, "iql")],
        [Unit(2, "bc")],
    ]
    assert settings.stack == 2


@pytest.mark.slow
@needs_compiler
def test_the_time_for_compiling_is_reported(run: Run) -> None:
    status, out, err = run("train", *SEEDS, "--seeds", "2", "--stack", "2", "--baseline", "none", "--compile", "yes")
    assert status == 0
    assert re.search(r"^compiled in \d+\.\d s in all$", out, re.MULTILINE)
    assert [line for line in err.splitlines() if "compiles" in line] == [
        "IQL, seed 0: compiles: seconds the first time, fewer from the disk later"
    ]
    document = json.loads((Path("runs") / os.listdir("runs")[0] / "results.json").read_text())
    for unit in document["by_seed"]:
        assert 0.0 < unit["warm_up_seconds"] < unit["seconds"]
    _, out, _ = run("train", *SEEDS, "--seeds", "2", "--stack", "2", "--baseline", "none")
    assert "compiled" not in out


# Learning


@pytest.mark.slow
def test_iql_is_above_behaviour_cloning_and_the_data(run: Run) -> None:
    status, out, _ = run("train", "--json")
    assert status == 0
    results = {name: entry["mean_return"] for name, entry in json.loads(out)["results"].items()}
    assert results["IQL final"] > results["behaviour cloning"]
    assert results["IQL final"] > results["data"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reagent_pendulum_mixed", ["--env", "Pendulum-v1", "--n-steps", "3000"]),
        ("reagent_cartpole_mixed", ["--env", "CartPole-v0", "--n-steps", "2000"]),
    ],
)
def test_iql_is_above_the_data_of_others(name: str, options: list[str], run: Run) -> None:
    path = data_of_others(name)
    assert gymnasium.spec(options[1]) is not None
    status, out, _ = run("train", "--dataset", path, "--preset", "pendulum", *options, "--json")
    assert status == 0
    results = {name: entry["mean_return"] for name, entry in json.loads(out)["results"].items()}
    assert results["IQL final"] > results["data"]
    if "Pendulum" in options[1]:
        assert results["IQL final"] > results["behaviour cloning"]


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("shipped", "above_both_at_every_seed"),
        ("reagent-pendulum", "intervals_do_not_overlap"),
        ("reagent-cartpole", "above_data"),
    ],
)
def test_the_results_that_are_kept_hold_what_is_claimed(name: str, claim: str) -> None:
    path = Path(__file__).parents[1] / "learning" / "results" / f"{name}.json"
    document = json.loads(path.read_text())
    assert document["summary"][claim] is True
    assert document["summary"]["above_data"] is True
    assert document["seeds"] == [0, 1, 2, 3, 4]
    assert document["command"].startswith("iql-plugins train ")


def test_a_checkpoint_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    # safetensors itself writes metadata in an order that differs from process to process.
    checkpoint.write(tmp_path / "file", {"b": 1, "a": "é"}, {"x": torch.arange(3), "y": torch.ones(2)})
    content = (tmp_path / "file").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert list(header) == ["__metadata__", "x", "y"]
    document, tensors = checkpoint.read(tmp_path / "file")
    assert document == {"a": "é", "b": 1}
    assert tensors["x"].tolist() == [0, 1, 2]


# What a resumed run may change, and what not

#: Two seeds that take their steps together, and behaviour cloning; an environment that this process has registered.
PAIR = [*TINY[:-2], "--env", "ShortPendulum-v0", "--seeds", "2", "--stack", "2"]
RESUME = ["train", "--workers", "1", "--resume"]
PAIRS = [f"seed-{seed}{method}" for seed in (0, 1) for method in ("", "/bc")]
SETTINGS = {field.name for field in fields(Settings)} - {"hyperparameters"} | {
    field.name for field in fields(IQLConfig)
}
#: Values that no rule for their type makes.
OTHERS = {
    "activation": "gelu",
    "actor_hidden_sizes": [9],
    "actor_schedule": "constant",
    "adapter": "sb3",
    "baseline": "none",
    "compile": "yes",
    "critic_hidden_sizes": [9],
    "earlier_ends": [10],
    "initialization": "torch",
    "loss_function": "l1",
    "max_grad_norm": 0.5,
    "policy_extraction": "ddpg_bc",
    "reward_scale": 0.5,
    "seeds": [0],
    "spaces": Spaces(Box((3,)), Discrete(2)).to_json(),
    "value_layer_norm": True,
    "value_objective": "sparse",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of :data:`PAIR` that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *PAIR, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def prolonged(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which went on after its end."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "prolonged"))
    assert main([*RESUME, str(folder), "--n-steps", "60"]) == 0
    return folder


@pytest.fixture
def pair(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "pair"))


@pytest.fixture
def halfway(run: Run, stop_at: Callable[[int], None], tmp_path: Path) -> Path:
    """The same run, stopped: IQL is at step 20, and behaviour cloning has not begun."""
    stop_at(33)
    assert run("train", *PAIR, "--run-dir", "halfway")[0] == 130
    return tmp_path / "halfway"


def edit(folder: Path, **values: Any) -> dict[str, Any]:
    """Changes settings or hyper-parameters in ``config.json``; those that were there before."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    before = {}
    for name, value in values.items():
        settings = document["settings"]
        place = settings if name in settings else settings["hyperparameters"]
        before[name], place[name] = place[name], value
    path.write_text(json.dumps(document))
    return before


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what a checkpoint holds of the run."""
    document, tensors = checkpoint.read(path)
    change(document["extra"]["run"])
    checkpoint.write(path, document, tensors)


def changes(folder: Path) -> list[Any]:
    """Of each training."""
    return [unit["changes"] for unit in json.loads((folder / "results.json").read_text())["by_seed"]]


# IQL's own two objectives have no options: core/test_objectives.py has some.
@pytest.mark.parametrize("name", sorted(SETTINGS - set(CHANGEABLE) - {"objective_options"}))
def test_what_was_edited_in_config_json_is_refused_with_both_values(name: str, pair: Path, run: Run) -> None:
    settings = json.loads((pair / "config.json").read_text())["settings"]
    old = (settings | settings["hyperparameters"])[name]
    by_type = {bool: lambda: not old, int: lambda: old + 1, float: lambda: old / 2 + 0.1, str: lambda: f"{old}x"}
    new = OTHERS[name] if name in OTHERS else [9] if isinstance(old, list) else by_type[type(old)]()
    edit(pair, **{name: new})
    before = {path: path.read_bytes() for path in pair.rglob("*") if path.is_file()}
    status, _, err = run(*RESUME, pair)
    assert status == 2
    assert f"{name} is {old!r} in {pair}/" in err
    assert f"checkpoint.safetensors, {new!r} in config.json" in err
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in pair.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("subfolder", PAIRS)
def test_every_checkpoint_of_a_run_is_compared(subfolder: str, pair: Path, run: Run) -> None:
    path = pair / subfolder / "checkpoint.safetensors"
    rewrite(path, lambda state: state["settings"]["hyperparameters"].update(expectile=0.99))
    status, _, err = run(*RESUME, pair)
    assert status == 2
    assert f"expectile is 0.99 in {path}, 0.7 in config.json" in err


def test_a_run_goes_on_whose_checkpoints_do_not_tell_its_settings(finished: Path, halfway: Path, run: Run) -> None:
    for checkpoint_file in halfway.rglob("checkpoint.safetensors"):
        rewrite(checkpoint_file, lambda state: [state.pop("settings"), state.pop("changes")])
    path = halfway / "config.json"
    document = json.loads(path.read_text())
    del document["settings"]["earlier_ends"]
    path.write_text(json.dumps(document))
    for name, value in (("expectile", 0.99), ("env", "Pendulum-v1"), ("n_steps", 10)):
        before = edit(halfway, **{name: value})
        status, _, err = run(*RESUME, halfway)
        assert status == 2
        assert f"{name} is {before[name]!r} in {halfway}/seed-0/checkpoint.safetensors, {value!r} in config" in err
        edit(halfway, **before)
    # What such checkpoints do not tell of seeds and methods, their folders do.
    before = edit(halfway, seeds=[1, 2])
    status, _, err = run(*RESUME, halfway)
    assert status == 2
    assert f"{halfway}/seed-0/checkpoint.safetensors: none of the trainings of {path}" in err
    edit(halfway, **before)
    assert run(*RESUME, halfway)[0] == 0
    for subfolder in PAIRS:
        assert_same_run(finished / subfolder, halfway / subfolder)


@pytest.mark.slow
def test_evaluations_logging_and_threads_may_change_and_that_is_recorded(
    finished: Path, halfway: Path, run: Run
) -> None:
    options = ["--evaluate-every", "10", "--log-every", "5", "--episodes", "3", "--evaluation-episodes", "4"]
    status, _, err = run(*RESUME, halfway, *options, "--threads", "2")
    assert status == 0
    assert "evaluate_every was 20, and is 10 from here on" in err
    changed = {"evaluate_every": [20, 10], "log_every": [10, 5], "episodes": [2, 3], "evaluation_episodes": [2, 4]}
    recorded = [[{"step": 20, **changed, "threads": [1, 2]}], []] * 2
    assert changes(halfway) == recorded
    settings, _ = Settings.read(halfway)
    assert (settings.evaluate_every, settings.episodes, settings.threads) == (10, 3, 2)
    results = json.loads((halfway / "results.json").read_text())
    assert results["workers"] == 1
    for subfolder, unit in zip(PAIRS, results["by_seed"], strict=True):
        evaluations = [(step, len(returns)) for step, returns in unit["evaluations"]]
        rows = [row["step"] for row in metrics_rows(halfway / subfolder / "metrics.csv")]
        if unit["method"] == "IQL":
            assert evaluations == [(20, 2), (30, 4), (40, 4)]
            assert rows == [10, 20, 25, 30, 35, 40]
        assert len(unit["final_returns"]) == 3
        agent, other = (Agent.load(folder / subfolder / "policy.safetensors") for folder in (halfway, finished))
        torch.testing.assert_close(agent.loss.state_dict(), other.loss.state_dict())
    # It is kept, and holds from then on.
    assert run(*RESUME, halfway)[0] == 0
    assert changes(halfway) == recorded


def test_evaluations_that_changed_at_another_step_for_each_seed_are_drawn_where_all_have_them(
    pair: Path, run: Run
) -> None:
    for method in ("", "bc"):
        (pair / "seed-1" / method / "checkpoint.safetensors").unlink()
    edit(pair, evaluate_every=10, evaluation_episodes=3)
    status, _, err = run(*RESUME, pair)
    assert status == 0
    assert "evaluation_episodes was 2, and is 3 from here on" in err
    assert changes(pair) == [[{"step": 40, "evaluate_every": [20, 10], "evaluation_episodes": [2, 3]}]] * 2 + [[]] * 2


@pytest.mark.parametrize("way", ["stopped", "finished", "edited", "repeated"])
@pytest.mark.slow
def test_a_run_is_prolonged_the_same_whenever_and_however_that_is_asked_for(
    way: str, finished: Path, prolonged: Path, run: Run, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("halfway" if way == "stopped" else "pair")
    options = [*RESUME, folder]
    if way == "edited":
        edit(folder, n_steps=60)
    elif way == "repeated":
        folder = folder.with_name("repeated")
        options = ["train", "--workers", "1", "--config", prolonged, "--run-dir", folder]
    else:
        options += ["--n-steps", "60"]
    assert run(*options)[0] == 0
    settings, _ = Settings.read(folder)
    assert settings.ends == (40, 60)
    assert changes(folder) == [[{"step": 40, "n_steps": [40, 60]}]] * 4
    for subfolder in PAIRS:
        assert_same_run(prolonged / subfolder, folder / subfolder)
        agent, before = (Agent.load(where / subfolder / "policy.safetensors") for where in (folder, finished))
        # The policy learns on: its rate is that of a run of 60 steps.
        assert (agent.learner.step_count, agent.learner.actor_schedule_steps) == (60, 60)
        assert not torch.equal(
            next(agent.loss.actor_network.parameters()), next(before.loss.actor_network.parameters())
        )


def test_a_run_does_not_end_before_what_was_trained(pair: Path, run: Run) -> None:
    status, _, err = run(*RESUME, pair, "--n-steps", "30")
    assert status == 2
    assert "--n-steps 30: the run has 40, which can be raised, and not lowered" in err
    edit(pair, n_steps=30)
    status, _, err = run(*RESUME, pair)
    assert status == 2
    assert f"n_steps is 40 in {pair}/seed-0/bc/checkpoint.safetensors, 30 in config.json" in err


def test_a_run_whose_data_were_moved_goes_on(run: Run, stop_at: Callable[[int], None], tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.npz")
    options = [*TINY, "--baseline", "none", "--dataset", dataset]
    assert run("train", *options, "--run-dir", "whole")[0] == 0
    stop_at(33)
    run("train", *options, "--run-dir", "run")
    dataset.rename(tmp_path / "moved.npz")
    assert run(*RESUME, "run")[0] == 2
    assert run(*RESUME, "run", "--dataset", "moved.npz")[0] == 0
    agent, whole = (Agent.load(tmp_path / name / "policy.safetensors") for name in ("run", "whole"))
    torch.testing.assert_close(agent.loss.state_dict(), whole.loss.state_dict(), atol=0.0, rtol=0.0)
    write_dataset(dataset, rewards=np.ones(40, np.float32))
    status, _, err = run(*RESUME, "run", "--dataset", dataset)
    assert status == 2
    assert "d.npz is not the dataset that the run was made with" in err
    assert Settings.read(tmp_path / "run")[0].dataset == str(tmp_path / "moved.npz")


def test_help_says_what_a_resumed_run_may_change(run: Run) -> None:
    from iql_plugins.cli.arguments import option

    text = " ".join(run("train", "--help")[1].replace("│", " ").split())
    text = text[text.index("--resume STR") : text.index("--config STR")]
    for name in (*CHANGEABLE, "workers"):
        assert option(name) in text


@pytest.mark.parametrize("options", [["--stack", "1"], ["--expectile", "0.9"], ["--seeds", "3"]])
def test_an_option_that_a_resumed_run_may_not_change_is_refused(options: list[str], pair: Path, run: Run) -> None:
    status, _, err = run(*RESUME, pair, *options)
    assert status == 2
    assert f"{options[0]}: --resume takes everything from the run's config.json; beside it there can be" in err
    status, _, err = run(*RESUME, pair, "--evaluate-every", "0")
    assert status == 2
    assert "--evaluate-every must be at least 1, got 0" in err


def test_a_setting_that_is_no_count_is_refused(pair: Path, run: Run) -> None:
    for value in (0, "many", True, 2.0):
        edit(pair, evaluate_every=value)
        status, _, err = run(*RESUME, pair)
        assert status == 2
        assert f"evaluate_every must be an integer >= 1, got {value!r}" in err
    edit(pair, evaluate_every=2, threads=10**9)
    status, _, err = run(*RESUME, pair)
    assert status == 2
    assert "threads must be at most 1024, got 1000000000" in err


# What a kill leaves


def interrupted_when(monkeypatch: pytest.MonkeyPatch, name: str, written: int) -> None:
    """Ends what writes a file of that name for so many times already, as Ctrl-C does, and as a kill would."""
    count = 0
    really = os.replace

    def replace_or_not(source: Path, target: Path) -> None:
        nonlocal count
        if Path(target).name == name:
            count += 1
            if count > written:
                raise KeyboardInterrupt
        really(source, target)

    monkeypatch.setattr(os, "replace", replace_or_not)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        # The first seed's checkpoint is written in place, the second one's is moved there.
        *(("checkpoint_pending.safetensors", 1), ("checkpoint.safetensors", 2), ("checkpoint.safetensors", 3)),
        *(("policy_best.safetensors", 1), ("policy.safetensors", 1)),
    ],
)
def test_a_stack_that_ends_while_it_is_saved_goes_on_bit_for_bit(
    name: str, written: int, finished: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupted_when(patch, name, written)
        assert run("train", *PAIR, "--run-dir", "ended")[0] == 130
    assert run(*RESUME, "ended")[0] == 0
    for subfolder in PAIRS:
        assert_same_run(finished / subfolder, tmp_path / "ended" / subfolder)
    assert not list((tmp_path / "ended").rglob("checkpoint_pending*"))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        *(("checkpoint.safetensors", 0), ("checkpoint.safetensors", 1), ("policy_best.safetensors", 0)),
        *(("policy.safetensors", 0), ("learning_curve.png", 0), ("results.json", 0)),
    ],
)
def test_a_run_that_ends_while_it_writes_has_in_the_end_all_that_it_promises(
    name: str, written: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TINY, "--env", "ShortPendulum-v0", "--baseline", "none", "--run-dir"]
    assert run("train", *options, "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupted_when(patch, name, written)
        assert run("train", *options, "ended")[0] == 130
    assert run(*RESUME, "ended")[0] == 0
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert_same_run(whole, ended)
    assert (ended / "learning_curve.png").read_bytes() == (whole / "learning_curve.png").read_bytes()
    results, others = (json.loads((folder / "results.json").read_text())["results"] for folder in (whole, ended))
    assert results == others


def test_seeds_of_a_stack_are_saved_at_the_same_steps_whatever_the_clock_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[str, int]] = []
    save = training._Trainer.save

    def noted(self: Any, name: str) -> None:
        saved.append((self.folder.name, self.agent.learner.step_count))
        save(self, name)

    monkeypatch.setattr(training._Trainer, "save", noted)
    ticks = iter(range(10**6))
    # Each look at the clock is 7 seconds after the last one.
    monkeypatch.setattr(training.time, "monotonic", lambda: 7.0 * next(ticks))
    assert run("train", *PAIR, "--baseline", "none", "--run-dir", "run")[0] == 0
    by_seed = [[step for name, step in saved if name == f"seed-{seed}"] for seed in (0, 1)]
    assert by_seed[0] == by_seed[1]
    assert {10, 20, 30, 40} == set(by_seed[0])


def test_a_policy_that_is_missing_or_old_is_the_last_one_after_a_resume(finished: Path, pair: Path, run: Run) -> None:
    (pair / "seed-0" / "policy.safetensors").unlink()
    agent = Agent.load(pair / "seed-1" / "policy.safetensors")
    agent.learner.step_count = 20
    agent.save(pair / "seed-1" / "policy.safetensors")
    assert run(*RESUME, pair)[0] == 0
    for subfolder in PAIRS:
        assert_same_run(finished / subfolder, pair / subfolder)


def test_a_best_policy_of_another_step_is_not_measured(pair: Path, run: Run) -> None:
    path = pair / "seed-0" / "checkpoint.safetensors"
    shutil.copy(path, pair / "seed-0" / "policy_best.safetensors")
    rewrite(path, lambda state: state.update(best_step=20))
    status, _, err = run(*RESUME, pair)
    assert status == 2
    assert "policy_best.safetensors is of step 40, the best policy was that of step 20, which is lost" in err


def test_a_run_that_was_killed_before_it_had_a_configuration_is_begun_again(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json.0a1b2c3d.tmp").write_text('{"form')
    assert run(*RESUME, "run")[0] == 2
    assert run("train", *SMALL, "--run-dir", "run")[0] == 0
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_leftovers_of_killed_writes_are_removed_and_nothing_else(pair: Path, run: Run) -> None:
    mine = pair / "mine" / ".notes.tmp"
    mine.parent.mkdir()
    for path in (mine, pair / ".results.json.0a1b2c3d.tmp", pair / "seed-1" / "bc" / ".metrics.csv.0a1b2c3d.tmp"):
        path.touch()
    assert run(*RESUME, pair)[0] == 0
    assert list(pair.rglob("*.tmp")) == [mine]


@needs_proc
def test_a_run_whose_processes_outlive_it_is_not_gone_on_with_meanwhile(long_run: tuple[list[str], Path]) -> None:
    options, folder = long_run
    process = start(*options, folder)
    wait_for(folder / "bc" / "checkpoint.safetensors", process)
    others = [other for other in alive(process.pid) if other != process.pid]
    try:
        for other in others:
            os.kill(other, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(UserError, match="another process is training in"), workers.locked(folder):
            pass
    finally:
        for other in others:
            os.kill(other, signal.SIGCONT)
    process.communicate()
    assert_all_end(process.pid)
    with workers.locked(folder):
        pass
