"""A replay buffer that samples from contiguous arrays, and so twenty times as fast as d3rlpy's own."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from d3rlpy.dataset import (
    BasicTransitionPicker,
    Episode,
    FIFOBuffer,
    FrameStackTransitionPicker,
    InfiniteBuffer,
    MultiStepTransitionPicker,
    ReplayBuffer,
    SparseRewardTransitionPicker,
    Transition,
    TransitionMiniBatch,
)
from tensordict.utils import NestedKey

from iql_d3rlpy._compat import held_transitions, picker_settings
from iql_d3rlpy.batches import observation_keys
from iql_plugins.data.dataset import REWARD, chunks
from iql_plugins.data.intake import Part
from iql_plugins.training.distributed import Processes

__all__ = [
    "FastReplayBuffer",
    "Picked",
    "UnsupportedBufferError",
    "as_fast_buffer",
    "check_parts",
    "columns",
    "draw_share",
    "float32",
    "one_or_many",
    "reward_sums",
    "zeroed",
]

Array = np.ndarray[Any, np.dtype[Any]]
#: Draws ``size`` positions below ``count``.
Draw = Callable[[int, int], Array]
#: The episode of a transition, and the step in it, by its position.
Held = Callable[[int], tuple[Any, int]]

_PICKERS = (
    BasicTransitionPicker,
    FrameStackTransitionPicker,
    MultiStepTransitionPicker,
    SparseRewardTransitionPicker,
)
#: Transitions that a FIFO buffer may have dropped, beyond as many as it has, before their arrays are let go.
_SLACK = 10_000
#: Bytes of episodes that lie apart in memory, up to which they are copied: rows of one array are gathered faster.
LARGEST_COPY = 2**28


def _uniform(count: int, size: int) -> Array:
    return np.random.randint(count, size=size)


def draw_share(count: int, size: int) -> Array:
    """``[size]`` positions below ``count`` from this process's share of them.

    Processes that were seeded alike would draw the same ones otherwise, and learn no more than one.
    """
    share = Processes.of_group().share(count)
    return share.start + np.random.randint(len(share), size=size)


class UnsupportedBufferError(TypeError):
    """A buffer that samples in a way that contiguous arrays cannot follow; says which part of it does."""


class FastReplayBuffer(ReplayBuffer):  # type: ignore[misc]
    """A d3rlpy ``ReplayBuffer`` whose mini-batches are gathered from contiguous arrays.

    Mini-batches are the very ones that ``ReplayBuffer`` would have drawn from the same NumPy random state, whatever
    the signature of observations (vectors, images, tuples), for one-step, n-step and frame-stacking transition
    pickers. Episodes may be appended at any time.

    An ``Episode`` is left as it is. Where they are slices of common arrays, as those of an ``MDPDataset``, these are
    used as they are; episodes that lie apart in memory, as those of a file, are copied up to 256 MiB, and beyond that
    gathered from where they are, which takes longer. What is appended step by step is copied.

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

    def __getstate__(self) -> dict[str, Any]:
        # The arrays know episodes by identity, and are made anew around those of a copy.
        return {name: value for name, value in vars(self).items() if name != "_columns"}

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

    Both share episodes and writer: what is appended to one is in the other, and no large dataset is held twice (see
    :class:`FastReplayBuffer`).

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


def columns(dataset: Any) -> Mapping[NestedKey, Iterator[Part]]:
    """What mini-batches hold of a buffer's episodes, as float32, by the key layout; rows are the episodes' steps.

    Args:
        dataset: any replay buffer of d3rlpy's.
    """
    episodes = dataset.episodes
    keys = [*observation_keys(episodes[0].observations), "action", REWARD] if len(episodes) else []
    return {key: _parts(episodes, index, all_steps=index < len(keys) - 2) for index, key in enumerate(keys)}


def _parts(episodes: Sequence[Any], index: int, all_steps: bool) -> Iterator[Part]:
    start = 0
    for episode in episodes:
        column = _columns(episode)[index]
        # The last step of an episode that was cut is no transition: nothing but its observation is read.
        count = len(column) if all_steps else episode.transition_count
        if column.dtype.kind == "f":
            for rows in chunks(count, column.nbytes // len(column)):
                yield start + rows.start, torch.tensor(column[rows], dtype=torch.float32, device="cpu")
        start += len(column)


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
    check_parts(dataset)


def check_parts(dataset: Any, buffers: tuple[type, ...] = (InfiniteBuffer, FIFOBuffer)) -> None:
    """Raises :class:`UnsupportedBufferError` for a transition picker or a buffer that is none of those that are known.

    Args:
        dataset: a ``ReplayBuffer``.
        buffers: known ones.
    """
    name = type(dataset).__name__
    for part, known in ((dataset.transition_picker, _PICKERS), (dataset.buffer, buffers)):
        if type(part) not in known:
            names = ", ".join(kind.__name__ for kind in known)
            raise UnsupportedBufferError(f"{name} has a {type(part).__name__}; fast are {names}")


class _Growing:
    """Rows of one shape and dtype, to which more can be added.

    Args:
        shape: of a row.
        dtype: of a row.
        head: the first rows, which are somebody else's and stay where they are.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, head: "Array | _Apart | None" = None) -> None:
        self._array = np.empty((0, *shape), dtype)
        self._head = self._array if head is None else head
        self.count = len(self._head)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    def __getitem__(self, rows: Array) -> Array:
        start = len(self._head)
        if start == 0:
            return self._array.take(rows, axis=0)
        if self.count == start:
            return self._head.take(rows, axis=0)
        added = rows >= start
        gathered = self._head.take(np.where(added, 0, rows), axis=0)
        gathered[added] = self._array.take(rows[added] - start, axis=0)
        return gathered

    def reserve(self, count: int) -> None:
        """Makes room for ``count`` rows behind the head."""
        if count > len(self._array):
            array = np.empty((count, *self._array.shape[1:]), self._array.dtype)
            own = self.count - len(self._head)
            array[:own] = self._array[:own]
            self._array = array

    def extend(self, rows: Array) -> None:
        """Adds rows."""
        start = self.count - len(self._head)
        stop = start + len(rows)
        if stop > len(self._array):
            self.reserve(max(stop, 2 * len(self._array)))
        self._array[start:stop] = rows
        self.count += len(rows)

    def set(self, row: int, value: Any) -> None:
        """Changes one row behind the head."""
        self._array[row - len(self._head)] = value


class _Columns:
    """The steps of all episodes one after another, and where each transition is among them.

    Args:
        buffer: has the transitions, each an episode and a step in it.
        picker: says what a transition is made of.
    """

    def __init__(self, buffer: Any, picker: Any) -> None:
        self._buffer = buffer
        self._picker = picker
        self._frames, self._n_steps, self._gamma = picker_settings(picker)
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
        # A queue takes its time to find a position in its middle, but none to go through all of them.
        for transition in reversed(held_transitions(self._buffer)):
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
        if self._steps:
            return
        whole = [episode for episode in episodes if type(episode) is Episode]
        if whole and _same_kind(whole) and (shared := _shared(whole)) is not None:
            heads, starts = shared
            self._steps = [_Growing(head.shape[1:], head.dtype, head) for head in heads]
            self._episodes = whole
            self._numbers = {id(episode): number for number, episode in enumerate(whole)}
            self._first.extend(starts)
            self._size.extend(np.array([episode.size() for episode in whole]))
            self._terminated.extend(np.array([episode.terminated for episode in whole]))
        else:
            whole = []
            columns = _columns(episodes[0])
            self._steps = [_Growing(column.shape[1:], _stored(column)) for column in columns]
            # The reward is the last, and is summed in the precision that it came in.
            self._steps[-1] = _Growing(columns[-1].shape[1:], columns[-1].dtype)
        rest = sum(map(len, episodes)) - sum(map(len, whole))
        for steps in self._steps:
            steps.reserve(rest)

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
            observations=one_or_many([self._observed(column, first, step) for column in observations]),
            actions=float32(actions[first + step]),
            rewards=float32(reward_sums(rewards, first + step, next_step - step, self._n_steps, self._gamma)),
            next_observations=one_or_many(
                [
                    zeroed(self._observed(column, first, np.minimum(next_step, size - 1)), terminal)
                    for column in observations
                ]
            ),
            next_actions=zeroed(float32(actions[next_row]), terminal),
            terminals=float32(terminal[:, None]),
            intervals=float32((next_step - step)[:, None]),
            transitions=Picked(self._picker, self._held(number, step), len(index)),
        )

    def _held(self, number: Array, step: Array) -> Held:
        # Those of now: a buffer may drop episodes later.
        episodes = self._episodes
        return lambda position: (episodes[number[position]], int(step[position]))

    def _observed(self, column: _Growing, first: Array, step: Array) -> Array:
        if self._frames is None:
            return float32(column[first + step])
        frames = [
            zeroed(float32(column[first + np.maximum(step - back, 0)]), step < back)
            for back in range(self._frames - 1, -1, -1)
        ]
        # Channels of all frames behind one another.
        return np.concatenate(frames, axis=1)


def reward_sums(rewards: "Array | _Growing", row: Array, steps: Array, n_steps: int, gamma: float | None) -> Array:
    """The discounted sum of the rewards of each transition.

    Args:
        rewards: of all steps.
        row: ``[B]`` of its first step.
        steps: ``[B]`` how many there are, at most ``n_steps``.
        n_steps: how many are wanted.
        gamma: discount of a step; None for single ones.
    """
    if gamma is None:
        return rewards[row]
    total = np.zeros((len(row), *rewards[row[:1]].shape[1:]))
    for ahead in range(n_steps):
        valid = ahead < steps
        total += gamma**ahead * zeroed(rewards[np.where(valid, row + ahead, row)].astype(np.float64), ~valid)
    return total


class Picked(Sequence[Transition]):
    """The transitions of a mini-batch, made by d3rlpy's picker when somebody looks at them.

    Args:
        picker: d3rlpy's.
        held: the episode of each, and the step in it.
        count: how many there are.
    """

    def __init__(self, picker: Any, held: Held, count: int) -> None:
        self._picker, self._held, self._count = picker, held, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Transition: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Transition]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self._picker(*self._held(range(len(self))[index]))


def _columns(episode: Any) -> list[Array]:
    """The observations, the actions and the rewards of an episode."""
    observations = episode.observations
    parts = observations if isinstance(observations, list | tuple) else [observations]
    return [*parts, episode.actions, episode.rewards]


def _same_kind(episodes: Sequence[Any]) -> bool:
    """Whether one array of a kind can hold them all."""
    kinds = {tuple((column.dtype, column.shape[1:]) for column in _columns(episode)) for episode in episodes}
    return len(kinds) == 1


class _Apart:
    """Rows of arrays that lie apart, as if they were one array's.

    Args:
        parts: the arrays.
        starts: the row at which each begins.
    """

    def __init__(self, parts: Sequence[Array], starts: Array) -> None:
        self._parts = parts
        self._starts = starts
        self.shape = (int(starts[-1]) + len(parts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self.shape[0])

    def take(self, rows: Array, axis: int) -> Array:
        """As of an array, along its first axis."""
        part = np.searchsorted(self._starts, rows, side="right") - 1
        taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for row, (number, step) in enumerate(zip(part.tolist(), (rows - self._starts[part]).tolist(), strict=True)):
            taken[row] = self._parts[number][step]
        return taken


def _shared(episodes: Sequence[Episode]) -> tuple[list[Array | _Apart], Array] | None:
    """The steps of all episodes where they are, and the row at which each begins; None if they had better be copied."""
    found = _slices(episodes)
    if found is not None:
        return [*found[0]], found[1]
    if sum(array.nbytes for episode in episodes for array in _columns(episode)) <= LARGEST_COPY:
        return None
    starts = np.cumsum([0, *map(len, episodes)])[:-1]
    return [_Apart(parts, starts) for parts in zip(*map(_columns, episodes), strict=True)], starts


def _slices(episodes: Sequence[Episode]) -> tuple[list[Array], Array] | None:
    """The arrays of which those of all episodes are slices; None unless there are some."""
    heads: list[Array] = []
    rows: list[Array] = []
    for column in zip(*map(_columns, episodes), strict=True):
        first = column[0]
        shared = len(column) == 1 or (first.base is not None and all(array.base is first.base for array in column))
        if not shared or not all(array.flags.c_contiguous for array in column):
            return None
        strides = [first.itemsize * math.prod(first.shape[axis + 1 :]) for axis in range(first.ndim)]
        addresses = np.array([array.__array_interface__["data"][0] for array in column])
        lowest = column[int(addresses.argmin())]
        starts, odd = np.divmod(addresses - addresses.min(), strides[0] or 1)
        if odd.any():
            return None
        stop = int((starts + list(map(len, column))).max())
        heads.append(
            np.lib.stride_tricks.as_strided(lowest, (stop, *first.shape[1:]), strides, subok=False, writeable=False)
        )
        rows.append(starts)
    same = all(np.array_equal(starts, rows[0]) for starts in rows)
    return (heads, rows[0]) if same else None


def _stored(column: Array) -> Any:
    # Mini-batches are float32, so that nothing is gained by more; images stay small.
    return column.dtype if column.dtype == np.uint8 else np.dtype(np.float32)


def float32(values: Array) -> Array:
    """As mini-batches have them."""
    return values.astype(np.float32, copy=False)


def zeroed(values: Array, where: Array) -> Array:
    """``values`` of its own, with rows set to zero in place."""
    values[where] = 0.0
    return values


def one_or_many(observations: list[Array]) -> Any:
    """Observations as d3rlpy has them: those of a tuple are a list."""
    return observations[0] if len(observations) == 1 else observations
