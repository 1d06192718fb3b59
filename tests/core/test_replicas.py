"""Losses trained by two processes, against one process that has the batches of both."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import keywords, make_batch, make_loss, total
from requirements import needs_gloo
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iql_plugins import HardUpdate, IQLLoss, SoftUpdate

pytestmark = [pytest.mark.slow, needs_gloo]

PROCESSES, STEPS = 2, 3
State = dict[str, Tensor]
Wrapper = Callable[[IQLLoss], nn.Module]


class Trainer(nn.Module):
    """A module of the user's around a loss."""

    def __init__(self, loss: IQLLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: TensorDict) -> TensorDict:
        return self.loss(batch)


def sharded(loss: IQLLoss) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(loss, mesh=dist.device_mesh.init_device_mesh("cpu", (PROCESSES,)))


def compiled(loss: IQLLoss) -> nn.Module:
    ddp = DistributedDataParallel(loss, broadcast_buffers=False)
    return torch.compile(ddp, backend="eager")  # type: ignore[return-value]


WITH_A_TENSORDICT: dict[str, Wrapper] = {
    "ddp": DistributedDataParallel,
    "broadcast_buffers": lambda loss: DistributedDataParallel(loss, broadcast_buffers=False),
    "forward_sync_buffers": lambda loss: DistributedDataParallel(loss, forward_sync_buffers=False),
    "static_graph": lambda loss: DistributedDataParallel(loss, static_graph=True, broadcast_buffers=False),
    "part": lambda loss: DistributedDataParallel(Trainer(loss), broadcast_buffers=False),
    "compiled": compiled,
}
WITH_KEYWORD_TENSORS: dict[str, Wrapper] = {
    "find_unused_parameters": lambda loss: DistributedDataParallel(loss, find_unused_parameters=True),
    "fully_shard": sharded,
}
#: Of losses whose temperature moves by the batches of all.
AUTOMATIC: dict[str, Wrapper] = {
    "automatic": lambda loss: DistributedDataParallel(loss, broadcast_buffers=False),
    "automatic_sharded": sharded,
}
UPDATERS: dict[str, Callable[[IQLLoss], Any]] = {
    "soft": lambda loss: SoftUpdate(loss, tau=0.3),
    "hard": lambda loss: HardUpdate(loss, value_network_update_interval=2),
}


def made(name: str) -> IQLLoss:
    return make_loss("continuous", **({"temperature": "auto_0.2"} if name in AUTOMATIC else {}))


def seeded_batch(step: int, rank: int) -> TensorDict:
    torch.manual_seed(10 * step + rank)
    return make_batch("continuous")


def trained(loss: IQLLoss, call: Callable[[int], Any], updater: str) -> State:
    """The state after some steps; ``call`` returns the losses of a step."""
    optimiser, targets = torch.optim.SGD(loss.parameters(), lr=0.1), UPDATERS[updater](loss)
    for step in range(STEPS):
        optimiser.zero_grad()
        total(call(step)).backward()
        optimiser.step()
        targets.step()
    networks = {name: tensor for name, tensor in loss.state_dict().items() if not name.startswith("_value_estimator")}
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in networks.items()
    }


def train_by_rank(rank: int, folder: Path) -> None:
    """What each process does; saves, by case, the state or the error's message."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[tuple[str, str], State | str] = {}
    for name, wrap in (WITH_A_TENSORDICT | WITH_KEYWORD_TENSORS | AUTOMATIC).items():
        for updater in UPDATERS if name in ("broadcast_buffers", "fully_shard") else ["soft"]:
            # Sharding keeps a part of each process's weights: they are equal before, as FSDP asks.
            torch.manual_seed(0 if wrap is sharded else rank)
            loss = made(name)
            if name == "automatic":
                loss.automatic_temperature.log_value.fill_(rank)
            wrapper = wrap(loss)
            if name == "broadcast_buffers" and rank == 0:
                # No process waits for another to evaluate.
                with torch.no_grad():
                    wrapper(seeded_batch(0, rank))
            if name in WITH_KEYWORD_TENSORS:
                try:
                    wrapper(seeded_batch(0, rank))
                except RuntimeError as error:
                    results[name, "error"] = str(error)

            def call(step: int, wrapper: nn.Module = wrapper, name: str = name) -> Any:
                batch = seeded_batch(step, rank)
                return wrapper(**keywords(batch)) if name in WITH_KEYWORD_TENSORS | AUTOMATIC else wrapper(batch)

            results[name, updater] = trained(loss, call, updater)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """What each process saved."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(train_by_rank, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture
def expected() -> Callable[[str, str], State]:
    """The state, by case and updater, after one process with rank 0's weights has had the batches of all."""

    def train(name: str, updater: str) -> State:
        with torch.device("cpu"):
            torch.manual_seed(0)
            loss = made(name)
            batches = [torch.cat([seeded_batch(step, rank) for rank in range(PROCESSES)]) for step in range(STEPS)]
            return trained(loss, lambda step: loss(batches[step]), updater)

    return train


CASES = [
    *((name, "soft") for name in (*WITH_A_TENSORDICT, *WITH_KEYWORD_TENSORS, *AUTOMATIC)),
    ("broadcast_buffers", "hard"),
    ("fully_shard", "hard"),
]


@pytest.mark.parametrize(("name", "updater"), CASES)
def test_processes_train_as_one_that_has_the_batches_of_all(
    results: list[dict[tuple[str, str], State]], expected: Callable[[str, str], State], name: str, updater: str
) -> None:
    first, second = (result[name, updater] for result in results)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
    torch.testing.assert_close(first, dict(expected(name, updater)))


@pytest.mark.parametrize("name", WITH_KEYWORD_TENSORS)
def test_a_wrapper_that_would_train_nothing_from_a_tensordict_refuses_it(
    results: list[dict[tuple[str, str], str]], name: str
) -> None:
    for result in results:
        assert name in result[name, "error"]
        assert "finds no losses in the TensorDict" in result[name, "error"]
        assert "keyword tensors (observation=" in result[name, "error"]
