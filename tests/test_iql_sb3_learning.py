"""IQL in Stable-Baselines3 learns Pendulum: offline as the tensor adapter does, fine-tuned, and from scratch."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import iql_tensor
from iql_plugins.config import preset
from iql_plugins.data import load_dataset
from iql_sb3 import IQL

pytestmark = pytest.mark.slow

#: Returns of Pendulum vary by some hundred among starts; the mean over twenty of the same ones by much less.
EPISODES = 20
CONFIG = preset("pendulum")
HYPERPARAMETERS: dict[str, Any] = {
    "learning_rate": CONFIG.actor_learning_rate,
    "normalize_observations": CONFIG.normalize_observations,
    "reward_scale": CONFIG.reward_scale,
    "policy_kwargs": {"net_arch": list(CONFIG.hidden_sizes)},
    "device": "cpu",
}


class Acting:
    """An agent with Stable-Baselines3's ``predict``."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent

    def predict(self, observation: Any, **_: Any) -> tuple[Any, None]:
        return self.agent.act(observation), None


def mean_return(model: Any) -> float:
    env = Monitor(gym.make("Pendulum-v1"))
    env.reset(seed=1000)
    return float(evaluate_policy(model, env, n_eval_episodes=EPISODES)[0])


def test_offline_it_reaches_the_tensor_adapters_level() -> None:
    dataset = load_dataset("pendulum-v1-sac")
    theirs, ours = [], []
    for seed in range(3):
        tensor = iql_tensor.IQL.build(dataset=dataset, config=CONFIG, seed=seed)
        theirs.append(mean_return(Acting(tensor.fit(dataset, CONFIG.n_steps))))
        model = IQL(
            "MlpPolicy",
            "Pendulum-v1",
            dataset="pendulum-v1-sac",
            actor_schedule_steps=CONFIG.n_steps,
            seed=seed,
            **HYPERPARAMETERS,
        )
        ours.append(mean_return(model.learn_offline(CONFIG.n_steps, log_interval=None)))
    assert np.mean(ours) > np.mean(theirs) - 30, (ours, theirs)
    assert min(ours) > -300, ours


def fine_tuned(transitions: int | None, offline: int, online: int, seed: int) -> tuple[float, list[float]]:
    """The return after the offline phase, and after each thousand online steps."""
    dataset = load_dataset("pendulum-v1-sac")[:transitions]
    model = IQL("MlpPolicy", "Pendulum-v1", dataset=dataset, actor_schedule="constant", seed=seed, **HYPERPARAMETERS)
    first = mean_return(model.learn_offline(offline, log_interval=None))
    return first, [mean_return(model.learn(1000, reset_num_timesteps=step == 0)) for step in range(online // 1000)]


@pytest.mark.parametrize("seed", range(3))
def test_fine_tuning_improves_a_policy_of_poor_data(seed: int) -> None:
    # The first 20 episodes of an agent that has hardly begun to learn.
    first, later = fine_tuned(4000, 1500, 4000, seed)
    assert min(later) > first - 100, (first, later)
    assert later[-1] > first + 300, (first, later)


def test_fine_tuning_does_not_lose_a_good_policy() -> None:
    first, later = fine_tuned(None, CONFIG.n_steps, 3000, 0)
    assert first > -300, first
    assert min(later) > first - 100, (first, later)


def test_from_scratch_it_learns_pendulum() -> None:
    yaml = pytest.importorskip("yaml")
    from iql_sb3.zoo import HYPERPARAMETERS as ZOO

    tuned = yaml.safe_load(ZOO.read_text())["Pendulum-v1"]
    steps, policy = int(tuned.pop("n_timesteps")), tuned.pop("policy")
    tuned["policy_kwargs"] = eval(tuned["policy_kwargs"])
    model = IQL(policy, "Pendulum-v1", seed=0, device="cpu", **tuned)
    assert mean_return(model) < -900
    assert mean_return(model.learn(steps)) > -200
