"""What is looked at once whenever an agent takes data: that all is finite, and that its actions can be explained."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data import summary
from iql_plugins.data.dataset import REWARD, DatasetError, chunks, non_finite, not_finite, row_bytes
from iql_plugins.keys import DISCOUNT, AcceptedKeys, next_key
from iql_plugins.spaces import Box, Space, Spaces

__all__ = ["ActionExcess", "Part", "check_columns", "check_numbers", "past_bounds", "to_be_checked"]

#: Part of the width between the bounds by which rounding may carry an action past one.
ROUNDING = 1e-5
#: Half-widths from the middle of the bounds from which on no clipping explains an action.
FAR = 10.0

#: Consecutive rows ``[n, ...]``, and the number of the first of them.
Part = tuple[int, Tensor]


def past_bounds(action: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """How far actions are past the nearer bound, negative inside; and where that is more than rounding.

    Args:
        action: ``[N, act]``.
        low: ``[act]``.
        high: ``[act]``.
    """
    past = torch.maximum(action - high, low - action)
    return past, past > ROUNDING * (high - low)


class _Place(NamedTuple):
    row: int
    entry: int
    value: float


@dataclass
class ActionExcess:
    """The actions beyond the bounds of a space, counted piece by piece. They are clipped when they are trained on.

    Attributes:
        space: of the actions; nothing is beyond one that is Discrete or has no bounds.
        rows: transitions that were looked at.
        count: those with an entry beyond a bound, by more than rounding.
        first: row, entry and value of the first of them.
        far: of the first that is an order of magnitude beyond: more than ten half-widths from the middle.
    """

    space: Space
    rows: int = 0
    count: int = 0
    first: _Place | None = None
    far: _Place | None = None

    def add(self, start: int, action: Tensor) -> None:
        """Counts further rows, a chunk at a time.

        Args:
            start: number of the first of them.
            action: ``[n, act]``.
        """
        self.rows += len(action)
        space = self.space
        if not isinstance(space, Box) or space.low is None or space.high is None:
            return
        low, high = (torch.tensor(bound, dtype=action.dtype, device=action.device) for bound in (space.low, space.high))
        # Small pieces: what they take on the way, the allocator may keep.
        for rows in chunks(len(action), 64 * row_bytes(action)):
            values = action[rows]
            past, beyond = past_bounds(values, low, high)
            count = int(beyond.any(1).sum())
            if count:
                far = past > (FAR - 1.0) * 0.5 * (high - low)
                self.first = self.first or _place(start + rows.start, values, beyond)
                self.far = self.far or _place(start + rows.start, values, far)
                self.count += count

    @property
    def explained(self) -> bool:
        """Whether an environment that clips actions explains it: not of most rows, nor of what is far out."""
        return self.far is None and 2 * self.count <= self.rows

    def __str__(self) -> str:
        place = self.far or self.first
        if place is None or not isinstance(self.space, Box) or self.space.low is None or self.space.high is None:
            return "no action is beyond the bounds"
        low, high = self.space.low[place.entry], self.space.high[place.entry]
        which = "ten times over" if self.far else "first"
        return (
            f"'action' is beyond the bounds in {self.count} of {self.rows} rows, {which} in row {place.row}: "
            f"{place.value:g} in entry {place.entry}, whose bounds are {low:g} and {high:g}"
        )


def check_columns(
    columns: Mapping[NestedKey, Iterable[Part]],
    action: Space,
    *,
    clip_all_actions: bool,
    name: str = "the dataset",
    remedy: str = "give the spaces",
) -> ActionExcess:
    """The excess of the actions among columns of data that can be trained on. One pass.

    Args:
        columns: by the key layout.
        action: the space of the actions.
        clip_all_actions: whether to clip actions even where that explains nothing.
        name: of the data, for messages.
        remedy: how to give the bounds of the environment, for messages.

    Raises:
        DatasetError: for a value that is not finite, and for actions of most rows, or far out, beyond the bounds; one
            line that names key and row.
    """
    excess = ActionExcess(action)
    for key, parts in columns.items():
        first, count = None, 0
        for start, part in parts:
            row, bad = non_finite(part)
            first = start + row if first is None and row is not None else first
            count += bad
            if key == "action":
                excess.add(start, part)
        if first is not None:
            raise DatasetError(not_finite(name, key, first, count))
    if not (clip_all_actions or excess.explained):
        raise DatasetError(
            f"{name}: {excess}; no environment that clips actions explains that: {remedy} of the environment that "
            "the data are of, or set clip_all_actions=True to clip them all the same"
        )
    return excess


def check_numbers(dataset: TensorDictBase, spaces: Spaces, *, clip_all_actions: bool) -> ActionExcess:
    """As :func:`check_columns`, for what an agent reads of transitions by the key layout, batch size ``[N]``.

    Raises:
        DatasetError: likewise.
    """
    keys: list[NestedKey] = [*spaces.observations, "action", REWARD, *map(next_key, spaces.observations)]
    keys += [DISCOUNT, AcceptedKeys().priority_weight]
    columns = to_be_checked(dataset, keys, spaces.action)
    return check_columns(columns, spaces.action, clip_all_actions=clip_all_actions)


def to_be_checked(dataset: TensorDictBase, keys: Iterable[NestedKey], action: Space) -> dict[NestedKey, list[Part]]:
    """The columns of a dataset that :func:`check_columns` has to look at: all, unless its summary knows them.

    Args:
        dataset: by the key layout.
        keys: of those that are read.
        action: the space of the actions.
    """
    # What is missing, the loss names.
    columns = {key: [(0, tensor)] for key in keys if (tensor := dataset.get(key, None)) is not None}
    known = summary.of(dataset)
    if known is None:
        return columns
    # All is finite; actions are to be counted only if one is beyond the bounds.
    extremes = ActionExcess(action)
    extremes.add(0, torch.stack([known.columns["action"][name] for name in ("low", "high")]))
    return {"action": columns["action"]} if extremes.count else {}


def _place(start: int, values: Tensor, where: Tensor) -> _Place | None:
    """The first place of a chunk where something is so."""
    found = where.nonzero()
    if not len(found):
        return None
    row, entry = found[0].tolist()
    return _Place(start + row, entry, float(values[row, entry]))
