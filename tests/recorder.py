"""CUDA graphs emulated on the CPU, by recording what torch's dispatcher calls."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iql_plugins.training.cuda_graph import Compute


class HostReadError(RuntimeError):
    """A call that a capture does not survive: the host would wait for the device, or the device for the host."""


class Recorder:
    """Stands in for :class:`iql_plugins.training.cuda_graph.CudaGraphs`, and counts.

    As in a CUDA graph, numbers of the host are constants, tensors are where they were, a capture computes nothing, and
    random numbers come from the default generator as it is at a replay. What it does not see is what calls no operator
    of torch's: Inductor's kernels.
    """

    def __init__(self) -> None:
        self.ordinary = 0
        self.captures = 0
        self.replays = 0

    def aside(self, compute: Compute) -> Tensor:
        self.ordinary += 1
        return compute()

    def capture(self, compute: Compute) -> Compute:
        self.captures += 1
        recording = Recording()
        state = torch.get_rng_state()
        try:
            with recording:
                result = compute()
        finally:
            torch.set_rng_state(state)
            recording.undo()

        def replay() -> Tensor:
            self.replays += 1
            recording.replay()
            return result

        return replay


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Notes every operator that is called, with the very tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_host_reads(func, args, kwargs)
        for tensor in written(func, args, kwargs):
            storage = tensor.untyped_storage()
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        returns = func._schema.returns
        if not any(value.alias_info is not None and not value.alias_info.is_write for value in returns):
            results = [result] if len(returns) == 1 else result or ()
            made = [own for own, value in zip(results, returns, strict=True) if value.alias_info is None]
            self._calls.append((func, args, kwargs, tensors_of(made)))
        return result

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    # Below autograd, as it was recorded.
    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self._calls:
            result = func(*args, **kwargs)
            if outputs:
                for output, value in zip(outputs, tensors_of(result), strict=True):
                    output.copy_(value)


class HostReads(TorchDispatchMode):
    """Refuses what a capture would, and computes all the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_host_reads(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def refuse_host_reads(func: Any, args: Any, kwargs: Any) -> None:
    """Raises :class:`HostReadError` for what waits for the device.

    These are operators that return a number, or a shape that depends on numbers; copies between devices; tensors made
    of numbers of the host. ``tolist()`` and ``numpy()`` are no operators on a CPU.
    """
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    moved = kwargs.get("device") is not None and any(
        tensor.device.type != torch.device(kwargs["device"]).type for tensor in tensors_of(args)
    )
    if tags & set(func.tags) or moved or func is torch.ops.aten.lift_fresh.default:
        raise HostReadError(f"{func} waits for the device")


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from tensors_of(value)
