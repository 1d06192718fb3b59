"""All four adapters keep to the contract that every adapter must keep to."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import SPACES, make_agent, make_dataset, same, weights
from conftest import dtypes_given
from requirements import needs_proc
from tensordict import TensorDict

import iql_plugins
from iql_plugins.config import IQLConfig
from iql_plugins.hookspecs import Training
from iql_plugins.networks.encoders import NatureCNN
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.testing import check_adapter
from iql_plugins.training.agent import Agent
from iql_plugins.training.learner import DivergenceError, Learner


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
@pytest.mark.slow
def test_an_adapter_keeps_to_the_contract(name: str) -> None:
    pytest.importorskip(FRAMEWORKS[name])
    check_adapter(name, batch=BATCHES[name]())


def test_the_command_line_knows_a_native_file_by_its_suffix() -> None:
    for framework in FRAMEWORKS.values():
        pytest.importorskip(framework)
    suffixes = {name: getattr(iql_plugins.load(name).training, "suffix", None) for name in BATCHES}
    assert suffixes == {"tensor": ".safetensors", "sb3": ".zip", "d3rlpy": ".d3", "torchrl": ".pt"}


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEMORY = """
import gc, sys
from pathlib import Path
from contestants import Size, config_of, dataset_of, spaces_of
from iql_plugins.training.agent import Agent
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
@needs_proc
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_million_transitions_take_their_packed_size_once(name: str) -> None:
    # In a process of its own, where nothing has left memory to take from.
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, name], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert float(process.stdout.split()[-1]) < 1.6


EVERY = pytest.mark.parametrize("name", FRAMEWORKS)


def training_of(name: str) -> Training:
    pytest.importorskip(FRAMEWORKS[name])
    training = iql_plugins.load(name).training
    assert training is not None
    return training


def algorithm_of(name: str, **hyperparameters: Any) -> tuple[Training, Agent, Any]:
    """An adapter's training, an agent, and the adapter's algorithm around it."""
    training = training_of(name)
    agent = make_agent("continuous", **hyperparameters)
    return training, agent, training.from_agent(agent)


def equal_rows(*actions: float) -> TensorDict:
    """Transitions that differ in their actions' first entry alone, whose bounds are -1 and 2; each ends an episode."""
    torch.manual_seed(0)
    rows = make_dataset(SPACES["continuous"], 1)[[0] * len(actions)].clone()
    rows["action"][:, 0] = torch.tensor(actions)
    rows["next", "done"].fill_(True)
    return rows


@EVERY
def test_all_adapters_train_on_the_action_that_was_executed(name: str) -> None:
    training, agent, algorithm = algorithm_of(name)
    reference = make_agent("continuous")
    executed = equal_rows(2.0, 2.0, 2.0, 2.0)
    reference.fit(executed, 4)
    # Half of them are more than the environment executed; whichever are drawn, batches are the same.
    recorded = equal_rows(2.0, 3.4, 2.0, 2.9)
    training.fit(algorithm, recorded, 4, lambda step: None)
    expected, metrics = reference.learner.metrics(), agent.learner.metrics()
    assert metrics == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in expected.items()}
    assert recorded["action"][1, 0] == pytest.approx(3.4)


@EVERY
@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ((2.0, 3.4, 3.0, 2.9), "in 3 of 4 rows, first in row 1: 3.4 in entry 0, whose bounds are -1 and 2"),
        ((2.0, 2.0, -1e9, 2.0), r"in 1 of 4 rows, ten times over in row 2: -1e\+09 in entry 0"),
    ],
)
def test_all_adapters_refuse_actions_that_no_clipping_explains_unless_they_are_told(
    name: str, actions: tuple[float, ...], message: str
) -> None:
    training, agent, algorithm = algorithm_of(name)
    before = weights(agent)
    with pytest.raises(ValueError, match=f"'action' is beyond the bounds {message}.*clip_all_actions=True"):
        training.fit(algorithm, equal_rows(*actions), 4, lambda step: None)
    assert agent.learner.step_count == 0
    assert same(weights(agent), before)
    training, agent, algorithm = algorithm_of(name, clip_all_actions=True)
    training.fit(algorithm, equal_rows(*actions), 4, lambda step: None)
    assert agent.learner.step_count == 4


@EVERY
@pytest.mark.parametrize("key", ["observation", "action", ("next", "reward"), ("next", "observation")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_all_adapters_refuse_data_that_are_not_finite(name: str, key: Any, bad: float) -> None:
    training, agent, algorithm = algorithm_of(name)
    data = make_dataset(SPACES["continuous"])
    data.get(key)[33, 0] = bad
    before = weights(agent)
    with pytest.raises(ValueError, match=f"{re.escape(repr(key))} is not finite in row 33"):
        training.fit(algorithm, data, 4, lambda step: None)
    assert agent.learner.step_count == 0
    assert same(weights(agent), before)


@EVERY
@pytest.mark.parametrize("reads", [True, False])
def test_a_training_that_diverges_stops_in_all_adapters(name: str, reads: bool) -> None:
    training, agent, algorithm = algorithm_of(name, critic_learning_rate=1e38)
    data = make_dataset(SPACES["continuous"])

    def callback(step: int) -> None:
        if reads:
            agent.learner.metrics()

    advice = "lower the learning rates, set `max_grad_norm`, try a lower `expectile`"
    with pytest.raises(DivergenceError, match=f"not finite at step .*: {advice}"):
        training.fit(algorithm, data, 5, callback)


@EVERY
def test_weights_that_the_last_step_spoils_are_noticed_in_all_adapters(name: str) -> None:
    training, agent, algorithm = algorithm_of(name)

    def callback(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                next(agent.loss.actor_network.parameters()).fill_(torch.inf)

    with pytest.raises(DivergenceError, match=r"^the actor's weights not finite at step 5"):
        training.fit(algorithm, make_dataset(SPACES["continuous"]), 5, callback)


@EVERY
@pytest.mark.parametrize("on_disk", [False, True])
def test_images_are_bytes_until_the_encoders_have_them(
    name: str, on_disk: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training = training_of(name)
    spaces = Spaces({"camera": Box((3, 36, 36), "uint8"), "speed": Box((2,))}, Discrete(3))
    agent = Agent(spaces, IQLConfig(batch_size=8, hidden_sizes=(8,), compile="no"), seed=0)
    seen = dtypes_given(NatureCNN, monkeypatch)
    data = make_dataset(spaces).cpu()
    training.fit(training.from_agent(agent), data.memmap(tmp_path) if on_disk else data, 1, lambda step: None)
    # d3rlpy makes floats of them, on the device.
    assert set(seen) == {torch.float32 if name == "d3rlpy" else torch.uint8}


#: As the README of each adapter says.
LEARNERS: dict[str, Callable[[Any], Learner]] = {
    "tensor": lambda iql: iql.agent.learner,
    "sb3": lambda model: model.learner,
    "d3rlpy": lambda algorithm: iql_plugins.load("d3rlpy").training.to_agent(algorithm).learner,
    "torchrl": lambda iql: iql.agent.learner,
}


@EVERY
def test_a_training_that_is_not_well_says_so_in_all_adapters_though_nobody_read_its_metrics(name: str) -> None:
    for temperature, expected in ((3.0, []), (1e9, ["clipped-weights"])):
        training, _, algorithm = algorithm_of(name, temperature=temperature)
        for _ in range(5):
            training.fit(algorithm, make_dataset(SPACES["continuous"]), 1, lambda step: None)
        assert [warning.code for warning in LEARNERS[name](algorithm).warnings()] == expected
