"""Means of returns, and how sure of them one can be; curves of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iql_plugins.cli.errors import mistakes
from iql_plugins.cli.reference_scores import normalized_score
from iql_plugins.ope.intervals import Criterion

__all__ = ["Curve", "Estimate", "estimate", "metric_curve", "return_curve", "with_interval"]

#: Of a metric's curve: no picture shows more.
MOST_POINTS = 50


@dataclass(frozen=True)
class Estimate:
    """A mean return.

    Attributes:
        mean: over all episodes of all seeds.
        low: lower end of the 95% confidence interval; NaN from a single episode.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def interval(self) -> str:
        """For people."""
        return "none of one episode" if math.isnan(self.low) else f"{self.low:.1f} to {self.high:.1f}"

    def as_dict(self, env: str | None) -> dict[str, Any]:
        """JSON values; with D4RL's normalised score if that is known for the environment."""
        interval = None if math.isnan(self.low) else [self.low, self.high]
        document: dict[str, Any] = {"mean_return": self.mean, "confidence_95": interval}
        score = normalized_score(env, self.mean)
        return document if score is None else document | {"normalized_score": score}


def with_interval(value: float, low: float, high: float) -> str:
    """A number and its interval for a table.

    >>> with_interval(1.0, 0.5, 1.25)
    '1 (0.5 to 1.25)'
    >>> with_interval(1.0, math.nan, math.nan)
    '1'
    """
    if math.isnan(low):
        return f"{value:.4g}"
    return f"{value:.4g} ({low:.4g} to {high:.4g})"


def estimate(returns: Sequence[Sequence[float]]) -> Estimate:
    """The mean of returns with a 95% interval over seeds and over episodes.

    Both are causes of chance on their own, because episode i starts from the same state for every seed: episodes are
    drawn (a percentile bootstrap), and to each draw comes an error of Student's t over the seeds, which a bootstrap of
    a few would make too small. Two seeds have an interval of 12.7 of their standard errors to each side, five 2.8.

    Args:
        returns: ``[seeds, episodes]``; a single seed's interval is over its episodes alone.
    """
    with mistakes(ImportError):
        result = Criterion.mean(np.asarray(returns, np.float64))
    return Estimate(result.value, result.low, result.high)


@dataclass(frozen=True)
class Curve:
    """A quantity by gradient steps, all of them of the same length.

    Attributes:
        steps: ascending.
        mean: over seeds.
        low: lower end of a band around it.
        high: upper end.
    """

    steps: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def return_curve(by_seed: Sequence[Sequence[tuple[int, Sequence[float]]]]) -> Curve:
    """The mean return with its 95% interval, where all seeds were evaluated.

    In a run whose evaluations were changed on the way, each seed has changed at a step of its own.

    Args:
        by_seed: steps and returns of the evaluations of each seed, at least one.
    """
    columns = [dict(evaluations) for evaluations in by_seed]
    steps = sorted(set[int].intersection(*map(set, columns)))
    estimates = [
        estimate([returns[: min(map(len, column))] for returns in column])
        for column in ([evaluations[step] for evaluations in columns] for step in steps)
    ]
    return Curve(steps, [e.mean for e in estimates], [e.low for e in estimates], [e.high for e in estimates])


def metric_curve(by_seed: Sequence[Sequence[Mapping[str, float]]], name: str) -> Curve:
    """A metric where all seeds have it, by means of neighbours where there are many; the band is the seeds' range.

    Args:
        by_seed: rows of ``metrics.csv`` of each seed, at least one.
        name: of the metric.
    """
    columns = [{row["step"]: row[name] for row in rows if name in row} for rows in by_seed]
    steps = sorted(set[float].intersection(*map(set, columns)))
    values = np.array([[column[step] for step in steps] for column in columns])
    parts = np.array_split(np.arange(len(steps)), min(len(steps), MOST_POINTS)) if steps else []
    means = np.array([values[:, part].mean(axis=1) for part in parts]).reshape(len(parts), len(columns))
    return Curve(
        [steps[part[-1]] for part in parts],
        means.mean(axis=1).tolist(),
        means.min(axis=1).tolist(),
        means.max(axis=1).tolist(),
    )
