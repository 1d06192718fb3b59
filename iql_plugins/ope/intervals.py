"""How sure of an estimate one can be: the bootstrap over episodes, and Student's t over seeds."""

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
    return _interval(_drawn(sizes, statistic))


def _interval(drawn: Array | None) -> tuple[float, float]:
    """The ends between which 95% of drawn estimates are."""
    if drawn is None:
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return float(low), float(high)


def _drawn(sizes: Sequence[int], statistic: Callable[..., Any]) -> Array | None:
    """The bootstrap's draws of a statistic, ``[RESAMPLES]``; None where there are none."""
    try:
        from scipy.stats import DegenerateDataWarning, bootstrap
    except ImportError as error:
        raise ImportError("intervals need scipy: pip install 'iql-plugins[cli]'") from error
    if min(sizes) < 2:
        return None
    point = float(statistic(*map(np.arange, sizes)))
    if not math.isfinite(point):
        return None
    with warnings.catch_warnings():
        # Of another method's interval; ours is NaN where a draw has none.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        drawn: Array = bootstrap(
            [np.arange(size) for size in sizes],
            lambda *drawn, axis=-1: statistic(*drawn),
            n_resamples=RESAMPLES,
            batch=_BATCH,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            # Not "rng", the name of 1.15 and later: both take a generator.
            random_state=np.random.default_rng(0),
        ).bootstrap_distribution
    return drawn


def _drawn_errors(fits: Sequence[float]) -> Array:
    r"""Draws of how far off the mean of several seeds is, :math:`t_{K-1}\, s / \sqrt K`: ``[RESAMPLES]``.

    Of three seeds the bootstrap would have intervals of half the width that they must have: all three are on the same
    side by chance one time in four.
    """
    from scipy.stats import t

    if not np.isfinite(fits).all():
        return np.full(RESAMPLES, math.nan)
    spread = float(np.std(fits, ddof=1)) / math.sqrt(len(fits))
    # Its quantiles, in no order: so are the ends of an interval.
    quantiles = t.ppf((np.arange(RESAMPLES) + 0.5) / RESAMPLES, len(fits) - 1)
    drawn: Array = spread * np.random.default_rng(1).permutation(quantiles)
    return drawn


@dataclass(frozen=True)
class Criterion:
    """What a policy is judged by, with a 95% interval over episodes and seeds.

    Attributes:
        value: the estimate.
        low: lower end of the interval; NaN where there is none.
        high: upper end.
        episodes: how many there are.
        statistic: the estimate of drawn episodes, see :func:`bootstrap_interval`.
        fits: of estimates by networks that are fitted for them, that of each seed alone; empty for others. What chance
            does to a single one is not known: the interval is that over episodes.
        effective_episodes: of estimates by importance sampling, how many episodes carry it; None for others.
    """

    value: float
    low: float
    high: float
    episodes: int = field(repr=False)
    statistic: Callable[..., Any] = field(repr=False, compare=False)
    fits: tuple[float, ...] = ()
    effective_episodes: float | None = None

    @classmethod
    def mean(cls, values: Array) -> "Criterion":
        """The mean of one value an episode.

        >>> Criterion.mean(np.array([[1.0, 3.0], [1.0, 3.0]])).value
        2.0

        Args:
            values: ``[E]``, or ``[seeds, E]``; the interval of a single episode's is over its seeds alone.
        """
        values = np.asarray(values, np.float64)
        fits = values.mean(1).tolist() if values.ndim == 2 else []
        by_episode = values.reshape(-1, values.shape[-1]).mean(0)
        return cls.of(lambda drawn: by_episode[drawn].mean(-1), len(by_episode), fits)

    @classmethod
    def of(
        cls,
        statistic: Callable[..., Any],
        episodes: int,
        fits: Sequence[float] = (),
        effective_episodes: float | None = None,
    ) -> "Criterion":
        """The criterion that a statistic is of all episodes; arguments as the attributes."""
        value = float(statistic(np.arange(episodes)))
        drawn = _drawn([episodes], statistic)
        if len(fits) > 1:
            # Both causes of chance: each draw is as far off as one of the episodes, and one of the seeds.
            drawn = (value if drawn is None else drawn) + _drawn_errors(fits)
        return cls(value, *_interval(drawn), episodes, statistic, tuple(fits), effective_episodes)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        document: dict[str, Any] = {"value": self.value, "confidence_95": [self.low, self.high]}
        if self.fits:
            document["fits"] = list(self.fits)
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
    if (first.episodes, len(first.fits)) != (second.episodes, len(second.fits)):
        raise ValueError(
            f"both must be of the same episodes and seeds, got {first.episodes} and {second.episodes} episodes, "
            f"{len(first.fits)} and {len(second.fits)} seeds"
        )
    fits = [one - other for one, other in zip(first.fits, second.fits, strict=True)]
    return Criterion.of(lambda drawn: first.statistic(drawn) - second.statistic(drawn), first.episodes, fits)
