"""Any dataset that we load, as d3rlpy's replay buffer."""

from typing import Any

import numpy as np
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import Episode, InfiniteBuffer, ReplayBufferBase, TransitionPickerProtocol
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from iql_d3rlpy._compat import writer_preprocessor
from iql_d3rlpy.buffer import Array, FastReplayBuffer
from iql_d3rlpy.mapped import MappedReplayBuffer, is_mapped
from iql_plugins.data import read_dataset, summary
from iql_plugins.data.dataset import require_single_steps
from iql_plugins.keys import AcceptedKeys, next_key
from iql_plugins.spaces import Discrete

__all__ = ["to_replay_buffer"]

_KEYS = AcceptedKeys()


def to_replay_buffer(
    source: object,
    *,
    action_size: int | None = None,
    transition_picker: TransitionPickerProtocol | None = None,
    **options: Any,
) -> FastReplayBuffer:
    """A dataset as a d3rlpy ``ReplayBuffer``: every transition of it, in its order.

    d3rlpy keeps no next observations: a transition's is the observation of its episode's next step. The last one of an
    episode that was cut has none there, and d3rlpy's ``MDPDataset`` drops it. Here, such an episode gets one step
    more, with the observation it was cut at, so that nothing is lost. That step is never sampled; its action, which
    mini-batches show as ``next_actions``, repeats the last one, and its reward is 0. An episode is also cut wherever
    the next observation is not the following row's.

    Args:
        source: whatever :func:`iql_plugins.data.load_dataset` loads: a path, a name, a buffer, a TensorDict.
        action_size: number of discrete actions; None takes that of a d3rlpy dataset or of the environment, where the
            source tells, else the largest one plus 1, which is stored with what ``convert-dataset`` wrote.
        transition_picker: what a mini-batch is made of: n steps, stacked frames; None takes that of a d3rlpy dataset,
            else single steps. A d3rlpy dataset's trajectory slicer and writer preprocessor are kept, too.
        **options: of :func:`iql_plugins.data.load_dataset`.

    Returns:
        Observations of a Dict are tuples, sorted by name. A memory-mapped dataset stays on disk.

    Raises:
        DatasetError: for what cannot be loaded, and n-step transitions, which d3rlpy makes itself when it samples.
        UnsupportedBufferError: for a transition picker that is not one of d3rlpy's.
    """
    read = read_dataset(source, **options)
    dataset = read.tensors
    require_single_steps(dataset, "of which d3rlpy makes more with transition_picker=MultiStepTransitionPicker(...)")
    parts: dict[str, Any] = {}
    if isinstance(source, ReplayBufferBase):
        parts = {"transition_picker": source.transition_picker, "trajectory_slicer": source.trajectory_slicer}
        if (preprocessor := writer_preprocessor(source)) is not None:
            parts["writer_preprocessor"] = preprocessor
        action_size = action_size or source.dataset_info.action_size
    if transition_picker is not None:
        parts["transition_picker"] = transition_picker
    discrete = not dataset.get(_KEYS.action).is_floating_point()
    if action_size is None and discrete and read.spaces is not None and isinstance(read.spaces.action, Discrete):
        action_size = read.spaces.action.start + read.spaces.action.n
    if not discrete:
        action_size = dataset.get(_KEYS.action).shape[1]
    elif action_size is None:
        _, largest = summary.statistics(dataset, _KEYS.action, ("low", "high"))
        action_size = int(largest) + 1
    if is_mapped(dataset):
        return MappedReplayBuffer(dataset, _observation_keys(dataset), action_size, **parts)
    observations = [(_array(dataset, key), _array(dataset, next_key(key))) for key in _observation_keys(dataset)]
    actions, rewards = _array(dataset, _KEYS.action), _array(dataset, next_key(_KEYS.reward))
    last = _last_rows(_flags(dataset, "done"), observations)
    terminated = _flags(dataset, "terminated")[last]
    cut = last[~terminated]
    columns = [
        *(_with_steps(before, cut, after[cut]) for before, after in observations),
        _with_steps(actions, cut, actions[cut]),
        _with_steps(rewards, cut, np.zeros_like(rewards[cut])),
    ]
    stops = last + 1 + np.cumsum(~terminated)
    episodes = [
        _episode([column[start:stop] for column in columns], bool(end))
        for start, stop, end in zip(np.roll(np.append(stops, 0), 1), stops, terminated, strict=False)
    ]
    return FastReplayBuffer(
        InfiniteBuffer(),
        episodes=episodes,
        observation_signature=episodes[0].observation_signature,
        action_signature=episodes[0].action_signature,
        reward_signature=episodes[0].reward_signature,
        action_space=ActionSpace.DISCRETE if discrete else ActionSpace.CONTINUOUS,
        action_size=action_size,
        **parts,
    )


def _observation_keys(dataset: TensorDictBase) -> list[NestedKey]:
    observation = dataset.get("observation")
    if not isinstance(observation, TensorDictBase):
        return ["observation"]
    return [("observation", str(name)) for name in sorted(map(str, observation.keys()))]


def _array(dataset: TensorDictBase, key: NestedKey) -> Array:
    array: Array = dataset.get(key).cpu().numpy()
    return array


def _flags(dataset: TensorDictBase, name: str) -> Array:
    return _array(dataset, next_key(name)).reshape(-1)


def _last_rows(done: Array, observations: list[tuple[Array, Array]]) -> Array:
    """The last row of each episode, those included that the data only breaks off."""
    last = done.copy()
    last[-1] = True
    for before, after in observations:
        axes = tuple(range(1, before.ndim))
        last[:-1] |= (after[:-1] != before[1:]).any(axes)
    rows: Array = np.flatnonzero(last)
    return rows


def _with_steps(column: Array, cut: Array, values: Array) -> Array:
    """A column with one more step behind each of the rows ``cut``."""
    return np.insert(column, cut + 1, values, axis=0)


def _episode(columns: list[Array], terminated: bool) -> Episode:
    *observations, actions, rewards = columns
    return Episode(observations[0] if len(observations) == 1 else observations, actions, rewards, terminated)
