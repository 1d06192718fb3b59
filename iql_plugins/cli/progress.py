"""How a training is going, for people, on stderr: bars on a terminal, lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from iql_plugins.cli.errors import imported
from iql_plugins.cli.output import note
from iql_plugins.cli.settings import Settings, Unit
from iql_plugins.cli.training import Progress

__all__ = ["reporter"]

LOSSES = ("loss_actor", "loss_qvalue", "loss_value")


@contextlib.contextmanager
def reporter(settings: Settings) -> Iterator[Callable[[Progress], None]]:
    """Yields what shows a training's progress."""
    if not sys.stderr.isatty():
        yield _line_of(settings)
        return
    with _bars(settings) as report:
        yield report


def _line_of(settings: Settings) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.compiles:
            note(f"{progress.unit.title}: {_compiles(settings)}")
        elif progress.evaluated:
            note(
                f"{progress.unit.title}: step {progress.step} of {settings.hyperparameters.n_steps}, "
                f"{progress.rate:.0f} steps/s, {_losses(progress)}"
            )

    return report


@contextlib.contextmanager
def _bars(settings: Settings) -> Iterator[Callable[[Progress], None]]:
    rich_progress = imported("rich.progress")
    console = imported("rich.console").Console(stderr=True)
    bars: Any = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=20),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[losses]}"),
        console=console,
    )
    with bars:
        tasks: dict[Unit, Any] = {
            unit: bars.add_task(unit.title, total=settings.hyperparameters.n_steps, rate="", losses="waits")
            for unit in settings.units
        }

        def report(progress: Progress) -> None:
            rate, losses = f"{progress.rate:.0f} steps/s", _losses(progress)
            if progress.compiles:
                rate, losses = "", _compiles(settings)
            bars.update(tasks[progress.unit], completed=progress.step, rate=rate, losses=losses)

        yield report


def _compiles(settings: Settings) -> str:
    on_disk = ": seconds the first time, fewer from the disk later"
    return "compiles" + (on_disk if torch.device(settings.device).type == "cpu" else "")


def _losses(progress: Progress) -> str:
    losses = [f"{name} {progress.metrics[name]:.3g}" for name in LOSSES if name in progress.metrics]
    losses += [f"{name} {value:.3g}" for name, value in progress.held_out.items()]
    if progress.mean_return is not None:
        losses.append(f"return {progress.mean_return:.1f}")
    return ", ".join(losses)
