"""Every policy and every space that Stable-Baselines3's off-policy algorithms take."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")

from conftest import dtypes_given
from gymnasium import spaces
from sb3_helpers import NETWORKS, OBSERVATIONS, SMALL, RandomEnv, SmallPolicy, Widened
from stable_baselines3.common.envs import BitFlippingEnv, IdentityEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from iql_plugins.config import IQLConfig
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent
from iql_sb3 import IQL, MultiInputPolicy
from iql_sb3.networks import FeaturesEncoder
from iql_sb3.policies import layer_sizes


def learned(policy: Any, env: Any, steps: int = 14, **kwargs: Any) -> IQL:
    """A model after a few steps, of which every network is known to train."""
    model = IQL(policy, env, **{"policy_kwargs": NETWORKS, **SMALL, **kwargs})
    before = {name: tensor.clone() for name, tensor in model.policy.named_parameters()}
    model.learn(steps)
    assert model.learner.step_count > 0
    changed = [name for name, tensor in model.policy.named_parameters() if not torch.equal(tensor, before[name])]
    assert len({name.split(".")[1] for name in changed}) == 3
    return model


def reloaded(model: IQL, path: Path) -> IQL:
    """The model from its file, which acts the same."""
    model.save(path / "model")
    loaded = IQL.load(path / "model")
    observation = model.env.reset()
    expected, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], expected)
    return loaded


@pytest.mark.parametrize("name", OBSERVATIONS)
@pytest.mark.parametrize("action_space", [spaces.Box(-2.0, 0.5, (2,)), spaces.Discrete(3)], ids=["box", "discrete"])
def test_every_observation_space_is_learned_from(name: str, action_space: Any, tmp_path: Path) -> None:
    loaded = reloaded(learned("MlpPolicy", RandomEnv(OBSERVATIONS[name], action_space)), tmp_path)
    one = OBSERVATIONS[name].sample()
    action, _ = loaded.predict(one)
    assert action_space.contains(action if isinstance(action_space, spaces.Box) else action.item())


def test_the_offline_phase_takes_buffers_of_every_observation_space() -> None:
    for space in OBSERVATIONS.values():
        buffer = learned("MlpPolicy", RandomEnv(space)).replay_buffer
        model = IQL("MlpPolicy", dataset=buffer, policy_kwargs=NETWORKS, **SMALL)
        assert model.observation_space == space
        model.learn_offline(2)
        other = spaces.Box(-1.0, 1.0, (9,))
        with pytest.raises(ValueError, match="observation"):
            IQL("MlpPolicy", RandomEnv(other), dataset=buffer, policy_kwargs=NETWORKS, **SMALL)


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([5.0, 0.1], np.float32)),
        spaces.Box(-1.0, 1.0, (2, 2)),
        spaces.Box(-1.0, 1.0, (2,), np.float64),
        spaces.Discrete(3, start=5),
    ],
    ids=["bounds", "matrix", "float64", "start"],
)
def test_every_action_space_is_acted_in(action_space: Any, tmp_path: Path) -> None:
    model = learned("MlpPolicy", RandomEnv(spaces.Box(-1.0, 1.0, (3,)), action_space))
    reloaded(model, tmp_path)
    offline = IQL("MlpPolicy", dataset=model.replay_buffer, policy_kwargs=NETWORKS, **SMALL)
    offline.learn_offline(2)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "error"),
    [
        (spaces.Box(-1.0, 1.0, (3,)), spaces.MultiDiscrete([2, 2]), AssertionError),
        (spaces.Box(-1.0, 1.0, (3,)), spaces.MultiBinary(2), AssertionError),
        (spaces.Box(-1.0, 1.0, (3,)), spaces.Box(-np.inf, np.inf, (2,)), AssertionError),
        (spaces.Tuple([spaces.Discrete(2)]), spaces.Discrete(2), NotImplementedError),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})}), spaces.Discrete(2), NotImplementedError),
    ],
)
def test_other_spaces_raise_the_frameworks_own_errors(observation_space: Any, action_space: Any, error: Any) -> None:
    with pytest.raises(error):
        IQL("MlpPolicy", DummyVecEnv([lambda: RandomEnv(observation_space, action_space)]), buffer_size=10)
    with pytest.raises(error):
        IQL("MlpPolicy", observation_space=observation_space, action_space=action_space, buffer_size=10)


def test_dict_observations_need_their_policy() -> None:
    env = SimpleMultiObsEnv(random_start=False)
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        IQL("MlpPolicy", env, buffer_size=10)
    with pytest.raises(AssertionError, match="N-step"):
        IQL("MultiInputPolicy", env, n_steps=3, buffer_size=10)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("n_critics", [1, 2])
def test_images_go_through_convolutions(share: bool, n_critics: int, tmp_path: Path) -> None:
    env = RandomEnv(spaces.Box(0, 255, (36, 40, 3), np.uint8), spaces.Discrete(3))
    policy_kwargs = {
        **NETWORKS,
        "features_extractor_kwargs": {"features_dim": 16},
        "share_features_extractor": share,
        "n_critics": n_critics,
    }
    model = learned("CnnPolicy", env, steps=12, policy_kwargs=policy_kwargs)
    assert isinstance(model.actor.features_extractor, NatureCNN)
    reloaded(model, tmp_path)
    ours, theirs = (view.features_extractor.linear[0].weight for view in (model.actor, model.critic))
    assert (ours is theirs) == share
    # Channels last or first, an image is the same.
    image = env.observation_space.sample()
    first, _ = model.predict(image, deterministic=True)
    second, _ = model.predict(image.transpose(2, 0, 1), deterministic=True)
    assert first == second
    agent_action = model.to_agent().act(image.transpose(2, 0, 1))
    assert first == agent_action


def test_a_shared_features_extractor_learns_from_the_actors_loss_alone() -> None:
    policy_kwargs = {"net_arch": [8], "features_extractor_class": Widened, "share_features_extractor": True}
    model = learned("MlpPolicy", RandomEnv(spaces.Box(-1.0, 1.0, (3,))), policy_kwargs=policy_kwargs)
    loss = model.policy.loss
    batch = model._batch(8, 0.0)
    outputs = loss(**batch)
    weight = model.actor.features_extractor.linear.weight
    for name, output in zip(("actor", "qvalue", "value"), outputs, strict=False):
        gradient = torch.autograd.grad(output, weight, retain_graph=True, allow_unused=True)[0]
        assert (gradient is not None and bool(gradient.any())) == (name == "actor")


@pytest.mark.parametrize(("share", "expected"), [(False, 7), (True, 3)])
def test_frames_are_bytes_until_they_are_features(share: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy_kwargs = {**NETWORKS, "share_features_extractor": share}
    model = learned("CnnPolicy", RandomEnv(spaces.Box(0, 255, (3, 36, 36), np.uint8)), policy_kwargs=policy_kwargs)
    offline = IQL("CnnPolicy", dataset=model.replay_buffer, policy_kwargs=policy_kwargs, **SMALL)
    seen = dtypes_given(FeaturesEncoder, monkeypatch)
    for each in (model, offline):
        each.policy.loss(**each._batch(8, 1.0))
        # A shared extractor runs once for s and for s', and that of the targets for s.
        assert seen == expected * [torch.uint8]
        seen.clear()


def test_a_features_extractor_of_the_users_own_is_one_for_each_network(tmp_path: Path) -> None:
    policy_kwargs = {"net_arch": [8], "features_extractor_class": Widened}
    model = learned("MlpPolicy", RandomEnv(spaces.Box(-1.0, 1.0, (3,))), policy_kwargs=policy_kwargs)
    assert isinstance(model.actor.features_extractor, Widened)
    assert model.critic.features_extractor.linear.weight.shape == (2, 6, 3)
    assert not torch.equal(*model.critic.features_extractor.linear.weight)
    reloaded(model, tmp_path)


def test_a_policy_class_of_the_users_own(tmp_path: Path) -> None:
    reloaded(learned(SmallPolicy, RandomEnv(spaces.Box(-1.0, 1.0, (3,))), policy_kwargs={}), tmp_path)


@pytest.mark.parametrize("discrete", [False, True])
def test_dict_observations_are_combined(discrete: bool, tmp_path: Path) -> None:
    env = SimpleMultiObsEnv(discrete_actions=discrete, channel_last=True, random_start=False)
    policy_kwargs = {**NETWORKS, "features_extractor_kwargs": {"cnn_output_dim": 8}}
    model = learned("MultiInputPolicy", env, policy_kwargs=policy_kwargs)
    assert isinstance(model.actor.features_extractor, CombinedExtractor)
    reloaded(model, tmp_path)
    model.policy.save(tmp_path / "policy.pt")
    observation = model.env.reset()
    expected, _ = model.predict(observation, deterministic=True)
    policy = MultiInputPolicy.load(tmp_path / "policy.pt")
    np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], expected)
    offline = IQL("MultiInputPolicy", dataset=model.replay_buffer, policy_kwargs=policy_kwargs, **SMALL)
    offline.learn_offline(2)


def test_a_dict_of_every_kind_is_combined() -> None:
    kinds = {name: OBSERVATIONS[name] for name in ("box", "discrete", "multi-discrete", "multi-binary", "float64")}
    model = learned("MultiInputPolicy", RandomEnv(spaces.Dict(kinds)))
    IQL("MultiInputPolicy", dataset=model.replay_buffer, policy_kwargs=NETWORKS, **SMALL).learn_offline(2)


def test_hindsight_replay_is_learned_from(tmp_path: Path) -> None:
    env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=4)
    kwargs = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
    model = learned("MultiInputPolicy", env, steps=30, **kwargs)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = IQL.load(tmp_path / "model", env=env)
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    loaded.learn_offline(2)
    model.learn_offline(2)
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor)
    offline = IQL("MultiInputPolicy", env, dataset=model.replay_buffer, policy_kwargs=NETWORKS, **SMALL)
    offline.learn_offline(1)
    without = IQL.load(tmp_path / "model")
    without.set_env(env)
    assert without.replay_buffer.env is without.env
    without.learn(30)


def test_frames_are_stacked() -> None:
    env = VecFrameStack(DummyVecEnv([lambda: RandomEnv(spaces.Box(-1.0, 1.0, (3,)))] * 2), n_stack=4)
    assert learned("MlpPolicy", env, steps=30).observation_space.shape == (12,)
    images = VecTransposeImage(
        VecFrameStack(DummyVecEnv([lambda: RandomEnv(spaces.Box(0, 255, (36, 36, 1), np.uint8))]), n_stack=2)
    )
    policy_kwargs = {**NETWORKS, "features_extractor_kwargs": {"features_dim": 8}}
    assert learned("CnnPolicy", images, policy_kwargs=policy_kwargs).observation_space.shape == (2, 36, 36)


def test_images_of_a_dataset_may_have_their_channels_last() -> None:
    from tensordict import TensorDict

    image = torch.randint(0, 256, (20, 36, 40, 3), dtype=torch.uint8)
    done = torch.zeros(20, 1, dtype=torch.bool)
    following = {"observation": image, "reward": torch.zeros(20, 1), "done": done, "terminated": done}
    dataset = TensorDict({"observation": image, "action": torch.rand(20, 2), "next": following}, [20])
    env = RandomEnv(spaces.Box(0, 255, (36, 40, 3), np.uint8))
    policy_kwargs = {**NETWORKS, "features_extractor_kwargs": {"features_dim": 8}}
    for model in (
        IQL("CnnPolicy", env, dataset=dataset, policy_kwargs=policy_kwargs, **SMALL),
        IQL("CnnPolicy", dataset=dataset, policy_kwargs=policy_kwargs, **SMALL),
    ):
        assert model.observation_space.shape == (3, 36, 40)
        rows = model._offline._transitions.batch(torch.arange(20))
        assert torch.equal(rows["observation"], image.movedim(-1, 1))
        model.learn_offline(1)


AGENTS = {
    "discrete": Spaces(Discrete(4), Discrete(3)),
    "dict": Spaces({"a": Box((2,)), "b": Discrete(3)}, Box((2,), low=(-1.0, -1.0), high=(2.0, 1.0))),
    "image": Spaces(Box((3, 36, 36), "uint8"), Discrete(2)),
}


@pytest.mark.parametrize("name", AGENTS)
def test_agents_of_every_space_come_and_go(name: str, tmp_path: Path) -> None:
    agent = Agent(AGENTS[name], IQLConfig(hidden_sizes=(8,), batch_size=4), seed=0)
    model = IQL.from_agent(agent)
    env_observation = model.observation_space.sample()
    action, _ = model.predict(env_observation, deterministic=True)
    np.testing.assert_array_equal(action, agent.act(env_observation))
    back = reloaded_agent(model, tmp_path)
    assert back.custom_parts() == []
    np.testing.assert_array_equal(back.act(env_observation), agent.act(env_observation))


def reloaded_agent(model: IQL, path: Path) -> Agent:
    model.save(path / "model")
    return IQL.load(path / "model").to_agent()


def test_layers_of_v_are_the_critics_unless_given() -> None:
    assert layer_sizes([4, 4]) == {"pi": (4, 4), "qf": (4, 4), "vf": (4, 4)}
    assert layer_sizes({"pi": [1], "qf": [2]})["vf"] == (2,)
    assert layer_sizes({"pi": [1], "qf": [2], "vf": [3]})["vf"] == (3,)
    assert layer_sizes(None)["pi"] == (256, 256)
    with pytest.raises(ValueError, match="'pi', 'qf'"):
        layer_sizes({"pi": [1], "qf": [2], "v": [3]})


@pytest.mark.parametrize("env", [IdentityEnv(2), IdentityEnvBox(eps=0.5)], ids=["discrete", "continuous"])
def test_identity_environments_are_solved(env: gym.Env[Any, Any]) -> None:
    model = IQL(
        "MlpPolicy",
        env,
        learning_rate=3e-3,
        gamma=0.0,
        learning_starts=300,
        buffer_size=2000,
        temperature=5.0,
        expectile=0.5,
        batch_size=64,
        policy_kwargs={"net_arch": [32]},
        seed=0,
    )
    model.learn(800)
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=5, warn=False)[0] > 90
