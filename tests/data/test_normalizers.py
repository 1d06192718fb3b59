"""Between the environment's units and the networks'."""

from typing import Any

import pytest
import torch
from agents import SPACES, make_dataset
from tensordict import TensorDict

from iql_plugins.config import IQLConfig
from iql_plugins.data import summary as module
from iql_plugins.data.normalizers import ACTION_LIMIT, Normalizers
from iql_plugins.spaces import Box, Discrete, Spaces

CONTINUOUS = SPACES["continuous"]
STANDARDIZED = IQLConfig(normalize_observations=True)


def test_observations_are_standardised_by_the_dataset_s_moments() -> None:
    dataset = make_dataset(CONTINUOUS)
    dataset["observation"] = 5.0 + 3.0 * dataset["observation"]
    batch = Normalizers.fit(dataset, CONTINUOUS, STANDARDIZED)(dataset)
    assert torch.allclose(batch["observation"].mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(batch["observation"].std(0, correction=0), torch.ones(3), atol=1e-5)
    mean, std = dataset["observation"].mean(0), dataset["observation"].std(0, correction=0)
    expected = (dataset["next", "observation"] - mean) / std
    assert torch.allclose(batch["next", "observation"], expected, atol=1e-5)


def test_moments_are_the_same_however_the_dataset_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(CONTINUOUS)
    whole = Normalizers.fit(dataset, CONTINUOUS, STANDARDIZED).state_dict()
    monkeypatch.setattr(module, "CHUNK", 7)
    for name, tensor in Normalizers.fit(dataset, CONTINUOUS, STANDARDIZED).state_dict().items():
        assert torch.allclose(tensor, whole[name], rtol=1e-6), name


@pytest.mark.parametrize("constant", [0.0, 1e-30, 0.1, 12345.678, 1e9])
def test_a_constant_feature_is_centred_and_not_blown_up(constant: float) -> None:
    dataset = make_dataset(CONTINUOUS)
    dataset["observation"][:, 1] = constant
    batch = Normalizers.fit(dataset, CONTINUOUS, STANDARDIZED)(dataset)
    assert batch["observation"].isfinite().all()
    # A number of a new state that is a little off stays little off.
    assert batch["observation"][:, 1].abs().max() <= abs(constant) * 1e-6


def test_only_numbers_are_standardised() -> None:
    spaces = Spaces(SPACES["image"].observation | {"gear": Discrete(3)}, Discrete(2))  # type: ignore[operator]
    dataset = make_dataset(spaces)
    normalizers = Normalizers.fit(dataset, spaces, STANDARDIZED)
    assert normalizers.standardized == (("observation", "speed"),)
    batch = normalizers(dataset)
    for name in ("camera", "gear"):
        assert torch.equal(batch["observation", name], dataset["observation", name])


def test_actions_go_to_one_and_back() -> None:
    normalizers = Normalizers(CONTINUOUS)
    action = torch.tensor([[0.5, 2.5], [-0.25, 1.0]])
    assert torch.allclose(normalizers.policy_action(action), torch.tensor([[0.0, 0.0], [-0.5, -0.6]]))
    assert torch.allclose(normalizers.environment_action(normalizers.policy_action(action)), action)


def test_actions_at_and_outside_the_bounds_stay_inside_them() -> None:
    normalizers = Normalizers(CONTINUOUS)
    for action in ([-1.0, 0.0], [2.0, 5.0], [-1.1, 5.1], [9.0, -9.0]):
        policy = normalizers.policy_action(torch.tensor(action))
        assert policy.abs().max() <= ACTION_LIMIT < 1.0
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 5.0])
    assert torch.equal(normalizers.environment_action(torch.tensor([-1.5, -1.0])), low)
    assert torch.equal(normalizers.environment_action(torch.tensor([1.0, 7.0])), high)


def test_discrete_actions_are_counted_from_zero_and_back() -> None:
    normalizers = Normalizers(SPACES["discrete"])
    assert normalizers.policy_action(torch.tensor([[1], [4]])).tolist() == [[0], [3]]
    assert normalizers.environment_action(torch.tensor([0, 3])).tolist() == [1, 4]


def test_rewards_are_scaled_then_shifted() -> None:
    normalizers = Normalizers(CONTINUOUS, reward_scale=2.0, reward_shift=-1.0)
    assert normalizers.reward(torch.tensor([3.0])).item() == 5.0


@pytest.mark.parametrize("discount", [0.5, 1.0])
@pytest.mark.parametrize("key", ["steps_to_next_obs", ("next", "discount")])
def test_each_reward_of_an_n_step_transition_is_shifted(discount: float, key: Any) -> None:
    # Three rewards of 1, 2 and 4: their shifted discounted sum is the discounted sum of the shifted ones.
    total = 1.0 + 2.0 * discount + 4.0 * discount**2
    shifted = 9.0 + 10.0 * discount + 12.0 * discount**2
    batch = TensorDict({"next": {"reward": torch.tensor([[1.0], [total]])}}, [2])
    batch["steps_to_next_obs"] = torch.tensor([1, 3])
    if key != "steps_to_next_obs":
        batch[key] = discount ** torch.tensor([[1.0], [3.0]])
    normalizers = Normalizers(CONTINUOUS, reward_shift=8.0)
    normalizers.discount = discount
    torch.testing.assert_close(normalizers(batch)["next", "reward"], torch.tensor([[9.0], [shifted]]))


def test_the_range_of_returns_is_a_thousand_afterwards() -> None:
    dataset = make_dataset(CONTINUOUS, 4)
    dataset["next", "reward"] = torch.tensor([[1.0], [2.0], [5.0], [5.0]])
    dataset["next", "done"] = torch.tensor([[False], [True], [False], [False]])
    # The returns are 3, and 10 of the episode that the data cut.
    batch = Normalizers.fit(dataset, CONTINUOUS, IQLConfig(reward_scale="return_range"))(dataset)
    assert torch.allclose(batch["next", "reward"], dataset["next", "reward"] * 1000.0 / 7.0)


def test_equal_returns_have_no_range() -> None:
    dataset = make_dataset(CONTINUOUS, 20)
    dataset["next", "reward"] = torch.ones(20, 1)
    with pytest.raises(ValueError, match=r"needs episodes with different returns, the dataset's 2 episodes have 10\.0"):
        Normalizers.fit(dataset, CONTINUOUS, IQLConfig(reward_scale="return_range"))


def test_a_batch_is_not_changed_and_shares_what_is_not_normalised() -> None:
    dataset = make_dataset(CONTINUOUS)
    copy = dataset.clone()
    batch = Normalizers.fit(dataset, CONTINUOUS, STANDARDIZED.replace(reward_scale=2.0))(dataset)
    assert (dataset == copy).all()
    assert batch["next", "done"].data_ptr() == dataset["next", "done"].data_ptr()
    assert not torch.equal(batch["next", "reward"], dataset["next", "reward"])


def test_what_a_batch_lacks_is_left_for_the_loss_to_name() -> None:
    batch = Normalizers(CONTINUOUS)(TensorDict({"observation": torch.zeros(4, 3)}, [4]))
    assert set(batch.keys(True, True)) == {"observation"}


def test_normalizers_survive_their_state() -> None:
    dataset = make_dataset(SPACES["dict"])
    config = STANDARDIZED.replace(reward_scale="return_range", reward_shift=-1.0)
    normalizers = Normalizers.fit(dataset, SPACES["dict"], config)
    restored = Normalizers.restored(SPACES["dict"], normalizers.extra_state(), normalizers.state_dict())
    first, second = normalizers(dataset), restored(dataset)
    assert all(torch.equal(first[key], second[key]) for key in first.keys(True, True))


def test_moments_that_fit_no_observation_are_refused() -> None:
    moments = (torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="observation_moments has 'state', which is none of the Box observations"):
        Normalizers(CONTINUOUS, observation_moments={"state": moments})
    with pytest.raises(ValueError, match=r"of 'observation' must have shape \(3,\), got \(2,\) and \(3,\)"):
        Normalizers(CONTINUOUS, observation_moments={"observation": (torch.zeros(2), moments[1])})


def test_actions_without_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="the action space must have finite bounds"):
        Normalizers(Spaces(Box((3,)), Box((1,))))


def test_the_networks_dtype_is_torch_s_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        dataset = make_dataset(CONTINUOUS)
        batch = Normalizers.fit(dataset, CONTINUOUS, STANDARDIZED)(dataset)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {batch[key].dtype for key in ("observation", "action", ("next", "reward"))} == {torch.float64}
