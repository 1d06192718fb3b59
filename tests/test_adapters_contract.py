"""All four adapters keep to the contract that every adapter must keep to."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import SPACES, make_dataset

import iql_plugins
from iql_plugins.testing import check_adapter


def tensors() -> Any:
    return {"action": torch.zeros(5, 1)} | {
        name: torch.zeros(5, *shape, dtype=dtype)
        for name, shape, dtype in (
            ("observation", (3,), torch.float32),
            ("next_observation", (3,), torch.float32),
            ("next_reward", (1,), torch.float32),
            ("next_done", (1,), torch.bool),
            ("next_terminated", (1,), torch.bool),
        )
    }


def sb3_samples() -> Any:
    import numpy as np
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import ReplayBuffer

    buffer = ReplayBuffer(5, Box(-1.0, 1.0, (3,)), Box(-1.0, 1.0, (1,)), "cpu")
    for _ in range(5):
        buffer.add(np.zeros(3), np.zeros(3), np.zeros(1), np.zeros(1), np.zeros(1), [{}])
    return buffer.sample(4)


def d3rlpy_mini_batch() -> Any:
    from iql_d3rlpy import to_replay_buffer

    return to_replay_buffer(make_dataset(SPACES["continuous"])).sample_transition_batch(4)


def torchrl_sample() -> Any:
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(80), batch_size=4)
    buffer.extend(make_dataset(SPACES["continuous"]))
    return buffer.sample()


BATCHES: dict[str, Callable[[], Any]] = {
    "tensor": tensors,
    "sb3": sb3_samples,
    "d3rlpy": d3rlpy_mini_batch,
    "torchrl": torchrl_sample,
}


FRAMEWORKS = {"tensor": "torch", "sb3": "stable_baselines3", "d3rlpy": "d3rlpy", "torchrl": "torchrl"}


def test_the_four_adapters_are_there() -> None:
    ours = {name for name, info in iql_plugins.available().items() if info.distribution == "iql-plugins"}
    assert ours == BATCHES.keys()


@pytest.mark.parametrize("name", BATCHES)
def test_an_adapter_keeps_to_the_contract(name: str) -> None:
    pytest.importorskip(FRAMEWORKS[name])
    check_adapter(name, batch=BATCHES[name]())


def test_the_command_line_knows_a_native_file_by_its_suffix() -> None:
    for framework in FRAMEWORKS.values():
        pytest.importorskip(framework)
    suffixes = {name: getattr(iql_plugins.load(name).training, "suffix", None) for name in BATCHES}
    assert suffixes == {"tensor": ".safetensors", "sb3": ".zip", "d3rlpy": ".d3", "torchrl": ".pt"}


BENCHMARKS = Path(__file__).parent / "benchmarks"
MEMORY = """
import gc, sys
from pathlib import Path
from contestants import Size, config_of, dataset_of, spaces_of
from iql_plugins.agent import Agent
from iql_plugins.cli.training import adapter_training

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

size = Size(transitions=1_000_000, hidden=8, batch=8)
data = dataset_of(size)
training = adapter_training(sys.argv[1])
algorithm = training.from_agent(Agent(spaces_of(size), config_of(size, "no"), seed=0))
training.fit(algorithm, data[:1000].clone(), 2, lambda step: None)
gc.collect()
before, seen = resident_bytes(), []
training.fit(algorithm, data, 2, lambda step: seen.append(resident_bytes()))
print((max(seen) - before) / sum(tensor.nbytes for tensor in data.values(True, True)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="reads its resident memory from /proc, which Linux alone has")
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_million_transitions_take_their_packed_size_once(name: str) -> None:
    # In a process of its own, where nothing has left memory to take from.
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, name], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert float(process.stdout.split()[-1]) < 1.6
