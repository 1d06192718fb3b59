"""Replay buffers of Stable-Baselines3 and TorchRL, recognised without importing either."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from iql_plugins.data import tensordicts
from iql_plugins.data.arrays import Array, Column, Concatenated, Names, Transitions
from iql_plugins.data.columns import SB3_METADATA, require_read
from iql_plugins.data.dataset import DatasetError, Loaded, Options, reading, require_space, row_bytes
from iql_plugins.spaces import Box, Spaces

__all__ = ["check_stable_baselines3", "load_stable_baselines3", "load_torchrl", "unpickled"]

_READ = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

_UNIT_TOLERANCE = 1e-4


def unpickled(path: Path, options: Options) -> object:
    """The object in a pickle, of which the caller has said that it is to be trusted.

    Raises:
        DatasetError: if it was not said, or the file holds no pickle.
        ImportError: if it needs a package that is not installed.
    """
    if not options.trust_pickle:
        raise DatasetError(
            f"{path} is a pickle, which can run any code when it is loaded: pass trust_pickle=True (--trust-pickle) if "
            "you trust it"
        )
    with reading(str(path)):
        try:
            with path.open("rb") as file:
                return pickle.load(file)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{path} needs {error.name}, for a replay buffer: pip install 'iql-plugins[sb3]'"
            ) from error


def load_stable_baselines3(buffer: Any, options: Options, name: str | None = None) -> Loaded:
    """The dataset in a ``ReplayBuffer`` or ``DictReplayBuffer``, or a subclass (``HerReplayBuffer``).

    Transitions come in the order of time, one environment's after another's. Where the next environment's begin, an
    episode may be under way: it is cut there, done without a terminal state. Continuous actions, which
    Stable-Baselines3 stores scaled to [-1, 1], are scaled back to the environment's bounds. Observations and
    rewards are as stored, before any ``VecNormalize``. Relabelled goals of hindsight replay are made when sampling
    and not part of the dataset.

    A buffer with ``handle_timeout_termination=False`` (always so with ``optimize_memory_usage=True``) has not
    recorded which ends were time-outs: all of them are terminal states, as they are for Stable-Baselines3 itself.

    Raises:
        DatasetError: if it is empty, its spaces are other than Box, Discrete and Dict of these, or
            :func:`check_stable_baselines3` objects.
    """
    name = name or f"the Stable-Baselines3 {type(buffer).__name__}"
    with reading(name):
        check_stable_baselines3(buffer, name)
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
        loaded = transitions.load(options)
        recorded = bool(buffer.handle_timeout_termination)
        return Loaded(loaded.dataset, name, timeouts_recorded=recorded, spaces=spaces)


def check_stable_baselines3(buffer: Any, name: str) -> None:
    """Raises :class:`DatasetError` for an array of steps that nobody reads, and a time-out that ends no episode."""
    steps = (buffer.buffer_size, buffer.n_envs)
    held = {
        key
        for key, value in vars(buffer).items()
        for array in (value.values() if isinstance(value, dict) else [value])
        if isinstance(array, np.ndarray) and array.shape[:2] == steps
    }
    require_read(name, sorted(held), _READ, SB3_METADATA)
    rows, environments = np.nonzero((buffer.timeouts != 0) & (buffer.dones == 0))
    if len(rows):
        raise DatasetError(
            f"{name}: 'timeouts' is 1 and 'dones' 0 in row {rows[0]} of environment {environments[0]}: "
            "they contradict each other"
        )


def load_torchrl(buffer: Any, options: Options) -> Loaded:
    """The dataset in a TorchRL replay buffer's storage, oldest first; see :func:`iql_plugins.data.tensordicts.load`.

    The buffer's transforms, which act when it is sampled, are not applied.

    Raises:
        DatasetError: if it is empty or does not hold TensorDicts, or its writer does not keep the order of time.
    """
    name = f"the TorchRL {type(buffer).__name__}"
    with reading(name):
        if len(buffer) == 0:
            raise DatasetError(f"{name} is empty: it has no transition")
        writer = buffer.writer
        kinds = {base.__name__ for base in type(writer).__mro__}
        if "TensorDictMaxValueWriter" in kinds:
            raise DatasetError(f"{name}: its {type(writer).__name__} keeps the best entries, not the order of time")
        data = buffer.storage[:]
        if isinstance(data, list | tuple):
            if not all(isinstance(item, TensorDictBase) for item in data):
                raise DatasetError(f"{name} must hold TensorDicts, got {type(data[0]).__name__}")
            data = torch.stack(list(data))
        if not isinstance(data, TensorDictBase):
            raise DatasetError(f"{name} must hold a TensorDict, got {type(data).__name__}")
        oldest = int(writer._cursor) if "RoundRobinWriter" in kinds and len(buffer) == buffer.storage.max_size else 0
        if oldest % len(data):
            require_space(sum(len(data) * row_bytes(tensor) for tensor in data.values(True, True)), name, Options())
            data = torch.cat([data[oldest:], data[:oldest]])
        if buffer.dim_extend:
            data = data.transpose(0, buffer.dim_extend)
    return tensordicts.load(data, options, name)


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
