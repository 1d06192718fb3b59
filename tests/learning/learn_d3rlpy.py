"""Trains our IQL and d3rlpy's own with the same hyper-parameters, and measures the policies in the environment.

``python tests/learning/learn_d3rlpy.py --data reagent_pendulum_mixed.npz pendulum-v1-sac --output learn_d3rlpy.json``
trains on each dataset with each seed; datasets of discrete actions (``reagent_cartpole_mixed.npz``) train our discrete
IQL alone, which d3rlpy lacks. The results are mean returns over episodes from the same initial states, with the
interval of each algorithm over seeds: the mean, give or take twice its standard error. The command is part of them.
"""

import argparse
import json
import logging
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import structlog
import torch
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy.models import VectorEncoderFactory
from d3rlpy.preprocessing import MultiplyRewardScaler, StandardObservationScaler

from iql_d3rlpy import BoundedActionScaler, DiscreteIQLConfig, IQLConfig, to_replay_buffer

MAX_TORQUE = np.full(1, 2.0)


def configuration(discrete: bool) -> dict[str, Any]:
    """What all algorithms have in common."""
    factory = VectorEncoderFactory(hidden_units=[64, 64])
    scalers: dict[str, Any] = {"observation_scaler": StandardObservationScaler()}
    if not discrete:
        scalers["action_scaler"] = BoundedActionScaler(minimum=-MAX_TORQUE, maximum=MAX_TORQUE)
        scalers["reward_scaler"] = MultiplyRewardScaler(0.1)
    return scalers | {
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "actor_encoder_factory": factory,
        "critic_encoder_factory": factory,
        "value_encoder_factory": factory,
    }


def configurations(discrete: bool) -> dict[str, Any]:
    """The algorithms that are compared."""
    if discrete:
        return {"ours": DiscreteIQLConfig(**configuration(True), value_learning_rate=1e-3)}
    return {
        "ours": IQLConfig(**configuration(False), value_learning_rate=1e-3),
        "d3rlpy": d3rlpy.algos.IQLConfig(**configuration(False)),
    }


def mean_return(algorithm: Any, env: gymnasium.Env[Any, Any], episodes: int) -> float:
    """Of episodes whose initial states are the same for every algorithm."""
    returns = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(algorithm.predict(observation[None])[0])
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return statistics.mean(returns)


def learn(source: str, steps: int, seeds: int, episodes: int) -> dict[str, Any]:
    """Results of all algorithms on a dataset."""
    dataset = to_replay_buffer(source)
    discrete = dataset.dataset_info.action_space == d3rlpy.constants.ActionSpace.DISCRETE
    # The recorded CartPole was cut at 200 steps.
    env = gymnasium.make("CartPole-v1", max_episode_steps=200) if discrete else gymnasium.make("Pendulum-v1")
    result: dict[str, Any] = {
        "data": statistics.mean(episode.compute_return() for episode in dataset.episodes),
        "steps": steps,
        "episodes": episodes,
    }
    for seed in range(seeds):
        for name, config in configurations(discrete).items():
            d3rlpy.seed(seed)
            algorithm = config.create()
            start = time.perf_counter()
            algorithm.fit(
                dataset, n_steps=steps, n_steps_per_epoch=1000, logger_adapter=NoopAdapterFactory(), show_progress=False
            )
            seconds = time.perf_counter() - start
            entry = result.setdefault(name, {"returns": [], "seconds": []})
            entry["returns"].append(round(mean_return(algorithm, env, episodes), 1))
            entry["seconds"].append(round(seconds, 1))
    for name in configurations(discrete):
        returns = result[name]["returns"]
        mean, error = statistics.mean(returns), statistics.stdev(returns) / len(returns) ** 0.5 if seeds > 1 else 0.0
        result[name] |= {"mean": round(mean, 1), "interval": [round(mean - 2 * error, 1), round(mean + 2 * error, 1)]}
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["pendulum-v1-sac"])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    results = {"command": f"python {shlex.join(sys.argv)}"} | {
        Path(source).stem: learn(source, arguments.steps, arguments.seeds, arguments.episodes)
        for source in arguments.data
    }
    text = json.dumps(results, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")
