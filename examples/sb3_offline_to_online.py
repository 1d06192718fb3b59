"""Offline from a dataset, then online in the environment: IQL in Stable-Baselines3, from its users' side.

``python examples/sb3_offline_to_online.py`` takes about two minutes; ``--help`` shows what can be changed.
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from iql_sb3 import IQL

HYPERPARAMETERS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "normalize_observations": True,
    "reward_scale": "return_range",
    "actor_schedule": "constant",
    "policy_kwargs": {"net_arch": [128, 128]},
}


def mean_return(model: IQL, env: Monitor[Any, Any], episodes: int) -> float:
    """Over episodes that always start the same."""
    env.reset(seed=0)
    return float(np.mean(evaluate_policy(model, env, n_eval_episodes=episodes)[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--dataset", default="pendulum-v1-sac", help="whatever iql_plugins.load_dataset takes")
    parser.add_argument("--offline-steps", type=int, default=4000)
    parser.add_argument("--online-steps", type=int, default=4000)
    parser.add_argument("--episodes", type=int, default=20, help="of each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    env: Monitor[Any, Any] = Monitor(gym.make(arguments.env))
    model = IQL("MlpPolicy", arguments.env, dataset=arguments.dataset, seed=arguments.seed, **HYPERPARAMETERS)
    print(f"untrained {mean_return(model, env, arguments.episodes):.1f}")

    every = max(1, arguments.offline_steps // 4)
    evaluation = EvalCallback(Monitor(gym.make(arguments.env)), n_eval_episodes=arguments.episodes, eval_freq=every)
    model.learn_offline(arguments.offline_steps, callback=evaluation)
    print(f"offline   {mean_return(model, env, arguments.episodes):.1f}")

    model.learn(arguments.online_steps)
    print(f"online    {mean_return(model, env, arguments.episodes):.1f}")
    model.save("pendulum_iql")


if __name__ == "__main__":
    main()
