"""The names of columns, declared once: what is read, as what, and what is known to be no data.

>>> for column, synonyms in SYNONYMS.items():
...     print(" = ".join((column, *synonyms)))
observations = observation = obs
next_observations = next_observation = next_obs = obs_next = next.observation
actions = action = act
rewards = reward = rew = next.reward
terminals = terminal = terminations = terminated = next.terminated
timeouts = timeout = truncations = truncated = next.truncated
dones = done = dones_float = episode_terminals = next.done
masks
valids

The first names are D4RL's, which also are OGBench's, d3rlpy's and, but for the ends, Minari's; the others are
gymnasium's, tianshou's, d3rlpy 1's, those of the authors' code, and the keys of the layout. What the ends of episodes
mean together is said in :class:`~iql_plugins.data.arrays.Transitions`.

Whatever else a source has is one of the names of metadata below, or an error.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from tensordict.utils import NestedKey

from iql_plugins.data.dataset import DatasetError, UnknownSourceError, one_line
from iql_plugins.keys import shown

__all__ = [
    "METADATA",
    "OGBENCH_METADATA",
    "SYNONYMS",
    "TORCHRL_METADATA",
    "component",
    "readable",
    "require_any",
    "require_read",
    "unread",
]

#: The columns of transitions, and what else files call them.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "observations": ("observation", "obs"),
    "next_observations": ("next_observation", "next_obs", "obs_next", "next.observation"),
    "actions": ("action", "act"),
    "rewards": ("reward", "rew", "next.reward"),
    "terminals": ("terminal", "terminations", "terminated", "next.terminated"),
    "timeouts": ("timeout", "truncations", "truncated", "next.truncated"),
    "dones": ("done", "dones_float", "episode_terminals", "next.done"),
    "masks": (),
    "valids": (),
}
_COLUMNS = {name: column for column, synonyms in SYNONYMS.items() for name in (column, *synonyms)}
_GROUPS = ("observations", "next_observations")

#: What OGBench's files alone have beside transitions: the simulator's state, and representations of goals.
OGBENCH_METADATA = frozenset({"qpos", "qvel", "button_states", "oracle_reps"})

#: Files of transitions; whole groups, too.
METADATA = OGBENCH_METADATA | frozenset({
    # D4RL, Minari; tianshou
    "infos", "metadata", "info", "policy",
    # d3rlpy 1
    "discrete_action", "version",
    # pandas
    "__index_level_0__",
})  # fmt: skip

#: TensorDicts: entries at the root or under "next" that TorchRL writes beside a transition, with all below them.
TORCHRL_METADATA = frozenset({
    # what the step before left at the root, and the environment's own switches
    "done", "terminated", "truncated", "reward", "_reset", "_step",
    # collectors and exploration
    "collector", "policy_version", "_ou_prev_noise", "_ou_steps",
    # transforms
    "is_init", "step_count", "traj_count", "episode_reward", "reward_to_go", "return_to_go", "target_return",
    "original_reward", "gamma", "nonterminal", "time_step", "time_policy", "time_reset", "action_mask", "lives",
    "end-of-life", "success",
    # policies, losses and value estimators
    "loc", "scale", "logits", "probs", "log_prob", "_log_prob", "sample_log_prob", "action_log_prob", "action_value",
    "chosen_action_value", "state_value", "state_action_value", "advantage", "value_target", "td_error",
    "recurrent_state", "recurrent_state_h", "recurrent_state_c",
    # replay buffers
    "index", "_weight", "priority_weight",
    # its datasets of others
    "info", "infos", "metadata", "episode", "seed", "frame", "language_instruction",
})  # fmt: skip


def component(key: str) -> tuple[str, int] | None:
    """The column of which a scalar one is a component, and the component's number; None if it is none.

    >>> component("observations/2"), component("next_obs_10"), component("rewards"), component("version_2")
    (('observations', 2), ('next_obs', 10), None, None)
    """
    match = re.fullmatch(r"(.+)([/_])(0|[1-9]\d{0,5})", key)
    # Of a Dict observation's entries, "state_0" is a name like any other.
    if match is None or (match[1] if match[2] == "_" else match[1].split("/")[0]) not in _COLUMNS:
        return None
    return match[1], int(match[3])


def require_any(name: str, given: Iterable[str]) -> None:
    """Raises :class:`UnknownSourceError` for a source of which no column is read: another reader may know it."""
    given = list(given)
    if not any(key.split("/")[0] in _COLUMNS for key in given):
        try:
            readable(name, given)
        except DatasetError as error:
            raise UnknownSourceError(str(error)) from error


def readable(name: str, given: Iterable[str]) -> dict[str, str]:
    """Which of a source's columns are read, and by which of our names: ``{"obs/left": "observations/left"}``.

    Args:
        name: of the source, for messages.
        given: the source's names. Dict observations are groups: ``observations/NAME``.

    Raises:
        DatasetError: for a name that is neither read nor metadata, and for two that are one column.
    """
    read: dict[str, str] = {}
    called: dict[str, str] = {}
    for key in given:
        first, *path = key.split("/")
        column = _COLUMNS.get(first)
        if column is not None and (not path or column in _GROUPS):
            other = called.setdefault(column, first)
            if other != first or key in read:
                both = f"{other!r} and {first!r}, which are one column" if other != first else f"{key!r} twice"
                raise DatasetError(f"{name} has {both}: drop one of them")
            read[key] = "/".join((column, *path))
        elif first not in METADATA:
            raise unread(name, key, SYNONYMS, _COLUMNS)
    return read


def require_read(name: str, given: Iterable[str], read: Collection[str], metadata: Collection[str] = ()) -> None:
    """Raises :class:`DatasetError` for the first of ``given`` that is neither ``read`` nor ``metadata``."""
    for key in given:
        if key not in read and key not in metadata:
            raise unread(name, key, read)


def unread(
    name: str, key: NestedKey, read: Iterable[NestedKey], likely: Iterable[NestedKey] | None = None
) -> DatasetError:
    """The error for a column that nobody reads, with the name that was probably meant.

    Args:
        name: of the source.
        key: of the column.
        read: those that are read.
        likely: where to look for one of nearly the same last name; None for ``read``.
    """
    read = list(read)
    names = {_last(other): other for other in (read if likely is None else likely)}
    close = get_close_matches(_last(key).lower(), names, n=1)
    hint = f"did you mean {shown(names[close[0]])}?" if close else f"those that are: {', '.join(map(shown, read))};"
    return DatasetError(f"{name}: {one_line(shown(key))} is not a column that is read; {hint} rename it or drop it")


def _last(key: NestedKey) -> str:
    return key if isinstance(key, str) else str(key[-1])
