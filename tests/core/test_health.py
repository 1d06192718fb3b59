"""What the metrics of a training say against its result, and what they do not."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import keywords, make_batch, make_loss
from torch import nn

from iql_plugins.config import IQLConfig, hyperparameters
from iql_plugins.losses.functional import Health, health
from iql_plugins.training.health import HealthWarning, Looks, health_warnings
from iql_plugins.training.learner import Learner

HEALTHY = {
    "mean_value": -10.0,
    "mean_qvalue": -10.0,
    "effective_sample_size": 0.3,
    "share_at_max_weight": 0.0,
    "signal_to_noise": 3.0,
}
Series = float | Callable[[float], float]


def looks(count: int = 100, *, noise: float = 0.0, **series: Series) -> list[dict[str, float]]:
    """A healthy training but for these metrics, each a number or a function of the share of the training that is over.

    Noise is a share of the value, with a fixed seed.
    """
    random = np.random.default_rng(0)
    rows = []
    for index in range(1, count + 1):
        row = {"step": 40.0 * index}
        for name, healthy in HEALTHY.items():
            of = series.get(name, healthy)
            value = of(index / count) if callable(of) else of
            row[name] = value * (1.0 + noise * random.normal()) if name in series else value
        rows.append(row)
    return rows


def approach(time_constants: float) -> Callable[[float], float]:
    """Values that come to their end as an exponential does."""
    return lambda share: -20.0 * (1.0 - math.exp(-share * time_constants))


def last_quarter(before: float, then: float) -> Callable[[float], float]:
    return lambda share: then if share > 0.75 else before


TRIPPED: dict[str, dict[str, Any]] = {
    "diverged-values": {"mean_value": 140.0, "mean_qvalue": lambda share: 1e4 * share**3},
    "unsettled-values": {"mean_value": lambda share: -20.0 * share, "mean_qvalue": lambda share: -20.0 * share},
    "few-effective-samples": {"effective_sample_size": 0.08},
    "clipped-weights": {"share_at_max_weight": 0.3},
    "equal-weights": {"effective_sample_size": 0.999},
    "noisy-advantages": {"signal_to_noise": 0.8},
}
#: Those of the weights.
OF_WEIGHTS = [code for code in TRIPPED if "values" not in code]


#: What rewards up to 1 come to.
VALUES = (-100.0, 100.0)


def warnings(rows: list[dict[str, float]], **changes: Any) -> list[HealthWarning]:
    return health_warnings(rows, IQLConfig(**changes), VALUES)


def codes(rows: list[dict[str, float]], **changes: Any) -> list[str]:
    return [warning.code for warning in warnings(rows, **changes)]


def test_a_healthy_training_has_no_warning() -> None:
    assert codes(looks()) == []
    assert codes([]) == []


@pytest.mark.parametrize("code", TRIPPED)
def test_each_sign_is_found_alone(code: str) -> None:
    assert codes(looks(**TRIPPED[code])) == [code]
    assert codes(looks(**TRIPPED[code], noise=0.01)) == [code]


def test_the_signs_are_those_of_the_documentation() -> None:
    documented = re.findall(r"^``([a-z-]+)``", inspect.getdoc(health_warnings) or "", re.MULTILINE)
    assert documented == list(TRIPPED)


@pytest.mark.parametrize("code", TRIPPED)
def test_a_suggestion_says_what_to_try_and_why_and_names_hyperparameters_that_there_are(code: str) -> None:
    (warning,) = warnings(looks(**TRIPPED[code]))
    named = re.findall(r"`(.*?)`", warning.suggestion)
    assert named
    assert set(named) <= set(hyperparameters())
    assert re.match(r"try .*, because ", warning.suggestion)


@pytest.mark.parametrize(
    "series",
    [
        {"mean_value": approach(1.0)},
        {"mean_value": approach(2.0), "noise": 0.1},
        {"mean_value": lambda share: 20.0 * share**3},
        {"mean_value": lambda share: -20.0 + 10.0 * share},  # towards 0
        {"mean_qvalue": last_quarter(-10.0, -11.2)},
    ],
)
def test_values_that_still_move_are_unsettled(series: dict[str, Any]) -> None:
    (warning,) = warnings(looks(**series))
    assert warning.code == "unsettled-values"
    assert [name for name in ("mean_value", "mean_qvalue") if name in warning.message] == [
        name for name in series if name != "noise"
    ]


@pytest.mark.parametrize(
    "series",
    [
        {"mean_value": approach(5.0)},
        {"mean_value": lambda share: -20.0 + 2.0 * share},
        {"mean_qvalue": last_quarter(-10.0, -10.9)},
        {"mean_value": -10.0, "noise": 0.3},
        # Around 0 every movement is large beside the value: here it is small beside what was before, and noise.
        {"mean_value": lambda share: 10.0 * math.exp(-6.0 * share)},
        {"mean_value": lambda share: math.sin(1000.0 * share)},
        # Single values of a heavy tail.
        {"mean_value": lambda share: -1e6 if share in (0.9, 0.95) else -10.0},
    ],
)
def test_values_that_have_settled_are_no_sign(series: dict[str, Any]) -> None:
    assert codes(looks(**series)) == []


def test_values_within_what_rewards_come_to_or_the_noise_are_no_sign() -> None:
    assert codes(looks(mean_value=119.0)) == codes(looks(mean_value=-119.0)) == []
    assert codes(looks(mean_value=-121.0)) == ["diverged-values"]
    assert codes(looks(mean_value=121.0, noise=0.2)) == []
    assert health_warnings(looks(**TRIPPED["diverged-values"]), IQLConfig())[0].code == "unsettled-values"


@pytest.mark.parametrize(
    ("objective", "option", "named"),
    [
        ("expectile", "a lower `expectile`", ["expectile", "discount", "critic_learning_rate"]),
        ("gumbel", "a larger loss_temperature", ["objective_options", "critic_layer_norm", "critic_learning_rate"]),
        ("sparse", "a larger alpha", ["objective_options", "discount", "critic_learning_rate"]),
        ("exponential", "a larger alpha", ["objective_options", "discount", "critic_learning_rate"]),
        ("quantile", "a lower quantile", ["objective_options", "discount", "critic_learning_rate"]),
    ],
)
def test_what_keeps_values_from_diverging_is_the_objectives_own(objective: str, option: str, named: list[str]) -> None:
    (warning,) = warnings(looks(**TRIPPED["diverged-values"]), value_objective=objective)
    assert re.findall(r"`(.*?)`", warning.suggestion) == named
    assert option in warning.suggestion
    (unsettled,) = warnings(looks(**TRIPPED["unsettled-values"]), value_objective=objective)
    assert option in unsettled.suggestion
    # It bounds no values, and settles later.
    assert "critic_learning_rate" not in unsettled.suggestion


@pytest.mark.parametrize("value_range", [VALUES, None])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_longer_finite_have_diverged(value: float, value_range: tuple[float, float] | None) -> None:
    rows = looks(mean_value=lambda share: value if share > 0.5 else -20.0, effective_sample_size=value)
    (warning,) = health_warnings(rows, IQLConfig(value_objective="gumbel"), value_range)
    assert warning.code == "diverged-values"
    assert warning.message == "values were no longer finite: mean_value"


def test_weights_that_a_threshold_makes_equal_are_told_a_lower_one() -> None:
    for temperature in (3.0, "auto"):
        (warning,) = warnings(
            looks(**TRIPPED["equal-weights"]), temperature=temperature, objective_options={"noise_threshold": 2.0}
        )
        assert "try a noise_threshold below 2 among the `objective_options`" in warning.suggestion


@pytest.mark.parametrize(("signal", "sharper"), [(0.8, False), (1.2, True), (0.0, True)])
def test_equal_weights_of_advantages_that_are_errors_are_not_told_to_differ_more(signal: float, sharper: bool) -> None:
    rows = [row | {"signal_to_noise": signal} for row in looks(**TRIPPED["equal-weights"])]
    for temperature, advice in ((3.0, "try a `temperature` above 3"), ("auto", "try a lower target than")):
        (warning,) = warnings(rows, temperature=temperature)
        assert warning.code == "equal-weights"
        assert warning.suggestion.startswith(advice if sharper else "try more `n_steps`, because")
        assert ("0.8 times as far as the critics disagree" in warning.message) != sharper


@pytest.mark.parametrize(("signal", "told"), [(1.2, True), (1.98, True), (2.5, False), (0.0, False)])
def test_few_samples_of_noisy_advantages_recommend_what_does_not_chase_noise(signal: float, told: bool) -> None:
    rows = [row | {"signal_to_noise": signal} for row in looks(**TRIPPED["few-effective-samples"])]
    (warning,) = warnings(rows)
    assert "`temperature` below 3, or auto" in warning.suggestion
    assert (f"{signal:.2g} times as far as the critics disagree" in warning.message) == told
    assert ("noise_threshold 2 among the `objective_options`" in warning.suggestion) == told
    (warning,) = warnings(rows, objective_options={"noise_threshold": 3.0})
    assert ("noise_threshold 6 among the `objective_options`" in warning.suggestion) == told


@pytest.mark.parametrize("code", ["few-effective-samples", "clipped-weights", "equal-weights"])
def test_an_automatic_temperature_is_not_told_to_be_lower(code: str) -> None:
    (warning,) = warnings(looks(**TRIPPED[code]), temperature="auto_0.5")
    assert warning.code == code
    assert "target than `temperature` auto_0.5 has" in warning.suggestion
    assert warning.suggestion.count("because") == 1
    assert "`n_steps`" in warning.suggestion


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "try `temperature` auto, or noise_threshold 2 among the `objective_options`, because"),
        ({"value_objective": "exponential"}, "try noise_threshold 2 among the `objective_options`, because"),
        # What would be told is there.
        ({"temperature": "auto"}, None),
        ({"objective_options": {"noise_threshold": 1.0}}, None),
    ],
)
def test_noisy_advantages_recommend_what_does_not_chase_noise(changes: dict[str, Any], told: str | None) -> None:
    found = warnings(looks(**TRIPPED["noisy-advantages"]), **changes)
    assert [warning.suggestion.startswith(told or "") for warning in found] == [True] * (told is not None)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["few-effective-samples"], ["few-effective-samples"]),
        (["equal-weights"], ["equal-weights"]),
        (["clipped-weights", "equal-weights"], ["clipped-weights"]),
        (["diverged-values", "few-effective-samples"], ["diverged-values"]),
        (["diverged-values", "clipped-weights", "equal-weights"], ["diverged-values"]),
    ],
)
def test_advice_does_not_contradict_itself(others: list[str], expected: list[str]) -> None:
    rows = looks(**TRIPPED["noisy-advantages"], **{name: of for code in others for name, of in TRIPPED[code].items()})
    assert codes(rows) == expected


@pytest.mark.parametrize("temperature", [3.0, "auto"])
def test_weights_that_are_all_clipped_are_not_told_to_differ_more(temperature: float | str) -> None:
    of_batch = health(torch.full((2, 64), 100.0) + torch.arange(64.0), torch.zeros(64))
    row = {name: float(value) for name, value in of_batch._asdict().items()}
    assert (row["effective_sample_size"], row["share_at_max_weight"]) == (1.0, 1.0)
    found = health_warnings([row | {"step": float(step)} for step in range(100)], IQLConfig(temperature=temperature))
    assert [warning.code for warning in found] == ["clipped-weights"]


@pytest.mark.parametrize(("effective", "told"), [(0.0, True), (0.02, True), (0.05, False)])
def test_where_bad_actions_weigh_nothing_next_to_none_that_teach_are_a_sign(effective: float, told: bool) -> None:
    rows = looks(effective_sample_size=effective, signal_to_noise=0.8)
    found = warnings(rows, value_objective="sparse")
    assert [warning.code for warning in found] == ["few-effective-samples"] * told
    for warning in found:
        assert warning.suggestion.startswith("try a larger alpha among the `objective_options`, or smaller rewards")
        # That leaves fewer still.
        assert "noise_threshold" not in warning.suggestion


def test_a_movement_within_the_noise_is_no_sign() -> None:
    moving = last_quarter(-10.0, -11.5)
    assert codes(looks(mean_value=moving)) == ["unsettled-values"]
    assert codes(looks(mean_value=moving, noise=1.0)) == []


@pytest.mark.parametrize(
    "series",
    [
        {"effective_sample_size": 0.101},
        {"effective_sample_size": 0.985},
        {"effective_sample_size": last_quarter(0.05, 0.15)},
        {"effective_sample_size": last_quarter(0.999, 0.9)},
        {"effective_sample_size": 0.095, "noise": 0.8},
        {"share_at_max_weight": 0.199},
        {"share_at_max_weight": last_quarter(0.5, 0.05)},
        {"share_at_max_weight": 0.21, "noise": 0.8},
        {"signal_to_noise": 1.8},
        {"signal_to_noise": 0.3, "effective_sample_size": 0.71},
        {"signal_to_noise": 1.01},
        {"signal_to_noise": 0.95, "noise": 0.8},
    ],
)
def test_weights_within_the_limits_or_the_noise_are_no_sign(series: dict[str, Any]) -> None:
    assert codes(looks(**series)) == []


def test_the_weights_of_the_end_count() -> None:
    assert codes(looks(effective_sample_size=last_quarter(0.5, 0.05))) == ["few-effective-samples"]


def test_few_looks_say_nothing() -> None:
    assert [codes(looks(count, **TRIPPED["clipped-weights"])) for count in (4, 5)] == [[], ["clipped-weights"]]
    assert [codes(looks(count, **TRIPPED["unsettled-values"])) for count in (12, 40)] == [[], ["unsettled-values"]]


@pytest.mark.parametrize("code", OF_WEIGHTS)
def test_weights_that_no_temperature_makes_are_no_sign(code: str) -> None:
    assert codes(looks(**TRIPPED[code]), temperature=0.0) == []
    assert codes(looks(**TRIPPED[code]), value_objective="sparse") == []
    assert codes(looks(**TRIPPED[code]), policy_extraction="ddpg_bc") == []
    assert codes(looks(**TRIPPED[code]), value_objective="gumbel") == [code]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("few-effective-samples", "try a larger alpha among the `objective_options`"),
        ("clipped-weights", "try a larger alpha among the `objective_options`"),
        ("equal-weights", "try a smaller alpha among the `objective_options`"),
    ],
)
def test_weights_that_an_option_makes_are_told_that_option(code: str, advice: str) -> None:
    (warning,) = warnings(looks(**TRIPPED[code]), value_objective="exponential")
    assert (warning.code, warning.suggestion.split(", or")[0]) == (code, advice)
    assert codes(looks(**TRIPPED[code]), value_objective="exponential", temperature=0.0) == [code]
    assert codes(looks(**TRIPPED[code]), value_objective="exponential", policy_extraction="ddpg_bc") == []


# What a learner keeps


def test_a_long_training_is_kept_from_its_beginning_to_its_end_in_few_looks() -> None:
    kept = Looks()
    for step in range(1, 100_001):
        kept.add(step, HEALTHY)
    steps = np.array([row["step"] for row in kept.rows])
    assert 20 <= len(steps) <= Looks.LIMIT
    assert steps[0] == 1
    assert steps[-1] > 95_000
    distances = np.diff(steps)
    assert distances.max() <= 1.1 * distances.min()


def trained(steps: int, look: Callable[[Learner], object] = lambda learner: None, **changes: Any) -> Learner:
    """A learner after steps on the same batches, and what was done after each."""
    torch.manual_seed(0)
    learner = Learner(make_loss("continuous", **changes), seed=0)
    batches = [keywords(make_batch("continuous")) for _ in range(steps)]
    for batch in batches:
        learner.step(batch)
        look(learner)
    return learner


@pytest.mark.parametrize("look", [Learner.metrics, Learner.check_finite, Learner.warnings])
def test_a_learner_warns_of_what_its_metrics_were_whoever_looked(look: Callable[[Learner], object]) -> None:
    learner = trained(5, look, temperature=1e6)
    assert [warning.code for warning in learner.warnings()] == ["clipped-weights"]
    assert trained(5, look, temperature=0.0).warnings() == []
    assert trained(4, look, temperature=1e6).warnings() == []


def test_a_learner_without_steps_has_no_warning() -> None:
    assert trained(0).warnings() == []


def test_the_health_of_the_last_batch_is_what_metrics_say_and_takes_nothing_from_them() -> None:
    learner, unseen = trained(3), trained(3)
    health = learner.health()
    metrics = learner.metrics()
    assert metrics == unseen.metrics()
    assert health == {name: metrics[name] for name in Health._fields} == learner.health()
    learner.load_state_dict(unseen.state_dict())
    assert trained(0).health() == learner.health() == {}


def test_warnings_take_nothing_from_the_metrics() -> None:
    looked, unseen = trained(5, Learner.warnings), trained(5)
    assert looked.metrics() == unseen.metrics()


def test_a_training_that_is_loaded_begins_its_looks_anew() -> None:
    learner = trained(5, Learner.metrics, temperature=1e6)
    learner.load_state_dict(learner.state_dict())
    assert learner.warnings() == []


def test_to_look_changes_nothing_of_what_is_learned() -> None:
    def with_running_statistics(look: Callable[[Learner], object]) -> Learner:
        torch.manual_seed(0)
        loss = make_loss("continuous")
        module: Any = loss.value_network
        module.module = nn.Sequential(nn.BatchNorm1d(5), module.module, nn.Dropout(0.5))
        learner = Learner(loss, seed=0)
        for _ in range(3):
            learner.step(keywords(make_batch("continuous")))
            look(learner)
        assert all(each.training for each in loss.value_network.modules())
        return learner

    unseen = with_running_statistics(lambda learner: None).loss.value_network.state_dict()
    assert "module.0.running_mean" in unseen
    for look in (Learner.metrics, Learner.check_finite, Learner.warnings):
        looked = with_running_statistics(look).loss.value_network.state_dict()
        assert all(torch.equal(looked[name], tensor) for name, tensor in unseen.items())
