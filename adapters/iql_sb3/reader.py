"""Stable-Baselines3's replay buffers as datasets. Imports no Stable-Baselines3, so that any source can be looked at."""

from dataclasses import replace
from typing import Any

import numpy as np

from iql_plugins.data.arrays import Array, Column, Concatenated, Names, Transitions
from iql_plugins.data.columns import require_read
from iql_plugins.data.dataset import Dataset, DatasetError, Options, reading
from iql_plugins.spaces import Box, Spaces

__all__ = ["check_buffer", "read_dataset"]

_READ = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

#: Hindsight's, and those of prioritised replay.
_METADATA = frozenset({"infos", "ep_start", "ep_length", "priorities"})

_UNIT_TOLERANCE = 1e-4


def read_dataset(source: object, options: Options) -> Dataset | None:
    """The dataset in a ``ReplayBuffer`` or ``DictReplayBuffer``, or a subclass (``HerReplayBuffer``); else None.

    Transitions come in the order of time, one environment's after another's. Where the next environment's begin, an
    episode may be under way: it is cut there, done without a terminal state. Continuous actions, which
    Stable-Baselines3 stores scaled to [-1, 1], are scaled back to the environment's bounds. Observations and
    rewards are as stored, before any ``VecNormalize``. Relabelled goals of hindsight replay are made when sampling
    and not part of the dataset.

    A buffer with ``handle_timeout_termination=False`` (always so with ``optimize_memory_usage=True``) has not
    recorded which ends were time-outs: all of them are terminal states, as they are for Stable-Baselines3 itself.

    Raises:
        DatasetError: if it is empty, its spaces are other than Box, Discrete and Dict of these, or
            :func:`check_buffer` objects.
    """
    kinds = type(source).__mro__
    if all(kind.__module__.split(".")[0] != "stable_baselines3" or kind.__name__ != "ReplayBuffer" for kind in kinds):
        return None
    buffer: Any = source
    name = options.name or f"the Stable-Baselines3 {type(buffer).__name__}"
    with reading(name):
        check_buffer(buffer, name)
        try:
            spaces = Spaces.from_gymnasium(buffer.observation_space, buffer.action_space)
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{name}: {error}") from error
        size, pos, full = int(buffer.buffer_size), int(buffer.pos), bool(buffer.full)
        shared = bool(buffer.optimize_memory_usage)
        # The slot at pos holds the newest observation where observations are shared, and so no transition.
        start, length = ((pos + shared) % size, size - shared) if full else (0, pos)
        if length == 0:
            raise DatasetError(f"{name} is empty: it has no transition")

        def column(array: Array, key: str, offset: int = 0) -> Column:
            return Concatenated(
                [
                    part
                    for stream in range(buffer.n_envs)
                    for part in _ring(array[:, stream], (start + offset) % size, length)
                ],
                name,
                key,
            )

        def observations(arrays: Any, offset: int = 0) -> dict[Names, Column]:
            if isinstance(arrays, dict):
                return {(key,): column(array, key, offset) for key, array in arrays.items()}
            return {(): column(arrays, "observations", offset)}

        ends = _all(column(buffer.dones, "dones")) != 0
        timeouts = _all(column(buffer.timeouts, "timeouts")) != 0
        terminals = ends & ~timeouts
        streams_end = np.zeros_like(ends)
        streams_end[length - 1 : -1 : length] = True
        transitions = Transitions(
            name,
            observations(buffer.observations),
            _unscaled(column(buffer.actions, "actions"), spaces, name),
            column(buffer.rewards, "rewards"),
            {"terminals": terminals, "timeouts": ((ends & timeouts) | streams_end) & ~terminals},
            observations(buffer.observations, 1) if shared else observations(buffer.next_observations),
            spaces,
        )
        return replace(transitions.load(options), timeouts_recorded=bool(buffer.handle_timeout_termination))


def check_buffer(buffer: Any, name: str) -> None:
    """Raises :class:`DatasetError` for an array of steps that nobody reads, and a time-out that ends no episode."""
    steps = (buffer.buffer_size, buffer.n_envs)
    held = {
        key
        for key, value in vars(buffer).items()
        for array in (value.values() if isinstance(value, dict) else [value])
        if isinstance(array, np.ndarray) and array.shape[:2] == steps
    }
    require_read(name, sorted(held), _READ, _METADATA)
    rows, environments = np.nonzero((buffer.timeouts != 0) & (buffer.dones == 0))
    if len(rows):
        raise DatasetError(
            f"{name}: 'timeouts' is 1 and 'dones' 0 in row {rows[0]} of environment {environments[0]}: "
            "they contradict each other"
        )


def _ring(array: Array, start: int, length: int) -> list[Array]:
    """The ``length`` rows from ``start`` on, past the end and on from the beginning."""
    first = array[start : start + length]
    return [first, array[: length - len(first)]] if len(first) < length else [first]


def _all(column: Column) -> Array:
    return column[0 : column.shape[0]]


class _Unscaled:
    """Actions in [-1, 1] as a column of actions between bounds."""

    def __init__(self, actions: Column, low: Array, high: Array) -> None:
        self._actions, self._low, self._high = actions, low, high
        self.shape, self.dtype = actions.shape, actions.dtype

    def __getitem__(self, rows: slice, /) -> Array:
        unscaled: Array = self._low + (self._actions[rows] + 1) * 0.5 * (self._high - self._low)
        return unscaled


def _unscaled(actions: Column, spaces: Spaces, name: str) -> Column:
    space = spaces.action
    if not isinstance(space, Box) or space.low is None or space.high is None:
        return actions
    low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
    if (low == -1).all() and (high == 1).all():
        return actions
    beyond = np.flatnonzero((abs(_all(actions)) > 1 + _UNIT_TOLERANCE).any(1))
    if len(beyond):
        raise DatasetError(
            f"{name}: its actions must be scaled to [-1, 1], as Stable-Baselines3 stores them, row {beyond[0]} is not; "
            "add them with policy.scale_action(action)"
        )
    return _Unscaled(actions, low, high)
