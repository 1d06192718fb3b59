"""Many seeds: a step of stacked agents against as many steps of single ones, on one core (or one GPU).

Both ways can use all cores, a process each: the ratio on one core is the one that counts.

    python tests/benchmarks/bench_seeds.py --widths 64 128 256 --seeds 2 4 8
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from contestants import Size, config_of, dataset_of, spaces_of
from interleaved import now

from iql_plugins.training.agent import Agent
from iql_plugins.training.multi_seed import fit_together


@dataclass
class Options:
    """What is measured."""

    widths: tuple[int, ...] = (64, 128, 256)
    """Of both hidden layers."""
    seeds: tuple[int, ...] = (2, 4, 8)
    """Numbers of agents."""
    rounds: int = 7
    """Interleaved; the table has medians."""
    steps: int = 100
    """Gradient steps of each agent in a round."""
    threads: int = 1
    """Of torch."""
    compile: bool = True
    """Whether losses and gradients are compiled."""
    device: str = "cpu"
    """Torch's name."""


def milliseconds(fit: Callable[[Callable[[int], None]], None], device: torch.device) -> float:
    """A step, from the end of the first one, which may compile, to that of the last."""
    times: list[float] = []

    def callback(step: int) -> None:
        times.append(now(device))

    fit(callback)
    return 1e3 * (times[-1] - times[0]) / (len(times) - 1)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{'width':>6} {'seeds':>6} {'one by one':>11} {'stacked':>8} {'ratio':>6}   (ms a step of all)")
    for width in options.widths:
        size = Size(hidden=width)
        data = dataset_of(size)
        config = config_of(size, "yes" if options.compile else "no")
        for count in options.seeds:
            singles, stacked = (
                [Agent(spaces_of(size), config, seed=seed, device=device) for seed in range(count)] for _ in range(2)
            )
            alone = [partial(agent.fit, data, options.steps) for agent in singles]
            together = partial(fit_together, stacked, data, options.steps)
            rows = []
            for _ in range(options.rounds):
                rows.append((sum(milliseconds(fit, device) for fit in alone), milliseconds(together, device)))
            first, second = (statistics.median(column) for column in zip(*rows, strict=True))
            ratio = statistics.median(one_by_one / stack for one_by_one, stack in rows)
            print(f"{width:6d} {count:6d} {first:11.2f} {second:8.2f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
