"""Two processes of one thread against one, at the same batch: what a step of both costs beside its computation.

torchrun --nproc-per-node 2 tests/benchmarks/bench_distributed.py --batch-size 1024

Three timings, a round of each after the other: one process takes the whole batch alone, while the others wait; each
takes its part, and tells nobody, which is what the machine gives to as many processes at a time; and they train
together. Efficiency is the first divided by so many times the last; what is due to us alone is the second by the last.
"""

import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import tyro
from contestants import Size, config_of, dataset_of, spaces_of

from iql_plugins.training.agent import Agent
from iql_plugins.training.distributed import process_group, synchronize


@dataclass
class Options:
    """What is measured."""

    batch_size: int = 1024
    """Of all processes together."""
    hidden: int = 256
    """Units of each of two hidden layers."""
    rounds: int = 9
    """Of each timing, after one that warms up."""
    steps: int = 60
    """Gradient steps of a round."""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    size = Size(hidden=options.hidden)
    with process_group() as processes:

        def agent(batch_size: int) -> Agent:
            config = config_of(size, "yes").replace(batch_size=batch_size)
            return Agent(spaces_of(size), config, seed=0)

        dataset = dataset_of(size)
        alone, apart = agent(options.batch_size), agent(options.batch_size // processes.count)
        together = agent(options.batch_size)
        synchronize(together.learner)
        contestants = {"alone": alone, "apart": apart, "together": together}
        sources = {name: each.transitions(dataset) for name, each in contestants.items()}

        def steps(name: str) -> None:
            each, source = contestants[name], sources[name]
            rows, batch_size = len(source), each.config.batch_size
            each.train(
                lambda: source.batch(each.learner.draw(rows, batch_size, each.generator, on_disk=False)), options.steps
            )

        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(options.rounds + 1):
            for name in contestants:
                dist.barrier()
                begin = time.perf_counter()
                if name != "alone" or processes.rank == 0:
                    steps(name)
                dist.barrier()
                if number:
                    seconds[name].append((time.perf_counter() - begin) / options.steps)
        if processes.rank:
            return
        for name, own in seconds.items():
            sys.stdout.write(f"{name:10} {1e3 * statistics.median(own):8.3f} ms\n")
        rounds = list(zip(*seconds.values(), strict=True))
        efficiency = statistics.median(alone / (processes.count * together) for alone, _, together in rounds)
        ours = statistics.median(apart / together for _, apart, together in rounds)
        sys.stdout.write(
            f"efficiency of {processes.count} processes {efficiency:.2f}, of what is due to us {ours:.2f}\n"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
