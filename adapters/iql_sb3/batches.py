"""What Stable-Baselines3's replay buffers sample, in the key layout; recognised without importing the framework."""

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.keys import DISCOUNT, AcceptedKeys, next_key

__all__ = ["map_batch"]

_KEYS = AcceptedKeys()
_FIELDS = {"observations", "actions", "next_observations", "dones", "rewards"}


def map_batch(batch: object) -> TensorDictBase | None:
    """The samples of a replay buffer by the key layout, sharing their memory; None for anything else.

    Continuous actions are in [-1, 1], as Stable-Baselines3 stores them. Its buffers take time-outs out of their
    dones, so that ``("next", "done")`` says no more than ``("next", "terminated")``.

    Args:
        batch: what ``ReplayBuffer.sample`` returned, of any of its subclasses: a named tuple that has the fields of
            ``ReplayBufferSamples``, at least.
    """
    if not isinstance(batch, tuple) or not set(getattr(batch, "_fields", ())) >= _FIELDS:
        return None
    samples: Any = batch
    if not isinstance(samples.actions, Tensor) or not isinstance(samples.dones, Tensor):
        return None
    terminated = samples.dones.bool()
    tensors: dict[NestedKey, Tensor] = {}
    for prefix, observations in (((), samples.observations), (("next",), samples.next_observations)):
        if isinstance(observations, Mapping):
            tensors |= {(*prefix, "observation", name): tensor for name, tensor in observations.items()}
        else:
            tensors[(*prefix, "observation") if prefix else "observation"] = observations
    tensors[_KEYS.action] = samples.actions
    tensors[next_key(_KEYS.reward)] = samples.rewards
    tensors[next_key(_KEYS.done)] = terminated
    tensors[next_key(_KEYS.terminated)] = terminated
    # Of an n-step buffer: the discount of the whole transition, gamma to the power of its steps.
    if getattr(samples, "discounts", None) is not None:
        tensors[DISCOUNT] = samples.discounts
    return TensorDict(tensors, batch_size=samples.actions.shape[:1])
