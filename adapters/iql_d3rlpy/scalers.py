"""Between d3rlpy's scalers and the normalisers of an agent: the same transformations, in each one's form."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from d3rlpy.preprocessing import (
    ConstantShiftRewardScaler,
    MinMaxActionScaler,
    MinMaxObservationScaler,
    MinMaxRewardScaler,
    MultiplyRewardScaler,
    PixelObservationScaler,
    ReturnBasedRewardScaler,
    StandardObservationScaler,
    StandardRewardScaler,
    TupleObservationScaler,
    register_action_scaler,
    register_observation_scaler,
)
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data import summary
from iql_plugins.data.dataset import REWARD
from iql_plugins.data.episodes import return_range
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.spaces import Box, Spaces

__all__ = [
    "BoundedActionScaler",
    "UnchangedObservationScaler",
    "action_bounds",
    "fit_action",
    "fit_observation",
    "fit_reward",
    "normalizers_of",
    "scalers_of",
]

Moments = tuple[Tensor, Tensor]

_AFFINE_REWARDS = (
    MultiplyRewardScaler,
    MinMaxRewardScaler,
    StandardRewardScaler,
    ReturnBasedRewardScaler,
    ConstantShiftRewardScaler,
)
_MOMENTS, _EXTREMES = ("mean", "std"), ("low", "high")
#: Those that are fitted to single columns: their fields, and what of a column these are.
_FITTED: Mapping[Any, tuple[Sequence[str], tuple[str, str]]] = {
    StandardObservationScaler: (("mean", "std"), _MOMENTS),
    StandardRewardScaler: (("mean", "std"), _MOMENTS),
    MinMaxObservationScaler: (("minimum", "maximum"), _EXTREMES),
    MinMaxActionScaler: (("minimum", "maximum"), _EXTREMES),
    MinMaxRewardScaler: (("minimum", "maximum"), _EXTREMES),
}


@dataclasses.dataclass()
class BoundedActionScaler(MinMaxActionScaler):  # type: ignore[misc]
    """As d3rlpy's ``MinMaxActionScaler``, but that actions stay within the bounds, whatever the dataset holds.

    Dataset actions outside come to the bounds themselves, and so do predicted ones that rounding takes out.

    Args:
        minimum: ``[act]`` lower bounds in the environment's units; None takes the smallest of the dataset, or the
            environment's.
        maximum: ``[act]`` upper bounds, likewise.
    """

    def transform(self, x: Tensor) -> Tensor:
        """``[*B, act]`` in (-1, 1) from the environment's units."""
        return self._normalizers(x.device).policy_action(x)

    def reverse_transform(self, x: Tensor) -> Tensor:
        """``[*B, act]`` in the environment's units, within the bounds."""
        return self._normalizers(x.device).environment_action(x)

    def transform_numpy(self, x: Any) -> Any:
        """As :meth:`transform`."""
        return self.transform(torch.as_tensor(x, dtype=torch.float32)).numpy()

    def reverse_transform_numpy(self, x: Any) -> Any:
        """As :meth:`reverse_transform`."""
        return self.reverse_transform(torch.as_tensor(x, dtype=torch.float32)).numpy()

    def _normalizers(self, device: torch.device) -> Normalizers:
        low, high = action_bounds(self)
        bounds = (low, high, device)
        if getattr(self, "_made_for", None) != bounds:
            spaces = Spaces(Box((0,)), Box((len(low),), "float32", low, high))
            self._made_for, self._made = bounds, Normalizers(spaces).to(device)
        return self._made

    @staticmethod
    def get_type() -> str:
        """The name in d3rlpy's files."""
        return "iql_plugins_bounded"


class UnchangedObservationScaler(PixelObservationScaler):  # type: ignore[misc]
    """Leaves an observation as it is: an image or an integer in a tuple of which other entries are scaled."""

    def transform(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    reverse_transform = transform_numpy = reverse_transform_numpy = transform

    @staticmethod
    def get_type() -> str:
        """The name in d3rlpy's files."""
        return "iql_plugins_unchanged"


register_action_scaler(BoundedActionScaler)
register_observation_scaler(UnchangedObservationScaler)


def action_bounds(scaler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The lower and the upper bounds that an action scaler brings to -1 and 1.

    Raises:
        ValueError: for a scaler that is not fitted, or none of d3rlpy's.
    """
    if not isinstance(scaler, MinMaxActionScaler) or not scaler.built:
        raise ValueError(
            f"the action scaler must be a MinMaxActionScaler that is fitted, got {type(scaler).__name__}: "
            "fit() or fit_online() fits it"
        )
    low, high = (np.asarray(bound, np.float64).reshape(-1) for bound in (scaler.minimum, scaler.maximum))
    return tuple(low.tolist()), tuple(high.tolist())


def fit_observation(scaler: Any, dataset: TensorDictBase, keys: Sequence[NestedKey]) -> None:
    """Fits an observation scaler as d3rlpy would to single steps, by what is stored with a dataset where it is.

    Whatever fits in a way of its own is left to d3rlpy, which looks at each step; so is None.

    Args:
        scaler: d3rlpy's.
        dataset: by the key layout.
        keys: of its observations, in d3rlpy's order.
    """
    parts = scaler.observation_scalers if isinstance(scaler, TupleObservationScaler) else [scaler]
    # d3rlpy fits all entries of a tuple, or none.
    if len(parts) == len(keys) and all(part.built or _kind(part) for part in parts if part is not None):
        for part, key in zip(parts, keys, strict=True):
            _fit(part, dataset, key)


def fit_action(scaler: Any, dataset: TensorDictBase) -> None:
    """As :func:`fit_observation`, an action scaler."""
    _fit(scaler, dataset, "action")


def fit_reward(scaler: Any, dataset: TensorDictBase) -> None:
    """As :func:`fit_observation`, a reward scaler; returns are those of :func:`iql_plugins.data.episodes`."""
    if _fits_as(scaler, ReturnBasedRewardScaler) and not scaler.built:
        scaler.return_min, scaler.return_max = return_range(dataset)
    else:
        _fit(scaler, dataset, REWARD)


def _fits_as(scaler: Any, kind: Any) -> bool:
    """Whether a scaler is of a class, or of a subclass that is fitted like it."""
    return isinstance(scaler, kind) and type(scaler).fit_with_transition_picker is kind.fit_with_transition_picker


def _kind(scaler: Any) -> Any:
    return next((kind for kind in _FITTED if _fits_as(scaler, kind)), None)


def _fit(scaler: Any, dataset: TensorDictBase, key: NestedKey) -> None:
    kind = _kind(scaler)
    if kind is not None and not scaler.built:
        fields, names = _FITTED[kind]
        for field, values in zip(fields, summary.statistics(dataset, key, names), strict=True):
            setattr(scaler, field, float(values) if key == REWARD else _array(values))


def scalers_of(normalizers: Normalizers, spaces: Spaces) -> dict[str, Any]:
    """The d3rlpy scalers that do, to the last bit, what an agent's normalisers do.

    Args:
        normalizers: the agent's.
        spaces: of its environment.
    """
    scalers: dict[str, Any] = {}
    if normalizers.standardized:
        each = [_standard(normalizers, key) for key in spaces.observations]
        single = not isinstance(spaces.observation, Mapping)
        scalers["observation_scaler"] = each[0] if single else TupleObservationScaler(each)
    if isinstance(spaces.action, Box):
        scalers["action_scaler"] = BoundedActionScaler(
            minimum=_array(normalizers.get_buffer("action_low")), maximum=_array(normalizers.get_buffer("action_high"))
        )
    scale, shift = (float(normalizers.get_buffer(f"reward_{name}")) for name in ("scale", "shift"))
    if (scale, shift) != (1.0, 0.0):
        scalers["reward_scaler"] = ConstantShiftRewardScaler(shift=shift, multiplier=scale, multiply_first=True)
    return scalers


def normalizers_of(config: Any, spaces: Spaces, keys: Sequence[NestedKey]) -> Normalizers:
    """The normalisers that do what the scalers of a d3rlpy configuration do.

    Args:
        config: a d3rlpy algorithm's.
        spaces: of the environment; the bounds of actions are those of the action scaler.
        keys: the key of each observation, in d3rlpy's order.

    Raises:
        ValueError: for a scaler that is not fitted, or that normalisers cannot follow; names it.
    """
    scaler = config.observation_scaler
    scalers = scaler.observation_scalers if isinstance(scaler, TupleObservationScaler) else [scaler] * len(keys)
    moments = {
        key: _moments(each, spaces.observations[key])
        for key, each in zip(keys, scalers, strict=True)
        if each is not None and not isinstance(each, UnchangedObservationScaler)
    }
    scale, shift = _scale_and_shift(config.reward_scaler)
    return Normalizers(spaces, observation_moments=moments, reward_scale=scale, reward_shift=shift)


def _standard(normalizers: Normalizers, key: NestedKey) -> StandardObservationScaler | UnchangedObservationScaler:
    if key not in normalizers.standardized:
        return UnchangedObservationScaler()
    index = normalizers.standardized.index(key)
    mean, std = (_array(normalizers.get_buffer(f"{name}_{index}")) for name in ("mean", "std"))
    return StandardObservationScaler(mean=mean, std=std, eps=0.0)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _moments(scaler: Any, space: Any) -> Moments:
    """What is subtracted, and what is divided by."""
    match scaler:
        case StandardObservationScaler(built=True):
            mean, std = _tensor(scaler.mean), _tensor(scaler.std) + scaler.eps
        case MinMaxObservationScaler(built=True):
            low, high = _tensor(scaler.minimum), _tensor(scaler.maximum)
            mean, std = (low + high) / 2.0, (high - low) / 2.0
        case PixelObservationScaler():
            mean, std = torch.zeros(space.shape), torch.full(space.shape, 255.0)
        case _:
            raise ValueError(_cannot("observation", scaler))
    return mean, std


def _tensor(array: Any) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)


def _scale_and_shift(scaler: Any) -> tuple[float, float]:
    if scaler is None:
        return 1.0, 0.0
    if isinstance(scaler, ConstantShiftRewardScaler) and scaler.multiply_first:
        return scaler.multiplier, scaler.shift
    if type(scaler) not in _AFFINE_REWARDS or not scaler.built:
        raise ValueError(_cannot("reward", scaler))
    zero, one = scaler.transform(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return one - zero, zero


def _cannot(kind: str, scaler: Any) -> str:
    name = type(scaler).__name__
    state = "" if scaler.built else " that is not fitted: fit() fits it"
    return f"an agent's normalisers cannot do what the {kind} scaler does, a {name}{state}"
