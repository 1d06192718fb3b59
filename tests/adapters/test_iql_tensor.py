"""The adapter for plain tensors."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from agents import BOUNDS, SPACES, make_dataset, observations, same, weights
from conftest import keywords

from iql_plugins import map_batch
from iql_plugins.config import IQLConfig, preset
from iql_plugins.networks import critic, gaussian_actor, value_function
from iql_plugins.spaces import Box, Spaces
from iql_plugins.testing import check_adapter
from iql_plugins.training.learner import Learner
from iql_tensor import IQL

SMALL: dict[str, Any] = {"hidden_sizes": (8,), "batch_size": 8, "n_steps": 20, "compile": "no", "seed": 0}


def small(kind: str, **changes: Any) -> IQL:
    return IQL.build(SPACES[kind], **SMALL | {"device": torch.empty(0).device} | changes)


@pytest.mark.slow
def test_it_keeps_to_the_contract() -> None:
    check_adapter("tensor", batch=keywords(make_dataset(SPACES["continuous"])))


@pytest.mark.parametrize("kind", ["continuous", "discrete", "dict"])
def test_updates_take_tensors_tensordicts_and_mappings_alike(kind: str) -> None:
    batch, agents = make_dataset(SPACES[kind], 8), []
    for update in (
        lambda iql: iql.update(batch),
        lambda iql: iql.update(keywords(batch)),
        lambda iql: iql.update(**keywords(batch)),
    ):
        agents.append(small(kind))
        update(agents[-1])
        assert agents[-1].metrics()["loss_value"] > 0.0
    assert same(weights(agents[0].agent), weights(agents[1].agent))
    assert same(weights(agents[0].agent), weights(agents[2].agent))


def test_updates_are_in_the_environment_s_units() -> None:
    batch = make_dataset(SPACES["continuous"], 8)
    first, second = small("continuous", reward_scale=2.0, reward_shift=-1.0), small("continuous")
    first.update(batch)
    normalised = batch.clone()
    normalised["next", "reward"] = 2.0 * batch["next", "reward"] - 1.0
    second.update(normalised)
    assert same(weights(first.agent), weights(second.agent))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reward": torch.zeros(8, 1)}, TypeError, "unexpected tensor 'reward'; did you mean 'next_reward'"),
        ({"next_reward": torch.zeros(7, 1)}, ValueError, "must share their first dimension"),
        ({"next_terminated": None}, KeyError, "'terminated'.* must say where an episode ended in a terminal state"),
        ({"action": None}, KeyError, "the batch has no 'action'"),
        ({"next_done": torch.zeros(8, 1)}, TypeError, "must have a bool dtype"),
    ],
)
def test_a_batch_that_is_refused_trains_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    iql = small("continuous")
    before = weights(iql.agent)
    batch = {name: t for name, t in (keywords(make_dataset(SPACES["continuous"], 8)) | change).items() if t is not None}
    with pytest.raises(error, match=message):
        iql.update(batch)
    assert same(before, weights(iql.agent))
    assert iql.agent.learner.step_count == 0


def test_a_batch_and_tensors_are_not_given_together() -> None:
    batch = make_dataset(SPACES["continuous"], 8)
    with pytest.raises(TypeError, match=r"give a batch or keyword tensors, not both; got both, with \['action'\]"):
        small("continuous").update(batch, action=batch["action"])


def test_it_is_built_for_gymnasium_s_spaces() -> None:
    box = gymnasium.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 5], np.float32))
    iql = IQL.build(gymnasium.spaces.Box(-np.inf, np.inf, (3,)), box, **SMALL)
    assert iql.agent.spaces == SPACES["continuous"]
    assert iql.act(np.zeros(3, np.float32)).shape == (2,)


def test_it_is_built_from_a_dataset_alone() -> None:
    dataset = make_dataset(SPACES["continuous"])
    iql = IQL.build(dataset=dataset, **SMALL, normalize_observations=True, reward_scale="return_range")
    assert isinstance(iql.agent.spaces.action, Box)
    assert iql.agent.spaces.action.high == tuple(dataset["action"].amax(0).tolist())
    mean = iql.agent.normalizers.get_buffer("mean_0")
    torch.testing.assert_close(mean, dataset["observation"].mean(0).to(mean.device))
    assert iql.fit(dataset, 2) is iql


def test_it_is_built_from_sizes() -> None:
    iql = IQL.from_sizes(3, 2, action_low=-2.0, action_high=3, **SMALL)
    assert iql.agent.spaces == Spaces(Box((3,)), Box((2,), low=(-2.0, -2.0), high=(3.0, 3.0)))
    assert IQL.from_sizes(3, action_count=4, **SMALL).act(np.zeros(3, np.float32)) in range(4)
    for sizes in ({}, {"action_size": 1, "action_count": 2}):
        with pytest.raises(ValueError, match="exactly one of action_size and action_count must be given"):
            IQL.from_sizes(3, **sizes, **SMALL)


def test_a_preset_and_hyper_parameters_are_joined() -> None:
    iql = IQL.from_sizes(3, 2, config=preset("antmaze"), temperature=5.0, **SMALL)
    assert (iql.agent.loss.expectile, iql.agent.loss.temperature) == (0.9, 5.0)
    with pytest.raises(TypeError, match="tau: no hyper-parameter of IQL"):
        IQL.from_sizes(3, 2, tau=0.7, **SMALL)


def test_what_only_a_dataset_tells_is_asked_for() -> None:
    for needy in ({"normalize_observations": True}, {"reward_scale": "return_range"}):
        with pytest.raises(ValueError, match=r"need the statistics of a dataset: pass dataset="):
            IQL.build(SPACES["continuous"], **needy)
    with pytest.raises(ValueError, match="observation_space and action_space must be given, or a dataset"):
        IQL.build()


def test_spaces_and_dataset_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="of the dataset"):
        IQL.build(SPACES["discrete"], dataset=make_dataset(SPACES["continuous"]))
    with pytest.raises(ValueError, match="of the dataset"):
        small("continuous").fit(make_dataset(Spaces(Box((4,)), BOUNDS)), 1)


def test_networks_and_optimisers_may_be_ones_own() -> None:
    from iql_plugins import IQLLoss

    options: dict[str, Any] = {"expectile": 0.7, "temperature": 3.0, "loss_function": "l2"}
    loss = IQLLoss(gaussian_actor(3, 2, hidden_sizes=(4,)), critic(3, 2), value_function(3), **options)
    learner = Learner(loss, actor_learning_rate=0.5)
    iql = IQL.build(SPACES["continuous"], loss=loss, learner=learner, config=IQLConfig(compile="no"), seed=0)
    assert iql.agent.loss is loss
    assert iql.agent.learner is learner


@pytest.mark.parametrize("kind", ["continuous", "discrete", "dict"])
def test_what_is_saved_acts_and_trains_on_alike(kind: str, tmp_path: Path) -> None:
    dataset = make_dataset(SPACES[kind])
    whole, first = (small(kind).fit(dataset, 3) for _ in range(2))
    first.save(tmp_path / "x")
    second = IQL.load(tmp_path / "x", device=first.agent.device)
    batch = observations(SPACES[kind], 5)
    assert torch.equal(first.act(batch), second.act(batch))
    steps: list[int] = []
    second.fit(dataset, 2, steps.append)
    assert steps == [4, 5]
    assert same(weights(whole.fit(dataset, 2).agent), weights(second.agent))


def test_a_mapping_of_tensors_becomes_the_layout_without_a_copy() -> None:
    batch = make_dataset(SPACES["continuous"], 8)
    mapped = map_batch(keywords(batch))
    assert set(mapped.keys(True, True)) == set(batch.keys(True, True))
    assert all(mapped[key].data_ptr() == batch[key].data_ptr() for key in batch.keys(True, True))


def test_a_dataset_is_looked_at_when_an_algorithm_is_built_with_it() -> None:
    dataset = make_dataset(SPACES["continuous"])
    dataset["action"][:41, 0] = 2.5
    with pytest.raises(ValueError, match=r"in 41 of 80 rows, .*clip_all_actions=True"):
        IQL.build(SPACES["continuous"], dataset=dataset, **SMALL)
    assert IQL.build(
        SPACES["continuous"], dataset=dataset, clip_all_actions=True, **SMALL
    ).agent.config.clip_all_actions
    dataset["next", "reward"][9] = torch.inf
    with pytest.raises(ValueError, match=r"\('next', 'reward'\) is not finite in row 9"):
        IQL.build(SPACES["continuous"], dataset=dataset, clip_all_actions=True, **SMALL)
