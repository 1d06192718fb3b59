"""What our replay buffer for d3rlpy brings: mini-batches from it, and d3rlpy's own IQL on it, against d3rlpy's.

``python tests/benchmarks/bench_d3rlpy.py``, at the headline's sizes (``contestants.Size``).
``bench.py --peers d3rlpy --adapters d3rlpy`` compares the algorithms.
"""

import d3rlpy
import structlog
import tyro
from contestants import Size, d3rlpy_fit, d3rlpy_iql, dataset_of, mdp_dataset
from interleaved import Options, Steps, report

from iql_d3rlpy import as_fast_buffer

SIZE = Size()


def batches(buffer: d3rlpy.dataset.ReplayBuffer) -> Steps:
    """Mini-batches, one after another."""
    return lambda count: [len(buffer.sample_transition_batch(SIZE.batch)) for _ in range(count)]


def sample() -> dict[str, Steps]:
    """A mini-batch from either buffer."""
    dataset = mdp_dataset(dataset_of(SIZE))
    return {"fast": batches(as_fast_buffer(dataset)), "d3rlpy": batches(dataset)}


def fit() -> dict[str, Steps]:
    """A step of d3rlpy's IQL on either buffer."""
    dataset = mdp_dataset(dataset_of(SIZE))
    buffers = {"fast": as_fast_buffer(dataset), "d3rlpy": dataset}
    return {name: d3rlpy_fit(d3rlpy_iql(SIZE, "cpu:0"), buffer) for name, buffer in buffers.items()}


if __name__ == "__main__":
    with structlog.testing.capture_logs():
        report({"sample": sample, "fit": fit}, tyro.cli(Options))
