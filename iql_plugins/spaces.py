"""What an environment's observations and actions look like, without a dependency on gymnasium."""

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.keys import next_key

__all__ = ["Box", "Discrete", "Space", "Spaces"]

#: Dataset actions up to this far outside [-1, 1] still say that the bounds are -1 and 1.
_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Box:
    """Arrays of one shape and dtype.

    Attributes:
        shape: of one observation or action.
        dtype: NumPy's name: ``"float32"``, or ``"uint8"`` for images.
        low: lower bound of each entry, flattened in row-major order; None where there is none.
        high: upper bound, likewise.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is None:
                continue
            if len(bound) != self.size:
                raise ValueError(f"{name} must have {self.size} entries for shape {self.shape}, got {len(bound)}")
            if not all(map(math.isfinite, bound)):
                raise ValueError(f"{name} must be finite, or None where there is no bound, got {bound}")
        # Observations have entries that never change; actions are checked by Spaces.
        if self.low is not None and self.high is not None and not all(map(operator.le, self.low, self.high)):
            raise ValueError(f"low must not be above high in any entry, got low={self.low} and high={self.high}")

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def is_image(self) -> bool:
        """Whether entries are pixels: uint8, in three dimensions."""
        return self.dtype == "uint8" and len(self.shape) == 3


@dataclass(frozen=True)
class Discrete:
    """The integers from ``start`` to ``start + n - 1``.

    Attributes:
        n: how many there are.
        start: the smallest.
    """

    n: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be >= 1, got {self.n}")


Space = Box | Discrete


@dataclass(frozen=True)
class Spaces:
    """The spaces of an environment.

    Attributes:
        observation: one space, or one for each entry of a Dict observation, by name.
        action: a Box of one dimension, or Discrete.
    """

    observation: Space | Mapping[str, Space]
    action: Space

    def __post_init__(self) -> None:
        if isinstance(self.observation, Mapping) and not self.observation:
            raise ValueError("a Dict observation must have at least one entry")
        if not isinstance(self.action, Box):
            return
        if len(self.action.shape) != 1:
            raise ValueError(f"the action space must have one dimension, got shape {self.action.shape}")
        low, high = self.action.low, self.action.high
        if low is not None and high is not None and not all(map(operator.lt, low, high)):
            raise ValueError(f"low must be below high in every entry of an action, got low={low} and high={high}")

    @property
    def discrete(self) -> bool:
        """Whether actions are discrete."""
        return isinstance(self.action, Discrete)

    @property
    def observations(self) -> dict[NestedKey, Space]:
        """The space under each observation key of the layout, sorted by name for Dict observations."""
        if isinstance(self.observation, Mapping):
            return {("observation", name): self.observation[name] for name in sorted(self.observation)}
        return {"observation": self.observation}

    @classmethod
    def from_gymnasium(cls, observation_space: Any, action_space: Any) -> "Spaces":
        """The same spaces as gymnasium's.

        Args:
            observation_space: Box, Discrete, or Dict of these.
            action_space: Box of one dimension, or Discrete.

        Raises:
            TypeError: for any other space; names it.
        """
        observation: Space | dict[str, Space]
        if _kind(observation_space) == "Dict":
            observation = {name: _space(space, name) for name, space in observation_space.spaces.items()}
        else:
            observation = _space(observation_space, "observation")
        return cls(observation, _space(action_space, "action"))

    @classmethod
    def from_dataset(cls, dataset: TensorDictBase) -> "Spaces":
        """What a dataset tells of its environment's spaces.

        Bounds of continuous actions are -1 and 1 if no action exceeds them, else the smallest and largest of each
        entry; the number of discrete actions is the largest one plus 1. Where an environment is at hand, ask it.

        Args:
            dataset: transitions by the key layout, batch size ``[N]``.

        Raises:
            TypeError: for an observation that is neither a Box nor Discrete; names it.
        """
        observation = dataset["observation"]
        spaces: Space | dict[str, Space]
        if isinstance(observation, TensorDictBase):
            spaces = {
                str(name): _observed(str(name), dataset, ("observation", str(name))) for name in observation.keys()
            }
        else:
            spaces = _observed("observation", dataset, "observation")
        action = dataset["action"]
        low, high = _extremes(dataset, "action")
        if not action.is_floating_point():
            return cls(spaces, Discrete(int(high.max()) + 1))
        if float(max(-low.min(), high.max())) <= 1.0 + _UNIT_TOLERANCE:
            low, high = -torch.ones_like(low), torch.ones_like(high)
        else:
            high = torch.where(high > low, high, low + 1.0)
        return cls(spaces, Box(tuple(action.shape[1:]), "float32", tuple(low.tolist()), tuple(high.tolist())))

    def to_json(self) -> dict[str, Any]:
        """The spaces as JSON values."""
        observation = self.observation
        return {
            "observation": {"dict": {name: _to_json(space) for name, space in observation.items()}}
            if isinstance(observation, Mapping)
            else _to_json(observation),
            "action": _to_json(self.action),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Spaces":
        """The spaces of :meth:`to_json`."""
        observation = document["observation"]
        spaces = (
            {name: _from_json(space) for name, space in observation["dict"].items()}
            if "dict" in observation
            else _from_json(observation)
        )
        return cls(spaces, _from_json(document["action"]))

    def check(self, dataset: TensorDictBase) -> None:
        """Raises ``ValueError`` naming the first entry of a dataset that these spaces do not have."""
        for key, space in self.observations.items():
            _check(key, space, dataset)
        _check("action", self.action, dataset)


def _kind(space: Any) -> str:
    """Which of gymnasium's (or gym's) spaces this is; nothing is imported."""
    for base in type(space).__mro__:
        if base.__module__.split(".")[0] in ("gymnasium", "gym"):
            return base.__name__
    return type(space).__name__


def _space(space: Any, name: str) -> Space:
    kind = _kind(space)
    if kind == "Discrete":
        return Discrete(int(space.n), int(getattr(space, "start", 0)))
    if kind == "Box":
        low, high = (tuple(float(x) for x in bound.reshape(-1)) for bound in (space.low, space.high))
        return Box(
            tuple(int(size) for size in space.shape),
            "uint8" if str(space.dtype) == "uint8" else "float32",
            low if all(map(math.isfinite, low)) else None,
            high if all(map(math.isfinite, high)) else None,
        )
    raise TypeError(f"the space of {name!r} must be Box or Discrete (observations also Dict of these), got {space}")


def _extremes(dataset: TensorDictBase, key: NestedKey) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each entry of a column."""
    # That package needs this module first.
    from iql_plugins.data import summary

    return summary.statistics(dataset, key, ("low", "high"))


def _observed(name: str, dataset: TensorDictBase, key: NestedKey) -> Space:
    observation: Any = dataset[key]
    if not isinstance(observation, Tensor):
        raise TypeError(
            f"{name!r} must be a tensor: Dict observations have one level, got {type(observation).__name__}"
        )
    if observation.is_floating_point() or observation.dtype == torch.uint8:
        return Box(tuple(observation.shape[1:]), str(observation.dtype).removeprefix("torch."))
    if observation.shape[1:].numel() != 1:
        raise TypeError(
            f"{name!r} has {observation.dtype} of shape {tuple(observation.shape[1:])}: integers must be single "
            "(Discrete); convert several to float, or give each a name of its own in a Dict"
        )
    (_, high), (_, next_high) = (_extremes(dataset, each) for each in (key, next_key(key)))
    return Discrete(max(int(high.max()), int(next_high.max())) + 1)


def _to_json(space: Space) -> dict[str, Any]:
    if isinstance(space, Discrete):
        return {"discrete": space.n, "start": space.start}
    bounds = {"low": space.low, "high": space.high}
    return {"box": list(space.shape), "dtype": space.dtype} | {
        name: None if bound is None else list(bound) for name, bound in bounds.items()
    }


def _from_json(document: Mapping[str, Any]) -> Space:
    if "discrete" in document:
        return Discrete(int(document["discrete"]), int(document["start"]))
    low, high = (None if document[name] is None else tuple(map(float, document[name])) for name in ("low", "high"))
    dtype = str(document["dtype"])
    # Of a text, NumPy would make an item of any size.
    if re.fullmatch(r"bool|u?int(8|16|32|64)|float(16|32|64)", dtype) is None:
        raise ValueError(f"the dtype of a space must be that of a number, got {dtype!r}")
    return Box(tuple(map(int, document["box"])), dtype, low, high)


def _check(key: NestedKey, space: Space, dataset: TensorDictBase) -> None:
    tensor: Any = dataset.get(key, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"the dataset has no {key!r}, of which the space is {space}")
    if isinstance(space, Box):
        if tuple(tensor.shape[1:]) != space.shape:
            raise ValueError(f"{key!r} of the dataset has shape {tuple(tensor.shape[1:])}, the space {space.shape}")
        if (space.dtype == "uint8") != (tensor.dtype == torch.uint8) or (
            space.dtype != "uint8" and not tensor.is_floating_point()
        ):
            raise ValueError(f"{key!r} of the dataset has dtype {tensor.dtype}, the space {space.dtype}")
        return
    if tensor.is_floating_point():
        raise ValueError(f"{key!r} of the dataset has dtype {tensor.dtype}; the space is Discrete({space.n})")
    if tensor.shape[1:].numel() != 1:
        raise ValueError(f"{key!r} of the dataset has shape {tuple(tensor.shape)}; that of a Discrete space is [N, 1]")
    low, high = _extremes(dataset, key)
    smallest, largest = int(low.min()), int(high.max())
    if smallest < space.start or largest >= space.start + space.n:
        raise ValueError(
            f"{key!r} of the dataset is from {smallest} to {largest}, "
            f"the space from {space.start} to {space.start + space.n - 1}"
        )
