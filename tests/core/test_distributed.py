"""Processes that train together: the same steps as one process takes, and what happens when one of them strays."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from agents import SPACES, make_agent, make_dataset, same, weights
from processes import ranks
from requirements import needs_gloo, needs_proc

from iql_plugins.data import Dataset, summary
from iql_plugins.data.episodes import episode_returns
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.distributed import Processes, _store, synchronize
from iql_plugins.training.gradients import compiler_available
from iql_plugins.training.learner import Learner

pytestmark = needs_gloo
TESTS = Path(__file__).parents[1]


@pytest.fixture
def group() -> Iterator[Processes]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Processes.of_group()
    finally:
        dist.destroy_process_group()


def test_processes_that_are_started_again_do_not_find_those_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                   "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    first, partner = _store(), _store()
    first.set("address", "here")
    assert partner.get("address") == b"here"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not _store().check(["address"])
    # Machines count their own starts: what they have in common is torch's own.
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert _store() is None


# One batch among all


def test_the_parts_of_all_processes_are_the_batch_that_one_draws() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    alone = make_agent("continuous").learner.draw(1000, 12, generator(), on_disk=False)
    parts = [Processes(rank, 3).draw(1000, 12, generator(), on_disk=False) for rank in range(3)]
    assert torch.equal(torch.cat(parts), alone)


def test_of_data_on_disk_each_process_reads_its_own_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    for rank, (low, high) in enumerate([(0, 3), (3, 6), (6, 10)]):
        generator.set_state(before)
        drawn = Processes(rank, 3).draw(10, 300, generator, on_disk=True)
        assert set(drawn.tolist()) == set(range(low, high))
    # Whichever process writes a checkpoint, and whichever reads it: all go on from the same state.
    after = generator.get_state()
    generator.set_state(before)
    Processes(0, 3).draw(10, 300, generator, on_disk=True)
    assert torch.equal(generator.get_state(), after)


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_changes(group: Processes) -> None:
    agent, dataset = make_agent("continuous", batch_size=9), make_dataset(SPACES["continuous"])
    agent.learner.processes = Processes(0, 2)
    before, state = weights(agent), agent.generator.get_state()
    with pytest.raises(ValueError, match=r"batch_size is that of all processes together.* got 9 for 2"):
        agent.fit(dataset, 1)
    assert same(weights(agent), before)
    assert torch.equal(agent.generator.get_state(), state)
    with pytest.raises(ValueError, match="a row for each of 3 processes, got 2"):
        Processes(0, 3).draw(2, 3, agent.generator, on_disk=True)


def test_there_must_be_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"process_group\(\)"):
        synchronize(make_agent("continuous").learner)


@pytest.mark.parametrize("kind", SPACES)
def test_a_group_of_one_changes_nothing(kind: str, group: Processes) -> None:
    dataset = make_dataset(SPACES[kind])
    alone, together = (make_agent(kind, dataset, temperature="auto", max_grad_norm=1.0) for _ in range(2))
    alone.fit(dataset, 5)
    assert synchronize(together.learner) == Processes(0, 1)
    together.fit(dataset, 5)
    assert same(weights(together), weights(alone))


def test_processes_drop_units_of_their_own(group: Processes) -> None:
    dataset = make_dataset(SPACES["continuous"])
    first, second = (make_agent("continuous", actor_dropout=0.5) for _ in range(2))
    for rank, agent in enumerate((first, second)):
        synchronize(agent.learner)
        # As if it were another one; there is nobody to average with.
        agent.learner.processes = Alone(rank, 1)
        agent.learner.step(agent.transitions(dataset).batch(torch.arange(8)))
    assert not same(weights(first), weights(second))


class Alone(Processes):
    """One of several that averages with nobody."""

    def average(self, loss: Any) -> None:
        pass


# Several processes


PROGRAM = """
import json, os, sys
import torch
from agents import SPACES, make_agent, make_dataset
from iql_plugins import read_dataset
from iql_plugins.config import IQLConfig
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent
from iql_plugins.training.distributed import UnequalWeightsError, process_group, synchronize
from iql_plugins.training.learner import Learner

folder, compile = sys.argv[1:]

def resident(folder):
    size = read = 0
    for line in open("/proc/self/smaps"):
        first, *rest = line.split()
        if "-" in first:
            inside = rest[-1].startswith(folder)
        elif inside and first in ("Size:", "Rss:"):
            size, read = size + int(rest[0]) * (first == "Size:"), read + int(rest[0]) * (first == "Rss:")
    return read / size

with process_group() as processes:
    rank, done = processes.rank, {}
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        dataset = make_dataset(SPACES["continuous"])
        agent = make_agent("continuous", dataset, n_steps=200)
        if rank:
            # Only the first process's weights count.
            torch.nn.init.ones_(next(agent.loss.parameters()))
        assert synchronize(agent.learner) == processes
        agent.fit(dataset, 100)
        torch.save(agent.loss.state_dict(), f"{folder}/{dtype}-{rank}.pt")

    shards = read_dataset(f"{folder}/shards").tensors
    spaces = Spaces(Box((3,)), Box((2,), low=(-1.0, -1.0), high=(1.0, 1.0)))
    agent = Agent(spaces, IQLConfig(batch_size=4096, hidden_sizes=(8,), compile="no"), seed=0)
    synchronize(agent.learner)
    agent.fit(shards, 200)
    done["resident"] = resident(f"{folder}/shards")

    agent = make_agent("continuous")
    agent.loss.reduction = "sum"
    learner = Learner(agent.loss, seed=0, make_optimizers=lambda groups: [torch.optim.SGD(groups)])
    synchronize(learner)
    batch = agent.transitions(dataset).batch(torch.arange(40 * rank, 40 * (rank + 1)))
    learner.step(batch)
    torch.save(agent.loss.state_dict(), f"{folder}/sum-{rank}.pt")

    agent = make_agent("continuous", dataset, compile=compile, temperature="auto_0.5")
    synchronize(agent.learner)
    agent.fit(dataset, 3)
    agent.learner.processes.check_equal(agent.loss)
    done["compiled"] = agent.learner.compiled

    if rank:
        with torch.no_grad():
            agent.loss.state_dict()["value_network_params.module.layers.2.bias"].add_(1e-6)
    try:
        # What is saved after a fit was looked at, however few its steps are.
        agent.fit(dataset, 1)
    except UnequalWeightsError as error:
        done["unequal"] = str(error)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(done, file)
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, started by torchrun, have left."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "program.py").write_text(PROGRAM)
    spaces = Spaces(Box((3,)), Box((2,), low=(-1.0, -1.0), high=(1.0, 1.0)))
    torch.manual_seed(0)
    many = make_dataset(spaces, 400_000).memmap(folder / "shards")
    # As convert-dataset does, so that nobody has to read all of them again.
    source = Dataset(many, "many")
    known = {"sha256": source.sha256, "returns": episode_returns(many)}
    summary.write(folder / "shards", many, **known, env=None, spaces=None, provenance={})
    compile = "yes" if compiler_available(torch.device("cpu")) else "no"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(TESTS), *sys.path])
    finished = subprocess.run(
        [*command, str(folder / "program.py"), str(folder), compile],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_two_processes_learn_what_one_does(together: Path, dtype: torch.dtype, tolerance: float) -> None:
    first, second = (torch.load(together / f"{dtype}-{rank}.pt") for rank in range(2))
    assert same(first, second)
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        dataset = make_dataset(SPACES["continuous"])
        alone = make_agent("continuous", dataset, n_steps=200)
        untrained = weights(alone)
        alone.fit(dataset, 100)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in weights(alone).items():
        assert tensor.dtype == first[name].dtype
        assert (tensor - first[name]).abs().max() <= tolerance, name
    assert not same(weights(alone), untrained)


@pytest.mark.slow
@needs_proc
def test_each_process_reads_its_share_of_shards_alone(together: Path) -> None:
    for rank in range(2):
        # 200 times 2048 of 200,000 rows: hardly a page of the share is missed.
        assert 0.4 < json.loads((together / f"{rank}.json").read_text())["resident"] < 0.6


@pytest.mark.slow
def test_sums_over_a_batch_are_those_of_all_its_parts(together: Path) -> None:
    torch.manual_seed(0)
    dataset, alone = make_dataset(SPACES["continuous"]), make_agent("continuous")
    alone.loss.reduction = "sum"
    learner = Learner(alone.loss, seed=0, make_optimizers=lambda groups: [torch.optim.SGD(groups)])
    learner.step(alone.transitions(dataset).batch(torch.arange(80)))
    for rank in range(2):
        for name, tensor in torch.load(together / f"sum-{rank}.pt").items():
            torch.testing.assert_close(tensor, weights(alone)[name], atol=1e-6, rtol=1e-4)


def test_gradients_keep_the_layout_and_the_dtype_of_their_parameters(group: Processes) -> None:
    dataset = make_dataset(SPACES["continuous"])
    agents = [make_agent("continuous", temperature="auto") for _ in range(2)]
    for agent in agents:
        for parameter in agent.loss.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.t().contiguous().t()
    synchronize(agents[1].learner)
    for agent in agents:
        agent.fit(dataset, 5)
    assert same(*map(weights, agents))
    half = make_agent("continuous", temperature="auto")
    half.loss.to(torch.bfloat16)
    synchronize(half.learner)
    rows = half.transitions(dataset).batch(torch.arange(8))
    half.learner.step({name: row.bfloat16() if row.is_floating_point() else row for name, row in rows.items()})
    assert {parameter.grad.dtype for parameter in half.loss.parameters() if parameter.grad is not None} == {
        torch.bfloat16
    }


@pytest.mark.slow
def test_compiled_gradients_are_averaged_and_a_stray_weight_is_named_in_every_process(together: Path) -> None:
    for rank in range(2):
        done = json.loads((together / f"{rank}.json").read_text())
        assert done["compiled"] == compiler_available(torch.device("cpu"))
        assert "value_network_params.module.layers.2.bias of process 1 of 2 is not that of process 0" in done["unequal"]


LOST = """
import os, signal
from agents import SPACES, make_agent, make_dataset
from iql_plugins.training.distributed import ProcessLostError, process_group, synchronize

dataset = make_dataset(SPACES["continuous"])
with process_group() as processes:
    agent = make_agent("continuous", dataset)
    synchronize(agent.learner)
    def after_step(step):
        if processes.rank and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        agent.fit(dataset, 10**9, after_step)
    except ProcessLostError as error:
        print(error)
"""


@pytest.mark.slow
def test_who_is_left_by_another_process_says_so_at_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LOST)
    with ranks(program) as processes:
        assert processes[1].wait(timeout=120) == -signal.SIGKILL
        said, _ = processes[0].communicate(timeout=60)
    assert said.startswith("process 0 of 2: another process has ended")
    assert said.count("\n") == 1
