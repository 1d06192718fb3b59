"""Rows out of order, twice or missing, and the flags that say where episodes end."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from iql_plugins.data.dataset import DONE, REWARD, TERMINATED, chunks, row_bytes
from iql_plugins.data.inspection.view import Finding, View, different, finite, pairs, same
from iql_plugins.keys import next_key, shown

__all__ = ["CHECKS"]

#: Terminals at a time limit that stand out among others, even where time-outs are marked as well.
_SPIKE = 5
#: Other terminal states that must all lie beyond any state that goes on before one that does not is remarkable.
_CERTAIN = 20
#: Share of different observations from which on one that comes again is no coincidence.
_DISTINCT = 0.9
#: Step, as a part of the distance of two random rows, up to which a feature is smooth.
_SMOOTH = 0.25


def timeouts_as_terminals(view: View) -> Iterator[Finding]:
    """Time-outs that are marked as terminal states.

    Lengths just below a time limit are as frequent as the limit itself, unless something happens there. Where
    time-outs are marked, too, only many at once are no coincidence. A single one is none if it is the longest episode
    and the only one whose last state is one in which others go on.
    """
    suggestion = "mark them as timeouts, not as terminals: the value of their last state is not 0"
    if not view.source.timeouts_recorded:
        if count := int(view.terminated.sum()):
            yield Finding(
                "timeouts-as-terminals",
                f"the buffer has not recorded which of its {count} terminal states are time-outs",
                "collect with handle_timeout_termination=True; if episodes end by a time limit, " + suggestion,
                int(view.ends[view.terminated][0]),
                count,
            )
        return
    lengths = view.lengths[view.terminated]
    if len(lengths) == 0:
        return
    longest = int(view.lengths.max())
    at_limit = view.terminated & (view.lengths == longest)
    near = lengths[(lengths < longest) & (lengths >= 0.9 * longest)]
    most = int(near.bincount().max()) if len(near) else 0
    count = int(at_limit.sum())
    if bool(view.cut.any()):
        limit = count >= _SPIKE and count > 3 * most
    else:
        limit = (count >= 2 and count > 2 * most) or (count == 1 and _goes_on_elsewhere(view, at_limit))
    if longest > 1 and limit:
        yield Finding(
            "timeouts-as-terminals",
            f"{count} of {len(lengths)} terminal states come after exactly {longest} steps, which no episode exceeds"
            + (", " if bool(view.cut.any()) else ", and there is no time-out: ")
            + "that looks like a time limit",
            f"if {longest} is a time limit, {suggestion}; the terminals of OGBench's files mark the last steps of "
            "trajectories: read its 'masks' with them",
            int(view.ends[at_limit][0]),
            count,
        )


def _goes_on_elsewhere(view: View, episode: Tensor) -> bool:
    """Whether this episode's last state is within the range of states that go on, and those of all others are not."""
    others = view.terminated & ~episode
    beyond = _beyond(view, view.ends).any(1)
    return int(others.sum()) >= _CERTAIN and bool(beyond[others].all()) and not bool(beyond[episode].any())


def _beyond(view: View, ends: Tensor) -> Tensor:
    """``[E, 2 features]``: whether a final observation is below, or above, all in which an action was taken."""
    sides = [torch.zeros(len(ends), 0, dtype=torch.bool, device="cpu")]
    for key in view.observations:
        after, moments = view.dataset.get(next_key(key)), view.moments[key]
        parts = []
        for part in chunks(len(ends), 2 * row_bytes(after)):
            final = finite(after[ends[part].to(after.device)])
            parts.append(torch.cat([final < moments.low, final > moments.high], 1))
        sides.append(torch.cat(parts))
    return torch.cat(sides, 1)


def terminals_as_timeouts(view: View) -> Iterator[Finding]:
    """Early cuts whose last states are beyond a threshold that no state that goes on has crossed.

    A record can be set at any time, also by the last state; but by three and by a quarter of all early cuts, in the
    same feature on the same side, only if what ended them is a threshold of that feature.
    """
    longest = int(view.lengths.max())
    early = view.ends[view.cut & (view.lengths < longest)]
    if len(early) == 0 or not view.observations:
        return
    sides = _beyond(view, early)
    crossed = sides[:, sides.sum(0) >= 3].any(1)
    count = int(crossed.sum())
    if 4 * count >= len(early) and count >= 3:
        yield Finding(
            "terminals-as-timeouts",
            f"{count} of {len(early)} time-outs before step {longest} end in states beyond those of all steps that go "
            "on: they look like terminal states",
            "mark them as terminals: else they are given the value of a future that they have not",
            int(early[crossed][0]),
            count,
        )


def no_terminals(view: View) -> Iterator[Finding]:
    """No terminal state at all."""
    if not bool(view.terminated.any()):
        yield Finding(
            "no-terminals",
            "no step is terminal",
            "right for a task that only a time limit ends; if states end the task, the terminals got lost",
        )


def terminal_and_timeout(view: View) -> Iterator[Finding]:
    """Steps that are marked as both."""
    if view.source.both:
        yield Finding(
            "terminal-and-timeout",
            f"{view.source.both} steps are marked as terminal and as time-out; they count as terminal",
            "clear the flag that is wrong: a step that only the time limit ended is no terminal",
            view.source.both_row,
            view.source.both,
        )


def early_timeouts(view: View) -> Iterator[Finding]:
    """Cuts at other steps than the last one's: a collector's, or goal switches."""
    early = view.cut_early
    if count := int(early.sum()):
        longest = int(view.lengths[view.cut].max())
        yield Finding(
            "early-timeouts",
            f"{count} of {int(view.cut.sum())} time-outs come before step {longest}, where the last one does",
            "the losses take them as they are; but they are cuts of a collector, or goal switches (maze2d)"
            + (", and the returns of parts do not compare: do not scale rewards by their range" if view.parts else ""),
            int(view.ends[early][0]),
            count,
        )


def unfinished_episode(view: View) -> Iterator[Finding]:
    """Data that end within an episode."""
    if not bool(view.dataset.get(DONE)[-1]):
        yield Finding(
            "unfinished-episode",
            f"the last episode, of {int(view.lengths[-1])} steps, has no end",
            "right for a buffer that was saved under way; else the file was cut short, or lost its last flag",
            int(view.ends[-1]),
            1,
        )


def missing_final_observations(view: View) -> Iterator[Finding]:
    """Cut episodes without the observation after their last step."""
    suggestion = "store the observation after the last step: a cut episode bootstraps from it"
    if view.source.dropped:
        yield Finding(
            "missing-final-observations",
            f"{view.source.dropped} transitions were left out: their episode was cut, and the source has no "
            "observation after it",
            suggestion,
            count=view.source.dropped,
        )
        return
    cut = view.ends[view.cut]
    if len(cut) == 0:
        return
    own, zero = (torch.ones(len(cut), dtype=torch.bool, device="cpu") for _ in range(2))
    # Where states often rest, or are zeros, they may be so before a cut as well.
    some = torch.arange(1024, device="cpu") * len(view.dataset) // 1024
    resting, nought = torch.ones(2, len(some), dtype=torch.bool, device="cpu")
    for before, after in pairs(view.dataset):
        resting &= same(after[some], before[some])
        nought &= same(before[some], torch.zeros_like(before[some]))
        for part in chunks(len(cut), row_bytes(before)):
            final = after[cut[part]]
            own[part] &= same(final, before[cut[part]])
            zero[part] &= same(final, torch.zeros_like(final))
    within = ~view.dataset.get(DONE).reshape(-1).cpu()[some]
    own &= 20 * int((resting & within).sum()) < len(some)
    zero &= 20 * int(nought.sum()) < len(some)
    reset = (_followed(view) & ~_continued(view))[view.cut]
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


def _followed(view: View) -> Tensor:
    """Of each episode, whether its final observation is the first of the next one."""
    following = (view.ends + 1).clamp(max=len(view.dataset) - 1)
    equal = following > view.ends
    for before, after in pairs(view.dataset):
        for part in chunks(len(equal), row_bytes(before)):
            equal[part] &= same(after[view.ends[part]], before[following[part]])
    return equal


def _continued(view: View) -> Tensor:
    """Of each episode, whether the next one goes on where it stopped, rather than begins anew.

    That is the same at first sight where a collector stores the next episode's first observation as the final one.
    But then the last step is a jump. It is told from a step by the features that move little in a step, compared
    with how different two rows are; where there is none, it cannot be told.
    """
    followed = _followed(view)
    none = torch.zeros_like(followed)
    if not bool(followed.any()) or view.distinct < _DISTINCT:
        return none
    # A start that is always the same is no place at which an episode goes on.
    starts = view.observation_marks[view.starts.numpy()]
    _, inverse, times = np.unique(starts, return_inverse=True, return_counts=True)
    alone = torch.from_numpy(times[inverse] == 1)
    followed[:-1] &= alone[1:]
    rows = view.ends[followed]
    if len(rows) == 0:
        return none
    ratios = []
    random = torch.Generator("cpu").manual_seed(0)
    for key in view.observations:
        before, after = view.numbers[key], view.dataset.get(next_key(key))
        some = torch.randint(len(before), (2, 1024), generator=random, device="cpu")
        one, other = (finite(before[index.to(before.device)]) for index in some)
        apart = (one - other).abs().mean(0)
        step = (finite(after[some[0].to(after.device)]) - one).abs().mean(0)
        smooth = (apart > 0) & (step < _SMOOTH * apart) & (step > 0)
        jumps = [
            finite(after[rows[part].to(after.device)]) - finite(before[rows[part].to(before.device)])
            for part in chunks(min(len(rows), 1024), 2 * row_bytes(before))
        ]
        ratios += (torch.cat(jumps).abs().mean(0) / apart)[smooth].tolist()
    return followed if ratios and sum(ratios) / len(ratios) < 2 * _SMOOTH else none


def _at_goals(view: View) -> Tensor:
    """Of each episode, whether it ended in the terminal state of a task that its trajectory goes on behind.

    Where rewards were computed anew for a goal that trajectories pass (OGBench's masks), terminals mark the steps of a
    reward that no other step has.
    """
    terminated = view.dataset.get(TERMINATED).reshape(-1).cpu()
    if not 2 <= int(terminated.sum()) < len(terminated):
        return torch.zeros_like(view.terminated)
    reward = view.dataset.get(REWARD).reshape(-1).cpu()
    return view.terminated & torch.equal(reward == reward[terminated][0], terminated)


def continued_episodes(view: View) -> Iterator[Finding]:
    """Ends after which the episode goes on: its next observation is the next row's, and a step away.

    Two continuous states are not equal by chance, and a reset is no small step.
    """
    followed = _continued(view)
    at_goals = followed & _at_goals(view)
    if count := int(at_goals.sum()):
        yield Finding(
            "continued-at-goals",
            f"{count} episodes end in a terminal state from which the next row goes on, at a reward that no other step "
            "has",
            "right where rewards are of one goal that trajectories pass (OGBench's masks); where goals change, as in "
            "maze2d, clear the terminals",
            int(view.ends[at_goals][0]),
            count,
        )
    continued = followed & ~at_goals
    if count := int(continued.sum()):
        terminals = int((continued & view.terminated).sum())
        yield Finding(
            "continued-episodes",
            f"{count} episodes, {terminals} of them terminated, go on after their end: the next row begins with their "
            "final observation",
            "clear the flags that are too many; parts that a collector cut, or goals that were switched, are timeouts, "
            "not terminals: behind a terminal there is no value",
            int(view.ends[continued][0]),
            count,
        )


def inconsistent_observations(view: View) -> Iterator[Finding]:
    """Next observations that are not the next row's, within an episode."""
    done = view.dataset.get(DONE).reshape(-1).cpu()
    wrong = torch.zeros(max(len(done) - 1, 0), dtype=torch.bool, device="cpu")
    for before, after in pairs(view.dataset):
        for rows in chunks(len(wrong), row_bytes(before)):
            wrong[rows] |= ~same(after[rows], before[rows.start + 1 : rows.stop + 1])
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


def duplicate_episodes(view: View) -> Iterator[Finding]:
    """Episodes that are there twice, where one is not like the other by itself: in a grid, some are."""
    marks = np.stack([view.episode_marks, view.lengths.numpy().astype(np.uint64)], 1)
    _, first = np.unique(marks, axis=0, return_index=True)
    again = np.ones(len(marks), bool)
    again[first] = False
    once = view.observation_marks[~np.repeat(again, view.lengths.numpy())]
    if (count := int(again.sum())) and different(once) > len(once) / 2:
        episode = int(np.flatnonzero(again)[0])
        row = int(view.starts[episode])
        yield Finding(
            "duplicate-episodes",
            f"{count} of {len(marks)} episodes equal an earlier one; the first of them begins in row {row}",
            "drop them, unless they are meant to count twice: a split for validation would leak",
            row,
            count,
        )


def repeated_rows(view: View) -> Iterator[Finding]:
    """Episodes that begin with a step from the midst of another one.

    Where two thirds of all observations are different ones, states are no cells of a grid to which one comes back; and
    an episode does not begin anew amid another one.
    """
    if view.distinct < 2 / 3:
        return
    starts = view.starts.numpy()
    marks, midst = view.row_marks, np.ones(len(view.row_marks), bool)
    midst[starts] = False
    again = np.zeros(len(starts), bool)
    for rows in chunks(len(marks), 8 * marks.itemsize):
        again |= np.isin(marks[starts], marks[rows][midst[rows]])
    # A state at rest is like itself.
    for before, after in pairs(view.dataset):
        again &= ~same(after[view.starts], before[view.starts]).numpy()
    if count := int(again.sum()):
        row = int(starts[again][0])
        yield Finding(
            "repeated-rows",
            f"{count} of {len(starts)} episodes begin with a step that is in the midst of another one, first in row "
            f"{row}",
            "drop the steps that are there twice, an end that was written twice among them: they count double, and "
            f"{shown('observation')} of one is no start",
            row,
            count,
        )


CHECKS = (
    timeouts_as_terminals,
    terminals_as_timeouts,
    no_terminals,
    terminal_and_timeout,
    early_timeouts,
    unfinished_episode,
    missing_final_observations,
    inconsistent_observations,
    continued_episodes,
    duplicate_episodes,
    repeated_rows,
)
