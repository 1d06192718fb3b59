"""Gradient steps a second of this package and of the libraries installed, measured side by side."""

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iql_plugins.cli.errors import imported
from iql_plugins.cli.output import Result, note, table
from iql_plugins.cli.peers import PEERS, Size, Steps, dataset_of, maker, ours

__all__ = ["Timing", "bench", "measure"]

REFERENCE = "iql-plugins"
#: Products in one measurement of the machine's peak, each as large as the largest of a step.
PRODUCTS = 16


@dataclass(frozen=True)
class Timing:
    """Of one contestant.

    Attributes:
        name: of the contestant.
        milliseconds: a step, median over rounds.
        ratio: how many times as long a step takes as ours, median over rounds of the quotients.
    """

    name: str
    milliseconds: float
    ratio: float


def bench(
    peers: Sequence[str],
    *,
    size: Size,
    adapters: Sequence[str] = (),
    rounds: int = 9,
    steps: int = 50,
    threads: int | None = None,
    plot: Path | None = None,
) -> Result:
    """Measures this package's step against peers, in interleaved rounds.

    Args:
        peers: names of peers, or Python files; see :func:`iql_plugins.cli.peers.maker`.
        size: of the problem.
        adapters: further adapters of ours to measure, compiled, beside the plain one.
        rounds: how often each is measured.
        steps: gradient steps in a round.
        threads: of torch; None leaves them as they are.
        plot: where a bar chart goes.

    Returns:
        A table, and the same as JSON.

    Raises:
        UserError: for a peer that is unknown or not installed.
    """
    makers = {peer if peer in PEERS else Path(peer).stem: maker(peer) for peer in peers}
    if threads is not None:
        torch.set_num_threads(threads)
    data = dataset_of(size)
    contestants: dict[str, Steps] = {}
    begin = time.perf_counter()
    contestants[REFERENCE] = ours("tensor", "yes")(size, data)
    contestants[REFERENCE](1)
    warm_up = time.perf_counter() - begin
    contestants[f"{REFERENCE}, eager"] = ours("tensor", "no")(size, data)
    for adapter in adapters:
        contestants[f"{REFERENCE} through {adapter}"] = ours(adapter, "yes")(size, data)
    for name, make in makers.items():
        contestants[name] = make(size, data)
    timings, peak = measure(contestants, size, rounds, steps)
    own = timings[0].milliseconds
    share = size.multiplications / (own * 1e-3) / peak
    document = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "size": vars(size),
        "rounds": rounds,
        "steps": steps,
        "warm_up_seconds": warm_up,
        "peak_gflops": peak / 1e9,
        "share_of_peak": share,
        "timings": {timing.name: {"ms": timing.milliseconds, "ratio": timing.ratio} for timing in timings},
    }
    rows = [
        [timing.name, f"{timing.milliseconds:.2f}", f"{1e3 / timing.milliseconds:.0f}", f"{timing.ratio:.2f}"]
        for timing in timings
    ]
    lines = [
        table(["", "ms a step", "steps a second", "times as long"], rows),
        f"observation {size.observation}, action {size.action}, batch {size.batch}, hidden {size.hidden}; "
        f"{torch.get_num_threads()} threads, median of {rounds} rounds of {steps} steps",
        f"{share:.0%} of the {peak / 1e9:.0f} GFLOP/s that matrix products reach here; compiled in {warm_up:.1f} s",
    ]
    if plot is not None:
        _draw(timings, plot)
        lines.append(f"wrote {plot}")
    return Result(document, lines)


def measure(contestants: Mapping[str, Steps], size: Size, rounds: int, steps: int) -> tuple[list[Timing], float]:
    """Timings of all contestants, the first one being the reference, and the machine's peak in FLOP/s.

    Rounds are interleaved, so that a machine that slows down slows all of them; the first round warms up.
    """
    left, right = torch.randn(size.hidden, size.hidden), torch.randn(size.hidden, size.batch)

    def products(count: int) -> None:
        for _ in range(count * PRODUCTS):
            torch.mm(left, right)

    everything: dict[str, Steps] = {**contestants, "": products}
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    for round_number in range(rounds + 1):
        for name, run in everything.items():
            begin = time.perf_counter()
            run(steps)
            if round_number:
                seconds[name].append((time.perf_counter() - begin) / steps)
        note(f"round {round_number} of {rounds}" if round_number else "warmed up")
    reference = next(iter(contestants))
    timings = [
        Timing(
            name,
            1e3 * statistics.median(seconds[name]),
            statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True)),
        )
        for name in contestants
    ]
    operations = 2 * PRODUCTS * size.hidden * size.hidden * size.batch
    return timings, operations / statistics.median(seconds[""])


def _draw(timings: Sequence[Timing], path: Path) -> None:
    figure_module: Any = imported("matplotlib.figure")
    figure = figure_module.Figure(figsize=(6, 0.5 * len(timings) + 1), layout="constrained")
    axes = figure.subplots()
    names = [timing.name for timing in timings]
    axes.barh(names, [1e3 / timing.milliseconds for timing in timings])
    axes.invert_yaxis()
    axes.set(xlabel="gradient steps a second")
    figure.savefig(path, dpi=150)
