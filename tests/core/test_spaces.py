"""Spaces: what they accept, where they come from, and what they say of a dataset."""

import json
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from agents import BOUNDS, SPACES, make_dataset
from tensordict import TensorDict

from iql_plugins.spaces import Box, Discrete, Spaces


@pytest.mark.parametrize("spaces", [*SPACES.values(), Spaces(Discrete(5, start=-2), BOUNDS)])
def test_spaces_survive_json(spaces: Spaces) -> None:
    text = json.dumps(spaces.to_json(), allow_nan=False)
    assert Spaces.from_json(json.loads(text)) == spaces


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box((2,), low=(0.0,)), "low must have 2 entries for shape"),
        (lambda: Box((1,), low=(1.0,), high=(0.0,)), "low must not be above high"),
        (lambda: Box((1,), low=(-np.inf,)), "low must be finite, or None where there is no bound"),
        (lambda: Box((1,), high=(np.nan,)), "high must be finite"),
        (lambda: Discrete(0), "n must be >= 1, got 0"),
        (lambda: Spaces(Box((3,)), Box((2, 2))), "the action space must have one dimension"),
        (lambda: Spaces(Box((3,)), Box((1,), low=(1.0,), high=(1.0,))), "low must be below high .* of an action"),
        (lambda: Spaces({}, Discrete(2)), "at least one entry"),
    ],
)
def test_impossible_spaces_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bounds_may_be_integers_and_observations_constant() -> None:
    assert Box((2,), low=(-2, 0), high=(2, 0)).high == (2, 0)


def test_observation_keys_are_nested_and_sorted() -> None:
    assert list(SPACES["dict"].observations) == [("observation", "gear"), ("observation", "speed")]
    assert list(SPACES["continuous"].observations) == ["observation"]


def test_gymnasium_spaces_are_translated() -> None:
    observation = gymnasium.spaces.Dict(
        {
            "camera": gymnasium.spaces.Box(0, 255, (36, 36, 3), np.uint8),
            "speed": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "gear": gymnasium.spaces.Discrete(3, start=-1),
        }
    )
    action = gymnasium.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 5], np.float32))
    spaces = Spaces.from_gymnasium(observation, action)
    assert spaces.action == BOUNDS
    assert isinstance(spaces.observation, dict)
    assert spaces.observation["gear"] == Discrete(3, start=-1)
    assert spaces.observation["speed"] == Box((2,))
    assert spaces.observation["camera"].is_image


def test_a_subclass_of_a_gymnasium_space_is_what_it_inherits() -> None:
    class Motor(gymnasium.spaces.Discrete):
        pass

    assert Spaces.from_gymnasium(Motor(2), Motor(4, start=1)) == Spaces(Discrete(2), Discrete(4, 1))


@pytest.mark.parametrize("space", [gymnasium.spaces.MultiBinary(3), gymnasium.spaces.MultiDiscrete([2, 3])])
def test_other_gymnasium_spaces_are_refused_by_name(space: Any) -> None:
    with pytest.raises(TypeError, match="the space of 'action' must be Box or Discrete"):
        Spaces.from_gymnasium(gymnasium.spaces.Discrete(2), space)
    with pytest.raises(TypeError, match="the space of 'sensor' must be Box or Discrete"):
        Spaces.from_gymnasium(gymnasium.spaces.Dict({"sensor": space}), gymnasium.spaces.Discrete(2))


def test_a_dataset_tells_its_spaces() -> None:
    for kind in ("continuous", "dict", "image"):
        spaces = Spaces.from_dataset(make_dataset(SPACES[kind]))
        assert spaces.discrete is SPACES[kind].discrete
        assert [getattr(space, "shape", None) for space in spaces.observations.values()] == [
            getattr(space, "shape", None) for space in SPACES[kind].observations.values()
        ]


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([[-0.5], [0.25]], -1.0, 1.0), ([[-1.0005], [1.0]], -1.0, 1.0), ([[-1.5], [3.0]], -1.5, 3.0), ([[2.0]], 2.0, 3.0)],
)
def test_bounds_of_a_dataset_are_one_unless_an_action_exceeds_them(values: Any, low: float, high: float) -> None:
    dataset = make_dataset(SPACES["continuous"], len(values))
    dataset["action"] = torch.tensor(values)
    assert Spaces.from_dataset(dataset).action == Box((1,), low=(low,), high=(high,))


def test_several_integers_are_no_space() -> None:
    dataset = make_dataset(SPACES["continuous"], 4)
    dataset["observation"] = torch.zeros(4, 3, dtype=torch.int64)
    dataset["next", "observation"] = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"'observation' has torch.int64 of shape \(3,\): integers must be single"):
        Spaces.from_dataset(dataset)
    with pytest.raises(ValueError, match=r"'observation' of the dataset has dtype torch.int64, the space float32"):
        SPACES["continuous"].check(dataset)


def test_observations_that_are_nested_twice_are_refused_by_name() -> None:
    dataset = make_dataset(SPACES["dict"], 4)
    for key in ("observation", ("next", "observation")):
        dataset[key] = TensorDict({"arm": {"angle": torch.zeros(4, 2)}}, [4])
    with pytest.raises(TypeError, match="'arm' must be a tensor: Dict observations have one level"):
        Spaces.from_dataset(dataset)


@pytest.mark.parametrize("kind", SPACES)
def test_a_dataset_of_the_spaces_passes(kind: str) -> None:
    SPACES[kind].check(make_dataset(SPACES[kind]))


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("continuous", "observation", torch.zeros(4, 2), r"'observation' of the dataset has shape \(2,\), the space"),
        ("continuous", "action", torch.zeros(4, 3), r"'action' of the dataset has shape \(3,\)"),
        ("continuous", "action", None, "the dataset has no 'action'"),
        ("discrete", "action", torch.zeros(4, 1), r"'action' .* has dtype torch.float32; the space is Discrete\(4\)"),
        ("discrete", "action", torch.zeros(4, 1, dtype=torch.int64), "'action' .* is from 0 to 0, the space from 1 to"),
        ("discrete", "action", torch.full((4, 1), 5), "'action' .* is from 5 to 5, the space from 1 to 4"),
        ("discrete", "action", torch.ones(4, 2, dtype=torch.int64), r"'action' .* shape \(4, 2\); that of a Discrete"),
        ("image", ("observation", "camera"), torch.zeros(4, 36, 36, 3), "has dtype torch.float32, the space uint8"),
        ("dict", ("observation", "speed"), torch.zeros(4, 2, dtype=torch.uint8), "has dtype torch.uint8, the space"),
    ],
)
def test_what_does_not_fit_is_named(kind: str, key: Any, value: torch.Tensor | None, message: str) -> None:
    dataset = make_dataset(SPACES[kind], 4)
    if value is None:
        del dataset[key]
    else:
        dataset[key] = value
    with pytest.raises(ValueError, match=message):
        SPACES[kind].check(dataset)
