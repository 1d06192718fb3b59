"""IQL in Stable-Baselines3 learns Pendulum, in short; ``tests/learning/learn_sb3.py`` measures it at length."""

from typing import Any

import gymnasium as gym
import pytest

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from iql_plugins.data import load_dataset
from iql_sb3 import IQL


def mean_return(model: Any) -> float:
    """Over episodes that start the same."""
    env = Monitor(gym.make("Pendulum-v1"))
    env.reset(seed=1000)
    return float(evaluate_policy(model, env, n_eval_episodes=10)[0])


@pytest.mark.slow
def test_it_learns_from_poor_data_and_then_online() -> None:
    # Of an agent that has hardly begun to learn.
    dataset = load_dataset("pendulum-v1-sac")[:4000]
    model = IQL(
        "MlpPolicy",
        "Pendulum-v1",
        dataset=dataset,
        learning_rate=1e-3,
        normalize_observations=True,
        reward_scale="return_range",
        actor_schedule="constant",
        policy_kwargs={"net_arch": [64, 64]},
        batch_size=128,
        seed=0,
        device="cpu",
    )
    untrained = mean_return(model)
    offline = mean_return(model.learn_offline(1500, log_interval=None))
    online = [mean_return(model.learn(1000, log_interval=None, reset_num_timesteps=step == 0)) for step in range(2)]
    assert offline > untrained + 200, (untrained, offline, online)
    assert online[0] > offline - 100, (untrained, offline, online)
    assert online[1] > offline + 300, (untrained, offline, online)
