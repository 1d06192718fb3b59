"""The key layout: one documented table of names.

========================== ============================= =====================================
key                        shape, dtype                  meaning
========================== ============================= =====================================
``observation``            ``[*B, *obs]``                s
``action``                 ``[*B, act]`` float;          a
                           discrete: ``[*B]``,
                           ``[*B, 1]`` or one-hot
                           ``[*B, n]``
``("next", "reward")``     ``[*B, 1]`` float             r
``("next", "done")``       ``[*B, 1]`` bool              the episode ended, for any reason
``("next", "terminated")`` ``[*B, 1]`` bool              it ended in a terminal state
``("next", "observation")````[*B, *obs]``                s'
``steps_to_next_obs``      ``[*B, 1]`` integer, optional n of an n-step transition
``("next", "discount")``   ``[*B, 1]`` float, optional   γⁿ itself; wins over the line above
``priority_weight``        ``[*B]`` float, optional      importance weight of the sample
``("collector", "mask")``, ``[*B, 1]`` bool, optional    False where the entry is padding
``shifted_valid``
========================== ============================= =====================================

``*B`` is any batch shape; ``[*B]`` is accepted wherever ``[*B, 1]`` stands, and never broadcast. As
keyword arguments the keys are flattened with an underscore: ``next_reward``.
"""

from dataclasses import dataclass, fields

from tensordict.utils import NestedKey, unravel_key

__all__ = ["AcceptedKeys", "flat_name", "next_key"]

STEPS_TO_NEXT_OBS = "steps_to_next_obs"
DISCOUNT: NestedKey = ("next", "discount")
# The masks that TorchRL's samplers and value estimators write; all that are found count together.
AUTO_MASK_KEYS: tuple[NestedKey, ...] = (("collector", "mask"), "shifted_valid")


@dataclass
class AcceptedKeys:
    """The names that ``set_keys`` can change, with their defaults.

    Attributes:
        value: where the value network writes V(s).
        action: the dataset's action.
        log_prob: where the log-probability of the dataset's action is written into the input.
        priority: where the priority is written into the input.
        priority_weight: importance weights of a prioritised replay buffer.
        state_action_value: where the critics write Q(s, a).
        reward: the reward, under ``"next"``.
        done: whether the episode ended, under ``"next"``.
        terminated: whether it ended in a terminal state, under ``"next"``.
    """

    value: NestedKey = "state_value"
    action: NestedKey = "action"
    log_prob: NestedKey = "_log_prob"
    priority: NestedKey = "td_error"
    priority_weight: NestedKey = "priority_weight"
    state_action_value: NestedKey = "state_action_value"
    reward: NestedKey = "reward"
    done: NestedKey = "done"
    terminated: NestedKey = "terminated"

    def replaced(self, **names: NestedKey | None) -> "AcceptedKeys":
        """A copy with some names changed; None restores a default.

        Raises:
            ValueError: for a name that is not one of the attributes, or a key that is not nested strings.
        """
        defaults = {field.name: field.default for field in fields(AcceptedKeys)}
        keys = dict(vars(self))
        for name, key in names.items():
            if name not in defaults:
                raise ValueError(f"{name!r} is not an accepted key; the accepted keys are {', '.join(defaults)}")
            if key is None:
                keys[name] = defaults[name]
            elif is_key(key):
                keys[name] = unravel_key(key)
            else:
                raise ValueError(f"{name} must be a string or a tuple of strings, got {key!r}")
        return AcceptedKeys(**keys)


def is_key(key: object) -> bool:
    """Whether ``key`` is a string, or a non-empty tuple of keys."""
    return isinstance(key, str) or (isinstance(key, tuple) and bool(key) and all(is_key(part) for part in key))


def next_key(key: NestedKey) -> NestedKey:
    """The key under ``"next"``: ``("a", "b")`` gives ``("next", "a", "b")``."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def flat_name(key: NestedKey) -> str:
    """The keyword name of a key: ``("next", "reward")`` gives ``"next_reward"``."""
    return key if isinstance(key, str) else "_".join(key)


def shown(key: NestedKey) -> str:
    """A key as an error message shows it."""
    return repr(key)
