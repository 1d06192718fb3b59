"""The trials of a sweep: runs of ``train`` in processes of Ray's."""

import contextlib
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from iql_plugins import checkpoint
from iql_plugins.cli import train
from iql_plugins.cli.arguments import Sweep
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.runs import RESULTS
from iql_plugins.cli.search_space import SearchSpace, parsed, trial_options
from iql_plugins.cli.settings import CONFIG, Settings, available_cores
from iql_plugins.cli.training import HELD_OUT, METRICS, Progress, metrics_rows
from iql_plugins.cli.workers import locked
from iql_plugins.training.learner import DivergenceError

__all__ = ["ERROR", "MEAN_RETURN", "ON_THE_WAY", "RUNS", "evaluated", "folder_name", "trained"]

#: In a sweep's folder: run directories, and Ray's own state; and in one of the first, why its trial failed.
RUNS, RAY, ERROR = "runs", "ray", "error.txt"
MEAN_RETURN = "mean_return"
#: What searches and tables look at while trials run without an environment, by the criterion that chooses: its name,
#: and which is better.
ON_THE_WAY = {
    "td-error": ("held_out_td_error", "min"),
    "agreement": ("held_out_agreement", "max"),
    "qvalue": ("held_out_value", "max"),
}
#: How often a trial goes on whose process was killed.
RETRIES = 10
#: ASHA looks at a trial after a ninth and after a third of its steps, and lets the best third go on.
ASHA_PARTS, ASHA_FACTOR = 9, 3
SECONDS_TO_END = 60.0
SECONDS_BETWEEN_TABLES = 10.0
OBJECT_STORE_BYTES = 2**27
#: Nothing is sent to anyone; relative paths mean what they do outside; the state is written each second; no files but
#: ours; and the reporter that has one table.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def _trial(point: Mapping[str, Any], *, base: Sequence[str], beside: Sequence[str], runs: Path, together: bool) -> None:
    """One of Ray's processes: ``train``, or ``train --resume`` where it was killed before.

    Args:
        point: its hyper-parameters.
        base: the command of all trials.
        beside: what stands beside --resume.
        runs: the folder of all run directories.
        together: whether seeds take their steps together where they can, so that all are evaluated while there are
            steps to save.
    """
    tune = imported("ray.tune", "ray")
    folder = runs / Path(tune.get_context().get_trial_dir()).name
    folder.mkdir(parents=True, exist_ok=True)
    _wait_for(folder)
    if not (folder / RESULTS).exists():
        begun = (folder / CONFIG).exists()
        given = (
            ["train", "--resume", str(folder), *beside]
            if begun
            else [*base, *trial_options(point), "--run-dir", str(folder)]
        )
        try:
            arguments = parsed(given)
            if not begun and arguments.stack == "auto" and together and train.stack_obstacle(arguments) is None:
                given += ["--stack", str(arguments.seeds)]
                arguments = parsed(given)
            train.run(arguments, given, partial(_reporter, folder, tune.report))
        except (UserError, DivergenceError) as error:
            if isinstance(error.__cause__, OSError):
                # A full disk, say: it may go on later.
                raise
            # Ray tries again what was killed; to try this again would come to the same.
            checkpoint.write_bytes(folder / ERROR, str(error).encode())
            return
    tune.report(evaluated(Settings.read(folder)[0], folder)[-1])


def _wait_for(folder: Path) -> None:
    """Waits until a process that trained there, and is being killed, has ended."""
    until = time.monotonic() + SECONDS_TO_END
    while True:
        try:
            with locked(folder):
                return
        except UserError:
            if time.monotonic() > until:
                raise
        time.sleep(0.2)


@contextlib.contextmanager
def _reporter(
    folder: Path, tell: Callable[[dict[str, float]], None], settings: Settings
) -> Iterator[Callable[[Progress], None]]:
    """Tells Ray of each evaluation that all seeds have; of the last one when the run has ended."""
    told = 0.0

    def report(progress: Progress) -> None:
        nonlocal told
        found = evaluated(settings, folder) if progress.evaluated else []
        if found and told < found[-1]["step"] < settings.hyperparameters.n_steps:
            told = found[-1]["step"]
            tell(found[-1])

    yield report


def evaluated(settings: Settings, folder: Path) -> list[dict[str, float]]:
    """The evaluations on the way that all seeds have, means over seeds."""
    names = (MEAN_RETURN, *HELD_OUT)
    columns = [
        {row["step"]: row for row in metrics_rows(settings.folder(folder, unit) / METRICS) if row.keys() & set(names)}
        for unit in settings.units
        if unit.method == "iql"
    ]
    return [
        {"step": int(step)}
        | {name: sum(rows[step][name] for rows in columns) / len(columns) for name in names if name in columns[0][step]}
        for step in sorted(set[float].intersection(*map(set, columns)))
    ]


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, on this machine or a cluster."""
    before = os.environ.copy()
    os.environ.update(ENVIRONMENT)
    ray = imported("ray", "ray")
    here = {"include_dashboard": False, "num_cpus": available_cores(), "object_store_memory": OBJECT_STORE_BYTES}
    try:
        with mistakes(ConnectionError, RuntimeError, ValueError):
            ray.init(
                address=address or "local", log_to_driver=False, logging_level="error", **({} if address else here)
            )
        yield ray
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


def trained(arguments: Sweep, base: Sequence[str], space: SearchSpace, settings: Settings, folder: Path) -> list[Any]:
    """Runs the trials that have not come to their end; all of them, as Ray has them.

    Args:
        arguments: of the sweep.
        base: the command of all trials.
        space: where they are.
        settings: of a trial.
        folder: of the sweep.
    """
    metric, mode = (MEAN_RETURN, "max") if settings.env else ON_THE_WAY.get(arguments.by, (None, None))
    beside = [
        *([] if settings.env is None else ["--env", settings.env]),
        *(["--trust-pickle"] if arguments.trust_pickle else []),
    ]
    with _ray(arguments.address) as ray:
        if settings.threads > (most := ray.cluster_resources().get("CPU", 0)):
            raise UserError(f"--threads {settings.threads}: Ray has {most:g} cores, and no trial would ever start")
        tune = imported("ray.tune", "ray")
        on_gpu = arguments.device.startswith("cuda") or (
            arguments.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        )
        trial = partial(
            _trial,
            base=base,
            beside=beside,
            runs=folder / RUNS,
            # Those that nobody stops on the way need not.
            together=settings.env is not None and not train.has_images(settings.spaces),
        )
        trainable = tune.with_resources(trial, {"cpu": settings.threads, "gpu": int(on_gpu)})
        place = str(folder / RAY)
        if _restorable(folder / RAY):
            tuner = tune.Tuner.restore(place, trainable, resume_errored=True)
        else:
            # Killed before Ray had begun: the same trials are drawn again.
            shutil.rmtree(place, ignore_errors=True)
            tuner = tune.Tuner(
                trainable,
                param_space=space.domains(tune, arguments.samples is not None),
                tune_config=tune.TuneConfig(
                    metric=metric,
                    mode=mode,
                    num_samples=arguments.samples or 1,
                    max_concurrent_trials=None if arguments.workers == "auto" else arguments.workers,
                    search_alg=_searcher(arguments),
                    scheduler=_scheduler(settings),
                    trial_dirname_creator=folder_name,
                ),
                run_config=tune.RunConfig(
                    name=RAY,
                    storage_path=str(folder),
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                    progress_reporter=tune.CLIReporter(
                        metric_columns=["step", *([metric] if metric else HELD_OUT)],
                        parameter_columns=space.names,
                        max_report_frequency=SECONDS_BETWEEN_TABLES,
                    ),
                    verbose=1,
                ),
            )
        tuner.fit()
        # Not Ray's results: of trials that have not begun, or never reported, there are none.
        return list(tune.ExperimentAnalysis(place).trials)


def _restorable(place: Path) -> bool:
    """Whether Ray's state is whole. Its files are not written in one step."""
    try:
        pickle.loads((place / "tuner.pkl").read_bytes())
        json.loads(max(place.glob("experiment_state-*.json")).read_bytes())
    except (OSError, EOFError, ValueError, pickle.UnpicklingError):
        return False
    return True


def _searcher(arguments: Sweep) -> Any:
    """What draws trials; None for a grid."""
    if arguments.samples is None:
        return None
    if arguments.search == "optuna":
        return imported("ray.tune.search.optuna", "ray").OptunaSearch(seed=arguments.seed)
    concurrent = 0 if arguments.workers == "auto" else arguments.workers
    return imported("ray.tune.search", "ray").BasicVariantGenerator(
        random_state=arguments.seed, max_concurrent=concurrent
    )


def _scheduler(settings: Settings) -> Any:
    """ASHA where there are evaluations; None for none."""
    if settings.env is None:
        return None
    n_steps = settings.hyperparameters.n_steps
    return imported("ray.tune.schedulers", "ray").ASHAScheduler(
        time_attr="step",
        max_t=n_steps,
        grace_period=max(n_steps // ASHA_PARTS, 1),
        reduction_factor=ASHA_FACTOR,
        # A run that has all its steps has its last evaluations still to make.
        stop_last_trials=False,
    )


def folder_name(trial: Any) -> str:
    """A trial's folder: its number, or what Optuna calls it, and its hyper-parameters."""
    values = (
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in trial.config.items()
    )
    return re.sub(r"[^\w.=+-]+", "_", "-".join([trial.trial_id.rpartition("_")[2], *values]))[:120]
