"""Means of returns, and how sure of them one can be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iql_plugins.cli.errors import mistakes
from iql_plugins.cli.reference_scores import normalized_score
from iql_plugins.ope.intervals import Criterion

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """A mean return.

    Attributes:
        mean: over all episodes of all seeds.
        low: lower end of the 95% bootstrap confidence interval; NaN from a single episode.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def as_dict(self, env: str | None) -> dict[str, Any]:
        """JSON values; with D4RL's normalised score if that is known for the environment."""
        document: dict[str, Any] = {"mean_return": self.mean, "confidence_95": [self.low, self.high]}
        score = normalized_score(env, self.mean)
        return document if score is None else document | {"normalized_score": score}


def estimate(returns: Sequence[Sequence[float]]) -> Estimate:
    """The mean of returns with a 95% percentile-bootstrap interval over seeds and over episodes.

    Seeds and episodes are drawn independently of each other (the pigeonhole bootstrap, Owen 2007, arXiv:0712.1111):
    episode i starts from the same state for every seed, so that both are causes of chance on their own.

    Args:
        returns: ``[seeds, episodes]``; a single seed's interval is over its episodes alone.
    """
    with mistakes(ImportError):
        result = Criterion.mean(np.asarray(returns, np.float64))
    return Estimate(result.value, result.low, result.high)
