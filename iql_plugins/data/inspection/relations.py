"""What belongs together in a step: the action that explains the next observation, and the reward that they explain.

Only a better explanation by another row, by far and in almost every step, or none at all, is a finding.
"""

import math
from collections.abc import Callable, Iterator

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data.dataset import REWARD
from iql_plugins.data.inspection.samples import (
    LAGS,
    NOTHING,
    NOTHING_SIMILAR,
    Columns,
    Explained,
    Regression,
    Steps,
    actions_at,
    deviations,
    nearest,
    rewards_at,
)
from iql_plugins.data.inspection.view import Finding, View, which
from iql_plugins.keys import shown

__all__ = ["CHECKS", "shifted"]

#: How many times the squared error of a step's own action must be that of another row's, and the part of the variance
#: that it must be. What smooth actions leave of a difference is a factor of 1.4 at most in 25 human demonstrations; in
#: gymnasium's classic tasks, a step's own is always explained best.
_WORSE_ACTION = 3.0, 0.001
#: Rewards are no linear function of a step: of little that is unexplained, the regression's own error is a part, which
#: differs by a factor of 2 between neighbouring rows.
_WORSE_REWARD = 4.0, 0.05
#: And further off, where a command that is carried out slowly shows in ten steps' time: 2 in the same demonstrations.
_FAR_WORSE = 4.0, 0.05
#: How much less of the difference of two rewards than of a reward is left unexplained, if rewards are sums of those
#: before, and of those to come: a cost that falls as the task is solved looks a little like the latter.
_LESS_UNEXPLAINED = 0.9, 0.5
#: How many times larger errors, in the mean and in the median, must be in the data that a fit is not for.
_LOST = 5.0, 3.0
#: Steps of a third that must lie within the range of the other, for a fit to be held against them.
_COMMON = 50
#: In deviations of a correlation of nothing, above which there is one beyond doubt.
_SOMETHING = 20.0
#: Rows, features and actions (or rewards) of which larger lags are looked for.
_LAG_ROWS, _LAG_FEATURES, _LAG_TARGETS = 2**14, 12, 4


def related_steps(view: View) -> Iterator[Finding]:
    """What :data:`_OF_STEPS` find in a sample of steps, if there are enough of them."""
    steps = Steps.of(view)
    if steps is not None:
        for check in _OF_STEPS:
            yield from check(view, steps)


def actions_of_steps(view: View, steps: Steps) -> Iterator[Finding]:
    """Actions of other rows than their own, or of none: what an action did shows in the observation after it."""
    move = steps.after - steps.before
    actions = Explained(torch.cat([steps.before, move, steps.rewards[0]], 1), steps.actions, steps.folds)
    late, surely = actions.shift(*_WORSE_ACTION)
    if not bool(surely.any()) and (lag := _likely_lag(view, actions_at)):
        far = {0: steps.actions[0], lag: actions_at(view, (steps.rows + lag) % len(view.dataset))}
        late, surely = Explained(actions.inputs, far, steps.folds).shift(*_FAR_WORSE)
    if bool(surely.any()):
        yield shifted("actions", "action", late[surely], surely)
    elif actions.unrelated and bool(steps.actions[0].var(0).gt(0).any()):
        yield Finding(
            "unrelated-actions",
            "observations, next observations and rewards tell nothing of the actions",
            "the actions are not those of these steps, or do nothing: find out in which order they were stored",
            count=len(view.dataset),
        )


def _likely_lag(view: View, values: Callable[[View, Tensor], Tensor]) -> int:
    """By how many rows actions, or rewards, are late if they are by more than :data:`LAGS`; 0 if that is not likely.

    It is where they correlate best with an observation or its change: cross-correlations by Fourier transforms, which
    take no account of episodes.
    """
    size = 2 ** int(math.log2(min(len(view.dataset), _LAG_ROWS)))
    rows = torch.arange(size, device="cpu")
    observations = Columns.observations(view, _LAG_FEATURES)
    before = observations.at(rows)
    inputs = torch.cat([before, observations.at(rows, after=True) - before], 1)
    spectra = [torch.fft.rfft(_standard(part), dim=0) for part in (inputs, values(view, rows)[:, :_LAG_TARGETS])]
    best = torch.zeros(size, dtype=torch.float64, device="cpu")
    for spectrum in spectra[1].T:
        products = spectra[0].conj() * spectrum.unsqueeze(1)
        best = torch.maximum(best, torch.fft.irfft(products, n=size, dim=0).abs().amax(1))
    near = float(best[list(LAGS)].max())
    best[list(LAGS)] = 0.0
    lag = int(best.argmax())
    return 0 if float(best[lag]) <= near else lag if lag <= size // 2 else lag - size


def _standard(values: Tensor) -> Tensor:
    centred = values - values.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp_min(1e-12)


def shifted(noun: str, key: NestedKey, late: Tensor, flags: Tensor) -> Finding:
    """The finding that the flagged entries of a key are so many rows late."""
    rows = int(late.mode().values)
    where = f"{abs(rows)} row{'s' if abs(rows) > 1 else ''} too {'late' if rows > 0 else 'early'}"
    return Finding(
        f"shifted-{noun}",
        f"{which(flags, key, 'dimension')} is {where}: the step {abs(rows)} "
        f"{'before' if rows > 0 else 'after'} it explains it better than its own",
        f"move the {noun} back: a policy would learn what was done in other states. If the environment itself is as "
        "late, its observation should have what is under way in it",
        count=int(flags.sum()),
    )


def rewards_of_steps(view: View, steps: Steps) -> Iterator[Finding]:
    """Rewards of other rows than their own, or of none, or sums of them: what a reward is for shows in its step."""
    own = steps.rewards[0]
    if float(own.var()) <= 1e-18:
        return
    inputs = torch.cat([steps.before, steps.actions[0], steps.after], 1)
    rewards = Explained(inputs, steps.rewards, steps.folds)
    late, surely = rewards.shift(*_WORSE_REWARD)
    if not bool(surely.any()) and (lag := _likely_lag(view, rewards_at)):
        far = {0: own, lag: rewards_at(view, (steps.rows + lag) % len(view.dataset))}
        late, surely = Explained(inputs, far, steps.folds).shift(*_FAR_WORSE)
    if bool((summed := _summed(view, rewards)).any()):
        what = "the sum of those before" if bool(summed[0]) else "the sum of those to come"
        yield Finding(
            "summed-rewards",
            f"a step explains the difference of two rewards better than its reward, which looks like {what}",
            "store the reward of each step by itself: losses sum them up",
        )
    elif bool(surely.any()):
        yield shifted("rewards", REWARD, late[surely], surely)
    elif rewards.unrelated:
        yield Finding(
            "unrelated-rewards",
            "observations, actions and next observations tell nothing of the rewards",
            "the rewards are not those of these steps, or are noise: nothing can be learned from them",
        )


def _summed(view: View, rewards: Explained) -> Tensor:
    """``[2]``: whether rewards are the sums of those before them, or of those to come.

    A step then explains how the sum changes better than the sum, which changes little in a step, takes many values, and
    begins, or ends, with a single reward.
    """
    own, previous, following = (rewards.values_of(lag) for lag in (0, -1, 1))
    predicted = [own[0] - previous[0], own[0] - following[0]]
    true = [own[1] - previous[1], own[1] - following[1]]
    unexplained = (rewards.errors[LAGS.index(0)].mean() / own[1].var()).item()
    size = own[1].square().mean().sqrt()
    found = []
    many = len(own[1].unique()) >= 10 and unexplained > 0.01
    for guess, change, rows, share in zip(predicted, true, (view.starts, view.ends), _LESS_UNEXPLAINED, strict=True):
        if float(change.var()) > 1e-9 * float(own[1].var()):
            less = float((guess - change).square().mean() / change.var()) < share * unexplained
        else:
            # Sums of what is always the same grow by it; what does not change from row to row is no sum.
            less = float(change.mean().abs()) > 1e-9 * float(own[1].std())
        found.append(
            many
            and less
            and float(change.var()) < 0.2 * float(own[1].var())
            and bool(rewards_at(view, rows).abs().median() < 0.25 * size)
        )
    return torch.tensor(found, device="cpu")


def noise_features(view: View, steps: Steps) -> Iterator[Finding]:
    """Features that neither the steps around them, nor an action, nor a reward tell anything of, unlike others."""
    others = [*(steps.actions[lag] for lag in (-1, 0)), *(steps.rewards[lag] for lag in (-1, 0))]
    around = torch.cat([steps.previous, steps.after, *others], 1)
    related = deviations(Regression(around).out_of_sample(steps.before, steps.folds), steps.before)
    noise = related < NOTHING
    if not bool(noise.any()) or not bool((related[related.isfinite()] > _SOMETHING).any()):
        return
    noise &= deviations(steps.before[nearest(around)], steps.before) < NOTHING_SIMILAR
    for key in dict.fromkeys(name for name, _ in steps.names):
        of_key = torch.tensor([other == key for other, _ in steps.names], device="cpu")
        if count := int((noise & of_key).sum()):
            indices = [
                index for (other, index), flag in zip(steps.names, noise.tolist(), strict=True) if flag and other == key
            ]
            yield Finding(
                "noise-features",
                f"{count} features of {shown(key)} have nothing to do with the step before or after, nor with action "
                f"or reward: {', '.join(map(str, indices[:10]))}",
                "drop them, or find out where they got out of order",
                count=count,
            )


def changed_units(view: View, steps: Steps) -> Iterator[Finding]:
    """Whether the first and the last third of the data follow different rules.

    Policies change as agents learn, the environment does not. A fit to one third must be about as bad for the other as
    no fit at all (of actions: as one without them), in both directions, and good in its own: where an agent has seen
    little at first, what it learned from much at last holds for that. Actions and rewards are judged in steps that lie
    within what the fit is to: beyond, only the linear part of a fit means anything.
    """
    thirds, judged = (steps.thirds == 0, steps.thirds == 2), steps.folds == 1
    move = steps.after - steps.before
    inputs = torch.cat([steps.before, steps.actions[0]], 1)
    looks = (
        ("observations", inputs, move, None),
        ("actions", inputs, move, steps.before),
        ("rewards", torch.cat([inputs, steps.after], 1), steps.rewards[0], None),
    )
    for noun, given, targets, without in looks:
        # A third in which nothing happens yet, such as no reward, has no variance to hold an error against.
        least = 0.1 * targets[thirds[0] | thirds[1]].var(0) + 1e-24
        changed = torch.ones_like(least, dtype=torch.bool)
        for part, other in (thirds, thirds[::-1]):
            common = judged & (_within(given, other) if noun != "observations" else judged)
            if int((part & common).sum()) < _COMMON:
                changed[:] = False
                break
            known, lost = (_sizes(given, targets, fitted & ~judged, part & common) for fitted in (part, other))
            if without is None:
                bad = 0.5 * torch.maximum(targets[part].var(0), least)
            else:
                bad = torch.maximum(2 * _sizes(without, targets, part & ~judged, part & common)[0], least)
            larger = lost > known * known.new_tensor(_LOST).unsqueeze(1)
            changed &= larger.all(0) & (lost[0] > bad) & (known[0] < bad)
        if bool(changed.any()):
            yield Finding(
                "changed-units",
                f"{noun} of the last third of the data do not follow from steps as those of the first third do, "
                f"in {int(changed.sum())} of {len(changed)} features",
                "units, signs or the order of columns change on the way, or two environments were put together: bring "
                "them to one",
                int(steps.rows[thirds[1]][0]),
                int(changed.sum()),
            )
            return


def _within(inputs: Tensor, rows: Tensor) -> Tensor:
    """``[n]``: whether inputs are within the range of those in the flagged rows, or a tenth of it beyond."""
    low, high = inputs[rows].amin(0), inputs[rows].amax(0)
    margin = 0.1 * (high - low)
    return ((inputs >= low - margin) & (inputs <= high + margin)).all(1)


def _sizes(inputs: Tensor, targets: Tensor, fitted: Tensor, judged: Tensor) -> Tensor:
    """``[2, targets]``: mean and median, which a few extreme steps do not decide, of the better fit's errors."""
    errors = (Regression(inputs).fit(fitted, targets, judged) - targets[judged]).square()
    return torch.stack([errors.mean(1).amin(0), errors.median(1).values.amin(0)]) + 1e-24


_OF_STEPS = (actions_of_steps, rewards_of_steps, noise_features, changed_units)

CHECKS = (related_steps,)
