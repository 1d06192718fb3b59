"""`iql-plugins select`: which policy, without its environment, and where nobody can tell."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from iql_plugins import ope
from iql_plugins.cli import main, select
from iql_plugins.cli.arguments import Select, parse
from iql_plugins.config import IQLConfig
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent

SPACES = Spaces(Box((2,)), Box((1,), low=(-1.0,), high=(1.0,)))
Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in a folder of its own; status, and document or, of mistakes, what was said."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, Any]:
        capfd.readouterr()
        status = main([*map(str, arguments), "--json"])
        [line] = capfd.readouterr().out.splitlines()
        document = json.loads(line)
        return status, document["error"] if status else document

    return call


def write_agent(path: Path, action: float, discount: float = 0.5, critics: tuple[int, ...] = (32,)) -> Path:
    """An agent that always takes the same action, whatever its critics say."""
    config = IQLConfig(n_steps=1, hidden_sizes=(32,), critic_hidden_sizes=critics, compile="no", discount=discount)
    agent = Agent(SPACES, config, seed=0)
    body = agent.loss.actor_network.module[0].module.body.layers
    with torch.no_grad():
        body[-1].weight.zero_()
        body[-1].bias.fill_(float(np.arctanh(action)))
    agent.save(path)
    return path


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """Two steps each, whose rewards are the actions."""
    random = np.random.default_rng(0)
    actions = random.uniform(-1.0, 1.0, size=(400, 1)).astype(np.float32)
    ends = np.arange(400) % 2 == 1
    observations = np.stack([ends, ~ends], 1).astype(np.float32)
    np.savez(
        tmp_path / "data.npz", observations=observations, next_observations=observations[:, ::-1], actions=actions,
        rewards=actions[:, 0], terminals=ends,
    )  # fmt: skip
    return tmp_path / "data.npz"


@pytest.mark.slow
def test_policies_are_ranked_and_what_noise_hides_is_said(episodes: Path, tmp_path: Path) -> None:
    files = {name: write_agent(tmp_path / f"{name}.safetensors", action) for name, action in
             {"worst": -0.8, "good": 0.8, "alike": 0.8}.items()}  # fmt: skip
    given = ["select", *map(str, files.values()), "--dataset", str(episodes), "--plot", str(tmp_path / "page.png")]
    arguments = parse([*given, "--fqe-steps", "500", "--fqe-seeds", "2"])
    assert isinstance(arguments, Select)
    result = select.run(arguments)
    document = result.document
    assert document["episodes"] == 200
    ranking = [each["policy"] for each in document["candidates"]]
    assert ranking[-1] == str(files["worst"])
    assert document["best"] == ranking[0]
    told = {
        (Path(pair["better"]).stem, Path(pair["worse"]).stem): pair["beyond_noise"] for pair in document["differences"]
    }
    first, second = (Path(name).stem for name in ranking[:2])
    assert told == {(first, second): False, (first, "worst"): True, (second, "worst"): True}
    assert document["cannot_tell_apart"] == [ranking[:2]]
    exact = {"good": 0.8 * 1.5, "alike": 0.8 * 1.5, "worst": -0.8 * 1.5}
    for each in document["candidates"]:
        assert each["fqe"]["value"] == pytest.approx(exact[Path(each["policy"]).stem], abs=0.3)
        assert each["fqe"]["confidence_95"][0] <= each["fqe"]["value"] <= each["fqe"]["confidence_95"][1]
        assert each["wis"]["effective_episodes"] >= 1.0
        assert set(each) >= {"doubly-robust", "value", "qvalue", "td-error", "agreement"}
    assert imageio.imread(tmp_path / "page.png").ndim == 3
    out = "\n".join(map(str, result.parts))
    assert f"beyond the noise: {first}.safetensors is better than worst.safetensors" in out
    assert f"cannot tell these apart: {first}.safetensors and {second}.safetensors" in out


def test_a_criterion_of_which_less_is_better_ranks_the_least_first(run: Run, episodes: Path, tmp_path: Path) -> None:
    files = [write_agent(tmp_path / f"{index}.safetensors", 0.1 * index) for index in range(2)]
    quick = ["select", *files, "--dataset", episodes, "--fqe-steps", "0"]
    _, document = run(*quick, "--by", "td-error")
    errors = [each["td-error"]["value"] for each in document["candidates"]]
    assert errors == sorted(errors)
    _, document = run(*quick, "--by", "agreement")
    agreements = [each["agreement"]["value"] for each in document["candidates"]]
    assert agreements == sorted(agreements, reverse=True)
    assert "fqe" not in document["candidates"][0]


@pytest.mark.slow
def test_runs_are_judged_on_the_episodes_that_they_held_out(run: Run, tmp_path: Path) -> None:
    options = ["--n-steps", "4", "--hidden-sizes", "8", "--batch-size", "8", "--baseline", "none", "--episodes", "1",
               "--evaluation-episodes", "1", "--evaluate-every", "4"]  # fmt: skip
    for name, more in {"one": ["--seeds", "2"], "two": ["--seed", "5"]}.items():
        assert main(["train", *options, *more, "--hold-out", "0.1", "--run-dir", name]) == 0
    status, document = run("select", "one", "two", "--fqe-steps", "2", "--fqe-seeds", "1")
    assert status == 0
    assert {each["policy"] for each in document["candidates"]} == {"one/seed-0", "one/seed-1", "two"}
    assert (document["episodes"], document["transitions"]) == (10, 2000)
    assert (tmp_path / "selection.png").exists()
    results = json.loads(Path("two/results.json").read_text())["by_seed"][0]["held_out"]
    [two] = [each for each in document["candidates"] if each["policy"] == "two"]
    assert two["qvalue"]["value"] == pytest.approx(results["held_out_value"]["value"], rel=1e-5)
    # Of other episodes, or of none, it must be told.
    assert main(["train", *options, "--hold-out", "0.2", "--run-dir", "three"]) == 0
    assert "held out other shares" in run("select", "one", "three")[1]
    assert main(["train", *options, "--run-dir", "four"]) == 0
    assert "give --dataset" in run("select", "one", "four")[1]
    # A policy in a run is of that run; and of any other, a run's episodes can be asked for.
    quick = ["--fqe-steps", "0", "--by", "value"]
    for given in (["two/policy.safetensors", "two/policy_best.safetensors", "one"], ["four", "--dataset", "two"]):
        status, document = run("select", *given, *quick)
        assert (status, document["episodes"]) == (0, 10)
    # A configuration of something else makes no run of a folder, nor of those inside.
    Path("config.json").write_text("{}")
    for folder in ("others", "parquet"):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text("{}")
    shutil.copy("four/policy.safetensors", "others")
    assert "give --dataset" in run("select", "others/policy.safetensors")[1]
    assert main(["convert-dataset", "pendulum-v1-sac", "parquet/data.parquet"]) == 0
    assert run("select", "two", "--dataset", "parquet", *quick)[0] == 0
    # Of a run of several seeds, others than select take one.
    assert "give one/seed-0 or one/seed-1" in run("label", "one", "pendulum-v1-sac")[1]


def test_nothing_is_beyond_the_noise_of_a_single_fit(run: Run, episodes: Path, tmp_path: Path) -> None:
    files = [write_agent(tmp_path / f"{action}.safetensors", action) for action in (-0.8, 0.8)]
    given = ["select", *files, "--dataset", episodes, "--fqe-steps", "500"]
    status, document = run(*given, "--fqe-seeds", "1")
    assert status == 0
    [pair] = document["differences"]
    assert not pair["beyond_noise"]
    assert pair["confidence_95"][0] > 0.0
    arguments = parse([*map(str, given), "--fqe-seeds", "1", "--fqe-steps", "1"])
    assert isinstance(arguments, Select)
    assert "--fqe-seeds 3, or more" in "\n".join(map(str, select.run(arguments).parts))


def test_discounts_that_differ_are_told_apart(
    run: Run, episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_agent(tmp_path / f"{discount}.safetensors", 0.5, discount) for discount in (0.5, 0.9)]
    given = ["select", *files, "--dataset", episodes, "--fqe-steps", "2", "--fqe-seeds", "1"]
    assert "the policies' discounts are 0.5, 0.9" in run(*given)[1]
    status, document = run(*given, "--discount", "0.5")
    assert status == 0
    assert ["value" in each for each in sorted(document["candidates"], key=lambda each: each["policy"])] == [
        True,
        False,
    ]
    # Before what takes hours.
    monkeypatch.setattr(select, "judged", None)
    assert "whose discount is not 0.5" in run(*given, "--discount", "0.5", "--by", "value")[1]


def test_evaluations_are_as_wide_as_the_widest_critics(
    run: Run, episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[tuple[int, ...]] = []
    make = ope.evaluation_config
    monkeypatch.setattr(
        ope,
        "evaluation_config",
        lambda *given, hidden_sizes, **rest: widths.append(hidden_sizes) or make(*given, **rest),
    )
    files = [write_agent(tmp_path / "a.safetensors", 0.5), write_agent(tmp_path / "b.safetensors", 0.5, critics=(64,))]
    assert run("select", *files, "--dataset", episodes, "--fqe-steps", "1", "--fqe-seeds", "1")[0] == 0
    assert widths == [(64,), (64,)]


def test_a_folder_for_the_hub_is_a_policy(run: Run, episodes: Path, tmp_path: Path) -> None:
    write_agent(tmp_path / "agent.safetensors", 0.5)
    assert main(["export", "agent.safetensors", "--format", "hub", "-o", "hub"]) == 0
    status, document = run(
        "select", "hub", "agent.safetensors", "--dataset", episodes, "--fqe-steps", "0", "--by", "value"
    )
    assert status == 0
    assert {each["policy"] for each in document["candidates"]} == {"hub", "agent.safetensors"}


def test_runs_on_shards_are_judged_on_the_same_episodes_as_in_memory(run: Run, episodes: Path) -> None:
    assert main(["convert-dataset", str(episodes), "shards"]) == 0
    rankings = []
    for dataset in (str(episodes), "shards"):
        given = ["train", "--dataset", dataset, "--hold-out", "0.2", "--n-steps", "3", "--hidden-sizes", "8"]
        assert main([*given, "--baseline", "none", "--run-dir", f"run of {Path(dataset).name}"]) == 0
        status, document = run("select", f"run of {Path(dataset).name}", "--fqe-steps", "0", "--by", "qvalue")
        assert status == 0
        [found] = document["candidates"]
        rankings.append(found | {"policy": "of the run"})
    assert rankings[0] == rankings[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--plot", "page.pdf"], "--plot must be a .png file"),
        (["--by", "fqe", "--fqe-steps", "0"], "--by fqe needs a fitted Q evaluation"),
        (["--fqe-seeds", "0"], "--fqe-seeds at least 1"),
        (["--discount", "2"], "--discount must be in [0, 1]"),
        (["--dataset", "pendulum-v1-sac"], "do not fit together"),
    ],
)
def test_mistakes_are_told_in_a_line(
    options: list[str], expected: str, run: Run, episodes: Path, tmp_path: Path
) -> None:
    write_agent(tmp_path / "agent.safetensors", 0.5)
    given = options if "--dataset" in options else ["--dataset", "data.npz", *options]
    status, error = run("select", "agent.safetensors", *given)
    assert status == 2
    assert expected in error
    assert not list(tmp_path.glob("*.png"))


def test_policies_must_be_given(run: Run) -> None:
    status, error = run("select")
    assert status == 2
    assert "which policies?" in error
