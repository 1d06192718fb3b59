"""Actions and their bounds, rewards and their scale."""

import math
from collections.abc import Iterator

import torch

from iql_plugins.data.dataset import chunks, row_bytes
from iql_plugins.data.inspection.view import Finding, Rows, View, short, which
from iql_plugins.data.intake import past_bounds
from iql_plugins.data.normalizers import RETURN_RANGE

__all__ = ["CHECKS"]

#: Factor between the range of returns and that of the presets from which on the scale is worth a finding.
_FAR = 10.0
#: Times the bounds from which on an action is in other units, rather than clipped.
_OTHER_UNITS = 10.0


def actions_and_bounds(view: View) -> Iterator[Finding]:
    """Actions that the environment clips, and such as a squashed policy has no density for."""
    if view.low is None or view.high is None:
        return
    action = view.dataset.get("action")
    outside, on = Rows(), Rows()
    largest = 0.0
    for rows in chunks(len(action), row_bytes(action)):
        values = action[rows]
        past, beyond = past_bounds(values, view.low, view.high)
        outside.add(rows.start, beyond.any(1))
        on.add(rows.start, ((past >= 0) & ~beyond).any(1))
        largest = max(largest, float(past.nan_to_num(0.0, 0.0, 0.0).max()))
    low, high = (sorted(set(bound.tolist())) for bound in (view.low, view.high))
    bounds = f"{short(low)} and {short(high)}" + (", which are assumed" if view.assumed else "")
    if outside.count:
        yield Finding(
            "actions-outside-bounds",
            f"{outside.count} actions are outside the bounds {bounds}, by up to {largest:.6g}",
            ("give the environment's action_low and action_high; " if view.assumed else "")
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


def action_units(view: View) -> Iterator[Finding]:
    """Actions to which the bounds do not apply: ten times beyond them, or most of them outside; or scaled to [-1, 1].

    Noise on an action goes beyond a bound by its width, rarely and not by ten of it. That the largest and the
    smallest action are 1 and -1 to 1%, where the bounds are others, is no chance.
    """
    if view.low is None or view.high is None:
        return
    moments = view.moments["action"]
    low, high = view.low.cpu().double(), view.high.cpu().double()
    centre, half = (low + high) / 2, (high - low) / 2
    reach = torch.maximum(moments.high - centre, centre - moments.low) / half
    sample = (view.sample("action") - centre).abs() > half * (1 + 1e-6)
    most = not view.assumed and float(sample.any(1).double().mean()) > 0.5
    if bool((reach > _OTHER_UNITS).any()) or most:
        yield Finding(
            "action-units",
            f"actions reach {float(reach.max()):.6g} times as far as the bounds"
            + (", and most are outside" if most else ""),
            "they are in other units than the environment's, or are not its actions: clipped, they would all be bounds",
            count=int((reach > 1).sum()),
        )
    scaled = (half - 1).abs() > 0.1
    scaled &= (moments.high <= 1 + 1e-6) & (moments.low >= -1 - 1e-6) & (moments.high > 0.99) & (moments.low < -0.99)
    if not view.assumed and bool(scaled.all()):
        yield Finding(
            "action-units",
            f"actions reach from -1 to 1 and no further, where the bounds are {short(sorted(set(low.tolist())))} and "
            f"{short(sorted(set(high.tolist())))}: they look as if they were scaled to [-1, 1]",
            "store what the environment was given: training does the scaling",
            count=int(scaled.sum()),
        )


def clipped_actions(view: View) -> Iterator[Finding]:
    """Actions that pile up at values inside the known bounds, at both ends: at least 1% of all at each.

    The bounds that an environment has are where its policy's actions pile up.
    """
    if view.low is None or view.high is None or view.assumed:
        return
    moments, sample = view.moments["action"], view.sample("action")
    low, high = view.low.cpu().double(), view.high.cpu().double()
    margin = 0.01 * (high - low)
    inside = (moments.low > low + margin) & (moments.high < high - margin) & (moments.high > moments.low)
    piles = ((sample == moments.low).double().mean(0) > 0.01) & ((sample == moments.high).double().mean(0) > 0.01)
    values = [len(column.unique()) for column in sample.T]
    clipped = inside & piles & (torch.tensor(values, device="cpu") > 100)
    if count := int(clipped.sum()):
        yield Finding(
            "clipped-actions",
            f"{which(clipped, 'action', 'dimension')} is clipped to {float(moments.low[clipped][0]):.6g} to "
            f"{float(moments.high[clipped][0]):.6g}, inside the bounds",
            "store what the environment was given; if that was clipped so, the bounds are these: say so",
            count=count,
        )


def idle_actions(view: View) -> Iterator[Finding]:
    """Actions that never change, discrete ones that the environment has not, and a 0 that is never taken."""
    action = view.dataset.get("action")
    if len(action) < 100:
        return
    if action.is_floating_point():
        moments = view.moments["action"]
        constant = moments.low == moments.high
        if count := int(constant.sum()):
            yield Finding(
                "constant-actions",
                f"{which(constant, 'action', 'dimension')} never changes",
                "nothing can be learned about it: find out where it got lost, or drop it",
                count=count,
            )
        return
    smallest, largest = int(action.min()), int(action.max())
    if smallest == largest:
        yield Finding(
            "constant-actions",
            f"all actions are {smallest}",
            "nothing can be learned about others: find out where they got lost",
            count=len(action),
        )
    elif smallest > 0:
        yield Finding(
            "unused-actions",
            f"actions are numbered from {smallest} to {largest}: 0 is never taken",
            "subtract the smallest if the environment counts from 0; a policy will choose by these numbers",
            count=smallest,
        )
    if view.action_count is not None and largest >= view.action_count:
        outside = (action >= view.action_count).reshape(-1).cpu().nonzero()
        yield Finding(
            "actions-outside-bounds",
            f"{len(outside)} actions are none of the environment's {view.action_count}: the largest is {largest}",
            "check their numbering, which is from 0",
            int(outside[0]),
            len(outside),
        )


def reward_scale(view: View) -> Iterator[Finding]:
    """Returns on another scale than the presets have."""
    width = float(view.returns.max() - view.returns.min())
    if len(view.returns) < 2 or not math.isfinite(width) or RETURN_RANGE / _FAR <= width <= RETURN_RANGE * _FAR:
        return
    if width == 0:
        yield Finding(
            "reward-scale",
            "all episodes have the same return",
            "check the rewards: nothing tells good episodes from bad ones",
        )
        return
    # Returns of parts of episodes are no range to scale by: see early-timeouts.
    scale = "" if view.parts else f"multiply rewards by {RETURN_RANGE / width:.6g} (reward_scale='return_range'), or "
    yield Finding(
        "reward-scale",
        f"returns span {width:.6g}; the presets' temperatures are meant for about {RETURN_RANGE:g}",
        f"{scale}set the temperature to this scale, or to 'auto'; sparse rewards of 0 and 1 take the antmaze preset, "
        "which subtracts 1",
    )


CHECKS = (actions_and_bounds, action_units, clipped_actions, idle_actions, reward_scale)
