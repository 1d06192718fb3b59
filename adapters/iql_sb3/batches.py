"""What Stable-Baselines3's replay buffers sample, in the key layout; recognised without importing the framework."""

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.keys import DISCOUNT, AcceptedKeys, next_key

__all__ = ["entries", "map_batch"]

_KEYS = AcceptedKeys()
_NAMES = ("ReplayBufferSamples", "DictReplayBufferSamples")


def map_batch(batch: object) -> TensorDictBase | None:
    """The samples of a replay buffer by the key layout, sharing their memory; None for anything else.

    Continuous actions are in [-1, 1], as Stable-Baselines3 stores them. Its buffers take time-outs out of their
    dones, so that ``("next", "done")`` says no more than ``("next", "terminated")``.

    Args:
        batch: what ``ReplayBuffer.sample`` returned, of any of its subclasses.
    """
    kind = type(batch)
    if kind.__name__ not in _NAMES or kind.__module__.split(".")[0] != "stable_baselines3":
        return None
    tensors = entries(batch)
    return TensorDict(dict(tensors), batch_size=tensors[_KEYS.action].shape[:1])


def entries(samples: Any) -> dict[NestedKey, Tensor]:
    """The tensors of a replay buffer's samples by the key layout's keys."""
    terminated = samples.dones.bool()
    result: dict[NestedKey, Tensor] = {}
    for prefix, observations in (((), samples.observations), (("next",), samples.next_observations)):
        if isinstance(observations, Mapping):
            result |= {(*prefix, "observation", name): tensor for name, tensor in observations.items()}
        else:
            result[(*prefix, "observation") if prefix else "observation"] = observations
    result[_KEYS.action] = samples.actions
    result[next_key(_KEYS.reward)] = samples.rewards
    result[next_key(_KEYS.done)] = terminated
    result[next_key(_KEYS.terminated)] = terminated
    # Of an n-step buffer: the discount of the whole transition, gamma to the power of its steps.
    if getattr(samples, "discounts", None) is not None:
        result[DISCOUNT] = samples.discounts
    return result
