"""Runs that are killed, at moments at which files change and at any others, and gone on with.

What a run leaves that nobody disturbed must be there in the end, byte for byte.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import short_pendulum  # noqa: F401
from processes import assert_all_end
from requirements import needs_proc

pytestmark = needs_proc

#: Checkpoints after steps 2 and 3, and rows of metrics.csv after each step.
RUN = [
    *("--env", "ShortPendulum-v0", "--n-steps", "3", "--evaluate-every", "2", "--log-every", "1", "--device", "cpu"),
    *("--hidden-sizes", "4", "--batch-size", "4", "--episodes", "1", "--evaluation-episodes", "1", "--threads", "1"),
]
SETUPS = {
    "one by one": ["--seeds", "1", "--stack", "1", "--baseline", "bc", "--workers", "1"],
    "in two processes": ["--seeds", "2", "--stack", "1", "--baseline", "none", "--workers", "2"],
    "a stack": ["--seeds", "3", "--stack", "3", "--baseline", "none", "--workers", "1"],
    "stacks in two processes": ["--seeds", "3", "--stack", "2", "--baseline", "none", "--workers", "2"],
}
#: What takes a command line long to import: its processes are forks of one that has.
IMPORTED = [
    *("pytest", "torch._dynamo", "iql_plugins.cli.train", "iql_plugins.training.multi_seed", "iql_tensor.algorithm"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.font_manager", "scipy.stats"),
    *("rich.table", "rich.progress", "rich.console", "gymnasium.envs.classic_control.pendulum"),
]
#: What two runs' results may differ in.
TIMES_AND_PLACES = ("seconds", "warm_up_seconds", "steps", "command", "run_dir", "policy", "learning_curve")


@dataclass(frozen=True)
class Case:
    """A way to train, and what it came to when nobody disturbed it.

    Attributes:
        options: of the command line.
        folder: for runs, empty.
        whole: what is left in the end.
        seconds: how long it took.
        moments: at so many, or fewer, a process changed a file.
    """

    options: list[str]
    folder: Path
    whole: dict[str, Any]
    seconds: float
    moments: int

    def start(self, moment: int = 0) -> Any:
        """Begins the run, or goes on with it; each of its processes is killed at a moment if it gets there."""
        if (self.run / "config.json").exists():
            return started(["--resume", str(self.run), *self.options[-2:]], self.log, moment)
        return started([*RUN, *self.options, "--run-dir", str(self.run)], self.log, moment)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        return self.folder / "log"


@pytest.fixture(scope="module", params=SETUPS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    options, folder = SETUPS[request.param], tmp_path_factory.mktemp("runs")
    log, whole = folder / "whole.log", folder / "whole"
    with pytest.MonkeyPatch.context() as patch:
        # The process that is forked has no other threads, which a fork would not have.
        patch.setenv("OMP_NUM_THREADS", "1")
        ended(started(["--help"], log), log)
    begin = time.monotonic()
    assert ended(started([*RUN, *options, "--run-dir", str(whole)], log), log) == 0, log.read_text()
    seconds = time.monotonic() - begin
    moments = max(map(int, re.findall(r"^moment (\d+)$", log.read_text(), re.MULTILINE)))
    return Case(options, folder, leavings(whole), seconds, moments)


def started(arguments: list[str], log: Path, moment: int = 0) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_train, args=(arguments, log, moment))
    process.start()
    return process


def ended(process: Any, log: Path) -> int:
    process.join(120.0)
    assert process.exitcode is not None, log.read_text()
    assert_all_end(process.pid)
    return int(process.exitcode)


def _train(arguments: list[str], log: Path, moment: int) -> None:
    from iql_plugins.cli import main, workers

    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    context = multiprocessing.get_context("fork")
    workers.multiprocessing.get_context = lambda method: context  # type: ignore[assignment, return-value]
    numbers = itertools.count(1)

    def killed(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            number = next(numbers)
            os.write(1, f"moment {number}\n".encode())
            if number == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            function(*args, **kwargs)

        return call

    os.replace, os.unlink = killed(os.replace), killed(os.unlink)
    os._exit(main(["train", *arguments]))


def leavings(run: Path) -> dict[str, Any]:
    """The files of a run; of its results what all runs have in common."""
    paths = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    files: dict[str, Any] = {name: path.read_bytes() for name, path in paths.items()}
    results = json.loads(files["results.json"])
    for document in (results, *results["by_seed"]):
        for name in TIMES_AND_PLACES:
            document.pop(name, None)
    return files | {"results.json": results}


def assert_goes_on(case: Case, killed: str) -> None:
    """A run that was killed comes to what it would have come to."""
    assert ended(case.start(), case.log) == 0, f"{killed}:\n{case.log.read_text()}"
    left = leavings(case.run)
    differing = [name for name in left.keys() | case.whole.keys() if left.get(name) != case.whole.get(name)]
    assert not differing, f"{killed}:\n{case.log.read_text()}"
    shutil.rmtree(case.run)
    case.log.unlink()


def test_a_run_that_is_killed_when_it_changes_a_file_goes_on_bit_for_bit(case: Case, stress: int) -> None:
    randomly, moments, count = random.Random(0), range(1, case.moments + 1), stress
    for moment in moments if count >= len(moments) else randomly.sample(moments, count):
        ended(case.start(moment), case.log)
        # And once more while it goes on, now and then.
        again = randomly.choice([0, *moments])
        if again:
            ended(case.start(again), case.log)
        assert_goes_on(case, f"killed at moment {moment}, then at {again}")


def test_a_run_that_is_killed_at_any_time_goes_on_bit_for_bit(case: Case, stress: int) -> None:
    randomly = random.Random(0)
    for _ in range(stress):
        times = [randomly.uniform(0.0, case.seconds) for _ in range(randomly.choice([1, 1, 2]))]
        for seconds in times:
            process = case.start()
            time.sleep(seconds)
            process.kill()
            ended(process, case.log)
        assert_goes_on(case, f"killed after {times} of {case.seconds} seconds")
