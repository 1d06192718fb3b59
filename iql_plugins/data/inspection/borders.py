"""What gives away, at the border of two episodes, a column that was shifted: there rows know nothing of each other."""

from collections.abc import Callable, Iterator, Sequence

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data.dataset import REWARD
from iql_plugins.data.inspection.relations import shifted
from iql_plugins.data.inspection.samples import Columns, actions_at, rewards_at
from iql_plugins.data.inspection.view import Finding, View, finite, which

__all__ = ["CHECKS"]

#: Episodes from which on their borders are compared, and how many are.
_BORDERS, _MOST_BORDERS = 20, 200
#: By how many deviations values on both sides of a border are nearer than chance has them, and less so a row further.
_NEAR, _NO_LONGER_NEAR = 5.0, 4.5


def filled_columns(view: View) -> Iterator[Finding]:
    """Actions, or rewards, whose first two are equal in (almost) every episode, or the last two, and hardly any else.

    A column that was shifted within each episode was filled up with what was there. Continuous values do not repeat.
    """
    long = view.lengths >= 4
    if int(long.sum()) < _BORDERS:
        return
    starts, ends = view.starts[long], view.ends[long]
    middle = starts + view.lengths[long] // 2
    for late, where, places in ((1, "first", (starts, middle, starts + 1)), (-1, "last", (ends - 1, middle, ends - 2))):
        filled = {key: _repeats(tensor, places) for key, tensor in view.numbers.items()}
        # A position that has not moved yet, for want of a velocity, has a reward that has not changed either.
        if any(bool(flags.any()) for key, flags in filled.items() if key in view.observations):
            continue
        for noun, key in (("actions", "action"), ("rewards", REWARD)):
            if key in filled and bool(filled[key].any()):
                finding = shifted(noun, key, torch.tensor([late], device="cpu"), filled[key])
                yield Finding(
                    finding.code,
                    f"the {where} two values of {which(filled[key], key, 'dimension')} are equal in each episode, and "
                    "hardly any others: the column was shifted by a row, and filled up",
                    finding.suggestion,
                    int(places[0][0]),
                    int(filled[key].sum()),
                )


def _repeats(tensor: Tensor, places: Sequence[Tensor]) -> Tensor:
    """``[features]``: whether values equal the next row's in 95% of the first places, and in 5% of the others."""
    first, *others = (
        (finite(tensor[rows.to(tensor.device)]) == finite(tensor[(rows + 1).to(tensor.device)])).double().mean(0)
        for rows in places
    )
    return (first > 0.95) & (torch.stack(others).amax(0) < 0.05)


def columns_across_borders(view: View) -> Iterator[Finding]:
    """Values that are nearer to those of the episode before, or after, than to their own's.

    Of each episode's first value, how near it is to the last of the one before, ranked among the last ones of all
    others: for episodes that know nothing of each other every rank is as likely. Where they drift, ranks are the same a
    row later and a row earlier; only what was shifted by a row across the border loses it there. So does a velocity
    where an episode goes on from where the one before stopped, at another goal: there, only a jump tells.
    """
    pairs = ((view.lengths[:-1] >= 3) & (view.lengths[1:] >= 3)).nonzero().squeeze(-1)
    if len(pairs) < _BORDERS - 1:
        return
    many = min(len(pairs), _MOST_BORDERS)
    place = pairs[torch.arange(many, device="cpu") * len(pairs) // many]
    last, first = view.ends[place], view.starts[place + 1]
    found: dict[int, Tensor] = {}
    goes_on = False
    if view.observations:
        observations = Columns.observations(view)
        found = _belonging(observations.at, first, last)
        goes_on = _goes_on(observations, first, last, found[1] | found[-1])
        if goes_on:
            starts = view.starts[view.lengths >= 3]
            found = {1: found[1] & _jumps(view, observations, starts), -1: torch.zeros_like(found[-1])}
        cut = view.ends[view.cut & (view.lengths >= 3)]
        # A cut comes at any step: what jumps in the last row is there a row early.
        if len(cut) >= _BORDERS:
            found[-1] |= _jumps(view, observations, cut - 1)
    columns: dict[str, tuple[NestedKey, Callable[[Tensor], Tensor]]] = {
        "actions": ("action", lambda rows: actions_at(view, rows)),
        "rewards": (REWARD, lambda rows: rewards_at(view, rows)),
    }
    if goes_on:
        # A controller's go on, too.
        del columns["actions"]
    for noun, (key, at) in columns.items():
        for rows, flags in _belonging(at, first, last).items():
            if bool(flags.any()):
                yield shifted(noun, key, torch.tensor([rows], device="cpu"), flags)
    for rows, flags in found.items():
        if count := int(flags.sum()):
            yield Finding(
                "shifted-features",
                f"{count} features of the observations are a row too {'late' if rows > 0 else 'early'}: at the border "
                "of episodes, they belong to the other",
                "move them back, in observations and next observations alike",
                count=count,
            )


def _belonging(at: Callable[[Tensor], Tensor], first: Tensor, last: Tensor) -> dict[int, Tensor]:
    """``[features]``: whether first values belong to the last episode (late by 1), or last ones to the next (-1)."""
    near = _nearness(at(first), at(last))
    further = {1: _nearness(at(first + 1), at(last)), -1: _nearness(at(first), at(last - 1))}
    return {rows: (near > _NEAR) & (near - lost > _NO_LONGER_NEAR) for rows, lost in further.items()}


def _goes_on(observations: Columns, first: Tensor, last: Tensor, flags: Tensor) -> bool:
    """Whether episodes begin where those before them stopped, in a feature that moves, and is none of the flagged."""
    followed = (observations.at(last, after=True) == observations.at(first)).double().mean(0) > 0.5
    near = _nearness(observations.at(first), observations.at(last)) > _NEAR
    moves = (observations.at(first + 1) != observations.at(first)).double().mean(0) > 0.5
    return bool((followed & near & moves & ~flags).any())


def _jumps(view: View, observations: Columns, rows: Tensor) -> Tensor:
    """``[features]``: whether the step from these rows to the next ones is mostly larger than 99% of the others."""
    others = torch.arange(4096, device="cpu") * len(view.dataset) // 4096
    others = others[~torch.isin(others, rows)]
    steps = (observations.at(others, after=True) - observations.at(others)).abs()
    jumps = (observations.at(rows + 1) - observations.at(rows)).abs()
    found: Tensor = (jumps > steps.quantile(0.99, dim=0)).double().mean(0) > 0.5
    return found


def _nearness(first: Tensor, last: Tensor) -> Tensor:
    """By how many deviations each first value is nearer to its own last one than to others', ``[features]``."""
    many = len(first)
    apart = (first.unsqueeze(1) - last.unsqueeze(0)).abs()
    own = apart.diagonal().T.unsqueeze(1)
    rank = ((apart < own).double().sum(1) + 0.5 * ((apart == own).double().sum(1) - 1)) / (many - 1)
    nearness: Tensor = (0.5 - rank.mean(0)) * (12 * many) ** 0.5
    return nearness


CHECKS = (filled_columns, columns_across_borders)
