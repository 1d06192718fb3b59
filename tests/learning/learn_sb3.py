"""IQL in Stable-Baselines3 on Pendulum: offline beside the tensor adapter, fine-tuned online, and from scratch.

From the repository's root (some ten minutes on one core)::

    python tests/learning/learn_sb3.py

The parts that compare ``offline_ratio`` run only if they are named, and go on where they were stopped::

    python tests/learning/learn_sb3.py --parts "offline_ratio on Pendulum-v1" "offline_ratio on CartPole-v1"

``results/sb3.json`` has the command, the returns of each seed, and intervals over seeds: the mean, give or take twice
its standard error. Every return is a mean over episodes that start the same. A policy is below another by more than
noise if its return is below the 95 % interval of the other's over those episodes.
"""

import argparse
import io
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import iql_tensor
from iql_plugins.config import preset
from iql_plugins.data import load_dataset
from iql_sb3 import IQL
from iql_sb3.zoo import HYPERPARAMETERS as ZOO

ENV, DATASET = "Pendulum-v1", "pendulum-v1-sac"
CONFIG = preset("pendulum")
#: The preset by Stable-Baselines3's names.
HYPERPARAMETERS: dict[str, Any] = {
    "learning_rate": CONFIG.actor_learning_rate,
    "normalize_observations": CONFIG.normalize_observations,
    "reward_scale": CONFIG.reward_scale,
    "actor_schedule": CONFIG.actor_schedule,
    "actor_schedule_steps": CONFIG.n_steps,
    "policy_kwargs": {"net_arch": list(CONFIG.hidden_sizes)},
    "device": "cpu",
}
#: The first transitions of the dataset are those of an agent that has hardly begun to learn. After the whole training
#: on all data the policy is about as good as any; after half of it there is something left to learn.
FINE_TUNING = {
    "fine-tuning after poor data": {"transitions": 4000, "offline": 1500, "online": 4000},
    "fine-tuning after half the training": {"transitions": None, "offline": CONFIG.n_steps // 2, "online": 4000},
    "fine-tuning after all data": {"transitions": None, "offline": CONFIG.n_steps, "online": 4000},
}
EVERY = 1000
#: Datasets of others are in the folder that ``--data`` names.
RATIOS: dict[str, Any] = {
    "Pendulum-v1": {
        "dataset": DATASET,
        "offline": CONFIG.n_steps // 2,
        "online": 1000,
        "hyperparameters": HYPERPARAMETERS,
    },
    # The algorithm's defaults.
    "CartPole-v1": {
        "dataset": "{data}/tianshou_cartpole_qrdqn.npz",
        "offline": 1000,
        "online": 1000,
        "hyperparameters": {},
    },
}
RESULTS = Path(__file__).parent / "results" / "sb3.json"


class Acting:
    """An agent with Stable-Baselines3's ``predict``."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent

    def predict(self, observation: Any, **_: Any) -> tuple[Any, None]:
        return self.agent.act(observation), None


def measured(model: Any, episodes: int, env_id: str = ENV) -> tuple[float, float]:
    """Mean return, and half the width of its 95 % interval over episodes that start the same."""
    env = make_vec_env(env_id, n_envs=episodes, seed=1000)
    returns, _ = evaluate_policy(model, env, n_eval_episodes=episodes, return_episode_rewards=True)
    return statistics.mean(returns), 2.0 * statistics.stdev(returns) / math.sqrt(episodes)


def mean_return(model: Any, episodes: int, env_id: str = ENV) -> float:
    return round(measured(model, episodes, env_id)[0], 1)


def with_interval(returns: list[float]) -> dict[str, Any]:
    """Of all seeds."""
    mean = statistics.mean(returns)
    error = statistics.stdev(returns) / math.sqrt(len(returns)) if len(returns) > 1 else 0.0
    return {
        "returns": returns,
        "mean": round(mean, 1),
        "interval": [round(mean - 2 * error, 1), round(mean + 2 * error, 1)],
    }


def offline(seeds: int, episodes: int) -> dict[str, Any]:
    """Both adapters with the same hyper-parameters on the whole dataset."""
    dataset = load_dataset(DATASET)
    ours, tensors = [], []
    for seed in range(seeds):
        tensor = iql_tensor.IQL.build(dataset=dataset, config=CONFIG, seed=seed)
        tensors.append(mean_return(Acting(tensor.fit(dataset, CONFIG.n_steps)), episodes))
        model = IQL("MlpPolicy", ENV, dataset=dataset, seed=seed, **HYPERPARAMETERS)
        ours.append(mean_return(model.learn_offline(CONFIG.n_steps, log_interval=None), episodes))
    mine, theirs = with_interval(ours), with_interval(tensors)
    return {
        "gradient_steps": CONFIG.n_steps,
        "stable_baselines3": mine,
        "tensor": theirs,
        "reaches_the_level": mine["interval"][1] >= theirs["interval"][0] and mine["mean"] > theirs["mean"] - 20.0,
    }


def fine_tuning(seeds: int, episodes: int, transitions: int | None, offline: int, online: int) -> dict[str, Any]:
    """Offline on the first transitions, then online."""
    dataset = load_dataset(DATASET)[:transitions]
    before, after, by_seed = [], [], []
    for seed in range(seeds):
        model = IQL(
            "MlpPolicy", ENV, dataset=dataset, seed=seed, **HYPERPARAMETERS | {"actor_schedule": "constant"}
        ).learn_offline(offline, log_interval=None)
        first, noise = measured(model, episodes)
        curve = [
            mean_return(model.learn(EVERY, log_interval=None, reset_num_timesteps=step == 0), episodes)
            for step in range(online // EVERY)
        ]
        before.append(round(first, 1))
        after.append(curve[-1])
        by_seed.append(
            {
                "seed": seed,
                "offline": round(first, 1),
                "noise": round(noise, 1),
                "online": curve,
                "never_below_offline_by_more_than_noise": min(curve) >= first - noise,
            }
        )
    return {
        "transitions": len(dataset),
        "gradient_steps": offline,
        "environment_steps": online,
        "offline": with_interval(before),
        "online": with_interval(after),
        "gain": with_interval([round(last - first, 1) for first, last in zip(before, after, strict=True)]),
        "improves_at_every_seed": all(last > first for first, last in zip(before, after, strict=True)),
        "never_collapses": all(unit["never_below_offline_by_more_than_noise"] for unit in by_seed),
        "by_seed": by_seed,
    }


def from_scratch(seeds: int, episodes: int) -> dict[str, Any]:
    """Online alone, with the hyper-parameters that RL Zoo3 gets."""
    tuned = yaml.safe_load(ZOO.read_text())[ENV]
    steps, policy = int(tuned.pop("n_timesteps")), tuned.pop("policy")
    tuned["policy_kwargs"] = eval(tuned["policy_kwargs"])
    untrained, trained = [], []
    for seed in range(seeds):
        model = IQL(policy, ENV, seed=seed, device="cpu", **tuned)
        untrained.append(mean_return(model, episodes))
        trained.append(mean_return(model.learn(steps, log_interval=None), episodes))
    return {
        "environment_steps": steps,
        "untrained": with_interval(untrained),
        "trained": with_interval(trained),
        # What the agents that are known to have solved it reach.
        "solves_pendulum_at_every_seed": min(trained) > -200.0,
    }


def offline_ratios(
    seeds: int,
    episodes: int,
    env_id: str,
    dataset: str,
    offline: int,
    online: int,
    hyperparameters: dict[str, Any],
    done: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One policy a seed is trained offline, and goes on online from there with each share of the dataset.

    Args:
        seeds: how many.
        episodes: of each evaluation.
        env_id: the environment.
        dataset: what is learned from.
        offline: gradient steps.
        online: steps in the environment.
        hyperparameters: of the model; the actor's rate is constant.
        done: what was kept before; its seeds are not run again.
        keep: takes what there is after each seed.
    """
    part: dict[str, Any] = {
        "dataset": Path(dataset).stem,
        "gradient_steps": offline,
        "environment_steps": online,
        "hyperparameters": hyperparameters,
        "every": EVERY // 2,
        "episodes": episodes,
    }
    by_seed = done.get("by_seed", []) if part.items() <= done.items() else []
    data = load_dataset(dataset)
    for seed in range(len(by_seed), seeds):
        trained = io.BytesIO()
        model = IQL("MlpPolicy", env_id, dataset=data, seed=seed, **hyperparameters | {"actor_schedule": "constant"})
        model.learn_offline(offline, log_interval=None).save(trained)
        unit: dict[str, Any] = {"seed": seed, "offline": mean_return(model, episodes, env_id), "online": {}}
        for ratio in (0.0, 0.25, 0.5):
            trained.seek(0)
            model = IQL.load(trained, make_vec_env(env_id, seed=seed), device="cpu", dataset=data)
            model.offline_ratio = ratio
            unit["online"][str(ratio)] = [
                mean_return(
                    model.learn(part["every"], log_interval=None, reset_num_timesteps=step == 0), episodes, env_id
                )
                for step in range(online // part["every"])
            ]
        by_seed.append(unit)
        keep(part | {"by_seed": by_seed})
    return part | {"by_seed": by_seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--data", default="../shared/data", help="folder of the datasets of others")
    parser.add_argument("--parts", nargs="+", help="those to run, in the place of all but the comparisons")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"seeds": arguments.seeds, "episodes": arguments.episodes}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "offline": partial(offline, **sizes),
        **{name: partial(fine_tuning, **sizes, **steps) for name, steps in FINE_TUNING.items()},
        "from scratch": partial(from_scratch, **sizes),
    }
    usual = list(parts)

    def kept() -> dict[str, Any]:
        return json.loads(arguments.output.read_text()) if arguments.output.exists() else {}

    def keep(name: str, part: dict[str, Any]) -> None:
        # What else was kept meanwhile stays.
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(kept() | {"env": ENV, "dataset": DATASET, name: part}, indent=1) + "\n")

    for env_id, task in RATIOS.items():
        name = f"offline_ratio on {env_id}"
        task = task | {"dataset": task["dataset"].format(data=arguments.data), "env_id": env_id}
        parts[name] = partial(offline_ratios, **sizes, **task, done=kept().get(name, {}), keep=partial(keep, name))
    if unknown := set(arguments.parts or []) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    command = shlex.join(["python", "tests/learning/learn_sb3.py", *sys.argv[1:]])
    for name in arguments.parts or usual:
        start = time.perf_counter()
        part = parts[name]()
        keep(name, {"command": command, **sizes, **part, "seconds": round(time.perf_counter() - start)})
        sys.stdout.write(f"{name}: {json.dumps(kept()[name], indent=1)}\n")


if __name__ == "__main__":
    main()
