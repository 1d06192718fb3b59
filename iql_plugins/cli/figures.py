"""The pictures of a run, and of a dataset."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins import checkpoint
from iql_plugins.cli.errors import imported
from iql_plugins.cli.settings import METHODS, Settings
from iql_plugins.cli.statistics import Estimate, estimate
from iql_plugins.cli.training import METRICS, Outcome, metrics_rows
from iql_plugins.data import Dataset
from iql_plugins.data.arrays import Array
from iql_plugins.data.dataset import REWARD, leaves
from iql_plugins.data.episodes import episode_lengths, episode_returns
from iql_plugins.ope import Criterion
from iql_plugins.spaces import Box, Discrete, Spaces

__all__ = ["dataset_page", "learning_curve", "selection_page"]

#: Rows of a dataset.
MOST_DRAWN = 20_000
#: Of observations whose principal components are taken.
MOST_NUMBERS = 2**22
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
    _write(figure, path)


def dataset_page(source: Dataset, spaces: Spaces | None, path: Path) -> None:
    """Draws a dataset: returns, lengths, rewards, actions against their bounds, and what observations cover.

    Values that are not finite are left out. Of large datasets rows at equal distances are drawn.

    Args:
        source: the dataset.
        spaces: the environment's, for the bounds of actions; None where they are not known.
        path: of the PNG.
    """
    figure: Any = imported("matplotlib.figure").Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle(f"{source.source}: {len(source.tensors):,} transitions")
    axes = figure.subplots(2, 3).flat
    returns = episode_returns(source.tensors).numpy()
    _histogram(axes[0], returns, "return of an episode", "episodes")
    axes[1].plot(np.arange(len(returns)), returns, ".", markersize=3)
    axes[1].set(xlabel="episode", ylabel="return", title="in the order of the data")
    _histogram(axes[2], episode_lengths(source.tensors).numpy(), "length of an episode", "episodes")
    rows = _spread(len(source.tensors), MOST_DRAWN)
    _histogram(axes[3], _rows(source, REWARD, rows), "reward", "transitions")
    _draw_actions(axes[4], _rows(source, "action", rows), spaces)
    _draw_coverage(axes[5], source, rows)
    _write(figure, path)


def selection_page(title: str, criteria: Mapping[str, Mapping[str, Criterion]], path: Path) -> None:
    """Draws each policy's criteria with their 95% intervals, the best-ranked policy on top.

    Args:
        title: of the page.
        criteria: by policy, in the order of the ranking, and by name.
        path: of the PNG.
    """
    names = list(dict.fromkeys(name for found in criteria.values() for name in found))
    size = (1.5 + 2.2 * len(names), 1.2 + 0.3 * len(criteria))
    figure: Any = imported("matplotlib.figure").Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for place, found in enumerate(criteria.values()):
            if name in found:
                criterion = found[name]
                axes.plot([criterion.low, criterion.high], [place, place], color="tab:blue")
                axes.plot(criterion.value, place, "o", color="tab:blue")
        axes.set_title(name)
    axes.set_yticks(range(len(criteria)), list(criteria))
    axes.invert_yaxis()
    _write(figure, path)


def _spread(count: int, most: int) -> Tensor:
    """Row numbers at equal distances, the first and the last among them."""
    drawn = min(most, count)
    return torch.arange(drawn, device="cpu") * (count - 1) // max(drawn - 1, 1)


def _rows(source: Dataset, key: NestedKey, rows: Tensor) -> Array:
    """``[n, features]`` float64."""
    tensor = source.tensors.get(key)
    values: Array = tensor[rows.to(tensor.device)].reshape(len(rows), -1).double().cpu().numpy()
    return values


def _histogram(axes: Any, values: Array, name: str, counted: str) -> None:
    finite = values[np.isfinite(values)]
    try:
        axes.hist(finite, bins=50)
    except ValueError:
        # So close together, or so far apart, that no number is between them.
        axes.text(0.5, 0.5, f"{finite.min():g} to {finite.max():g}", ha="center", transform=axes.transAxes)
    axes.set(xlabel=name, ylabel=counted)


def _draw_actions(axes: Any, actions: Array, spaces: Spaces | None) -> None:
    space = None if spaces is None else spaces.action
    if isinstance(space, Discrete) or np.array_equal(actions, np.round(actions)):
        values, counts = np.unique(actions[np.isfinite(actions)], return_counts=True)
        axes.bar(values, counts)
        axes.set(xlabel="action", ylabel="transitions")
        return
    places = np.arange(actions.shape[1])
    columns = {
        index: column[np.isfinite(column)] for index, column in enumerate(actions.T) if np.isfinite(column).any()
    }
    axes.boxplot([*columns.values()], positions=[*columns], whis=(1, 99), showfliers=False, manage_ticks=False)
    for index, column in columns.items():
        axes.plot([index, index], [column.min(), column.max()], "_", color="tab:blue")
    if isinstance(space, Box):
        for bound, label in ((space.low, "bounds"), (space.high, None)):
            if bound is not None:
                axes.plot(places, np.broadcast_to(bound, places.shape), "r_", markersize=12, label=label)
        axes.legend()
    axes.set(xlabel="component of the action", ylabel="1, 25, 50, 75, 99%; extremes")


def _draw_coverage(axes: Any, source: Dataset, rows: Tensor) -> None:
    """The first two principal components of the standardised observations, episodes from dark to light."""
    keys = [key for key, tensor in leaves(source.tensors, "observation").items() if tensor.is_floating_point()]
    features = sum(source.tensors.get(key)[0].numel() for key in keys)
    rows = rows[_spread(len(rows), max(2, MOST_NUMBERS // max(features, 1)))]
    values = np.concatenate([_rows(source, key, rows) for key in keys] or [np.zeros((len(rows), 0))], axis=1)
    values = values[np.isfinite(values).all(axis=1)]
    axes.set(title="coverage of observations")
    if len(values) > 1:
        deviation = values.std(axis=0)
        values = (values - values.mean(axis=0))[:, deviation > 0] / deviation[deviation > 0]
    if values.shape[1] < 2 or len(values) < 2:
        axes.text(0.5, 0.5, "fewer than two features that are numbers", ha="center", transform=axes.transAxes)
        return
    _, scales, directions = np.linalg.svd(values, full_matrices=False)
    shares = scales**2 / np.sum(scales**2)
    places = values @ directions[:2].T
    axes.scatter(*places.T, c=np.arange(len(places)), s=2, linewidths=0, cmap="viridis")
    for axis, name in enumerate(("xlabel", "ylabel")):
        axes.set(**{name: f"principal component {axis + 1} ({shares[axis]:.0%})"})


def _write(figure: Any, path: Path) -> None:
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
