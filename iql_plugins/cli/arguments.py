"""The commands and their options. Hyper-parameters are those of :class:`~iql_plugins.config.IQLConfig`."""

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.config import PRESETS, IQLConfig, preset
from iql_plugins.plugins import PluginError, host

tyro = imported("tyro")

__all__ = [
    "CHANGEABLE",
    "Adapters",
    "Arguments",
    "Completion",
    "Convert",
    "ConvertDataset",
    "Evaluate",
    "Export",
    "HelpRequest",
    "Inspect",
    "Label",
    "MakeDataset",
    "Report",
    "Select",
    "Shell",
    "Sweep",
    "Train",
    "completion_script",
    "option",
    "parse",
    "spelled",
]

PROGRAM = "iql-plugins"
DEFAULT_DATASET = "pendulum-v1-sac"
#: The presets of datasets that ship.
_PRESETS_OF = {"pendulum-v1-sac": "pendulum"}

Flag: TypeAlias = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Automatic: TypeAlias = int | Literal["auto"]
Policy: TypeAlias = Annotated[str, tyro.conf.Positional]
Shell: TypeAlias = Literal["bash", "zsh", "fish"]
Offline: TypeAlias = Literal["fqe", "doubly-robust", "wis", "value", "qvalue", "td-error", "agreement"]

_offering = ContextVar("_offering", default=False)


def _named(names: Callable[[], Iterable[str]], **options: Any) -> Any:
    """Makes a text one of these names for a completion; elsewhere, whoever takes it has more to say of a wrong one."""
    return tyro.conf.arg(
        constructor_factory=lambda: Literal[tuple(names())] if _offering.get() else str | None,
        # tyro would show a list of one word.
        help_behavior_hint=lambda default: f"(default: {default[2:-2]})" if default.startswith("[") else "(required)",
        **options,
    )


def _adapters() -> Iterable[str]:
    return host().available()


def _recipes() -> Iterable[str]:
    from iql_plugins.cli.recipes import RECIPES

    return RECIPES


def option(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


def as_options(advice: str) -> str:
    """Advice that has hyper-parameters in backticks, with the options in their place."""
    return re.sub(r"`(\w+)`", lambda name: option(name[1]), advice)


#: What may differ when a run goes on, and holds from there on: where its data are (not which), its end (not an earlier
#: one), how it is looked at, and on what it is computed. All else is the checkpoints'.
CHANGEABLE = (
    *("n_steps", "episodes", "evaluation_episodes", "evaluate_every", "log_every", "tensorboard"),
    *("device", "threads", "dataset", "memmap_dir"),
)
_RESUME = (
    "Run directory of a run to go on with, bit for bit as if it had never stopped. Everything is the run's, but for "
    "what these change from there on, which results.json records: "
    f"{', '.join(map(option, (*CHANGEABLE, 'workers')))}. The dataset may lie elsewhere, and must be "
    "the same. --n-steps may be raised: the run is trained to its end as it was, and from there to the new one, by the "
    "learning rates that a run of that length has there."
)


# A docstring of two lines would be two lines in the help, and two candidates of a completion.
_ENV = (
    "gymnasium's id of the environment for evaluations, or module:Name-v0; by default the one the dataset names. One "
    "with a module is never taken from a file, so that --resume and --config need it again."
)
_STACK = (
    "Seeds that take their steps together, their parameters stacked, in one process; auto takes what is faster: all of "
    "them on a GPU, those of each process on a CPU if the networks are narrow, else 1."
)
_CHECK = (
    "Import each plugin in a process of its own, and say of each that it is fine, is refused (error), ended its "
    "process (exited), did not come to an end (hung), or wrote to stdout. Exit status 1 unless all are fine."
)


class HelpRequest(Exception):  # noqa: N818 - it is no error
    """Help was asked for; its text is the argument."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains IQL on a dataset, and behaviour cloning for comparison. Without options: the dataset that ships.

    Behaviour cloning is the same loss with a temperature of 0, which weighs all actions alike, by the same adapter.
    """

    adapter: Annotated[str, _named(_adapters)] = "tensor"
    """Whose algorithm trains; see `iql-plugins adapters`."""
    dataset: str = DEFAULT_DATASET
    """File, folder or name; see `iql-plugins inspect`."""
    env: Annotated[str | None, tyro.conf.arg(help=_ENV)] = None
    preset: Annotated[str | None, _named(lambda: PRESETS, metavar="|".join(PRESETS))] = None
    """Hyper-parameters to start from; options given beside it win."""
    baseline: Literal["bc", "none"] = "bc"
    """What IQL is compared with."""
    seeds: int = 1
    """Number of seeds; see --stack for how they are trained."""
    seed: int = 0
    """The first seed."""
    episodes: int = 50
    """Episodes that the last and the best policy are measured by in the end."""
    evaluation_episodes: int = 20
    """Episodes of the evaluations on the way, which also choose the best policy."""
    evaluate_every: Automatic = "auto"
    """Gradient steps between evaluations."""
    log_every: Automatic = "auto"
    """Gradient steps between rows of metrics.csv."""
    hold_out: float = 0.0
    """Share of the episodes to leave aside, the same ones in each run of a dataset; the policies are judged on them."""
    run_dir: str | None = None
    """New folder for the run; by default runs/DATASET-TIME."""
    resume: Annotated[str | None, tyro.conf.arg(help=_RESUME)] = None
    config: str | None = None
    """config.json of a run to repeat."""
    tensorboard: Flag = False
    """Write TensorBoard's events, too."""
    device: str = "auto"
    """Torch's name of the device; auto takes the GPU if there is one."""
    threads: Automatic = "auto"
    """Torch's threads in each process; auto takes one if there are several processes or the networks are narrow."""
    workers: Automatic = "auto"
    """Processes that train at a time; with the same --threads and --stack, the results do not depend on it."""
    stack: Annotated[Automatic, tyro.conf.arg(help=_STACK)] = "auto"
    memmap_dir: str | None = None
    """New folder that the dataset is written to and read from, for data larger than memory."""
    trust_pickle: Flag = False
    """Load a dataset from a pickle, which can run any code."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""
    hyperparameters: Annotated[IQLConfig, tyro.conf.arg(name="")] = field(default_factory=IQLConfig)

    def __post_init__(self) -> None:
        # Not in the starting point: tyro takes the names of options that have a value there for an option's own.
        given, name = self.hyperparameters, starting_preset(self.preset, self.dataset)
        if name is not None:
            chosen = {"value_objective": given.value_objective, "policy_extraction": given.policy_extraction}
            merged = preset(name, **chosen, objective_options=given.objective_options).objective_options
            object.__setattr__(self, "hyperparameters", given.replace(objective_options=merged))


_Absent: TypeAlias = Annotated[str | None, tyro.conf.Suppress, tyro.conf.Fixed]
_Repeated: TypeAlias = tuple[str, ...]
_GRID = (
    "NAME=VALUE,VALUE,...: try all of these, with each of another --grid's; NAME is a hyper-parameter, one of the "
    "options below. Words of one value are separated by spaces: 'hidden_sizes=128 128,256 256'. Repeatable."
)
_RANGE = "NAME=LOW..HIGH, or NAME=LOW..HIGH:log: draw a number between these, for --samples. Repeatable."
_BY = (
    "What the best trial is chosen by where there is no environment, one of `iql-plugins select`, on held-out "
    "episodes: those of --hold-out, by default a tenth."
)
_SWEEP_STACK = (
    "How many of a trial's seeds take their steps together; auto takes all where ASHA may stop it, so that it is "
    "judged by all, if they can, and else what `train` takes."
)
_SWEEP_RESUME = (
    "Folder of a sweep to go on with: trials that are finished are not repeated, the others go on from their "
    "checkpoints. It holds pickles of Ray's, which can run any code: take folders of your own alone."
)


@dataclass(frozen=True, kw_only=True)
class Sweep(Train):
    """Trains at many hyper-parameters on Ray Tune, each as `train` does, and says which were best.

    With an environment ASHA stops trials whose evaluations lag behind; without one all come to their end.
    """

    grid: Annotated[
        _Repeated, tyro.conf.UseAppendAction, tyro.conf.arg(help=_GRID, metavar="NAME=VALUES", help_behavior_hint="")
    ] = ()
    range: Annotated[
        _Repeated, tyro.conf.UseAppendAction, tyro.conf.arg(help=_RANGE, metavar="NAME=RANGE", help_behavior_hint="")
    ] = ()
    samples: int | None = None
    """Draw so many trials from ranges and grids; by default all combinations of the grids are tried."""
    search: Literal["random", "optuna"] = "random"
    """How they are drawn; optuna learns from the trials before."""
    by: Annotated[Offline, tyro.conf.arg(help=_BY)] = "fqe"
    fqe_steps: int = 10_000
    """Gradient steps of each fitted Q evaluation that --by needs."""
    address: str | None = None
    """Of a Ray cluster, or auto; the folder must be one that all its machines share. By default this machine."""
    baseline: Literal["bc", "none"] = "none"
    """What IQL is compared with, in each trial."""
    run_dir: str | None = None
    """New folder for the sweep; by default sweeps/DATASET-TIME."""
    resume: Annotated[str | None, tyro.conf.arg(help=_SWEEP_RESUME)] = None
    workers: Automatic = "auto"
    """Trials at a time; auto takes as many as there are cores, and GPUs."""
    threads: Automatic = "auto"
    """Torch's threads in each trial; auto takes one."""
    stack: Annotated[Automatic, tyro.conf.arg(help=_SWEEP_STACK)] = "auto"
    config: _Absent = None
    memmap_dir: _Absent = None


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measures a policy in an environment: mean return with a 95% bootstrap interval over episodes."""

    policy: Policy
    """A common checkpoint (.safetensors), a run directory, a hub folder, or an adapter's native file."""
    env: str | None = None
    """gymnasium's id, or module:Name-v0; by default the one that the policy was trained for, if it has no module."""
    episodes: int = 50
    """Number of episodes."""
    seed: int = 0
    """Of the first episode's start; the next ones count up."""
    video: str | None = None
    """Film the first episode into this .mp4."""
    adapter: Annotated[str | None, _named(_adapters, name="from")] = None
    """The adapter of a native file; by default it is found by the file's suffix."""
    trust_pickle: Flag = False
    """Load a native file that holds pickles, which can run any code, as its framework does."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a policy as one file that needs nothing of this package, and checks that it acts the same.

    Normalisers are inside: it takes the environment's observations and returns the environment's actions. The format
    hub is a folder for the Hugging Face hub: the policy as it is here, its evaluation and a card. Nothing is uploaded.
    """

    policy: Policy
    """A common checkpoint (.safetensors), a run directory, a hub folder, or an adapter's native file."""
    format: Literal["onnx", "torchscript", "torch", "hub"] = "onnx"
    """onnx, torchscript, torch.export's .pt2, or a folder for the Hugging Face hub."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file or new folder to write; by default beside the policy, with the format's suffix."""
    env: str | None = None
    """Environment of the evaluation in the hub's card; by default the one that the policy was trained for."""
    episodes: int | None = None
    """Episodes of the evaluation in the hub's card; by default 50."""
    adapter: Annotated[str | None, _named(_adapters, name="from")] = None
    """The adapter of a native file; by default it is found by the file's suffix."""
    trust_pickle: Flag = False
    """Load a native file that holds pickles, which can run any code, as its framework does."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Moves an agent into a framework's native file, or out of one, and checks that it acts the same."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="in", metavar="IN")]
    """A common checkpoint (.safetensors), a run directory, a hub folder, or an adapter's native file."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="out", metavar="OUT")]
    """The file to write."""
    to: Annotated[str, _named(_adapters)]
    """The adapter whose native file it becomes; tensor for the common checkpoint."""
    adapter: Annotated[str | None, _named(_adapters, name="from")] = None
    """The adapter of a native IN; by default it is found by the file's suffix."""
    trust_pickle: Flag = False
    """Load a native file that holds pickles, which can run any code, as its framework does."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """Writes value, advantage and weight of each transition of a dataset, for pipelines of behaviour cloning.

    Columns: value V(s), qvalue min Q(s, a), advantage, their difference, and weight, in the units of the rewards that
    the critics learn; episode, step, and row, the source's.
    """

    policy: Policy
    """A common checkpoint (.safetensors), a run directory, or an adapter's native file."""
    dataset: Annotated[str, tyro.conf.Positional]
    """File, folder or name."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "labels.parquet"
    """The .parquet file to write."""
    memmap_dir: str | None = None
    """New folder that the dataset is written to and read from, for data larger than memory."""
    adapter: Annotated[str | None, _named(_adapters, name="from")] = None
    """The adapter of a native file; by default it is found by the file's suffix."""
    trust_pickle: Flag = False
    """Load a native file or a dataset that holds pickles, which can run any code."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Select:
    """Ranks policies by what can be said without an environment, and says which differences are beyond noise."""

    policies: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, all seeds of which take part, common checkpoints, or adapters' native files."""
    dataset: str | None = None
    """File, folder or name of episodes, or a run for those that it held out; by default those of the runs to judge."""
    by: Offline = "fqe"
    """The criterion of the ranking."""
    fqe_steps: int = 10_000
    """Gradient steps of each fitted Q evaluation; 0 does without, and without all estimates that need one."""
    fqe_seeds: int = 3
    """Its seeds."""
    discount: float | None = None
    """The discount of estimates; by default that of the policies, if they have one in common."""
    plot: str = "selection.png"
    """The picture to write, a .png."""
    device: str = "auto"
    """Torch's name of the device of fitted Q evaluations; auto takes the GPU if there is one."""
    adapter: Annotated[str | None, _named(_adapters, name="from")] = None
    """The adapter of native files; by default it is found by their suffix."""
    trust_pickle: Flag = False
    """Load native files or a dataset that hold pickles, which can run any code."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Inspects a dataset: counts, returns, shapes, and what is wrong with it."""

    dataset: Annotated[str, tyro.conf.Positional] = DEFAULT_DATASET
    """File, folder or name."""
    env: str | None = None
    """gymnasium's id of the environment, whose bounds actions are held against."""
    fail_on: Literal["never", "error", "warning", "note"] = "never"
    """End with exit status 1 if there is a finding of this severity or a higher one: for checks of data by machines."""
    plot: str | None = None
    """Draw returns, lengths, rewards, actions and the observations' coverage into this .png."""
    trust_pickle: Flag = False
    """Load a pickle, which can run any code."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Compares runs on one page, which needs nothing beside itself: curves, results, configurations, health, data."""

    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
    ]
    """Run directories; a film of the policy (.mp4) that lies in one is shown."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html"
    """The .html file to write."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Lists the installed adapters, and how to install the frameworks that are missing; or writes a new one."""

    new: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write an adapter for a framework of your own, with its test, into a new folder iql-NAME."""
    check: Annotated[Flag, tyro.conf.arg(help=_CHECK)] = False
    timeout: float = 60.0
    """Seconds after which --check takes a plugin for hung."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class MakeDataset:
    """Makes a dataset from installed packages alone, the same bytes whenever it is repeated on the same versions.

    Without a name: lists the recipes. A call that was killed is gone on with by the next one.
    """

    name: Annotated[str | None, tyro.conf.Positional, _named(_recipes)] = None
    """The recipe."""
    out: str = "."
    """The folder of the file, NAME-SEED.npz."""
    seed: int = 0
    """Of all that is drawn."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class ConvertDataset:
    """Brings a dataset to memory-mapped shards, which training reads from disk, or to a Parquet file.

    A chunk at a time, for data larger than memory. A call that was killed is gone on with by the next one.
    """

    source: Annotated[str, tyro.conf.Positional]
    """File, folder or name; see `iql-plugins inspect`."""
    out: Annotated[str, tyro.conf.Positional]
    """New folder of the shards, which is a dataset, too; or new file that ends in .parquet."""
    trust_pickle: Flag = False
    """Load a pickle, which can run any code."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Prints a script by which a shell completes commands, options and their choices."""

    shell: Annotated[Shell, tyro.conf.Positional]
    """The shell that is to read it."""
    json: Flag = False
    """Print one JSON document on stdout, and nothing else."""


@dataclass(frozen=True)
class _OfPlugin:
    """Stands for a plugin's command in the help."""


Arguments = (
    Train
    | Sweep
    | Evaluate
    | Export
    | Convert
    | Label
    | Select
    | Inspect
    | Report
    | MakeDataset
    | ConvertDataset
    | Adapters
    | Completion
)


def parse(arguments: Sequence[str]) -> Arguments:
    """The command that a command line asks for.

    Raises:
        UserError: for what cannot be parsed.
        HelpRequest: for ``--help``.
    """
    with mistakes(ValueError):
        commands = _commands(_starting_point(arguments))
    if arguments and arguments[0] in ("-h", "--help"):
        commands = _with_plugins(commands)
    out, problem = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(problem), mistakes(ValueError):
            result: Arguments = _parsed(commands, arguments)
    except SystemExit as end:
        if not end.code:
            raise HelpRequest(out.getvalue()) from None
        raise UserError(_one_line(problem.getvalue())) from None
    return result


def completion_script(shell: Shell) -> str:
    """What completes the commands in a shell, those of plugins included. A Python runs it that needs no package."""
    commands = _with_plugins(_commands(IQLConfig()))
    out = io.StringIO()
    token = _offering.set(True)
    try:
        with contextlib.redirect_stdout(out):
            _parsed(commands, ["--tyro-write-completion", shell, "-"])
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"tyro writes no completion for {shell}") from end
    finally:
        _offering.reset(token)
    return out.getvalue()


def _commands(starting_point: IQLConfig) -> Any:
    """The type of the commands that ship, in tyro's terms."""
    train = tyro.conf.subcommand("train", default=Train(hyperparameters=starting_point))
    sweep = tyro.conf.subcommand("sweep", default=Sweep(hyperparameters=starting_point))
    commands: Any = Annotated[Train, train] | Annotated[Sweep, sweep]
    for name, kind in _OTHERS.items():
        commands |= Annotated[kind, tyro.conf.subcommand(name)]
    return commands


_OTHERS = {
    "evaluate": Evaluate,
    "export": Export,
    "convert": Convert,
    "label": Label,
    "select": Select,
    "inspect": Inspect,
    "report": Report,
    "make-dataset": MakeDataset,
    "convert-dataset": ConvertDataset,
    "adapters": Adapters,
    "completion": Completion,
}


def _with_plugins(commands: Any) -> Any:
    """The same with those that plugins add."""
    with mistakes(PluginError):
        of_plugins = host().commands([*_OTHERS, "train", "sweep"])
    for name, command in of_plugins.items():
        commands |= Annotated[_OfPlugin, tyro.conf.subcommand(name, description=command.summary)]
    return commands


def _parsed(commands: Any, arguments: Sequence[str]) -> Any:
    return tyro.cli(
        commands,
        prog=PROGRAM,
        description=f"Implicit Q-Learning on any dataset. Start with: {PROGRAM} train",
        args=list(arguments),
        config=(tyro.conf.DisallowNone,),
    )


def _starting_point(arguments: Sequence[str]) -> IQLConfig:
    """The hyper-parameters that options change: of the preset that is asked for, or that the dataset has."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--dataset", nargs="?", default=DEFAULT_DATASET)
    for kind in (kinds := ("value_objective", "policy_extraction")):
        parser.add_argument(option(kind), nargs="?")
    known, _ = parser.parse_known_args(spelled(arguments))
    name = starting_preset(known.preset, known.dataset)
    if name is None:
        return IQLConfig()
    own = {kind: chosen for kind in kinds if (chosen := getattr(known, kind)) is not None}
    return preset(name, **own).replace(objective_options={})


def spelled(arguments: Sequence[str]) -> list[str]:
    """The same with hyphens in the names of options: tyro takes either spelling."""
    return [re.sub(r"^--[^=]*", lambda name: name[0].replace("_", "-"), argument) for argument in arguments]


def starting_preset(given: str | None, dataset: str | None) -> str | None:
    """The preset that hyper-parameters start from; None for the defaults."""
    return _PRESETS_OF.get(dataset or "") if given is None else given


def _one_line(message: str) -> str:
    """What is wrong: tyro writes a title, a rule, what is wrong, a rule, and how to get help."""
    lines = [re.sub(r"^[-─ │]{5,}$", "\0", re.sub(r"[╭╮╰╯│]|─{2,}", "", line)).strip() for line in message.splitlines()]
    sections = [" ".join(section.split()) for section in "\n".join(lines).split("\0")]
    title, *rest = [section for section in sections if section] or ["the command line cannot be parsed"]
    text = rest[0] if rest else title
    text = text if text.startswith(title) else f"{title}: {text}"
    # Objectives have the only option whose value is a mapping.
    text = text.replace("Failed to parse key-value pairs!", "expected names and numbers, such as alpha 0.5")
    return f"{text.rstrip('.')} (see {PROGRAM} --help)"
