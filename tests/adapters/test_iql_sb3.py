"""IQL in Stable-Baselines3: it learns, saves, loads, predicts and reports as a built-in algorithm does."""

import copy
import csv
import io
import pickle
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from requirements import needs_compiler
from tensordict import TensorDict

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import iql_tensor
from iql_plugins.config import IQLConfig
from iql_plugins.data import load_dataset
from iql_plugins.losses import targets
from iql_plugins.networks import MLP
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent
from iql_plugins.training.distributed import Processes
from iql_sb3 import IQL, IQLPolicy

pytestmark = [
    pytest.mark.filterwarnings("ignore::tqdm.std.TqdmExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:.*was closed without calling:UserWarning"),
]

SMALL: dict[str, Any] = {"batch_size": 16, "buffer_size": 500, "policy_kwargs": {"net_arch": [8]}}


@pytest.fixture(scope="module")
def dataset() -> TensorDict:
    """The first episodes of the dataset that ships."""
    return load_dataset("pendulum-v1-sac")[:1000]


def model_of(env: Any = "Pendulum-v1", *, policy: Any = "MlpPolicy", **kwargs: Any) -> IQL:
    return IQL(policy, env, **{"seed": 0, **SMALL, **kwargs})


def parameters(model: IQL) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def assert_same(first: IQL, second: IQL) -> None:
    ours, theirs = first.policy.state_dict(), second.policy.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.cpu(), theirs[name].cpu()), name


class Recorder(BaseCallback):
    """Notes the counts that a callback sees."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.stop_at = stop_at
        self.started = self.ended = 0

    def _on_training_start(self) -> None:
        self.started += 1

    def _on_training_end(self) -> None:
        self.ended += 1

    def _on_step(self) -> bool:
        self.seen.append(self.num_timesteps)
        return self.num_timesteps != self.stop_at


# Offline, then online


def test_it_learns_offline_and_then_online(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset)
    before = parameters(model)
    assert model.learn_offline(5) is model
    assert model.num_timesteps == 5
    assert model.learner.step_count == model._n_updates == 5
    assert model.replay_buffer.size() == 0
    changed = [name for name, tensor in model.policy.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {name.split(".")[1] for name in changed} == {
        "actor_network_params",
        "qvalue_network_params",
        "value_network_params",
        "target_qvalue_network_params",
    }
    assert model.learn(110) is model
    assert model.replay_buffer.size() == 110
    assert model.learner.step_count == 15


def test_gradient_steps_of_one_call_look_once_whether_something_has_changed(
    dataset: TensorDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, looks = model_of(dataset=dataset), []
    look = targets._Pairs.are_those_of
    monkeypatch.setattr(targets._Pairs, "are_those_of", lambda self, loss: looks.append(loss) or look(self, loss))
    model.learn_offline(1)
    for _ in range(2):
        looks.clear()
        model.train(4)
        assert len(looks) == 1


def test_a_trained_policy_acts_from_the_first_online_step(dataset: TensorDict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(dataset=dataset, learning_starts=50)
    random_actions = 0
    sample = model.action_space.sample

    def counted() -> Any:
        nonlocal random_actions
        random_actions += 1
        return sample()

    monkeypatch.setattr(model.action_space, "sample", counted)
    model.learn(20)
    assert random_actions == 20
    model.learn_offline(2)
    model.learn(20)
    assert random_actions == 20


def test_online_actions_are_clipped_and_stored_as_executed(dataset: TensorDict) -> None:
    executed: list[np.ndarray] = []

    class Recording(gym.ActionWrapper):
        def action(self, action: np.ndarray) -> np.ndarray:
            executed.append(np.array(action))
            return action

    model = model_of(Recording(gym.make("Pendulum-v1")), dataset=dataset)
    with torch.no_grad():
        model.policy.loss.actor_network[0].module.log_std.fill_(1.0)
    model.learn_offline(1)
    model.learn(30)
    actions = np.stack(executed)
    stored = model.replay_buffer.actions[:30, 0]
    assert np.abs(actions).max() == 2.0
    assert (np.abs(actions) == 2.0).mean() > 0.2
    np.testing.assert_allclose(stored * 2.0, actions, atol=1e-6)


def test_the_online_phase_continues_the_offline_one(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, normalize_observations=True, reward_scale=0.1, reward_shift=-1.0)
    model.learn_offline(5)
    learner, optimizer = model.learner, model.learner.optimizers[0]
    normalizers = {name: tensor.clone() for name, tensor in model.policy.normalizers.state_dict().items()}
    targets = model.policy.loss.target_qvalue_network_params.data.clone()
    model.learn(101)
    assert model.learner is learner
    assert next(iter(optimizer.state.values()))["step"] == 6
    for name, tensor in model.policy.normalizers.state_dict().items():
        assert torch.equal(tensor, normalizers[name])
    moved = model.policy.loss.target_qvalue_network_params.data - targets
    assert 0 < max(float(tensor.abs().max()) for tensor in moved.values(True, True)) < 1e-3


def test_a_reward_scale_also_counts_online(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, reward_scale=0.5, reward_shift=-1.0)
    model.learn(40)
    rewards = model.replay_buffer.rewards[:40, 0]
    batch = model._batch(64, 0.0)["next_reward"].numpy()
    expected = 0.5 * rewards - 1.0
    assert all(np.isclose(expected, value).any() for value in batch.ravel())


def test_the_actors_cosine_stays_at_its_end(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, actor_schedule="cosine", actor_schedule_steps=4, learning_starts=0)
    model.learn_offline(4)
    actor = copy.deepcopy(model.policy.loss.actor_network.state_dict())
    model.learn(6)
    assert model.learner.learning_rate("actor") == 0.0
    assert model.learner.learning_rate("critic") == 3e-4
    for name, tensor in model.policy.loss.actor_network.state_dict().items():
        assert torch.equal(tensor, actor[name])


@pytest.mark.parametrize("reset", [True, False])
def test_schedules_restart_online_unless_the_count_goes_on(dataset: TensorDict, reset: bool) -> None:
    model = model_of(dataset=dataset, learning_rate=lambda left: left, actor_schedule="constant", learning_starts=0)
    model.learn_offline(10)
    model.learn(10, reset_num_timesteps=reset)
    assert model.num_timesteps == (10 if reset else 20)
    assert model.learner.learning_rate("critic") == pytest.approx(0.0)
    model.learn(10, Recorder(stop_at=4 if reset else 24), reset_num_timesteps=reset)
    # The last gradient step came after 3 steps of 10, or 23 of 30.
    assert model.learner.learning_rate("critic") == pytest.approx(0.7 if reset else 7 / 30)


def test_batches_mix_the_dataset_and_experience_by_the_offline_ratio(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, offline_ratio=0.25)
    assert model._batch(16, model.offline_ratio)["action"].shape == (16, 1)
    model.learn(30)
    model.replay_buffer.rewards[:] = 7.0
    rewards = model._batch(16, model.offline_ratio)["next_reward"]
    assert (rewards == 7.0).sum() == 12
    model.learn_offline(1)
    assert (model.learner._last_batch["next_reward"] == 7.0).sum() == 0
    assert IQL("MlpPolicy", "Pendulum-v1", buffer_size=10).offline_ratio == 0.5


def test_it_learns_online_from_scratch() -> None:
    model = model_of(learning_starts=10)
    model.learn(20)
    assert model.learner.step_count == 10


def test_learn_offline_takes_what_is_in_the_replay_buffer(tmp_path: Path) -> None:
    model = model_of(learning_starts=1000)
    model.learn(40)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other = model_of()
    with pytest.raises(ValueError, match="nothing to learn from"):
        other.learn_offline(1)
    with pytest.raises(ValueError, match="nothing to learn from"):
        other.train(1)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    other.learn_offline(3)
    assert other.learner.step_count == 3


def test_train_works_alone(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset)
    model.train(gradient_steps=3, batch_size=8)
    assert model.learner.step_count == 3
    assert model.logger.name_to_value["train/loss_qvalue"] > 0.0
    assert model.learner._last_batch["action"].shape == (8, 1)


# Without an environment


def test_no_environment_is_needed_offline(dataset: TensorDict, tmp_path: Path) -> None:
    model = IQL("MlpPolicy", dataset="pendulum-v1-sac", seed=0, **SMALL)
    assert model.observation_space == gym.make("Pendulum-v1").observation_space
    evaluation = EvalCallback(Monitor(gym.make("Pendulum-v1")), eval_freq=3, n_eval_episodes=1, verbose=0)
    model.learn_offline(3, callback=evaluation, progress_bar=True)
    assert np.isfinite(evaluation.last_mean_reward)
    model.save(tmp_path / "model")
    loaded = IQL.load(tmp_path / "model")
    observation = np.zeros(3, np.float32)
    np.testing.assert_array_equal(
        model.predict(observation, deterministic=True)[0], loaded.predict(observation, deterministic=True)[0]
    )
    with pytest.raises(RuntimeError, match="set_env"):
        loaded.learn(1)


def test_spaces_alone_are_enough(dataset: TensorDict) -> None:
    env = gym.make("Pendulum-v1")
    model = model_of(None, observation_space=env.observation_space, action_space=env.action_space)
    assert model.predict(env.observation_space.sample())[0].shape == (1,)
    model.load_dataset(dataset)
    model.learn_offline(1)
    with pytest.raises(ValueError, match="both observation_space and action_space"):
        IQL("MlpPolicy", observation_space=env.observation_space)
    with pytest.raises(ValueError, match="needs an environment, a dataset, or"):
        IQL("MlpPolicy")


def test_spaces_of_a_dataset_give_way_to_the_environments(dataset: TensorDict) -> None:
    dataset = dataset.clone()
    dataset["action"][0], dataset["action"][1] = -2.0, 2.0
    model = model_of(None, dataset=dataset)
    assert np.isinf(model.observation_space.high).all()
    model.learn_offline(1)
    model.set_env(make_vec_env("Pendulum-v1", n_envs=2))
    for holder in (model, model.policy, model.actor, model.critic, model.critic_target):
        assert holder.observation_space.high.tolist() == [1.0, 1.0, 8.0]
    model.learn(4)
    assert model.replay_buffer.size() == 2
    other = model_of(None, dataset=dataset)
    with pytest.raises(ValueError, match="observation"):
        other.set_env(gym.make("CartPole-v1"))
    other.save(file := io.BytesIO())
    file.seek(0)
    loaded = IQL.load(file, env=gym.make("Pendulum-v1"))
    assert loaded.learn(4).replay_buffer.size() == 4
    file.seek(0)
    with pytest.raises(ValueError, match="observation"):
        IQL.load(file, env=gym.make("CartPole-v1"))
    narrow = model_of(None, dataset=dataset.clone().apply_(lambda tensor: tensor))
    narrow.policy.spaces = Spaces(narrow.policy.spaces.observation, Box((1,), low=(-1.0,), high=(1.0,)))
    with pytest.raises(ValueError, match="the action space must be"):
        narrow.set_env(gym.make("Pendulum-v1"))


def test_statistics_of_vecnormalize_reach_the_evaluations(dataset: TensorDict) -> None:
    def env(training: bool) -> VecNormalize:
        return VecNormalize(make_vec_env("Pendulum-v1", env_kwargs={"max_episode_steps": 5}), training=training)

    model, evaluated = model_of(env(True), dataset=dataset), env(False)
    model.learn_offline(2, callback=EvalCallback(evaluated, eval_freq=2, n_eval_episodes=1, verbose=0))
    np.testing.assert_array_equal(evaluated.obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
    assert evaluated.obs_rms.count > 999


# Callbacks, logger, progress bar, schedules


def test_callbacks_see_gradient_steps_as_steps(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset)
    recorder = Recorder()
    model.learn_offline(4, callback=CallbackList([recorder]))
    assert recorder.seen == [1, 2, 3, 4]
    assert recorder.started == recorder.ended == 1
    model.learn_offline(2, callback=[recorder], reset_num_timesteps=False)
    assert recorder.seen == [1, 2, 3, 4, 5, 6]
    stopping = Recorder(stop_at=2)
    model.learn_offline(4, callback=stopping)
    assert stopping.seen == [1, 2]
    assert stopping.ended == 1
    calls = []

    def function(local_variables: dict[str, Any], global_variables: dict[str, Any]) -> bool:
        calls.append(local_variables["self"].num_timesteps)
        return len(calls) < 3

    model.learn_offline(10, callback=function)
    assert calls == [1, 2, 3]


def test_evaluations_stop_a_training_and_keep_the_best_model(dataset: TensorDict, tmp_path: Path) -> None:
    env = Monitor(gym.make("Pendulum-v1", max_episode_steps=5))
    model = model_of(dataset=dataset)
    stop = StopTrainingOnRewardThreshold(-1e9)
    evaluation = EvalCallback(
        env, callback_on_new_best=stop, eval_freq=2, best_model_save_path=str(tmp_path), verbose=0
    )
    model.learn_offline(10, callback=evaluation)
    assert model.num_timesteps == 2
    assert (tmp_path / "best_model.zip").exists()
    patience = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1)
    evaluation = EvalCallback(env, callback_after_eval=patience, eval_freq=1, verbose=0)
    evaluation.best_mean_reward = 1e9
    model.learn_offline(20, callback=evaluation)
    assert model.num_timesteps < 20


def test_no_episodes_are_counted_offline(dataset: TensorDict) -> None:
    model = model_of(gym.make("Pendulum-v1", max_episode_steps=5), dataset=dataset)
    episodes = StopTrainingOnMaxEpisodes(2)
    model.learn_offline(12, callback=episodes)
    assert (model.num_timesteps, episodes.n_episodes) == (12, 0)
    model.learn(50, callback=episodes)
    assert (model.num_timesteps, episodes.n_episodes) == (10, 2)


def test_evaluations_change_nothing_of_what_is_learned(dataset: TensorDict) -> None:
    env = Monitor(gym.make("Pendulum-v1", max_episode_steps=5))
    evaluation = EvalCallback(env, eval_freq=2, n_eval_episodes=1, verbose=0)

    def trained(callback: BaseCallback | None) -> IQL:
        model = model_of(dataset=dataset)
        model.learn_offline(4, callback=callback)
        return model.learn(105, callback=callback)

    assert_same(trained(None), trained(evaluation))
    assert evaluation.n_calls == 109


def test_checkpoints_are_written(dataset: TensorDict, tmp_path: Path) -> None:
    model = model_of(dataset=dataset)
    model.learn_offline(4, callback=CheckpointCallback(2, str(tmp_path), save_replay_buffer=True))
    assert {path.name for path in tmp_path.iterdir()} == {f"rl_model_{n}_steps.zip" for n in (2, 4)}
    assert IQL.load(tmp_path / "rl_model_4_steps").learner.step_count == 4


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_progress_bar_counts_gradient_steps(
    dataset: TensorDict, n_envs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stable_baselines3.common import callbacks

    bars = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total, self.n = total, 0
            bars.append(self)

        def update(self, n: int) -> None:
            self.n += n

        def refresh(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(callbacks, "tqdm", Bar)
    model = model_of(make_vec_env("Pendulum-v1", n_envs=n_envs), dataset=dataset)
    model.learn_offline(5, progress_bar=True, callback=lambda _locals, _globals: True)
    model.learn_offline(5, progress_bar=True, reset_num_timesteps=False)
    assert [(bar.total, bar.n) for bar in bars] == [(5, 5), (5, 5)]
    model.learn(6, progress_bar=True)
    assert (bars[2].total, bars[2].n) == (6, 6)


def test_the_logger_has_losses_entropy_and_health(dataset: TensorDict, tmp_path: Path) -> None:
    model = model_of(gym.make("Pendulum-v1", max_episode_steps=10), dataset=dataset, learning_starts=0)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn_offline(4, log_interval=2)
    model.learn(10 * 4)
    model.logger.close()
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    names = header.split(",")
    expected = {
        "train/loss_actor",
        "train/loss_qvalue",
        "train/loss_value",
        "train/entropy",
        "train/effective_sample_size",
        "train/share_at_max_weight",
        "train/temperature",
        "train/critic_disagreement",
        "train/signal_to_noise",
        "train/mean_value",
        "train/learning_rate",
        "train/n_updates",
        "time/total_timesteps",
        "time/fps",
        "rollout/ep_rew_mean",
    }
    assert expected <= set(names)
    assert len(rows) == 3
    for row in rows:
        assert all(
            np.isfinite(float(row.split(",")[names.index(f"train/loss_{n}")])) for n in ("actor", "qvalue", "value")
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gradient_steps": -1}, ValueError, "gradient_steps must be at least 0, got -1"),
        ({"gradient_steps": 1.5}, TypeError, "gradient_steps must be an integer, got 1.5"),
        ({"gradient_steps": "10"}, TypeError, "gradient_steps must be an integer, got '10'"),
        ({"gradient_steps": True}, ValueError, "gradient_steps must be at least 0, got True"),
        ({"gradient_steps": 2, "log_interval": 0}, ValueError, "log_interval must be at least 1, got 0"),
        ({"gradient_steps": 2, "log_interval": 0.5}, TypeError, "log_interval must be an integer, got 0.5"),
    ],
)
def test_what_is_no_count_is_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], message: str, dataset: TensorDict
) -> None:
    model = model_of(dataset=dataset)
    with pytest.raises(error, match=re.escape(message)):
        model.learn_offline(**arguments)
    assert model.learner.step_count == 0
    assert model.learn_offline(np.int64(2)).learner.step_count == 2


@pytest.mark.parametrize("bar", ["callback", "list"])
def test_a_progress_bar_of_the_frameworks_counts_gradient_steps(
    bar: str, dataset: TensorDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    class Bar:
        def __init__(self, total: int) -> None:
            assert total == 20

        def update(self, steps: int) -> None:
            counted.append(steps)

        def refresh(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("stable_baselines3.common.callbacks.tqdm", Bar)
    model = model_of(make_vec_env("Pendulum-v1", n_envs=4), dataset=dataset)
    given: dict[str, Any] = {
        "callback": {"callback": ProgressBarCallback()},
        "list": {"callback": CallbackList([ProgressBarCallback()])},
    }[bar]
    model.learn_offline(20, **given)
    assert sum(counted) == 20
    # The user's own, online, counts as the framework's does.
    model.learn(20, **given)
    assert sum(counted) == 40


def test_a_purely_offline_model_has_no_replay_buffer_until_an_environment_comes(
    dataset: TensorDict, tmp_path: Path
) -> None:
    image = spaces.Box(0, 255, (3, 84, 84), np.uint8)
    model = IQL("CnnPolicy", observation_space=image, action_space=spaces.Discrete(2), device="cpu")
    assert model.replay_buffer is None
    offline = model_of(None, dataset=dataset)
    checkpoints = CheckpointCallback(2, str(tmp_path), save_replay_buffer=True)
    offline.learn_offline(4, checkpoints)
    assert {path.suffix for path in tmp_path.iterdir()} == {".zip"}
    loaded = IQL.load(tmp_path / "rl_model_4_steps")
    assert loaded.replay_buffer is None


class OwnBuffer(NStepReplayBuffer):
    """Its signature tells nothing of its steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"n_steps": 3, **options})


def test_a_buffer_that_cannot_be_made_is_refused_before_an_environment_comes(dataset: TensorDict) -> None:
    with pytest.raises(TypeError, match="unknown"):
        model_of(None, dataset=dataset, replay_buffer_kwargs={"unknown": 1})


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_steps": 3},
        {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.99}},
        {"replay_buffer_class": NStepReplayBuffer},
        {"replay_buffer_class": OwnBuffer},
    ],
)
def test_a_dataset_has_the_steps_of_the_buffer_that_an_environment_will_bring(
    arguments: dict[str, Any], dataset: TensorDict
) -> None:
    env = make_vec_env("Pendulum-v1")
    spaces_of = {"observation_space": env.observation_space, "action_space": env.action_space}
    model = model_of(None, dataset=dataset, learning_starts=0, **spaces_of, **arguments)
    model.learn_offline(2)
    model.set_env(env)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    assert model._offline is not None
    assert model._offline.n_steps == model.replay_buffer.n_steps == 3
    model.learn(10)


def test_what_is_saved_by_hand_is_written_though_it_is_empty(dataset: TensorDict, tmp_path: Path) -> None:
    model = model_of(dataset=dataset)
    (tmp_path / "buffer.pkl").write_bytes(b"of another run")
    model.learn_offline(2)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == 0


def test_a_rate_that_was_written_after_a_schedule_is_that_of_a_model_from_the_agent(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, learning_rate=lambda left: 3e-4 * left, gradient_steps=1)
    model.learn_offline(2000, log_interval=None)
    for group in model.policy.optimizer.param_groups:
        group["lr"] = 1e-3
    other = IQL.from_agent(model.to_agent())
    for network in ("critic", "value"):
        assert other.learner.learning_rate(network) == pytest.approx(1e-3)


def test_an_empty_replay_buffer_is_not_written(dataset: TensorDict, tmp_path: Path) -> None:
    model = model_of(gym.make("Pendulum-v1"), dataset=dataset, buffer_size=100)
    model.learn_offline(4, CheckpointCallback(2, str(tmp_path), save_replay_buffer=True))
    assert {path.suffix for path in tmp_path.iterdir()} == {".zip"}
    model.learn(5, CheckpointCallback(5, str(tmp_path), save_replay_buffer=True))
    assert {path.suffix for path in tmp_path.iterdir()} == {".zip", ".pkl"}


def test_an_environment_brings_the_replay_buffer() -> None:
    pendulum = make_vec_env("Pendulum-v1", n_envs=2)
    spaces_of = {"observation_space": pendulum.observation_space, "action_space": pendulum.action_space}
    model = model_of(None, n_steps=3, **spaces_of)
    assert model.replay_buffer is None
    model.set_env(pendulum)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    assert model.replay_buffer.n_envs == 2
    model.learn(20)
    assert model.replay_buffer.size() == 10


def test_looking_at_the_logger_changes_nothing_of_what_is_learned(dataset: TensorDict) -> None:
    kwargs = {"dataset": dataset, "policy_kwargs": {"net_arch": [8], "features_extractor_class": Normalizing}}
    looked, unseen = model_of(**kwargs), model_of(**kwargs)
    looked.learn_offline(4, callback=lambda local, _: bool(local["self"].logger))
    unseen.learn_offline(4, log_interval=None)
    assert_same(looked, unseen)
    # Nor of what is told: whoever asks next is told the means of all steps.
    assert looked.metrics() == unseen.metrics() != {}
    assert looked.metrics() == {}


def test_whoever_dumps_the_log_writes_the_means_since_the_last_dump(dataset: TensorDict, tmp_path: Path) -> None:
    class Dumps(BaseCallback):
        def _on_step(self) -> bool:
            losses.append(self.model.learner.last_losses)
            if self.n_calls % 2 == 0:
                self.logger.dump(self.num_timesteps)
            return True

    losses: list[torch.Tensor] = []
    model = model_of(dataset=dataset)
    for _ in range(2):
        # Another logger is told, too.
        model.set_logger(configure(str(tmp_path), ["csv"]))
        model.learn_offline(4, Dumps(), log_interval=None)
        model.logger.close()
        rows = list(csv.DictReader((tmp_path / "progress.csv").read_text().splitlines()))
        assert [float(row["train/loss_actor"]) for row in rows] == pytest.approx(
            [float(losses[-4 + step][0] + losses[-3 + step][0]) / 2 for step in (0, 2)]
        )
        assert all(float(row["train/effective_sample_size"]) > 0.0 for row in rows)


def test_tensorboard_reads_the_log(dataset: TensorDict, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = model_of(
        gym.make("Pendulum-v1", max_episode_steps=5), dataset=dataset, tensorboard_log=str(tmp_path), learning_starts=0
    )
    model.learn_offline(4, log_interval=2)
    model.learn(20, log_interval=1, reset_num_timesteps=False)
    assert {path.name for path in tmp_path.iterdir()} == {"IQL_1"}
    events = EventAccumulator(str(tmp_path / "IQL_1"))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss_qvalue")]
    assert steps[:2] == [2, 4]
    assert 4 < steps[2] <= 24
    model.learn(5)
    assert {path.name for path in tmp_path.iterdir()} == {"IQL_1", "IQL_2"}


def test_tensorboard_gets_the_log(dataset: TensorDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stable_baselines3.common import logger, utils

    written: dict[str, set[str]] = {}

    class Writer:
        def __init__(self, log_dir: str) -> None:
            self.tags = written.setdefault(Path(log_dir).name, set())
            Path(log_dir).mkdir(parents=True, exist_ok=True)

        def add_scalar(self, tag: str, *args: Any) -> None:
            self.tags.add(tag)

        def flush(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(logger, "SummaryWriter", Writer)
    monkeypatch.setattr(utils, "SummaryWriter", Writer)
    model = model_of(dataset=dataset, tensorboard_log=str(tmp_path))
    model.learn_offline(2, log_interval=1, tb_log_name="first")
    model.learn_offline(2, log_interval=1, tb_log_name="first")
    assert written.keys() == {"first_1", "first_2"}
    assert {"train/loss_actor", "train/loss_value", "time/fps"} <= written["first_1"]


def test_learning_rates_follow_a_schedule_each(dataset: TensorDict) -> None:
    rates = {"actor": lambda left: left, "critic": 0.5}
    model = model_of(dataset=dataset, learning_rate=rates, actor_schedule="constant")
    seen = []

    def note(local_variables: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append([model.learner.learning_rate(name) for name in ("actor", "critic", "value")])
        return True

    model.learn_offline(4, callback=note)
    assert seen == [[1.0, 0.5, 3e-4], [0.75, 0.5, 3e-4], [0.5, 0.5, 3e-4], [0.25, 0.5, 3e-4]]
    with pytest.raises(ValueError, match="policy; the networks are actor, critic, value"):
        model_of(learning_rate={"policy": 1e-3})


@pytest.mark.parametrize("attribute", ["learning_rate", "lr_schedule"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_rate_or_a_schedule_that_is_put_in_the_place_of_another_counts(
    dataset: TensorDict, tmp_path: Path, attribute: str, saved: bool
) -> None:
    model = model_of(dataset=dataset, actor_schedule="constant")
    model.learn_offline(2)
    for rate in (0.125, lambda left: 0.5 * left):
        setattr(model, attribute, rate if callable(rate) or attribute == "learning_rate" else lambda _: 0.125)
        if saved:
            model.save(tmp_path / "model.zip")
            model = IQL.load(tmp_path / "model.zip", dataset=dataset)
        model.learn_offline(2)
        # The last step came after one of two.
        expected = 0.25 if callable(rate) else 0.125
        for network in ("actor", "critic", "value"):
            assert model.learner.learning_rate(network) == pytest.approx(expected)


def test_a_written_rate_follows_the_schedule_in_proportion_and_gives_way_to_another_one(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, learning_rate=lambda left: 0.01 * (1 + left), actor_schedule="constant")
    seen = []

    def write(local_variables: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(model.learner.learning_rate("critic"))
        if model.num_timesteps == 2:
            model.policy.optimizer.param_groups[1]["lr"] = 0.6
        return True

    model.learn_offline(4, callback=write)
    # The schedule was at 0.015 when it was written, and is at 0.0125 in the last step.
    assert seen == pytest.approx([0.02, 0.0175, 0.6, 0.6 * 0.0125 / 0.015])
    model.learning_rate = 0.25
    model.learn_offline(1)
    assert model.learner.base_rates() == {"actor": 0.25, "critic": 0.25, "value": 0.25}


def test_a_schedule_may_rise_from_zero(dataset: TensorDict, tmp_path: Path) -> None:
    model = model_of(dataset=dataset, learning_rate=lambda left: 1e-2 * (1 - left), actor_schedule="constant")
    seen = []

    def note(local_variables: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(model.learner.learning_rate("actor"))
        return True

    before = parameters(model)
    model.learn_offline(4, callback=note)
    assert seen == pytest.approx([0.0, 0.0025, 0.005, 0.0075])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in parameters(model).items())
    model.save(tmp_path / "model.zip")
    model = IQL.load(tmp_path / "model.zip", dataset=dataset)
    seen.clear()
    model.learn_offline(4, callback=note)
    assert seen == pytest.approx([0.0, 0.0025, 0.005, 0.0075])


def test_a_rate_that_is_written_before_the_first_step_or_after_loading_counts(
    dataset: TensorDict, tmp_path: Path
) -> None:
    def write(model: IQL, rate: float) -> None:
        for group in model.policy.optimizer.param_groups:
            group["lr"] = rate
        model.learn_offline(1)
        assert set(model.learner.base_rates().values()) == {rate}
        assert model.learner.learning_rate("critic") == rate

    model = model_of(dataset=dataset, actor_schedule="constant")
    write(model, 0.125)
    model.save(tmp_path / "model.zip")
    model = IQL.load(tmp_path / "model.zip", dataset=dataset)
    assert model.learner.learning_rate("critic") == 0.125
    write(model, 0.25)
    # A new rate is for what was saved with another one.
    model = IQL.load(tmp_path / "model.zip", dataset=dataset, learning_rate=0.5)
    assert model.learner.learning_rate("critic") == 0.5
    write(model, 0.0)
    assert model.learner.learning_rate("actor") == 0.0


def test_rates_that_were_set_on_an_agent_count_in_the_model_around_it(dataset: TensorDict) -> None:
    agent = model_of(dataset=dataset).to_agent()
    agent.learner.set_learning_rate("critic", 0.5)
    model = IQL.from_agent(agent)
    model.load_dataset(dataset)
    model.learn_offline(1)
    assert model.learner.base_rates() == {"actor": 3e-4, "critic": 0.5, "value": 3e-4}
    scheduled = model_of(dataset=dataset, learning_rate=lambda left: 0.01 * (1 + left))
    scheduled.learn_offline(2)
    model = IQL.from_agent(scheduled.to_agent())
    model.load_dataset(dataset)
    model.learn_offline(2)
    assert model.learner.learning_rate("critic") == pytest.approx(0.015)


def test_a_zip_of_an_earlier_release_goes_on(
    dataset: TensorDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"actor_schedule": "cosine", "actor_schedule_steps": 20}
    whole = model_of(dataset=dataset, learning_rate=lambda left: 0.01 * (1 + left), **schedule)
    whole.learn_offline(4)
    state = whole.learner.state_dict()
    del state["learning_rates"]
    state["actor_learning_rate"] = 0.0125
    for group in state["optimizers"][0]["param_groups"]:
        del group["schedule"]
    with monkeypatch.context() as patch:
        patch.setattr(type(whole.optimizer), "state_dict", lambda _: state)
        whole.save(tmp_path / "model.zip", exclude=["_starts"])
    resumed = IQL.load(tmp_path / "model.zip", dataset=dataset)
    for model in (whole, resumed):
        model.learn_offline(4, reset_num_timesteps=False)
    assert_same(whole, resumed)


# Saving and loading


@pytest.mark.parametrize("source", ["dataset", "replay buffer"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_loaded_model_goes_on_as_if_it_had_not_been_interrupted(
    dataset: TensorDict, tmp_path: Path, source: str, dropout: float
) -> None:
    policy_kwargs = {"net_arch": [8], "dropout": dropout}
    whole = model_of(normalize_observations=source == "dataset", policy_kwargs=policy_kwargs, learning_starts=1000,
                     dataset=dataset if source == "dataset" else None)  # fmt: skip
    if source == "replay buffer":
        whole.learn(60)
        whole.save_replay_buffer(tmp_path / "buffer")
    whole.learn_offline(5)
    whole.save(tmp_path / "model.zip")
    whole.learn_offline(5, reset_num_timesteps=False)
    resumed = IQL.load(tmp_path / "model.zip")
    # What others do with the global random state is of no consequence.
    np.random.rand(3)
    torch.rand(3)
    if source == "dataset":
        resumed.load_dataset(dataset)
    else:
        resumed.load_replay_buffer(tmp_path / "buffer")
    assert resumed.num_timesteps == 5
    resumed.learn_offline(5, reset_num_timesteps=False)
    assert_same(whole, resumed)
    assert resumed.learner.step_count == resumed._n_updates == 10


def test_no_steps_change_nothing(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset)
    before = parameters(model)
    model.learn_offline(0)
    model.train(0)
    assert model.learner.step_count == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())


def test_one_call_is_as_good_as_two(dataset: TensorDict) -> None:
    one, two = model_of(dataset=dataset), model_of(dataset=dataset)
    one.learn_offline(6)
    two.learn_offline(3)
    two.learn_offline(3)
    assert_same(one, two)


def test_a_model_can_be_saved_to_a_file_object_and_loaded_with_custom_objects(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, learning_rate=lambda left: 1e-3 * left)
    model.learn_offline(2)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = IQL.load(
        file,
        env=gym.make("Pendulum-v1"),
        device="cpu",
        custom_objects={"learning_rate": 0.5},
        dataset=dataset,
        gamma=0.5,
    )
    assert_same(model, IQL.load(io.BytesIO(file.getvalue())))
    loaded.learn_offline(1)
    assert loaded.learner.learning_rate("critic") == 0.5
    assert float(loaded.policy.loss.value_estimator.gamma) == 0.5


def test_a_model_moves_to_another_device_when_it_is_loaded(
    dataset: TensorDict, tmp_path: Path, device: torch.device
) -> None:
    model = model_of(dataset=dataset, normalize_observations=True)
    model.learn_offline(3)
    model.save(tmp_path / "model")
    observation = np.array([0.5, -0.5, 3.0], np.float32)
    expected, _ = model.predict(observation, deterministic=True)
    for name in ("cpu", device.type, "auto"):
        loaded = IQL.load(tmp_path / "model", device=name, dataset=dataset)
        assert loaded.device.type == (
            "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
        )
        assert {tensor.device.type for tensor in loaded.policy.state_dict().values()} == {loaded.device.type}
        np.testing.assert_allclose(loaded.predict(observation, deterministic=True)[0], expected, atol=1e-5)
        loaded.learn_offline(2, reset_num_timesteps=False)
        states = loaded.learner.optimizers[0].state
        assert {state["exp_avg"].device.type for state in states.values()} == {loaded.device.type}
        assert loaded.learner.step_count == 5


def test_a_loaded_model_learns_online_with_another_number_of_environments(dataset: TensorDict, tmp_path: Path) -> None:
    model = model_of(dataset=dataset, learning_starts=4)
    model.learn_offline(2)
    model.save(tmp_path / "model")
    loaded = IQL.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", n_envs=2))
    loaded.learn(10)
    assert loaded.learner.step_count == 2 + 3


def test_parameters_can_be_taken_and_put_back(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset)
    model.learn_offline(2)
    saved = copy.deepcopy(model.get_parameters())
    assert saved.keys() == {"policy", "optimizer"}
    other = model_of(seed=1)
    other.set_parameters(saved)
    assert_same(model, other)
    assert other.learner.step_count == 2
    with pytest.raises(ValueError, match="invalid object name"):
        other.set_parameters({**saved, "nobody": {}})
    with pytest.raises(ValueError, match="do not match"):
        other.set_parameters({"policy": saved["policy"]})
    shortened = dict(list(saved["policy"].items())[:-1])
    with pytest.raises(RuntimeError):
        other.set_parameters({"policy": shortened, "optimizer": saved["optimizer"]})
    changed = {name: torch.rand_like(tensor) for name, tensor in shortened.items()}
    other.set_parameters({"policy": changed}, exact_match=False)
    state = other.policy.state_dict()
    last = list(saved["policy"])[-1]
    assert torch.equal(state[last], saved["policy"][last])
    assert all(torch.equal(state[name], tensor) for name, tensor in changed.items())


@pytest.mark.parametrize("broken", ["policy", "optimizer"])
def test_parameters_that_do_not_fit_change_nothing(dataset: TensorDict, broken: str) -> None:
    model, other = model_of(dataset=dataset), model_of(dataset=dataset, seed=1)
    for trained in (model, other):
        trained.learn_offline(2)
    before, given = copy.deepcopy(model.get_parameters()), copy.deepcopy(other.get_parameters())
    if broken == "policy":
        last = list(given["policy"])[-1]
        given["policy"][last] = torch.zeros(7, 7, 7)
    else:
        given["optimizer"]["optimizers"][0]["type"] = "SGD"
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|state is that of SGD"):
        model.set_parameters(given)
    for name, tensor in before["policy"].items():
        assert torch.equal(model.policy.state_dict()[name], tensor), name
    state, after = (
        parameters["optimizer"]["optimizers"][0]["state"] for parameters in (before, model.get_parameters())
    )
    for index, moments in state.items():
        assert all(torch.equal(after[index][name], tensor) for name, tensor in moments.items())


def test_learning_rates_still_reach_the_optimiser_after_parameters_were_put_back(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, learning_rate=0.0)
    model.set_parameters(model.get_parameters())
    before = parameters(model)
    model.learn_offline(2)
    for name, tensor in model.policy.loss.actor_network.state_dict().items():
        assert torch.equal(tensor, before[f"loss.actor_network_params.{name}"])


def test_a_policy_can_be_saved_loaded_pickled_and_copied(dataset: TensorDict, tmp_path: Path) -> None:
    model = model_of(dataset=dataset, normalize_observations=True)
    model.learn_offline(2)
    model.policy.save(tmp_path / "policy.pt")
    copies = [
        IQLPolicy.load(tmp_path / "policy.pt"),
        pickle.loads(pickle.dumps(model.policy)),
        copy.deepcopy(model.policy),
    ]
    observation = np.array([0.5, -0.5, 3.0], np.float32)
    expected, _ = model.predict(observation, deterministic=True)
    for policy in copies:
        np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], expected)
        with torch.no_grad():
            for parameter in policy.actor.parameters():
                parameter.zero_()
        assert policy.predict(observation, deterministic=True)[0] == 0.0
    np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], expected)
    vector = model.policy.parameters_to_vector()
    model.policy.load_from_vector(vector)
    np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], expected)


def test_two_runs_of_a_seed_are_equal_bit_for_bit(dataset: TensorDict) -> None:
    def run() -> IQL:
        model = model_of(make_vec_env("Pendulum-v1", n_envs=2, seed=3), dataset=dataset, learning_starts=10)
        model.learn_offline(3)
        return model.learn(30)

    assert_same(run(), run())


# Predicting


def test_predict_takes_one_observation_and_many(dataset: TensorDict) -> None:
    model = model_of()
    observation = np.array([0.1, 0.2, 0.3], np.float32)
    one, state = model.predict(observation, deterministic=True)
    many, _ = model.predict(np.stack([observation] * 4), deterministic=True)
    assert one.shape == (1,)
    assert many.shape == (4, 1)
    assert state is None
    np.testing.assert_allclose(many, one[None].repeat(4, 0), atol=1e-6)
    assert not np.array_equal(model.predict(observation)[0], model.predict(observation)[0])
    np.testing.assert_array_equal(model.predict(observation.astype(np.float64), deterministic=True)[0], one)


@pytest.mark.parametrize("squashed", [False, True])
def test_actions_are_within_any_bounds(squashed: bool) -> None:
    low, high = np.array([-0.1, 3.0, -1e4], np.float32), np.array([0.3, 3.1, 1e-3], np.float32)
    model = model_of(
        None,
        observation_space=gym.spaces.Box(-1, 1, (2,)),
        action_space=gym.spaces.Box(low, high),
        policy_kwargs={"net_arch": [8], "squashed": squashed},
    )
    with torch.no_grad():
        model.policy.loss.actor_network[0].module.log_std.fill_(2.0)
    actions, _ = model.predict(np.zeros((500, 2), np.float32))
    assert ((actions >= low) & (actions <= high)).all()
    assert (actions[:, 0] > 0.25).any()
    assert (actions[:, 0] < -0.05).any()
    agent = model.to_agent()
    observation = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    np.testing.assert_allclose(model.predict(observation, deterministic=True)[0], agent.act(observation), rtol=1e-6)


def test_evaluate_policy_and_the_names_that_examples_read(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset)
    mean, _ = evaluate_policy(model, Monitor(gym.make("Pendulum-v1")), n_eval_episodes=1)
    assert mean < 0.0
    assert model.actor is model.policy.actor
    assert model.critic is model.policy.critic
    assert model.critic_target is model.policy.critic_target
    assert model.get_vec_normalize_env() is None
    observations, actions = torch.randn(5, 3), torch.rand(5, 1)
    assert model.actor(observations, deterministic=True).shape == (5, 1)
    values = model.critic(observations, actions)
    assert [value.shape for value in values] == [(5, 1), (5, 1)]
    targets = model.critic_target(observations, actions)
    for value, target in zip(values, targets, strict=True):
        torch.testing.assert_close(value, target)
    names = set(dict(model.policy.named_parameters()))
    assert all(name.startswith("loss.") for name in names)


class Normalizing(BaseFeaturesExtractor):
    """Batch norm and dropout."""

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        super().__init__(observation_space, 3)
        self.batch_norm = torch.nn.BatchNorm1d(3)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.batch_norm(observations))


def test_dropout_and_batch_norm_train_when_the_model_does(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset, tau=1.0, policy_kwargs={"net_arch": [8], "features_extractor_class": Normalizing})

    def statistics() -> list[torch.Tensor]:
        views = (model.actor, model.critic, model.critic_target)
        return [view.features_extractor.batch_norm.running_mean.clone() for view in views]

    before = statistics()
    observation = np.array([0.1, 0.2, 0.3], np.float32)
    first, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], first)
    model.learn(20)
    for old, new in zip(before, statistics(), strict=True):
        assert torch.equal(old, new)
    model.learn_offline(2)
    actor, critic, target = statistics()
    assert not torch.equal(actor, before[0])
    assert not torch.equal(critic, before[1])
    assert torch.equal(critic, target)
    model.predict(observation)
    for old, new in zip((actor, critic, target), statistics(), strict=True):
        assert torch.equal(old, new)


# Arguments of every off-policy algorithm


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({"train_freq": 4, "gradient_steps": 2}, 10),
        ({"train_freq": (1, "episode"), "gradient_steps": -1}, 20),
        ({"train_freq": 4, "gradient_steps": -1}, 20),
        ({"gradient_steps": 0}, 0),
        ({"action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))}, 20),
        ({"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}, 20),
        ({"max_grad_norm": 1.0, "loss_function": "smooth_l1"}, 20),
    ],
)
def test_the_arguments_of_an_off_policy_algorithm_work(kwargs: dict[str, Any], steps: int) -> None:
    model = model_of(gym.make("Pendulum-v1", max_episode_steps=10), learning_starts=0, **kwargs)
    model.learn(20)
    assert model.learner.step_count == steps


def test_several_environments_train_as_one(dataset: TensorDict) -> None:
    model = model_of(
        make_vec_env("Pendulum-v1", n_envs=3), dataset=dataset, learning_starts=0, train_freq=2, gradient_steps=-1
    )
    model.learn(12)
    assert model.learner.step_count == 12


def test_state_dependent_exploration_is_refused() -> None:
    with pytest.raises(ValueError, match="no state-dependent exploration"):
        model_of(use_sde=True)
    with pytest.raises(ValueError, match="no state-dependent exploration"):
        model_of(policy_kwargs={"net_arch": [8], "use_sde": True})


def test_what_sacs_policy_is_given_and_does_not_read_without_it_is_taken(tmp_path: Path) -> None:
    given = {"use_sde": False, "log_std_init": -2, "use_expln": False, "clip_mean": 1.0}
    first, second = (
        model_of(seed=0, policy_kwargs={"net_arch": [8], **given}),
        model_of(seed=0, policy_kwargs={"net_arch": [8]}),
    )
    for name, tensor in first.policy.state_dict().items():
        assert torch.equal(tensor, second.policy.state_dict()[name]), name
    first.save(tmp_path / "model.zip")
    assert IQL.load(tmp_path / "model.zip").policy_kwargs == first.policy_kwargs


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"expectile": 1.5}, "expectile"),
        ({"temperature": -1.0}, "temperature"),
        ({"gamma": 1.1}, "gamma"),
        ({"actor_schedule_steps": 0}, "actor_schedule_steps"),
        ({"offline_ratio": 2.0}, "offline_ratio"),
        ({"policy_kwargs": {"net_arch": {"pi": [8]}}}, "net_arch"),
        ({"policy_kwargs": {"net_arch": {"pi": [8], "qf": [8]}, "actor_hidden_sizes": [8]}}, "net_arch must be a list"),
        ({"policy_kwargs": {"critic_layer_norm": "yes"}}, "critic_layer_norm"),
        ({"policy_kwargs": {"initialization": "xavier"}}, "initialization"),
        ({"compile": "maybe"}, "compile"),
    ],
)
def test_a_hyper_parameter_out_of_range_is_named(kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model_of(**kwargs)


def test_a_policy_of_another_algorithm_is_refused() -> None:
    from stable_baselines3.sac.policies import SACPolicy

    with pytest.raises(TypeError, match=r"must be a subclass of .*, got SACPolicy"):
        model_of(policy=SACPolicy)
    with pytest.raises(ValueError, match="unknown"):
        model_of(policy="LstmPolicy")


def test_attributes_that_are_changed_count_from_the_next_step(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset)
    model.train(1)
    model.expectile, model.gamma, model.tau = 0.9, 0.5, 0.1
    model.train(1)
    assert model.policy.loss.expectile == 0.9
    assert float(model.policy.loss.value_estimator.gamma) == 0.5
    assert model.learner.target_updater.tau == 0.1
    model.expectile = 2.0
    before = parameters(model)
    with pytest.raises(ValueError, match="expectile"):
        model.train(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())


def test_optimiser_and_activation_are_those_asked_for(dataset: TensorDict) -> None:
    policy_kwargs = {
        "net_arch": {"pi": [4], "qf": [5], "vf": [6]},
        "activation_fn": torch.nn.Tanh,
        "optimizer_class": torch.optim.SGD,
        "optimizer_kwargs": {"momentum": 0.9},
        "n_critics": 3,
    }
    model = model_of(dataset=dataset, policy_kwargs=policy_kwargs)
    model.learn_offline(2)
    assert isinstance(model.policy.optimizer, torch.optim.SGD)
    assert len(model.critic(torch.zeros(2, 3), torch.zeros(2, 1))) == 3
    loss = model.policy.loss
    networks = (loss.actor_network, loss.qvalue_network, loss.value_network)
    widths = [next(m for m in network.modules() if isinstance(m, MLP)).layers[0].out_features for network in networks]
    assert widths == [4, 5, 6]
    assert any(isinstance(module, torch.nn.Tanh) for module in loss.actor_network.modules())
    assert not any(isinstance(module, torch.nn.ReLU) for module in loss.modules())
    assert policy_kwargs.keys() == model.policy_kwargs.keys()


# Agents


def test_the_networks_are_those_of_every_adapter(dataset: TensorDict) -> None:
    model = model_of(dataset=dataset)
    agent = model.to_agent()
    assert agent.custom_parts() == []
    assert agent.loss is model.policy.loss
    assert agent.learner is model.learner
    assert agent.generator is model.generator
    assert agent.normalizers is model.policy.normalizers


@pytest.mark.parametrize(
    ("policy_kwargs", "expected"),
    [
        ({"net_arch": []}, {"hidden_sizes": ()}),
        ({"net_arch": {"pi": [4], "qf": [4]}}, {"hidden_sizes": (4,)}),
        ({"net_arch": {"pi": [4], "qf": [5, 6]}}, {"hidden_sizes": (4,), "critic_hidden_sizes": (5, 6)}),
        ({"net_arch": [4], "actor_hidden_sizes": [3]}, {"hidden_sizes": (4,), "actor_hidden_sizes": (3,)}),
        ({"activation_fn": torch.nn.SiLU}, {"activation": "silu"}),
        ({"critic_layer_norm": True, "dropout": 0.1}, {"critic_layer_norm": True, "actor_dropout": 0.1}),
        ({"value_dropout": 0.2, "initialization": "torch"}, {"value_dropout": 0.2, "initialization": "torch"}),
    ],
    ids=str,
)
def test_what_the_policy_is_given_are_the_cores_hyper_parameters(
    policy_kwargs: dict[str, Any], expected: dict[str, Any], dataset: TensorDict
) -> None:
    agent = model_of(dataset=dataset, policy_kwargs=policy_kwargs).to_agent()
    given = agent.config.of("networks")
    assert given == IQLConfig(**expected).of("networks")
    assert agent.custom_parts() == []
    again = IQL.from_agent(agent)
    assert again.to_agent().config == agent.config
    assert again.to_agent().custom_parts() == []


def test_an_activation_without_a_name_is_ones_own(dataset: TensorDict) -> None:
    agent = model_of(dataset=dataset, policy_kwargs={"activation_fn": torch.nn.Hardtanh}).to_agent()
    assert agent.custom_parts() == ["actor_network", "value_network", "qvalue_network"]


def test_an_agent_trains_the_same_in_both_adapters(dataset: TensorDict, tmp_path: Path) -> None:
    spaces = Spaces.from_gymnasium(gym.make("Pendulum-v1").observation_space, gym.make("Pendulum-v1").action_space)
    config = IQLConfig(
        n_steps=8, batch_size=16, hidden_sizes=(8,), actor_learning_rate=1e-3, normalize_observations=True,
        reward_scale="return_range", actor_dropout=0.2,
    )  # fmt: skip
    tensor = iql_tensor.IQL.build(spaces, dataset=dataset, config=config, seed=0)
    tensor.agent.save(tmp_path / "agent.safetensors")
    model = IQL.from_agent(Agent.load(tmp_path / "agent.safetensors"))
    tensor.fit(dataset, 5)
    model.load_dataset(dataset)
    model.learn_offline(5)
    assert model.to_agent().config == tensor.agent.config
    ours, theirs = model.policy.loss.state_dict(), tensor.agent.loss.state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    # And on, after it went through the framework's own file.
    model.save(tmp_path / "model.zip")
    back = iql_tensor.IQL(IQL.load(tmp_path / "model.zip").to_agent())
    back.fit(dataset, 3)
    tensor.fit(dataset, 3)
    for name, value in tensor.agent.loss.state_dict().items():
        assert torch.equal(back.agent.loss.state_dict()[name], value), name


def test_an_agent_that_does_not_fit_is_refused(dataset: TensorDict) -> None:
    agent = model_of(dataset=dataset).to_agent()
    with pytest.raises(ValueError, match="'observation' must be"):
        IQL.from_agent(agent, gym.make("CartPole-v1"))
    agent = model_of(policy_kwargs={"net_arch": {"pi": [4], "qf": [5], "vf": [6]}}).to_agent()
    with pytest.raises(ValueError, match="not the default ones"):
        IQL.from_agent(agent)
    normalized = model_of(VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")])))
    with pytest.raises(ValueError, match="VecNormalize"):
        normalized.to_agent()


@pytest.mark.slow
@needs_compiler
def test_a_long_offline_training_of_perceptrons_is_compiled(
    dataset: TensorDict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from iql_plugins.training import learner

    eager, model = model_of(dataset=dataset, compile="no"), model_of(dataset=dataset)
    eager.learn_offline(8)
    model.learn_offline(2)
    assert not model.learner.compiled
    monkeypatch.setattr(learner, "LONG_ENOUGH_TO_COMPILE", 6)
    alone = copy.deepcopy(model)
    model.learn_offline(6)
    assert model.learner.compiled
    # Processes that train together go on doing so.
    alone.learner.processes = Processes(0, 1)
    alone._compile(6)
    assert alone.learner.compiled
    assert alone.learner.processes == Processes(0, 1)
    assert model.learner.step_count == 8
    for name, tensor in eager.policy.state_dict().items():
        torch.testing.assert_close(model.policy.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
    model.save(tmp_path / "model")
    assert IQL.load(tmp_path / "model").learner.step_count == 8


def test_several_processes_learn_from_a_dataset_alone(dataset: TensorDict) -> None:
    model = IQL("MlpPolicy", "Pendulum-v1", learning_starts=0, seed=0)
    model.learner.processes = Processes(0, 2)
    with pytest.raises(ValueError, match="together from a dataset alone"):
        model.learn(10)
    assert model.num_timesteps == 0
    model.learner.processes = None
    model.learn(10)
    model.learner.processes = Processes(0, 2)
    with pytest.raises(ValueError, match="together from a dataset alone"):
        model.learn_offline(1)
