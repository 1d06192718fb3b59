"""What decides whether a run's result can be trusted: signs in its returns, its metrics and its rewards."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iql_plugins.cli.arguments import as_options
from iql_plugins.cli.settings import METHODS, Settings
from iql_plugins.cli.statistics import Estimate
from iql_plugins.cli.training import BEST, METRICS, metrics_rows
from iql_plugins.config import PRESETS, IQLConfig
from iql_plugins.data.dataset import REWARD, Dataset
from iql_plugins.data.inspection.values import uneven_scales
from iql_plugins.data.inspection.view import View
from iql_plugins.data.normalizers import RETURN_RANGE, Normalizers
from iql_plugins.training.health import HealthWarning, health_warnings

__all__ = ["data_warnings", "run_warnings", "warning_lines"]

#: Rewards of which at most a tenth are 1, and all others 0, mark a goal. Where each step is worth 1, few are 0.
MOST_GOALS = 0.1


def run_warnings(
    settings: Settings, source: Dataset, run: Path, estimates: Mapping[str, Estimate]
) -> list[dict[str, Any]]:
    """What speaks against the result of a run; it depends on the run's files and returns alone.

    Beside what :func:`~iql_plugins.training.health.health_warnings` finds in the metrics of IQL's trainings:

    =========================== =================================================================================
    code                        found
    =========================== =================================================================================
    ``below-data``              the 95% interval of IQL's last policy is below the mean return of the data
    ``below-behaviour-cloning`` it is below the interval of behaviour cloning
    ``best-before-last``        it is below the interval of the policy that was best on the way
    ``shifted-rewards``         a preset that subtracts 1 from rewards of 0 and 1, for other rewards
    ``scaled-goals``            sparse rewards of 0 and 1, multiplied by 1000 over the range of the returns
    ``uneven-scales``           observations on scales that differ by 30 times and more, and are not standardised
    =========================== =================================================================================

    ``unsettled-values`` says nothing against a policy whose interval is above those of the data and of behaviour
    cloning: values on their way can tell actions apart, and its returns show that they do. So it is on the dataset that
    ships: of the 1 / (polyak (1 - discount)) = 20,000 steps in which values come to their end, its preset takes 4,000.

    Args:
        settings: of the run.
        source: its dataset.
        run: the run directory.
        estimates: the rows of the table, by name.

    Returns:
        JSON values: ``code``, ``message``, ``suggestion`` and the ``seeds`` that it is about.
    """
    of_returns = _of_returns(estimates, settings.hyperparameters)
    found = [(warning, settings.seeds) for warning in of_returns] + _of_metrics(settings, source, run)
    if _is_above_all(estimates):
        found = [(warning, seeds) for warning, seeds in found if warning.code != "unsettled-values"]
    return data_warnings(settings, source) + [_document(warning, seeds, settings) for warning, seeds in found]


def data_warnings(settings: Settings, source: Dataset) -> list[dict[str, Any]]:
    """Those of :func:`run_warnings` that are known before the first step."""
    of_data = (*_of_rewards(settings, source), *_of_observations(settings, source))
    return [_document(warning, settings.seeds, settings) for warning in of_data]


def warning_lines(warnings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The warnings for people; nothing where there are none."""
    if not warnings:
        return []
    lines = [f"  {warning['code']}: {warning['message']}\n      {warning['suggestion']}" for warning in warnings]
    return ["before this result is trusted:", *lines, ""]


def _document(warning: HealthWarning, seeds: Sequence[int], settings: Settings) -> dict[str, Any]:
    document = asdict(warning) | {"seeds": list(seeds)}
    # Hyper-parameters are options here.
    document["suggestion"] = as_options(warning.suggestion)
    if tuple(seeds) != settings.seeds:
        document["message"] = f"{warning.message} (seed {', '.join(map(str, seeds))} of {len(settings.seeds)})"
    return document


def _of_metrics(settings: Settings, source: Dataset, run: Path) -> list[tuple[HealthWarning, tuple[int, ...]]]:
    """The warnings of IQL's trainings, each once: of the first seed that has it, with all that have it."""
    looks = {
        unit.seed: metrics_rows(settings.folder(run, unit) / METRICS) for unit in settings.units if unit.method == "iql"
    }
    values = _value_range(settings, source) if any(looks.values()) else None
    first: dict[str, HealthWarning] = {}
    seeds: dict[str, tuple[int, ...]] = {}
    for seed, rows in looks.items():
        for warning in health_warnings(rows, settings.hyperparameters, values):
            first.setdefault(warning.code, warning)
            seeds[warning.code] = (*seeds.get(warning.code, ()), seed)
    return [(warning, seeds[code]) for code, warning in first.items()]


def _value_range(settings: Settings, source: Dataset) -> tuple[float, float] | None:
    """What the rewards can come to, in the networks' units; 0 in a terminal state."""
    config = settings.hyperparameters.replace(normalize_observations=False)
    if config.discount == 1.0:
        return None
    rewards = Normalizers.fit(source.tensors, settings.spaces, config).reward(source.tensors.get(REWARD))
    low, high = (float(bound) / (1.0 - config.discount) for bound in (rewards.min(), rewards.max()))
    return min(low, 0.0), max(high, 0.0)


def _is_above_all(estimates: Mapping[str, Estimate]) -> bool:
    """Whether IQL's last policy is better than the data and behaviour cloning, beyond noise."""
    final = estimates.get("IQL final")
    others = [estimates[name] for name in ("data", METHODS["bc"]) if name in estimates]
    return final is not None and all(final.low > other.high for other in others)


def _of_returns(estimates: Mapping[str, Estimate], config: IQLConfig) -> Iterator[HealthWarning]:
    final, data = estimates.get("IQL final"), estimates["data"]
    if final is None:
        return
    # What the data return is known; another policy's episodes are a sample, as IQL's are. An interval of a single
    # episode is NaN, and is below nothing.
    if final.high < data.mean:
        yield HealthWarning(
            "below-data",
            f"IQL's last policy returns {_text(final)}, less than the data, {data.mean:.1f}",
            "try more `n_steps`, or wider `hidden_sizes`, because a policy that has learned from the data returns at "
            "least their mean; iql-plugins inspect says what may be wrong with them",
        )
    cloned = estimates.get(METHODS["bc"])
    if cloned is not None and final.high < cloned.low:
        yield HealthWarning(
            "below-behaviour-cloning",
            f"IQL's last policy returns {_text(final)}, less than behaviour cloning, {_text(cloned)}",
            _nearer_to_behaviour(config),
        )
    best = estimates["IQL best"]
    if final.high < best.low:
        yield HealthWarning(
            "best-before-last",
            f"IQL's last policy returns {_text(final)}, less than the one that was best on the way, {_text(best)}",
            "try a lower `actor_learning_rate`, because the policy got worse as it went on; until then take the better "
            f"one, {BEST}",
        )


def _nearer_to_behaviour(config: IQLConfig) -> str:
    """What lets V and Q count for less."""
    if (config.value_objective, config.policy_extraction) != ("expectile", "awr"):
        return (
            "try `value_objective` expectile and `policy_extraction` awr, or other `objective_options`, because V and "
            "Q prefer the wrong actions, and count for too much"
        )
    if config.temperature == 0.0:
        return "try more `n_steps`, because with a `temperature` of 0 both learn the same"
    less = (
        f"a higher target than `temperature` {config.temperature} has"
        if isinstance(config.temperature, str)
        else "a lower `temperature`, or auto"
    )
    return (
        f"try {less}, because V and Q prefer the wrong actions, and count for less then; or an `expectile` closer to "
        "0.5, because a high one takes noise for skill"
    )


def _of_rewards(settings: Settings, source: Dataset) -> Iterator[HealthWarning]:
    config, changes = settings.hyperparameters, PRESETS.get(settings.preset or "", {})
    rewards = source.tensors.get(REWARD).reshape(-1)
    low, high = float(rewards.min()), float(rewards.max())
    goals = bool(((rewards == 0) | (rewards == 1)).all())
    shift = changes.get("reward_shift")
    if shift is not None and config.reward_shift == shift and not goals:
        yield HealthWarning(
            "shifted-rewards",
            f"the preset {settings.preset} adds {shift:g} to rewards of 0 and 1; these are from {low:g} to {high:g}",
            "try `reward_shift` 0, or `preset` locomotion where each step has its reward, because a constant that is "
            "added to other rewards changes what long episodes are worth",
        )
    if goals and low < high and config.reward_scale == "return_range" and float(rewards.mean()) <= MOST_GOALS:
        yield HealthWarning(
            "scaled-goals",
            f"rewards of 0 and 1 are sparse, and the reward scale makes {RETURN_RANGE:g} of the range of their returns",
            "try `preset` antmaze, because it subtracts 1 instead: advantages of such goals, multiplied by a "
            "`temperature` as well, leave no weight between nothing and `max_weight`",
        )


def _of_observations(settings: Settings, source: Dataset) -> Iterator[HealthWarning]:
    if settings.hyperparameters.normalize_observations:
        return
    for finding in uneven_scales(View(source)):
        yield HealthWarning(
            finding.code,
            finding.message,
            "try `normalize_observations`, because the networks see little of the smaller ones",
        )


def _text(estimate: Estimate) -> str:
    return f"{estimate.mean:.1f} ({estimate.interval})"
