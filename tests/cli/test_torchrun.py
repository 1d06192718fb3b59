"""`torchrun -m iql_plugins train`: one training by several processes, whatever becomes of them."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import children
from requirements import needs_gloo, needs_proc

from iql_plugins import checkpoint
from iql_plugins.cli import main, train, training
from iql_plugins.cli.errors import UserError
from iql_plugins.cli.settings import Settings
from iql_plugins.training import distributed
from iql_plugins.training.distributed import Processes

pytestmark = [pytest.mark.slow, needs_gloo]
#: How often a process is killed.
KILLS = int(os.environ.get("IQL_PLUGINS_KILLS", "2"))
SMALL = [
    *("--env", "short_pendulum:ShortPendulum-v0", "--baseline", "none", "--hidden-sizes", "8", "--batch-size", "16"),
    *("--n-steps", "40", "--evaluate-every", "20", "--log-every", "10", "--episodes", "2"),
    *("--evaluation-episodes", "2"),
]

#: Still under way when its processes are killed.
LONGER = [
    *(*SMALL, "--n-steps", str(2000 * max(KILLS, 2)), "--evaluate-every", "200", "--log-every", "50"),
    *("--hold-out", "0.1"),
]


@contextlib.contextmanager
def torchrun(*arguments: str | Path, restarts: int = 0, patience: float = 0.1) -> Iterator["subprocess.Popen[str]"]:
    """Two processes of ``train``; every so many seconds it is looked whether they live."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", str(patience)]
    options = ["-m", "iql_plugins", "train", *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen(
        [*launcher, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    with process:
        try:
            yield process
        finally:
            # Whatever went wrong, nobody trains on: it ends with all that it has started.
            process.terminate()


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def policies(folder: Path) -> dict[str, bytes]:
    names = ("checkpoint.safetensors", "policy.safetensors", "policy_best.safetensors", "metrics.csv")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two processes, and what they wrote to stdout."""
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    with torchrun(*SMALL, "--json", "--run-dir", folder) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out


@pytest.mark.parametrize("adapter", ["tensor", "sb3", "d3rlpy", "torchrl"])
@pytest.mark.slow
def test_two_processes_train_what_one_does(
    adapter: str, tmp_path: Path, undisturbed: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = undisturbed
    if adapter != "tensor":
        folder = tmp_path / "run"
        with torchrun(*SMALL, "--json", "--adapter", adapter, "--run-dir", folder) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    # One document, of the first process.
    document = json.loads(out)
    assert document["processes"] == 2
    assert main(["train", *SMALL, "--adapter", adapter, "--run-dir", str(tmp_path / "alone")]) == 0
    capfd.readouterr()
    (_, together), (_, alone) = (
        checkpoint.read(each / "checkpoint.safetensors") for each in (folder, tmp_path / "alone")
    )
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        if tensor.is_floating_point():
            assert (together[name] - tensor).abs().max() <= 1e-5, name
        else:
            # The random state, too.
            assert torch.equal(together[name], tensor), name


def test_what_is_saved_was_compared_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--evaluate-every", "40", "--log-every", "15", "--run-dir", str(tmp_path / "run")]
    assert main(["train", *SMALL, *options]) == 0
    settings, _ = Settings.read(tmp_path / "run")
    done: list[str] = []

    class Two(Processes):
        def told(self, values: Any) -> Any:
            return values

        def check_equal(self, loss: Any) -> None:
            done.append("compared")

    monkeypatch.setattr(distributed, "synchronize", lambda learner: None)
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(training, "_save", lambda trainers: done.append("saved"))
    monkeypatch.setattr(training._Trainer, "outcome", lambda trainer: None)
    training.train(settings, settings.units, tmp_path / "again", lambda progress: None, processes=Two(0, 2))
    assert done == ["compared", "saved"] * 3


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    assert main(["train", *SMALL, "--run-dir", str(begun)]) == 0
    with torchrun("--resume", begun, "--env", SMALL[1], "--n-steps", "60") as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert main(["train", "--resume", str(begun), "--env", SMALL[1], "--n-steps", "80"]) == 0
    assert main(["train", *SMALL, "--run-dir", str(whole)]) == 0
    for n_steps in ("60", "80"):
        assert main(["train", "--resume", str(whole), "--env", SMALL[1], "--n-steps", n_steps]) == 0
    capfd.readouterr()
    (_, ours), (_, alone) = (checkpoint.read(each / "policy.safetensors") for each in (begun, whole))
    for name, tensor in alone.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.0, atol=1e-5)


@needs_proc
def test_killed_processes_are_started_again_and_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    chance, killed = random.Random(0), 0
    with torchrun(*LONGER, "--run-dir", folder, restarts=KILLS) as process:
        wait_for(folder / "checkpoint.safetensors", process)
        while process.poll() is None and killed < KILLS:
            time.sleep(chance.uniform(0.0, 12.0))
            ranks = children(process.pid)
            if len(ranks) == 2:
                os.kill(chance.choice(ranks), signal.SIGKILL)
                killed += 1
                while set(ranks) & set(children(process.pid)):
                    time.sleep(0.05)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert killed == KILLS
    whole = tmp_path / "whole"
    with torchrun(*LONGER, "--run-dir", whole) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert policies(folder) == policies(whole)


@needs_proc
def test_a_killed_process_takes_the_other_down_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with torchrun(*SMALL, "--n-steps", "1000000", "--run-dir", folder, patience=5.0) as process:
        wait_for(folder / "checkpoint.safetensors", process)
        first, second = children(process.pid)
        os.kill(second, signal.SIGKILL)
        begin = time.monotonic()
        _, err = process.communicate(timeout=120)
        assert time.monotonic() - begin < 60.0
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("iql-plugins: process ")]
    [line] = said
    assert line.startswith("iql-plugins: process 0 of 2: another process has ended")
    assert not Path(f"/proc/{first}").exists()


@pytest.mark.parametrize(
    ("options", "restarts", "message"),
    [
        (["--batch-size", "15"], 0, "--batch-size is that of all processes together, a multiple of .* 2, got 15"),
        (["--stack", "2", "--seeds", "2"], 0, "train one seed at a time; use --stack 1"),
        (["--workers", "2"], 0, "leave out --workers and --stack"),
        (["--run-dir", "other", "--temperature", "9"], 1, "other is another run, which differs in hyperparameters"),
        (["--run-dir", "other"], 0, "other exists"),
        ([], 1, "give --run-dir: processes that torchrun starts again"),
    ],
)
def test_what_processes_cannot_do_together_is_refused(
    options: list[str],
    restarts: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "other" in options:
        assert main(["train", *SMALL, "--run-dir", "other", "--stack", "1", "--workers", "1"]) == 0
    before = policies(tmp_path / "other") if "other" in options else {}
    # As torchrun tells the first of two; they have nothing to say to each other yet.
    told = {"RUN_ID": "0", "RESTART_COUNT": "0", "MAX_RESTARTS": str(restarts)}
    for name, value in told.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "process_group", lambda: contextlib.nullcontext(Processes(0, 2)))
    monkeypatch.setattr(Processes, "told", lambda self, values: values)
    assert main(["train", *SMALL, *options]) == 2
    assert re.search(f"iql-plugins: .*{message}", capfd.readouterr().err)
    assert not (tmp_path / "runs").exists()
    assert not before or policies(tmp_path / "other") == before


@pytest.mark.parametrize(("rank", "count", "speaks"), [("0", "0", False), ("0", "1", True), ("1", "1", False)], ids=str)
def test_a_mistake_is_one_document_of_the_first_process_once_nothing_is_started_again(
    rank: str, count: str, speaks: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"RUN_ID": "0", "RESTART_COUNT": count, "MAX_RESTARTS": "1"}
    for name, value in given.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("RANK", rank)
    assert main(["train", *SMALL, "--json"]) == 2
    out, err = capfd.readouterr()
    assert "give --run-dir" in err
    assert ("give --run-dir" in json.loads(out)["error"]) if speaks else not out


def test_processes_on_one_machine_need_a_gpu_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--run-dir", str(tmp_path / "run"), "--stack", "1"]) == 0
    settings, _ = Settings.read(tmp_path / "run" / "config.json")
    train._check_processes(settings, "auto", Processes(0, 2))
    with pytest.raises(UserError, match=r"a GPU of its own.* got --device cuda:0"):
        train._check_processes(replace(settings, device="cuda:0"), "auto", Processes(0, 2))
