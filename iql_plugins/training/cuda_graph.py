"""A training step as one CUDA graph: what the host launches kernel by kernel is launched at once."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from iql_plugins import _compat
from iql_plugins.training.gradients import MOST_GRAPHS

__all__ = ["CapturedStep", "Compute", "CudaGraphs", "Graphs", "graphs_on"]

#: Ordinary steps before a capture, which must find the optimisers' state, compiled kernels and whatever else libraries
#: make when they are first called.
WARM_UP_STEPS = 3

#: Computes on the device, and returns what came out.
Compute = Callable[[], Tensor]


class Graphs(Protocol):
    """What a device offers for launching many kernels at once."""

    def aside(self, compute: Compute) -> Tensor:
        """Computes as a capture will: beside the caller's stream, after what is in it and before what follows."""

    def capture(self, compute: Compute) -> Compute:
        """Notes what ``compute`` launches, and computes nothing.

        Returns:
            Computes all of it, from the same tensors into the same tensors; what came out is overwritten the next time.
        """


class CudaGraphs:
    """The CUDA graphs of a GPU.

    Args:
        device: of the tensors; a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._aside = torch.cuda.Stream(device)
        # One of its own: workspaces belong to streams, and those of a graph must be in the graph's memory.
        self._captured = torch.cuda.Stream(device)

    def aside(self, compute: Compute) -> Tensor:
        """See :meth:`Graphs.aside`."""
        current = torch.cuda.current_stream(self._aside.device)
        self._aside.wait_stream(current)
        with torch.cuda.stream(self._aside):
            result = compute()
        current.wait_stream(self._aside)
        return result

    def capture(self, compute: Compute) -> Compute:
        """See :meth:`Graphs.capture`. The random numbers of a replay are those of the device's generator then."""
        graph = torch.cuda.CUDAGraph()
        # What other threads allocate meanwhile (a loader that pins memory) is none of the graph's business.
        with torch.cuda.graph(graph, stream=self._captured, capture_error_mode="thread_local"):
            result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def graphs_on(device: torch.device) -> Graphs:
    """The graphs of a device.

    Raises:
        ValueError: if it has none.
    """
    if device.type != "cuda":
        raise ValueError(
            f"capture=True needs a CUDA graph, and the loss is on {device}: move it to a GPU before the learner is "
            "made, or use capture=False"
        )
    return CudaGraphs(device)


@dataclass
class _Graph:
    """Of one kind of batch, under the same settings.

    Attributes:
        inputs: the tensors that it reads, into which batches are copied.
        steps: ordinary ones taken so far.
        replay: None until it is captured.
    """

    inputs: dict[str, Tensor]
    steps: int = 0
    replay: Compute | None = None


class CapturedStep:
    """Takes a few steps as they are, captures one, and replays it from then on.

    A graph has addresses and numbers of the host as constants. The caller says what they are, and gets an ordinary step
    or another graph whenever they change: never a stale one.

    Args:
        compute: one step, from keyword tensors to what it tells, all on the device: it reads nothing on the host, and
            draws from the device's default generator alone.
        optimizers: what ``compute`` steps.
        device: where it computes.

    Raises:
        ValueError: if the device has no graphs, or for an optimiser that needs the host.
    """

    def __init__(
        self, compute: Callable[[Mapping[str, Tensor]], Tensor], optimizers: Sequence[Optimizer], device: torch.device
    ) -> None:
        self.device = device
        self._compute = compute
        self._optimizers = optimizers
        self._graphs_on_device = graphs_on(device)
        for optimizer in optimizers:
            _check(optimizer, device)
        self._graphs: dict[Hashable, _Graph] = {}
        self._addresses: Hashable = None

    def __call__(self, batch: Mapping[str, Tensor], constants: Hashable, addresses: Hashable) -> Tensor:
        """One step.

        Args:
            batch: keyword tensors; they are copied, and may change afterwards.
            constants: what ``compute`` reads on the host, and of the batch all but its numbers.
            addresses: of all tensors that ``compute`` reads or writes, but for the batch.

        Returns:
            What ``compute`` returns, in a tensor of its own.
        """
        if addresses != self._addresses:
            # Nothing will ever be where the other graphs look for it.
            self._graphs.clear()
            self._addresses = addresses
        graph = self._graphs.get(constants)
        if graph is None:
            if len(self._graphs) == MOST_GRAPHS:
                return self._compute(batch)
            graph = _Graph({name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in batch.items()})
        _compat.copy_all(list(graph.inputs.values()), list(batch.values()))
        if graph.steps < WARM_UP_STEPS:
            losses = self._graphs_on_device.aside(lambda: self._compute(graph.inputs))
            graph.steps += 1
            # Only now: a batch that is refused has no graph.
            self._graphs[constants] = graph
            return losses
        if graph.replay is None:
            with _declared_capturable(self._optimizers):
                graph.replay = self._graphs_on_device.capture(lambda: self._compute(graph.inputs))
        return graph.replay().clone()


def _check(optimizer: Optimizer, device: torch.device) -> None:
    for group in optimizer.param_groups:
        rate = group["lr"]
        on_device = isinstance(rate, Tensor) and rate.device == device
        if not (group.get("fused") or group.get("capturable")) or not on_device:
            flags = ", ".join(f"{name}={group.get(name)}" for name in ("fused", "capturable"))
            raise ValueError(
                f"capture=True needs optimisers that compute on the device alone, {type(optimizer).__name__} has "
                f"{flags} and lr={rate!r}: make it with fused=True or capturable=True, and lr as a tensor on {device}, "
                "as adam() does"
            )


@contextmanager
def _declared_capturable(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Torch asks for the flag in a capture, and warns of it outside. A fused step reads nothing on the host anyway."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if "capturable" in group]
    flags = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, flag in zip(groups, flags, strict=True):
            group["capturable"] = flag
