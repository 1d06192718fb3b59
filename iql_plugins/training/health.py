"""What a training's metrics say against its result."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from iql_plugins.losses.objectives import policy_extraction, reads_temperature, value_objective
from iql_plugins.ranges import AUTOMATIC_SHARE

__all__ = ["HealthWarning", "Looks", "health_warnings"]

#: What the means and medians below are taken of, at least: the metrics of one batch are noisy.
FEWEST_LOOKS = 5
#: Half the width of a 95% interval, in standard errors: what is closer to a limit is not beyond it.
STANDARD_ERRORS = 2.0
#: Of the median, in standard errors of the mean, for normal noise; and a standard deviation in median deviations.
_MEDIAN_ERROR, _DEVIATION = 1.2533, 1.4826

#: With fewer than a tenth of a batch, single transitions decide: ``examples/choosing_hyperparameters.md``, which says
#: to raise the temperature only as far.
FEWEST_EFFECTIVE_SAMPLES = 0.1
#: Where bad actions weigh nothing there are fewer: trainings that were well had 0.05 to 0.08, ones of which next to
#: nothing taught the policy 0 to 0.02.
FEWEST_GOOD_SAMPLES = 0.03
#: (Σw)² / (B Σw²) is 1 / (1 + c²), c the weights' coefficient of variation, which is the standard deviation of
#: temperature × advantage if that is small. A c of a tenth tells hardly any action from another.
MOST_EFFECTIVE_SAMPLES = 1.0 / (1.0 + 0.1**2)
#: Half of the weights are at the maximum where the temperature is without bounds. Trainings that were well had up to a
#: tenth of them there; ones with a temperature a hundred times too high had three tenths and more.
MOST_AT_MAX_WEIGHT = 0.2
#: Below, exp(temperature × advantage) is of the critics' errors as much as of actions. Trainings that a fixed
#: temperature lost had 1.0 to 1.8 at their end, one that none harmed 3.
LEAST_SIGNAL = 2.0
#: Below, it is of the critics' errors more than of actions, however many teach the policy.
LEAST_SIGNAL_ALONE = 1.0
#: Values that come to their end as an exponential does, and move by less than a tenth from the third quarter of a
#: training to the last one, have reached nine tenths of it.
MOST_MOVEMENT = 0.1

#: Metrics that the warnings are about.
_VALUES = ("mean_value", "mean_qvalue")
_METRICS = (*_VALUES, "effective_sample_size", "share_at_max_weight", "signal_to_noise")
#: One row of a training's metrics, with its ``"step"``.
Look = Mapping[str, float]


@dataclass(frozen=True)
class HealthWarning:
    """A sign that a result is not to be trusted as it is.

    Attributes:
        code: what it is, in a word or two.
        message: what was found.
        suggestion: what to try, and why; hyper-parameters are in backticks, by their names in
            :class:`~iql_plugins.config.IQLConfig`.
    """

    code: str
    message: str
    suggestion: str


class Weighted(Protocol):
    """What has the hyper-parameters of an action's weight: a configuration, or a loss."""

    @property
    def temperature(self) -> float | str:
        """The inverse temperature, or how it moves."""

    @property
    def policy_extraction(self) -> str:
        """How the policy is learned."""

    @property
    def value_objective(self) -> str:
        """How V is learned, which says what an action weighs."""

    @property
    def objective_options(self) -> Mapping[str, float]:
        """Hyper-parameters that the two alone have."""


def health_warnings(
    looks: Sequence[Look], of: Weighted, value_range: tuple[float, float] | None = None
) -> list[HealthWarning]:
    r"""What the metrics of a training say against its result.

    ========================= ==================================================================
    code                      found
    ========================= ==================================================================
    ``diverged-values``       mean V or mean Q is not finite, or in the last quarter beyond ``value_range``
    ``unsettled-values``      mean V or mean Q has moved by more than a tenth in the last quarter
    ``few-effective-samples`` fewer than a tenth of the transitions teach the policy
    ``clipped-weights``       more than a fifth of the weights are clipped at ``max_weight``
    ``equal-weights``         the weights differ by less than a tenth: it is behaviour cloning
    ``noisy-advantages``      advantages spread less far than the critics disagree, and weights differ by them
    ========================= ==================================================================

    The last four are of the weights in the last quarter, where a policy is learned by weights of a temperature that is
    not 0, or of an option that does the same, and values have not diverged. Where bad actions weigh nothing, as by the
    objective ``sparse``, few are fewer than three in a hundred, and the other three are no signs. The last one is none
    with an automatic temperature or a ``noise_threshold``, and where more teach the policy than that temperature asks
    for. Each is told if it is beyond the noise from batch to batch, and from 5 looks on (20 for the second).

    >>> from iql_plugins.config import IQLConfig
    >>> looks = [{"step": step, "mean_value": -0.1 * step, "mean_qvalue": -5.0} for step in range(100)]
    >>> [warning] = health_warnings(looks, IQLConfig())
    >>> warning.message
    'values had not settled from the third to the last quarter of the training: mean_value -6.2 to -8.7'

    Args:
        looks: rows of metrics by name, each with its ``"step"``, in order: of ``metrics.csv``, or of
            :meth:`~iql_plugins.training.learner.Learner.metrics`.
        of: the configuration, or the loss.
        value_range: what the rewards can come to, :math:`r / (1 - \gamma)` of the smallest and the largest one, in the
            networks' units; None if they are not known.
    """
    endless = [name for name in _VALUES if not all(map(math.isfinite, _column(looks, name)))]
    if endless:
        return [_diverged(f"values were no longer finite: {', '.join(endless)}", of.value_objective)]
    found = [] if value_range is None else list(_diverged_values(looks, of.value_objective, *value_range))
    if found:
        # Values that no rewards explain need no more steps, and what actions weigh by them is no fault of the weights.
        return found
    if (unsettled := _unsettled_values(looks, of.value_objective)) is not None:
        found.append(unsettled)
    if (advice := _of_sharpness(of)) is not None:
        found += _of_weights(looks, of, *advice)
    return found


class Looks:
    """The metrics of a training at about equal distances from its first look to its last, as many as are needed."""

    #: Kept at a time, at most: four times as many as judge how values move.
    LIMIT = 80

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._distance = 1.0

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps what the warnings need of the metrics after a step, unless that is close to the one before."""
        if self.rows and step - self.rows[-1]["step"] < self._distance:
            return
        self.rows.append({"step": step} | {name: metrics[name] for name in _METRICS if name in metrics})
        if len(self.rows) > self.LIMIT:
            self.rows = self.rows[::2]
            self._distance = (self.rows[-1]["step"] - self.rows[0]["step"]) / (len(self.rows) - 1)


def _diverged_values(looks: Sequence[Look], objective: str, low: float, high: float) -> Iterator[HealthWarning]:
    beyond = []
    for name in _VALUES:
        mean, error = _end(looks, name)
        margin = MOST_MOVEMENT * (high - low) + STANDARD_ERRORS * error
        if not low - margin <= mean <= high + margin and not math.isnan(mean):
            beyond.append(f"{name} {mean:.3g}")
    if beyond:
        yield _diverged(
            f"values were beyond what these rewards can come to, {low:.3g} to {high:.3g}, in the last quarter: "
            f"{', '.join(beyond)}",
            objective,
        )


def _diverged(found: str, objective: str) -> HealthWarning:
    because = "because errors of Q have been learned from as if they were rewards"
    remedy = f"{value_objective(objective).remedy}, or a lower `critic_learning_rate`"
    return HealthWarning("diverged-values", found, f"try {remedy}, {because}")


def _unsettled_values(looks: Sequence[Look], objective: str) -> HealthWarning | None:
    moved = []
    for name in _VALUES:
        quarters = [_column(quarter, name) for quarter in _quarters(looks)]
        if min(map(len, quarters)) < FEWEST_LOOKS:
            continue
        medians = [statistics.median(quarter) for quarter in quarters]
        errors = [_MEDIAN_ERROR * _spread(quarter) / math.sqrt(len(quarter)) for quarter in quarters[2:]]
        movement = abs(medians[3] - medians[2])
        if movement > max(MOST_MOVEMENT * max(map(abs, medians)), STANDARD_ERRORS * math.hypot(*errors)):
            moved.append(f"{name} {medians[2]:.3g} to {medians[3]:.3g}")
    if not moved:
        return None
    return HealthWarning(
        "unsettled-values",
        f"values had not settled from the third to the last quarter of the training: {', '.join(moved)}",
        "try more `n_steps`, because V and Q do not yet know what the states are worth; if they never settle, "
        f"{value_objective(objective).remedy}, because these decide how far values can grow",
    )


def _of_sharpness(of: Weighted) -> tuple[str, str] | None:
    """What makes the weights of actions more equal, and what less; None where nobody says so."""
    if not policy_extraction(of.policy_extraction).weighs:
        return None
    if not reads_temperature(of.value_objective, of.policy_extraction):
        option = value_objective(of.value_objective).softened_by
        return (
            None
            if option is None
            else (
                f"try a larger {option} among the `objective_options`, or smaller rewards (`reward_scale`)",
                f"try a smaller {option} among the `objective_options`, or larger rewards (`reward_scale`)",
            )
        )
    if of.temperature == 0.0:
        return None
    if isinstance(of.temperature, str):
        return (
            f"try a higher target than `temperature` {of.temperature} has, or more `n_steps` to reach it in",
            f"try a lower target than `temperature` {of.temperature} has, or more `n_steps` to reach it in",
        )
    return (
        f"try a `temperature` below {of.temperature:g}, or auto, or smaller rewards (`reward_scale`)",
        f"try a `temperature` above {of.temperature:g}, or auto, or larger rewards (`reward_scale`)",
    )


def _of_weights(looks: Sequence[Look], of: Weighted, softer: str, sharper: str) -> Iterator[HealthWarning]:
    """What has no end of five looks is NaN, and beyond no limit."""
    effective, effective_error = _end(looks, "effective_sample_size")
    clipped, clipped_error = _end(looks, "share_at_max_weight")
    signal, signal_error = _end(looks, "signal_to_noise")
    weighs_all = value_objective(of.value_objective).weighs_all
    threshold = of.objective_options.get("noise_threshold", 0.0)
    # 0 is that of critics that do not differ. Where bad actions weigh nothing, a threshold leaves fewer still.
    told_of_noise = signal > 0.0 and weighs_all and "noise_threshold" in policy_extraction(of.policy_extraction).options
    most_signal = signal + STANDARD_ERRORS * signal_error if told_of_noise else math.nan
    noise = f"advantages spread only {signal:.2g} times as far as the critics disagree"
    larger_threshold = f"noise_threshold {2.0 * (threshold or 1.0):g} among the `objective_options`"
    is_few = effective + STANDARD_ERRORS * effective_error < (
        FEWEST_EFFECTIVE_SAMPLES if weighs_all else FEWEST_GOOD_SAMPLES
    )
    if is_few:
        found = f"the effective sample size was {effective:.2g} of a batch in the last quarter"
        reason = "the few transitions with the largest weights decided what the policy learned"
        noisy = softer
        if most_signal < LEAST_SIGNAL:
            found += f", and {noise}"
            noisy += f", or {larger_threshold}"
            reason += ", and these are the critics' errors as much as good actions"
        yield HealthWarning("few-effective-samples", found, f"{noisy}, because {reason}")
    if not weighs_all:
        return
    if clipped - STANDARD_ERRORS * clipped_error > MOST_AT_MAX_WEIGHT:
        yield HealthWarning(
            "clipped-weights",
            f"{clipped:.0%} of the weights were clipped at the largest one in the last quarter",
            f"{softer}, because clipped weights no longer tell the best actions from good ones",
        )
    # Weights that are all clipped are equal, too.
    elif effective - STANDARD_ERRORS * effective_error > MOST_EFFECTIVE_SAMPLES:
        found = (
            f"all actions weighed about the same: the effective sample size was {effective:.3f} of a batch in the last "
            "quarter"
        )
        reason = "advantages this small make behaviour cloning of it"
        if threshold:
            sharper = f"try a noise_threshold below {threshold:g} among the `objective_options`"
        elif most_signal < LEAST_SIGNAL_ALONE:
            found += f", and {noise}"
            sharper = "try more `n_steps`"
            reason += ", and sharper weights would follow the critics' errors"
        yield HealthWarning("equal-weights", found, f"{sharper}, because {reason}")
    elif (
        not (is_few or threshold or isinstance(of.temperature, str))
        and most_signal < LEAST_SIGNAL_ALONE
        # Where more teach the policy than an automatic temperature asks for, it would chase the errors further.
        and effective + STANDARD_ERRORS * effective_error < AUTOMATIC_SHARE
    ):
        automatic = "`temperature` auto, or " if reads_temperature(of.value_objective, of.policy_extraction) else ""
        yield HealthWarning(
            "noisy-advantages",
            f"{noise}, in the last quarter",
            f"try {automatic}{larger_threshold}, because what the policy learns are the critics' errors more than good "
            "actions",
        )


def _quarters(looks: Sequence[Look]) -> list[list[Look]]:
    """The looks of each quarter of the steps."""
    quarters: list[list[Look]] = [[], [], [], []]
    first, last = (looks[0]["step"], looks[-1]["step"]) if looks else (0.0, 0.0)
    for look in looks:
        quarters[min(int(4 * (look["step"] - first) / max(last - first, 1.0)), 3)].append(look)
    return quarters


def _end(looks: Sequence[Look], name: str) -> tuple[float, float]:
    """Mean and standard error of a metric in the last quarter, which has 5 looks at least; NaN if there are fewer."""
    values = _column(_quarters(looks)[3], name)
    if len(values) < FEWEST_LOOKS:
        values = _column(looks, name)[-FEWEST_LOOKS:]
    if len(values) < FEWEST_LOOKS:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _column(looks: Sequence[Look], name: str) -> list[float]:
    return [look[name] for look in looks if name in look]


def _spread(values: Sequence[float]) -> float:
    """The standard deviation of noise around a median, whatever single values there are."""
    median = statistics.median(values)
    return _DEVIATION * statistics.median([abs(value - median) for value in values])
