"""RL Zoo3 with IQL among its algorithms: ``python -m iql_sb3.zoo train --algo iql --env Pendulum-v1``, and ``enjoy``.

Everything else is the Zoo's: ``--help`` after ``train`` or ``enjoy`` shows it.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from iql_sb3.iql import IQL

__all__ = ["HYPERPARAMETERS", "main", "register"]

NAME = "iql"
SCRIPTS = ("train", "enjoy")
#: Tuned hyper-parameters in the Zoo's form.
HYPERPARAMETERS = Path(__file__).parent / "hyperparams" / f"{NAME}.yml"


def register() -> None:
    """Adds IQL to the Zoo's algorithms.

    Raises:
        ImportError: if the Zoo, or what it needs, is missing; says how to install it.
    """
    _zoo("rl_zoo3").ALGOS[NAME] = IQL


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a script of the Zoo.

    Args:
        arguments: the script's name and its arguments; None takes the program's.

    Raises:
        SystemExit: for a script that is not there, or arguments that the script does not know.
        ImportError: if the Zoo, or what it needs, is missing; says how to install it.
    """
    script, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if script not in SCRIPTS:
        raise SystemExit(f"usage: python -m iql_sb3.zoo {{{','.join(SCRIPTS)}}} --algo {NAME} --env ENV ...")
    register()
    if script == "train" and _algorithm(rest) == NAME and not {"-conf", "--conf-file"} & set(rest):
        # The Zoo looks for the hyper-parameters of an algorithm among its own.
        rest += ["--conf-file", str(HYPERPARAMETERS)]
    argv = sys.argv
    sys.argv = [f"iql_sb3.zoo {script}", *rest]
    try:
        getattr(_zoo(f"rl_zoo3.{script}"), script)()
    finally:
        sys.argv = argv


def _algorithm(arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == "--algo":
            return arguments[index + 1] if index + 1 < len(arguments) else None
        if argument.startswith("--algo="):
            return argument.removeprefix("--algo=")
    return None


def _zoo(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"RL Zoo3 is incomplete ({error}): pip install 'iql-plugins[zoo]'") from error


if __name__ == "__main__":
    main()
