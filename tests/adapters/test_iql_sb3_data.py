"""Batches and datasets of Stable-Baselines3: mapped, checked, scaled, mixed, and kept once."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import keywords

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import CallbackList, ConvertCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from iql_plugins.cli import main
from iql_plugins.data import DatasetError, load_dataset, summary
from iql_plugins.data import dataset as dataset_module
from iql_plugins.training.agent import build_loss
from iql_plugins.training.learner import DivergenceError
from iql_sb3 import IQL, datasets
from iql_sb3.batches import map_batch
from iql_sb3.reader import ring_transitions
from iql_sb3.spaces import layout_spaces

SMALL: dict[str, Any] = {"batch_size": 16, "buffer_size": 500, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32)
OBSERVATION, ACTION = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Box(LOW, HIGH)


def filled_buffer(
    size: int = 40,
    steps: int = 30,
    n_envs: int = 1,
    observation_space: Any = OBSERVATION,
    buffer_class: Any = ReplayBuffer,
    **kwargs: Any,
) -> ReplayBuffer:
    """A buffer of episodes of 10 steps, every second of which ends in a terminal state; rewards count the steps."""
    buffer = buffer_class(size, observation_space, ACTION, "cpu", n_envs=n_envs, **kwargs)
    observation_space.seed(0)
    ACTION.seed(0)
    observation = [observation_space.sample() for _ in range(n_envs)]

    def together(parts: list[Any]) -> Any:
        return {k: np.stack([p[k] for p in parts]) for k in parts[0]} if isinstance(parts[0], dict) else np.stack(parts)

    for step in range(steps):
        following = [observation_space.sample() for _ in range(n_envs)]
        done = step % 10 == 9
        timeout = done and step % 20 == 9
        action = np.stack([2 * (ACTION.sample() - LOW) / (HIGH - LOW) - 1 for _ in range(n_envs)])
        buffer.add(
            together(observation),
            together(following),
            action,
            np.full(n_envs, float(step)) + 1000.0 * np.arange(n_envs),
            np.full(n_envs, done),
            [{"TimeLimit.truncated": timeout}] * n_envs,
        )
        observation = [observation_space.sample() for _ in range(n_envs)] if done else following
    return buffer


def model_of(dataset: Any = None, **kwargs: Any) -> IQL:
    if kwargs.get("env") is None:
        kwargs = {"observation_space": OBSERVATION, "action_space": ACTION} | kwargs
    return IQL("MlpPolicy", dataset=dataset, **{**SMALL, **kwargs})


# Batches


def test_samples_are_mapped_to_the_key_layout() -> None:
    samples = filled_buffer().sample(8)
    batch = map_batch(samples)
    assert batch is not None
    assert batch.batch_size == (8,)
    assert batch["observation"] is samples.observations
    assert batch["action"] is samples.actions
    assert batch["next", "reward"] is samples.rewards
    assert torch.equal(batch["next", "terminated"], samples.dones.bool())
    assert batch["next", "done"].dtype == torch.bool
    assert ("next", "discount") not in batch.keys(True)
    assert map_batch({"observation": torch.zeros(3)}) is None
    assert map_batch((1, 2)) is None


def test_a_timeout_is_no_terminal_in_a_mapped_batch() -> None:
    buffer = filled_buffer()
    batch = map_batch(buffer._get_samples(np.array([8, 9, 19])))
    assert batch["next", "terminated"].squeeze(-1).tolist() == [False, False, True]


def test_the_discount_of_n_step_samples_is_that_of_the_whole_transition() -> None:
    buffer = filled_buffer(buffer_class=NStepReplayBuffer, n_steps=3, gamma=0.5)
    batch = map_batch(buffer._get_samples(np.array([0, 8])))
    assert batch["next", "discount"].squeeze(-1).tolist() == [0.125, 0.25]


def test_a_batch_of_dict_observations_is_nested() -> None:
    space = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,)), "b": gym.spaces.Box(-1, 1, (3,))})
    batch = map_batch(filled_buffer(observation_space=space, buffer_class=DictReplayBuffer).sample(4))
    assert batch["observation", "a"].shape == (4, 2)
    assert batch["next", "observation", "b"].shape == (4, 3)


def test_mapping_imports_no_framework() -> None:
    program = (
        "import sys; from iql_sb3.plugin import iql_map_batch; assert iql_map_batch(3) is None; "
        "assert 'stable_baselines3' not in sys.modules and 'gymnasium' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_one_batch_and_the_same_weights_give_the_cores_losses_and_gradients(
    n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(gamma=0.9, expectile=0.8, temperature=2.0, max_weight=50.0, n_steps=n_steps)
    model.replay_buffer = filled_buffer(**({"buffer_class": NStepReplayBuffer, "n_steps": 3} if n_steps > 1 else {}))
    samples = model.replay_buffer.sample(16)
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *args, **kwargs: samples)
    core = build_loss(layout_spaces(OBSERVATION, ACTION), model.config)
    core.load_state_dict(model.policy.loss.state_dict())
    core.target_updater_attached()
    losses = core(**keywords(map_batch(samples)))
    gradients = torch.autograd.grad(losses[0] + losses[1] + losses[2], list(core.parameters()))
    model.train(1)
    for name, loss in zip(("actor", "qvalue", "value"), losses, strict=False):
        assert model.logger.name_to_value[f"train/loss_{name}"] == loss.item()
    for (name, parameter), gradient in zip(model.policy.loss.named_parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient), name


# Datasets


def test_actions_of_a_dataset_are_scaled_as_the_buffer_stores_them() -> None:
    buffer = filled_buffer()
    as_buffer = model_of(buffer)
    as_dataset = model_of(load_dataset(buffer))
    first, second = (model._offline._transitions.batch(torch.arange(30))["action"] for model in (as_buffer, as_dataset))
    assert first.abs().max() <= 1.0
    torch.testing.assert_close(first, torch.from_numpy(buffer.actions[:30, 0]))
    torch.testing.assert_close(second, first, atol=2e-5, rtol=0)
    terminated = as_buffer._offline._transitions.batch(torch.arange(30))["next_terminated"]
    assert terminated.squeeze(-1).nonzero().tolist() == [[19]]


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("steps", [7, 25])
@pytest.mark.parametrize("shared", [False, True])
def test_a_replay_buffer_becomes_a_dataset_in_the_order_of_time(n_envs: int, steps: int, shared: bool) -> None:
    kwargs = {"optimize_memory_usage": True, "handle_timeout_termination": False} if shared else {}
    buffer = filled_buffer(10 * n_envs, steps, n_envs, **kwargs)
    dataset = ring_transitions(buffer, "the buffer")
    length = 7 if steps == 7 else 10 - shared
    rewards = dataset["next", "reward"].reshape(n_envs, length)
    expected = torch.arange(steps - length, steps, dtype=torch.float32) + 1000.0 * torch.arange(n_envs).unsqueeze(-1)
    assert torch.equal(rewards, expected)
    done = dataset["next", "done"].reshape(n_envs, length)
    # Where the next environment's begin an episode may be under way; the last one ends with the data.
    assert done[:-1, -1].all()
    following, observed = (
        dataset["next", "observation"].reshape(n_envs, length, 3),
        dataset["observation"].reshape(n_envs, length, 3),
    )
    goes_on = ~done[:, :-1]
    assert torch.equal(following[:, :-1][goes_on], observed[:, 1:][goes_on])
    slots = [(step % 10, env) for env in range(n_envs) for step in range(steps - length, steps)]
    ends = [bool(buffer.dones[slot] and not buffer.timeouts[slot]) for slot in slots]
    assert dataset["next", "terminated"].squeeze(-1).tolist() == ends
    np.testing.assert_array_equal(dataset["observation"].numpy(), [buffer.observations[slot] for slot in slots])
    np.testing.assert_array_equal(dataset["action"].numpy(), [buffer.actions[slot] for slot in slots])
    theirs = load_dataset(buffer)
    assert (dataset.exclude("action") == theirs.exclude("action")).all()
    buffer.observations[:] = 9.0
    assert not (theirs["observation"] == 9.0).any(), "a dataset is no view of the buffer"


def test_an_ordered_copy_of_a_buffer_must_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with ``memmap_dir``: steps of several environments are ordered in memory before they are written."""
    buffer = filled_buffer(300, 100, 3)
    rows = 300
    # More than the numbers of rows take, less than the steps do.
    monkeypatch.setattr(dataset_module, "available_memory", lambda: 33 * rows)
    with pytest.raises(DatasetError, match=r"ReplayBuffer needs .* bytes, more than the 9,900 that are left"):
        load_dataset(buffer, memmap_dir=tmp_path / "mapped")
    monkeypatch.setattr(dataset_module, "available_memory", lambda: 330 * rows)
    assert len(load_dataset(buffer, memmap_dir=tmp_path / "mapped")) == rows


def test_a_buffer_with_an_array_that_is_not_read_is_refused() -> None:
    buffer = filled_buffer()
    buffer.truncation = np.zeros_like(buffer.dones)  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match=r"'truncation' is not a column that is read"):
        model_of().load_dataset(buffer)
    buffer = filled_buffer()
    buffer.timeouts[3] = 1
    with pytest.raises(DatasetError, match="'timeouts' is 1 and 'dones' 0 in row 3 of environment 0"):
        model_of().load_dataset(buffer)


@pytest.mark.parametrize("key", ["steps_to_next_obs", ("next", "discount")])
def test_n_step_transitions_are_refused_rather_than_read_as_single_steps(key: Any) -> None:
    dataset = ring_transitions(filled_buffer(), "the buffer").clone()
    dataset[key] = torch.full((30, 1), 3, device="cpu")
    model = model_of()
    with pytest.raises(DatasetError, match=r"has .*(steps_to_next_obs|discount).*: give single steps, .*n_steps"):
        model.load_dataset(dataset)
    with pytest.raises(ValueError, match="nothing to learn from"):
        model.learn_offline(1)


def test_a_buffer_is_kept_once() -> None:
    rows, width = 400_000, 8
    observation_space = gym.spaces.Box(-np.inf, np.inf, (width,))
    buffer = ReplayBuffer(rows, observation_space, ACTION, "cpu")
    buffer.observations[:] = 1.0
    buffer.next_observations[:] = 1.0
    buffer.pos = rows - 1
    models = [model_of(observation_space=observation_space) for _ in range(2)]
    size = 4 * rows * (2 * width + 5)
    # The first time also takes what torch loads and keeps when it first computes.
    models[0].load_dataset(buffer)
    before = resident_bytes()
    models[1].load_dataset(buffer)
    assert len(models[1]._offline) == rows - 1
    assert resident_bytes() - before < 1.3 * size
    dataset = ring_transitions(buffer, "the buffer")
    assert dataset["observation"].data_ptr() == buffer.observations.ctypes.data


def resident_bytes() -> int:
    """Resident memory of the process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_a_dataset_that_does_not_fit_is_refused_and_named() -> None:
    env = gym.make("Pendulum-v1")
    model = IQL("MlpPolicy", env, **SMALL)
    dataset = load_dataset("pendulum-v1-sac")[:100]
    model.load_dataset(dataset)
    wide = dataset.clone().set("observation", torch.zeros(100, 4))
    with pytest.raises(ValueError, match="'observation'"):
        model.load_dataset(wide)
    beyond = dataset.clone()
    beyond["action"][3] = 50.0
    with pytest.raises(ValueError, match=r"'action' is beyond .* in 1 of 100 rows, ten times over in row 3: 50 in"):
        model.load_dataset(beyond)
    discrete = dataset.clone().set("action", torch.zeros(100, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="action"):
        model.load_dataset(discrete)
    with pytest.raises(ValueError, match="action space"):
        model.load_dataset(filled_buffer())
    with pytest.raises(ValueError, match="no dataset, file or folder 'pendulum'"):
        model.load_dataset("pendulum")
    with pytest.raises(ValueError, match="is empty"):
        model.load_dataset(ReplayBuffer(10, env.observation_space, env.action_space))
    buffer = ReplayBuffer(10, env.observation_space, env.action_space)
    buffer.pos, buffer.rewards[4] = 10 - 1, np.nan
    with pytest.raises(ValueError, match="not finite in row 4"):
        model.load_dataset(buffer)
    assert len(model._offline) == 100


def test_a_pickle_is_loaded_only_if_it_is_trusted(tmp_path: Path) -> None:
    model = model_of(filled_buffer())
    model.replay_buffer = filled_buffer()
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match="trust_pickle=True"):
        model.load_dataset(tmp_path / "buffer.pkl")
    model.load_dataset(tmp_path / "buffer.pkl", trust_pickle=True)
    assert len(model._offline) == 30
    assert model_of(str(tmp_path / "buffer.pkl"), trust_pickle=True).has_dataset


def test_normalisation_comes_from_the_dataset_and_is_needed() -> None:
    dataset = load_dataset("pendulum-v1-sac")[:400]
    model = IQL("MlpPolicy", "Pendulum-v1", normalize_observations=True, reward_scale="return_range", **SMALL)
    with pytest.raises(ValueError, match="statistics of a dataset"):
        model.learn(101)
    model.load_dataset(dataset)
    rows = model._offline._transitions.batch(torch.arange(400))
    torch.testing.assert_close(rows["observation"].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows["observation"].std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    returns = rows["next_reward"].reshape(2, 200).sum(1)
    assert abs(returns[0] - returns[1]).item() == pytest.approx(1000.0, rel=1e-4)
    model.learn_offline(1)
    mean = model.policy.normalizers.get_buffer("mean_0").clone()
    model.load_dataset(load_dataset("pendulum-v1-sac")[1000:1100])
    assert torch.equal(model.policy.normalizers.get_buffer("mean_0"), mean)
    # An observation in the environment's units and the networks' view of it give the same action.
    observation = dataset["observation"][:4]
    expected = 2.0 * model.policy.loss.actor_network[0].module(rows["observation"][:4])[0].tanh()
    np.testing.assert_allclose(
        model.predict(observation.numpy(), deterministic=True)[0], expected.detach().numpy(), atol=1e-5
    )


# Transitions of several steps


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_dataset_has_transitions_of_several_steps_as_the_replay_buffer_has(shift: float) -> None:
    options = {"n_steps": 3, "gamma": 0.5, "reward_scale": 0.1, "reward_shift": shift}
    model = model_of(filled_buffer(), **options)
    assert model.replay_buffer_class is NStepReplayBuffer
    model.replay_buffer = filled_buffer(buffer_class=NStepReplayBuffer, n_steps=3, gamma=0.5)
    index = torch.tensor([0, 5, 7, 8, 9, 18, 19, 27, 28, 29])
    normalization = model._normalization()
    ours = model._offline._transitions.batch(index) | model._offline._following(index, 0.5, normalization)
    theirs = map_batch(model.replay_buffer._get_samples(index.numpy(), env=normalization))
    rewards = 0.1 * np.arange(30) + shift
    assert ours["next_reward"][0].item() == pytest.approx(rewards[0] + 0.5 * rewards[1] + 0.25 * rewards[2])
    assert ours["next_discount"].squeeze(-1).tolist() == [0.125, 0.125, 0.125, 0.25, 0.5, 0.25, 0.5, 0.125, 0.25, 0.5]
    for key in (
        "observation",
        ("next", "observation"),
        ("next", "reward"),
        ("next", "discount"),
        ("next", "terminated"),
    ):
        name = key if isinstance(key, str) else "_".join(key)
        torch.testing.assert_close(ours[name], theirs[key], msg=name)
    model.train(2)
    assert model.learner._last_batch["next_discount"].shape == (16, 1)


def test_n_steps_are_learned_online(monkeypatch: pytest.MonkeyPatch) -> None:
    model = IQL("MlpPolicy", "Pendulum-v1", n_steps=3, learning_starts=5, **SMALL)
    model.learn(10)
    assert model.learner.step_count == 5
    assert "next_discount" in model.learner._last_batch


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.99}}, 3),
        ({"replay_buffer_class": ReplayBuffer, "n_steps": 3}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is ignored because a custom:UserWarning")
def test_transitions_of_the_dataset_have_as_many_steps_as_those_of_the_replay_buffer(
    kwargs: dict[str, Any], steps: int
) -> None:
    model = IQL("MlpPolicy", "Pendulum-v1", dataset="pendulum-v1-sac", learning_starts=5, **kwargs, **SMALL)
    assert model._offline.n_steps == steps
    model.learn(10)
    discounts = model.learner._last_batch.get("next_discount")
    assert (discounts is None) == (steps == 1)
    if discounts is not None:
        # Half of the batch comes from the dataset, whose episodes are long.
        assert discounts.min().item() == pytest.approx(0.99**3)
    model.replay_buffer = filled_buffer() if steps > 1 else filled_buffer(buffer_class=NStepReplayBuffer, n_steps=3)
    with pytest.raises(ValueError, match=r"of the dataset have . steps, those of the replay buffer ."):
        model.learn_offline(1)


# VecNormalize


def normalized_env(n_envs: int = 1, **kwargs: Any) -> VecNormalize:
    return VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * n_envs), **kwargs)


def test_what_vecnormalize_does_to_experience_it_does_to_the_dataset() -> None:
    dataset = load_dataset("pendulum-v1-sac")[:1000]
    env = normalized_env(gamma=0.9)
    model = IQL("MlpPolicy", env, dataset=dataset, **SMALL)
    observations = dataset["observation"].numpy()
    np.testing.assert_allclose(env.obs_rms.mean, observations.mean(0), atol=1e-3)
    np.testing.assert_allclose(env.obs_rms.var, observations.var(0), rtol=1e-3)
    assert env.ret_rms.count > 999
    model.learn_offline(2)
    model.learn(40)
    batch = model._batch(64, 0.5)
    rows = batch["observation"].numpy()
    known = np.concatenate(
        [env.normalize_obs(observations), env.normalize_obs(model.replay_buffer.observations[:40, 0])]
    )
    assert all(np.isclose(known, row, atol=1e-5).all(1).any() for row in rows)
    known = np.concatenate(
        [
            env.normalize_reward(dataset["next", "reward"].numpy().ravel()),
            env.normalize_reward(model.replay_buffer.rewards[:40, 0]),
        ]
    )
    assert all(np.isclose(known, reward, atol=1e-5).any() for reward in batch["next_reward"].numpy().ravel())
    assert model.get_vec_normalize_env() is env


@pytest.mark.parametrize("rows", [20_000, 5_000], ids=["of all rows", "of pieces"])
def test_shards_are_not_looked_through_before_the_first_step(
    rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their batches of several steps, and VecNormalize's statistics, are those of the same data in memory."""
    assert main(["convert-dataset", "pendulum-v1-sac", str(tmp_path / "shards")]) == 0
    environments, batches = [normalized_env(gamma=0.9) for _ in range(2)], []
    for source, env in zip(("pendulum-v1-sac", tmp_path / "shards"), environments, strict=True):
        if env is environments[1]:
            for name in ("moments", "_extremes"):
                monkeypatch.setattr(summary, name, lambda *_: pytest.fail("all of the dataset was read"))
            monkeypatch.setattr(datasets, "_PIECE", 250)
            monkeypatch.setattr(datasets, "_PIECES", rows // 250)
        model = IQL("MlpPolicy", env, dataset=source, n_steps=3, **SMALL)
        index = torch.tensor([0, 198, 199, 7, 19_998, 19_999])
        batches.append(model._offline.batch(index, 0.9, None))
        read = sum(len(range(20_000)[piece]) for piece in datasets._looked_at(20_000))
    assert read == rows
    assert model._offline._done.data_ptr() == model._offline._transitions._tensors["next", "done"].data_ptr()
    torch.testing.assert_close(batches[1], batches[0])
    assert batches[1]["next_discount"].squeeze(-1).tolist() == pytest.approx([0.9**n for n in (3, 2, 1, 3, 2, 1)])
    expected, found = ([env.obs_rms, env.ret_rms] for env in environments)
    for theirs, ours, tolerance in zip(expected, found, (1e-6, 1e-6 if rows == 20_000 else 0.1), strict=True):
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=tolerance)
        np.testing.assert_allclose(ours.var, theirs.var, rtol=tolerance)
        assert ours.count == theirs.count


def test_statistics_that_vecnormalize_has_are_left_alone() -> None:
    env = normalized_env()
    env.reset()
    mean = env.obs_rms.mean.copy()
    IQL("MlpPolicy", env, dataset=load_dataset("pendulum-v1-sac")[:100], **SMALL)
    np.testing.assert_array_equal(env.obs_rms.mean, mean)
    frozen = normalized_env(training=False)
    IQL("MlpPolicy", frozen, dataset=load_dataset("pendulum-v1-sac")[:100], **SMALL)
    np.testing.assert_array_equal(frozen.obs_rms.mean, np.zeros(3))


def test_observations_are_not_normalised_twice() -> None:
    with pytest.raises(ValueError, match="in a VecNormalize already"):
        IQL("MlpPolicy", normalized_env(), dataset="pendulum-v1-sac", normalize_observations=True, **SMALL)
    model = IQL("MlpPolicy", normalized_env(norm_reward=False), dataset="pendulum-v1-sac", reward_scale=0.1, **SMALL)
    model.set_env(gym.make("Pendulum-v1"))
    with pytest.raises(ValueError, match="load_dataset"):
        model.train(1)


@pytest.mark.parametrize("normalized", [False, True])
def test_networks_do_not_go_on_in_other_units(normalized: bool, tmp_path: Path) -> None:
    dataset = load_dataset("pendulum-v1-sac")[:400]
    plain = DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    model = IQL("MlpPolicy", normalized_env() if normalized else plain, dataset=dataset, **SMALL)
    model.learn_offline(2)
    model.save(tmp_path / "model")
    if normalized:
        model.get_vec_normalize_env().save(tmp_path / "statistics")
    other = IQL.load(tmp_path / "model", env=plain if normalized else normalized_env(), dataset=dataset)
    before = {name: tensor.clone() for name, tensor in other.policy.state_dict().items()}
    for train in (other.learn_offline, other.train, lambda steps: other.learn(101 + steps)):
        with pytest.raises(ValueError, match=r"trained with(out)? a VecNormalize .* now has (none|one)"):
            train(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.policy.state_dict().items())
    env = VecNormalize.load(str(tmp_path / "statistics"), plain) if normalized else plain
    same = IQL.load(tmp_path / "model", env=env, dataset=dataset)
    same.learn_offline(2)
    model.learn_offline(2)
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(same.policy.state_dict()[name], tensor), name


def test_actions_beyond_the_environments_bounds_are_clipped_and_the_logger_is_told_once(tmp_path: Path) -> None:
    data = load_dataset("pendulum-v1-sac")[:200]
    data["action"][10:15] = 2.0
    models = []
    for beyond in (2.0, 3.4):
        data["action"][10:15] = beyond
        model = IQL("MlpPolicy", gym.make("Pendulum-v1"), dataset=data.clone(), **SMALL)
        model.set_logger(configure(str(tmp_path / str(beyond)), ["csv"]))
        models.append(model.learn_offline(6, log_interval=2))
        model.logger.close()
    rows = list(csv.DictReader((tmp_path / "3.4" / "progress.csv").read_text().splitlines()))
    assert [row["train/clipped_actions"] for row in rows] == ["5", "", ""]
    assert "train/clipped_actions" not in (tmp_path / "2.0" / "progress.csv").read_text()
    for name, tensor in models[0].policy.state_dict().items():
        assert torch.equal(tensor, models[1].policy.state_dict()[name]), name


def test_a_buffers_actions_are_held_against_the_units_that_it_has_them_in() -> None:
    executed, recorded = filled_buffer(), filled_buffer()
    for buffer, value in ((executed, 1.0), (recorded, 1.7)):
        buffer.actions[[3, 8]] = value
    models = [model_of(buffer).learn_offline(6) for buffer in (executed, recorded)]
    for name, tensor in models[0].policy.state_dict().items():
        assert torch.equal(tensor, models[1].policy.state_dict()[name]), name
    recorded.actions[:20] = 1.7
    with pytest.raises(ValueError, match=r"the ReplayBuffer: 'action' is beyond .* in 20 of 30 rows.*clip_all_actions"):
        model_of(recorded)
    assert model_of(recorded, clip_all_actions=True).learn_offline(2).learner.step_count == 2


@pytest.mark.parametrize("kind", ["plain", "several", "shared", "dict", "n-step"])
def test_experience_that_is_not_finite_is_refused_before_it_is_learned_from(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "several": {"n_envs": 2},
        "shared": {"optimize_memory_usage": True, "handle_timeout_termination": False},
        "dict": {"buffer_class": DictReplayBuffer, "observation_space": gym.spaces.Dict({"a": OBSERVATION})},
        "n-step": {"buffer_class": NStepReplayBuffer, "n_steps": 2},
    }[kind]
    buffer = filled_buffer(**options)
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = IQL(policy, observation_space=buffer.observation_space, action_space=ACTION, **SMALL)
    model.replay_buffer = buffer
    model.learn_offline(1)
    observations = buffer.observations["a"] if kind == "dict" else buffer.observations
    # The last observation of memory that is shared is a next one alone.
    row = 30 if kind == "shared" else 17
    for array, position, key in (
        (observations, row, r"\('observation', 'a'\)" if kind == "dict" else "'observation'"),
        (buffer.actions, 12, "'action'"),
        (buffer.rewards, 5, r"\('next', 'reward'\)"),
    ):
        value, array[position, -1] = array[position, -1].copy(), np.nan
        number = buffer.n_envs * position + buffer.n_envs - 1
        with pytest.raises(ValueError, match=f"the {type(buffer).__name__}: {key} is not finite in row {number}"):
            model.learn_offline(2)
        array[position, -1] = value
    assert model.learner.step_count == 1
    model.learn_offline(1)


def test_a_loaded_buffer_is_looked_at_before_learning_goes_on_online(tmp_path: Path) -> None:
    env = gym.make("Pendulum-v1")
    model = IQL("MlpPolicy", env, learning_starts=5, **SMALL).learn(20)
    model.replay_buffer.rewards[4] = np.inf
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other = IQL("MlpPolicy", env, learning_starts=5, **SMALL)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match=r"\('next', 'reward'\) is not finite in row 4"):
        other.learn(5)
    assert other.learner.step_count == 0


@pytest.mark.parametrize("way", ["learn", "learn_offline"])
@pytest.mark.parametrize("reads", [True, False])
def test_a_training_that_diverges_stops_and_leaves_the_best_model(way: str, reads: bool, tmp_path: Path) -> None:
    env = gym.make("Pendulum-v1", max_episode_steps=10)
    model = IQL("MlpPolicy", env, learning_starts=5, **SMALL)
    if way == "learn_offline":
        model.load_dataset(load_dataset("pendulum-v1-sac")[:100])
    best = tmp_path / "best_model.zip"
    callback = EvalCallback(
        Monitor(env), n_eval_episodes=1, eval_freq=10, best_model_save_path=str(tmp_path), verbose=0
    )

    def spoil(local: Any, _: Any) -> bool:
        if model.num_timesteps == 15:
            assert best.exists()
            saved.append(best.read_bytes())
            with torch.no_grad():
                next(model.policy.loss.actor_network.parameters()).fill_(np.nan)
        return True

    saved: list[bytes] = []
    callbacks = [ConvertCallback(spoil), callback] if reads else [ConvertCallback(spoil)]
    if not reads:
        best.write_bytes(b"mine")
    with pytest.raises(DivergenceError, match=r"the actor's weights.* not finite at step"):
        getattr(model, way)(40, CallbackList(callbacks), log_interval=None if way == "learn_offline" else 1000)
    assert [best.read_bytes()] == saved
    assert model.num_timesteps == (20 if reads else 40)


def test_a_log_that_finds_a_divergence_leaves_the_mode_of_the_networks() -> None:
    model = model_of(filled_buffer()).learn_offline(1, log_interval=None)
    model.train(1)
    with torch.no_grad():
        next(model.policy.loss.value_network.parameters()).fill_(np.nan)
    with pytest.raises(DivergenceError, match="the value's weights"):
        model.logger.dump()
    assert model.policy.training
