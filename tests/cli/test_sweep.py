"""`iql-plugins sweep`: trials are runs of `train`, whatever is killed, and the cost of choosing is told."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gated_pendulum  # noqa: F401 - registers the environment
import numpy as np
import pytest
from requirements import needs_proc

from iql_plugins.cli import main, trials
from iql_plugins.cli.arguments import Sweep, Train, parse
from iql_plugins.cli.errors import UserError
from iql_plugins.config import preset

TESTS = Path(__file__).parents[1]
ENV = "gated_pendulum:GatedPendulum-v0"
#: Small, so that starting Ray takes longer than to train.
TINY = [
    *("--n-steps", "18", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "2", "--log-every", "2"),
    *("--episodes", "2", "--evaluation-episodes", "3", "--seeds", "2", "--device", "cpu"),
]
WITHOUT = "Ray is no part of the test install: pip install 'iql-plugins[ray]'"
BITWISE = ("checkpoint.safetensors", "policy.safetensors", "policy_best.safetensors", "metrics.csv")


@pytest.fixture(scope="module")
def ray() -> Any:
    return pytest.importorskip("ray", reason=WITHOUT)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a sweep that is a mistake, and says what is said of it."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        assert main(["sweep", *arguments]) == 2
        assert not list(tmp_path.iterdir())
        return capfd.readouterr().err

    return call


def started(folder: Path, *arguments: str | Path, **environment: str) -> "subprocess.Popen[str]":
    """A sweep in a process of its own."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "iql_plugins", "sweep", *map(str, arguments), "--json"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        )


def ended(process: "subprocess.Popen[str]", folder: Path) -> dict[str, Any]:
    """What a sweep printed on stdout: a line of JSON, and nothing else."""
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, (folder / "log").read_text()
    assert out.count("\n") == 1
    document: dict[str, Any] = json.loads(out)
    return document


def until(condition: Callable[[], Any], process: "subprocess.Popen[str]", folder: Path) -> Any:
    """Waits for what a sweep is to do."""
    end = time.monotonic() + 600
    while not (found := condition()):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def holders(run: Path) -> list[int]:
    """The processes that train in a run directory."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(file) == str(run / ".lock") for file in folder.iterdir()):
                found.append(int(folder.parent.name))
        except OSError:
            continue
    return found


def run_like(trial: dict[str, Any], name: str, folder: Path) -> Path:
    """The run that `train` makes of a trial's hyper-parameter."""
    stack = json.loads((Path(trial["run_dir"]) / "config.json").read_text())["settings"]["stack"]
    options = ["--baseline", "none", "--threads", "1", "--workers", "1", "--stack", str(stack), "--env", ENV]
    value = [f"--{name}", str(trial[name])]
    assert main(["train", *TINY, *options, *value, "--run-dir", str(folder)]) == 0
    return folder


def assert_same_run(run: Path, other: Path) -> None:
    for seed in ("seed-0", "seed-1"):
        for name in BITWISE:
            assert (run / seed / name).read_bytes() == (other / seed / name).read_bytes(), f"{run}/{seed}/{name}"


def table(document: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a sweep's table, and what its metadata say."""
    read = pytest.importorskip("pyarrow.parquet").read_table(document["parquet"])
    return read.to_pylist(), json.loads(read.schema.metadata[b"iql_plugins"])


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which hyper-parameters? Give --grid"),
        (["--grid", "expectle=0.7"], "--grid expectle=0.7: no hyper-parameter 'expectle'; did you mean 'expectile'?"),
        (["--grid", "expectile"], "--grid must be NAME=VALUE,VALUE, got 'expectile'"),
        (["--grid", "expectile=0.7,1.5"], "--grid expectile=1.5: expectile must be in (0, 1]"),
        (["--grid", "n_critics=2,two"], "--grid n_critics=two: "),
        (["--grid", "expectile=0.7", "--grid", "expectile=0.9"], "--grid expectile=0.9: expectile is given twice"),
        (["--grid", "expectile=0.7", "--expectile", "0.8"], "--grid expectile=0.7: expectile is given twice"),
        (["--range", "expectile=0.5..0.9"], "give their number by --samples"),
        (["--range", "expectile=0.9..0.5", "--samples", "2"], "--range must be NAME=LOW..HIGH"),
        (["--range", "temperature=0..3:log", "--samples", "2"], "with LOW above 0"),
        (["--range", "expectile=0.5..1.5", "--samples", "2"], "--range expectile=0.5..1.5: expectile must be in"),
        (["--range", "batch_size=1.5..4", "--samples", "2"], "--range batch_size=1.5..4: "),
        (["--range", "activation=1..2", "--samples", "2"], "activation is no number; give its values by --grid"),
        (["--grid", "expectile=0.7", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["--grid", "expectile=0.7", "--search", "optuna"], "give their number by --samples"),
        (["--range", "batch_size=1..1e999", "--samples", "2"], "--range must be NAME=LOW..HIGH"),
        (["--grid", "batch_size=16 --seeds 9"], "a value is no option"),
        (["--grid", "expectile=0.7", "--device", "cuda:1"], "Ray gives each trial a GPU"),
        (["--resume", "nowhere"], "there is no nowhere/sweep.json"),
        (["--resume", "nowhere", "--expectile", "0.7", "--seeds", "3"], "--expectile, --seeds: a sweep goes on as it"),
    ],
)
def test_a_mistake_is_told_with_its_option_before_anything_is_started(
    arguments: list[str], said: str, refused: Callable[..., str]
) -> None:
    assert said in refused(*arguments)


def test_a_sweep_goes_on_with_its_own_data_alone_and_needs_an_environment_of_a_module_again(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path.parent / f"{tmp_path.name}-sweep"
    folder.mkdir()
    state = {"format": 1, "command": ["--grid", "expectile=0.7"], "env": ENV, "dataset_sha256": "0"}
    (folder / "sweep.json").write_text(json.dumps(state))
    assert f"give --env {ENV}" in refused("--resume", str(folder))
    pytest.importorskip("ray", reason=WITHOUT)
    assert "its content has changed" in refused("--resume", str(folder), "--env", ENV)


def test_a_sweep_takes_the_options_of_train_and_its_presets() -> None:
    arguments = parse(["sweep", "--preset", "antmaze", "--grid", "expectile=0.7,0.9", "--grid", "temperature=1"])
    assert isinstance(arguments, Sweep)
    assert isinstance(arguments, Train)
    assert arguments.grid == ("expectile=0.7,0.9", "temperature=1")
    assert arguments.hyperparameters == preset("antmaze")
    assert arguments.baseline == "none"


def test_no_other_command_waits_for_ray() -> None:
    code = (
        "import sys; from iql_plugins.cli import main; main(['adapters']); main(['sweep']); print('ray' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


# What is trained


def test_a_trial_that_fails_says_why_and_one_that_has_results_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, float]] = []
    context = SimpleNamespace(get_trial_dir=lambda: str(tmp_path / "ray" / "00000"))
    ray = SimpleNamespace(get_context=lambda: context, report=told.append)
    monkeypatch.setattr(trials, "imported", lambda module, extra: ray)
    base = ["train", *TINY, "--baseline", "none", "--workers", "1", "--threads", "1", "--hold-out", "0.1"]
    options: dict[str, Any] = {"base": base, "beside": [], "runs": tmp_path, "together": True}
    trials._trial({"batch_size": "1000000000000"}, **options)
    assert "which memory does not hold" in (tmp_path / "00000" / "error.txt").read_text()
    assert not told
    (tmp_path / "00000" / "error.txt").unlink()
    trials._trial({"batch_size": "8"}, **options)
    # Each evaluation but the last, when it is saved; the last one when the run has ended.
    assert [entry["step"] for entry in told] == [*range(2, 19, 2)]
    assert all({"mean_return", "held_out_value"} < entry.keys() for entry in told)
    changed = (tmp_path / "00000" / "results.json").stat().st_mtime_ns
    trials._trial({"batch_size": "8"}, **options)
    assert told[-1] == told[-2]
    assert (tmp_path / "00000" / "results.json").stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("tuner", "state", "whole"),
    [
        (None, None, False),
        (b"", "{}", False),
        (pickle.dumps({})[:-1], "{}", False),
        (pickle.dumps({}), None, False),
        (pickle.dumps({}), '{"trials": ', False),
        (pickle.dumps({}), "{}", True),
    ],
)
def test_a_state_of_rays_that_a_kill_has_cut_is_begun_anew(
    tuner: bytes | None, state: str | None, whole: bool, tmp_path: Path
) -> None:
    if tuner is not None:
        (tmp_path / "tuner.pkl").write_bytes(tuner)
    if state is not None:
        (tmp_path / "experiment_state-2026.json").write_text(state)
    assert trials._restorable(tmp_path) == whole


def test_a_full_disk_does_not_end_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise UserError("no space left") from OSError(28, "No space left on device")

    context = SimpleNamespace(get_trial_dir=lambda: str(tmp_path / "ray" / "00000"))
    monkeypatch.setattr(trials, "imported", lambda *_: SimpleNamespace(get_context=lambda: context, report=None))
    monkeypatch.setattr(trials.train, "run", full)
    with pytest.raises(UserError, match="no space left"):
        trials._trial({}, base=["train", *TINY], beside=[], runs=tmp_path, together=False)
    assert not (tmp_path / "00000" / "error.txt").exists()


@needs_proc
def test_a_sweep_with_a_failed_trial_is_interrupted_and_goes_on_to_its_result(ray: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    (gate := tmp_path / "gate").write_text("sweep/runs/00001-*/seed-0/checkpoint.safetensors")
    # The first one's batches fit in no memory; while the second one waits the third has not begun.
    grid = ["--grid", "batch_size=1000000000000,16,8"]
    options = [*TINY[:4], *TINY[6:], "--env", ENV, *grid, "--workers", "1", "--run-dir", folder]
    process = started(tmp_path, *options, SWEEP_GATE=str(gate))
    until(lambda: list(tmp_path.glob(gate.read_text())), process, tmp_path)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert json.loads(out)["error"] == f"interrupted: go on with iql-plugins sweep --resume {folder} --env {ENV}"
    gate.unlink()
    document = ended(started(tmp_path, "--resume", folder, "--env", ENV), tmp_path)
    assert sorted(trial["status"] for trial in document["trials"]) == ["failed", "finished", "finished"]


@needs_proc
def test_what_is_killed_goes_on_and_comes_to_what_train_comes_to(ray: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    (gate := tmp_path / "gate").write_text("sweep/runs/00001-*/seed-0/checkpoint.safetensors")
    options = [*TINY, "--env", ENV, "--grid", "expectile=0.7,0.9", "--workers", "1", "--run-dir", folder]
    process = started(tmp_path, *options, SWEEP_GATE=str(gate))
    # The first trial comes to its end, the second one to its first checkpoint, and is killed.
    until(lambda: list(tmp_path.glob(gate.read_text())), process, tmp_path)
    (first,), (run,) = folder.glob("runs/00000-*"), folder.glob("runs/00001-*")
    finished = (first / "results.json").stat().st_mtime_ns
    (worker,) = until(lambda: holders(run), process, tmp_path)
    os.kill(worker, signal.SIGKILL)
    # Ray starts another process, which goes on from the checkpoint and waits at the gate; now it is the driver's turn.
    (other,) = until(lambda: set(holders(run)) - {worker}, process, tmp_path)
    # Its own processes are told to send nothing to anyone.
    assert b"RAY_USAGE_STATS_ENABLED=0\0" in Path(f"/proc/{other}/environ").read_bytes()
    process.kill()
    process.communicate()
    gate.unlink()
    document = ended(started(tmp_path, "--resume", folder, "--env", ENV), tmp_path)
    assert other not in holders(run)
    assert [trial["status"] for trial in document["trials"]] == ["finished"] * 2
    for trial in document["trials"]:
        assert_same_run(Path(trial["run_dir"]), run_like(trial, "expectile", tmp_path / str(trial["expectile"])))
    # Nothing was repeated: what was finished is as it was, and the other one went on from where it was.
    assert (first / "results.json").stat().st_mtime_ns == finished
    assert all(entry["steps"] < 18 for entry in json.loads((run / "results.json").read_text())["by_seed"])
    # Nine evaluations of three episodes on the way, and two of two in the end, by each of two seeds of two trials.
    assert document["evaluation_episodes"] == 2 * 2 * (9 * 3 + 2 * 2)


def test_asha_stops_what_lags_behind_and_the_cost_is_told(ray: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    options = [*TINY, "--env", ENV, "--workers", "1", "--grid", "temperature=1,auto", "--run-dir", folder]
    document = ended(started(tmp_path, *options, SWEEP_WORSE=str(folder / "runs")), tmp_path)
    first, second = document["trials"]
    assert (first["temperature"], first["status"], first["step"]) == (1.0, "finished", 18)
    assert (second["temperature"], second["status"], second["step"]) == ("auto", "stopped", 2)
    assert (first["score"], second["score"]) == (-10.0, -20.0)
    assert (document["best"], document["chosen_by"]) == (first["trial"], "mean_return")
    assert document["evaluation_episodes"] == 2 * (9 * 3 + 2 * 2) + 2 * 3
    rows, metadata = table(document)
    assert [json.loads(row["temperature"]) for row in rows] == [1.0, "auto"]
    assert [row["seeds"] for row in rows] == [[0, 1], [0, 1]]
    assert (metadata["evaluation_episodes"], metadata["best"]) == (document["evaluation_episodes"], first["trial"])
    assert "temperature" in Path(document["report"]).read_text()
    assert "mean_return" in (tmp_path / "log").read_text()  # Ray's table
    # Trials are runs like any other.
    stopped = Path(second["run_dir"])
    assert main(["train", "--resume", str(stopped), "--env", ENV]) == 0
    assert main(["evaluate", str(stopped / "seed-0"), "--env", ENV, "--episodes", "1"]) == 0


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_without_an_environment_the_offline_criterion_chooses(ray: Any, search: str, tmp_path: Path) -> None:
    if search == "optuna":
        pytest.importorskip("optuna")
    random, ends = np.random.default_rng(0), np.tile([0, 0, 0, 1], 20).astype(np.float32)
    columns = {name: random.normal(size=(80, 3)).astype(np.float32) for name in ("observations", "next_observations")}
    actions = random.uniform(-1, 1, size=(80, 2)).astype(np.float32)
    rewards = random.normal(size=80).astype(np.float32)
    np.savez(tmp_path / "data.npz", **columns, actions=actions, rewards=rewards, terminals=ends, timeouts=0 * ends)
    by = ["--by", "td-error"] if search == "optuna" else ["--by", "fqe", "--fqe-steps", "5"]
    space = [
        "--range",
        "temperature=0.5..10:log",
        "--range",
        "n_critics=1..3",
        "--grid",
        "critic_layer_norm=true,false",
    ]
    cluster = []
    if search == "random":
        # A cluster, by its address.
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**27)
        cluster = ["--address", ray.get_runtime_context().gcs_address]
    try:
        options = [*TINY, "--dataset", "data.npz", *space, "--samples", "2", "--search", search, *by, *cluster]
        document = ended(started(tmp_path, *options, "--seeds", "1", "--run-dir", "sweep"), tmp_path)
    finally:
        ray.shutdown()
    assert "10% of the episodes are held out, and trials are chosen by" in (tmp_path / "log").read_text()
    assert document["env"] is None
    assert (document["chosen_by"], document["evaluation_episodes"]) == (by[1], None)
    rows, _ = table(document)
    assert [row["status"] for row in rows] == ["finished"] * 2
    assert all(0.5 <= row["temperature"] <= 10 and row["n_critics"] in (1, 2, 3) for row in rows)
    assert len({row["temperature"] for row in rows}) == 2
    assert all(row["critic_layer_norm"] in (True, False) for row in rows)
    best = min if by[1] == "td-error" else max
    assert rows[0]["score"] == best(row["score"] for row in rows)
    assert document["best"] == rows[0]["trial"]
    assert all(row["held_out_td_error"] > 0 for row in rows)
    assert (Path(document["sweep"]) / "selection.png").exists()
