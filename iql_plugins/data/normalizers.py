"""What lies between an environment's units and those that the networks see."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from iql_plugins.config import IQLConfig
from iql_plugins.data import summary
from iql_plugins.data.episodes import EpisodeRows, episode_returns, return_range
from iql_plugins.keys import DISCOUNT, STEPS_TO_NEXT_OBS, AcceptedKeys, next_key
from iql_plugins.spaces import Box, Discrete, Spaces

__all__ = ["Normalizers"]

_Batch = TypeVar("_Batch", TensorDictBase, dict[NestedKey, Tensor])

_KEYS = AcceptedKeys()
_REWARD = next_key(_KEYS.reward)
#: The range of returns that the authors scale locomotion's rewards to.
RETURN_RANGE = 1000.0
#: The authors' bound of dataset actions: the log-density of a squashed policy is infinite at 1.
ACTION_LIMIT = 1.0 - 1e-5
#: A feature that varies less than this, or than this share of its mean, is taken as constant and only centred.
_SMALLEST_STD = 1e-6


class Normalizers(nn.Module):
    r"""Standardises observations, brings actions to [-1, 1] and scales rewards; and the ways back.

    .. math::
        s \mapsto (s - \mu) / \sigma, \qquad
        a \mapsto 2\,\frac{a - a_{low}}{a_{high} - a_{low}} - 1, \qquad
        r \mapsto c\, r + d

    All of it is in ``state_dict()``: a policy without its normalisers is another policy.

    Args:
        spaces: of the environment; bounds of Box actions must be finite.
        observation_moments: mean and standard deviation, each of the observation's shape, by observation key;
            keys that are missing are left as they are.
        reward_scale: factor c of rewards.
        reward_shift: d, added to the scaled rewards, to each of an n-step transition's.

    Attributes:
        discount: of the n rewards in an n-step transition's; an agent sets its own.

    Raises:
        ValueError: if a Box action space has no bounds, or moments do not fit the observations.

    >>> spaces = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))
    >>> Normalizers(spaces).environment_action(torch.tensor([[0.5]]))
    tensor([[1.]])
    """

    def __init__(
        self,
        spaces: Spaces,
        *,
        observation_moments: Mapping[NestedKey, tuple[Tensor, Tensor]] | None = None,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.discount = 0.99
        moments = observation_moments or {}
        for key, (mean, std) in moments.items():
            space = spaces.observations.get(key)
            if not isinstance(space, Box):
                raise ValueError(f"observation_moments has {key!r}, which is none of the Box observations of {spaces}")
            if mean.shape != space.shape or std.shape != space.shape:
                raise ValueError(
                    f"mean and standard deviation of {key!r} must have shape {space.shape}, "
                    f"got {tuple(mean.shape)} and {tuple(std.shape)}"
                )
        self.standardized = tuple(key for key in spaces.observations if key in moments)
        for index, key in enumerate(self.standardized):
            mean, std = moments[key]
            self.register_buffer(f"mean_{index}", mean.detach().clone())
            self.register_buffer(f"std_{index}", std.detach().clone())
        action = spaces.action
        self.action_start = action.start if isinstance(action, Discrete) else None
        if isinstance(action, Box):
            if action.low is None or action.high is None:
                raise ValueError("the action space must have finite bounds: pass spaces with low and high")
            self.register_buffer("action_low", torch.tensor(action.low))
            self.register_buffer("action_high", torch.tensor(action.high))
        self.register_buffer("reward_scale", torch.tensor(float(reward_scale)))
        self.register_buffer("reward_shift", torch.tensor(float(reward_shift)))

    @classmethod
    def fit(
        cls, dataset: TensorDictBase, spaces: Spaces, config: IQLConfig, kept: EpisodeRows | None = None
    ) -> "Normalizers":
        """The normalisers that a configuration asks for, with a dataset's statistics.

        Args:
            dataset: transitions by the key layout, batch size ``[N]``, in the environment's units. Of one that
                ``convert-dataset`` wrote, the statistics are read that are stored with it.
            spaces: of the environment.
            config: ``normalize_observations``, ``reward_scale`` and ``reward_shift`` count.
            kept: the rows whose statistics they are, for which a dataset on disk is looked through; None for all.

        Raises:
            ValueError: if rewards are scaled by the range of returns and all returns are equal.
        """
        moments: dict[NestedKey, tuple[Tensor, Tensor]] = {}
        if config.normalize_observations:
            for key, space in spaces.observations.items():
                if isinstance(space, Box) and not space.is_image:
                    values = dataset.get(key)
                    if kept is None:
                        found = summary.statistics(dataset, key, ("mean", "std"))
                    else:
                        found = summary.moments(partial(_rows_of, values, kept))
                    moments[key] = _usable(*found, values.device)
        scale = config.reward_scale
        if isinstance(scale, str):
            low, high = return_range(dataset, kept)
            spread = high - low
            if not spread > 0.0:
                returns = episode_returns(dataset)
                raise ValueError(
                    f"reward_scale='return_range' needs episodes with different returns, the dataset's {len(returns)} "
                    f"episodes have {float(returns[0])}: give reward_scale a number"
                )
            scale = RETURN_RANGE / spread
        return cls(spaces, observation_moments=moments, reward_scale=scale, reward_shift=config.reward_shift)

    def observation(self, key: NestedKey, value: Tensor) -> Tensor:
        """``[*B, *obs]`` standardised from ``[*B, *obs]`` under an observation key of the layout."""
        if key not in self.standardized:
            return value
        index = self.standardized.index(key)
        mean, std = self.get_buffer(f"mean_{index}"), self.get_buffer(f"std_{index}")
        return (value.to(mean.dtype) - mean) / std

    def policy_action(self, action: Tensor) -> Tensor:
        """The environment's action in the policy's units: in (-1, 1), whatever the dataset holds; indices from 0."""
        if self.action_start is not None:
            return action - self.action_start if self.action_start else action
        low, high = self.get_buffer("action_low"), self.get_buffer("action_high")
        return self.clipped(2.0 * (action - low) / (high - low) - 1.0)

    @staticmethod
    def clipped(action: Tensor) -> Tensor:
        """A continuous action in the policy's units, brought inside (-1, 1); nothing is read on the host."""
        return action.clamp(-ACTION_LIMIT, ACTION_LIMIT)

    def environment_action(self, action: Tensor) -> Tensor:
        """The policy's action in the environment's units, within its bounds."""
        if self.action_start is not None:
            return action + self.action_start if self.action_start else action
        low, high = self.get_buffer("action_low"), self.get_buffer("action_high")
        return (low + 0.5 * (action + 1.0) * (high - low)).clamp(low, high)

    def reward(self, reward: Tensor, count: Tensor | float = 1.0) -> Tensor:
        r"""Rewards as the critics learn them.

        Args:
            reward: ``[*B, 1]``; of n-step transitions the discounted sum of their rewards.
            count: how often the shift is in that sum, :math:`\sum_{k<n} \gamma^k`, of ``reward``'s shape.
        """
        return self.get_buffer("reward_scale") * reward + self.get_buffer("reward_shift") * count

    def forward(self, batch: _Batch) -> _Batch:
        """A batch by the key layout in the networks' units; entries that are not normalised are shared.

        Args:
            batch: in the environment's units, a TensorDict or a dictionary of all its keys; it is not changed.
        """
        result = batch.copy()
        put = result.set if isinstance(result, TensorDictBase) else result.__setitem__
        ways: dict[NestedKey, Callable[[Tensor], Tensor]] = {
            _KEYS.action: self.policy_action,
            _REWARD: lambda reward: self.reward(reward, self._shifts(batch, reward)),
        }
        for key in self.standardized:
            ways[key] = ways[next_key(key)] = partial(self.observation, key)
        for key, way in ways.items():
            # What is missing, the loss names.
            if (value := batch.get(key, None)) is not None:
                put(key, way(value))
        return result

    def _shifts(self, batch: TensorDictBase | dict[NestedKey, Tensor], reward: Tensor) -> Tensor | float:
        """What :meth:`reward` calls ``count``."""
        steps: Any = batch.get(STEPS_TO_NEXT_OBS, None)
        discounts: Any = batch.get(DISCOUNT, None)
        if discounts is None and steps is None:
            return 1.0
        if self.discount == 1.0:
            return 1.0 if steps is None else steps.reshape(reward.shape)
        discounts = self.discount**steps if discounts is None else discounts
        count: Tensor = (1.0 - discounts.reshape(reward.shape)) / (1.0 - self.discount)
        return count

    def extra_state(self) -> dict[str, Any]:
        """Which observations are standardised, as JSON values; the numbers are in ``state_dict()``."""
        return {"standardized": [key if isinstance(key, str) else list(key) for key in self.standardized]}

    @classmethod
    def restored(cls, spaces: Spaces, extra: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Normalizers":
        """The normalisers of :meth:`extra_state` and ``state_dict()``.

        Raises:
            RuntimeError: if they do not fit together.
        """
        keys = [key if isinstance(key, str) else tuple(key) for key in extra["standardized"]]
        moments = {key: (tensors[f"mean_{i}"], tensors[f"std_{i}"]) for i, key in enumerate(keys)}
        normalizers = cls(spaces, observation_moments=moments)
        normalizers.load_state_dict(dict(tensors))
        return normalizers


def _rows_of(values: Tensor, kept: EpisodeRows) -> Iterator[Tensor]:
    return (values[rows] for rows in kept.pieces())


def _usable(mean: Tensor, std: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    # Relative to the mean where that is large: float32 cannot tell numbers that are closer.
    constant = std <= _SMALLEST_STD * mean.abs().clamp(min=1.0)
    std = std.masked_fill(constant, 1.0)
    dtype = torch.get_default_dtype()
    return mean.to(device, dtype), std.to(device, dtype)
