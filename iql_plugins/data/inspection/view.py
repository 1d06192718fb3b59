"""A dataset as the checks see it: what several of them need is computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data.dataset import DONE, REWARD, TERMINATED, Dataset, chunks, leaves, row_bytes
from iql_plugins.data.episodes import episode_ends, episode_lengths, episode_returns
from iql_plugins.keys import next_key, shown
from iql_plugins.spaces import Space

__all__ = [
    "NEXT_OBSERVATION",
    "SEVERITIES",
    "Finding",
    "Moments",
    "Rows",
    "Severity",
    "View",
    "different",
    "finite",
    "pairs",
    "same",
    "short",
    "which",
]

NEXT_OBSERVATION: NestedKey = ("next", "observation")

#: Rows, and numbers, of which a statistic that does not need all of them is taken.
SAMPLE_ROWS = 8192
SAMPLE_NUMBERS = 2**22

Marks = np.ndarray[Any, np.dtype[np.uint64]]


Severity = Literal["note", "warning", "error"]
#: From the mildest on: true of sound data, too; what is learned may be worse for it; what is learned is something else.
SEVERITIES: Mapping[Severity, frozenset[str]] = {
    "note": frozenset({
        "no-terminals", "early-timeouts", "unfinished-episode", "missing-final-observations", "reward-scale",
        "continued-at-goals",
        "actions-on-bounds", "constant-features", "constant-actions", "unused-actions", "uneven-scales",
    }),
    "warning": frozenset({
        "outliers", "repeated-features", "stuck-features", "noise-features", "feature-scale", "rounded-observations",
        "standardised", "terminal-and-timeout", "duplicate-episodes", "repeated-rows",
        "actions-outside-bounds", "clipped-actions",
    }),
    "error": frozenset({
        "non-finite", "shifted-features", "shifted-actions", "shifted-rewards", "observations-outside-bounds",
        "timeouts-as-terminals", "terminals-as-timeouts", "inconsistent-observations", "continued-episodes",
        "action-units", "unrelated-actions", "summed-rewards", "unrelated-rewards", "changed-units",
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a look.

    Attributes:
        code: what it is, in a word or two; one of :data:`SEVERITIES`.
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

    @property
    def severity(self) -> Severity:
        """How much it matters, which the code tells."""
        return next(severity for severity, codes in SEVERITIES.items() if self.code in codes)


@dataclass(frozen=True)
class Moments:
    """Of each feature of a tensor over all rows, float64 ``[features]``; values that are not finite count as 0."""

    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "Moments":
        """Those of ``tensor``, ``[N, ...]``, read a chunk at a time."""
        low, high, sums, squares = [], [], [], []
        shift = finite(tensor[:1])
        for rows in chunks(len(tensor), row_bytes(tensor)):
            values = finite(tensor[rows]) - shift
            low.append(values.amin(0))
            high.append(values.amax(0))
            sums.append(values.sum(0))
            squares.append(values.square().sum(0))
        mean = torch.stack(sums).sum(0) / len(tensor)
        variance = torch.stack(squares).sum(0) / len(tensor) - mean.square()
        return cls(
            torch.stack(low).amin(0) + shift[0],
            torch.stack(high).amax(0) + shift[0],
            mean + shift[0],
            variance.clamp_min(0.0).sqrt(),
        )


@dataclass(frozen=True)
class View:
    """The dataset, and what is known of its environment.

    Attributes:
        source: what the reader made of the source.
        low: the bounds of continuous actions, ``[act]``; None for discrete ones.
        high: likewise.
        assumed: whether the bounds are nobody's word.
        observation_spaces: by observation key, where they are known.
        action_count: the number of discrete actions, where it is known.
    """

    source: Dataset
    low: Tensor | None = None
    high: Tensor | None = None
    assumed: bool = False
    observation_spaces: dict[NestedKey, Space] = field(default_factory=dict)
    action_count: int | None = None

    @property
    def dataset(self) -> TensorDictBase:
        """By the key layout."""
        return self.source.tensors

    @cached_property
    def ends(self) -> Tensor:
        """The last row of each episode."""
        return episode_ends(self.dataset)

    @cached_property
    def lengths(self) -> Tensor:
        """Transitions of each episode."""
        return episode_lengths(self.dataset)

    @property
    def starts(self) -> Tensor:
        """The first row of each episode."""
        return self.ends - self.lengths + 1

    @cached_property
    def returns(self) -> Tensor:
        """Of each episode."""
        return episode_returns(self.dataset)

    @cached_property
    def terminated(self) -> Tensor:
        """Whether each episode ended in a terminal state."""
        flags: Tensor = self.dataset.get(TERMINATED).reshape(-1).cpu()[self.ends]
        return flags

    @cached_property
    def cut(self) -> Tensor:
        """Whether each episode was cut."""
        flags: Tensor = self.dataset.get(DONE).reshape(-1).cpu()[self.ends] & ~self.terminated
        return flags

    @cached_property
    def parts(self) -> bool:
        """Whether most episodes are parts of one, whose returns do not compare."""
        return 2 * int(self.cut_early.sum()) > len(self.lengths)

    @cached_property
    def cut_early(self) -> Tensor:
        """Whether each episode was cut before the step at which the longest one that was cut is: a part of one."""
        return self.cut & (self.lengths < self.lengths[self.cut].max()) if bool(self.cut.any()) else self.cut

    @cached_property
    def numbers(self) -> dict[NestedKey, Tensor]:
        """Observations, continuous actions and rewards that are real numbers: pixels and indices are not."""
        found: dict[NestedKey, Tensor] = {}
        for key in ("observation", "action", REWARD):
            found |= {leaf: value for leaf, value in leaves(self.dataset, key).items() if value.is_floating_point()}
        return found

    @property
    def observations(self) -> dict[NestedKey, Tensor]:
        """The observations among :attr:`numbers`."""
        return {key: tensor for key, tensor in self.numbers.items() if key not in ("action", REWARD)}

    @cached_property
    def moments(self) -> dict[NestedKey, Moments]:
        """Of each of :attr:`numbers`."""
        return {key: Moments.of(tensor) for key, tensor in self.numbers.items()}

    def sample(self, key: NestedKey, *, after: bool = False) -> Tensor:
        """Rows of one of :attr:`numbers`, evenly spaced, at most :data:`SAMPLE_ROWS`: float64 ``[n, features]``.

        Args:
            key: of an observation, the action or the reward.
            after: whether to take the next observation in its place.
        """
        tensor: Tensor = self.dataset.get(next_key(key) if after else key)
        most = max(1, min(SAMPLE_ROWS, len(tensor), SAMPLE_NUMBERS // max(1, tensor[0].numel())))
        return finite(tensor[torch.arange(most, device=tensor.device) * len(tensor) // most])

    @cached_property
    def observation_marks(self) -> Marks:
        """A 64-bit hash of each row's observation."""
        return _marks(self.dataset, ("observation",), seed=0)

    @cached_property
    def row_marks(self) -> Marks:
        """A 64-bit hash of each row's observation, action and reward."""
        marks: Marks = _mixed(self.observation_marks + _marks(self.dataset, ("action", REWARD), seed=1))
        return marks

    @cached_property
    def episode_marks(self) -> Marks:
        """A 64-bit hash of each episode's rows, in their order."""
        starts = self.starts.numpy()
        position = np.arange(len(self.dataset)) - np.repeat(starts, self.lengths.numpy())
        marks: Marks = np.add.reduceat(_mixed(self.row_marks + _mixed(position.astype(np.uint64))), starts)
        return marks

    @cached_property
    def distinct(self) -> float:
        """The share of observations that no earlier row has: near 1 where states are continuous, small in a grid."""
        return different(self.observation_marks) / len(self.observation_marks)


def _marks(dataset: TensorDictBase, keys: Sequence[NestedKey], seed: int) -> Marks:
    random = np.random.default_rng(seed)
    marks: Marks = np.zeros(len(dataset), np.uint64)
    for key in keys:
        for tensor in leaves(dataset, key).values():
            size = row_bytes(tensor)
            factors = random.integers(2**63, size=-(-size // 8), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            for rows in chunks(len(tensor), size):
                content = np.ascontiguousarray(tensor[rows].cpu().numpy()).reshape(rows.stop - rows.start, -1)
                words = np.zeros((len(content), 8 * len(factors)), np.uint8)
                words[:, :size] = content.view(np.uint8)
                marks[rows] += _mixed((words.view(np.uint64) * factors).sum(1))
    return marks


def different(marks: Marks) -> int:
    """How many different ones there are of at least one; NumPy's own count takes five times the memory."""
    ordered = np.sort(marks)
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def _mixed(values: Any) -> Any:
    """Spreads each bit of 64-bit words over all of them (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def finite(tensor: Tensor) -> Tensor:
    """``[n, features]`` float64 on the CPU, with 0 for what is not finite."""
    return tensor.reshape(len(tensor), -1).cpu().double().nan_to_num(0.0, 0.0, 0.0)


def pairs(dataset: TensorDictBase) -> list[tuple[Tensor, Tensor]]:
    """Observation and next observation, for each entry of a Dict observation."""
    following = leaves(dataset, NEXT_OBSERVATION)
    return [(tensor, following[next_key(key)]) for key, tensor in leaves(dataset, "observation").items()]


def same(one: Tensor, other: Tensor) -> Tensor:
    """``[N]`` on the CPU: whether rows are equal, NaN being equal to NaN."""
    equal = (one == other) | ((one != one) & (other != other))
    return equal.reshape(len(equal), -1).all(1).cpu()


class Rows:
    """Counts rows, and remembers the first."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.count = 0

    def add(self, start: int, flags: Tensor) -> None:
        """Counts those of the rows from ``start`` on that are flagged."""
        found = int(flags.sum())
        if found and self.first is None:
            self.first = start + int(flags.nonzero()[0, 0])
        self.count += found


def short(values: Sequence[float]) -> str:
    """The first ten numbers."""
    text = ", ".join(f"{value:g}" for value in values[:10])
    return text if len(values) <= 10 else f"{text}, ..."


def which(flags: Tensor, key: NestedKey, noun: str = "feature") -> str:
    """The flagged entries of one key: ``"features 0, 3 of 'observation'"``."""
    indices = flags.nonzero().squeeze(-1).tolist()
    if key == REWARD or len(flags) == 1:
        return shown(key)
    return f"{noun}{'s' if len(indices) > 1 else ''} {short(indices)} of {shown(key)}"
