"""What is in a dataset, and what is wrong with it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from iql_plugins.data import Dataset, read_dataset
from iql_plugins.data.inspection import actions, borders, episodes, relations, values
from iql_plugins.data.inspection.view import SEVERITIES, Finding, Severity, View
from iql_plugins.documents import finite_json
from iql_plugins.spaces import Box, Discrete, Spaces

__all__ = ["SEVERITIES", "Finding", "Report", "Severity", "Statistics", "inspect"]

Bound = float | Sequence[float] | Tensor


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
    """What :func:`inspect` found.

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
        """The report as JSON values, each finding with its severity; None in place of numbers that are not finite."""
        findings = [{"severity": finding.severity, **asdict(finding)} for finding in self.findings]
        document: dict[str, Any] = finite_json(asdict(self) | {"findings": findings})
        return document

    def findings_from(self, severity: Severity) -> tuple[Finding, ...]:
        """Those that matter at least that much."""
        mild = tuple(SEVERITIES)[: tuple(SEVERITIES).index(severity)]
        return tuple(finding for finding in self.findings if finding.severity not in mild)


def inspect(
    source: object,
    *,
    action_low: Bound | None = None,
    action_high: Bound | None = None,
    spaces: Spaces | None = None,
    trust_pickle: bool = False,
    discrete: bool | None = None,
) -> Report:
    """Counts, returns and shapes of a dataset, and findings with a severity and a suggestion each.

    >>> report = inspect("pendulum-v1-sac")
    >>> report.episodes, round(report.returns.mean, 1), [finding.code for finding in report.findings]
    (100, -325.8, ['no-terminals'])

    =============================== ==================================================================
    code                            found
    =============================== ==================================================================
    ``non-finite``                  NaN or infinity
    ``outliers``                    values ten thousand times as far out as others
    ``constant-features``           observations that never change
    ``repeated-features``           observations that are there twice
    ``stuck-features``              observations that come through resets unchanged, and move elsewhere
    ``noise-features``              observations that have nothing to do with anything
    ``shifted-features``            observations that are in another row than the rest
    ``feature-scale``               observations too large or too small for a network
    ``uneven-scales``               observations on scales that differ by 30 times and more
    ``rounded-observations``        observations with fewer digits than a step changes
    ``standardised``                observations or rewards that are no environment's
    ``observations-outside-bounds`` observations that the environment's space does not have
    ``timeouts-as-terminals``       time-outs that are marked as terminal states
    ``terminals-as-timeouts``       terminal states that are marked as time-outs
    ``no-terminals``                no terminal state at all
    ``terminal-and-timeout``        steps marked as both
    ``early-timeouts``              episodes cut before others were, collector's cuts or goal switches
    ``unfinished-episode``          data that end within an episode
    ``missing-final-observations``  cut episodes without the observation after their last step
    ``inconsistent-observations``   next observations that are not the next row's
    ``continued-at-goals``          terminal states of a goal that the trajectory goes on behind
    ``continued-episodes``          ends after which the episode goes on
    ``duplicate-episodes``          episodes that are there twice
    ``repeated-rows``               episodes that begin with a step of another one
    ``actions-outside-bounds``      actions that the environment clips, or has not
    ``actions-on-bounds``           actions where a squashed policy has no density
    ``action-units``                actions that the bounds are not those of
    ``clipped-actions``             actions that were clipped to less than the bounds
    ``constant-actions``            actions that never change
    ``unused-actions``              discrete actions that do not count from 0
    ``shifted-actions``             actions that are in another row than what they did
    ``unrelated-actions``           actions that steps tell nothing of
    ``reward-scale``                returns on another scale than the presets have
    ``shifted-rewards``             rewards that are in another row than what they are for
    ``summed-rewards``              rewards that are sums of rewards
    ``unrelated-rewards``           rewards that steps tell nothing of
    ``changed-units``               data whose first and last third follow different rules
    =============================== ==================================================================

    Args:
        source: a :class:`~iql_plugins.data.Dataset`, or anything that :func:`~iql_plugins.data.load_dataset` knows.
            Values that are not finite are a finding, not an error.
        action_low: the environment's lower bound of actions, a number or ``[act]``. None asks ``spaces``, and takes -1
            where they have none.
        action_high: the upper bound, likewise; both or neither.
        spaces: the environment's; None asks the source.
        trust_pickle: see ``load_dataset``.
        discrete: see ``load_dataset``.

    Raises:
        DatasetError: if the source cannot be loaded.
        ValueError: for one bound without the other, or bounds of another shape than the actions.
    """
    if (action_low is None) != (action_high is None):
        raise ValueError("action_low and action_high belong together: give both or neither")
    dataset = source
    if not isinstance(dataset, Dataset):
        dataset = read_dataset(source, trust_pickle=trust_pickle, discrete=discrete, finite=False)
    view = _view(dataset, spaces or dataset.spaces, action_low, action_high)
    entries = dict(dataset.tensors.items(True, True))
    names = {key: key if isinstance(key, str) else ".".join(key) for key in entries}
    return Report(
        name=dataset.source,
        transitions=len(dataset.tensors),
        episodes=len(view.ends),
        returns=Statistics.of(view.returns),
        lengths=Statistics.of(view.lengths),
        shapes={names[key]: tuple(tensor.shape[1:]) for key, tensor in entries.items()},
        dtypes={names[key]: str(tensor.dtype).removeprefix("torch.") for key, tensor in entries.items()},
        findings=tuple(finding for check in _CHECKS for finding in check(view)),
    )


def _view(dataset: Dataset, spaces: Spaces | None, action_low: Bound | None, action_high: Bound | None) -> View:
    action = dataset.tensors.get("action")
    space = spaces.action if spaces is not None else None
    low = high = None
    assumed = False
    if action.is_floating_point():
        if action_low is None or action_high is None:
            known = isinstance(space, Box) and space.low is not None and space.high is not None
            assumed = not known
            action_low, action_high = (space.low, space.high) if known else (-1.0, 1.0)  # type: ignore[union-attr]
        low, high = (_bound(name, bound, action) for name, bound in (("low", action_low), ("high", action_high)))
        if not bool((low < high).all()):
            raise ValueError("action_low must be below action_high")
    return View(
        dataset,
        low,
        high,
        assumed,
        spaces.observations if spaces is not None else {},
        space.start + space.n if isinstance(space, Discrete) else None,
    )


def _bound(name: str, bound: Bound | None, action: Tensor) -> Tensor:
    values = torch.as_tensor(bound, dtype=torch.float32, device=action.device)
    if values.shape not in ((), action.shape[1:]):
        raise ValueError(
            f"action_{name} must be a number or of shape {list(action.shape[1:])}, got {list(values.shape)}"
        )
    return values.expand(action.shape[1:])


_CHECKS = (*values.CHECKS, *episodes.CHECKS, *actions.CHECKS, *borders.CHECKS, *relations.CHECKS)
