"""A replay buffer over a memory-mapped dataset, which stays on disk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import (
    BasicTransitionPicker,
    Episode,
    FrameStackTransitionPicker,
    MultiStepTransitionPicker,
    ReplayBuffer,
    Signature,
    TransitionMiniBatch,
    TransitionPickerProtocol,
)
from tensordict import MemoryMappedTensor, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_d3rlpy._compat import picker_settings
from iql_d3rlpy.buffer import Array, FastReplayBuffer, Picked, check_parts, float32, one_or_many, reward_sums, zeroed
from iql_d3rlpy.scalers import fit_action, fit_observation, fit_reward
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
        transition_picker: one of d3rlpy's, likewise.
        **options: likewise.

    Raises:
        UnsupportedBufferError: for another transition picker.
    """

    def __init__(
        self,
        dataset: TensorDictBase,
        keys: Sequence[NestedKey],
        action_size: int,
        transition_picker: TransitionPickerProtocol | None = None,
        **options: Any,
    ) -> None:
        picker = transition_picker or BasicTransitionPicker()
        self._tensors, self._keys, self._rows = dataset, keys, _Rows(dataset, keys, picker)
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
            transition_picker=picker,
            **options,
        )
        check_parts(self, buffers=(_Rows,))

    def sample_transition_batch(self, batch_size: int) -> TransitionMiniBatch:
        """A mini-batch of transitions, drawn uniformly with replacement.

        Args:
            batch_size: number of transitions.
        """
        return self._rows.batch(self.draw(self.transition_count, batch_size))

    def fit_scalers(self, config: Any) -> None:
        """Fits the scalers of a d3rlpy configuration without a look at each step, wherever that is the same.

        It is not for observations of stacked frames, and rewards of several steps.

        Args:
            config: an algorithm's.
        """
        if not isinstance(self.transition_picker, FrameStackTransitionPicker):
            fit_observation(config.observation_scaler, self._tensors, self._keys)
        fit_action(config.action_scaler, self._tensors)
        if not isinstance(self.transition_picker, MultiStepTransitionPicker):
            fit_reward(config.reward_scaler, self._tensors)

    def columns(self, action: Space) -> Mapping[NestedKey, Sequence[Part]]:
        """What is to be looked at before it is trained on, see :func:`iql_plugins.data.intake.to_be_checked`."""
        keys = ["observation", "action", REWARD, next_key("observation")]
        tensors = self._tensors.select(*keys)
        return to_be_checked(tensors, list(tensors.keys(True, True)), action)


class _Rows(Sequence[tuple[Any, int]]):
    """The rows of a dataset as d3rlpy's buffers have transitions: an episode, and a step in it."""

    def __init__(self, dataset: TensorDictBase, keys: Sequence[NestedKey], picker: TransitionPickerProtocol) -> None:
        def array(key: NestedKey) -> Array:
            tensor: Tensor = dataset.get(key)
            return tensor.numpy()

        self.observations = [(array(key), array(next_key(key))) for key in keys]
        self.action, self.reward = array("action"), array(REWARD)
        self._done, self._terminated = (array(key).reshape(-1) for key in (DONE, TERMINATED))
        self._picker = picker
        frames, self._n_steps, self._gamma = picker_settings(picker)
        self._frames = frames or 1

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
        last: Array = _taken(self._done, rows) | (rows == len(self) - 1)
        for before, after in self.observations:
            last |= (_taken(before, following) != _taken(after, rows)).reshape(len(rows), -1).any(1)
        return last

    def batch(self, index: Array) -> TransitionMiniBatch:
        """The transitions at these rows, ``[B]``."""
        count = self._counts(index)
        # The last step of each transition; there, its episode may end.
        end = index + count - 1
        terminal = _taken(self._terminated, end)
        following = np.where(self._last(end), end, np.minimum(end + 1, len(self) - 1))
        stacks = list(self._stacks(index, end, terminal))
        return TransitionMiniBatch(
            observations=one_or_many([stack for stack, _ in stacks]),
            actions=float32(_taken(self.action, index)),
            rewards=float32(reward_sums(self.reward, index, count, self._n_steps, self._gamma)),
            next_observations=one_or_many([stack for _, stack in stacks]),
            next_actions=zeroed(float32(_taken(self.action, following)), terminal),
            terminals=float32(terminal[:, None]),
            intervals=float32(count[:, None]),
            transitions=Picked(self._picker, lambda position: self[int(index[position])], len(index)),
        )

    def _counts(self, index: Array) -> Array:
        """Steps of each transition, ``[B]``: fewer than are wanted where its episode ends before."""
        count, goes_on = np.ones_like(index), np.ones(len(index), bool)
        for _ in range(self._n_steps - 1):
            goes_on &= ~self._last(index + count - 1)
            count += goes_on
        return count

    def _stacks(self, index: Array, end: Array, terminal: Array) -> Iterator[tuple[Array, Array]]:
        """The frames of each observation, and those after it, channels behind one another."""
        before_start, rows = np.zeros(len(index), bool), [(index, np.zeros(len(index), bool))]
        for _ in range(self._frames - 1):
            row = np.maximum(rows[0][0] - 1, 0)
            before_start = before_start | (rows[0][0] == 0) | self._last(row)
            rows.insert(0, (row, before_start))
        for before, after in self.observations:
            frames = [zeroed(float32(_taken(before, row)), missing) for row, missing in rows]
            frames_after = [zeroed(frame.copy(), terminal) for frame in frames[1:]]
            frames_after.append(zeroed(float32(_taken(after, end)), terminal))
            yield _stacked(frames), _stacked(frames_after)


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


def _taken(array: Array, rows: Array) -> Array:
    """Some rows of an array. ``take`` needs half of the time, and copies all of them unless they are contiguous."""
    return array.take(rows, axis=0) if array.flags.c_contiguous else array[rows]


def _stacked(frames: Sequence[Array]) -> Array:
    """Channels of all frames behind one another."""
    return frames[0] if len(frames) == 1 else np.concatenate(frames, axis=1)


def _signature(arrays: Sequence[Array]) -> Signature:
    return Signature(dtype=[array.dtype for array in arrays], shape=[array.shape[1:] for array in arrays])
