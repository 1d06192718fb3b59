"""Adam's step without what torch does around its kernel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from iql_plugins import _compat

__all__ = ["take_step"]


class _Update(NamedTuple):
    """What the kernel takes of a group."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    largest_squares: list[Tensor]
    steps: list[Tensor]


def take_step(optimizer: Optimizer) -> None:
    """What ``optimizer.step()`` does; torch's fused Adam by its kernel alone.

    Torch sorts all tensors by device and dtype at every step, which takes as long as the kernel. Whatever has more to
    do than the plain update goes through ``step()``: hooks, schedules that count steps, a state that is yet to be made,
    a scaler's factor, tensors of several devices or dtypes, further options of torch.
    """
    kernel = _compat.fused_kernel(optimizer) if type(optimizer) is Adam else None
    updates = [] if kernel is None else [_update_of(optimizer, group) for group in optimizer.param_groups]
    if kernel is None or None in updates:
        optimizer.step()
        return
    with torch.no_grad():
        for group, update in zip(optimizer.param_groups, updates, strict=True):
            if update is not None and update.parameters:
                _compat.add_to_all(update.steps, 1)
                _apply(kernel, group, update)


def _update_of(optimizer: Optimizer, group: dict[str, Any]) -> _Update | None:
    """None where it is not a plain one."""
    if not group["fused"] or any(group.get(name) for name in ("amsgrad", "differentiable", "decoupled_weight_decay")):
        return None
    update = _Update([], [], [], [], [], [])
    parameters, gradients, means, squares, _, steps = update
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        state = optimizer.state.get(parameter)
        if not state or gradient.dtype is not parameter.dtype or gradient.layout is not torch.strided:
            return None
        parameters.append(parameter)
        gradients.append(gradient)
        means.append(state["exp_avg"])
        squares.append(state["exp_avg_sq"])
        steps.append(state["step"])
    alike = len({(parameter.dtype, parameter.device) for parameter in parameters}) <= 1
    return update if alike else None


def _apply(kernel: Callable[..., None], group: dict[str, Any], update: _Update) -> None:
    beta1, beta2 = group["betas"]
    kernel(
        *update,
        amsgrad=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        grad_scale=None,
        found_inf=None,
    )
