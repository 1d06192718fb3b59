"""RL Zoo3 with IQL among its algorithms: ``python -m iql_sb3.zoo train --algo iql --env Pendulum-v1``, and ``enjoy``.

Everything else is the Zoo's: ``--help`` after ``train`` or ``enjoy`` shows it. ``train -optimize`` searches
hyper-parameters. The scripts that plot read the logs of any algorithm: ``python -m rl_zoo3.cli plot_train -a iql``.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from iql_sb3.iql import IQL

__all__ = ["HYPERPARAMETERS", "main", "register", "sample"]

NAME = "iql"
SCRIPTS = ("train", "enjoy")
#: Tuned hyper-parameters in the Zoo's form.
HYPERPARAMETERS = Path(__file__).parent / "hyperparams" / f"{NAME}.yml"


def register() -> None:
    """Adds IQL to the Zoo's algorithms, and to those whose hyper-parameters it searches.

    Raises:
        ImportError: if the Zoo, or what it needs, is missing; says how to install it.
    """
    _zoo("rl_zoo3").ALGOS[NAME] = IQL
    search = _zoo("rl_zoo3.hyperparams_opt")
    search.HYPERPARAMS_CONVERTER[NAME] = search.convert_offpolicy_params
    # Discrete actions have no number of dimensions: the Zoo says 0.
    search.HYPERPARAMS_SAMPLER[NAME] = lambda trial, n_actions, *_: search.convert_offpolicy_params(
        sample(trial, discrete=not n_actions)
    )


def sample(trial: Any, discrete: bool = False) -> dict[str, Any]:
    """Hyper-parameters of a trial, as ``rl_zoo3.hyperparams_opt.convert_offpolicy_params`` takes them.

    Discount, batch size, rate, target update and widths have the Zoo's ranges for SAC; expectile and temperature reach
    from the mean, and almost behaviour cloning, to beyond what the papers use. Discrete actions explore as DQN's do, in
    the Zoo's ranges for DQN.

    Args:
        trial: of Optuna.
        discrete: whether actions are.
    """
    sampled = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.03, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 10),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True),
        "tau": trial.suggest_float("tau", 1e-3, 0.08, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "big"]),
        "expectile": trial.suggest_float("expectile", 0.5, 0.95),
        "temperature": trial.suggest_float("temperature", 0.1, 30.0, log=True),
    }
    if discrete:
        sampled["exploration_final_eps"] = trial.suggest_float("exploration_final_eps", 0.0, 0.2)
        sampled["exploration_fraction"] = trial.suggest_float("exploration_fraction", 0.01, 0.5)
    return sampled


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
