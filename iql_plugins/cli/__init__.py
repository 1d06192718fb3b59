"""The command line. Importing it imports no framework."""

import contextlib
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iql_plugins.cli.output import Result
    from iql_plugins.hookspecs import Command

__all__ = ["main"]

PROGRAM = "iql-plugins"
#: The commands that ship; others may be a plugin's.
COMMANDS = (
    *("train", "sweep", "evaluate", "export", "convert", "label", "select", "inspect", "report"),
    *("make-dataset", "convert-dataset", "adapters", "completion"),
)
FAILED, MISTAKE, INTERRUPTED = 1, 2, 130

Write = Callable[[Mapping[str, Any]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    With ``--json`` there is one JSON document on stdout, in one line, and nothing else, whatever a library or a plugin
    prints; that of an error is ``{"error": "..."}``. Of the processes that ``torchrun`` starts the first one writes it.
    Without it, what they print goes to stderr, too, and results to stdout; a plugin's own command prints its results
    itself.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 when the command is done, 2 for a user's mistake, 130 after Ctrl-C, 1 if anything else went
        wrong, or ``inspect --fail-on`` found something.
    """
    from iql_plugins.cli.output import captured_stdout, json_text

    given = sys.argv[1:] if arguments is None else list(arguments)
    with _loading_announced():
        if "--json" not in given or ("TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"):
            return _status(given, None)
        with captured_stdout(restore=arguments is not None) as write:

            def write_document(document: Mapping[str, Any]) -> None:
                # Processes that torchrun starts again have not failed yet.
                if "error" not in document or not _will_be_started_again():
                    write(json_text(document, indent=None) + "\n")

            return _status(given, write_document)


def _will_be_started_again() -> bool:
    count, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return int(count) < int(most)


def _status(given: Sequence[str], write: Write | None) -> int:
    """Runs the command, and prints its result or its error.

    Args:
        given: the arguments.
        write: writes a JSON document to stdout; None prints for people.
    """
    from iql_plugins.cli.errors import UserError
    from iql_plugins.cli.output import Result, captured_stdout, show

    try:
        with captured_stdout(restore=True):
            command = _of_plugin(given)
            result = _run(given) if command is None else Result({})
        if command is not None:
            result = Result(command.run(given[1:]) or {})
        if write is None:
            show(result)
        else:
            write(result.document)
        return result.status
    except UserError as error:
        return _failed(str(error), MISTAKE, write)
    except KeyboardInterrupt as interrupt:
        hint = f": go on with {PROGRAM} {interrupt}" if str(interrupt) else ""
        return _failed(f"interrupted{hint}", INTERRUPTED, write)
    except SystemExit as end:
        # A plugin's command may parse its arguments by argparse, which has told people what was wrong.
        if write is not None:
            write({"error": f"{given[0]} ended with exit status {end.code}"} if end.code else {})
        raise
    except BrokenPipeError:
        # Whoever read (head, say) has enough. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except Exception as error:
        from iql_plugins.training.learner import DivergenceError

        # A training may end so, and says itself what to do.
        if not isinstance(error, DivergenceError):
            traceback.print_exc()
        return _failed(f"{type(error).__name__}: {error}", FAILED, write)


@contextlib.contextmanager
def _loading_announced() -> Iterator[None]:
    """People are told which plugin they are waiting for."""
    from iql_plugins.cli.output import announced
    from iql_plugins.plugins import host

    plugins = host()
    before = plugins.loading
    plugins.loading = lambda info: announced(f"loading plugin {info.name!r} of {info.distribution} ({info.value})")
    try:
        yield
    finally:
        plugins.loading = before


def _of_plugin(given: Sequence[str]) -> "Command | None":
    """The plugin's command that is asked for; None if it is none, or one that is not there."""
    if not given or given[0].startswith("-") or given[0] in COMMANDS:
        return None
    from iql_plugins.cli.errors import mistakes
    from iql_plugins.plugins import PluginError, host

    with mistakes(PluginError):
        return host().commands(COMMANDS).get(given[0])


def _run(given: Sequence[str]) -> "Result":
    from iql_plugins.cli.errors import UserError
    from iql_plugins.cli.output import Result

    if "--version" in given:
        packages = _installed()
        lines = [f"{name} {number}" for name, number in {PROGRAM: version(PROGRAM), **packages}.items()]
        return Result({"version": version(PROGRAM), "packages": packages}, ["\n".join(lines)])
    # What a command needs beside its options takes seconds to import: that is left to its branch.
    from iql_plugins.cli import arguments as options

    if not set(given) - {"--json"}:
        raise UserError(f"which command? See {PROGRAM} --help")
    try:
        arguments = options.parse(given)
    except options.HelpRequest as text:
        return Result({"help": str(text)}, [str(text)])
    match arguments:
        case options.Sweep():
            from iql_plugins.cli import sweep

            return sweep.run(arguments, given)
        case options.Train():
            from iql_plugins.cli import train

            return train.run(arguments, given)
        case options.Evaluate():
            from iql_plugins.cli import policies

            return policies.evaluate(arguments)
        case options.Export():
            from iql_plugins.cli import policies

            return policies.export(arguments)
        case options.Convert():
            from iql_plugins.cli import policies

            return policies.convert(arguments)
        case options.Label():
            from iql_plugins.cli import label

            return label.run(arguments)
        case options.Select():
            from iql_plugins.cli import select

            return select.run(arguments)
        case options.Inspect():
            from iql_plugins.cli import inspect

            return inspect.run(arguments)
        case options.Report():
            from iql_plugins.cli import report

            return report.run(arguments)
        case options.MakeDataset():
            from iql_plugins.cli import make_dataset

            return make_dataset.run(arguments)
        case options.ConvertDataset():
            from iql_plugins.cli import convert_dataset

            return convert_dataset.run(arguments)
        case options.Adapters():
            from iql_plugins.cli import adapters

            return adapters.run(arguments)
        case options.Completion():
            from iql_plugins.cli import completion

            return completion.completion(arguments)


def _installed() -> dict[str, str]:
    """Versions that a report of a bug needs: what the installed adapters, and their frameworks, are built on."""
    from packaging.requirements import Requirement

    from iql_plugins.hookspecs import PROJECT

    found = {"python": platform.python_version()}
    for plugin in entry_points(group=PROJECT):
        requirements = [Requirement(line) for line in (plugin.dist.requires if plugin.dist else None) or ()]
        for needed in requirements:
            if needed.marker is None or needed.marker.evaluate({"extra": plugin.name}):
                with contextlib.suppress(PackageNotFoundError):
                    found[needed.name] = version(needed.name)
    return found


def _failed(text: str, status: int, write: Write | None) -> int:
    print(f"{PROGRAM}: {text}", file=sys.stderr)
    if write is not None:
        write({"error": text})
    return status
