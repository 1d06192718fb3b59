"""Numbers that cannot be right, or not be learned from: each feature by itself."""

from collections.abc import Iterator

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data.dataset import REWARD, chunks, leaves, non_finite, row_bytes
from iql_plugins.data.inspection.view import (
    NEXT_OBSERVATION,
    SAMPLE_NUMBERS,
    Finding,
    Moments,
    Rows,
    View,
    finite,
    short,
    which,
)
from iql_plugins.keys import shown
from iql_plugins.spaces import Box

__all__ = ["CHECKS"]

#: Rows below which a statistic over rows says nothing here.
_ENOUGH = 100
#: A value that is so many ranges away from the rest is none of its kind: a heavy tail reaches hundreds of them, and a
#: bonus, next to what an action costs, thousands.
_FAR_OUT = 1e4
#: And so many times as far out as the next one.
_GAP = 100.0
#: Deviations of features between which a network of the presets learns without standardising.
_SCALES = 1e-3, 1e2
#: Between the largest and the smallest standard deviation. Data of five environments have factors from 1 to 16, a
#: runner of MuJoCo has 137: with raw observations IQL lost more than half of its return there.
_UNEVEN = 30.0
#: Different values from which on a feature is taken for continuous: a grid, a count or a flag has fewer.
_CONTINUOUS = 100
#: Different values, and different changes in a step, of a feature that has been rounded; in a grid, a step goes one
#: field to either side, or round it. Fewer changes will do where more than this share of observations is different.
_ROUNDED_VALUES, _ROUNDED_CHANGES, _FEWER_CHANGES, _NO_GRID = 20, 6, 4, 0.2
#: The share of the typical change in a step from which on rounding is worth a finding: what has few decimals may have
#: them by itself (a price, a count), what is of half precision has not.
_COARSE_DECIMALS, _COARSE_BITS = 0.1, 0.01


def non_finite_values(view: View) -> Iterator[Finding]:
    """NaN or infinity."""
    for key in ("observation", "action", REWARD, NEXT_OBSERVATION):
        for leaf, tensor in leaves(view.dataset, key).items():
            row, count = non_finite(tensor)
            if row is not None:
                yield Finding(
                    "non-finite",
                    f"{shown(leaf)} is NaN or infinite in {count} rows, the first of which is {row}",
                    "find out where they come from, and drop the episodes that they are in",
                    row,
                    count,
                )


def outliers(view: View) -> Iterator[Finding]:
    """Values that are ten thousand times further from the median than 98% of the values are from each other.

    Where these 98% are all 0 there is no scale to hold a value against: a sparse reward is none.
    """
    if len(view.dataset) < _ENOUGH:
        return
    for key, tensor in view.numbers.items():
        moments = view.moments[key]
        # At most 2% of the values are so far out: their deviation from the mean is 7 standard deviations, or more.
        far = torch.maximum(moments.high - moments.mean, moments.mean - moments.low) > 7 * moments.std
        if not bool(far.any()):
            continue
        low, median, high = view.sample(key).quantile(far.new_tensor([0.01, 0.5, 0.99], dtype=torch.float64), dim=0)
        limit = _FAR_OUT * torch.maximum(high - low, median.abs() * (high == low))
        far &= (limit > 0) & (torch.maximum(moments.high - median, median - moments.low) > limit)
        if not bool(far.any()):
            continue
        inner, outer = torch.zeros_like(limit), torch.full_like(limit, torch.inf)
        for rows in chunks(len(tensor), row_bytes(tensor)):
            apart = (finite(tensor[rows]) - median).abs()
            inner = torch.maximum(inner, apart.masked_fill(apart > limit, 0.0).amax(0))
            outer = torch.minimum(outer, apart.masked_fill(apart <= limit, torch.inf).amin(0))
        # The values of a heavy tail, such as a force in a collision, are at all distances.
        far &= outer > _GAP * inner
        if not bool(far.any()):
            continue
        found = Rows()
        for rows in chunks(len(tensor), row_bytes(tensor)):
            found.add(rows.start, (((finite(tensor[rows]) - median).abs() > limit) & far).any(1))
        yield Finding(
            "outliers",
            f"{which(far, key)} is more than {_FAR_OUT:g} times as far from its median as 98% of the values are from "
            f"each other in {found.count} rows, first in {found.first}",
            "one such value outweighs all others in a loss or a standard deviation: find out where it comes from, and "
            "drop the episodes that it is in",
            found.first,
            found.count,
        )


def constant_features(view: View) -> Iterator[Finding]:
    """Observations that never change."""
    if len(view.dataset) < 2:
        return
    for key, tensor in leaves(view.dataset, "observation").items():
        if tensor.dtype == torch.uint8:
            continue
        first = tensor[0].reshape(-1)
        constant = torch.ones_like(first, dtype=torch.bool)
        for rows in chunks(len(tensor), row_bytes(tensor)):
            constant &= (tensor[rows].reshape(rows.stop - rows.start, -1) == first).all(0)
        if count := int(constant.sum()):
            indices = [int(index) for index in constant.nonzero().squeeze(-1)]
            yield Finding(
                "constant-features",
                f"{count} of {len(first)} features of {shown(key)} never change: {short(indices)}",
                "drop them; standardised, they must be divided by 1, not by their deviation of 0",
                count=count,
            )


def repeated_features(view: View) -> Iterator[Finding]:
    """Continuous features that equal another one in every row."""
    if len(view.dataset) < _ENOUGH:
        return
    for key in view.observations:
        columns = view.sample(key).T.contiguous().numpy()
        first: dict[bytes, int] = {}
        again = [
            (index, first[content])
            for index, content in enumerate(column.tobytes() for column in columns)
            if first.setdefault(content, index) != index
        ]
        again = [pair for pair in again if len(set(columns[pair[0]].tolist())) >= _CONTINUOUS]
        if again:
            yield Finding(
                "repeated-features",
                f"{len(again)} features of {shown(key)} equal another in every row: first {again[0][0]}, "
                f"which equals {again[0][1]}",
                "if the environment has it twice, drop one; else one was written over the other, and is lost",
                count=len(again),
            )


def stuck_features(view: View) -> Iterator[Finding]:
    """Features that hold one and the same value through whole episodes in a row, and in others move at every step.

    A state may rest within an episode, and a goal may hold for one; but what moves in 19 of 20 steps elsewhere does
    not come through a reset with the same value, three times or more, unless nobody measures it.
    """
    starts, lengths = view.starts, view.lengths
    if len(starts) < 6:
        return
    # Runs of neighbours, spread over the dataset.
    first = torch.arange(min(64, len(starts) // 4), device="cpu")
    episodes = (first * (len(starts) - 4) // max(1, len(first) - 1)).unsqueeze(1) + torch.arange(4, device="cpu")
    steps = torch.arange(32, device="cpu")
    offsets = torch.minimum(steps, (lengths[episodes] - 1).unsqueeze(-1))
    inside = (steps[1:] < lengths[episodes].unsqueeze(-1)).unsqueeze(-1)
    indices = starts[episodes].unsqueeze(-1) + offsets
    for key, tensor in view.observations.items():
        if tensor[0].numel() * indices.numel() > SAMPLE_NUMBERS:
            continue
        values = finite(tensor[indices.reshape(-1).to(tensor.device)]).reshape(*indices.shape, -1)
        changes = ((values.diff(dim=2) != 0) & inside).sum(2)
        still = (changes == 0) & (lengths[episodes] > 1).unsqueeze(-1)
        through = still[:, 1:] & still[:, :-1] & (values[:, 1:, 0] == values[:, :-1, 0])
        moving = ~still
        lively = moving & (changes >= 0.95 * inside.sum(2))
        # But for the episode in which it begins, and the one in which it ends.
        lively = lively.sum((0, 1)) >= (moving.sum((0, 1)) - 2).clamp_min(3)
        stuck = (through.sum((0, 1)) >= 3) & lively
        if bool(stuck.any()):
            at = through[:, :, stuck].any(2).nonzero()[0]
            row = int(starts[episodes[at[0], at[1]]])
            yield Finding(
                "stuck-features",
                f"{which(stuck, key)} holds one value through whole episodes and their resets, as from row {row} on, "
                "and moves at every step of others",
                "a sensor that hangs, or a column that was filled up: drop the episodes, or the feature",
                row,
                int(stuck.sum()),
            )


def feature_scale(view: View) -> Iterator[Finding]:
    """Features whose standard deviation is below 0.001 or above 100."""
    for key in view.observations:
        deviation = view.moments[key].std
        changes = view.moments[key].high > view.moments[key].low
        if len(view.dataset) < _ENOUGH:
            return
        far = changes & ((deviation < _SCALES[0]) | (deviation > _SCALES[1]))
        if count := int(far.sum()):
            some = deviation[far]
            yield Finding(
                "feature-scale",
                f"{count} of {len(far)} features of {shown(key)} have standard deviations beyond {_SCALES[0]:g} to "
                f"{_SCALES[1]:g}, of {short(sorted({float(some.min()), float(some.max())}))}: "
                f"{short(far.nonzero().squeeze(-1).tolist())}",
                "check their units; a network sees little but the largest features, and nothing of the smallest: "
                "standardise observations",
                count=count,
            )


def uneven_scales(view: View) -> Iterator[Finding]:
    """Features of observations whose standard deviations differ by a factor of 30 or more."""
    if len(view.dataset) < _ENOUGH:
        return
    deviations = [torch.zeros(0, dtype=torch.float64, device="cpu")]
    for key, tensor in view.observations.items():
        # Pixels are alike.
        if tensor.ndim <= 2:
            moments = view.moments[key]
            size = torch.maximum(moments.low.abs(), moments.high.abs())
            # Less is rounding.
            deviations.append(moments.std[moments.std > 1e-6 * size].reshape(-1).cpu())
    changing = torch.cat(deviations)
    if len(changing) < 2 or (ratio := float(changing.max() / changing.min())) < _UNEVEN:
        return
    yield Finding(
        "uneven-scales",
        f"standard deviations of observations are from {float(changing.min()):.2g} to {float(changing.max()):.2g}, "
        f"a factor of {ratio:.0f}",
        "set normalize_observations (--normalize-observations): the networks see little of the smaller ones",
    )


def rounded_observations(view: View) -> Iterator[Finding]:
    """Observations with fewer digits than they need: of up to three decimals, or of half precision.

    A float32 number has 1 chance in 8192 to be one of half precision, and fewer to have three decimals; all numbers of
    a key have none. So have a grid's or a clock's, which is why features must take many values, change by many, and
    lose a part of what they change by.
    """
    if len(view.dataset) < _ENOUGH:
        return
    for key in view.observations:
        before, after = view.sample(key), view.sample(key, after=True)
        changing = before.amin(0) < before.amax(0)
        before, changes = before[:, changing], (after - before)[:, changing]
        digits = _digits(before)
        if digits is None:
            continue
        what, step, coarse = digits
        least = _FEWER_CHANGES if view.distinct > _NO_GRID else _ROUNDED_CHANGES
        rich = [
            len(values.unique()) >= _ROUNDED_VALUES and len((change / size).round().unique()) >= least
            for values, change, size in zip(before.T, changes.T, step, strict=True)
        ]
        if not any(rich):
            continue
        typical = changes.abs().quantile(0.5, dim=0)
        if count := int(((step > coarse * typical) & (changes.abs().amax(0) > 0)).sum()):
            yield Finding(
                "rounded-observations",
                f"all numbers of {shown(key)} {what}: in {count} features that is more than {100 * coarse:g}% of what "
                "a step changes",
                "take them from a source that was not rounded: what an action does drowns in it",
                count=count,
            )


def _digits(sample: Tensor) -> tuple[str, Tensor, float] | None:
    """What the numbers have in common, the distance of neighbours in each column, and how much of that matters."""
    for decimals in (1, 2, 3):
        scaled = sample * 10**decimals
        if bool(((scaled - scaled.round()).abs() < 1e-3).all()):
            if bool((sample == sample.round()).all()):
                return None
            step = sample.new_full(sample.shape[1:], 10.0**-decimals)
            return f"have {decimals} decimals", step, _COARSE_DECIMALS
    for name, dtype, bits in (("float16", torch.float16, 11), ("bfloat16", torch.bfloat16, 8)):
        if bool((sample.to(dtype).double() == sample).all()):
            step = 2.0 ** (sample.abs().amax(0).log2().floor() - bits + 1)
            # A sensor of so many bits has the same step everywhere.
            fixed = bool((sample / step == (sample / step).round()).all())
            return None if fixed else (f"fit into {name}", step, _COARSE_BITS)
    return None


def standardised(view: View) -> Iterator[Finding]:
    """Observations, or rewards, that were brought to mean 0 and deviation 1, or to the range from 0 or -1 to 1.

    No environment's features have all of them a mean of 0 and a deviation of 1 to 1%; and where a range of [0, 1] or
    [-1, 1] is the environment's own, many rows are at its ends or none is, and not in half of the features just the
    largest and the smallest.
    """
    if len(view.dataset) < 10 * _ENOUGH:
        return
    for key in (*view.observations, REWARD):
        moments = view.moments[key]
        changing = moments.high > moments.low
        if not bool(changing.any()):
            continue
        tolerance = 1e-2 if int(changing.sum()) > 1 else 1e-3
        unit = (moments.mean.abs() < tolerance) & ((moments.std - 1).abs() < tolerance)
        if bool(unit[changing].all()):
            how = "mean 0 and standard deviation 1"
        elif key != REWARD and int(changing.sum()) > 1 and _to_unit_range(view, key, moments, changing):
            how = f"a range of exactly {short([float(moments.low[changing][0]), 1.0])}, whose ends single rows reach"
        else:
            continue
        yield Finding(
            "standardised",
            f"{shown(key)} has {how}{'' if key == REWARD else ' in every feature'}: it was standardised",
            "a policy must be given observations in the same units: store the raw ones, and let training standardise"
            if key != REWARD
            else "subtracting a mean reward changes what is best where episodes differ in length: store the raw ones",
            count=int(changing.sum()),
        )


def _to_unit_range(view: View, key: NestedKey, moments: Moments, changing: Tensor) -> bool:
    low, high = moments.low[changing], moments.high[changing]
    if bool(((high - 1).abs() > 1e-6).any()) or bool(torch.minimum(low.abs(), (low + 1).abs()).gt(1e-6).any()):
        return False
    if len({round(float(value)) for value in low}) > 1:
        return False
    sample = view.sample(key)[:, changing]
    at_ends = ((sample - low).abs() < 1e-6) | ((sample - high).abs() < 1e-6)
    return bool((at_ends.double().mean(0) < 0.01).double().mean() >= 0.5)


def observations_and_bounds(view: View) -> Iterator[Finding]:
    """Observations that the environment's space does not have, with a thousandth of its width for rounding."""
    for key, space in view.observation_spaces.items():
        moments = view.moments.get(key)
        if moments is None or not isinstance(space, Box) or space.low is None or space.high is None:
            continue
        low, high = (torch.tensor(bound, dtype=torch.float64, device="cpu") for bound in (space.low, space.high))
        if low.shape != moments.low.shape:
            continue
        tolerance = 1e-3 * (high - low)
        outside = (moments.low < low - tolerance) | (moments.high > high + tolerance)
        if count := int(outside.sum()):
            yield Finding(
                "observations-outside-bounds",
                f"{which(outside, key)} goes beyond the environment's bounds: from "
                f"{float(moments.low[outside][0]):.6g} to {float(moments.high[outside][0]):.6g}, where "
                f"{float(low[outside][0]):.6g} to {float(high[outside][0]):.6g} is all there is",
                "another unit, another environment, or observations that were standardised: the policy will not be "
                "given such",
                count=count,
            )


CHECKS = (
    non_finite_values,
    outliers,
    constant_features,
    repeated_features,
    stuck_features,
    feature_scale,
    uneven_scales,
    rounded_observations,
    standardised,
    observations_and_bounds,
)
