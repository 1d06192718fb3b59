"""Adam's step without what torch does around its kernel."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from iql_plugins import _compat

__all__ = ["Update", "take_step"]


class Update(NamedTuple):
    """A step of Adam's kernel on a group, but for its gradients; good for as long as nobody gives it other tensors.

    Attributes:
        kernel: of torch.
        group: the optimiser's, with the rate and its constants.
        parameters: that have a gradient.
        means: Adam's first moments.
        squares: Adam's second moments.
        steps: how many each has taken.
        counter: one tensor whose entries are the steps; None where each is its own.
    """

    kernel: Callable[..., None]
    group: dict[str, Any]
    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    counter: Tensor | None

    def take(self) -> None:
        """Takes the step."""
        if self.counter is None:
            _compat.add_to_all(self.steps, 1)
        else:
            self.counter.add_(1)
        beta1, beta2 = self.group["betas"]
        self.kernel(
            self.parameters,
            [parameter.grad for parameter in self.parameters],
            self.means,
            self.squares,
            [],
            self.steps,
            amsgrad=False,
            lr=self.group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
            maximize=self.group["maximize"],
            grad_scale=None,
            found_inf=None,
        )


def take_step(optimizer: Optimizer, known: Sequence[Update] = ()) -> Sequence[Update]:
    """What ``optimizer.step()`` does; torch's fused Adam by its kernel alone.

    Torch sorts all tensors by device and dtype at every step, which takes as long as the kernel. Whatever has more to
    do than the plain update goes through ``step()``: hooks, schedules that count steps, a state that is yet to be made,
    a scaler's factor, tensors of several devices or dtypes, further options of torch.

    Args:
        optimizer: whose step it is.
        known: what an earlier step returned, if nothing but steps has happened since then.

    Returns:
        For a next step; empty where it must be looked up again.
    """
    with torch.no_grad():
        updates = known or _updates(optimizer)
        for update in updates or ():
            update.take()
    if updates is None:
        optimizer.step()
        # It may have made the state, which keeps its tensors from now on.
        if type(optimizer) is Adam:
            for group in optimizer.param_groups:
                states = [optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state]
                if group["fused"] and states:
                    _steps(states)
    return updates or ()


def _updates(optimizer: Optimizer) -> list[Update] | None:
    """None where they are not plain ones."""
    kernel = _compat.fused_kernel(optimizer) if type(optimizer) is Adam else None
    if kernel is None:
        return None
    found = []
    for group in optimizer.param_groups:
        if not group["fused"] or any(
            group.get(name) for name in ("amsgrad", "differentiable", "decoupled_weight_decay")
        ):
            return None
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        if not all(states) or not all(map(_has_plain_gradient, parameters)):
            return None
        if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
            return None
        if parameters:
            found.append((group, parameters, states))
    return [
        Update(
            kernel,
            group,
            parameters,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            *_steps(states),
        )
        for group, parameters, states in found
    ]


def _has_plain_gradient(parameter: Tensor) -> bool:
    gradient: Any = parameter.grad
    return gradient.dtype is parameter.dtype and gradient.layout is torch.strided


def _steps(states: Sequence[dict[str, Any]]) -> tuple[list[Tensor], Tensor | None]:
    """The counts of steps, which on a CPU become the entries of one tensor, and this.

    To add to one takes microseconds, to add to each half as long as Adam.
    """
    steps: list[Tensor] = [state["step"] for state in states]
    if not steps[0].is_cpu:
        return steps, None
    counter = steps[0]._base
    if counter is None or counter.shape != (len(steps),) or any(step._base is not counter for step in steps):
        counter = torch.stack(steps)
        steps = list(counter.unbind())
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
    return steps, counter
