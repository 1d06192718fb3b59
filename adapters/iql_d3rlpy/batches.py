"""d3rlpy's mini-batches in the key layout. Imports no d3rlpy, so that any object can be looked at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.keys import STEPS_TO_NEXT_OBS, AcceptedKeys, next_key

__all__ = ["map_batch", "observation_keys"]

_KEYS = AcceptedKeys()


def observation_keys(observation: Any) -> list[NestedKey]:
    """The keys of d3rlpy's observations: one, or ``("observation", "0")``, ``("observation", "1")``, ... of a tuple.

    Args:
        observation: an array, a tensor, a shape; or a list or tuple of these.
    """
    if isinstance(observation, list | tuple) and not isinstance(observation[0], int):
        return [("observation", str(index)) for index in range(len(observation))]
    return ["observation"]


def map_batch(batch: object) -> TensorDict | None:
    """A ``TransitionMiniBatch`` or ``TorchMiniBatch`` by the key layout; None for anything else.

    Memory is shared where dtypes allow. Actions are integers if the dataset's are; a ``TorchMiniBatch`` knows that from
    the mini-batch it was made from. d3rlpy does not say where an episode was cut: ``("next", "done")`` is
    ``("next", "terminated")``.

    Args:
        batch: of ``B`` transitions.

    Returns:
        Batch size ``[B]``.
    """
    kinds = {base.__name__ for base in type(batch).__mro__ if base.__module__.split(".")[0] == "d3rlpy"}
    if not kinds & {"TransitionMiniBatch", "TorchMiniBatch"}:
        return None
    mini_batch: Any = batch
    origin = mini_batch.numpy_batch if "TorchMiniBatch" in kinds else mini_batch
    discrete = origin is not None and np.issubdtype(origin.transitions[0].action.dtype, np.integer)
    observations = observation_keys(mini_batch.observations)
    terminated, action = torch.as_tensor(mini_batch.terminals).bool(), torch.as_tensor(mini_batch.actions)
    tensors: dict[NestedKey, Tensor] = {
        **_named(observations, mini_batch.observations),
        _KEYS.action: action.long() if discrete else action,
        next_key(_KEYS.reward): torch.as_tensor(mini_batch.rewards),
        next_key(_KEYS.done): terminated,
        next_key(_KEYS.terminated): terminated,
        **_named([next_key(key) for key in observations], mini_batch.next_observations),
        STEPS_TO_NEXT_OBS: torch.as_tensor(mini_batch.intervals).long(),
    }
    return TensorDict(tensors, batch_size=[len(mini_batch.rewards)])


def _named(keys: Sequence[NestedKey], observations: Any) -> dict[NestedKey, Tensor]:
    values = observations if isinstance(observations, list | tuple) else [observations]
    return {key: torch.as_tensor(value) for key, value in zip(keys, values, strict=True)}
