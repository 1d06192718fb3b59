"""Gradient steps a second of this package and of the libraries installed, measured side by side."""

import contextlib
import io
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from iql_plugins import checkpoint
from iql_plugins.cli.errors import UserError, imported
from iql_plugins.cli.output import Result, note, table
from iql_plugins.cli.peers import Maker, Size, Steps, dataset_of, installed, makers, ours
from iql_plugins.cli.train import device_name

__all__ = ["Timing", "bench", "measure"]

REFERENCE = "iql-plugins"
#: Products in one measurement of the machine's peak, each as large as the largest of a step.
PRODUCTS = 16
#: Steps in a round, by the type of the device: on a GPU they are short.
STEPS = {"cuda": 1000}


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
    peers: Sequence[str] | None,
    *,
    size: Size,
    adapters: Sequence[str],
    rounds: int,
    steps: int | Literal["auto"],
    device: str,
    threads: int | None,
    plot: Path | None,
) -> Result:
    """Measures this package's step against peers, in interleaved rounds.

    Args:
        peers: names of peers, or Python files; see :func:`iql_plugins.cli.peers.makers`. None takes those whose
            library is installed.
        size: of the problem.
        adapters: further adapters of ours to measure, compiled, beside the plain one.
        rounds: how often each is measured.
        steps: gradient steps in a round.
        device: where all of them train that can; ``"auto"`` takes the GPU if there is one. On a GPU this package's step
            is measured as a CUDA graph, too.
        threads: of torch; None leaves them as they are.
        plot: where a bar chart goes.

    Returns:
        A table, and the same as JSON.

    Raises:
        UserError: for a peer or an adapter that is unknown or not installed, a device that is not there, or a picture
            that cannot be written.
    """
    for name, value in (("rounds", rounds), ("steps", steps), ("threads", threads)):
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if plot is not None:
        _check_picture(plot)
    where = torch.device(device_name(device))
    count = STEPS.get(where.type, 200) if steps == "auto" else steps
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        # What libraries have to say is not the result.
        with contextlib.redirect_stdout(sys.stderr):
            made = makers(installed() if peers is None else peers)
            own = {adapter: ours(adapter, "yes") for adapter in adapters}
            return _bench(made, own, size, rounds, count, plot, where)
    finally:
        torch.set_num_threads(before)


def _bench(
    peers: Mapping[str, Maker],
    adapters: Mapping[str, Maker],
    size: Size,
    rounds: int,
    steps: int,
    plot: Path | None,
    device: torch.device,
) -> Result:
    data = dataset_of(size).to(device)
    begin = _now(device)
    contestants = {REFERENCE: ours("tensor", "yes")(size, data)}
    contestants[REFERENCE](1)
    warm_up = _now(device) - begin
    contestants[f"{REFERENCE}, eager"] = ours("tensor", "no")(size, data)
    if device.type == "cuda":
        reduced, captured = ours("tensor", "yes", mode="reduce-overhead"), ours("tensor", "yes", capture=True)
        contestants[f"{REFERENCE}, reduce-overhead"] = reduced(size, data)
        contestants[f"{REFERENCE}, CUDA graph"] = captured(size, data)
    contestants |= {f"{REFERENCE} through {name}": make(size, data) for name, make in adapters.items()}
    contestants |= {name: make(size, data) for name, make in peers.items()}
    timings, peak = measure(contestants, size, rounds, steps, device)
    share = size.multiplications / (timings[0].milliseconds * 1e-3) / peak
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    document = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(device),
            "gpu": gpu,
        },
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
        f"{gpu or f'{torch.get_num_threads()} threads'}, median of {rounds} rounds of {steps} steps",
        f"{share:.0%} of the {peak / 1e9:.0f} GFLOP/s that matrix products reach here; compiled in {warm_up:.1f} s",
    ]
    if plot is not None:
        _draw(timings, plot)
        lines.append(f"wrote {plot}")
    return Result(document, lines)


def measure(
    contestants: Mapping[str, Steps], size: Size, rounds: int, steps: int, device: torch.device
) -> tuple[list[Timing], float]:
    """Timings of all contestants, the first one being the reference, and the device's peak in FLOP/s.

    Rounds are interleaved, so that a machine that slows down slows all of them; the first round warms up.
    """
    left = torch.randn(size.hidden, size.hidden, device=device)
    right = torch.randn(size.hidden, size.batch, device=device)

    def products(count: int) -> None:
        for _ in range(count * PRODUCTS):
            torch.mm(left, right)

    everything: dict[str, Steps] = {**contestants, "": products}
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    for round_number in range(rounds + 1):
        for name, run in everything.items():
            begin = _now(device)
            run(steps)
            if round_number:
                seconds[name].append((_now(device) - begin) / steps)
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


def _now(device: torch.device) -> float:
    """Seconds, once everything that was launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_picture(path: Path) -> None:
    """Raises :class:`UserError` for what would fail after minutes of measuring."""
    known = imported("matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise UserError(f"--plot must be a file with one of the suffixes {', '.join(sorted(known))}, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")


def _draw(timings: Sequence[Timing], path: Path) -> None:
    figure_module: Any = imported("matplotlib.figure")
    figure = figure_module.Figure(figsize=(6, 0.5 * len(timings) + 1), layout="constrained")
    axes = figure.subplots()
    names = [timing.name for timing in timings]
    axes.barh(names, [1e3 / timing.milliseconds for timing in timings])
    axes.invert_yaxis()
    axes.set(xlabel="gradient steps a second")
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix(".").lower(), dpi=150)
    checkpoint.write_bytes(path, image.getvalue())
