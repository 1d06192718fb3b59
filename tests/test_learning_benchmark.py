"""The benchmark of learning: which rows it trains, and what its tables make of them. Nothing large is trained here."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from agents import SPACES, make_dataset, observations
from matplotlib.figure import Figure
from processes import ROOT

from iql_plugins.config import IQLConfig
from iql_plugins.training.agent import Agent
from iql_plugins.training.learner import DivergenceError

TASK = "reagent-pendulum"
#: Of the invented datasets.
OLD, NEW = "0" * 64, "1" * 64

Rows = dict[str, dict[str, Any]]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The program, with no results yet."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "learning")
    import benchmark as module

    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmark")
    (tmp_path / "benchmark").mkdir()
    return module


@pytest.fixture
def rows(benchmark: ModuleType) -> Callable[..., Rows]:
    """Rows of a method by seed, as they are written; each ends at what its seed comes to."""

    def invent(method: str, ends: Sequence[float], sha256: str = OLD, evaluations: int = 10) -> Rows:
        config = benchmark.config_of(benchmark.TASKS[TASK], benchmark.METHODS[method].changes).to_json()
        between = benchmark.TASKS[TASK].n_steps // 10
        diverged = {"diverged": "losses not finite"} if evaluations < 10 else {}
        return {
            str(seed): {
                "returns": [end] * 20,
                "curve": [[between * (step + 1), end] for step in range(evaluations)],
                "config": dict(config),
                "dataset_sha256": sha256,
                **diverged,
            }
            for seed, end in enumerate(ends)
        }

    return invent


def write(benchmark: ModuleType, results: dict[str, Rows]) -> None:
    (benchmark.RESULTS / f"{TASK}.json").write_text(json.dumps(results))


def test_a_seed_that_diverged_counts_as_it_was_last_seen(
    benchmark: ModuleType, rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures: list[Figure] = []

    class Kept(Figure):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            figures.append(self)

    monkeypatch.setattr(benchmark, "Figure", Kept)
    early = rows("BC", [-1000.0, -1000.0, -400.0])
    early["2"] = rows("BC", [0.0, 0.0, -400.0], evaluations=3)["2"]
    results = {"BC": early, "IQL (tensor)": rows("IQL (tensor)", [-200.0] * 4)}
    # A peer that is not through is in no table, and in no picture.
    write(benchmark, results | {"plain IQL": rows("plain IQL", [-100.0] * 2)})
    lines = {line.split(" |")[0]: line for line in benchmark.interquartile_table(3)}
    assert lines["| BC"].count(", 1 diverged") == 1
    assert "diverged" not in lines["| IQL (tensor)"]
    monkeypatch.setattr(benchmark, "interval", lambda columns, measure: (measure(*columns),) * 3)
    (tmp_path / "again").mkdir()
    benchmark.draw(tmp_path / "picture.svg", 3)
    curves = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert curves["BC"].get_xdata()[-1] == benchmark.TASKS[TASK].n_steps
    np.testing.assert_allclose(curves["BC"].get_ydata(), -800.0)
    assert "plain IQL" not in curves
    benchmark.draw(tmp_path / "again" / "picture.svg", 3)
    assert (tmp_path / "again" / "picture.svg").read_bytes() == (tmp_path / "picture.svg").read_bytes()


@pytest.mark.parametrize("good", [0, 3])
def test_a_training_that_diverges_has_the_curve_up_to_there(
    good: int, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = []

    def start(problem: Any, seed: int) -> Any:
        def fit(count: int) -> None:
            fits.append(count)
            if len(fits) > good:
                raise DivergenceError("losses not finite")

        return fit, None

    problem = SimpleNamespace(act=lambda act: act, env="Pendulum-v1", sha256=OLD)
    monkeypatch.setattr(benchmark, "problem_of", lambda *_: problem)
    monkeypatch.setattr(benchmark, "rollouts", lambda *_: [SimpleNamespace(total=-500.0)] * 20)
    monkeypatch.setattr(benchmark, "version", lambda name: "0")
    monkeypatch.setitem(benchmark.METHODS, "a peer", benchmark.Method(start))
    row = benchmark.learn(TASK, "a peer", [1], Path("nowhere"))[1]
    assert row["diverged"] == "losses not finite"
    assert row["curve"] == ([[1000 * (step + 1), -500.0] for step in range(good)] or [[0, -500.0]])
    assert (len(row["returns"]), row["dataset_sha256"]) == (20, OLD)


def test_what_more_seeds_say_of_a_variation_is_what_the_table_shows(
    benchmark: ModuleType, rows: Callable[..., Rows]
) -> None:
    # The first three seeds of either are their best and their worst.
    few = {"IQL (tensor)": rows("IQL (tensor)", [-150.0] * 3), "orthogonal": rows("orthogonal", [-650.0] * 3)}
    more = {
        "IQL (tensor)": rows("IQL (tensor)", [-150.0] * 3 + [-400.0] * 10),
        "orthogonal": rows("orthogonal", [-650.0] * 3 + [-400.0] * 9 + [-1000.0]),
    }
    # A seed whose predecessor is not there is not counted.
    del more["orthogonal"]["11"]
    cells = []
    for results in (few, more):
        write(benchmark, results)
        lines = [line for line in benchmark.variation_table(3) if line.startswith("| orthogonal |")]
        cells += [line.split(" | ")[1].removesuffix(" |") for line in lines]
    assert cells[0].startswith("**-50.1 (-50.1 to -50.1)**")
    # Of the middle seven of eleven, one is another: 500 / 7 of a scale of 998.3.
    assert cells[1].startswith("-7.2 (")
    assert cells[1].endswith(", 11 seeds")


def test_rows_of_different_datasets_make_no_table(
    benchmark: ModuleType, rows: Callable[..., Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    write(benchmark, {"BC": rows("BC", [0.0, 1.0]), "IQL (tensor)": rows("IQL (tensor)", [0.0, 1.0], NEW)})
    with pytest.raises(ValueError, match="rows of reagent-pendulum are of 2 datasets: train all of them on one"):
        benchmark.table(benchmark.Table(seeds=2))
    assert capsys.readouterr().out == ""


def test_rows_of_another_dataset_are_trained_again_and_no_others(
    benchmark: ModuleType, rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = rows("BC", [0.0, 1.0, 2.0]) | {"1": rows("BC", [0.0, 1.0], NEW)["1"]}
    write(benchmark, {"BC": mixed, "plain IQL": rows("plain IQL", [5.0] * 3, NEW)})
    trained = []

    def learn(task: str, method: str, seeds: Sequence[int], file: Path) -> dict[int, dict[str, Any]]:
        trained.append((task, method, tuple(seeds)))
        made = rows(method, [7.0] * 3, NEW)
        return {seed: made[str(seed)] for seed in seeds}

    monkeypatch.setattr(benchmark, "learn", learn)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(benchmark, "read_dataset", lambda file: SimpleNamespace(sha256=NEW))
    arguments = benchmark.Run(tasks=(TASK,), methods=("BC", "plain IQL"), seeds=3, workers=1)
    benchmark.run(arguments)
    assert trained == [(TASK, "BC", (0, 2))]
    ends = {seed: row["returns"][0] for seed, row in benchmark.rows_of(TASK, "BC").items()}
    assert ends == {0: 7.0, 1: 1.0, 2: 7.0}
    benchmark.run(arguments)
    assert len(trained) == 1
    assert len(list(benchmark.interquartile_table(3))) == 4


def test_a_training_that_was_stopped_goes_on_from_its_last_evaluation(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, config = make_dataset(SPACES["continuous"]), IQLConfig(batch_size=8, hidden_sizes=(8,), compile="no")
    problem = SimpleNamespace(
        act=lambda act: act, env="", sha256=OLD, spaces=SPACES["continuous"], config=config, data=dataset
    )
    seen: list[float] = []
    states = observations(SPACES["continuous"])

    def rollouts(act: Any, env: str, starts: Sequence[int]) -> list[Any]:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(float(act(states).sum()))
        return [SimpleNamespace(total=seen[-1])] * len(starts)

    monkeypatch.setattr(benchmark, "problem_of", lambda *_: problem)
    monkeypatch.setattr(benchmark, "rollouts", rollouts)
    stop, arguments = -1, (TASK, "IQL (tensor)", [0], Path("nowhere"))
    monkeypatch.setitem(benchmark.TASKS, TASK, dataclasses.replace(benchmark.TASKS[TASK], n_steps=30))
    expected = benchmark.learn(*arguments)[0]
    kept = benchmark.unfinished(TASK, "IQL (tensor)", 0, OLD)
    kept.unlink()
    seen.clear()
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        benchmark.learn(*arguments)
    stopped = Agent.load(kept)
    stopped.extra["seconds"] = 1000.0
    stopped.save(kept)
    stop = -1
    found = benchmark.learn(*arguments)[0]
    assert len(seen) == benchmark.EVALUATIONS
    assert (found["curve"], found["returns"]) == (expected["curve"], expected["returns"])
    assert 1000 <= found["seconds"] < 1600
    # Of other hyper-parameters it is another training.
    problem.config = config.replace(expectile=0.8)
    benchmark.learn(*arguments)
    assert len(seen) == 2 * benchmark.EVALUATIONS


def test_rows_of_other_hyper_parameters_are_none(benchmark: ModuleType, rows: Callable[..., Rows]) -> None:
    changed = rows("BC", [0.0, 1.0])
    changed["0"]["config"] |= {"batch_size": 8}
    # What is not known of a row has its default.
    del changed["1"]["config"]["clip_all_actions"]
    write(benchmark, {"BC": changed})
    assert list(benchmark.rows_of(TASK, "BC")) == [1]
    assert benchmark.scores_of(TASK, "BC", 2) is None
