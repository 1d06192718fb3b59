"""Steps of a dataset, and how well they explain the actions and rewards of their own and of other rows.

Small regressions on a sample of steps, judged on steps that they were not fitted to. No model has to be good: what
counts is which row's values it explains best.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.data.dataset import REWARD
from iql_plugins.data.inspection.view import View, finite
from iql_plugins.keys import next_key

__all__ = [
    "LAGS",
    "NOTHING",
    "NOTHING_SIMILAR",
    "Columns",
    "Explained",
    "Regression",
    "Steps",
    "actions_at",
    "deviations",
    "nearest",
    "rewards_at",
]

#: Steps of the sample; with fewer than the second number there is none.
_STEPS, _FEWEST = 3072, 1000
#: Features of observations, and dimensions of actions, that are looked at.
_FEATURES = 64
#: Random features of a regression, next to the linear ones.
_RANDOM_FEATURES = 64
#: By how many rows values are compared; negative ones are of rows before.
LAGS = (-2, -1, 0, 1, 2)
#: In deviations of a correlation of nothing, below which there is none; that of similar steps counts pairs twice.
NOTHING, NOTHING_SIMILAR = 4.0, 6.0
#: In deviations of chance, how much more often another row must explain better.
_WORSE_OFTEN = 10.0


@dataclass(frozen=True)
class Steps:
    """A sample of steps that have two others on each side in their episode, float64 ``[n, ...]``."""

    rows: Tensor
    before: Tensor
    after: Tensor
    previous: Tensor
    actions: dict[int, Tensor]
    rewards: dict[int, Tensor]
    names: list[tuple[NestedKey, int]]

    @classmethod
    def of(cls, view: View) -> "Steps | None":
        """None if there are too few, or no real numbers among the observations."""
        inside = torch.ones(len(view.dataset), dtype=torch.bool, device="cpu")
        for lag in range(max(LAGS)):
            # Of an episode that is shorter, rows of its neighbours, which are as close to an end.
            inside[(view.starts + lag).clamp(max=len(inside) - 1)] = False
            inside[(view.ends - lag).clamp(min=0)] = False
        rows = inside.nonzero().squeeze(-1)
        if len(rows) < _FEWEST or not view.observations:
            return None
        if len(rows) > _STEPS:
            # At random: an even spacing could keep step with episodes.
            random = torch.Generator("cpu").manual_seed(0)
            rows = rows[torch.randperm(len(rows), generator=random, device="cpu")[:_STEPS]].sort().values
        observations = Columns.observations(view)
        return cls(
            rows,
            observations.at(rows),
            observations.at(rows, after=True),
            observations.at(rows - 1),
            {lag: actions_at(view, rows + lag) for lag in LAGS},
            {lag: rewards_at(view, rows + lag) for lag in LAGS},
            observations.names,
        )

    @property
    def folds(self) -> Tensor:
        """Halves in sixteen blocks of time: neighbouring steps are too alike to judge one another."""
        return torch.arange(len(self.rows), device="cpu") * 16 // len(self.rows) % 2

    @property
    def thirds(self) -> Tensor:
        """0, 1, 2 in time."""
        return torch.arange(len(self.rows), device="cpu") * 3 // len(self.rows)


class Columns:
    """Features of the observations, spread evenly."""

    def __init__(self, view: View, names: list[tuple[NestedKey, int]]) -> None:
        self.names = names
        self._view = view

    @classmethod
    def observations(cls, view: View, most: int = _FEATURES) -> "Columns":
        """``most`` of all keys together."""
        names = [(key, index) for key, tensor in view.observations.items() for index in range(tensor[0].numel())]
        spread = range(min(len(names), most))
        return cls(view, [names[place * len(names) // len(spread)] for place in spread])

    def at(self, rows: Tensor, *, after: bool = False) -> Tensor:
        """``[n, features]`` in these rows, of the next observation if ``after``."""
        parts = []
        for key in dict.fromkeys(key for key, _ in self.names):
            tensor = self._view.dataset.get(next_key(key) if after else key)
            indices = [index for other, index in self.names if other == key]
            tensor = tensor.reshape(len(tensor), -1)
            parts.append(finite(tensor[rows.to(tensor.device)][:, indices]))
        return torch.cat(parts, 1)


def actions_at(view: View, rows: Tensor) -> Tensor:
    """``[n, act]``; discrete ones one-hot, but for the last of them, which the others tell."""
    action = view.dataset.get("action")
    values = action[rows.to(action.device)].cpu()
    if action.is_floating_point():
        return finite(values[:, :_FEATURES])
    count = min(max(int(action.max()) + 1, 2), _FEATURES)
    chosen: Tensor = (values == torch.arange(count - 1, device="cpu")).double()
    return chosen


def rewards_at(view: View, rows: Tensor) -> Tensor:
    """``[n, 1]``."""
    reward = view.dataset.get(REWARD)
    return finite(reward[rows.to(reward.device)])


class Regression:
    """Ridge regression on inputs and on random features of them, whichever of the two is better, for each target.

    Args:
        inputs: ``[n, features]``.
    """

    def __init__(self, inputs: Tensor) -> None:
        self._inputs = inputs

    def fit(self, rows: Tensor, targets: Tensor, others: Tensor) -> Tensor:
        """Predictions ``[2, m, targets]`` for the steps that ``others`` flags by a fit to those that ``rows`` does."""
        known = self._inputs[rows]
        mean, deviation = known.mean(0), known.std(0)
        scale = torch.where(deviation > 1e-9, deviation, 1.0)
        random = torch.Generator("cpu").manual_seed(0)
        size = known.shape[1]
        weight = torch.randn(size, _RANDOM_FEATURES, generator=random, dtype=torch.float64, device="cpu") / size**0.5
        bias = torch.randn(_RANDOM_FEATURES, generator=random, dtype=torch.float64, device="cpu")

        def features(values: Tensor) -> Tensor:
            standard = ((values - mean) / scale).clamp(-5.0, 5.0)
            return torch.cat([standard, (standard @ weight + bias).tanh()], 1)

        design, offset = features(known), targets[rows].mean(0)
        centre = design.mean(0)
        design = design - centre
        gram, moment = design.T @ design, design.T @ (targets[rows] - offset)
        gram.diagonal().add_(1e-6 * len(known))
        query = features(self._inputs[others]) - centre
        return torch.stack(
            [
                query[:, :some] @ torch.linalg.solve(gram[:some, :some], moment[:some]) + offset
                for some in (size, len(gram))
            ]
        )

    def out_of_sample(self, targets: Tensor, folds: Tensor) -> Tensor:
        """``[n, targets]``: each fold as the other predicts it."""
        both = targets.new_empty(2, *targets.shape)
        for fold in (0, 1):
            both[:, folds == fold] = self.fit(folds != fold, targets, folds == fold)
        best = (both - targets).square().mean(1).argmin(0)
        return both.gather(0, best.expand(1, *targets.shape)).squeeze(0)


def deviations(predicted: Tensor, targets: Tensor) -> Tensor:
    """By how many deviations of chance each target is correlated with what was predicted, ``[targets]``."""
    one, other = predicted - predicted.mean(0), targets - targets.mean(0)
    norm = (one.square().sum(0) * other.square().sum(0)).sqrt()
    correlation = (one * other).sum(0) / norm.clamp_min(1e-300)
    return torch.where(other.square().mean(0) > 1e-18, correlation * len(targets) ** 0.5, torch.inf)


def nearest(inputs: Tensor) -> Tensor:
    """``[n]``: of each step, the one with the most similar inputs."""
    standard = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-9)
    apart = torch.cdist(standard, standard)
    apart.fill_diagonal_(torch.inf)
    return apart.argmin(1)


class Explained:
    """How well steps explain the actions, or rewards, of their own and of neighbouring rows.

    Args:
        inputs: ``[n, features]``.
        targets: ``[n, k]`` by how many rows later they are.
        folds: ``[n]``.
    """

    def __init__(self, inputs: Tensor, targets: dict[int, Tensor], folds: Tensor) -> None:
        self.inputs = inputs
        self._lags = tuple(targets)
        values = torch.cat(list(targets.values()), 1)
        self._predicted = Regression(inputs).out_of_sample(values, folds)
        self._values = values

    def values_of(self, lag: int) -> tuple[Tensor, Tensor]:
        """Those predicted for and those in rows that are so much later, ``[n, k]`` each."""
        place = self._lags.index(lag)
        parts = (values.reshape(len(values), len(self._lags), -1) for values in (self._predicted, self._values))
        predicted, true = (part[:, place] for part in parts)
        return predicted, true

    @cached_property
    def errors(self) -> Tensor:
        """Squared, ``[lags, n, k]``."""
        errors = (self._predicted - self._values).square()
        return errors.reshape(len(errors), len(self._lags), -1).transpose(0, 1)

    @cached_property
    def unrelated(self) -> bool:
        """Whether no row's are explained, nor are those of similar steps: a sparse reward is no smooth function."""
        if bool((deviations(self._predicted, self._values) >= NOTHING).any()):
            return False
        return not bool((deviations(self._values[nearest(self.inputs)], self._values) >= NOTHING_SIMILAR).any())

    def shift(self, worse: float, unexplained: float) -> tuple[Tensor, Tensor]:
        """``[k]``: by how many rows values are late, and whether that is beyond doubt.

        Args:
            worse: how many times the squared error of a step's own value must be that of another row's.
            unexplained: the part of the variance that it must be at least.
        """
        means, own = self.errors.mean(1), self._lags.index(0)
        best = means.argmin(0)
        other = self.errors.gather(0, best.expand(1, *self.errors.shape[1:])).squeeze(0)
        often = (other < self.errors[own]).double().mean(0)
        surely = (often - 0.5) * 2 * len(other) ** 0.5 > _WORSE_OFTEN
        spread = self._values.var(0).reshape(len(self._lags), -1)[own]
        far = (means[own] > worse * means.amin(0)) & (means[own] > unexplained * spread)
        return torch.tensor(self._lags, device="cpu")[best], far & surely
