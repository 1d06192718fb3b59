"""How sure of an estimate one can be: the bootstrap over episodes, and over seeds."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iql_plugins.ope.estimators import Array

__all__ = ["Criterion", "bootstrap_interval", "difference"]

RESAMPLES = 2000
CONFIDENCE = 0.95
#: Draws that are computed together.
_BATCH = 100


def bootstrap_interval(sizes: Sequence[int], statistic: Callable[..., Any]) -> tuple[float, float]:
    """The 95% percentile-bootstrap interval of a statistic.

    Efron 1979. Of several causes of chance (seeds, episodes) each is drawn independently of the others (the pigeonhole
    bootstrap, Owen 2007, arXiv:0712.1111). The draws are the same ones for every statistic of the same sizes.

    >>> low, high = bootstrap_interval([100], lambda rows: np.arange(100.0)[rows].mean(-1))
    >>> 43 < low < 49.5 < high < 56
    True

    Args:
        sizes: how many there are of each cause.
        statistic: from an array of drawn indices ``[*D, size]`` for each, to ``[*D]``.

    Returns:
        Lower and upper end; NaN if a cause has a single one, or the statistic is NaN.

    Raises:
        ImportError: without scipy; says how to install it.
    """
    try:
        from scipy.stats import DegenerateDataWarning, bootstrap
    except ImportError as error:
        raise ImportError("intervals need scipy: pip install 'iql-plugins[cli]'") from error
    if min(sizes) < 2:
        return math.nan, math.nan
    point = float(statistic(*map(np.arange, sizes)))
    if not math.isfinite(point):
        return math.nan, math.nan
    with warnings.catch_warnings():
        # Of another method's interval; ours is NaN where a draw has none.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            [np.arange(size) for size in sizes],
            lambda *drawn, axis=-1: statistic(*drawn),
            n_resamples=RESAMPLES,
            batch=_BATCH,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            # Not "rng", the name of 1.15 and later: both take a generator.
            random_state=np.random.default_rng(0),
        ).confidence_interval
    return float(result.low), float(result.high)


@dataclass(frozen=True)
class Criterion:
    """What a policy is judged by, with a 95% interval over episodes.

    Attributes:
        value: the estimate.
        low: lower end of the interval; NaN where there is none.
        high: upper end.
        sizes: episodes; before them seeds, where the estimate has several.
        statistic: the estimate of drawn seeds and episodes, see :func:`bootstrap_interval`.
        effective_episodes: of estimates by importance sampling, how many episodes carry it; None for others.
    """

    value: float
    low: float
    high: float
    sizes: tuple[int, ...] = field(repr=False)
    statistic: Callable[..., Any] = field(repr=False, compare=False)
    effective_episodes: float | None = None

    @classmethod
    def mean(cls, values: Array) -> "Criterion":
        """The mean of one value an episode.

        >>> Criterion.mean(np.array([[1.0, 3.0], [1.0, 3.0]])).value
        2.0

        Args:
            values: ``[E]``, or ``[seeds, E]``; the interval of a single seed's is over its episodes alone, and that of
                a single episode over its seeds.
        """
        values = np.asarray(values, np.float64)
        sizes = [size for size in values.shape if size > 1] or [1]
        grid = values.reshape(sizes)

        def statistic(*drawn: Array) -> Any:
            if len(drawn) == 1:
                return grid[drawn[0]].mean(-1)
            return grid[drawn[0][..., :, None], drawn[1][..., None, :]].mean((-2, -1))

        return cls.of(statistic, sizes)

    @classmethod
    def of(
        cls, statistic: Callable[..., Any], sizes: Sequence[int], effective_episodes: float | None = None
    ) -> "Criterion":
        """The criterion that a statistic is of all episodes; arguments as the attributes."""
        value = float(statistic(*map(np.arange, sizes)))
        return cls(value, *bootstrap_interval(sizes, statistic), tuple(sizes), statistic, effective_episodes)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        document: dict[str, Any] = {"value": self.value, "confidence_95": [self.low, self.high]}
        effective = self.effective_episodes
        return document if effective is None else document | {"effective_episodes": effective}


def difference(first: Criterion, second: Criterion) -> Criterion:
    """The first less the second, with the interval of the difference: both of the same draws of episodes.

    What makes an episode easy makes it easy for both policies, which the two intervals do not know: they may overlap
    where this one is without 0.

    >>> difference(Criterion.mean(np.array([1.0, 9.0])), Criterion.mean(np.array([0.0, 8.0]))).low
    1.0

    Raises:
        ValueError: if they are of different numbers of episodes or seeds.
    """
    if first.sizes != second.sizes:
        raise ValueError(f"both must be of the same episodes and seeds, got {first.sizes} and {second.sizes}")
    return Criterion.of(lambda *drawn: first.statistic(*drawn) - second.statistic(*drawn), first.sizes)
