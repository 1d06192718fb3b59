"""The pictures of a run, of a dataset, and of a report."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins import checkpoint
from iql_plugins.cli.errors import imported
from iql_plugins.cli.settings import METHODS, Settings
from iql_plugins.cli.statistics import Curve, Estimate, return_curve
from iql_plugins.cli.training import METRICS, Outcome, metrics_rows
from iql_plugins.data import Dataset
from iql_plugins.data.arrays import Array
from iql_plugins.data.dataset import REWARD, leaves
from iql_plugins.data.episodes import episode_lengths, episode_returns
from iql_plugins.ope import Criterion
from iql_plugins.spaces import Box, Discrete, Spaces

__all__ = ["THEME", "Drawing", "Line", "dataset_page", "drawing", "key", "learning_curve", "selection_page"]

#: Rows of a dataset.
MOST_DRAWN = 20_000
#: Of a histogram; as many as the square root of the values where that is less, but for the second number.
MOST_BINS, FEWEST_BINS = 50, 10
#: Letters of a page's title that have room.
MOST_LETTERS = 80
#: Of observations whose principal components are taken.
MOST_NUMBERS = 2**22
#: What rows that are drawn stand for.
SHARE = "share of transitions"
COLORS = {"iql": "tab:blue", "bc": "tab:orange"}

#: The colours of a report by name, on light and on dark ground. Those of runs stay apart for the colour-blind, have a
#: contrast of at least 3 to the ground, and go with a marker, so that nobody needs them.
THEME: Mapping[str, tuple[str, str]] = {
    "ground": ("#ffffff", "#14171a"),
    "raised": ("#f5f6f7", "#1d2125"),
    "ink": ("#1b1f23", "#e9ecef"),
    "muted": ("#5c646c", "#a3abb3"),
    "rule": ("#dde1e5", "#343a40"),
    "run-0": ("#0060a8", "#5aaeff"),
    "run-1": ("#c2500a", "#ff9a4d"),
    "run-2": ("#008060", "#3fd0a4"),
    "run-3": ("#a03f86", "#f08fd0"),
    "run-4": ("#2f8fc4", "#c3e2f7"),
    "run-5": ("#3d434a", "#9aa1a9"),
}
#: One more than colours: the two together are another pair for each of 42 runs.
MARKERS = "os^DvPX"
#: Of a report's pictures, where a unit is a pixel of the page; matplotlib's is a 72th of an inch.
UNITS_PER_INCH = 72
LETTERS = {"color": THEME["muted"][0], "fontsize": 12}


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
            if by_seed := [outcome.evaluations for outcome in outcomes if outcome.unit.method == method]:
                _draw_curve(axes, return_curve(by_seed), marker="o", color=COLORS[method], label=METHODS[method])
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

    Values that are not finite are left out. Of large datasets rows at equal distances are drawn, which the page says.

    Args:
        source: the dataset.
        spaces: the environment's, for the bounds of actions; None where they are not known.
        path: of the PNG.
    """
    figure: Any = imported("matplotlib.figure").Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3).flat
    returns = episode_returns(source.tensors).numpy()
    name = source.source if len(source.source) <= MOST_LETTERS else f"…{source.source[1 - MOST_LETTERS :]}"
    rows = _spread(len(source.tensors), MOST_DRAWN)
    part = f"; lower row: {len(rows):,} of them, at equal distances" if len(rows) < len(source.tensors) else ""
    figure.suptitle(f"{name}\n{len(returns):,} episodes, {len(source.tensors):,} transitions{part}", fontsize=11)
    _histogram(axes[0], returns, "return of an episode", "episodes")
    axes[1].plot(np.arange(len(returns)), returns, ".", markersize=3)
    axes[1].set(xlabel="episode, in the order of the data", ylabel="return")
    _histogram(axes[2], episode_lengths(source.tensors).numpy(), "length of an episode, in steps", "episodes")
    _histogram(axes[3], _rows(source, REWARD, rows), "reward", SHARE)
    _draw_actions(axes[4], source, rows, spaces)
    _draw_coverage(axes[5], source, rows)
    _write(figure, path)


@dataclass(frozen=True)
class Line:
    """A curve of a report.

    Attributes:
        curve: what it shows.
        run: the number of the run, which decides colour and marker.
        baseline: whether it is of what the run is compared with, which is dashed, and has hollow markers.
    """

    curve: Curve
    run: int
    baseline: bool = False

    @property
    def style(self) -> dict[str, Any]:
        """In matplotlib's terms."""
        runs = [light for name, (light, _) in THEME.items() if name.startswith("run-")]
        color, marker = runs[self.run % len(runs)], MARKERS[self.run % len(MARKERS)]
        style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.75}
        if not self.baseline:
            return style
        return style | {"linestyle": (0, (4, 2)), "linewidth": 1.25, "markerfacecolor": THEME["ground"][0]}


@dataclass(frozen=True)
class Drawing:
    """A picture for a page.

    Attributes:
        width: of its view box.
        height: likewise.
        content: of an SVG element; its colours are the page's variables, named as in :data:`THEME`.
    """

    width: int
    height: int
    content: str


def drawing(
    lines: Sequence[Line],
    name: str,
    *,
    size: tuple[int, int],
    unit: str | None = None,
    levels: Sequence[Estimate] = (),
    points: bool = False,
) -> Drawing:
    """Curves by gradient steps, with their bands.

    Args:
        lines: in the order in which they are drawn.
        name: of the drawing, one word that no other one of the page has.
        size: width and height.
        unit: the name of the quantity; None where the page says it.
        levels: of the data, which are drawn across.
        points: whether each value is marked, or some only.
    """
    figure = _figure(size)
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(THEME["rule"][0])
    axes.tick_params(labelcolor=LETTERS["color"], labelsize=LETTERS["fontsize"], length=0)
    axes.grid(axis="y", color=THEME["rule"][0], linewidth=0.75)
    axes.set_axisbelow(True)
    for level in levels:
        axes.axhline(level.mean, color=THEME["muted"][0], linestyle=":", linewidth=1.25)
        if len(levels) == 1:
            axes.axhspan(level.low, level.high, color=THEME["muted"][0], alpha=0.12, linewidth=0)
        axes.annotate(
            "data",
            (0.005, level.mean),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 2),
            textcoords="offset points",
            **LETTERS,
        )
    for line in lines:
        every = 1 if points else max(1, len(line.curve.steps) // 5)
        band = 0.0 if line.baseline and len(lines) > 2 else 0.16 if len(lines) <= 4 else 0.1
        style = line.style if points else line.style | {"linewidth": 1.25, "markersize": 4}
        _draw_curve(axes, line.curve, alpha=band, markevery=(every - 1, every), **style)
    ticks = imported("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticks.MaxNLocator(size[0] // 75, integer=True))
    axes.yaxis.set_major_locator(ticks.MaxNLocator(size[1] // 42))
    axes.xaxis.set_major_formatter(ticks.FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", "−")))
    axes.set_xlim(left=0)
    axes.margins(x=0.02)
    if unit is not None:
        axes.set_xlabel("gradient steps", **LETTERS)
        axes.set_ylabel(unit, **LETTERS)
    return _drawn(figure, size, name)


def key(line: Line, name: str) -> Drawing:
    """What a line looks like, for a legend."""
    size = (34, 14)
    figure = _figure(size, layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 2), ylim=(-1, 1))
    axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **line.style)
    return _drawn(figure, size, name)


def _figure(size: tuple[int, int], layout: str = "constrained") -> Any:
    inches = (size[0] / UNITS_PER_INCH, size[1] / UNITS_PER_INCH)
    return imported("matplotlib.figure").Figure(figsize=inches, dpi=UNITS_PER_INCH, layout=layout, facecolor="none")


def _drawn(figure: Any, size: tuple[int, int], name: str) -> Drawing:
    """Matplotlib's SVG as a part of a page: text stays text, and nothing in it is named as in another drawing."""
    text = io.StringIO()
    # Names that are referred to depend on this word instead of chance.
    with imported("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    content = re.sub(r"(?s)^.*?<svg[^>]*>|</svg>\s*$|<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "",
                     text.getvalue())  # fmt: skip
    # Letters are the page's.
    content = re.sub(r"font-family: [^;]*; ", "", content)
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", content))
    content = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", content)
    content = re.sub(r'(?:xlink:)?(href="#|url\(#)', rf"\1{name}-", content)
    for color, (light, _) in THEME.items():
        content = content.replace(light, f"var(--{color})")
    return Drawing(*size, content)


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
    shares = np.full(len(finite), 1 / max(len(finite), 1)) if counted == SHARE else None
    bins = _bins(finite)
    _ticks(axes.xaxis, whole=not isinstance(bins, int))
    try:
        axes.hist(finite, bins=bins, weights=shares, edgecolor="white", linewidth=0.3)
    except ValueError:
        # So close together, or so far apart, that no number is between them.
        axes.text(0.5, 0.5, f"{finite.min():g} to {finite.max():g}", ha="center", transform=axes.transAxes)
    _ticks(axes.yaxis, whole=counted != SHARE)
    axes.set(xlabel=name, ylabel=counted)


def _ticks(axis: Any, *, whole: bool) -> None:
    """As many as have room; at whole numbers alone if these are counted, even where a single one is in sight."""
    axis.get_major_locator().set_params(nbins=6, integer=whole, min_n_ticks=1 if whole else 2)


def _bins(values: Array) -> int | Array:
    """How many, or their edges where values are whole numbers: as many of these in each bin as in the others."""
    most = min(MOST_BINS, max(FEWEST_BINS, math.isqrt(len(values))))
    if len(values) == 0 or not np.array_equal(values, np.round(values)):
        return most
    width = np.ceil((values.max() - values.min() + 1) / most)
    edges: Array = np.arange(values.min(), values.max() + width + 1, width) - 0.5
    return edges


def _draw_actions(axes: Any, source: Dataset, rows: Tensor, spaces: Spaces | None) -> None:
    space = None if spaces is None else spaces.action
    actions = _rows(source, "action", rows)
    _ticks(axes.xaxis, whole=True)
    if not source.tensors.get("action").is_floating_point():
        values, counts = np.unique(actions, return_counts=True)
        axes.bar(values, counts / len(actions))
        axes.set(xlabel="action", ylabel=SHARE)
        if isinstance(space, Discrete):
            axes.set_xlim(space.start - 0.6, space.start + space.n - 0.4)
        return
    places = np.arange(actions.shape[1])
    if isinstance(space, Box):
        for bound, label in ((space.low, "bounds"), (space.high, None)):
            if bound is not None:
                axes.plot(places, np.broadcast_to(bound, places.shape), "r_", markersize=18, label=label)
    columns = {
        index: column[np.isfinite(column)] for index, column in enumerate(actions.T) if np.isfinite(column).any()
    }
    if columns:
        axes.boxplot([*columns.values()], positions=[*columns], whis=(1, 99), showfliers=False, manage_ticks=False)
    for number, (index, column) in enumerate(columns.items()):
        label = None if number else "extremes"
        axes.plot([index, index], [column.min(), column.max()], "_", color="tab:blue", markeredgewidth=2, label=label)
    if columns:
        # Above the axes, where it hides nothing.
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    known = "" if isinstance(space, Box) and space.low is not None else "; bounds are not known"
    axes.set(xlabel=f"component of the action{known}", ylabel="quartiles; 1% and 99%")


def _draw_coverage(axes: Any, source: Dataset, rows: Tensor) -> None:
    """The first two principal components of the standardised observations, episodes from dark to light."""
    keys = [key for key, tensor in leaves(source.tensors, "observation").items() if tensor.is_floating_point()]
    features = sum(source.tensors.get(key)[0].numel() for key in keys)
    rows = rows[_spread(len(rows), max(2, MOST_NUMBERS // max(features, 1)))]
    values = np.concatenate([_rows(source, key, rows) for key in keys] or [np.zeros((len(rows), 0))], axis=1)
    values = values[np.isfinite(values).all(axis=1)]
    axes.set_title("coverage of observations,\nfirst ones dark, last ones light", fontsize="medium")
    if len(values) > 1:
        deviation = values.std(axis=0)
        values = (values - values.mean(axis=0))[:, deviation > 0] / deviation[deviation > 0]
    if values.shape[1] < 2 or len(values) < 2:
        axes.text(0.5, 0.5, "fewer than two features that are numbers", ha="center", transform=axes.transAxes)
        return
    _, scales, directions = np.linalg.svd(values, full_matrices=False)
    shares = scales**2 / np.sum(scales**2)
    places = values @ directions[:2].T
    # In an order of chance: none of them hides all others.
    order = np.random.default_rng(0).permutation(len(places))
    axes.scatter(*places[order].T, c=order, s=2, linewidths=0, cmap="viridis")
    for axis, name in enumerate(("xlabel", "ylabel")):
        axes.set(**{name: f"principal component {axis + 1} ({shares[axis]:.0%})"})


def _write(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    checkpoint.write_bytes(path, image.getvalue())


def _draw_curve(axes: Any, curve: Curve, *, color: str, alpha: float = 0.2, **style: Any) -> None:
    axes.plot(curve.steps, curve.mean, color=color, **style)
    axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=alpha, linewidth=0)


def _draw_losses(axes: Any, settings: Settings, run: Path) -> None:
    unit = settings.units[0]
    rows = metrics_rows(settings.folder(run, unit) / METRICS)
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        drawn = [row for row in rows if name in row]
        axes.plot([row["step"] for row in drawn], [row[name] for row in drawn], label=f"{name} ({unit.title})")
    axes.set_yscale("symlog")
