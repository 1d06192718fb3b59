"""What a run consists of: all of it is in the run directory's ``config.json``, and repeats the run."""

import contextlib
import json
import os
import platform
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from tensordict import MemoryMappedTensor, TensorDictBase

from iql_plugins import checkpoint
from iql_plugins.cli.arguments import CHANGEABLE
from iql_plugins.cli.errors import UserError, mistakes
from iql_plugins.config import IQLConfig
from iql_plugins.data import Dataset, DatasetError, read_dataset
from iql_plugins.data.dataset import REWARD, one_line, row_bytes
from iql_plugins.data.episodes import EpisodeRows, held_out, held_out_rows
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.limits import available_memory, read_json
from iql_plugins.plugins import PluginError
from iql_plugins.spaces import Spaces
from iql_plugins.training.agent import Agent

__all__ = [
    "CHANGEABLE",
    "COUNTS",
    "METHODS",
    "Method",
    "Settings",
    "Unit",
    "available_cores",
    "load_source",
    "recorded_data",
    "versions",
]

Method = Literal["iql", "bc"]
METHODS: Mapping[str, str] = {"iql": "IQL", "bc": "behaviour cloning"}

CONFIG = "config.json"
FORMAT = 1
#: Settings that are integers of at least 1.
COUNTS = ("episodes", "evaluation_episodes", "evaluate_every", "log_every", "threads", "stack")
#: No machine has more cores to use; a file that asks for millions asks for the memory of their stacks.
MAX_THREADS = 1024
#: Hidden layers up to this width run no faster on several threads.
NARROW = 128
_PACKAGES = ("iql-plugins", "torch", "tensordict", "numpy", "safetensors", "gymnasium")


class Unit(NamedTuple):
    """One training of a run.

    Attributes:
        seed: of weights and batches.
        method: IQL, or the behaviour cloning that it is compared with.
    """

    seed: int
    method: Method

    @property
    def title(self) -> str:
        """For people."""
        return f"{METHODS[self.method]}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run; automatic choices are resolved.

    Attributes:
        adapter: the adapter's name.
        dataset: path or name.
        dataset_sha256: of the dataset's content.
        transitions: number of transitions.
        memmap_dir: where the dataset is kept on disk while it is used; None keeps it in memory.
        env: the environment of evaluations; None for none.
        spaces: of the environment, or those that the dataset tells.
        preset: whose hyper-parameters were the starting point; None for the defaults.
        hyperparameters: of IQL.
        baseline: ``"bc"`` trains behaviour cloning, too.
        seeds: one training each, and one of the baseline.
        episodes: of the evaluations in the end.
        evaluation_episodes: of the evaluations on the way.
        evaluate_every: gradient steps between evaluations.
        log_every: gradient steps between rows of metrics.csv.
        device: torch's name.
        threads: of torch, in each process.
        stack: so many trainings of a method take their steps together, in one process; 1 for none.
        tensorboard: whether TensorBoard's events are written.
        earlier_ends: the steps at which the run ended before it was prolonged. It is trained to each of them first,
            with a schedule that ends there: what comes of it does not depend on when it was prolonged.
        hold_out: share of the episodes that are not trained on; 0 for none.

    Raises:
        ValueError: for a count below 1, a share outside [0, 1), or ends that do not increase.
    """

    adapter: str
    dataset: str
    dataset_sha256: str
    transitions: int
    memmap_dir: str | None
    env: str | None
    spaces: Spaces
    preset: str | None
    hyperparameters: IQLConfig
    baseline: Literal["bc", "none"]
    seeds: tuple[int, ...]
    episodes: int
    evaluation_episodes: int
    evaluate_every: int
    log_every: int
    device: str
    threads: int
    stack: int
    tensorboard: bool
    earlier_ends: tuple[int, ...] = ()
    hold_out: float = 0.0

    def __post_init__(self) -> None:
        for name in COUNTS:
            value: object = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.threads > MAX_THREADS:
            raise ValueError(f"threads must be at most {MAX_THREADS}, got {self.threads}")
        if not 0.0 <= self.hold_out < 1.0:
            raise ValueError(f"hold_out must be in [0, 1), got {self.hold_out}")
        if list(self.ends) != sorted(set(self.ends)):
            raise ValueError(f"earlier_ends and n_steps must increase, got {list(self.ends)}")

    @property
    def ends(self) -> tuple[int, ...]:
        """The steps at which the run ended, or ends."""
        return (*self.earlier_ends, self.hyperparameters.n_steps)

    def prolonged(self, n_steps: int) -> "Settings":
        """The settings of the run when it has come to its end, and goes on to another one."""
        return replace(self, hyperparameters=self.hyperparameters.replace(n_steps=n_steps), earlier_ends=self.ends)

    def at(self, step: int) -> "Settings":
        """The settings by which a training goes on after a step: its end is the next one."""
        index = min(bisect_right(self.ends, step), len(self.ends) - 1)
        config = self.hyperparameters.replace(n_steps=self.ends[index])
        return replace(self, hyperparameters=config, earlier_ends=self.ends[:index])

    def evaluates(self, step: int) -> bool:
        """Whether the policy is evaluated after a step."""
        return step % self.evaluate_every == 0 or step == self.hyperparameters.n_steps

    def logs(self, step: int) -> bool:
        """Whether metrics.csv has a row for a step; no other step is saved."""
        return self.evaluates(step) or step % self.log_every == 0

    def changes(self, before: "Settings", name: str) -> dict[str, list[Any]]:
        """What differs from the settings of a checkpoint: by name, the value there and the one here.

        Args:
            before: the settings of the checkpoint.
            name: of the checkpoint, for errors.

        Raises:
            UserError: for a difference that there cannot be.
        """
        own, others = self._values(), before._values()
        changed = {key: [others[key], value] for key, value in own.items() if others[key] != value}
        if self.earlier_ends == before.ends:
            del changed["earlier_ends"]
        if wrong := [
            f"{key} is {old!r} in {name}, {new!r} in {CONFIG}"
            for key, (old, new) in changed.items()
            if key not in CHANGEABLE or (key == "n_steps" and new < old)
        ]:
            raise UserError(
                f"{'; '.join(wrong)}: a run goes on as it was begun; change {CONFIG} back, or start another run"
            )
        return changed

    def _values(self) -> dict[str, Any]:
        values = self.to_json()
        hyperparameters: dict[str, Any] = values.pop("hyperparameters")
        return values | hyperparameters

    @property
    def units(self) -> list[Unit]:
        """The trainings, those of one seed together."""
        methods: list[Method] = ["iql", "bc"] if self.baseline == "bc" else ["iql"]
        return [Unit(seed, method) for seed in self.seeds for method in methods]

    @property
    def groups(self) -> list[list[Unit]]:
        """The same, those together that take their steps together."""
        stacks = [self.seeds[start : start + self.stack] for start in range(0, len(self.seeds), self.stack)]
        methods = dict.fromkeys(unit.method for unit in self.units)
        return [[Unit(seed, method) for seed in stack] for stack in stacks for method in methods]

    def folder(self, run: Path, unit: Unit) -> Path:
        """Where a training's files are: IQL's of a single seed in the run directory itself."""
        folder = run if len(self.seeds) == 1 else run / f"seed-{unit.seed}"
        return folder if unit.method == "iql" else folder / unit.method

    def config(self, method: Method) -> IQLConfig:
        """The hyper-parameters of a method: behaviour cloning weighs all alike, whatever IQL's objectives are."""
        if method == "iql":
            return self.hyperparameters
        own = IQLConfig()
        return self.hyperparameters.replace(
            temperature=0.0,
            value_objective=own.value_objective,
            policy_extraction=own.policy_extraction,
            objective_options=own.objective_options,
        )

    def load(self, *, trust_pickle: bool = False) -> Dataset:
        """The dataset.

        Raises:
            UserError: if it cannot be loaded, or is another one than it was.
        """
        # What a run has mapped once is read from there; another dataset in that folder has another digest.
        mapped = self.memmap_dir is not None and (Path(self.memmap_dir) / "meta.json").exists()
        source = load_source(
            self.memmap_dir if self.memmap_dir is not None and mapped else self.dataset,
            trust_pickle=trust_pickle,
            discrete=self.spaces.discrete,
            memmap_dir=None if mapped else self.memmap_dir,
        )
        if source.sha256 != self.dataset_sha256:
            name = self.memmap_dir if mapped else self.dataset
            raise UserError(f"{name} is not the dataset that the run was made with: its content has changed")
        return source

    def trained(self, source: Dataset) -> tuple[TensorDictBase, EpisodeRows | None]:
        """The transitions that are trained on: all of these, or some rows of them, as of a dataset on disk.

        Raises:
            UserError: for a dataset of one episode, if some are to be held out.
        """
        tensors = source.tensors
        if not self.hold_out:
            return tensors, None
        with mistakes(ValueError):
            if _on_disk(tensors):
                return tensors, held_out_rows(tensors, self.hold_out)[0]
            return tensors[~held_out(tensors, self.hold_out).to(tensors.get(REWARD).device)], None

    def held_out(self, source: Dataset) -> TensorDictBase | None:
        """The held-out episodes, in memory; None for none.

        Raises:
            UserError: for a dataset of one episode, or for more than there is memory for.
        """
        tensors = source.tensors
        if not self.hold_out:
            return None
        with mistakes(ValueError):
            if not _on_disk(tensors):
                return tensors[held_out(tensors, self.hold_out).to(tensors.get(REWARD).device)]
            rows = held_out_rows(tensors, self.hold_out)[1]
            size = len(rows) * sum(map(row_bytes, tensors.values(True, True)))
            if size > (memory := available_memory()):
                raise UserError(
                    f"--hold-out {self.hold_out} keeps {size:,} bytes of episodes in memory, of which {memory:,} are "
                    "left: hold out a smaller share"
                )
            return tensors[rows[torch.arange(len(rows), device="cpu")]]

    def agent(self, dataset: TensorDictBase, kept: EpisodeRows | None, unit: Unit) -> Agent:
        """An untrained agent.

        Args:
            dataset: what it is trained on, see :meth:`trained`.
            kept: likewise.
            unit: which.

        Raises:
            UserError: if dataset, spaces, hyper-parameters and device do not fit together.
        """
        config = self.config(unit.method)
        size = config.batch_size * sum(map(row_bytes, dataset.values(True, True)))
        if size > available_memory():
            raise UserError(
                f"batch_size {config.batch_size} makes batches of {size:,} bytes, which memory does not hold"
            )
        with mistakes(ValueError, RuntimeError):
            self.spaces.check(dataset)
            normalizers = Normalizers.fit(dataset, self.spaces, config, kept)
            return Agent(self.spaces, config, normalizers=normalizers, seed=unit.seed, device=self.device)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "spaces": self.spaces.to_json(),
            "hyperparameters": self.hyperparameters.to_json(),
            "seeds": list(self.seeds),
            "earlier_ends": list(self.earlier_ends),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Settings":
        """The settings of :meth:`to_json`.

        Raises:
            TypeError, ValueError: for a value of another type, or a count below 1; names it.
        """
        values = {
            **document,
            "spaces": Spaces.from_json(document["spaces"]),
            "hyperparameters": IQLConfig.from_json(document["hyperparameters"]),
            "seeds": tuple(document["seeds"]),
            "earlier_ends": tuple(document.get("earlier_ends", ())),
        }
        settings = cls(**values)
        for name, hint in get_type_hints(cls).items():
            if not _fits(getattr(settings, name), hint):
                raise TypeError(f"{name} must be {hint}, got {getattr(settings, name)!r}")
        if not settings.seeds:
            raise ValueError("seeds must be at least one")
        return settings

    def write(self, run: Path, made_on: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Writes ``config.json``, with the :func:`versions` that the run is made on, and what is known of its data."""
        document = {"format": FORMAT, "settings": self.to_json(), "environment": made_on, "data": data}
        checkpoint.write_bytes(run / CONFIG, (json.dumps(document, indent=2) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> tuple["Settings", dict[str, Any]]:
        """The settings in a ``config.json``, or in a run directory's, and the environment that they were written in.

        Raises:
            UserError: if there is no such file, or it holds something else.
        """
        with _configuration(path) as document:
            return cls.from_json(document["settings"]), dict(document["environment"])


def recorded_data(path: Path) -> dict[str, Any]:
    """What a ``config.json`` says of a run's data beside their name and digest; nothing if an earlier release wrote it.

    Raises:
        UserError: as :meth:`Settings.read`.
    """
    with _configuration(path) as document:
        return dict(document.get("data", {}))


@contextlib.contextmanager
def _configuration(path: Path) -> Iterator[dict[str, Any]]:
    """The document of a run's ``config.json``; whatever is wrong with it inside is a :class:`UserError`."""
    path = path / CONFIG if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no {path}: a run directory has it from its first second on")
    try:
        document = read_json(path)
        if "format" not in document:
            raise UserError(f"{path} is no configuration of a run, which `iql-plugins train` writes")
        if document["format"] != FORMAT:
            raise UserError(f"{path} has format {document['format']!r}, known is {FORMAT}: another release wrote it")
        yield document
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no configuration of a run: {type(error).__name__}: {one_line(error)}") from error


def _on_disk(tensors: TensorDictBase) -> bool:
    return isinstance(tensors.get(REWARD), MemoryMappedTensor)


def load_source(source: str, **options: Any) -> Dataset:
    """A dataset, as :func:`iql_plugins.data.read_dataset` reads it.

    Raises:
        UserError: if it cannot be read; one line.
    """
    with mistakes(DatasetError, ImportError, PluginError):
        return read_dataset(source, **options)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type."""
    arguments = get_args(hint)
    match get_origin(hint):
        case None:
            # A truth value is an integer for Python alone.
            return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        case origin if origin is Literal:
            return value in arguments
        case origin if origin is tuple:
            return all(_fits(item, arguments[0]) for item in value)
        case _:
            return any(_fits(value, argument) for argument in arguments)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, Any]:
    """What a run's numbers may depend on beside its settings."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": available_cores(),
        "packages": {name: installed(name) for name in _PACKAGES},
    }
