"""Asks which criteria of ``iql-plugins select`` choose good policies: a row is a task and a configuration.

From the repository's root, after the README's installation (an hour on two cores; goes on where it was stopped)::

    python tests/learning/selection.py run
    python tests/learning/selection.py table

Each configuration is trained on four fifths of the episodes, once for a tenth of the task's gradient steps and once for
all of them. What the command's criteria say of it on the other fifth is held against what it returns in the
environment, over 50 episodes that start the same for all. ``results/selection/TASK.json`` has both, and the versions.

``table`` has Spearman's correlation of each criterion with those returns, and regret@1: how much less than the best
configuration the one that the criterion ranks first returns. Beside it stand the mean regret of a configuration that is
chosen at random, and of the last policy of hyper-parameters that are.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from benchmark import TASKS, Task
from scipy.stats import spearmanr

from iql_plugins import checkpoint, read_dataset
from iql_plugins.cli import main as command_line
from iql_plugins.cli.rollouts import environment_spaces, rollouts
from iql_plugins.cli.select import DESCENDING, judged
from iql_plugins.cli.settings import versions
from iql_plugins.config import IQLConfig
from iql_plugins.data import Dataset
from iql_plugins.data.episodes import held_out
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.training.agent import Agent

RESULTS = Path(__file__).parent / "results" / "selection"
EPISODES, FIRST_SEED, SHARE = 50, 10_000, 0.2
#: Gradient steps that take longer than compiling them does.
WORTH_COMPILING = 2000
#: Of a configuration's gradient steps.
LENGTHS = {"a tenth": 0.1, "all": 1.0}
CONFIGURATIONS = {
    f"expectile {expectile}, temperature {temperature}, {length} of the steps": (
        {"expectile": expectile, "temperature": temperature},
        length,
    )
    for expectile, temperature, length in product((0.5, 0.7, 0.9, 0.99), (0.5, 3.0, 10.0), LENGTHS)
}


@dataclass(frozen=True)
class Run:
    """Trains and judges the configurations that are not there yet."""

    tasks: tuple[str, ...] = ("reagent-pendulum", "reagent-cartpole", "pointmaze-umaze")
    data: str = "../shared/data"
    """Folder of the datasets of others."""
    made: str = "datasets"
    """Folder of the datasets that are made."""
    results: str = str(RESULTS)
    """Folder of what is kept."""
    configurations: int = len(CONFIGURATIONS)
    """So many of them, from the first on."""
    n_steps: int | None = None
    """Gradient steps; by default those of the task."""
    fqe_steps: int = 10_000
    fqe_seeds: int = 1
    episodes: int = EPISODES
    workers: int = 2
    """Processes, of one thread each."""


@dataclass(frozen=True)
class Table:
    """Prints what is there in Markdown."""

    results: str = str(RESULTS)
    """Folder of what was kept."""


def dataset_of(task: Task, arguments: Run) -> Dataset:
    """A task's dataset, which is made if it can be and is not there."""
    if task.dataset.endswith(".npz"):
        return read_dataset(Path(arguments.data) / task.dataset)
    file = Path(arguments.made) / f"{task.dataset}-0.npz"
    if not file.exists() and command_line(["make-dataset", task.dataset, "--out", arguments.made]) != 0:
        raise SystemExit(1)
    return read_dataset(file)


def learn(name: str, configuration: str, arguments: Run) -> dict[str, Any]:
    """Trains a configuration, judges it, and plays it."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    task = TASKS[name]
    source = dataset_of(task, arguments)
    env = task.env or source.env
    assert env is not None
    spaces = environment_spaces(env)
    aside = held_out(source.tensors, SHARE)
    data, judging = source.tensors[~aside], source.tensors[aside]
    changes, length = CONFIGURATIONS[configuration]
    n_steps = max(1, round(LENGTHS[length] * (arguments.n_steps or task.n_steps)))
    config = IQLConfig(
        n_steps=n_steps,
        hidden_sizes=(task.hidden, task.hidden),
        actor_schedule="constant",
        reward_scale="return_range",
        normalize_observations=True,
        compile="yes" if n_steps >= WORTH_COMPILING else "no",
        **changes,
    )
    agent = Agent(spaces, config, normalizers=Normalizers.fit(data, spaces, config), seed=0)
    agent.fit(data, n_steps)
    [candidate] = judged(
        {configuration: agent},
        judging,
        config.discount,
        steps=arguments.fqe_steps,
        seeds=arguments.fqe_seeds,
        device="cpu",
    )
    returns = [
        episode.total for episode in rollouts(agent.act, env, range(FIRST_SEED, FIRST_SEED + arguments.episodes))
    ]
    return {
        "length": length,
        "n_steps": n_steps,
        "mean_return": statistics.mean(returns),
        "returns": returns,
        "criteria": {criterion: value.as_dict() for criterion, value in candidate.criteria.items()},
        "seconds": round(time.perf_counter() - begin),
        "versions": versions()["packages"],
    }


def results_of(folder: str, task: str) -> dict[str, dict[str, Any]]:
    """By configuration."""
    file = Path(folder) / f"{task}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def run(arguments: Run) -> None:
    """Writes each row as soon as it is there."""
    Path(arguments.results).mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        dataset_of(TASKS[task], arguments)
    missing = [
        (task, configuration)
        for configuration in list(CONFIGURATIONS)[: arguments.configurations]
        for task in arguments.tasks
        if configuration not in results_of(arguments.results, task)
    ]
    with ProcessPoolExecutor(arguments.workers) as pool:
        rows = {pool.submit(learn, *row, arguments): row for row in missing}
        for finished in as_completed(rows):
            task, configuration = rows[finished]
            results = results_of(arguments.results, task) | {configuration: finished.result()}
            # JSON has no NaN, which importance sampling may come to.
            text = json.dumps(_finite(results), indent=1, allow_nan=False)
            checkpoint.write_bytes(Path(arguments.results) / f"{task}.json", f"{text}\n".encode())
            sys.stdout.write(f"{task}, {configuration}: {results[configuration]['mean_return']:.1f}\n")
            sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judged_criteria(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """Each criterion's name, correlation with the returns, and regret@1.

    Configurations of which it is NaN are last; among several that it ranks first, the regret is the mean of theirs.
    """
    returns = [row["mean_return"] for row in results.values()]
    for name in next(iter(results.values()))["criteria"]:
        values = [row["criteria"][name]["value"] for row in results.values()]
        signed = [-math.inf if value is None else -value if name in DESCENDING else value for value in values]
        correlation = float(spearmanr(signed, returns).statistic) if len(set(signed)) > 1 else math.nan
        first = [returned for value, returned in zip(signed, returns, strict=True) if value == max(signed)]
        yield name, correlation, max(returns) - statistics.fmean(first)


def table(folder: str, lengths: Sequence[str] = tuple(LENGTHS)) -> str:
    """A row a criterion, and the two choices without one; two columns a task.

    Args:
        folder: of what was kept.
        lengths: of the trainings among which is chosen.
    """
    tasks = {
        file.stem: {name: row for name, row in results_of(folder, file.stem).items() if row["length"] in lengths}
        for file in sorted(Path(folder).glob("*.json"))
    }
    cells: dict[str, list[str]] = {}
    for results in tasks.values():
        for name, correlation, regret in judged_criteria(results):
            cells.setdefault(f"`{name}`", []).append(f"{correlation:.2f} | {regret:.1f}")
        best = max(row["mean_return"] for row in results.values())
        for name, chosen in {"one at random": LENGTHS, "the last policy": ("all",)}.items():
            regrets = [best - row["mean_return"] for row in results.values() if row["length"] in chosen]
            cells.setdefault(name, []).append(f"| {statistics.fmean(regrets):.1f}" if regrets else "|")
    titles = [
        f"{task} ({len(results)}, {min(r := [row['mean_return'] for row in results.values()]):.0f} to {max(r):.0f})"
        for task, results in tasks.items()
    ]
    lines = [f"| criterion | {' | '.join(f'{title}: Spearman | regret@1' for title in titles)} |"]
    lines.append("| --- |" + " --- | --- |" * len(tasks))
    return "\n".join([*lines, *(f"| {name} | {' | '.join(found)} |" for name, found in cells.items())])


def main() -> None:
    command = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Table, tyro.conf.subcommand("table")],
        description=__doc__,
    )
    if isinstance(command, Run):
        run(command)
    else:
        # Longer trainings return more and differ in more than that: most of a correlation may be the length.
        sys.stdout.write(f"{table(command.results)}\n\nof those trained to their end\n\n")
        sys.stdout.write(f"{table(command.results, ['all'])}\n")


if __name__ == "__main__":
    main()
