"""Trains this package and its peers on the same transitions, and keeps the returns: a row is a task, a method, a seed.

From the repository's root, after the README's installation; goes on where it was stopped::

    python tests/learning/benchmark.py run --tasks halfcheetah-medium --methods BC "IQL (tensor)" --seeds 5
    python tests/learning/benchmark.py table

A million steps on HalfCheetah, three seeds, hours each::

    python tests/learning/benchmark.py run --tasks halfcheetah-medium-1m --methods "IQL (tensor)" --seeds 3

All methods get the same rows, normalised beforehand (observations standardised, actions in [-1, 1], rewards by the
task's scale), the same networks, batches of 256, rates of 3e-4 without a schedule, and the same gradient steps; those
that vary one of these say so by their name. The million steps have the authors' setting instead. What counts is the
last policy, over 20 episodes that start the same for every method; a seed that diverged counts as it was last seen, and
is counted. ``results/benchmark/TASK.json`` has the returns, the curve and the versions of each row. Datasets are made
by ``iql-plugins make-dataset`` in the folder that ``--made`` names, or are those of others in ``--data``.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy.stats import trim_mean
from tensordict import TensorDict

from iql_plugins import checkpoint, read_dataset
from iql_plugins.cli import main as command_line
from iql_plugins.cli.rollouts import environment_spaces, rollouts
from iql_plugins.cli.settings import versions
from iql_plugins.cli.training import adapter_training
from iql_plugins.config import IQLConfig, preset
from iql_plugins.data.episodes import episode_lengths
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.ope.intervals import bootstrap_interval
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent
from iql_plugins.training.learner import DivergenceError
from iql_plugins.training.multi_seed import fit_together

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
        scale: the returns of the scores 0 and 100.
        env: gymnasium's id; None takes the dataset's.
        n_steps: gradient steps of every method.
        hidden: units of each of two hidden layers.
        preset: of IQL's hyper-parameters, and of its relatives'.
        config: what differs from the preset.
        discrete: whether actions are.
        comparable: whether an episode of a higher return is a better one: not where episodes differ by how near to the
            goal they begin, and not where each row at the goal is an episode of its own.
    """

    dataset: str
    scale: tuple[float, float]
    env: str | None = None
    n_steps: int = 30_000
    hidden: int = 256
    preset: str = "locomotion"
    config: Mapping[str, Any] = field(default_factory=dict)
    discrete: bool = False
    comparable: bool = True


# Scores: D4RL's random and expert policies for MuJoCo; the mean over 20 starts of random actions, and of what made the
# data without its noise, for mazes; random actions and the best possible for the others.
_UMAZE, _MEDIUM, _OGBENCH = (10.0, 235.7), (2.2, 451.5), (-1000.0, -161.4)
_HOPPER, _HALFCHEETAH = (-20.3, 3234.3), (-280.2, 12135.0)
_PENDULUM, _CARTPOLE_V0, _CARTPOLE = (-1148.3, -150.0), (24.1, 200.0), (24.1, 500.0)
_maze = partial(Task, hidden=128, preset="maze2d", comparable=False)
# Its rewards are -1 and 0 already, which the preset's shift makes of antmaze's. Values begin at 0, and are -80 at the
# start after some 50,000 steps: with fewer, policies find the goal now and then.
_ogbench = partial(
    Task,
    scale=_OGBENCH,
    n_steps=60_000,
    hidden=128,
    preset="antmaze",
    config={"reward_shift": 0.0},
    comparable=False,
)
_mujoco = partial(Task, hidden=128)
# As published: what the other tasks leave out for the sake of peers.
_AUTHORS = {
    name: preset("locomotion-paper").of()[name]
    for name in ("normalize_observations", "initialization", "actor_schedule")
}
_pendulum = partial(Task, scale=_PENDULUM, n_steps=10_000, hidden=128, config={"expectile": 0.9})
_cartpole = partial(Task, hidden=128, discrete=True)
TASKS = {
    "pointmaze-umaze": _maze("pointmaze-umaze", _UMAZE),
    "pointmaze-medium": _maze("pointmaze-medium", _MEDIUM),
    "ogbench-pointmaze-navigate": _ogbench("ogbench-pointmaze-navigate"),
    "ogbench-pointmaze-stitch": _ogbench("ogbench-pointmaze-stitch"),
    "hopper-medium": _mujoco("hopper-medium", _HOPPER),
    "hopper-replay": _mujoco("hopper-replay", _HOPPER),
    "hopper-replay-300k": _mujoco("hopper-replay", _HOPPER, n_steps=300_000),
    "halfcheetah-medium": _mujoco("halfcheetah-medium", _HALFCHEETAH),
    "halfcheetah-medium-300k": Task("halfcheetah-medium", _HALFCHEETAH, n_steps=300_000),
    "halfcheetah-medium-1m": Task("halfcheetah-medium", _HALFCHEETAH, n_steps=1_000_000, config=_AUTHORS),
    "pendulum-mixed": _pendulum("pendulum-mixed"),
    "reagent-pendulum": _pendulum("reagent_pendulum_mixed.npz", env="Pendulum-v1"),
    "reagent-cartpole": _cartpole("reagent_cartpole_mixed.npz", _CARTPOLE_V0, "CartPole-v0", 5_000),
    "cartpole-mixed": _cartpole("cartpole-mixed", _CARTPOLE, n_steps=10_000),
}  # fmt: skip
#: Of the tables; the rest have a command and no row.
SHOWN = (
    "pointmaze-umaze",
    "ogbench-pointmaze-navigate",
    "hopper-replay",
    "halfcheetah-medium",
    "reagent-pendulum",
    "reagent-cartpole",
)


@dataclass(frozen=True)
class Problem:
    """What a method gets.

    Attributes:
        data: normalised transitions by the key layout, observations as vectors.
        sha256: of the dataset, as ``inspect`` and run directories have it.
        spaces: of these.
        config: IQL's hyper-parameters.
        env: gymnasium's id.
        act: makes a policy of normalised observations one of the environment's.
    """

    data: TensorDict
    sha256: str
    spaces: Spaces
    config: IQLConfig
    env: str
    act: Callable[[Act], Callable[[Any], Any]]


def file_of(task: Task, data: str, made: str) -> Path:
    """A task's dataset, which is made if it is one that can be, and not there yet."""
    if task.dataset.endswith(".npz"):
        return Path(data) / task.dataset
    file = Path(made) / f"{task.dataset}-0.npz"
    if not file.exists() and command_line(["make-dataset", task.dataset, "--out", made]) != 0:
        raise SystemExit(1)
    return file


def config_of(task: Task, changes: Mapping[str, Any]) -> IQLConfig:
    """IQL's hyper-parameters on a task: its preset's, but for what all methods have in common and what it says."""
    common: dict[str, Any] = {
        "n_steps": task.n_steps,
        "hidden_sizes": (task.hidden, task.hidden),
        "actor_schedule": "constant",
        "normalize_observations": True,
        "initialization": "torch",
        "actor_learning_rate": 3e-4,
        "critic_learning_rate": 3e-4,
        "value_learning_rate": 3e-4,
        "compile": "yes",
    }
    return preset(task.preset, **{**common, **task.config, **changes})


def problem_of(task: Task, file: Path, changes: Mapping[str, Any]) -> Problem:
    """Reads a dataset, and normalises it as the hyper-parameters have it."""
    source = read_dataset(file)
    env = task.env or source.env
    assert env is not None
    spaces = environment_spaces(env)
    config = config_of(task, changes)
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
    config = config.replace(reward_scale=1.0, reward_shift=0.0, normalize_observations=False)
    return Problem(flat, source.sha256, normalized, config, env, of_environment)


def through(adapter: str, problem: Problem, seed: int) -> Trainer:
    """This package, as the command line trains through an adapter."""
    training = adapter_training(adapter)
    algorithm = training.from_agent(Agent(problem.spaces, problem.config, seed=seed))
    return (
        lambda count: training.fit(algorithm, problem.data, count, lambda step: None),
        lambda observations: training.to_agent(algorithm).act(observations),
    )


def best_cloned(problem: Problem, seed: int) -> Trainer:
    """Behaviour cloning of the tenth of the episodes with the highest returns."""
    lengths = episode_lengths(problem.data)
    rewards = problem.data["next", "reward"].reshape(-1)
    returns = torch.stack([episode.double().sum() for episode in rewards.split(lengths.tolist())])
    kept = returns >= returns.quantile(0.9)
    agent = Agent(problem.spaces, problem.config, seed=seed)
    return partial(agent.fit, problem.data[kept.repeat_interleave(lengths)]), agent.act


def of_d3rlpy(problem: Problem, seed: int) -> Trainer:
    """d3rlpy's own IQL."""
    from contestants import d3rlpy_fit

    import iql_d3rlpy

    with contextlib.redirect_stdout(sys.stderr):
        import d3rlpy
    d3rlpy.seed(seed)
    config = problem.config
    encoder = d3rlpy.models.VectorEncoderFactory(list(config.hidden_sizes))
    algorithm = d3rlpy.algos.IQLConfig(
        batch_size=config.batch_size, gamma=config.discount, tau=config.polyak, expectile=config.expectile,
        weight_temp=config.temperature, max_weight=config.max_weight,
        actor_encoder_factory=encoder, critic_encoder_factory=encoder, value_encoder_factory=encoder,
    ).create(device="cpu:0")  # fmt: skip
    return d3rlpy_fit(algorithm, iql_d3rlpy.to_replay_buffer(problem.data)), algorithm.predict


def plain(problem: Problem, seed: int) -> Trainer:
    """The single file of ``tests/benchmarks/plain_iql.py``."""
    import plain_iql

    torch.manual_seed(seed)
    np.random.seed(seed)
    config = problem.config
    data = {name.replace(".", "_"): tensor for name, tensor in problem.data.flatten_keys(".").items()}
    algorithm, steps = plain_iql.trained(
        data, config.batch_size, config.hidden_sizes[0], config.expectile, config.temperature
    )

    @torch.no_grad()
    def act(observations: Array) -> Array:
        actions: Array = algorithm.actor.mean(torch.as_tensor(observations)).numpy()
        return actions

    return steps, act


_THROUGH_TENSOR = partial(through, "tensor")


@dataclass(frozen=True)
class Method:
    """What trains a policy.

    Attributes:
        start: of a problem and a seed.
        changes: of hyper-parameters.
        discrete: whether it has a version for discrete actions.
        tasks: where it is trained; None for everywhere.
        ranks_episodes: whether it asks which episodes are the best.
    """

    start: Callable[[Problem, int], Trainer] = _THROUGH_TENSOR
    changes: Mapping[str, Any] = field(default_factory=dict)
    discrete: bool = True
    tasks: tuple[str, ...] | None = None
    ranks_episodes: bool = False

    def trains_on(self, name: str) -> bool:
        """Whether the method has a row for a task: not where it changes nothing."""
        task = TASKS[name]
        return (
            (self.discrete or not task.discrete)
            and (self.tasks is None or name in self.tasks)
            and (task.comparable or not self.ranks_episodes)
            and not (self.changes and config_of(task, self.changes) == config_of(task, {}))
        )


#: The same loss: one task shows it.
_ADAPTERS_ON = ("reagent-pendulum",)
PEERS = {
    "BC": Method(changes={"temperature": 0.0}),
    "10% BC": Method(best_cloned, {"temperature": 0.0}, ranks_episodes=True),
    "IQL (tensor)": Method(),
    "IQL (SB3)": Method(partial(through, "sb3"), tasks=_ADAPTERS_ON),
    "IQL (d3rlpy)": Method(partial(through, "d3rlpy"), tasks=_ADAPTERS_ON),
    "d3rlpy's IQL": Method(of_d3rlpy, discrete=False),
    "plain IQL": Method(plain, discrete=False),
}
#: Each changes one thing of IQL (tensor); an objective brings the options and the LayerNorm in V of its authors.
VARIATIONS = {
    "raw observations": Method(changes={"normalize_observations": False}),
    "raw rewards": Method(changes={"reward_scale": 1.0}),
    "cosine schedule": Method(changes={"actor_schedule": "cosine"}),
    "orthogonal": Method(changes={"initialization": "orthogonal"}),
    "LayerNorm in critics and V": Method(changes={"critic_layer_norm": True}),
    "LayerNorm in the actor": Method(changes={"actor_layer_norm": True}),
    "dropout of 0.5 in V": Method(changes={"value_dropout": 0.5}),
    "GELU": Method(changes={"activation": "gelu"}),
    # Twice as wide: the tasks that are shown have 128.
    "256 units in critics and V": Method(changes={"critic_hidden_sizes": (256, 256)}, tasks=SHOWN),
    "256 units in the actor": Method(changes={"actor_hidden_sizes": (256, 256)}, tasks=SHOWN),
    "auto temperature": Method(changes={"temperature": "auto"}),
    "auto temperature, 0.5": Method(changes={"temperature": "auto_0.5"}),
    "noise threshold 1": Method(changes={"objective_options": {"noise_threshold": 1.0}}),
    "noise threshold 2": Method(changes={"objective_options": {"noise_threshold": 2.0}}),
    "quantile": Method(changes={"value_objective": "quantile"}),
    "XQL": Method(changes={"value_objective": "gumbel"}),
    "SQL": Method(changes={"value_objective": "sparse"}),
    "EQL": Method(changes={"value_objective": "exponential"}),
    "DDPG+BC": Method(changes={"policy_extraction": "ddpg_bc"}),
    # Its source's for point mazes, as the preset maze2d has it; that of this task's, antmaze, is for ants.
    "DDPG+BC, 0.003": Method(
        changes={"policy_extraction": "ddpg_bc", "objective_options": {"bc_coefficient": 0.003}},
        tasks=("ogbench-pointmaze-navigate",),
    ),
}
METHODS = {**PEERS, **VARIATIONS}


def learn(name: str, method: str, seeds: Sequence[int], file: Path) -> dict[int, dict[str, Any]]:
    """Trains and evaluates a method: a row for each seed."""
    torch.set_num_threads(1)
    task = TASKS[name]
    problem = problem_of(task, file, METHODS[method].changes)
    config = config_of(task, METHODS[method].changes).to_json()
    rows: dict[int, dict[str, Any]] = {}
    starts = range(FIRST_SEED, FIRST_SEED + EPISODES)
    between = task.n_steps // EVALUATIONS
    begin = time.perf_counter()
    earlier: list[float] = []

    def evaluate(step: int, policies: Mapping[int, Act]) -> None:
        for seed, act in policies.items():
            returns = [episode.total for episode in rollouts(problem.act(act), problem.env, starts)]
            if not np.isfinite(returns).all():
                # Peers look at no losses: what they do shows it.
                raise DivergenceError(f"returns not finite at step {step}")
            row = rows.setdefault(seed, {"curve": []})
            row["curve"].append([step, statistics.mean(returns)])
            row["returns"] = returns

    def together() -> None:
        agents = {seed: Agent(problem.spaces, problem.config, seed=seed) for seed in seeds}
        policies = {seed: agent.act for seed, agent in agents.items()}
        fit_together(
            list(agents.values()),
            problem.data,
            EVALUATIONS * between,
            lambda step: evaluate(step, policies) if step % between == 0 else None,
        )

    def started(seed: int) -> tuple[Trainer, Callable[[], None]]:
        """A training, ours from its last evaluation on if it was stopped after one; and what keeps it for that."""
        if METHODS[method].start is not _THROUGH_TENSOR:
            return METHODS[method].start(problem, seed), lambda: None
        agent, kept = Agent(problem.spaces, problem.config, seed=seed), unfinished(name, method, seed, problem.sha256)
        if kept.exists() and (stopped := Agent.load(kept)).config == agent.config:
            agent, rows[seed] = stopped, stopped.extra["row"]
            earlier.append(stopped.extra["seconds"])

        def keep() -> None:
            agent.extra |= {"row": rows[seed], "seconds": sum(earlier) + time.perf_counter() - begin}
            kept.parent.mkdir(exist_ok=True)
            agent.save(kept)

        return (partial(agent.fit, problem.data), agent.act), keep

    def alone(seed: int) -> None:
        (fit, act), keep = started(seed)
        done = len(rows[seed]["curve"]) if seed in rows else 0
        try:
            for evaluation in range(done + 1, EVALUATIONS + 1):
                fit(between)
                evaluate(evaluation * between, {seed: act})
                keep()
        except DivergenceError as error:
            if seed not in rows:
                evaluate(0, {seed: METHODS[method].start(problem, seed)[1]})
            rows[seed]["diverged"] = str(error)

    if METHODS[method].start is _THROUGH_TENSOR and len(seeds) > 1:
        try:
            together()
        except DivergenceError:
            # One takes the others down with it: each on its own.
            rows.clear()
    for seed in seeds:
        if seed not in rows:
            alone(seed)
    seconds = round((sum(earlier) + time.perf_counter() - begin) / len(seeds))
    used = versions()
    used["packages"] |= {name: version(name) for name in ("d3rlpy", "stable-baselines3")}
    about = {"seconds": seconds, "config": config, "dataset_sha256": problem.sha256, "versions": used}
    return {seed: row | about for seed, row in rows.items()}


def unfinished(task: str, method: str, seed: int, sha256: str) -> Path:
    """Where a training is kept that may be stopped."""
    return RESULTS / "unfinished" / f"{task}, {method}, seed {seed}, {sha256[:16]}.safetensors"


@dataclass(frozen=True)
class Run:
    """Trains the rows that are not there yet."""

    tasks: tuple[str, ...] = SHOWN
    methods: tuple[str, ...] = tuple(PEERS)
    seeds: int = 5
    data: str = "../shared/data"
    """Folder of the datasets of others."""
    made: str = "datasets"
    """Folder of the datasets that are made."""
    workers: int = 2
    """Processes, of one thread each."""


@dataclass(frozen=True)
class Table:
    """Prints the tables of what is there in Markdown, with interquartile means and their intervals; draws a picture."""

    seeds: int = 5
    """Those of a method that is compared."""
    picture: Path | None = None
    """Of learning curves and the performance profile; a .svg or .png."""


def results_of(task: str) -> dict[str, dict[str, Any]]:
    """By method and seed."""
    file = RESULTS / f"{task}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def rows_of(task: str, method: str) -> dict[int, dict[str, Any]]:
    """A method's rows by seed, those of other hyper-parameters left out."""
    config = config_of(TASKS[task], METHODS[method].changes).to_json()
    return {
        int(seed): row
        for seed, row in results_of(task).get(method, {}).items()
        # Hyper-parameters that came later have defaults that change nothing.
        if IQLConfig().to_json() | row["config"] == config
    }


def missing_rows(arguments: Run, digests: Mapping[str, str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Tasks, methods and the seeds that are trained in one go. A row of another dataset is none.

    Seed by seed, so that every task has something soon; but for what can be trained over stacked parameters.
    """
    for first in range(arguments.seeds):
        for task in arguments.tasks:
            for method in arguments.methods:
                # Wide networks are not trained faster together, and alone they go on where they were stopped.
                stacked = METHODS[method].start is _THROUGH_TENSOR and TASKS[task].hidden <= 128
                if not METHODS[method].trains_on(task) or (stacked and first):
                    continue
                rows = rows_of(task, method)
                missing = tuple(
                    seed
                    for seed in (range(arguments.seeds) if stacked else [first])
                    if seed not in rows or rows[seed]["dataset_sha256"] != digests[task]
                )
                if missing:
                    yield task, method, missing


def run(arguments: Run) -> None:
    """Writes each row as soon as it is there."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    files = {task: file_of(TASKS[task], arguments.data, arguments.made) for task in arguments.tasks}
    digests = {task: read_dataset(file).sha256 for task, file in files.items()}
    failed: list[str] = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        rows = {pool.submit(learn, *row, files[row[0]]): row for row in missing_rows(arguments, digests)}
        for finished in as_completed(rows):
            task, method, seeds = rows[finished]
            if (error := finished.exception()) is not None:
                failed.append(f"{task}, {method}, seed {', '.join(map(str, seeds))}: {type(error).__name__}: {error}")
                continue
            results = results_of(task)
            found = {str(seed): row for seed, row in finished.result().items()}
            results.setdefault(method, {}).update(found)
            checkpoint.write_bytes(RESULTS / f"{task}.json", (json.dumps(results, indent=1) + "\n").encode())
            for seed in seeds:
                unfinished(task, method, seed, digests[task]).unlink(missing_ok=True)
            means = ", ".join(f"{statistics.mean(row['returns']):.1f}" for row in found.values())
            sys.stdout.write(f"{task}, {method}, seed {', '.join(found)}: {means}\n")
            sys.stdout.flush()
    if failed:
        raise SystemExit("\n".join(failed))


def scores_of(task: str, method: str, seeds: int) -> list[float] | None:
    """Mean score of each seed's episodes, from 0 to 100 as the task has it; None unless all seeds are there."""
    low, high = TASKS[task].scale
    rows = rows_of(task, method)
    if any(seed not in rows for seed in range(seeds)):
        return None
    return [100.0 * (statistics.mean(rows[seed]["returns"]) - low) / (high - low) for seed in range(seeds)]


def matrix(method: str, tasks: Sequence[str], seeds: int) -> Array | None:
    """``[seeds, tasks]`` scores; None unless all are there."""
    columns = [scores_of(task, method, seeds) for task in tasks]
    return None if None in columns else np.array(columns).T


#: From drawn scores, one array ``[*D, seeds]`` for each task, to ``[*D]``.
Measure = Callable[..., Array]


def interval(columns: Sequence[Array], measure: Measure) -> tuple[float, float, float]:
    """A measure of scores with its 95% stratified bootstrap interval: of each task the seeds are drawn on their own.

    Agarwal et al. 2021 (arXiv:2108.13264), as are the measures; their ``rliable`` does not go with pandas 3.

    Args:
        columns: the scores of each task's seeds.
        measure: of the scores that are drawn.
    """

    def statistic(*drawn: Array) -> Array:
        return measure(*(column[rows] for column, rows in zip(columns, drawn, strict=True)))

    sizes = [len(column) for column in columns]
    return float(statistic(*map(np.arange, sizes))), *bootstrap_interval(sizes, statistic)


def interquartile_mean(*scores: Array) -> Array:
    """The mean of the middle half of all scores."""
    mean: Array = trim_mean(np.concatenate(scores, -1), 0.25, axis=-1)
    return mean


def share_above(threshold: float, *scores: Array) -> Array:
    """Of all runs, those with more than a score: one point of a performance profile."""
    share: Array = (np.concatenate(scores, -1) > threshold).mean(-1)
    return share


def probability_of_improvement(*scores: Array) -> Array:
    """How likely a seed of the first half of the columns beats one of the second on the same task; half for a tie."""
    half = len(scores) // 2
    chances = [
        np.sign(mine[..., :, None] - others[..., None, :]).mean((-2, -1)) / 2 + 0.5
        for mine, others in zip(scores[:half], scores[half:], strict=True)
    ]
    return np.mean(chances, 0)


def shown(seeds: int) -> list[str]:
    """Tasks of which some method has all seeds.

    Raises:
        ValueError: if rows of a task are of different datasets.
    """
    tasks = [task for task in SHOWN if any(scores_of(task, name, seeds) for name in METHODS)]
    for task in tasks:
        digests = {row["dataset_sha256"] for name in METHODS for row in rows_of(task, name).values()}
        if len(digests) > 1:
            raise ValueError(f"rows of {task} are of {len(digests)} datasets: train all of them on one")
    return tasks


def interquartile_table(seeds: int) -> Iterator[str]:
    """A row a peer, a column a task: interquartile means over seeds; and over all tasks of continuous actions."""
    tasks = shown(seeds)
    shared = [task for task in tasks if not TASKS[task].discrete]
    heads = [f"{task} ({TASKS[task].n_steps:,} steps)" for task in tasks]
    yield f"| | {' | '.join(heads)} | {', '.join(shared)} |"
    yield f"| --- |{' --- |' * (len(tasks) + 1)}"
    for name in PEERS:
        given = [scores_of(task, name, seeds) for task in tasks]
        if any(given):
            cells = [_cell([np.array(scores)]) if scores else "" for scores in given]
            for column, task in enumerate(tasks):
                if diverged := sum("diverged" in row for seed, row in rows_of(task, name).items() if seed < seeds):
                    cells[column] += f", {diverged} diverged"
            all_of_them = matrix(name, shared, seeds)
            yield f"| {name} | {' | '.join(cells)} | {'' if all_of_them is None else _cell(list(all_of_them.T))} |"


def _cell(columns: Sequence[Array]) -> str:
    point, low, high = interval(columns, interquartile_mean)
    return f"{point:.1f} ({low:.1f} to {high:.1f})"


def gain(scores: Array, others: Array) -> Array:
    """By how much an interquartile mean is above another."""
    difference: Array = interquartile_mean(scores) - interquartile_mean(others)
    return difference


def seeds_of_both(task: str, methods: Sequence[str], least: int) -> int:
    """How many seeds from 0 on all of these methods have on a task; 0 if fewer than the least."""
    have = set.intersection(*(set(rows_of(task, name)) for name in methods))
    count = next(seed for seed in range(len(have) + 1) if seed not in have)
    return count if count >= least else 0


def variation_table(seeds: int) -> Iterator[str]:
    """A row a variation, a column a task: what it brings over IQL (tensor); bold where that is beyond the noise.

    Over all seeds that both have: a difference that a few seeds show may be looked at again with more.
    """
    tasks = shown(seeds)
    yield f"| | {' | '.join(tasks)} |"
    yield f"| --- |{' --- |' * len(tasks)}"
    for name in VARIATIONS:
        cells = []
        for task in tasks:
            count = seeds_of_both(task, (name, "IQL (tensor)"), seeds)
            if not count:
                cells.append("")
                continue
            point, low, high = interval(
                [np.array(scores_of(task, each, count)) for each in (name, "IQL (tensor)")], gain
            )
            text = f"{point:+.1f} ({low:+.1f} to {high:+.1f})" + (f", {count} seeds" if count > seeds else "")
            cells.append(f"**{text}**" if low > 0.0 or high < 0.0 else text)
        if any(cells):
            yield f"| {name} | {' | '.join(cells)} |"


def improvement_table(seeds: int) -> Iterator[str]:
    """The probability that a seed of IQL (tensor) beats one of another method on a task that both have."""
    ours = "IQL (tensor)"
    yield f"| {ours} against | tasks | probability of improvement |"
    yield "| --- | --- | --- |"
    for name in METHODS:
        both = [
            task
            for task in shown(seeds)
            if name != ours and scores_of(task, name, seeds) and scores_of(task, ours, seeds)
        ]
        if both:
            pairs = [np.array(scores_of(task, method, seeds)) for method in (ours, name) for task in both]
            point, low, high = interval(pairs, probability_of_improvement)
            yield f"| {name} | {len(both)} | {point:.2f} ({low:.2f} to {high:.2f}) |"


def draw(file: Path, seeds: int) -> None:
    """Learning curves of every task, and the share of runs above each score."""
    tasks = shown(seeds)
    figure = Figure(figsize=(12, 3.2 * ((len(tasks) + 3) // 3)), layout="constrained")
    axes = list(figure.subplots((len(tasks) + 3) // 3, 3).flat)
    colours = dict(zip(PEERS, ("C7", "C5", "C0", "C9", "C6", "C1", "C2"), strict=True))
    for task, axis in zip(tasks, axes, strict=False):
        axis.set_title(task)
        axis.set_xlabel("gradient steps")
        axis.set_ylabel("return of 20 episodes")
        for name, colour in colours.items():
            if scores_of(task, name, seeds):
                rows = rows_of(task, name)
                curves = [rows[seed]["curve"] for seed in range(seeds)]
                steps = [TASKS[task].n_steps // EVALUATIONS * evaluation for evaluation in range(1, EVALUATIONS + 1)]
                # One that diverged stays where it was last seen.
                last = [[curve[-1]] * (EVALUATIONS - len(curve)) for curve in curves]
                values = np.array(
                    [[value for _, value in curve + more] for curve, more in zip(curves, last, strict=True)]
                )
                axis.plot(steps, values.mean(0), color=colour, label=name)
                axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    continuous = [task for task in tasks if not TASKS[task].discrete]
    matrices = {name: matrix(name, continuous, seeds) for name in PEERS}
    whole = {name: each for name, each in matrices.items() if each is not None}
    thresholds = np.linspace(0.0, 110.0, 56)
    axis = axes[len(tasks)]
    axis.set_title(f"performance profile of {len(continuous)} tasks")
    axis.set_xlabel("score")
    axis.set_ylabel("share of runs above it")
    for name, scores in whole.items():
        share, low, high = np.transpose([interval(list(scores.T), partial(share_above, each)) for each in thresholds])
        axis.plot(thresholds, share, color=colours[name], label=name)
        axis.fill_between(thresholds, low, high, color=colours[name], alpha=0.15, linewidth=0)
    handles = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    for axis in axes[len(tasks) + 1 :]:
        axis.set_axis_off()
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    # Names that are referred to depend on this word instead of chance.
    with matplotlib.rc_context({"svg.hashsalt": file.stem}):
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def table(arguments: Table) -> None:
    """Writes Markdown to the standard output."""
    tables = interquartile_table, variation_table, improvement_table
    lines = [line for each in tables for line in (*each(arguments.seeds), "")][:-1]
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.picture is not None:
        draw(arguments.picture, arguments.seeds)


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
        table(command)


if __name__ == "__main__":
    main()
