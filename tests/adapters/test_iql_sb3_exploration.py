"""Exploration of discrete actions in Stable-Baselines3: epsilon-greedy by DQN's arguments, for an untrained policy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

pytest.importorskip("stable_baselines3")

from sb3_helpers import NETWORKS, SMALL, RandomEnv
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.evaluation import evaluate_policy

from iql_sb3 import IQL

OBSERVATIONS = spaces.Box(-1.0, 1.0, (3,))
ACTIONS = spaces.Discrete(4, start=2)


def environment() -> RandomEnv:
    return RandomEnv(OBSERVATIONS, ACTIONS)


def model_of(env: Any = None, **kwargs: Any) -> IQL:
    arguments = {**SMALL, "learning_starts": 0, "policy_kwargs": NETWORKS, "device": "cpu", **kwargs}
    return IQL("MlpPolicy", environment() if env is None else env, **arguments)


def always_first(model: IQL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the policy choose the first action, so that any other is a random one."""
    monkeypatch.setattr(model, "predict", lambda obs, **_: (np.full(len(obs), ACTIONS.start), None))


def random_share(model: IQL) -> float:
    assert model.replay_buffer is not None
    size = model.replay_buffer.size()
    # Of four actions that are drawn at random one is the policy's.
    return float((model.replay_buffer.actions[:size] != ACTIONS.start).mean()) * 4 / 3


class Rates(BaseCallback):
    """Notes the exploration rate after each step, and what the logger is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.logged: list[float] = []

    def _on_step(self) -> bool:
        self.seen.append(self.model.exploration_rate)
        self.logged.append(self.model._logger.name_to_value.get("rollout/exploration_rate"))
        return True


def test_discrete_actions_are_learned_from_scratch_without_a_warm_up() -> None:
    # At this rate a policy that clones its own first actions is sure of them before it has tried the others: without
    # exploration it stays at 75 of 100.
    env = IdentityEnv(4)
    env.action_space.seed(1)
    model = IQL(
        "MlpPolicy",
        env,
        learning_rate=1e-2,
        gamma=0.0,
        learning_starts=0,
        exploration_fraction=0.5,
        batch_size=64,
        buffer_size=1000,
        policy_kwargs={"net_arch": [32]},
        seed=1,
        device="cpu",
    )
    model.learn(400)
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=1, warn=False)[0] == 100.0


def test_the_rate_is_dqns_and_is_logged() -> None:
    asked: dict[str, Any] = {
        "exploration_fraction": 0.5,
        "exploration_initial_eps": 0.9,
        "exploration_final_eps": 0.2,
        "learning_starts": 100,
    }
    ours, theirs = Rates(), Rates()
    model_of(**asked).learn(20, ours)
    DQN("MlpPolicy", RandomEnv(OBSERVATIONS, spaces.Discrete(4)), buffer_size=100, **asked).learn(20, theirs)
    # DQN sets it after a step, for the next one, and so has none for the first.
    assert ours.seen[0] == 0.9
    assert ours.seen[1:] == pytest.approx(theirs.seen[1:])
    assert ours.logged == ours.seen


def test_an_untrained_policy_explores_and_experience_is_of_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(make_vec_env(environment, n_envs=4), exploration_fraction=0.5, train_freq=500, buffer_size=800)
    always_first(model, monkeypatch)
    rates = Rates()
    model.learn(400, rates)
    assert (rates.seen[0], rates.seen[-1]) == (1.0, 0.05)
    assert random_share(model) == pytest.approx(np.mean(rates.seen), abs=0.15)
    actions = model.replay_buffer.actions[:10, :, 0]
    # Environments explore each for themselves.
    assert any(len(set(row)) > 1 for row in actions)


@pytest.mark.parametrize("reset", [True, False])
def test_a_policy_that_has_learned_offline_explores_only_if_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    data = model_of().learn(20).replay_buffer
    model = model_of(dataset=data).learn_offline(3, log_interval=None)
    always_first(model, monkeypatch)
    model.learn(40, reset_num_timesteps=reset)
    assert model.exploration_rate == 0.0
    assert random_share(model) == 0.0
    model.exploration_final_eps = 0.5
    model.learn(40, reset_num_timesteps=reset)
    assert model.exploration_rate == 0.5
    assert random_share(model) > 0.0


def test_a_second_training_goes_on_with_the_rate_of_the_end_of_the_first() -> None:
    model = model_of().learn(20)
    rates = Rates()
    model.learn(20, rates)
    assert set(rates.seen) == {0.05}
    model.exploration_initial_eps = 0.5
    rates = Rates()
    model.learn(20, rates)
    assert rates.seen[0] == 0.5


def test_a_saved_training_goes_on_with_its_schedule(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"exploration_fraction": 1.0, "exploration_final_eps": 0.1}
    model = model_of(**arguments).learn(10)
    model.save(tmp_path / "model.zip")
    loaded = IQL.load(tmp_path / "model.zip", environment(), device="cpu")
    assert (loaded.exploration_fraction, loaded.exploration_initial_eps) == (1.0, None)
    assert (loaded.exploration_final_eps, loaded.exploration_rate) == (0.1, model.exploration_rate)
    rates = Rates()
    loaded.learn(10, rates, reset_num_timesteps=False)
    # Half of 20 steps are done: from 1.0 to 0.1 over them all.
    assert rates.seen[0] == pytest.approx(0.55)


def test_predict_does_not_explore() -> None:
    model = model_of(exploration_initial_eps=1.0, exploration_final_eps=1.0).learn(5)
    assert model.exploration_rate == 1.0
    observations = np.stack([OBSERVATIONS.sample() for _ in range(50)])
    model.policy.actor.network.load_state_dict(
        {name: tensor * 100.0 for name, tensor in model.policy.actor.network.state_dict().items()}
    )
    for deterministic in (True, False):
        model.set_random_seed(0)
        actions, _ = model.predict(observations, deterministic=deterministic)
        model.set_random_seed(0)
        assert (actions == model.policy.predict(observations, deterministic=deterministic)[0]).all()


def test_continuous_actions_have_no_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    env = RandomEnv(OBSERVATIONS)
    for name in ("exploration_initial_eps", "exploration_final_eps"):
        with pytest.raises(ValueError, match=f"{name} is for discrete actions, got 0.1 .* action_noise"):
            model_of(env, **{name: 0.1})
    rates = Rates()
    model = model_of(env, exploration_fraction=0.3, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model.learn(5, rates)
    assert rates.seen == [0.0] * 5
    assert rates.logged == [None] * 5
    model.exploration_final_eps = 0.1
    with pytest.raises(ValueError, match="exploration_final_eps is for discrete actions"):
        model.learn(5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exploration_fraction", 0.0),
        ("exploration_fraction", 1.5),
        ("exploration_initial_eps", -0.1),
        ("exploration_final_eps", 2.0),
        ("exploration_final_eps", "much"),
    ],
)
def test_an_exploration_argument_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be in .* got"):
        model_of(**{name: value})


def test_the_zoo_searches_the_exploration_of_discrete_actions() -> None:
    optuna = pytest.importorskip("optuna")
    search = pytest.importorskip("rl_zoo3.hyperparams_opt")
    from iql_sb3 import zoo

    zoo.register()
    for n_actions in (0, 1):
        trial = optuna.create_study().ask()
        search.HYPERPARAMS_SAMPLER["iql"](trial, n_actions, 1, {"using_her_replay_buffer": False})
        assert ("exploration_final_eps" in trial.params) == (n_actions == 0)
        found = search.HYPERPARAMS_CONVERTER["iql"](dict(trial.params))
        model_of(environment() if n_actions == 0 else RandomEnv(OBSERVATIONS), **found | {"policy_kwargs": NETWORKS})
