"""Our IQL and our replay buffer against d3rlpy's own: same data, same sizes, interleaved in one process.

``python tests/benchmarks/bench_d3rlpy.py`` prints the median of each and the median of the ratios: a step of ``fit`` of
our IQL (eager and compiled) and of d3rlpy's; a mini-batch from the fast buffer and from d3rlpy's; a step of d3rlpy's
IQL on either buffer. The sizes are the headline's: observations 17, actions 6, batch 256, two critics, two hidden
layers of 256.
"""

import argparse
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import d3rlpy
import numpy as np
import structlog
import torch
from d3rlpy.logging import NoopAdapterFactory

from iql_d3rlpy import IQLConfig, as_fast_buffer

OBSERVATION, ACTION, BATCH = 17, 6, 256
TRANSITIONS, EPISODE = 100_000, 1000

Fit = Callable[[int], object]


def dataset() -> d3rlpy.dataset.MDPDataset:
    """Random transitions in episodes that are cut."""
    rng = np.random.default_rng(0)
    return d3rlpy.dataset.MDPDataset(
        rng.normal(size=(TRANSITIONS, OBSERVATION)).astype(np.float32),
        rng.uniform(-1.0, 1.0, (TRANSITIONS, ACTION)).astype(np.float32),
        rng.normal(size=TRANSITIONS).astype(np.float32),
        np.zeros(TRANSITIONS),
        (np.arange(TRANSITIONS) % EPISODE == EPISODE - 1).astype(float),
    )


def fit_of(algorithm: Any, data: Any) -> Fit:
    """``fit`` for a number of steps, without files and progress bars."""
    algorithm.build_with_dataset(data)

    def fit(steps: int) -> object:
        return algorithm.fit(
            data, n_steps=steps, n_steps_per_epoch=steps, logger_adapter=NoopAdapterFactory(), show_progress=False
        )

    return fit


def sample_of(data: Any) -> Fit:
    """Mini-batches, one after another."""

    def sample(count: int) -> object:
        return [len(data.sample_transition_batch(BATCH)) for _ in range(count)]

    return sample


def measure(runs: dict[str, Fit], rounds: int, repeats: int) -> dict[str, float]:
    """Median milliseconds a step of each, and the median ratio of the last to each of the others."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(10)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(repeats)
            times[name].append((time.perf_counter() - start) / repeats * 1e3)
    *others, base = times
    result = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    for name in others:
        result[f"{name}_ratio"] = statistics.median(a / b for a, b in zip(times[base], times[name], strict=True))
    return result


def comparisons(compiled: bool) -> dict[str, dict[str, Fit]]:
    """What is compared with what; the last of each is d3rlpy's own."""
    data = dataset()
    fast = as_fast_buffer(data)
    ours = {"eager": fit_of(IQLConfig().create(), data)}
    if compiled:
        ours["compiled"] = fit_of(IQLConfig(compile_graph=True).create(), data)
    theirs = [fit_of(d3rlpy.algos.IQLConfig().create(), buffer) for buffer in (fast, data)]
    return {
        "fit": {**ours, "d3rlpy": theirs[1]},
        "sample": {"fast": sample_of(fast), "d3rlpy": sample_of(data)},
        "d3rlpy_on_fast": {"fast": theirs[0], "d3rlpy": theirs[1]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    results = {
        name: measure(runs, arguments.rounds, arguments.repeats)
        for name, runs in comparisons(not arguments.eager).items()
    }
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "machine": platform.machine(), **results}))
    else:
        for name, result in results.items():
            for other in [key.removesuffix("_ratio") for key in result if key.endswith("_ratio")]:
                print(
                    f"{name:15} {other:9} {result[f'{other}_ms']:7.3f} ms   d3rlpy {result['d3rlpy_ms']:7.3f} ms   "
                    f"{result[f'{other}_ratio']:.2f} times as fast"
                )
