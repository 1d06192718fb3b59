"""A replay buffer over a memory-mapped dataset, which stays on disk."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import BasicTransitionPicker, Episode, ReplayBuffer, Signature, Transition, TransitionMiniBatch
from tensordict import MemoryMappedTensor, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_d3rlpy.buffer import Array, FastReplayBuffer, float32, one_or_many
from iql_plugins.data.dataset import DONE, REWARD, TERMINATED, chunks
from iql_plugins.data.intake import Part, to_be_checked
from iql_plugins.keys import next_key
from iql_plugins.spaces import Space

__all__ = ["MappedReplayBuffer", "is_mapped"]

#: Rows that are looked at together for the ends of one episode.
_WINDOW = 1024


def is_mapped(dataset: TensorDictBase) -> bool:
    """Whether all of a dataset is on disk."""
    return all(isinstance(tensor, MemoryMappedTensor) for tensor in dataset.values(True, True))


class MappedReplayBuffer(FastReplayBuffer):
    """The mini-batches of :func:`~iql_d3rlpy.datasets.to_replay_buffer`, gathered from a memory-mapped dataset.

    Nothing is copied but what is drawn, and each episode that somebody looks at. Nothing can be appended.

    Args:
        dataset: transitions by the key layout, memory-mapped.
        keys: of its observations, sorted.
        action_size: as of ``d3rlpy.dataset.ReplayBuffer``.
    """

    def __init__(self, dataset: TensorDictBase, keys: Sequence[NestedKey], action_size: int) -> None:
        self._tensors, self._rows = dataset, _Rows(dataset, keys)
        observations, action = self._rows.observations, self._rows.action
        # Not FastReplayBuffer's, which takes buffers that are in memory.
        ReplayBuffer.__init__(
            self,
            self._rows,
            observation_signature=_signature([before for before, _ in observations]),
            action_signature=_signature([action]),
            reward_signature=_signature([self._rows.reward]),
            action_space=ActionSpace.DISCRETE if action.dtype.kind == "i" else ActionSpace.CONTINUOUS,
            action_size=action_size,
        )

    def sample_transition_batch(self, batch_size: int) -> TransitionMiniBatch:
        """A mini-batch of transitions, drawn uniformly with replacement.

        Args:
            batch_size: number of transitions.
        """
        return self._rows.batch(self.draw(self.transition_count, batch_size))

    def columns(self, action: Space) -> Mapping[NestedKey, Sequence[Part]]:
        """What is to be looked at before it is trained on, see :func:`iql_plugins.data.intake.to_be_checked`."""
        keys = ["observation", "action", REWARD, next_key("observation")]
        tensors = self._tensors.select(*keys)
        return to_be_checked(tensors, list(tensors.keys(True, True)), action)


class _Rows(Sequence[tuple[Any, int]]):
    """The rows of a dataset as d3rlpy's buffers have transitions: an episode, and a step in it."""

    def __init__(self, dataset: TensorDictBase, keys: Sequence[NestedKey]) -> None:
        def array(key: NestedKey) -> Array:
            tensor: Tensor = dataset.get(key)
            return tensor.numpy()

        self.observations = [(array(key), array(next_key(key))) for key in keys]
        self.action, self.reward = array("action"), array(REWARD)
        self._done, self._terminated = (array(key).reshape(-1) for key in (DONE, TERMINATED))

    def __len__(self) -> int:
        return len(self._done)

    @property
    def transition_count(self) -> int:
        """As of d3rlpy's buffers."""
        return len(self)

    @cached_property
    def episodes(self) -> Sequence[Any]:
        """All of them, each read when it is asked for. Where they end is looked up once, in all of the dataset."""
        size = sum(before[0].nbytes + after[0].nbytes for before, after in self.observations)
        parts = [rows.start + np.flatnonzero(self._last(np.arange(rows.start, rows.stop)))
                 for rows in chunks(len(self), size)]  # fmt: skip
        return _Episodes(self.episode, np.concatenate(parts))

    @overload
    def __getitem__(self, index: int) -> tuple[Any, int]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Any, int]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        start = last = row
        while start > 0:
            before = np.arange(max(0, start - _WINDOW), start)
            ends = np.flatnonzero(self._last(before))
            start = int(before[ends[-1]]) + 1 if len(ends) else int(before[0])
            if len(ends):
                break
        while not len(ends := np.flatnonzero(self._last(after := np.arange(last, min(last + _WINDOW, len(self)))))):
            last += len(after)
        return self.episode(start, last + int(ends[0])), row - start

    def append(self, episode: Any, index: int) -> None:
        """Refuses: the dataset is somebody's file."""
        raise TypeError("nothing can be appended to a memory-mapped dataset: collect in a buffer of its own")

    def episode(self, start: int, last: int) -> Episode:
        """The episode of these rows; one that was cut has a step more, as ``to_replay_buffer`` says."""
        terminated, rows = bool(self._terminated[last]), slice(start, last + 1)
        columns = [
            *((before[rows], after[last : last + 1]) for before, after in self.observations),
            (self.action[rows], self.action[last : last + 1]),
            (self.reward[rows], np.zeros_like(self.reward[:1])),
        ]
        *observations, actions, rewards = [np.concatenate(pair[: 1 if terminated else 2]) for pair in columns]
        return Episode(observations[0] if len(observations) == 1 else observations, actions, rewards, terminated)

    def _last(self, rows: Array) -> Array:
        """Which of these rows are the last ones of their episodes, those included that the data only breaks off."""
        following = np.minimum(rows + 1, len(self) - 1)
        last: Array = self._done[rows] | (rows == len(self) - 1)
        for before, after in self.observations:
            last |= (before[following] != after[rows]).reshape(len(rows), -1).any(1)
        return last

    def batch(self, index: Array) -> TransitionMiniBatch:
        """The transitions at these rows, ``[B]``."""
        terminal, action = self._terminated[index], self.action[index]
        last = self._last(index)[:, None]
        next_action = np.where(last, action, self.action[np.minimum(index + 1, len(self) - 1)])
        following = [float32(after[index]) for _, after in self.observations]
        for values in (next_action, *following):
            values[terminal] = 0
        return TransitionMiniBatch(
            observations=one_or_many([float32(before[index]) for before, _ in self.observations]),
            actions=float32(action),
            rewards=float32(self.reward[index]),
            next_observations=one_or_many(following),
            next_actions=float32(next_action),
            terminals=float32(terminal[:, None]),
            intervals=np.ones((len(index), 1), np.float32),
            transitions=_Picked(self, index),
        )


class _Episodes(Sequence[Any]):
    def __init__(self, read: Callable[[int, int], Episode], last: Array) -> None:
        self._read, self._last = read, last

    def __len__(self) -> int:
        return len(self._last)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._read(int(self._last[number - 1]) + 1 if number else 0, int(self._last[number]))


class _Picked(Sequence[Transition]):
    """The transitions of a mini-batch, made by d3rlpy's picker when somebody looks at them."""

    def __init__(self, rows: _Rows, index: Array) -> None:
        self._rows, self._index = rows, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return BasicTransitionPicker()(*self._rows[int(self._index[index])])


def _signature(arrays: Sequence[Array]) -> Signature:
    return Signature(dtype=[array.dtype for array in arrays], shape=[array.shape[1:] for array in arrays])
