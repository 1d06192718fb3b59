"""Training by several processes: equal weights at the start, averaged gradients at every step."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from iql_plugins.losses.iql import IQLLoss
from iql_plugins.training.learner import Learner

__all__ = ["draw_share", "synchronize"]


def synchronize(learner: Learner) -> None:
    """Makes the learners of all processes one: they hold equal weights after each step.

    What ``DistributedDataParallel`` does for a module that autograd runs, this does for a graph that holds the
    gradients itself, too: the first process's weights go to all; at every step gradients are averaged, before they
    are clipped, an automatic temperature is as well, and buffers of the networks (running statistics) are the first
    process's.

    Args:
        learner: of this process; has taken no step.

    Raises:
        RuntimeError: if there is no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("enable_ddp=True needs a process group: call d3rlpy.distributed.init_process_group() first")
    loss = learner.loss
    with torch.no_grad():
        for tensor in (*loss.parameters(), *loss.buffers()):
            dist.broadcast(tensor, 0)
    learner.synchronize = lambda: _average(loss, (loss.actor_network, loss.value_network, loss.qvalue_network))


def draw_share(count: int, size: int) -> "np.ndarray[Any, np.dtype[Any]]":
    """``[size]`` positions below ``count`` from this process's share, every n-th of n processes.

    Processes that were seeded alike would draw the same ones otherwise, and learn no more than one.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    return rank + processes * np.random.randint(len(range(rank, count, processes)), size=size)


@torch.no_grad()
def _average(loss: IQLLoss, networks: tuple[nn.Module, ...]) -> None:
    tensors = [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]
    if loss.automatic_temperature is not None:
        tensors += loss.automatic_temperature.buffers()
    # One message: most parameters are small.
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    for network in networks:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
