"""Offline data beside the replay buffer: kept once, packed, in the units that the networks read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data import read_dataset, summary
from iql_plugins.data.dataset import REWARD, require_single_steps
from iql_plugins.data.intake import ActionExcess, check_columns
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.data.packed import batch_source
from iql_plugins.keys import flat_name, next_key, shown
from iql_plugins.spaces import Box, Space, Spaces
from iql_sb3.batches import map_batch
from iql_sb3.networks import Inputs

__all__ = [
    "Normalization",
    "OfflineData",
    "Rewards",
    "check_buffer",
    "check_spaces",
    "load",
    "numpy_random",
    "replay",
    "start_statistics",
]

#: Pieces of which the discounted returns of a larger dataset are looked at, and the rows of each: a million in all.
_PIECES, _PIECE = 64, 16_384
_REWARD, _DONE, _TERMINATED = (next_key(name) for name in ("reward", "done", "terminated"))


def load(source: object, trust_pickle: bool = False) -> tuple[TensorDictBase, Spaces | None]:
    """A dataset by the key layout, and its environment's spaces where the source has them.

    Raises:
        DatasetError: one line that names the source and what is wrong; also for n-step transitions.
    """
    dataset = read_dataset(source, trust_pickle=trust_pickle)
    require_single_steps(dataset.tensors, "of which n_steps=... makes more")
    return dataset.tensors, dataset.spaces


def check_spaces(dataset: TensorDictBase, spaces: Spaces) -> None:
    """Raises ``ValueError`` that names the first entry of a dataset that is not in an environment's spaces."""
    integers = {
        key: space
        for key, space in spaces.observations.items()
        if isinstance(space, Box) and space.dtype.startswith("int")
    }
    for key, space in integers.items():
        tensor = dataset.get(key, None)
        if tensor is None or tensor.is_floating_point() or tuple(tensor.shape[1:]) != space.shape:
            came = "no such entry" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape[1:])}"
            raise ValueError(f"{shown(key)} of the dataset must be integers of shape {space.shape}, got {came}")
    rest = {key: space for key, space in spaces.observations.items() if key not in integers}
    nested = {key[-1]: space for key, space in rest.items() if isinstance(key, tuple)}
    if rest:
        Spaces(nested or rest["observation"], spaces.action).check(dataset)


def check_buffer(buffer: ReplayBuffer, action: Space, *, clip_all_actions: bool) -> ActionExcess:
    """As :func:`iql_plugins.data.intake.check_columns`, for all that is in a replay buffer, whose memory is shared.

    Rows are the buffer's slots; of several environments, each slot has a row for each of them.

    Args:
        buffer: of any class.
        action: the environment's space; continuous actions in a buffer are in [-1, 1].
        clip_all_actions: whether to clip actions even where that explains nothing.

    Raises:
        DatasetError: likewise.
    """
    if isinstance(action, Box):
        action = Box(action.shape, low=(-1.0,) * action.size, high=(1.0,) * action.size)
    columns: dict[Any, Any] = {}
    arrays = [("observation", buffer.observations), ("action", buffer.actions), (REWARD, buffer.rewards)]
    if not buffer.optimize_memory_usage:
        arrays.append((next_key("observation"), buffer.next_observations))
    # Where observations are shared, the newest is in the next slot.
    ahead = int(buffer.optimize_memory_usage and not buffer.full)
    for key, array in arrays:
        prefix = (key,) if isinstance(key, str) else key
        named = {(*prefix, name): each for name, each in array.items()} if isinstance(array, dict) else {key: array}
        for name, each in named.items():
            stored = each[: buffer.size() + (ahead if "observation" in prefix else 0)]
            columns[name] = [(0, torch.from_numpy(stored.reshape(-1, *each.shape[2:])))]
    what = f"the {type(buffer).__name__}"
    return check_columns(columns, action, clip_all_actions=clip_all_actions, name=what)


class Normalization(Protocol):
    """How a replay buffer normalises what it samples: the methods of ``VecNormalize`` that it calls."""

    def normalize_obs(self, obs: Any) -> Any:
        """Observations as the policy sees them."""

    def normalize_reward(self, reward: Any) -> Any:
        """Rewards as the critics learn them."""


class Rewards:
    """Scales and shifts rewards after ``VecNormalize``, step by step, so that it also holds for n-step returns.

    Args:
        normalizers: have the scale and the shift.
        env: normalises before; None for none.
    """

    def __init__(self, normalizers: Normalizers, env: VecNormalize | None) -> None:
        self._scale, self._shift = (float(getattr(normalizers, f"reward_{name}")) for name in ("scale", "shift"))
        self._env = env

    def normalize_obs(self, obs: Any) -> Any:
        """As ``VecNormalize``."""
        return obs if self._env is None else self._env.normalize_obs(obs)

    def normalize_reward(self, reward: Any) -> Any:
        """The scaled and shifted reward, float32."""
        reward = reward if self._env is None else self._env.normalize_reward(reward)
        return (self._scale * reward + self._shift).astype(np.float32)


def replay(buffer: ReplayBuffer, size: int, normalization: Normalization | None, inputs: Inputs) -> dict[str, Tensor]:
    """A batch of a replay buffer by keyword name, in the networks' units.

    Args:
        buffer: of any class.
        size: of the batch.
        normalization: what the buffer's ``sample`` takes as ``env``.
        inputs: the policy's.

    Raises:
        TypeError: if it samples something else than Stable-Baselines3's buffers do.
    """
    samples = buffer.sample(size, env=normalization)  # type: ignore[arg-type]
    mapped = map_batch(samples)
    if mapped is None:
        raise TypeError(
            f"the {type(buffer).__name__} must sample a named tuple with the fields of ReplayBufferSamples, "
            f"got {type(samples).__name__}"
        )
    tensors = dict(mapped.items(True, True))
    for key in inputs.spaces.observations:
        for name in (key, next_key(key)):
            tensors[name] = inputs.network(key, tensors[name])
    tensors["action"] = _policy_action(inputs, tensors["action"], scaled=True)
    return {flat_name(key): tensor for key, tensor in tensors.items()}


def _policy_action(inputs: Inputs, action: Tensor, *, scaled: bool) -> Tensor:
    """Actions in the policy's units; continuous ones that are ``scaled`` are in [-1, 1] already, or a little beyond."""
    normalizers = inputs.normalizers
    return normalizers.clipped(action) if scaled and not inputs.spaces.discrete else normalizers.policy_action(action)


@contextmanager
def numpy_random(generator: torch.Generator) -> Iterator[None]:
    """NumPy's global random numbers, from which replay buffers draw, from a generator meanwhile."""
    state = np.random.get_state()
    np.random.seed(int(torch.randint(2**32, (), generator=generator, device=generator.device)))
    try:
        yield
    finally:
        np.random.set_state(state)


class OfflineData:
    """A dataset as batches are drawn from it.

    Args:
        dataset: by the key layout. No reference to it is kept, unless it is memory-mapped.
        inputs: the policy's spaces and normalisers.
        scaled: whether continuous actions are in [-1, 1] already, and not in the environment's units.
        raw: whether observations and rewards are normalised when a batch is drawn, and not once: ``VecNormalize``'s
            statistics move.
        n_steps: number of steps of a transition.
        device: where batches are needed.
    """

    def __init__(
        self, dataset: TensorDictBase, inputs: Inputs, *, scaled: bool, raw: bool, n_steps: int, device: torch.device
    ) -> None:
        self._inputs, self._scaled, self.raw, self.n_steps, self._device = inputs, scaled, raw, n_steps, device
        self._observed = [name for key in inputs.spaces.observations for name in (key, next_key(key))]
        self._transitions = batch_source(dataset, self._transform, device)
        if n_steps > 1:
            columns = (dataset.get(key).reshape(-1).as_subclass(Tensor) for key in (_REWARD, _DONE))
            # What is on disk stays there.
            self._rewards, self._done = (column if self.on_disk else column.to(device, copy=True) for column in columns)

    def _transform(self, piece: dict[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        piece = {name: piece[name] for name in (*self._observed, "action", _REWARD, _DONE, _TERMINATED)}
        piece["action"] = _policy_action(self._inputs, piece["action"], scaled=self._scaled)
        if not self.raw:
            for key in self._inputs.spaces.observations:
                for name in (key, next_key(key)):
                    piece[name] = self._inputs.network(key, piece[name])
            piece[_REWARD] = self._inputs.normalizers.reward(piece[_REWARD])
        return piece

    def __len__(self) -> int:
        return len(self._transitions)

    @property
    def on_disk(self) -> bool:
        """Whether rows are read from a file when they are drawn."""
        return self._transitions.on_disk

    def batch(self, index: Tensor, gamma: float, normalization: Normalization | None) -> dict[str, Tensor]:
        """A batch by keyword name, in the networks' units.

        Args:
            index: ``[B]`` int64, its rows.
            gamma: the discount of one step, for transitions of several.
            normalization: what normalises raw observations and rewards.
        """
        index = index.to(self._device)
        rows = self._transitions.batch(index)
        if self.n_steps > 1:
            rows |= self._following(index, gamma, normalization)
        elif self.raw and normalization is not None:
            rows["next_reward"] = self._normalized(rows["next_reward"], normalization.normalize_reward)
        if self.raw:
            self._normalize_observations(rows, normalization)
        return rows

    def _following(self, index: Tensor, gamma: float, normalization: Normalization | None) -> dict[str, Tensor]:
        """What comes after several steps, or at the end of the episode if that is nearer."""
        offsets = torch.arange(self.n_steps, device=index.device)
        rows = index.unsqueeze(-1) + offsets
        # The data's end is an episode's, too.
        beyond, rows = rows >= len(self), rows.clamp(max=len(self) - 1)
        rewards, done = (column[rows.to(column.device)].to(index.device) for column in (self._rewards, self._done))
        # As far as no step before has ended the episode.
        taken = ~beyond & (done.cumsum(-1) - done.long() == 0)
        count = taken.sum(-1)
        last = index + count - 1
        if not self.raw:
            rewards = self._inputs.normalizers.reward(rewards)
        elif normalization is not None:
            rewards = self._normalized(rewards, normalization.normalize_reward)
        following = {name: value for name, value in self._transitions.batch(last).items() if name.startswith("next_")}
        return following | {
            "next_reward": (rewards * gamma**offsets * taken).sum(-1, keepdim=True),
            "next_discount": (gamma ** count.to(rewards.dtype)).unsqueeze(-1),
        }

    def _normalize_observations(self, rows: dict[str, Tensor], normalization: Normalization | None) -> None:
        keys = self._inputs.spaces.observations
        for prefix in ((), ("next",)):
            names = {key: flat_name((*prefix, *(key if isinstance(key, tuple) else (key,)))) for key in keys}
            arrays = {key: rows[name].cpu().numpy() for key, name in names.items()}
            if normalization is not None:
                if "observation" in arrays:
                    arrays["observation"] = normalization.normalize_obs(arrays["observation"])
                else:
                    normalized = normalization.normalize_obs({key[-1]: array for key, array in arrays.items()})
                    arrays = {key: normalized[key[-1]] for key in arrays}
            for key, name in names.items():
                rows[name] = self._inputs.network(key, torch.as_tensor(arrays[key], device=self._device))

    def _normalized(self, rewards: Tensor, normalize: Any) -> Tensor:
        return torch.as_tensor(normalize(rewards.cpu().numpy()), device=self._device)


def start_statistics(env: VecNormalize, dataset: TensorDictBase) -> None:
    """Puts a dataset's statistics into a ``VecNormalize`` that has seen nothing yet, as its steps would have.

    Of observations these are the ones that are stored with a dataset, where they are; of discounted returns, which
    depend on the environment's ``gamma``, those of a million rows at most.

    Without them the networks would learn offline in the environment's units, and meet others as soon as the
    environment is stepped.

    Args:
        env: changed only if it is training, and has no statistics.
        dataset: by the key layout.
    """
    if not env.training:
        return
    rms: Any = env.obs_rms if env.norm_obs else {}
    statistics = rms if isinstance(rms, dict) else {"": rms}
    for key, running in statistics.items():
        if running.count < 1.0:
            mean, std = summary.statistics(dataset, ("observation", key) if key else "observation", ("mean", "std"))
            running.update_from_moments(mean.numpy(), std.square().numpy(), len(dataset))
    if env.ret_rms.count < 1.0:
        returns = np.concatenate([_running_returns(dataset[rows], env.gamma) for rows in _looked_at(len(dataset))])
        env.ret_rms.update_from_moments(returns.mean(), returns.var(), len(dataset))


def _looked_at(rows: int) -> list[slice]:
    """All rows of a dataset, or pieces from all over a large one: more of them would change few digits."""
    if rows <= _PIECES * _PIECE:
        return [slice(0, rows)]
    starts = [number * (rows - _PIECE) // (_PIECES - 1) for number in range(_PIECES)]
    return [slice(start, start + _PIECE) for start in starts]


def _running_returns(dataset: TensorDictBase, gamma: float) -> Any:
    """Of each row the discounted sum of the rewards of its episode until there, as ``VecNormalize`` counts it."""
    rewards, done = (dataset.get(key).reshape(-1).tolist() for key in (_REWARD, _DONE))
    returns, running_return = [], 0.0
    for reward, ended in zip(rewards, done, strict=True):
        running_return = running_return * gamma + reward
        returns.append(running_return)
        running_return = 0.0 if ended else running_return
    return np.array(returns)
