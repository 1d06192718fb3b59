"""Trains this package and its peers on the same transitions, and keeps the returns: a row is a task, a method, a seed.

From the repository's root, after the README's installation; goes on where it was stopped::

    python tests/learning/benchmark.py run --tasks cartpole-mixed --methods BC "IQL (tensor)" --seeds 5
    python tests/learning/benchmark.py table     # needs pip install rliable

All methods get the same rows, normalised beforehand (observations standardised, actions in [-1, 1], rewards over the
range of the returns), the same networks (two hidden layers of 256), batches of 256, rates of 3e-4 without a schedule,
and the same gradient steps. What counts is the last policy, over 20 episodes that start the same for every method.
``results/benchmark/TASK.json`` has the returns, the curve and the versions of each row. Datasets are made by
``iql-plugins make-dataset`` in the folder that ``--made`` names, or are those of others in ``--data``.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tensordict import TensorDict

from iql_plugins import checkpoint, read_dataset
from iql_plugins.cli import main as command_line
from iql_plugins.cli.rollouts import environment_spaces, rollouts
from iql_plugins.cli.settings import versions
from iql_plugins.cli.training import adapter_training
from iql_plugins.config import IQLConfig
from iql_plugins.data.episodes import episode_lengths, episode_returns
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent

RESULTS = Path(__file__).parent / "results" / "benchmark"
EPISODES, EVALUATIONS, FIRST_SEED = 20, 10, 10_000

Array = np.ndarray[Any, np.dtype[Any]]
#: From normalised observations ``[B, obs]`` to actions in [-1, 1], or indices.
Act = Callable[[Array], Array]
#: Takes gradient steps; and the policy behind them.
Trainer = tuple[Callable[[int], object], Act]


@dataclass(frozen=True)
class Task:
    """A dataset and an environment.

    Attributes:
        dataset: a recipe of ``make-dataset``, or a file of others.
        env: gymnasium's id; None takes the dataset's.
        n_steps: gradient steps of every method.
        config: hyper-parameters of IQL that are not the paper's for locomotion.
        discrete: whether actions are.
    """

    dataset: str
    env: str | None = None
    n_steps: int = 30_000
    config: dict[str, Any] = field(default_factory=dict)
    discrete: bool = False


_MAZE = {"expectile": 0.9, "temperature": 10.0}
TASKS = {
    "pointmaze-umaze": Task("pointmaze-umaze", config=_MAZE),
    "pointmaze-medium": Task("pointmaze-medium", config=_MAZE),
    "ogbench-pointmaze-navigate": Task("ogbench-pointmaze-navigate", config=_MAZE),
    "ogbench-pointmaze-stitch": Task("ogbench-pointmaze-stitch", config=_MAZE),
    "hopper-medium": Task("hopper-medium"),
    "hopper-replay": Task("hopper-replay"),
    "halfcheetah-medium": Task("halfcheetah-medium"),
    "cartpole-mixed": Task("cartpole-mixed", n_steps=10_000, discrete=True),
    "pendulum-mixed": Task("pendulum-mixed", n_steps=10_000, config={"expectile": 0.9}),
    "reagent-pendulum": Task("reagent_pendulum_mixed.npz", "Pendulum-v1", 10_000, {"expectile": 0.9}),
    "reagent-cartpole": Task("reagent_cartpole_mixed.npz", "CartPole-v0", 5_000, discrete=True),
}


@dataclass(frozen=True)
class Problem:
    """What all methods get.

    Attributes:
        data: normalised transitions by the key layout, observations as vectors.
        spaces: of these.
        config: IQL's hyper-parameters.
        env: gymnasium's id.
        act: makes a policy of normalised observations one of the environment's.
    """

    data: TensorDict
    spaces: Spaces
    config: IQLConfig
    env: str
    act: Callable[[Act], Callable[[Any], Any]]


def problem_of(task: Task, data: str, made: str) -> Problem:
    """Reads a task's dataset, which is made if it is one that can be, and normalises it."""
    if task.dataset.endswith(".npz"):
        file = Path(data) / task.dataset
    else:
        file = Path(made) / f"{task.dataset}-0.npz"
        if not file.exists() and command_line(["make-dataset", task.dataset, "--out", made]) != 0:
            raise SystemExit(1)
    source = read_dataset(file)
    env = task.env or source.env
    assert env is not None
    spaces = environment_spaces(env)
    config = IQLConfig(
        n_steps=task.n_steps, actor_schedule="constant", compile="no", reward_scale="return_range",
        normalize_observations=True,
    ).replace(**task.config)  # fmt: skip
    normalizers = Normalizers.fit(source.tensors, spaces, config)
    rows = normalizers(source.tensors)
    keys = list(spaces.observations)

    def vector(tensors: Any, *prefix: str) -> torch.Tensor:
        paths = [(*prefix, *((key,) if isinstance(key, str) else key)) for key in keys]
        return torch.cat([tensors[path].float().flatten(1) for path in paths], 1)

    observations = vector(rows)
    next_observations = vector(rows, "next")
    flat = TensorDict(
        {
            "observation": observations,
            "action": rows["action"],
            "next": {
                "observation": next_observations,
                **{name: rows["next", name] for name in ("reward", "done", "terminated")},
            },
        },
        [len(rows)],
    )
    unit = spaces.action
    if isinstance(unit, Box):
        unit = Box(unit.shape, "float32", (-1.0,) * unit.shape[0], (1.0,) * unit.shape[0])

    def of_environment(act: Act) -> Callable[[Any], Any]:
        def acts(batch: Any) -> Any:
            given = {key: torch.as_tensor(np.asarray(batch[key[-1]] if isinstance(key, tuple) else batch))
                     for key in keys}  # fmt: skip
            inputs = [normalizers.observation(key, value.float()).flatten(1) for key, value in given.items()]
            chosen = torch.as_tensor(np.asarray(act(torch.cat(inputs, 1).numpy())))
            return normalizers.environment_action(chosen).numpy()

        return acts

    normalized = Spaces(Box((observations.shape[1],)), unit)
    # The data are normalised: IQL's own normalisers have nothing to do.
    config = config.replace(reward_scale=1.0, normalize_observations=False)
    return Problem(flat, normalized, config, env, of_environment)


def _agent(problem: Problem, seed: int, **changes: Any) -> Agent:
    return Agent(problem.spaces, problem.config.replace(**changes), seed=seed)


def through(adapter: str, problem: Problem, seed: int, **changes: Any) -> Trainer:
    """This package, as the command line trains through an adapter."""
    training = adapter_training(adapter)
    algorithm = training.from_agent(_agent(problem, seed, **changes))
    return (
        lambda count: training.fit(algorithm, problem.data, count, lambda step: None),
        lambda observations: training.to_agent(algorithm).act(observations),
    )


def best_cloned(problem: Problem, seed: int) -> Trainer:
    """Behaviour cloning of the tenth of the episodes with the highest returns."""
    returns, lengths = episode_returns(problem.data), episode_lengths(problem.data)
    kept = returns >= returns.quantile(0.9)
    data = problem.data[kept.repeat_interleave(lengths)]
    agent = _agent(problem, seed, temperature=0.0)
    return partial(agent.fit, data), agent.act


def of_d3rlpy(problem: Problem, seed: int) -> Trainer:
    """d3rlpy's own IQL."""
    from contestants import d3rlpy_fit

    import iql_d3rlpy

    with contextlib.redirect_stdout(sys.stderr):
        import d3rlpy
    d3rlpy.seed(seed)
    config = problem.config
    algorithm = d3rlpy.algos.IQLConfig(
        batch_size=config.batch_size, gamma=config.discount, tau=config.polyak, expectile=config.expectile,
        weight_temp=config.temperature, max_weight=config.max_weight,
    ).create(device="cpu:0")  # fmt: skip
    return d3rlpy_fit(algorithm, iql_d3rlpy.to_replay_buffer(problem.data)), algorithm.predict


def plain(problem: Problem, seed: int) -> Trainer:
    """The single file of ``tests/benchmarks/plain_iql.py``."""
    import plain_iql

    torch.manual_seed(seed)
    np.random.seed(seed)
    data = {name.replace(".", "_"): tensor for name, tensor in problem.data.flatten_keys(".").items()}
    algorithm, steps = plain_iql.trained(
        data, problem.config.batch_size, 256, problem.config.expectile, problem.config.temperature
    )

    @torch.no_grad()
    def act(observations: Array) -> Array:
        actions: Array = algorithm.actor.mean(torch.as_tensor(observations)).numpy()
        return actions

    return steps, act


METHODS: dict[str, Callable[[Problem, int], Trainer]] = {
    "BC": partial(through, "tensor", temperature=0.0),
    "10% BC": best_cloned,
    "IQL (tensor)": partial(through, "tensor"),
    "IQL (SB3)": partial(through, "sb3"),
    "IQL (d3rlpy)": partial(through, "d3rlpy"),
    "d3rlpy's IQL": of_d3rlpy,
    "plain IQL": plain,
}
#: Without a discrete version.
CONTINUOUS = {"d3rlpy's IQL", "plain IQL"}
#: The same loss: one task shows it.
ADAPTERS = {"IQL (SB3)", "IQL (d3rlpy)"}


def learn(name: str, method: str, seed: int, data: str, made: str) -> dict[str, Any]:
    """Trains and evaluates a row."""
    torch.set_num_threads(1)
    task = TASKS[name]
    problem = problem_of(task, data, made)
    fit, act = METHODS[method](problem, seed)
    policy = problem.act(act)
    starts = range(FIRST_SEED, FIRST_SEED + EPISODES)
    curve: list[list[float]] = []
    returns: list[float] = []
    begin = time.perf_counter()
    for evaluation in range(1, EVALUATIONS + 1):
        fit(task.n_steps // EVALUATIONS)
        returns = [episode.total for episode in rollouts(policy, problem.env, starts)]
        curve.append([evaluation * (task.n_steps // EVALUATIONS), statistics.mean(returns)])
    return {"returns": returns, "curve": curve, "seconds": round(time.perf_counter() - begin), "versions": versions()}


@dataclass(frozen=True)
class Run:
    """Trains the rows that are not there yet."""

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 5
    data: str = "../shared/data"
    """Folder of the datasets of others."""
    made: str = "datasets"
    """Folder of the datasets that are made."""
    workers: int = 2
    """Processes, of one thread each."""


@dataclass(frozen=True)
class Table:
    """Prints the table of what is there in Markdown, with interquartile means and their intervals."""


def results_of(task: str) -> dict[str, dict[str, Any]]:
    """By method and seed."""
    file = RESULTS / f"{task}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def rows_of(arguments: Run) -> Iterator[tuple[str, str, int]]:
    """Seed by seed, so that every task has something soon."""
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            done = results_of(task)
            for method in arguments.methods:
                skipped = (TASKS[task].discrete and method in CONTINUOUS) or (
                    method in ADAPTERS and task != "pendulum-mixed"
                )
                if not skipped and str(seed) not in done.get(method, {}):
                    yield task, method, seed


def run(arguments: Run) -> None:
    """Writes each row as soon as it is there."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        problem_of(TASKS[task], arguments.data, arguments.made)
    with ProcessPoolExecutor(arguments.workers) as pool:
        rows = {pool.submit(learn, *row, arguments.data, arguments.made): row for row in rows_of(arguments)}
        for finished in as_completed(rows):
            task, method, seed = rows[finished]
            results = results_of(task)
            results.setdefault(method, {})[str(seed)] = finished.result()
            checkpoint.write_bytes(RESULTS / f"{task}.json", (json.dumps(results, indent=1) + "\n").encode())
            mean = statistics.mean(results[method][str(seed)]["returns"])
            sys.stdout.write(f"{task}, {method}, seed {seed}: {mean:.1f}\n")
            sys.stdout.flush()


def interquartile(returns: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean of the middle half of all episodes, and its 95% bootstrap interval over seeds.

    Args:
        returns: of the episodes of each seed.
    """
    from rliable import library, metrics

    scores = {"method": np.array([[statistics.mean(row)] for row in returns])}
    # One task at a time: the seeds are its strata.
    point, interval = library.get_interval_estimates(
        scores, lambda each: np.array([metrics.aggregate_iqm(each)]), reps=2000
    )
    return float(point["method"][0]), float(interval["method"][0][0]), float(interval["method"][1][0])


def table() -> None:
    """A row a task, a column a method."""
    lines = [f"| task | {' | '.join(METHODS)} |", f"| --- |{' --- |' * len(METHODS)}"]
    for task in TASKS:
        cells = []
        for method in METHODS:
            by_seed = results_of(task).get(method, {})
            if not by_seed:
                cells.append("")
                continue
            mean, low, high = interquartile([row["returns"] for row in by_seed.values()])
            cells.append(f"{mean:.0f} ({low:.0f} to {high:.0f}; {len(by_seed)})")
        if any(cells):
            lines.append(f"| {task} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    command = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Table, tyro.conf.subcommand("table")],
        description=__doc__,
    )
    # The peers of the speed benchmarks are those of this one.
    peers = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, peers)
    os.environ["PYTHONPATH"] = os.pathsep.join([peers, *filter(None, [os.environ.get("PYTHONPATH")])])
    if isinstance(command, Run):
        run(command)
    else:
        table()


if __name__ == "__main__":
    main()
