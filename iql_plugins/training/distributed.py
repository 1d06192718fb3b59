"""Processes that train one agent together, on one machine or several: equal weights, one batch among all of them.

``torchrun`` starts them; ``torch.distributed`` carries what they tell each other.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iql_plugins.data.dataset import one_line
from iql_plugins.losses.iql import IQLLoss

if TYPE_CHECKING:
    from iql_plugins.training.learner import Learner

__all__ = [
    "ProcessLostError",
    "Processes",
    "UnequalWeightsError",
    "launched",
    "local_count",
    "process_group",
    "restarts",
    "synchronize",
]

#: Nobody waits longer for another process: longer than the first one takes to read the data, or to evaluate a policy.
TIMEOUT = timedelta(hours=2)


class ProcessLostError(RuntimeError):
    """Another process has ended, or does not answer."""


class UnequalWeightsError(RuntimeError):
    """Processes that train together no longer hold equal weights; says which process, and which tensor."""


@dataclass(frozen=True)
class Processes:
    """Those that train together.

    Attributes:
        rank: of this one, from 0.
        count: of all.
    """

    rank: int
    count: int

    @classmethod
    def of_group(cls) -> "Processes":
        """Those of torch's process group.

        Raises:
            RuntimeError: if there is none.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "there is no process group: call iql_plugins.training.distributed.process_group(), "
                "torch.distributed.init_process_group() or d3rlpy.distributed.init_process_group() before"
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def draw(self, rows: int, size: int, generator: torch.Generator, *, on_disk: bool) -> Tensor:
        """This process's part of a batch, which all of them draw alike: from generators of equal state.

        The parts are those of the batch that a single process would draw. Of data on disk each process reads a
        contiguous share of the rows alone, so that of large data a machine needs no more in its memory.

        Of a batch of 4 from 10 rows, of which one process draws 7, 2, 2, 9, the second of two takes 2, 9.

        Args:
            rows: of the dataset.
            size: of the batch of all processes.
            generator: on whose device the rows are drawn.
            on_disk: whether the dataset is memory-mapped.

        Returns:
            ``[size / count]`` int64 row numbers.

        Raises:
            ValueError: unless there are as many rows for each process, and at least one of a dataset on disk.
        """
        if size % self.count:
            raise ValueError(
                f"batch_size is that of all processes together, a multiple of their number: got {size} for {self.count}"
            )
        if on_disk and rows < self.count:
            raise ValueError(f"a dataset on disk needs a row for each of {self.count} processes, got {rows}")
        share = self.share(rows) if on_disk else range(rows)
        drawn = torch.randint(len(share), (size,), generator=generator, device=generator.device)
        part = size // self.count
        return drawn[self.rank * part : (self.rank + 1) * part] + share.start

    def share(self, rows: int) -> range:
        """This process's rows of a dataset on disk: as many as any other's, give or take one.

        >>> [Processes(rank, 3).share(10) for rank in range(3)]
        [range(0, 3), range(3, 6), range(6, 10)]
        """
        return range(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    @torch.no_grad()
    def average(self, loss: IQLLoss) -> None:
        """Averages gradients in one message, and an automatic temperature with them; adds those of ``reduction="sum"``.

        Networks' buffers (running statistics) become the first process's, as in torch's ``DistributedDataParallel``.
        """
        trained = [parameter for parameter in loss.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        temperature = [] if loss.automatic_temperature is None else list(loss.automatic_temperature.buffers())
        tensors = [*gradients, *temperature]
        # One message: most parameters are small.
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _partners(self):
            dist.all_reduce(flat)
            for buffer in _networks_buffers(loss):
                dist.broadcast(buffer, 0)
        added = sum(gradient.numel() for gradient in gradients) if loss.reduction == "sum" else 0
        flat[added:] /= self.count
        parts = flat.split([tensor.numel() for tensor in tensors])
        for parameter, gradient, part in zip(trained, gradients, parts, strict=False):
            if gradient.is_contiguous() and gradient.dtype == part.dtype:
                parameter.grad = part.view_as(gradient)
            else:
                # Fused optimisers walk a gradient in the order of its parameter's memory, whatever that is.
                gradient.copy_(part.view_as(gradient))
        for buffer, part in zip(temperature, parts[len(trained) :], strict=True):
            buffer.copy_(part.view_as(buffer))

    @torch.no_grad()
    def check_equal(self, loss: IQLLoss) -> None:
        """Looks whether all processes hold the same weights, to the bit.

        Raises:
            UnequalWeightsError: in every process, if they do not.
        """
        tensors = {name: value for name, value in loss.state_dict().items() if isinstance(value, Tensor)}
        own = torch.stack([_bits(tensor) for tensor in tensors.values()])
        all_of_them = [torch.empty_like(own) for _ in range(self.count)]
        with _partners(self):
            dist.all_gather(all_of_them, own)
        differs = torch.stack(all_of_them) != all_of_them[0]
        if differs.any():
            rank, index = differs.nonzero()[0].tolist()
            raise UnequalWeightsError(
                f"processes that train together must hold equal weights: {list(tensors)[index]} of process {rank} of "
                f"{self.count} is not that of process 0; something else than training has changed it there"
            )

    def told(self, values: Any) -> Any:
        """What the first process tells all others: tensors, numbers, strings, and containers of these.

        Tensors arrive on the CPU, wherever they were.
        """
        file = io.BytesIO()
        torch.save(values, file)
        box: list[Any] = [file.getvalue()]
        with _partners(self):
            dist.broadcast_object_list(box, 0)
        return torch.load(io.BytesIO(box[0]), map_location="cpu", weights_only=True)


def synchronize(learner: "Learner") -> Processes:
    """Makes the learners of all processes one: they hold equal weights after each step.

    What ``DistributedDataParallel`` does for a module that autograd runs, this does for a graph that holds the
    gradients itself, too. The first process's weights and optimisers go to all; gradients are averaged at every step,
    before they are clipped; every thousandth step, and the end of each ``fit``, looks whether the weights are still
    equal. Where each sample counts alike, a step is that of one process with the batches of all, but for the order of
    sums. What is computed of a batch as a whole (an automatic temperature, a noise threshold, the largest exponent of
    ``gumbel`` and ``exponential``, the scale of ``ddpg_bc``, batch norms) is computed of each process's part.

    ``batch_size`` of :meth:`~iql_plugins.training.agent.Agent.fit`, and of Stable-Baselines3's ``learn_offline``, is
    then that of all processes together; agents must have equal seeds::

        with process_group():
            agent = Agent(spaces, config, seed=0)
            synchronize(agent.learner)
            agent.fit(dataset, 100_000)

    Args:
        learner: of this process.

    Returns:
        The processes.

    Raises:
        RuntimeError: if there is no process group.
    """
    processes = Processes.of_group()
    state = processes.told(learner.state_dict())
    if processes.rank:
        learner.load_state_dict(state)
    with torch.no_grad(), _partners(processes):
        for tensor in (*learner.loss.parameters(), *learner.loss.buffers()):
            dist.broadcast(tensor, 0)
    learner.processes = processes
    return processes


def launched() -> bool:
    """Whether ``torchrun`` has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def local_count() -> int:
    """How many processes ``torchrun`` has started on this machine; 1 without it."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def restarts() -> tuple[int, int]:
    """How often ``torchrun`` has started its processes again, and how often it would."""
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["TORCHELASTIC_MAX_RESTARTS"])


@contextmanager
def process_group() -> Iterator[Processes]:
    """The processes that ``torchrun`` has started can tell each other things inside; each has its own GPU, if any.

    Raises:
        ProcessLostError: if one of them does not come; inside, if one is gone.
    """
    if torch.cuda.is_available() and (own := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(own)
    processes = Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    with _partners(processes):
        if (store := _store()) is None:
            dist.init_process_group(timeout=TIMEOUT)
        else:
            dist.init_process_group(timeout=TIMEOUT, store=store, rank=processes.rank, world_size=processes.count)
    try:
        yield Processes.of_group()
    finally:
        dist.destroy_process_group()


def _store() -> Any:
    """Where processes find each other, a place of its own for each time that they are started; None for torch's.

    ``torchrun`` (torch 2.13) keeps one store over all starts, and in it the addresses of processes that are gone: one
    that is early takes them for its partners'. Where several machines take part each counts its own starts.
    """
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environment.get("GROUP_WORLD_SIZE") != "1":
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)  # type: ignore[attr-defined]
    start = f"start {environment['TORCHELASTIC_RESTART_COUNT']}"
    return dist.PrefixStore(start, store)  # type: ignore[attr-defined]


@contextmanager
def _partners(processes: Processes) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            f"process {processes.rank} of {processes.count}: another process has ended, has not answered within "
            f"{TIMEOUT.total_seconds() / 3600:.0f} hours, or does something else; what it said last tells why "
            f"({one_line(error)})"
        ) from error


def _networks_buffers(loss: IQLLoss) -> list[Tensor]:
    networks: tuple[nn.Module, ...] = (loss.actor_network, loss.value_network, loss.qvalue_network)
    return [buffer for network in networks for buffer in network.buffers()]


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's words as integers: another one wherever a single number is another one."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).sum(dtype=torch.int64)
