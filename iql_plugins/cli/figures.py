"""The picture of a run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iql_plugins import checkpoint
from iql_plugins.cli.errors import imported
from iql_plugins.cli.settings import METHODS, Settings
from iql_plugins.cli.statistics import Estimate, estimate
from iql_plugins.cli.training import METRICS, Outcome, metrics_rows

__all__ = ["learning_curve"]

COLORS = {"iql": "tab:blue", "bc": "tab:orange"}


def learning_curve(settings: Settings, run: Path, outcomes: Sequence[Outcome], data: Estimate, path: Path) -> None:
    """Draws the mean return of each method by gradient steps with its 95% interval, and that of the data.

    Without an environment it draws the losses.

    Args:
        settings: of the run.
        run: the run directory.
        outcomes: of all trainings.
        data: the mean return of the dataset.
        path: of the PNG.
    """
    figure: Any = imported("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if settings.env is None:
        _draw_losses(axes, settings, run)
        axes.set(xlabel="gradient steps", ylabel="loss", title=settings.dataset)
    else:
        for method in METHODS:
            _draw_returns(axes, method, [outcome for outcome in outcomes if outcome.unit.method == method])
        axes.axhline(data.mean, color="gray", linestyle="--", label="data")
        axes.axhspan(data.low, data.high, color="gray", alpha=0.15, linewidth=0)
        seeds = f"{len(settings.seeds)} seed{'s' if len(settings.seeds) > 1 else ''}"
        axes.set(
            xlabel="gradient steps",
            ylabel=f"mean return of {settings.evaluation_episodes} episodes, {seeds}",
            title=f"{settings.env} from {Path(settings.dataset).name}",
        )
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    checkpoint.write_bytes(path, image.getvalue())


def _draw_returns(axes: Any, method: str, outcomes: Sequence[Outcome]) -> None:
    if not outcomes:
        return
    by_seed = [dict(outcome.evaluations) for outcome in outcomes]
    # What all seeds have: in a run whose evaluations were changed on the way, each has changed at a step of its own.
    steps = sorted(set[int].intersection(*map(set, by_seed)))
    estimates = [
        estimate([returns[: min(map(len, column))] for returns in column])
        for column in ([evaluations[step] for evaluations in by_seed] for step in steps)
    ]
    axes.plot(steps, [e.mean for e in estimates], marker="o", color=COLORS[method], label=METHODS[method])
    axes.fill_between(
        steps, [e.low for e in estimates], [e.high for e in estimates], color=COLORS[method], alpha=0.2, linewidth=0
    )


def _draw_losses(axes: Any, settings: Settings, run: Path) -> None:
    unit = settings.units[0]
    rows = metrics_rows(settings.folder(run, unit) / METRICS)
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        drawn = [row for row in rows if name in row]
        axes.plot([row["step"] for row in drawn], [row[name] for row in drawn], label=f"{name} ({unit.title})")
    axes.set_yscale("symlog")
