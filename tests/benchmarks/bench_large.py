"""Data larger than memory: resident memory, time to the first step and steps a second from shards on disk.

python tests/benchmarks/bench_large.py                     # 100 million transitions, 17 GB on the disk
python tests/benchmarks/bench_large.py --rows 1000000      # and what the same trains at in memory
"""

import re
import resource
import shutil
import statistics
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from contestants import Size, config_of, spaces_of
from tensordict import TensorDictBase

from iql_plugins import read_dataset
from iql_plugins.cli import main as iql_plugins
from iql_plugins.cli.training import adapter_training
from iql_plugins.data.dataset import chunks
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.training.agent import Agent

#: Of what is made: an episode has so many steps.
EPISODE = 1000
#: More rows than these are not brought into memory for comparison.
IN_MEMORY = 5_000_000


@dataclass
class Options:
    """What is measured."""

    rows: int = 100_000_000
    """Transitions, of 17 observations and 6 actions: 168 bytes each in shards."""
    folder: Path = Path(tempfile.gettempdir())
    """Where the data are written, and deleted again."""
    adapters: tuple[str, ...] = ("tensor", "sb3", "d3rlpy", "torchrl")
    """Whose training is measured."""
    steps: int = 1000
    """Gradient steps of each round, the first half of which warms up."""
    rounds: int = 5
    """Of shards and memory in turn; medians are shown."""
    threads: int = 1
    """Of torch."""
    compile: Literal["yes", "no"] = "no"
    """Whether losses and gradients are compiled: the first step is then later, the others sooner."""


def main(options: Options) -> None:
    size = Size(transitions=options.rows)
    # The file that is converted, its columns unpacked, and the shards.
    needed, free = 3 * 170 * options.rows, shutil.disk_usage(options.folder).free
    if needed > free:
        print(f"skipped: {options.rows:,} transitions take {needed:,} bytes on the way, {options.folder} has {free:,}")
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        file, shards = Path(name) / "data.npz", Path(name) / "shards"
        write(file, size)
        begin = time.perf_counter()
        assert iql_plugins(["convert-dataset", str(file), str(shards)]) == 0
        print(f"converted in {time.perf_counter() - begin:.1f} s, peak of memory, mapped files included, {peak()}")
        file.unlink()
        print(f"{'':>12} {'first step':>11} {'steps a second':>15} {'in memory':>10} {'private and mapped':>20}")
        for adapter in options.adapters:
            begin = time.perf_counter()
            tensors = read_dataset(shards).tensors
            first, rate = measured(adapter, tensors, options)
            memory = resident()
            rates, ratios = [rate], []
            if options.rows <= IN_MEMORY:
                copied = tensors.clone()
                for _ in range(options.rounds):
                    rates.append(measured(adapter, tensors, options)[1])
                    ratios.append(rates[-1] / measured(adapter, copied, options)[1])
            compared = f"{statistics.median(ratios):.2f}" if ratios else "-"
            print(
                f"{adapter:>12} {first - begin:>9.2f} s {statistics.median(rates):>15.1f} {compared:>10} {memory:>20}"
            )


def write(file: Path, size: Size) -> None:
    """An ``.npz`` of random numbers, written a chunk at a time."""
    rows = size.transitions
    shapes = {
        "observations": (rows, size.observation),
        "actions": (rows, size.action),
        "rewards": (rows,),
        "next_observations": (rows, size.observation),
        "terminals": (rows,),
        "timeouts": (rows,),
    }

    with zipfile.ZipFile(file, "w") as archive:
        for name, shape in shapes.items():
            flags = name in ("terminals", "timeouts")
            random = np.random.default_rng(0)
            if name == "next_observations":
                # The same numbers, a row ahead.
                random.random(shapes[name][1:], np.float32)
            dtype = np.dtype(bool if flags else np.float32)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(member, header)
                for part in chunks(rows, dtype.itemsize * int(np.prod(shape[1:]))):
                    if flags:
                        position = np.arange(part.start, part.stop)
                        values = (position % EPISODE == EPISODE - 1) & (name == "timeouts")
                    else:
                        values = random.random((part.stop - part.start, *shape[1:]), np.float32)
                    member.write(values.tobytes())


def measured(adapter: str, tensors: TensorDictBase, options: Options) -> tuple[float, float]:
    """When the first step was done, and steps a second of the second half."""
    size, steps = Size(transitions=options.rows), options.steps
    training, spaces = adapter_training(adapter), spaces_of(size)
    config = config_of(size, options.compile).replace(
        n_steps=steps, normalize_observations=True, reward_scale="return_range"
    )
    agent = Agent(spaces, config, normalizers=Normalizers.fit(tensors, spaces, config), seed=0)
    times: list[float] = []
    training.fit(training.from_agent(agent), tensors, steps, lambda step: times.append(time.perf_counter()))
    half = len(times) // 2
    return times[0], (len(times) - 1 - half) / (times[-1] - times[half])


def resident() -> str:
    """Memory of this process that is its own, and that of files, which the system takes back when it needs it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return "unknown"
    found = {name: int(number) for name, number in re.findall(r"(Rss\w+):\s*(\d+) kB", status.read_text())}
    return f"{found['RssAnon'] // 1024:,} and {found['RssFile'] // 1024:,} MB"


def peak() -> str:
    """Megabytes, mapped files among them."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024:,} MB"


if __name__ == "__main__":
    main(tyro.cli(Options))
