"""Several trainings at a time, one process each; they end with the process that started them."""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iql_plugins.cli.errors import UserError, mistakes
from iql_plugins.cli.settings import Settings, Unit
from iql_plugins.cli.training import Outcome, Progress, train
from iql_plugins.training.distributed import Processes
from iql_plugins.training.learner import DivergenceError

__all__ = ["LOCK", "WorkerError", "locked", "train_all"]

LOCK = ".lock"

#: Processes that have no more work may take so long to end by themselves, and clean up.
SECONDS_TO_END = 5.0


class WorkerError(RuntimeError):
    """A process that trained and came to no regular end."""


@dataclass(frozen=True)
class _Failure:
    """An error in another process.

    Attributes:
        error: one that the command line knows; None for any other.
        trace: of the error, as text.
    """

    error: UserError | DivergenceError | OSError | None
    trace: str


def train_all(
    settings: Settings,
    run: Path,
    workers: int,
    report: Callable[[Progress], None],
    *,
    trust_pickle: bool = False,
    processes: Processes | None = None,
) -> list[Outcome]:
    """All trainings of a run. Their results do not depend on the number of workers.

    Args:
        settings: of the run.
        run: the run directory.
        workers: processes at a time; a single one is this process.
        report: see :func:`~iql_plugins.cli.training.train`.
        trust_pickle: likewise.
        processes: likewise, with a single worker.

    Returns:
        In the order of ``settings.units``.

    Raises:
        UserError, DivergenceError, OSError: as ``train``.
        WorkerError: if a process dies, or anything else goes wrong in it.
    """
    units, groups = settings.units, settings.groups
    workers = min(workers, len(groups))
    if workers == 1:
        options: dict[str, Any] = {"trust_pickle": trust_pickle, "processes": processes}
        made = [train(settings, group, run, report, **options) for group in groups]
        outcomes = {outcome.unit: outcome for group in made for outcome in group}
        return [outcomes[unit] for unit in units]
    context = multiprocessing.get_context("spawn")
    tasks, answers = context.SimpleQueue(), context.Queue()
    for group in [*groups, *[None] * workers]:
        tasks.put(group)
    children: list[Any] = [
        context.Process(target=_work, args=(settings, run, trust_pickle, tasks, answers), daemon=True)
        for _ in range(workers)
    ]
    try:
        with _interrupts_ignored():
            for child in children:
                child.start()
        collected = _collect(units, children, answers, report)
        for child in children:
            child.join(SECONDS_TO_END)
        return collected
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            if child.pid is not None:
                child.join()


@contextlib.contextmanager
def locked(run: Path, *, alone: bool = True, use: str = "training in") -> Iterator[None]:
    """Keeps other runs out of a run directory until this process ends, and every other that is inside.

    Args:
        run: the directory.
        alone: whether no process may be inside already; the ones that train for it are.
        use: what it would be doing with the directory, for the error.

    Raises:
        UserError: if one is that must not.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with mistakes(OSError):
        lock = (run / LOCK).open("w")
    with lock as file:
        try:
            if alone:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is {use} {run}") from error
        yield


def _collect(
    units: Sequence[Unit], processes: Sequence[Any], answers: Any, report: Callable[[Progress], None]
) -> list[Outcome]:
    outcomes: dict[Unit, Outcome] = {}
    while len(outcomes) < len(units):
        dead = [process for process in processes if process.exitcode not in (None, 0)]
        try:
            answer = answers.get(timeout=1.0)
        except queue.Empty:
            # Asked before the queue was: what a process said last has arrived.
            if dead:
                code = dead[0].exitcode
                reason = f"signal {-code}" + (", out of memory?" if code == -signal.SIGKILL else "")
                raise WorkerError(
                    f"a process of the training died ({reason if code < 0 else f'exit status {code}'})"
                ) from None
            continue
        if isinstance(answer, Progress):
            report(answer)
        elif isinstance(answer, Outcome):
            outcomes[answer.unit] = answer
        else:
            if answer.error is not None:
                raise answer.error
            raise WorkerError(f"a process of the training failed:\n{answer.trace}")
    return [outcomes[unit] for unit in units]


def _work(settings: Settings, run: Path, trust_pickle: bool, tasks: Any, answers: Any) -> None:
    # Results are the parent's to print.
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with locked(run, alone=False):
            while (group := tasks.get()) is not None:
                for outcome in train(settings, group, run, answers.put, trust_pickle=trust_pickle):
                    answers.put(outcome)
    except (UserError, DivergenceError, OSError) as error:
        answers.put(_Failure(error, traceback.format_exc()))
    except BaseException:
        answers.put(_Failure(None, traceback.format_exc()))


def _end_with_parent() -> None:
    """Ends this process with its parent, however that ended: nobody else would stop it, or wait for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside leave Ctrl-C to their parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
