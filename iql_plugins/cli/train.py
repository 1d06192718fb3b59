"""``iql-plugins train``."""

import contextlib
import itertools
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iql_plugins import checkpoint
from iql_plugins.cli.arguments import PROGRAM, Train, option, starting_preset
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.figures import learning_curve
from iql_plugins.cli.health import data_warnings, run_warnings, warning_lines
from iql_plugins.cli.output import Result, json_text, note, table
from iql_plugins.cli.progress import reporter
from iql_plugins.cli.rollouts import environment_spaces, recorded_environment
from iql_plugins.cli.runs import RESULTS
from iql_plugins.cli.settings import (
    CHANGEABLE,
    CONFIG,
    COUNTS,
    METHODS,
    NARROW,
    Settings,
    available_cores,
    load_source,
    recorded_data,
    versions,
)
from iql_plugins.cli.statistics import Estimate, estimate, with_interval
from iql_plugins.cli.training import POLICY, Outcome, Progress, adapter_training, follow, resumed
from iql_plugins.cli.workers import LOCK, locked, train_all
from iql_plugins.config import IQLConfig
from iql_plugins.data import Dataset, DatasetError, summary
from iql_plugins.data.episodes import episode_returns
from iql_plugins.data.inspection import Statistics
from iql_plugins.data.intake import check_numbers
from iql_plugins.data.readers.shipped import NAMES
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training import distributed
from iql_plugins.training.distributed import Processes, ProcessLostError, UnequalWeightsError
from iql_plugins.training.learner import resolve_compile
from iql_plugins.training.multi_seed import widest_together

__all__ = ["InterruptedRun", "run"]

#: Options that go with --resume and --config and are no part of a run.
BESIDE = {"--json", "--workers", "--trust-pickle", "--env"}
#: Torch takes 64 bits, of which one is the sign.
LARGEST_SEED = 2**63
PICTURE = "learning_curve.png"


class InterruptedRun(KeyboardInterrupt):
    """Ctrl-C while a run was under way; the argument is the command that goes on with it."""


#: Yields what is told of a run's progress.
Reporter = Callable[[Settings], contextlib.AbstractContextManager[Callable[[Progress], None]]]


def run(arguments: Train, command_line: Sequence[str], reporter: Reporter = reporter) -> Result:
    """Trains, and says what came of it. Started by ``torchrun``, all of its processes train together.

    Args:
        arguments: parsed.
        command_line: what they were parsed from.
        reporter: who is told of the progress.

    Raises:
        UserError: for a mistake of the user, a file that cannot be written, or another process that is gone.
        InterruptedRun: on Ctrl-C; the run can be resumed.
    """
    check_libraries(arguments)
    if not distributed.launched():
        return _run(_prepared(arguments, command_line, None), arguments, command_line, reporter, None)
    if arguments.resume is None and arguments.run_dir is None and distributed.restarts()[1]:
        raise UserError("give --run-dir: processes that torchrun starts again (--max-restarts) go on in it")
    with mistakes(ProcessLostError, UnequalWeightsError), distributed.process_group() as processes:
        if processes.rank == 0:
            try:
                prepared = _prepared(arguments, command_line, processes)
            except BaseException:
                # The others wait for settings: they end, and leave it to this one to say why.
                processes.told(None)
                raise
            return _run(prepared, arguments, command_line, reporter, processes)
        if (told := processes.told(None)) is not None:
            follow(Settings.from_json(told), processes, trust_pickle=arguments.trust_pickle)
        return Result({})


class _Prepared(NamedTuple):
    """What a run needs before anything is written.

    Attributes:
        settings: of the run.
        source: the dataset.
        folder: wanted for the run; None for one that is yet to be named.
        goes_on: whether it is there.
        made_on: versions that the run was begun with.
        data: what its ``config.json`` says of the data; empty for what the source says.
    """

    settings: Settings
    source: Dataset
    folder: Path | None
    goes_on: bool
    made_on: dict[str, Any]
    data: dict[str, Any]


def _prepared(arguments: Train, command_line: Sequence[str], processes: Processes | None) -> _Prepared:
    if arguments.resume is not None:
        folder: Path | None = Path(arguments.resume)
        given = _check_alone(command_line, "--resume", *map(option, CHANGEABLE))
        settings, made_on = Settings.read(Path(arguments.resume) / CONFIG)
        data = recorded_data(Path(arguments.resume))
        check_environment(settings.env, arguments.env, arguments.resume)
        _note_differences(made_on)
        settings = resumed(_changed(settings, arguments, given), Path(arguments.resume))
        source = settings.load(trust_pickle=arguments.trust_pickle)
        prepared = _Prepared(settings, source, folder, True, made_on, data)
    else:
        # torchrun starts processes again with the command that a run was begun with.
        again = processes is not None and distributed.restarts()[1] > 0 and _is_run(arguments.run_dir)
        folder = None if again else empty_folder(arguments.run_dir)
        if arguments.config is not None:
            _check_alone(command_line, "--config", "--run-dir")
            settings, before = Settings.read(Path(arguments.config))
            check_environment(settings.env, arguments.env, arguments.config)
            _note_differences(before)
            source = settings.load(trust_pickle=arguments.trust_pickle)
        else:
            settings, source = new_settings(arguments)
        prepared = _Prepared(settings, source, folder, False, versions(), {})
        if again:
            assert arguments.run_dir is not None
            prepared = _gone_on(prepared, Path(arguments.run_dir))
    check(prepared.settings, prepared.source)
    if processes is not None:
        _check_processes(prepared.settings, arguments.workers, processes)
    return prepared


def _is_run(folder: str | None) -> bool:
    return folder is not None and (Path(folder) / CONFIG).exists()


def _gone_on(wanted: _Prepared, folder: Path) -> _Prepared:
    """The run that was begun in a folder, which must be the one that is wanted."""
    begun, made_on = Settings.read(folder / CONFIG)
    if names := [
        each.name for each in fields(Settings) if getattr(wanted.settings, each.name) != getattr(begun, each.name)
    ]:
        raise UserError(f"{folder} is another run, which differs in {', '.join(names)}: give another --run-dir")
    return _Prepared(resumed(begun, folder), wanted.source, folder, True, made_on, recorded_data(folder))


def _run(
    prepared: _Prepared,
    arguments: Train,
    command_line: Sequence[str],
    reporter: Reporter,
    processes: Processes | None,
) -> Result:
    settings, source = prepared.settings, prepared.source
    with mistakes(OSError):
        folder = made_folder(prepared.folder, settings.dataset)
    with locked(folder):
        if not prepared.goes_on:
            empty_folder(folder)
        for place in {folder, *(settings.folder(folder, unit) for unit in settings.units)}:
            for leftover in checkpoint.leftovers(place):
                leftover.unlink()
        with mistakes(OSError):
            # Those of a run that goes on may be mapped from a folder, which does not say where they came from.
            settings.write(folder, prepared.made_on, prepared.data or _described(source))
        note(f"run directory: {folder}")
        for warning in data_warnings(settings, source):
            note(f"{warning['code']}: {warning['message']}: {warning['suggestion']}")
        with _to_be_resumed(folder, settings.env):
            return _train(settings, source, folder, arguments, command_line, reporter, processes)


def check_libraries(arguments: Train) -> None:
    """Raises :class:`UserError` for a package that is missing, before time is spent on training."""
    for module in ("matplotlib.figure", "rich.progress", "scipy.stats"):
        imported(module)
    if arguments.tensorboard:
        imported("torch.utils.tensorboard", "tensorboard")


def new_settings(arguments: Train) -> tuple[Settings, Dataset]:
    """The settings of a new run, automatic choices resolved, and its dataset.

    Raises:
        UserError: for a value out of range, or a dataset or environment that is not there.
    """
    _check_counts(arguments)
    if not 0 <= arguments.seed <= LARGEST_SEED - arguments.seeds:
        raise UserError(f"--seed must be at least 0, and the last one below 2**63, got {arguments.seed}")
    if not 0.0 <= arguments.hold_out < 1.0:
        raise UserError(f"--hold-out must be a share of the episodes, in [0, 1), got {arguments.hold_out}")
    spaces = None if arguments.env is None else environment_spaces(arguments.env)
    source = load_source(
        arguments.dataset,
        trust_pickle=arguments.trust_pickle,
        discrete=None if spaces is None else spaces.discrete,
        memmap_dir=arguments.memmap_dir,
    )
    env = arguments.env
    if env is None:
        env, spaces = _environment_of(source, arguments.dataset)
    if spaces is None:
        with mistakes(ValueError):
            spaces = Spaces.from_dataset(source.tensors) if source.spaces is None else source.spaces
    config = arguments.hyperparameters
    device = device_name(arguments.device)
    n_steps = config.n_steps
    config = config.replace(compile=resolve_compile(config.compile, n_steps, torch.device(device)))
    methods = 1 if arguments.baseline == "none" else 2
    stack = stack_size(arguments, methods, spaces, device)
    workers = worker_count(arguments.workers, methods * math.ceil(arguments.seeds / stack), device)
    settings = Settings(
        adapter=arguments.adapter,
        dataset_sha256=source.sha256,
        transitions=len(source.tensors),
        env=env,
        spaces=spaces,
        preset=starting_preset(arguments.preset, arguments.dataset),
        hyperparameters=config,
        baseline=arguments.baseline,
        seeds=tuple(range(arguments.seed, arguments.seed + arguments.seeds)),
        stack=stack,
        hold_out=arguments.hold_out,
        **_changeable(arguments, config, device, workers),
    )
    return settings, source


def _changeable(arguments: Train, config: IQLConfig, device: str, workers: int) -> dict[str, Any]:
    """The settings of ``CHANGEABLE`` but for n_steps, automatic choices resolved."""
    return {
        "dataset": wherever(arguments.dataset),
        "memmap_dir": None if arguments.memmap_dir is None else os.path.abspath(arguments.memmap_dir),
        "episodes": arguments.episodes,
        "evaluation_episodes": arguments.evaluation_episodes,
        "evaluate_every": _every(arguments.evaluate_every, config.n_steps, parts=10, most=10_000),
        "log_every": _every(arguments.log_every, config.n_steps, parts=100, most=1_000),
        "device": device,
        "threads": _threads(arguments.threads, workers, _hidden_sizes(config)),
        "tensorboard": arguments.tensorboard,
    }


def _changed(settings: Settings, arguments: Train, given: Set[str]) -> Settings:
    """A run's settings with those that the command line gives.

    Raises:
        UserError: for an end before the one that the run has, or a value out of range.
    """
    _check_counts(arguments)
    if option("n_steps") in given:
        wanted, n_steps = arguments.hyperparameters.n_steps, settings.hyperparameters.n_steps
        if wanted < n_steps:
            raise UserError(f"--n-steps {wanted}: the run has {n_steps}, which can be raised, and not lowered")
        settings = settings if wanted == n_steps else settings.prolonged(wanted)
    device = device_name(arguments.device) if option("device") in given else settings.device
    workers = worker_count(arguments.workers, len(settings.groups), device)
    values = _changeable(arguments, settings.hyperparameters, device, workers)
    return replace(settings, **{name: value for name, value in values.items() if option(name) in given})


def _check_counts(arguments: Train) -> None:
    for name in ("seeds", "workers", *COUNTS):
        value = getattr(arguments, name)
        if value != "auto" and value < 1:
            raise UserError(f"{option(name)} must be at least 1, got {value}")


def wherever(dataset: str) -> str:
    """A dataset's path or name, from whatever folder the run goes on in. A name that ships wins over a path."""
    return os.path.abspath(dataset) if dataset not in NAMES and os.path.exists(dataset) else dataset


def _environment_of(source: Dataset, dataset: str) -> tuple[str | None, Spaces | None]:
    """The environment that a dataset names, if it can be made here."""
    env = recorded_environment(source.env, dataset)
    if env is None:
        note("no --env was given, and the dataset names none: there will be no evaluations")
        return None, None
    try:
        return env, environment_spaces(env)
    except UserError as error:
        note(f"{error}: there will be no evaluations")
        return None, None


def device_name(name: str) -> str:
    """Torch's name of a device; ``"auto"`` is the GPU if there is one.

    Raises:
        UserError: for a name that torch does not know, or a GPU that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be auto, cpu, cuda or another of torch's devices, got {name!r}") from error
    if device.type == "meta":
        raise UserError("--device meta has no numbers: nothing can be trained there")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"there is no GPU here for --device {name}")
    return name


def worker_count(wanted: int | str, groups: int, device: str) -> int:
    """Processes at a time: one for each core, or one on a GPU."""
    if isinstance(wanted, int):
        return wanted
    return min(groups, available_cores()) if torch.device(device).type == "cpu" else 1


def stack_size(arguments: Train, methods: int, spaces: Spaces, device: str) -> int:
    """How many seeds take their steps together.

    On a GPU all; on a CPU those of narrow networks, see :func:`~iql_plugins.training.multi_seed.widest_together`.

    Raises:
        UserError: if it is more than one for a training that cannot be stacked.
    """
    obstacle = stack_obstacle(arguments)
    if arguments.stack != "auto":
        if obstacle is not None and arguments.stack > 1:
            raise UserError(f"--stack {arguments.stack}: {obstacle}; use --stack 1")
        return min(arguments.stack, arguments.seeds)
    if obstacle is not None or has_images(spaces):
        return 1
    if torch.device(device).type != "cpu":
        return arguments.seeds
    config = arguments.hyperparameters
    compiled = resolve_compile(config.compile, config.n_steps, torch.device(device)) == "yes"
    if max(_hidden_sizes(config), default=0) > widest_together(compiled=compiled):
        return 1
    units = methods * arguments.seeds
    return min(arguments.seeds, math.ceil(units / worker_count(arguments.workers, units, device)))


def stack_obstacle(arguments: Train) -> str | None:
    """Why seeds cannot take their steps together; None if they can."""
    if distributed.launched():
        return "processes that torchrun has started train one seed at a time"
    if adapter_training(arguments.adapter).fit_together is None:
        return f"adapter {arguments.adapter!r} trains one seed at a time"
    return None


def has_images(spaces: Spaces) -> bool:
    """Whether an observation is an image, which no stack is faster with."""
    return any(isinstance(kind, Box) and len(kind.shape) > 1 for kind in spaces.observations.values())


def _hidden_sizes(config: IQLConfig) -> tuple[int, ...]:
    """Of all networks."""
    return config.sizes_of("actor") + config.sizes_of("critic")


def _threads(wanted: int | str, workers: int, hidden_sizes: Sequence[int]) -> int:
    if isinstance(wanted, int):
        return wanted
    alone = workers == 1 and max(hidden_sizes, default=0) > NARROW
    return max(1, available_cores() // distributed.local_count()) if alone else 1


def _every(wanted: int | str, n_steps: int, *, parts: int, most: int) -> int:
    return wanted if isinstance(wanted, int) else max(1, min(n_steps // parts, most))


def _described(source: Dataset) -> dict[str, Any]:
    """What a report says of the data of a run, beside their names and digest."""
    if (known := summary.of(source.tensors)) is not None:
        document = {"episodes": known.episodes, "returns": asdict(Statistics(*known.returns))}
    else:
        returns = episode_returns(source.tensors)
        document = {"episodes": len(returns), "returns": asdict(Statistics.of(returns))}
    return document | {"provenance": dict(source.provenance)} if source.provenance else document


def check(settings: Settings, source: Dataset) -> None:
    """Raises :class:`UserError` for what would fail at the first step, before there is a run directory."""
    training = adapter_training(settings.adapter)
    if settings.env is not None:
        environment_spaces(settings.env)
    device_name(settings.device)
    settings.held_out(source)
    agent = settings.agent(*settings.trained(source), settings.units[0])
    with mistakes(DatasetError):
        clip_all = settings.hyperparameters.clip_all_actions
        excess = check_numbers(source.tensors, settings.spaces, clip_all_actions=clip_all)
    if excess.count:
        note(f"{settings.dataset}: {excess}: they are clipped, as the environment clips them")
    # Not every framework takes every space.
    with mistakes(ValueError, TypeError, NotImplementedError):
        training.from_agent(agent)


def _check_processes(settings: Settings, workers: int | str, processes: Processes) -> None:
    """Raises :class:`UserError` for what processes cannot do together."""
    if settings.stack > 1 or workers not in ("auto", 1):
        raise UserError(
            "processes that torchrun has started train one seed after another: leave out --workers and --stack; "
            "a run that was begun with stacked seeds goes on without torchrun"
        )
    own = torch.cuda.device_count() >= distributed.local_count() and ":" not in settings.device
    if torch.device(settings.device).type == "cuda" and not own:
        raise UserError(
            f"--device cuda gives each of {distributed.local_count()} processes on a machine a GPU of its own, of "
            f"which this one has {torch.cuda.device_count()}; got --device {settings.device}"
        )
    if (size := settings.hyperparameters.batch_size) % processes.count:
        raise UserError(
            f"--batch-size is that of all processes together, a multiple of their number, which is "
            f"{processes.count}, got {size}"
        )


def _check_alone(command_line: Sequence[str], name: str, *also: str) -> set[str]:
    """The options that were given; :class:`UserError` for those that cannot stand beside one."""
    allowed = BESIDE | {name, *also}
    given = {word.partition("=")[0].replace("_", "-") for word in command_line if word.startswith("--")}
    if wrong := sorted(given - allowed):
        raise UserError(
            f"{', '.join(wrong)}: {name} takes everything from the run's {CONFIG}; beside it there can be "
            f"{', '.join(sorted(allowed - {name}))}"
        )
    return given


def check_environment(recorded: str | None, given: str | None, file: object) -> None:
    """Raises :class:`UserError` unless a run's environment is the one given, or needs not to be given."""
    if given is None:
        recorded_environment(recorded, file)
    elif given != recorded:
        raise UserError(
            f"--env {given} is not the environment of {file}, which is {recorded!r}: leave it out, or give that"
        )


def _note_differences(made_on: dict[str, Any]) -> None:
    before, now = made_on.get("packages", {}), versions()["packages"]
    changed = [f"{name} {before[name]} (now {now.get(name)})" for name in before if before[name] != now.get(name)]
    if changed:
        note(f"the run was made with {', '.join(changed)}: numbers may differ in their last digits")


def empty_folder(wanted: str | Path | None, command: str = "train") -> Path | None:
    """The folder that a command is to fill; :class:`UserError` if anything is in it already."""
    if wanted is None:
        return None
    folder = Path(wanted)
    # A run that was killed in its first moments has no configuration: it is begun again, not gone on with.
    if folder.exists() and (
        not folder.is_dir() or {*folder.iterdir()} - {folder / LOCK, *checkpoint.leftovers(folder, CONFIG)}
    ):
        raise UserError(f"{folder} exists: give another --run-dir, or go on with it: {PROGRAM} {command} --resume")
    return folder


def made_folder(wanted: Path | None, dataset: str, parent: str = "runs") -> Path:
    """The run directory, which is there; by default one that no other process has made."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    name = re.sub(r"[^\w.-]+", "-", Path(dataset).stem if os.path.exists(dataset) else dataset)
    stem = Path(parent) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for count in itertools.count(1):
        folder = stem if count == 1 else stem.with_name(f"{stem.name}-{count}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


@contextlib.contextmanager
def _to_be_resumed(folder: Path, env: str | None) -> Iterator[None]:
    """Says how a run goes on that was interrupted, or that the system had no room for."""
    again = str(folder) if env is None or ":" not in env else f"{folder} --env {env}"
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRun(f"train --resume {again}") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{error}; when that is over, go on with {PROGRAM} train --resume {again}") from error


def _train(
    settings: Settings,
    source: Dataset,
    folder: Path,
    arguments: Train,
    command_line: Sequence[str],
    reporter: Reporter,
    processes: Processes | None,
) -> Result:
    workers = 1 if processes is not None else worker_count(arguments.workers, len(settings.groups), settings.device)
    start = time.monotonic()
    if processes is not None:
        processes.told(settings.to_json())
    with reporter(settings) as report:
        options: dict[str, Any] = {"trust_pickle": arguments.trust_pickle, "processes": processes}
        outcomes = train_all(settings, folder, workers, report, **options)
    if processes is not None:
        # There are no more steps to take together.
        processes.told(None)
    seconds = time.monotonic() - start
    data = estimate([episode_returns(source.tensors).tolist()])
    estimates = _estimates(settings, outcomes, data)
    learning_curve(settings, folder, outcomes, data, folder / PICTURE)
    document: dict[str, Any] = {
        "run_dir": str(folder),
        "policy": str(settings.folder(folder, settings.units[0]) / POLICY),
        "learning_curve": str(folder / PICTURE),
        "dataset": settings.dataset,
        "env": settings.env,
        "adapter": settings.adapter,
        "seeds": list(settings.seeds),
        "episodes": settings.episodes,
        "n_steps": settings.hyperparameters.n_steps,
        "results": {name: value.as_dict(settings.env) for name, value in estimates.items()},
        "by_seed": [_unit_document(outcome) for outcome in outcomes],
        "warnings": run_warnings(settings, source, folder, estimates),
        "stack": settings.stack,
        "workers": workers,
        "processes": 1 if processes is None else processes.count,
        "seconds": seconds,
        "environment": versions(),
        "command": shlex.join([PROGRAM, *command_line]),
    }
    checkpoint.write_bytes(folder / RESULTS, (json_text(document) + "\n").encode())
    parts = [_table(settings, outcomes, estimates), *warning_lines(document["warnings"])]
    return Result(document, [*parts, *_closing_lines(settings, document, outcomes)])


def _estimates(settings: Settings, outcomes: Sequence[Outcome], data: Estimate) -> dict[str, Estimate]:
    """The rows of the table, by name."""
    rows = {"data": data}
    if settings.env is None:
        return rows
    for method, title in (("bc", METHODS["bc"]), ("iql", "IQL final")):
        if returns := [outcome.final_returns for outcome in outcomes if outcome.unit.method == method]:
            rows[title] = estimate(returns)
    rows["IQL best"] = estimate([outcome.best_returns for outcome in outcomes if outcome.unit.method == "iql"])
    return rows


def _unit_document(outcome: Outcome) -> dict[str, Any]:
    document = asdict(outcome) | {"unit": None, "seed": outcome.unit.seed, "method": METHODS[outcome.unit.method]}
    del document["unit"]
    for name in ("final", "best"):
        if returns := document[f"{name}_returns"]:
            document[f"{name}_mean_return"] = sum(returns) / len(returns)
    return document


def _table(settings: Settings, outcomes: Sequence[Outcome], estimates: dict[str, Estimate]) -> Any:
    documents = {name: value.as_dict(settings.env) for name, value in estimates.items()}
    scored = any("normalized_score" in document for document in documents.values())
    columns = ["", "mean return", "95% interval", *(["normalised score"] if scored else [])]
    rows = []
    for name, value in estimates.items():
        row = [name, f"{value.mean:.1f}", value.interval]
        rows.append(row + ([f"{documents[name]['normalized_score']:.1f}"] if scored else []))
    return table(columns, rows)


def _closing_lines(settings: Settings, document: dict[str, Any], outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    if settings.env is None:
        for outcome in outcomes:
            losses = [f"{name} {outcome.metrics[name]:.4g}" for name in outcome.metrics if name.startswith("loss_")]
            lines.append(f"{outcome.unit.title}: {', '.join(losses)}")
    else:
        lines.append(
            f"{settings.env}: {settings.episodes} episodes, {len(settings.seeds)} seed(s); best: of the evaluations on "
            "the way, by other episodes"
        )
    for outcome in outcomes:
        if outcome.held_out:
            told = ", ".join(
                f"{name} {with_interval(value['value'], *value['confidence_95'])}"
                for name, value in outcome.held_out.items()
            )
            lines.append(f"held-out episodes, {outcome.unit.title}: {told}")
    if settings.hyperparameters.compile == "yes":
        lines.append(f"compiled in {sum(outcome.warm_up_seconds for outcome in outcomes):.1f} s in all")
    lines.append(f"policy: {document['policy']}")
    lines.append(f"learning curve: {document['learning_curve']}")
    return lines
