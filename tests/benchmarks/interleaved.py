"""Contestants timed side by side. Rounds are interleaved: a machine that slows down slows all of them."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

#: Takes a number of steps.
Steps = Callable[[int], object]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Of one contestant.

    Attributes:
        ms: milliseconds a step, median over rounds.
        ratio: how many times as long a step takes as the first contestant's, median over rounds of the quotients.
    """

    ms: float
    ratio: float


@dataclass(frozen=True)
class Options:
    """How a benchmark measures."""

    modes: tuple[str, ...] = ()
    """Of those that the benchmark documents; all by default."""
    rounds: int = 15
    """Each contestant runs once a round."""
    steps: int = 30
    """In a round."""
    threads: int | None = None
    """Of torch; by default as many as torch takes."""
    json: bool = False
    """Print one JSON document."""


def now(device: torch.device) -> float:
    """Seconds, once everything that was launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timings(contestants: Mapping[str, Steps], rounds: int, steps: int, device: torch.device = CPU) -> dict[str, Timing]:
    """Timings by name; the first contestant is the reference, and a round that is not counted warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            begin = now(device)
            run(steps)
            if number:
                seconds[name].append((now(device) - begin) / steps)
        print(f"round {number} of {rounds}" if number else "warmed up", file=sys.stderr, flush=True)
    reference = next(iter(seconds.values()))
    return {
        name: Timing(
            1e3 * statistics.median(own), statistics.median(a / b for a, b in zip(own, reference, strict=True))
        )
        for name, own in seconds.items()
    }


def report(modes: Mapping[str, Callable[[], Mapping[str, Steps]]], options: Options) -> None:
    """Prints the timings of each mode's contestants, ours first."""
    if unknown := set(options.modes) - set(modes):
        raise SystemExit(f"--modes must be some of {', '.join(modes)}, got {', '.join(sorted(unknown))}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = {
        mode: timings(contestants(), options.rounds, options.steps)
        for mode, contestants in modes.items()
        if not options.modes or mode in options.modes
    }
    if options.json:
        machine = {"threads": torch.get_num_threads(), "machine": platform.machine()}
        document = {mode: {name: asdict(timing) for name, timing in result.items()} for mode, result in results.items()}
        print(json.dumps(machine | document))
        return
    width = max((len(name) for result in results.values() for name in result), default=0)
    for mode, result in results.items():
        for name, timing in result.items():
            print(f"{mode:10} {name:{max(width, 12)}} {timing.ms:8.3f} ms   {timing.ratio:.2f} times as long as ours")
