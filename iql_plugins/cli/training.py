"""One training: metrics, evaluations and checkpoints beside the gradient steps; and how it goes on after an end."""

import base64
import contextlib
import csv
import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from iql_plugins import checkpoint
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.cli.arguments import as_options
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.output import note
from iql_plugins.cli.rollouts import rollouts
from iql_plugins.cli.settings import CONFIG, METHODS, Settings, Unit
from iql_plugins.config import IQLConfig
from iql_plugins.data.dataset import one_line
from iql_plugins.data.episodes import EpisodeRows
from iql_plugins.hookspecs import Training
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.ope import Criterion, Policy, action_agreement, initial_qvalue, td_error
from iql_plugins.plugins import AdapterNotFoundError, PluginError, host
from iql_plugins.spaces import Spaces
from iql_plugins.training import distributed
from iql_plugins.training.agent import Agent, Observer
from iql_plugins.training.distributed import Processes
from iql_plugins.training.learner import DivergenceError

__all__ = [
    "Outcome",
    "Progress",
    "adapter_training",
    "evaluation_seeds",
    "follow",
    "metrics_rows",
    "reached",
    "resumed",
    "train",
]

CHECKPOINT, POLICY, BEST, METRICS = (
    "checkpoint.safetensors",
    "policy.safetensors",
    "policy_best.safetensors",
    "metrics.csv",
)
#: A checkpoint of one in a stack that counts as soon as that of the first is of the same step.
PENDING = "checkpoint_pending.safetensors"
#: The best policy is chosen by other episodes than those it is measured by: the luckiest of many is not the best.
SELECTION_SEED = 10_000
#: Of the policy on held-out episodes, in units of a reward, in [0, 1], and in return units.
HELD_OUT = ("held_out_td_error", "held_out_agreement", "held_out_value")
#: What chooses the best policy where there is no environment to play it in, once values have settled.
CHOOSING = "held_out_value"
#: Beside those after each evaluation, so that little is lost when a run is killed.
SECONDS_BETWEEN_CHECKPOINTS = 30.0
SECONDS_BETWEEN_REPORTS = 0.2
_EXTRA = "run"


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        unit: which.
        step: gradient steps taken.
        rate: gradient steps a second since it was started, evaluations included.
        metrics: the latest losses; empty before the first.
        held_out: of the latest evaluation, what held-out episodes tell, see :data:`HELD_OUT`; empty without them.
        mean_return: of the latest evaluation; None before the first.
        evaluated: whether that evaluation has just been made.
        compiles: whether its first step in this process, which is compiled, is yet to be taken; of trainings that take
            their steps together the first one says so.
    """

    unit: Unit
    step: int
    rate: float
    metrics: Mapping[str, float]
    held_out: Mapping[str, float]
    mean_return: float | None
    evaluated: bool
    compiles: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        unit: which.
        evaluations: step and returns of the evaluations on the way.
        final_returns: of the last policy, one an episode; empty without an environment.
        best_returns: of the policy that was best on the way.
        best_step: when that was.
        metrics: the last row of metrics.csv.
        seconds: that this process took for its gradient steps and evaluations on the way; with those of the trainings
            that took their steps together with it.
        warm_up_seconds: of these, its share of the time for tracing and compiling.
        steps: gradient steps that this process took, like ``seconds`` since the last end of a run that was prolonged.
        changes: of the settings while the run was interrupted: the step from which on they hold, and by name the value
            before and the one from there on.
        held_out: the criteria of the last policy on held-out episodes, with intervals; empty without them.
    """

    unit: Unit
    evaluations: list[tuple[int, list[float]]]
    final_returns: list[float]
    best_returns: list[float]
    best_step: int | None
    metrics: dict[str, float]
    seconds: float
    warm_up_seconds: float
    steps: int
    changes: list[dict[str, Any]]
    held_out: dict[str, dict[str, Any]]


def settling_steps(config: IQLConfig) -> float:
    r"""Gradient steps until values are where the data's rewards lead them, but for a twentieth.

    .. math:: n = \frac{3}{\tau (1 - \gamma)}, \qquad \big(1 - \tau (1 - \gamma)\big)^n \approx e^{-3}

    They begin at 0, and come closer by a share of :math:`\tau (1 - \gamma)` at each step. Until then they tell how long
    was trained, and not how well: the longer, the higher where returns are positive, and the lower where they are
    negative.

    >>> settling_steps(IQLConfig(polyak=0.005, discount=0.99))
    60000.0
    """
    share = config.polyak * (1.0 - config.discount)
    return round(3.0 / share, 6) if share else math.inf


def evaluation_seeds(episodes: int, first: int = 0) -> range:
    """The seeds of an evaluation's episodes: episode i starts from seed ``first + i``."""
    return range(first, first + episodes)


def adapter_training(name: str) -> Training:
    """How an adapter trains.

    Raises:
        UserError: if there is no such adapter, it is broken, its framework is missing, or it does not train.
    """
    with mistakes(AdapterNotFoundError, PluginError):
        adapter = host().load(name)
    if adapter.training is None:
        raise UserError(f"adapter {name!r} has no training for the command line: use its classes from Python")
    return adapter.training


def train(
    settings: Settings,
    units: Sequence[Unit],
    run: Path,
    report: Callable[[Progress], None],
    *,
    trust_pickle: bool = False,
    processes: Processes | None = None,
) -> list[Outcome]:
    """Trains from the last checkpoints, or from the beginning, to the end; then measures the last and the best policy.

    Args:
        settings: of the run.
        units: which trainings: one, or several that take their steps together.
        run: the run directory.
        report: told a few times a second how far they are.
        trust_pickle: whether the dataset may be a pickle.
        processes: of which this one, the first, does all but a part of each batch; the others :func:`follow`.

    Returns:
        In the order of ``units``.

    Raises:
        UserError: for a dataset that has changed, or an adapter that is missing.
        DivergenceError: if losses or weights are no longer finite; the checkpoint before that stays.
    """
    training = adapter_training(settings.adapter)
    folders = [settings.folder(run, unit) for unit in units]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    _settle(folders)
    with _torch_state(settings), _quiet_agents():
        source = settings.load(trust_pickle=trust_pickle)
        held_out, (dataset, kept) = settings.held_out(source), settings.trained(source)
        while True:
            trainers = [_Trainer(settings, unit, run, report, training, dataset, kept, held_out) for unit in units]
            # Earlier releases did not save a stack as one: killed in between, its trainings have not all come as far.
            for step in sorted({trainer.first_step for trainer in trainers}):
                _fit([trainer for trainer in trainers if trainer.first_step == step], training, dataset, processes)
            if all(trainer.settings == settings for trainer in trainers):
                return [trainer.outcome() for trainer in trainers]


def follow(settings: Settings, processes: Processes, *, trust_pickle: bool = False) -> None:
    """Takes the steps of the first process's :func:`train` with it, until it says that there are no more.

    Args:
        settings: of the run.
        processes: those that train together.
        trust_pickle: whether the dataset may be a pickle.

    Raises:
        UserError: as :func:`train`.
        DivergenceError: likewise.
        ProcessLostError: if another process is gone.
    """
    training = adapter_training(settings.adapter)
    with _torch_state(settings), _quiet_agents():
        dataset, kept = settings.trained(settings.load(trust_pickle=trust_pickle))
        while (told := processes.told(None)) is not None:
            state, steps = told
            agent = Agent.from_state(*state, name="the first process's agent", device=settings.device)
            algorithm = training.from_agent(agent)
            learner = training.to_agent(algorithm).learner
            distributed.synchronize(learner)
            learner.kept = kept
            check_equal = partial(_check_equal, processes, learner.loss, settings.at(learner.step_count))
            training.fit(algorithm, dataset, steps, check_equal)


def resumed(settings: Settings, run: Path) -> Settings:
    """The settings that a run goes on with, which are those of its checkpoints but for what can be changed.

    Args:
        settings: wanted.
        run: the run directory.

    Raises:
        UserError: if a checkpoint has others; names both values.
    """
    paths = sorted(path for where in ("", "bc/", "seed-*/", "seed-*/bc/") for path in run.glob(where + CHECKPOINT))
    documents = {path: _read(path)[0] for path in paths}
    written = {path: _written(path, document, settings) for path, document in documents.items()}
    n_steps = settings.hyperparameters.n_steps
    ends = max((before.ends for _, before in written.values()), key=len, default=settings.ends)
    if settings.earlier_ends == ends[:-1] and n_steps > ends[-1]:
        # Prolonged by hand.
        settings = replace(settings, earlier_ends=ends)
    changed: dict[str, list[Any]] = {}
    for path, (step, before) in written.items():
        changed |= settings.at(step).changes(before, str(path))
    folders = {settings.folder(run, unit) for unit in settings.units}
    if strange := [str(path) for path in written if path.parent not in folders]:
        raise UserError(f"{', '.join(strange)}: none of the trainings of {run / CONFIG}; its seeds have been changed")
    for name, (old, new) in changed.items():
        note(f"{name} was {old!r}, and is {new!r} from here on")
    return settings


def reached(folder: Path) -> tuple[int, list[tuple[int, list[float]]]]:
    """How far a training has come: the step of its checkpoint, and its evaluations until then.

    Args:
        folder: of the training.

    Raises:
        UserError: for a checkpoint that is damaged, or none of a run.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, []
    document, _ = _read(path)
    try:
        return _step(document), _State.from_json(document["extra"][_EXTRA]).evaluations
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _none_of_a_run(path, error) from error


def _settle(folders: Sequence[Path]) -> None:
    """Ends what :func:`_save` was killed in: all checkpoints of a stack are of the step that the first one is of."""
    for folder in folders[1:]:
        pending = folder / PENDING
        if pending.exists():
            first = folders[0] / CHECKPOINT
            if first.exists() and _step(_read(first)[0]) == _step(_read(pending)[0]):
                os.replace(pending, folder / CHECKPOINT)
            else:
                pending.unlink()


def _save(trainers: "Sequence[_Trainer]") -> None:
    """Writes the checkpoints of trainings that take their steps together: killed at any moment, it wrote all or none.

    A policy is a copy of the checkpoint of its step. It is written after that, so that whoever goes on can write it.
    """
    first, *others = trainers
    for trainer in others:
        trainer.save(PENDING)
    first.save(CHECKPOINT)
    for trainer in others:
        os.replace(trainer.folder / PENDING, trainer.folder / CHECKPOINT)
    for trainer in trainers:
        trainer.write_policies()


def _fit(
    trainers: "Sequence[_Trainer]", training: Training, dataset: TensorDictBase, processes: Processes | None
) -> None:
    """Takes the steps that are left, which are as many for all."""
    first = trainers[0]
    saved = time.monotonic()
    check_equal = partial(_check_equal, processes, first.agent.loss, first.settings)

    def after_step(step: int) -> None:
        nonlocal saved
        check_equal(step)
        for trainer in trainers:
            trainer.after_step(step)
        now, settings = time.monotonic(), first.settings
        if settings.evaluates(step) or (settings.logs(step) and now - saved > SECONDS_BETWEEN_CHECKPOINTS):
            _save(trainers)
            saved = now
        # Whoever is told of an evaluation, and ends the training for it, finds it in the checkpoint.
        for trainer in trainers:
            trainer.tell(step)

    steps = first.steps
    with _divergence_named(trainers), contextlib.ExitStack() as stack:
        for trainer in trainers:
            stack.enter_context(trainer.started())
        if steps == 0:
            return
        if first.agent.learner.compiled:
            first.report(Progress(first.unit, first.first_step, 0.0, first.metrics, {}, None, False, compiles=True))
        if processes is not None:
            # These are trained alone, see train.run.
            agent = first.agent
            processes.told((agent.state(), steps))
            distributed.synchronize(agent.learner)
        if len(trainers) == 1:
            training.fit(first.algorithm, dataset, steps, Observer(after_step))
        else:
            assert training.fit_together is not None
            training.fit_together([trainer.algorithm for trainer in trainers], dataset, steps, after_step)


def _check_equal(processes: Processes | None, loss: IQLLoss, settings: Settings, step: int) -> None:
    """In each of several processes, before the first one may save a step."""
    if processes is not None and settings.logs(step):
        processes.check_equal(loss)


class _Trainer:
    def __init__(
        self,
        settings: Settings,
        unit: Unit,
        run: Path,
        report: Callable[[Progress], None],
        training: Training,
        dataset: TensorDictBase,
        kept: EpisodeRows | None,
        held_out: TensorDictBase | None,
    ) -> None:
        self.held_out = held_out
        self.unit, self.report, self.training = unit, report, training
        self.folder = settings.folder(run, unit)
        self.settings = settings.at(0)
        self.state = _State()
        self.metrics: dict[str, float] = {}
        self.told: dict[str, float] = {}
        torch.manual_seed(unit.seed)
        path = self.folder / CHECKPOINT
        if path.exists():
            document, tensors = _read(path)
            self.state = _State.from_json(document["extra"][_EXTRA])
            self.settings = settings.at(_step(document))
            if changes := self.settings.changes(_settings_of(document, settings), str(path)):
                self.state.changes.append({"step": _step(document), **changes})
            document["config"]["n_steps"] = self.settings.hyperparameters.n_steps
            with mistakes(CheckpointError):
                agent = Agent.from_state(document, tensors, name=str(path), device=settings.device)
        else:
            agent = self.settings.agent(dataset, kept, unit)
        self.algorithm = training.from_agent(agent)
        self.agent.learner.kept = kept
        self.first_step = agent.learner.step_count
        self.table = _MetricsFile(
            self.folder / METRICS, self.first_step, (*(() if held_out is None else HELD_OUT), "mean_return")
        )
        if self.first_step:
            self.state.restore_random_state(agent.device)
            self.metrics = self.table.last
            self.write_policies()

    @property
    def agent(self) -> Agent:
        return self.training.to_agent(self.algorithm)

    @property
    def steps(self) -> int:
        """Gradient steps that are left for this process."""
        return max(self.settings.hyperparameters.n_steps - self.first_step, 0)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Files are open, and the clock runs, inside."""
        self.begin = self.reported = time.monotonic()
        with contextlib.ExitStack() as stack:
            self.events = stack.enter_context(_events(self.settings.tensorboard, self.folder, self.first_step))
            stack.enter_context(self.table)
            yield
        self.seconds = time.monotonic() - self.begin

    def outcome(self) -> Outcome:
        """What the training came to, with the evaluations in the end."""
        agent, episodes = self.agent, self.settings.episodes
        final, best = self._returns(agent, episodes), list[float]()
        if self.state.best_step is not None:
            best = self._returns(self._best(), episodes)
        return Outcome(
            self.unit,
            [(step, list(returns)) for step, returns in self.state.evaluations],
            final,
            best,
            self.state.best_step,
            self.metrics,
            self.seconds,
            agent.learner.warm_up_seconds,
            self.steps,
            self.state.changes,
            {name: criterion.as_dict() for name, criterion in self._criteria(agent).items()},
        )

    def _best(self) -> Agent:
        path = self.folder / BEST
        with mistakes(CheckpointError, FileNotFoundError):
            agent = Agent.load(path, device=self.settings.device)
        if agent.learner.step_count != self.state.best_step:
            raise UserError(
                f"{path} is of step {agent.learner.step_count}, the best policy was that of step "
                f"{self.state.best_step}, which is lost: start another run"
            )
        return agent

    def after_step(self, step: int) -> None:
        """Does what is due after a gradient step, which depends on the step alone."""
        if self.settings.logs(step):
            self._log(step, self.settings.evaluates(step))

    def tell(self, step: int) -> None:
        """Reports how far the training is, if that is due."""
        evaluates, now = self.settings.evaluates(step), time.monotonic()
        if evaluates or now - self.reported > SECONDS_BETWEEN_REPORTS:
            self.reported = now
            rate = (step - self.first_step) / max(now - self.begin, 1e-9)
            evaluations = self.state.evaluations
            mean_return = float(np.mean(evaluations[-1][1])) if evaluations else None
            self.report(Progress(self.unit, step, rate, self.metrics, self.told, mean_return, evaluates))

    def _log(self, step: int, evaluates: bool) -> None:
        settings, metrics = self.settings, self.agent.learner.metrics()
        row = dict(metrics)
        if evaluates:
            self.told = {name: criterion.value for name, criterion in self._criteria(self.agent).items()}
            row |= self.told
            state, score = self.state, row.get(CHOOSING)
            # Until values have settled, the latest policy is the best.
            settled = settling_steps(settings.hyperparameters) if settings.env is None else 0.0
            if settings.env is not None:
                returns = self._returns(self.agent, settings.evaluation_episodes, SELECTION_SEED)
                score = row["mean_return"] = float(np.mean(returns))
                state.evaluations.append((step, returns))
            if score is not None and (state.best_step is None or state.best_step < settled or score > state.best_score):
                state.best_step, state.best_score = step, score
        self.metrics = metrics
        self.table.append(step, row)
        for name, value in row.items():
            self.events(name, value, step)

    def _returns(self, agent: Agent, episodes: int, first_seed: int = 0) -> list[float]:
        if self.settings.env is None:
            return []
        seeds = evaluation_seeds(episodes, first_seed)
        return [episode.total for episode in rollouts(agent.act, self.settings.env, seeds)]

    def _criteria(self, agent: Agent) -> dict[str, Criterion]:
        """Those of :data:`HELD_OUT`, which take a pass over the held-out episodes; none without them."""
        data = self.held_out
        if data is None:
            return {}
        found = (
            td_error(agent, data),
            action_agreement(Policy.of(agent), data, agent.spaces),
            initial_qvalue(agent, data),
        )
        return dict(zip(HELD_OUT, found, strict=True))

    def save(self, name: str) -> None:
        """Writes a checkpoint of the agent, and of the run."""
        agent = self.agent
        agent.extra[_EXTRA] = self.state.to_json(agent.device) | {
            "env": self.settings.env,
            "method": METHODS[self.unit.method],
            "dataset": self.settings.dataset,
            "settings": self.settings.to_json(),
        }
        agent.save(self.folder / name)

    def write_policies(self) -> None:
        """Copies the checkpoint to the policies that it is."""
        step = self.agent.learner.step_count
        for name, wanted in ((BEST, self.state.best_step), (POLICY, self.settings.hyperparameters.n_steps)):
            if step == wanted:
                checkpoint.write_bytes(self.folder / name, (self.folder / CHECKPOINT).read_bytes())


@dataclass
class _State:
    """What a checkpoint of the command line holds beside the agent."""

    evaluations: list[tuple[int, list[float]]] = field(default_factory=list)
    best_step: int | None = None
    best_score: float = -math.inf
    random_state: dict[str, str] = field(default_factory=dict)
    #: See :class:`Outcome`.
    changes: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self, device: torch.device) -> dict[str, Any]:
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return {
            "evaluations": [[step, returns] for step, returns in self.evaluations],
            "best_step": self.best_step,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "changes": self.changes,
            "random_state": {
                name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()
            },
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "_State":
        evaluations = [(int(step), list(returns)) for step, returns in document["evaluations"]]
        means = {step: float(np.mean(returns)) for step, returns in evaluations}
        best = document["best_step"]
        changes = list(document.get("changes", ()))
        # Earlier releases chose by these returns alone.
        score = document.get("best_score")
        score = means.get(best, -math.inf) if score is None else float(score)
        return cls(evaluations, best, score, dict(document["random_state"]), changes)

    def restore_random_state(self, device: torch.device) -> None:
        states = {name: _bytes(text) for name, text in self.random_state.items()}
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The document and the tensors of a run's checkpoint."""
    with mistakes(CheckpointError):
        document, tensors = checkpoint.read(path)
    if _EXTRA not in document.get("extra", {}):
        raise UserError(f"{path} is not this run's: it has no state of a run")
    return document, tensors


def _written(path: Path, document: Mapping[str, Any], settings: Settings) -> tuple[int, Settings]:
    """The step of a checkpoint, and the settings that it was written with."""
    try:
        return _step(document), _settings_of(document, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _none_of_a_run(path, error) from error


def _none_of_a_run(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is no checkpoint of a run: {type(error).__name__}: {one_line(error)}")


def _step(document: Mapping[str, Any]) -> int:
    """Gradient steps that were taken when a checkpoint was written."""
    return int(document["learner"]["step_count"])


def _settings_of(document: Mapping[str, Any], settings: Settings) -> Settings:
    """The settings that a checkpoint was written with; where earlier releases did not write them down, these."""
    run = document["extra"][_EXTRA]
    if "settings" in run:
        return Settings.from_json(run["settings"])
    # A training goes on uncompiled where there is no compiler.
    config = document["config"] | {"compile": settings.hyperparameters.compile}
    if run["method"] == METHODS["bc"]:
        config["temperature"] = settings.hyperparameters.temperature
    return replace(
        settings,
        hyperparameters=IQLConfig.from_json(config),
        spaces=Spaces.from_json(document["spaces"]),
        env=run["env"],
        dataset=run["dataset"],
        earlier_ends=(),
    )


class _MetricsFile:
    """``metrics.csv``: a row at a time, without times, so that a run that was resumed has the same bytes."""

    def __init__(self, path: Path, step: int, evaluated: Sequence[str]) -> None:
        """Keeps the rows up to ``step``, which a checkpoint holds; later ones are trained again.

        Args:
            path: of the file.
            step: gradient steps that a checkpoint holds.
            evaluated: the last columns, which rows between evaluations leave empty.
        """
        rows = [row for row in metrics_rows(path) if row["step"] <= step] if step else []
        last = rows[-1] if rows else {}
        self.last = {name: value for name, value in last.items() if name not in ("step", *evaluated)}
        self._path, self._evaluated = path, evaluated
        self._columns: list[str] = []
        if rows:
            with path.open(newline="") as file:
                kept = [line for _, line in zip(range(len(rows) + 1), file, strict=False)]
            self._columns = next(csv.reader(kept[:1]))
            checkpoint.write_bytes(path, "".join(kept).encode())
        else:
            checkpoint.write_bytes(path, b"")

    def __enter__(self) -> "_MetricsFile":
        self._file = self._path.open("a", newline="")
        return self

    def __exit__(self, *error: object) -> None:
        with checkpoint.naming(self._path):
            self._file.close()

    def append(self, step: int, row: Mapping[str, float]) -> None:
        with checkpoint.naming(self._path):
            if not self._columns:
                self._columns = ["step", *(name for name in row if name not in self._evaluated), *self._evaluated]
                self._write(self._columns)
            self._write([step, *(row.get(name, "") for name in self._columns[1:])])
            self._file.flush()

    def _write(self, values: Sequence[object]) -> None:
        # One write a row: a row is there, or it is not.
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        self._file.write(line.getvalue())


def metrics_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.csv``, without empty cells; a row that was cut while it was written ends them."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        reader = csv.DictReader(line for line in file if line.endswith("\n"))
        try:
            for row in reader:
                rows.append({name: float(value) for name, value in row.items() if value})
                if "step" not in rows[-1]:
                    raise ValueError("it has no step")
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path} is damaged in line {reader.line_num}: {error}") from error
    return rows


@contextlib.contextmanager
def _events(wanted: bool, folder: Path, step: int) -> Iterator[Callable[[str, float, int], None]]:
    """Writes TensorBoard's events, if they are wanted."""
    if not wanted:
        yield lambda name, value, step: None
        return
    writer = imported("torch.utils.tensorboard", "tensorboard").SummaryWriter(
        str(folder), purge_step=step + 1 if step else None
    )
    with contextlib.closing(writer):
        yield writer.add_scalar


@contextlib.contextmanager
def _torch_state(settings: Settings) -> Iterator[None]:
    """Torch's threads and random state are the training's inside, and what they were outside."""
    threads = torch.get_num_threads()
    devices = [settings.device] if torch.device(settings.device).type == "cuda" else []
    torch.set_num_threads(settings.threads)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet_agents() -> Iterator[None]:
    """Without what each agent says of its data: the command has said it, once."""
    logger = logging.getLogger("iql_plugins.training.agent")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _divergence_named(trainers: "Sequence[_Trainer]") -> Iterator[None]:
    """Says which of the trainings has diverged, and names options in the place of hyper-parameters."""
    try:
        yield
    except DivergenceError as error:
        text = as_options(str(error))
        for trainer in trainers:
            try:
                trainer.agent.learner.check_finite()
            except DivergenceError:
                raise DivergenceError(f"{trainer.unit.title}: {text}") from error
        raise DivergenceError(text) from error


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
