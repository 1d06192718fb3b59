"""The code of the READMEs and the examples run."""

import json
import re
from pathlib import Path

import pytest
from processes import ROOT, run
from requirements import data_of_others
from safetensors import safe_open

READMES = {
    "README.md": "assert iql.agent.learner.step_count == 100 and action.shape == (5, 1) and model.num_timesteps == 100",
    "examples/choosing_a_policy.md": "assert len(evaluators) == 3",
    "adapters/iql_tensor/README.md": "assert loss_actor.isfinite() and action.shape == (1, 6)",
}


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.slow
def test_the_code_in_a_readme_runs(readme: str, tmp_path: Path) -> None:
    for package in ("stable_baselines3", "d3rlpy", "torchrl"):
        pytest.importorskip(package)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    assert blocks
    run("-c", "\n".join([*blocks, READMES[readme]]), folder=tmp_path)


@pytest.mark.parametrize("data", ["shipped", "others"])
@pytest.mark.slow
def test_the_main_example_trains_evaluates_and_saves(data: str, tmp_path: Path) -> None:
    options = ["--data", str(data_of_others("reagent_pendulum_mixed"))] if data == "others" else []
    output = run(ROOT / "examples" / "train_pendulum.py", "--steps", "20", *options, folder=tmp_path)
    returns = dict(re.findall(r"^(data|behaviour cloning|IQL) +(-[\d.]+)$", output, re.MULTILINE))
    assert set(returns) == {"data", "behaviour cloning", "IQL"}
    assert float(returns["data"]) == pytest.approx(-325.8 if data == "shipped" else -600.5, abs=0.1)
    assert (tmp_path / "pendulum" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(tmp_path / "pendulum" / "policy.safetensors", "pt") as policy:
        assert "module.0.module.log_std" in policy.keys()
        assert policy.get_tensor("observation_mean").shape == (3,)


@pytest.mark.slow
def test_the_dataset_script_records_an_agent_that_learns(tmp_path: Path) -> None:
    output = run(
        ROOT / "examples" / "make_pendulum_dataset.py", "data.npz", "--steps", "400", "--seed", "1", folder=tmp_path
    )
    assert output.startswith("400 transitions, 2 episodes, mean return -")


@pytest.mark.slow
def test_the_example_of_d3rlpy_trains_saves_and_exports(tmp_path: Path) -> None:
    for package in ("d3rlpy", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    output = run(ROOT / "examples" / "d3rlpy_fit.py", "--steps", "8", folder=tmp_path)
    assert re.search(r"^mean return -\d+, that of the data -326$", output, re.MULTILINE)
    for name in ("iql.d3", "policy.onnx"):
        assert (tmp_path / "pendulum" / name).stat().st_size > 0


def test_the_example_of_ray_train_trains_by_two_workers(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is no part of the test install: pip install 'iql-plugins[ray]'")
    from iql_tensor import IQL

    run("-m", "iql_plugins", "convert-dataset", "pendulum-v1-sac", "data.parquet", folder=tmp_path)
    output = run(ROOT / "examples" / "ray_train.py", "data.parquet", "--steps", "4", folder=tmp_path)
    assert output.splitlines()[-1] == "step 4: wrote ray/policy.safetensors"
    assert IQL.load(tmp_path / "ray" / "policy.safetensors").agent.learner.step_count == 4


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    for example in (ROOT / "examples").glob("*.py"):
        assert f'"{example.name}"' in tests, example.name


def test_the_page_on_hyper_parameters_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "learning")
    from vary import CHANGES, RESULTS, table

    results = json.loads(RESULTS.read_text())
    assert [entry["change"] for entry in results] == CHANGES
    assert table(results) in (ROOT / "examples" / "choosing_hyperparameters.md").read_text(encoding="utf-8")


def test_the_page_on_learning_shows_how_criteria_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "learning")
    from selection import CONFIGURATIONS, RESULTS, results_of, table

    measured = [results_of(str(RESULTS), file.stem).keys() for file in RESULTS.glob("*.json")]
    assert measured == [CONFIGURATIONS.keys()] * 3
    page = (ROOT / "tests" / "learning" / "README.md").read_text(encoding="utf-8")
    assert table(str(RESULTS)) in page
    assert table(str(RESULTS), ["all"]) in page
    # Of the three tasks: numbers of one decimal are regrets.
    regrets = [re.findall(r"(?<=\| )\d+\.\d(?= \|)", line) for line in table(str(RESULTS)).splitlines()[2:]]
    choosing = (ROOT / "examples" / "choosing_a_policy.md").read_text(encoding="utf-8")
    assert len(regrets) == 9
    assert all(f"| {' | '.join(three)} |" in choosing for three in regrets)


@pytest.mark.slow
def test_the_page_on_learning_shows_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "learning")
    from benchmark import improvement_table, interquartile_table, variation_table

    page = (ROOT / "tests" / "learning" / "README.md").read_text(encoding="utf-8")
    for table in (interquartile_table, variation_table, improvement_table):
        assert "\n".join(table(5)) in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (?:IQL|d3rlpy's IQL) (\|(?: [\d.]+ \([\d.]+ to [\d.]+\) \|)+)$", readme, re.MULTILINE)
    peers = {row.split(" | ")[0]: row for row in interquartile_table(5)}
    assert len(shown) == 2
    for cells, name in zip(shown, ("| IQL (tensor)", "| d3rlpy's IQL"), strict=True):
        assert all(f" {cell.strip()} " in peers[name] for cell in cells.strip("|").split("|"))


def test_the_table_of_all_hyper_parameters_is_that_of_their_declarations() -> None:
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("d3rlpy")
    from hyperparameter_table import options_table, table

    page = (ROOT / "examples" / "choosing_hyperparameters.md").read_text(encoding="utf-8")
    assert table() in page
    assert options_table() in page


def test_the_benchmark_of_the_loss_runs(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--steps", "1", "--modes", "eager"]
    assert "times as long" in run(ROOT / "tests" / "benchmarks" / "bench_loss.py", *options, folder=tmp_path)


@pytest.mark.slow
def test_iql_learns_more_from_real_data_than_it_contains(tmp_path: Path) -> None:
    output = run(ROOT / "examples" / "train_pendulum.py", folder=tmp_path)
    returns = {
        name: float(value) for name, value in re.findall(r"^(data|behaviour cloning|IQL) +(-[\d.]+)$", output, re.M)
    }
    assert returns["IQL"] > returns["data"]
    assert returns["IQL"] > returns["behaviour cloning"]
