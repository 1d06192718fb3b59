"""What torch's wrappers for training by several processes need from a loss."""

from collections.abc import Iterable
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["active_ddp", "check_output", "of_all", "replicate", "whole"]

# Private: the module inside is not told otherwise by whom it is called.
active_ddp = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)


def _is_sharded(loss: nn.Module) -> bool:
    # Of FSDPModule, which takes seconds to import.
    return hasattr(type(loss), "set_requires_gradient_sync")


def check_output(loss: nn.Module) -> None:
    """Refuses to return a TensorDict to a wrapper that would look for tensors in it, and find none.

    Raises:
        RuntimeError: for a loss that is sharded, or in a DDP that looks for unused parameters.
    """
    ddp = active_ddp()
    wrapper = None
    if _is_sharded(loss):
        wrapper = "fully_shard"
        # It has begun a pass: the next one would not be seen. What is sharded as a part of more begins with that.
        with suppress(RuntimeError):
            loss.reset_iter_state()  # type: ignore[operator]
    elif ddp is not None and ddp.find_unused_parameters and not ddp.static_graph:
        wrapper = "DistributedDataParallel(find_unused_parameters=True)"
    if wrapper is not None:
        raise RuntimeError(
            f"{wrapper} finds no losses in the TensorDict that the loss returns for one, and nothing would be trained: "
            "give the batch as keyword tensors (observation=..., action=..., ...)"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
@torch.no_grad()
def replicate(tensors: Iterable[Tensor], ddp: DistributedDataParallel) -> None:
    """Gives the first process's values to all processes of a DDP; every one of them must call it."""
    for tensor in tensors:
        dist.broadcast(tensor, group=ddp.process_group, group_src=0)


def of_all(tensor: Tensor, loss: nn.Module, *, largest: bool = False) -> Tensor:
    """The mean, or the largest, over the processes that a wrapper trains a loss by; all of them must call it."""
    ddp = active_ddp()
    return tensor if ddp is None and not _is_sharded(loss) else _reduced(tensor, ddp, largest)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
@torch.no_grad()
def _reduced(tensor: Tensor, ddp: DistributedDataParallel | None, largest: bool) -> Tensor:
    # Of what is sharded, the module does not know by whom: all processes are asked.
    group = None if ddp is None else ddp.process_group
    tensor = tensor.clone()
    dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return tensor if largest else tensor / dist.get_world_size(group)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes as an ordinary one; all of them must call it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
