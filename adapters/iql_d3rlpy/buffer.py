"""A replay buffer that samples from contiguous arrays, and so twenty times as fast as d3rlpy's own."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from d3rlpy.dataset import (
    BasicTransitionPicker,
    FIFOBuffer,
    FrameStackTransitionPicker,
    InfiniteBuffer,
    MultiStepTransitionPicker,
    ReplayBuffer,
    SparseRewardTransitionPicker,
    Transition,
    TransitionMiniBatch,
)

__all__ = ["FastReplayBuffer", "UnsupportedBufferError", "as_fast_buffer"]

Array = np.ndarray[Any, np.dtype[Any]]
#: Draws ``size`` positions below ``count``.
Draw = Callable[[int, int], Array]

_PICKERS = (
    BasicTransitionPicker,
    FrameStackTransitionPicker,
    MultiStepTransitionPicker,
    SparseRewardTransitionPicker,
)
#: Transitions that a FIFO buffer may have dropped, beyond as many as it has, before their arrays are let go.
_SLACK = 10_000


def _uniform(count: int, size: int) -> Array:
    return np.random.randint(count, size=size)


class UnsupportedBufferError(TypeError):
    """A buffer that samples in a way that contiguous arrays cannot follow; says which part of it does."""


class FastReplayBuffer(ReplayBuffer):  # type: ignore[misc]
    """A d3rlpy ``ReplayBuffer`` whose mini-batches are gathered from contiguous arrays.

    Mini-batches are the very ones that ``ReplayBuffer`` would have drawn from the same NumPy random state, whatever
    the signature of observations (vectors, images, tuples), for one-step, n-step and frame-stacking transition
    pickers. Episodes may be appended at any time. The arrays are made when the first mini-batch is drawn, and take as
    much memory again as the episodes do.

    Args:
        *args: as those of ``d3rlpy.dataset.ReplayBuffer``.
        **options: likewise.

    Attributes:
        draw: draws positions of transitions; NumPy's global random state by default, as in d3rlpy.

    Raises:
        UnsupportedBufferError: for a transition picker or a buffer that is not one of d3rlpy's.
    """

    _columns: "_Columns | None" = None
    draw: Draw = staticmethod(_uniform)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _check(self)

    def sample_transition_batch(self, batch_size: int) -> TransitionMiniBatch:
        """A mini-batch of transitions, drawn uniformly with replacement.

        Args:
            batch_size: number of transitions.

        Raises:
            ValueError: if there is no transition yet.
        """
        columns = self._synchronized()
        if columns.count == 0:
            raise ValueError("the replay buffer has no transition to sample")
        return columns.batch(self.draw(columns.count, batch_size))

    def _synchronized(self) -> "_Columns":
        if self._columns is None:
            self._columns = _Columns(self._buffer, self._transition_picker)
        self._columns.follow()
        return self._columns


def as_fast_buffer(dataset: ReplayBuffer) -> FastReplayBuffer:
    """The same transitions in a buffer that samples fast, for any algorithm of d3rlpy's.

    Both share episodes and writer: what is appended to one is in the other.

    Args:
        dataset: a ``ReplayBuffer`` or ``MDPDataset``.

    Raises:
        UnsupportedBufferError: if it samples in a way of its own: a subclass that overrides sampling, a
            ``MixedReplayBuffer``, a transition picker or buffer that is not d3rlpy's, or episodes of different dtypes.
    """
    if isinstance(dataset, FastReplayBuffer):
        return dataset
    _check(dataset)
    fast = FastReplayBuffer.__new__(FastReplayBuffer)
    fast.__dict__.update(dataset.__dict__)
    fast._synchronized()
    return fast


def _check(dataset: Any) -> None:
    """Raises unless contiguous arrays give what a buffer would sample."""
    name = type(dataset).__name__
    if not isinstance(dataset, ReplayBuffer):
        raise UnsupportedBufferError(
            f"the buffer must be a d3rlpy ReplayBuffer, got {name}: pass each part of a mixture"
        )
    own = [
        method
        for method in ("sample_transition", "sample_transition_batch")
        if getattr(type(dataset), method) not in (getattr(ReplayBuffer, method), getattr(FastReplayBuffer, method))
    ]
    if own:
        raise UnsupportedBufferError(f"{name} has a {own[0]} of its own, which contiguous arrays cannot follow")
    for part, known in ((dataset.transition_picker, _PICKERS), (dataset.buffer, (InfiniteBuffer, FIFOBuffer))):
        if type(part) not in known:
            names = ", ".join(kind.__name__ for kind in known)
            raise UnsupportedBufferError(f"{name} has a {type(part).__name__}; fast are {names}")


class _Growing:
    """Rows of one shape and dtype, to which more can be added."""

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        self._array = np.empty((0, *shape), dtype)
        self.count = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    def __getitem__(self, rows: Array) -> Array:
        gathered: Array = self._array.take(rows, axis=0)
        return gathered

    def reserve(self, count: int) -> None:
        """Makes room for ``count`` rows in all."""
        if count > len(self._array):
            array = np.empty((count, *self._array.shape[1:]), self._array.dtype)
            array[: self.count] = self._array[: self.count]
            self._array = array

    def extend(self, rows: Array) -> None:
        """Adds rows."""
        stop = self.count + len(rows)
        if stop > len(self._array):
            self.reserve(max(stop, 2 * len(self._array)))
        self._array[self.count : stop] = rows
        self.count = stop

    def set(self, row: int, value: Any) -> None:
        """Changes one row."""
        self._array[row] = value


class _Columns:
    """The steps of all episodes one after another, and where each transition is among them.

    Args:
        buffer: has the transitions, each an episode and a step in it.
        picker: says what a transition is made of.
    """

    def __init__(self, buffer: Any, picker: Any) -> None:
        self._buffer = buffer
        self._picker = picker
        self._frames: int | None = picker._n_frames if isinstance(picker, FrameStackTransitionPicker) else None
        multi_step = isinstance(picker, MultiStepTransitionPicker)
        self._n_steps: int = picker._n_steps if multi_step else 1
        self._gamma: float | None = picker._gamma if multi_step else None
        self._start_over()

    def _start_over(self) -> None:
        self._last: Any = None
        self._episodes: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._steps: list[_Growing] = []
        self._first, self._size = _Growing((), np.int64), _Growing((), np.int64)
        self._terminated = _Growing((), np.bool_)
        self._transitions = _Growing((2,), np.int64)

    @property
    def count(self) -> int:
        """Number of transitions that can be drawn."""
        return len(self._buffer)

    def follow(self) -> None:
        """Takes in what was appended to the buffer since the last time."""
        count = self.count
        if self._transitions.count > 2 * count + _SLACK:
            self._start_over()
        added = []
        for position in range(count - 1, -1, -1):
            transition = self._buffer[position]
            if transition is self._last:
                break
            added.append(transition)
        if not added:
            return
        added.reverse()
        episodes = {id(episode): episode for episode, _ in added}
        self._reserve(list(episodes.values()))
        numbers = {identity: self._number(episode) for identity, episode in episodes.items()}
        self._transitions.extend(np.array([(numbers[id(episode)], step) for episode, step in added], np.int64))
        self._last = added[-1]

    def _reserve(self, episodes: Sequence[Any]) -> None:
        if not self._steps:
            self._steps = [_Growing(column.shape[1:], _stored(column)) for column in _columns(episodes[0])]
            # The reward is the last, and is summed in the precision that it came in.
            reward = _columns(episodes[0])[-1]
            self._steps[-1] = _Growing(reward.shape[1:], reward.dtype)
            for steps in self._steps:
                steps.reserve(sum(len(episode) for episode in episodes))

    def _number(self, episode: Any) -> int:
        """The number of an episode all of whose steps are stored."""
        number = self._numbers.get(id(episode))
        if number is None:
            number = self._numbers[id(episode)] = len(self._episodes)
            self._episodes.append(episode)
            for known, value in ((self._first, self._steps[0].count), (self._size, 0), (self._terminated, False)):
                known.extend(np.array([value]))
        stored, size = int(self._size[np.array(number)]), episode.size()
        if size > stored:
            if int(self._first[np.array(number)]) + stored != self._steps[0].count:
                # Others came in between: all of it goes behind them, so that its steps are neighbours.
                self._first.set(number, self._steps[0].count)
                stored = 0
            for steps, column in zip(self._steps, _columns(episode), strict=True):
                if steps.dtype not in (_stored(column), column.dtype):
                    raise UnsupportedBufferError(
                        f"the episodes must have the same dtypes, got {column.dtype} after {steps.dtype}"
                    )
                steps.extend(column[stored:size])
            self._size.set(number, size)
        self._terminated.set(number, bool(episode.terminated))
        return number

    def batch(self, index: Array) -> TransitionMiniBatch:
        """The transitions at these positions of the buffer, ``[B]``."""
        oldest = self._transitions.count - self.count
        number, step = self._transitions[index + oldest].T
        first, size, terminated = self._first[number], self._size[number], self._terminated[number]
        # An episode that was cut has an observation after its last transition, one that terminated has none.
        next_step = np.minimum(step + self._n_steps, np.where(terminated, size, size - 1))
        terminal = next_step == size
        next_row = first + np.minimum(next_step, size - 1)
        *observations, actions, rewards = self._steps
        return TransitionMiniBatch(
            observations=_one_or_many([self._observed(column, first, step) for column in observations]),
            actions=_float(actions[first + step]),
            rewards=_float(self._rewards(rewards, first + step, next_step - step)),
            next_observations=_one_or_many(
                [
                    _zeroed(self._observed(column, first, np.minimum(next_step, size - 1)), terminal)
                    for column in observations
                ]
            ),
            next_actions=_zeroed(_float(actions[next_row]), terminal),
            terminals=_float(terminal[:, None]),
            intervals=_float((next_step - step)[:, None]),
            transitions=_Picked(self._picker, self._episodes, number, step),
        )

    def _observed(self, column: _Growing, first: Array, step: Array) -> Array:
        if self._frames is None:
            return _float(column[first + step])
        frames = [
            _zeroed(_float(column[first + np.maximum(step - back, 0)]), step < back)
            for back in range(self._frames - 1, -1, -1)
        ]
        # Channels of all frames behind one another.
        return np.concatenate(frames, axis=1)

    def _rewards(self, rewards: _Growing, row: Array, steps: Array) -> Array:
        if self._gamma is None:
            return rewards[row]
        total = np.zeros((len(row), *rewards[row[:1]].shape[1:]))
        for ahead in range(self._n_steps):
            valid = ahead < steps
            total += self._gamma**ahead * _zeroed(rewards[np.where(valid, row + ahead, row)].astype(np.float64), ~valid)
        return total


class _Picked(Sequence[Transition]):
    """The transitions of a mini-batch, made by d3rlpy's picker when somebody looks at them."""

    def __init__(self, picker: Any, episodes: Sequence[Any], number: Array, step: Array) -> None:
        self._picker, self._episodes, self._number, self._step = picker, episodes, number, step

    def __len__(self) -> int:
        return len(self._number)

    @overload
    def __getitem__(self, index: int) -> Transition: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Transition]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self._picker(self._episodes[self._number[index]], int(self._step[index]))


def _columns(episode: Any) -> list[Array]:
    """The observations, the actions and the rewards of an episode."""
    observations = episode.observations
    parts = observations if isinstance(observations, list | tuple) else [observations]
    return [*parts, episode.actions, episode.rewards]


def _stored(column: Array) -> Any:
    # Mini-batches are float32, so that nothing is gained by more; images stay small.
    return column.dtype if column.dtype == np.uint8 else np.dtype(np.float32)


def _float(values: Array) -> Array:
    return values.astype(np.float32, copy=False)


def _zeroed(values: Array, where: Array) -> Array:
    """``values`` of its own, with rows set to zero in place."""
    values[where] = 0.0
    return values


def _one_or_many(observations: list[Array]) -> Any:
    return observations[0] if len(observations) == 1 else observations
