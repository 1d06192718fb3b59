"""What is in a dataset, and what is wrong with it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data import read, unknown_source
from iql_plugins.data.dataset import (
    DONE,
    REWARD,
    TERMINATED,
    DatasetError,
    Loaded,
    Options,
    chunks,
    leaves,
    non_finite,
    row_bytes,
)
from iql_plugins.data.episodes import episode_ends, episode_lengths, episode_returns
from iql_plugins.data.intake import past_bounds
from iql_plugins.data.normalizers import RETURN_RANGE
from iql_plugins.keys import next_key, shown
from iql_plugins.spaces import Box

__all__ = ["Finding", "Report", "Statistics", "examine"]

Bound = float | Sequence[float] | Tensor

#: Factor between the range of returns and that of the presets from which on the scale is worth a finding.
_FAR = 10.0
_NEXT_OBSERVATION: NestedKey = ("next", "observation")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a look.

    Attributes:
        code: what it is, in a word or two.
        message: what was found.
        suggestion: what to do.
        row: the first transition that it is about; None where it is about none in particular.
        count: how many transitions, episodes or features it is about; the message says which.
    """

    code: str
    message: str
    suggestion: str
    row: int | None = None
    count: int = 0


@dataclass(frozen=True)
class Statistics:
    """Mean and extremes over episodes."""

    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Tensor) -> "Statistics":
        """Those of ``values``, ``[E]`` with E >= 1."""
        return cls(float(values.double().mean()), float(values.min()), float(values.max()))


@dataclass(frozen=True)
class Report:
    """What :func:`examine` found.

    Attributes:
        name: of the source.
        transitions: number of transitions.
        episodes: number of episodes; the last counts even if it is under way.
        returns: undiscounted returns of the episodes.
        lengths: transitions of the episodes.
        shapes: shape of one transition's entry, by key.
        dtypes: likewise.
        findings: in the order of the checks.
    """

    name: str
    transitions: int
    episodes: int
    returns: Statistics
    lengths: Statistics
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values; None in place of numbers that are not finite."""
        document: dict[str, Any] = _json(asdict(self))
        return document


@dataclass(frozen=True)
class _Patient:
    """The dataset, and what several checks need of it."""

    loaded: Loaded
    dataset: TensorDictBase
    ends: Tensor
    lengths: Tensor
    returns: Tensor
    terminated: Tensor
    cut: Tensor
    low: Tensor | None
    high: Tensor | None
    assumed: bool


def examine(
    source: object,
    *,
    action_low: Bound | None = None,
    action_high: Bound | None = None,
    trust_pickle: bool = False,
    discrete: bool | None = None,
) -> Report:
    """Counts, returns and shapes of a dataset, and findings with a suggestion each.

    >>> report = examine("pendulum-v1-sac")
    >>> report.episodes, round(report.returns.mean, 1), [finding.code for finding in report.findings]
    (100, -325.8, ['no-terminals'])

    ============================== ==================================================================
    code                           found
    ============================== ==================================================================
    ``non-finite``                 NaN or infinity
    ``timeouts-as-terminals``      time-outs that are marked as terminal states
    ``no-terminals``               no terminal state at all
    ``terminal-and-timeout``       steps marked as both
    ``early-timeouts``             episodes cut before others were, collector's cuts or goal switches
    ``actions-outside-bounds``     actions that the environment clips
    ``actions-on-bounds``          actions where a squashed policy has no density
    ``constant-features``          observations that never change
    ``reward-scale``               returns on another scale than the presets have
    ``missing-final-observations`` cut episodes without the observation after their last step
    ``inconsistent-observations``  next observations that are not the next row's
    ``duplicate-episodes``         episodes that are there twice
    ============================== ==================================================================

    Args:
        source: a dataset, or anything that :func:`~iql_plugins.data.load_dataset` knows. Values that are not finite
            are a finding, not an error.
        action_low: the environment's lower bound of actions, a number or ``[act]``. None asks the source, and takes
            -1 where it has none.
        action_high: the upper bound, likewise; both or neither.
        trust_pickle: see ``load_dataset``.
        discrete: see ``load_dataset``.

    Raises:
        DatasetError: if the source cannot be loaded.
        ValueError: for one bound without the other, or bounds of another shape than the actions.
    """
    if (action_low is None) != (action_high is None):
        raise ValueError("action_low and action_high belong together: give both or neither")
    loaded = read(source, Options(trust_pickle=trust_pickle, discrete=discrete, finite=False))
    if loaded is None:
        raise DatasetError(unknown_source(source))
    patient = _patient(loaded, action_low, action_high)
    entries = dict(loaded.dataset.items(True, True))
    names = {key: key if isinstance(key, str) else ".".join(key) for key in entries}
    return Report(
        name=loaded.name,
        transitions=len(loaded.dataset),
        episodes=len(patient.ends),
        returns=Statistics.of(patient.returns),
        lengths=Statistics.of(patient.lengths),
        shapes={names[key]: tuple(tensor.shape[1:]) for key, tensor in entries.items()},
        dtypes={names[key]: str(tensor.dtype).removeprefix("torch.") for key, tensor in entries.items()},
        findings=tuple(finding for check in _CHECKS for finding in check(patient)),
    )


def _patient(loaded: Loaded, action_low: Bound | None, action_high: Bound | None) -> _Patient:
    dataset = loaded.dataset
    ends = episode_ends(dataset)
    terminated = dataset.get(TERMINATED).reshape(-1).cpu()[ends]
    done = dataset.get(DONE).reshape(-1).cpu()[ends]
    action = dataset.get("action")
    low = high = None
    assumed = False
    if action.is_floating_point():
        if action_low is None or action_high is None:
            space = loaded.spaces.action if loaded.spaces is not None else None
            known = isinstance(space, Box) and space.low is not None and space.high is not None
            assumed = not known
            action_low, action_high = (space.low, space.high) if known else (-1.0, 1.0)  # type: ignore[union-attr]
        low, high = (_bound(name, bound, action) for name, bound in (("low", action_low), ("high", action_high)))
        if not bool((low < high).all()):
            raise ValueError("action_low must be below action_high")
    return _Patient(
        loaded,
        dataset,
        ends,
        episode_lengths(dataset),
        episode_returns(dataset),
        terminated,
        done & ~terminated,
        low,
        high,
        assumed,
    )


def _bound(name: str, bound: Bound | None, action: Tensor) -> Tensor:
    values = torch.as_tensor(bound, dtype=torch.float32, device=action.device)
    if values.shape not in ((), action.shape[1:]):
        raise ValueError(
            f"action_{name} must be a number or of shape {list(action.shape[1:])}, got {list(values.shape)}"
        )
    return values.expand(action.shape[1:])


def _non_finite(patient: _Patient) -> Iterator[Finding]:
    for key in ("observation", "action", REWARD, _NEXT_OBSERVATION):
        for leaf, tensor in leaves(patient.dataset, key).items():
            row, count = non_finite(tensor)
            if row is not None:
                yield Finding(
                    "non-finite",
                    f"{shown(leaf)} is NaN or infinite in {count} rows, the first of which is {row}",
                    "find out where they come from, and drop the episodes that they are in",
                    row,
                    count,
                )


def _timeouts_as_terminals(patient: _Patient) -> Iterator[Finding]:
    suggestion = "mark them as timeouts, not as terminals: the value of their last state is not 0"
    if not patient.loaded.timeouts_recorded:
        if count := int(patient.terminated.sum()):
            yield Finding(
                "timeouts-as-terminals",
                f"the buffer has not recorded which of its {count} terminal states are time-outs",
                "collect with handle_timeout_termination=True; if episodes end by a time limit, " + suggestion,
                int(patient.ends[patient.terminated][0]),
                count,
            )
        return
    lengths = patient.lengths[patient.terminated]
    if bool(patient.cut.any()) or len(lengths) == 0:
        return
    longest = int(patient.lengths.max())
    at_limit = patient.terminated & (patient.lengths == longest)
    # Lengths just below the limit are as frequent as the limit itself, unless something happens there.
    near = lengths[(lengths < longest) & (lengths >= 0.9 * longest)]
    most = int(near.bincount().max()) if len(near) else 0
    count = int(at_limit.sum())
    if longest > 1 and count >= 2 and count > 2 * most:
        yield Finding(
            "timeouts-as-terminals",
            f"{count} of {len(lengths)} terminal states come after exactly {longest} steps, which no episode exceeds, "
            "and there is no time-out: that looks like a time limit",
            f"if {longest} is a time limit, {suggestion}",
            int(patient.ends[at_limit][0]),
            count,
        )


def _no_terminals(patient: _Patient) -> Iterator[Finding]:
    if not bool(patient.terminated.any()):
        yield Finding(
            "no-terminals",
            "no step is terminal",
            "right for a task that only a time limit ends; if states end the task, the terminals got lost",
        )


def _terminal_and_timeout(patient: _Patient) -> Iterator[Finding]:
    if patient.loaded.both:
        yield Finding(
            "terminal-and-timeout",
            f"{patient.loaded.both} steps are marked as terminal and as time-out; they count as terminal",
            "clear the flag that is wrong: a step that only the time limit ended is no terminal",
            patient.loaded.both_row,
            patient.loaded.both,
        )


def _early_timeouts(patient: _Patient) -> Iterator[Finding]:
    if not bool(patient.cut.any()):
        return
    longest = int(patient.lengths[patient.cut].max())
    early = patient.cut & (patient.lengths < longest)
    if count := int(early.sum()):
        yield Finding(
            "early-timeouts",
            f"{count} of {int(patient.cut.sum())} time-outs come before step {longest}, where the last one does",
            "the losses take them as they are; but they are cuts of a collector, or goal switches (maze2d), and the "
            "returns of such parts are not comparable: do not scale rewards by the range of returns",
            int(patient.ends[early][0]),
            count,
        )


def _actions_and_bounds(patient: _Patient) -> Iterator[Finding]:
    if patient.low is None or patient.high is None:
        return
    action = patient.dataset.get("action")
    outside, on = _Rows(), _Rows()
    largest = 0.0
    for rows in chunks(len(action), row_bytes(action)):
        values = action[rows]
        past, beyond = past_bounds(values, patient.low, patient.high)
        outside.add(rows.start, beyond.any(1))
        on.add(rows.start, ((past >= 0) & ~beyond).any(1))
        largest = max(largest, float(past.nan_to_num(0.0, 0.0, 0.0).max()))
    low, high = (sorted(set(bound.tolist())) for bound in (patient.low, patient.high))
    bounds = f"{_short(low)} and {_short(high)}" + (", which are assumed" if patient.assumed else "")
    if outside.count:
        yield Finding(
            "actions-outside-bounds",
            f"{outside.count} actions are outside the bounds {bounds}, by up to {largest:.6g}",
            ("give the environment's action_low and action_high; " if patient.assumed else "")
            + "the environment clips such actions, and a training does, too, to what was executed",
            outside.first,
            outside.count,
        )
    if on.count:
        yield Finding(
            "actions-on-bounds",
            f"{on.count} actions are exactly on a bound, of {bounds}",
            "nothing to do for the policy with a tanh mean; a squashed one has no density there: clip its data to just "
            "inside the bounds",
            on.first,
            on.count,
        )


def _constant_features(patient: _Patient) -> Iterator[Finding]:
    if len(patient.dataset) < 2:
        return
    for key, tensor in leaves(patient.dataset, "observation").items():
        if tensor.dtype == torch.uint8:
            continue
        first = tensor[0].reshape(-1)
        constant = torch.ones_like(first, dtype=torch.bool)
        for rows in chunks(len(tensor), row_bytes(tensor)):
            constant &= (tensor[rows].reshape(rows.stop - rows.start, -1) == first).all(0)
        if count := int(constant.sum()):
            which = [int(index) for index in constant.nonzero().squeeze(-1)]
            yield Finding(
                "constant-features",
                f"{count} of {len(first)} features of {shown(key)} never change: {_short(which)}",
                "drop them; standardised, they must be divided by 1, not by their deviation of 0",
                count=count,
            )


def _reward_scale(patient: _Patient) -> Iterator[Finding]:
    width = float(patient.returns.max() - patient.returns.min())
    if len(patient.returns) < 2 or not math.isfinite(width) or RETURN_RANGE / _FAR <= width <= RETURN_RANGE * _FAR:
        return
    if width == 0:
        yield Finding(
            "reward-scale",
            "all episodes have the same return",
            "check the rewards: nothing tells good episodes from bad ones",
        )
        return
    yield Finding(
        "reward-scale",
        f"returns span {width:.6g}; the presets' temperatures are meant for about {RETURN_RANGE:g}",
        f"multiply rewards by {RETURN_RANGE / width:.6g} (reward_scale='return_range'), or set the temperature to this "
        "scale; sparse rewards of 0 and 1 take the antmaze preset, which subtracts 1",
    )


def _missing_final_observations(patient: _Patient) -> Iterator[Finding]:
    suggestion = "store the observation after the last step: a cut episode bootstraps from it"
    if patient.loaded.dropped:
        yield Finding(
            "missing-final-observations",
            f"{patient.loaded.dropped} transitions were left out: their episode was cut, and the source has no "
            "observation after it",
            suggestion,
            count=patient.loaded.dropped,
        )
        return
    cut = patient.ends[patient.cut]
    if len(cut) == 0:
        return
    own, zero, reset = (torch.ones(len(cut), dtype=torch.bool, device="cpu") for _ in range(3))
    following = (cut + 1).clamp(max=len(patient.dataset) - 1)
    reset &= following > cut
    for before, after in _pairs(patient.dataset):
        for part in chunks(len(cut), row_bytes(before)):
            final = after[cut[part]]
            own[part] &= _same(final, before[cut[part]])
            zero[part] &= _same(final, torch.zeros_like(final))
            reset[part] &= _same(final, before[following[part]])
    missing = own | zero | reset
    count = int(missing.sum())
    # Single ones may be so by chance: a state at rest, or a state like the next episode's first.
    if 2 * count > len(cut):
        substitutes = {"the step's own observation": own, "zeros": zero, "the next episode's first": reset}
        what = [text for text, rows in substitutes.items() if bool(rows.any())]
        yield Finding(
            "missing-final-observations",
            f"the next observation of {count} of {len(cut)} steps before a cut is no final observation, but "
            f"{' or '.join(what)}",
            suggestion,
            int(cut[missing][0]),
            count,
        )


def _inconsistent_observations(patient: _Patient) -> Iterator[Finding]:
    done = patient.dataset.get(DONE).reshape(-1).cpu()
    wrong = torch.zeros(max(len(done) - 1, 0), dtype=torch.bool, device="cpu")
    for before, after in _pairs(patient.dataset):
        for rows in chunks(len(wrong), row_bytes(before)):
            wrong[rows] |= ~_same(after[rows], before[rows.start + 1 : rows.stop + 1])
    wrong &= ~done[:-1]
    if count := int(wrong.sum()):
        row = int(wrong.nonzero()[0, 0])
        yield Finding(
            "inconsistent-observations",
            f"the next observation of {count} steps inside episodes is not the next row's observation, first in {row}",
            "mark where episodes are cut as timeouts; if they are not, rows are out of order",
            row,
            count,
        )


def _duplicate_episodes(patient: _Patient) -> Iterator[Finding]:
    marks = np.stack([_episode_marks(patient), patient.lengths.numpy().astype(np.uint64)], 1)
    _, first = np.unique(marks, axis=0, return_index=True)
    again = np.ones(len(marks), bool)
    again[first] = False
    if count := int(again.sum()):
        episode = int(np.flatnonzero(again)[0])
        row = int(patient.ends[episode] - patient.lengths[episode] + 1)
        yield Finding(
            "duplicate-episodes",
            f"{count} of {len(marks)} episodes equal an earlier one; the first of them begins in row {row}",
            "drop them, unless they are meant to count twice: a split for validation would leak",
            row,
            count,
        )


def _episode_marks(patient: _Patient) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit hash of each episode's observations, actions and rewards."""
    random = np.random.default_rng(0)
    rows_marks = np.zeros(len(patient.dataset), np.uint64)
    for key in ("observation", "action", REWARD):
        for tensor in leaves(patient.dataset, key).values():
            size = row_bytes(tensor)
            factors = random.integers(2**63, size=-(-size // 8), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            for rows in chunks(len(tensor), size):
                content = np.ascontiguousarray(tensor[rows].cpu().numpy()).reshape(rows.stop - rows.start, -1)
                words = np.zeros((len(content), 8 * len(factors)), np.uint8)
                words[:, :size] = content.view(np.uint8)
                rows_marks[rows] += _mixed((words.view(np.uint64) * factors).sum(1))
    starts = (patient.ends - patient.lengths + 1).numpy()
    position = np.arange(len(rows_marks)) - np.repeat(starts, patient.lengths.numpy())
    marks: np.ndarray[Any, np.dtype[np.uint64]] = np.add.reduceat(
        _mixed(rows_marks + _mixed(position.astype(np.uint64))), starts
    )
    return marks


def _mixed(values: Any) -> Any:
    """Spreads each bit of 64-bit words over all of them (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _pairs(dataset: TensorDictBase) -> list[tuple[Tensor, Tensor]]:
    """Observation and next observation, for each entry of a Dict observation."""
    following = leaves(dataset, _NEXT_OBSERVATION)
    return [(tensor, following[next_key(key)]) for key, tensor in leaves(dataset, "observation").items()]


def _same(one: Tensor, other: Tensor) -> Tensor:
    """``[N]`` on the CPU: whether rows are equal, NaN being equal to NaN."""
    equal = (one == other) | ((one != one) & (other != other))
    return equal.reshape(len(equal), -1).all(1).cpu()


class _Rows:
    """Counts rows, and remembers the first."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.count = 0

    def add(self, start: int, flags: Tensor) -> None:
        found = int(flags.sum())
        if found and self.first is None:
            self.first = start + int(flags.nonzero()[0, 0])
        self.count += found


def _short(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:g}" for value in values[:10])
    return text if len(values) <= 10 else f"{text}, ..."


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_CHECKS = (
    _non_finite,
    _timeouts_as_terminals,
    _no_terminals,
    _terminal_and_timeout,
    _early_timeouts,
    _actions_and_bounds,
    _constant_features,
    _reward_scale,
    _missing_final_observations,
    _inconsistent_observations,
    _duplicate_episodes,
)
