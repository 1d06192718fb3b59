"""What is looked at when an agent takes data: every number, and every action against the bounds."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import BOUNDS, SPACES, make_agent, make_dataset, same, weights
from tensordict import TensorDict
from torch import Tensor

from iql_plugins.data import dataset as dataset_module
from iql_plugins.data import intake
from iql_plugins.data.dataset import DatasetError
from iql_plugins.data.inspection import inspect
from iql_plugins.data.intake import ActionExcess, check_numbers
from iql_plugins.spaces import Box, Discrete, Spaces

SPACES_OF_ONE = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))


def excess(actions: Any, space: Any = SPACES_OF_ONE.action) -> ActionExcess:
    result = ActionExcess(space)
    result.add(0, torch.as_tensor(actions, dtype=torch.float32))
    return result


def with_actions(*values: float) -> TensorDict:
    """A dataset of one action an entry, in bounds of -2 and 2."""
    data = make_dataset(SPACES_OF_ONE, len(values))
    return data.set("action", torch.tensor(values).unsqueeze(-1))


def test_rounding_just_beyond_a_bound_is_not_beyond() -> None:
    assert excess([[2.00001], [-2.00003], [2.0]]).count == 0
    assert excess([[2.0001], [-2.0001], [2.0]]).count == 2


def test_each_dimension_has_bounds_of_its_own() -> None:
    # The bounds are -1 and 2, 0 and 5: one row is beyond the second's, and one beyond both.
    found = excess([[0.0, 4.0], [0.0, -1.0], [3.0, 6.0], [-0.5, 0.5]], BOUNDS)
    assert (found.count, found.rows, found.first) == (2, 4, (1, 1, -1.0))
    assert "in 2 of 4 rows, first in row 1: -1 in entry 1, whose bounds are 0 and 5" in str(found)


@pytest.mark.parametrize("space", [Discrete(3), Box((1,)), Box((1,), high=(2.0,))])
def test_nothing_is_beyond_what_has_no_bounds(space: Any) -> None:
    assert excess([[50.0]], space).explained
    assert excess([[50.0]], space).count == 0


def test_half_of_the_rows_are_explained_and_one_more_is_not() -> None:
    data = with_actions(3.0, 3.0, -3.0, 0.0, 0.0, 0.0)
    assert check_numbers(data, SPACES_OF_ONE, clip_all_actions=False).count == 3
    data["action"][4] = 3.0
    message = r"'action' is beyond the bounds in 4 of 6 rows, first in row 0: 3 in .* set clip_all_actions=True"
    with pytest.raises(DatasetError, match=message):
        check_numbers(data, SPACES_OF_ONE, clip_all_actions=False)
    assert check_numbers(data, SPACES_OF_ONE, clip_all_actions=True).count == 4


def test_one_action_that_is_an_order_of_magnitude_out_is_refused() -> None:
    data = with_actions(0.0, 3.0, 0.0, 19.9, 0.0, 0.0)
    assert check_numbers(data, SPACES_OF_ONE, clip_all_actions=False).count == 2
    data["action"][3] = -1e9
    message = r"in 2 of 6 rows, ten times over in row 3: -1e\+09 in entry 0, whose bounds are -2 and 2; .*clip_all"
    with pytest.raises(DatasetError, match=message):
        check_numbers(data, SPACES_OF_ONE, clip_all_actions=False)
    assert check_numbers(data, SPACES_OF_ONE, clip_all_actions=True).count == 2


def test_the_middle_of_the_bounds_need_not_be_zero() -> None:
    space = Box((1,), low=(100.0,), high=(102.0,))
    assert excess([[110.9], [101.0]], space).explained
    assert not excess([[111.1], [101.0]], space).explained


def test_a_mapped_dataset_is_looked_at_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_dataset(SPACES_OF_ONE, 1000)
    data["action"][::3] = 2.5
    data.cpu().memmap(tmp_path)
    mapped = TensorDict.load_memmap(tmp_path)
    sizes: list[int] = []
    past_bounds = intake.past_bounds

    def watched(action: Tensor, low: Tensor, high: Tensor) -> Any:
        sizes.append(len(action))
        return past_bounds(action, low, high)

    monkeypatch.setattr(intake, "past_bounds", watched)
    monkeypatch.setattr(dataset_module, "CHUNK_BYTES", 64 * 400)
    found = check_numbers(mapped, SPACES_OF_ONE, clip_all_actions=False)
    assert (found.count, found.first) == (334, (0, 0, 2.5))
    assert sizes == [100] * 10
    mapped["action"][737] = torch.nan
    with pytest.raises(DatasetError, match="'action' is not finite in row 737, and in 1 rows in all"):
        check_numbers(mapped, SPACES_OF_ONE, clip_all_actions=False)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "key", [("observation", "speed"), "action", ("next", "reward"), ("next", "observation", "speed")]
)
def test_a_value_that_is_not_finite_is_refused_by_key_and_row_and_nothing_is_trained(key: Any, bad: float) -> None:
    data = make_dataset(SPACES["dict"])
    agent = make_agent("dict", data)
    before = weights(agent)
    data.get(key)[7, 0] = bad
    with pytest.raises(
        ValueError, match=f"{str(key[-1]) if isinstance(key, tuple) else key}'.* is not finite in row 7"
    ):
        agent.fit(data, 2)
    assert agent.learner.step_count == 0
    assert same(weights(agent), before)


def test_a_discount_that_is_not_finite_is_refused() -> None:
    data = make_dataset(SPACES["continuous"])
    data["next", "discount"] = torch.full((len(data), 1), 0.9)
    data["next", "discount"][3] = torch.nan
    with pytest.raises(ValueError, match=r"\('next', 'discount'\) is not finite in row 3"):
        make_agent("continuous").transitions(data)


def test_integers_out_of_range_are_refused() -> None:
    data = make_dataset(SPACES["discrete"])
    data["action"][5] = 9
    with pytest.raises(ValueError, match="'action' of the dataset is from 1 to 9, the space from 1 to 4"):
        make_agent("discrete").fit(data, 1)


def test_an_agent_says_how_many_actions_it_clips(caplog: pytest.LogCaptureFixture) -> None:
    data = make_dataset(SPACES["continuous"])
    agent = make_agent("continuous")
    with caplog.at_level(logging.INFO):
        agent.fit(data, 1)
        assert caplog.messages == []
        data["action"][[4, 9], 1] = 6.0
        agent.fit(data, 2)
    assert caplog.messages == [
        "'action' is beyond the bounds in 2 of 80 rows, first in row 4: 6 in entry 1, whose bounds are 0 and 5: they "
        "are clipped, as the environment clips them"
    ]


def test_the_numbers_of_an_inspection_are_those_of_the_agent() -> None:
    generator = np.random.default_rng(0)
    data = with_actions(*generator.normal(0.0, 1.5, 200), 2.00001, 2.00006)
    found = {finding.code: finding for finding in inspect(data, action_low=-2.0, action_high=2.0).findings}
    checked = check_numbers(data, SPACES_OF_ONE, clip_all_actions=False)
    assert checked.count == found["actions-outside-bounds"].count > 0
    assert checked.first is not None
    assert checked.first.row == found["actions-outside-bounds"].row
