"""Stable-Baselines3's replay buffers as datasets. Imports no Stable-Baselines3, so that any source can be looked at."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from iql_plugins.data.columns import require_read
from iql_plugins.data.dataset import Dataset, DatasetError, Options, is_of, reading, require_space
from iql_plugins.data.readers import tensordicts
from iql_plugins.spaces import Box, Spaces

__all__ = ["check_buffer", "read_dataset", "ring_transitions"]

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
    if not is_of(source, "stable_baselines3", "ReplayBuffer"):
        return None
    buffer: Any = source
    name = options.name or f"the Stable-Baselines3 {type(buffer).__name__}"
    with reading(name):
        try:
            spaces = Spaces.from_gymnasium(buffer.observation_space, buffer.action_space)
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{name}: {error}") from error
        if options.memmap_dir is None or buffer.n_envs > 1 or buffer.full:
            # Steps of several environments, or of a ring that is full, are not in order: a copy of them is.
            share = 1.0 if buffer.full else buffer.pos / buffer.buffer_size
            size = int(share * sum(array.nbytes for array in _arrays(buffer)))
            require_space(size, name, replace(options, memmap_dir=None))
        # The buffer's memory changes when it goes on.
        dataset = ring_transitions(buffer, name, copy=options.memmap_dir is None)
        dataset.set("action", _unscaled(dataset.get("action"), spaces, name))
        if options.discrete is None:
            options = replace(options, discrete=spaces.discrete)
        loaded = tensordicts.load(dataset, options, name)
        return replace(loaded, spaces=spaces, timeouts_recorded=bool(buffer.handle_timeout_termination))


def ring_transitions(buffer: Any, name: str, *, copy: bool = False) -> TensorDict:
    """The transitions in a replay buffer of one step by the key layout, continuous actions in [-1, 1].

    They are in the order of time, one environment's after another's; without ``copy``, those of one environment in a
    buffer that is not full share its memory. Goals that hindsight replay makes when it samples are no part of it.

    Args:
        buffer: of Stable-Baselines3.
        name: of the buffer, for messages.
        copy: whether to share no memory with the buffer.

    Raises:
        DatasetError: if the buffer is empty, or :func:`check_buffer` objects.
    """
    check_buffer(buffer, name)
    size, shared = buffer.buffer_size, buffer.optimize_memory_usage
    # The slot at pos holds the newest observation where observations are shared, and so no transition.
    start, length = ((buffer.pos + shared) % size, size - shared) if buffer.full else (0, buffer.pos)
    if length == 0:
        raise DatasetError(f"{name} is empty: it has no transition")

    def column(array: Any, offset: int = 0) -> Tensor:
        first = start + offset
        steps: Any = slice(first, first + length)
        if first + length > size:
            steps = np.arange(first, first + length) % size
        ordered = array[steps].swapaxes(0, 1).reshape(length * buffer.n_envs, *array.shape[2:])
        return torch.from_numpy(ordered.copy() if copy and np.may_share_memory(ordered, array) else ordered)

    def observations(offset: int) -> Any:
        arrays: Any = buffer.observations
        if offset and not shared:
            arrays, offset = buffer.next_observations, 0
        if isinstance(arrays, dict):
            return {key: column(array, offset) for key, array in arrays.items()}
        return column(arrays, offset)

    ended, timeout = (column(array).bool().unsqueeze(-1) for array in (buffer.dones, buffer.timeouts))
    done = ended.clone()
    # Where the next environment's transitions begin an episode may be under way.
    done[length - 1 : -1 : length] = True
    return TensorDict(
        {
            "observation": observations(0),
            "action": column(buffer.actions),
            "next": {
                "observation": observations(1),
                "reward": column(buffer.rewards).unsqueeze(-1),
                "done": done,
                "terminated": ended & ~timeout,
            },
        },
        batch_size=[length * buffer.n_envs],
    )


def _arrays(buffer: Any) -> list[Any]:
    """What a buffer has of each step."""
    columns = [column for key, column in vars(buffer).items() if key in _READ]
    return [array for each in columns for array in (each.values() if isinstance(each, dict) else [each])]


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


def _unscaled(actions: Tensor, spaces: Spaces, name: str) -> Tensor:
    """Actions in the environment's units."""
    space = spaces.action
    if not isinstance(space, Box) or space.low is None or space.high is None:
        return actions
    low, high = torch.tensor(space.low), torch.tensor(space.high)
    if bool((low == -1).all() and (high == 1).all()):
        return actions
    beyond = (actions.abs() > 1 + _UNIT_TOLERANCE).any(1).nonzero()
    if len(beyond):
        raise DatasetError(
            f"{name}: its actions must be scaled to [-1, 1], as Stable-Baselines3 stores them, row {int(beyond[0, 0])} "
            "is not; add them with policy.scale_action(action)"
        )
    return low + (actions + 1) * 0.5 * (high - low)
