"""Losses and gradients of a batch in one call: by autograd, or compiled into one graph."""

import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from iql_plugins.loss import IQLLoss

__all__ = ["LossGradients", "compiler_available"]

#: What :class:`LossGradients` returns, in order.
OUTPUTS = ("loss_actor", "loss_qvalue", "loss_value", "entropy")


def compiler_available(device: torch.device) -> bool:
    """Whether ``torch.compile`` can make code for a device here: a C++ compiler for the CPU, Triton for a GPU."""
    if device.type == "cpu":
        from torch._inductor import config

        return any(name is not None and shutil.which(name) for name in (*config.cpp.cxx, "clang++"))
    return device.type == "cuda" and bool(torch.utils._triton.has_triton())


class LossGradients:
    """Computes the losses of a batch and leaves their gradients in ``parameter.grad``.

    The gradient is that of ``loss_actor + loss_qvalue + loss_value``; each loss reaches its own network.

    Compiled, losses and gradients become *one* graph of plain tensors, traced once for each signature of a batch
    (names, shapes, dtypes) and of the loss's hyper-parameters: neither a backward pass nor autograd's bookkeeping is
    left at run time. What the loss checks on shapes and dtypes it checks while it is traced; networks must not hide
    state from torch, such as a Python counter.

    Args:
        loss: with ``reduction="mean"`` or ``"sum"`` and all of its outputs selected.
        compile: whether to compile.
        mode: of :func:`torch.compile`; ``"reduce-overhead"`` captures a CUDA graph.

    Raises:
        ValueError: for a loss that does not return all of its scalars.
        RuntimeError: if ``compile`` is asked for where there is no compiler.
    """

    def __init__(self, loss: IQLLoss, *, compile: bool = False, mode: str | None = None) -> None:
        if tuple(loss.out_keys) != OUTPUTS:
            raise ValueError(
                f"the loss must return {', '.join(OUTPUTS)}, this one has out_keys {loss.out_keys}: "
                "use reduction='mean' or 'sum', and reset_out_keys()"
            )
        self.loss = loss
        self.compile = compile
        self.mode = mode
        self.trained: list[nn.Parameter] = [p for p in loss.parameters() if p.requires_grad]
        device = self.trained[0].device
        if compile and not compiler_available(device):
            raise RuntimeError(f"there is no compiler for {device.type}: install one (g++), or do not compile")
        self._graphs: dict[Any, Any] = {}

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Computes, and replaces the gradients.

        Args:
            batch: keyword tensors by the key layout.

        Returns:
            ``loss_actor``, ``loss_qvalue``, ``loss_value`` and ``entropy``: ``[]`` each, detached.
        """
        return self._compiled(batch) if self.compile else self._eager(batch)

    def _eager(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.loss(**batch)
        for parameter in self.trained:
            parameter.grad = None
        (outputs[0] + outputs[1] + outputs[2]).backward()
        return tuple(output.detach() for output in outputs)

    def _compiled(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        loss = self.loss
        signature = (
            tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items()),
            (loss.expectile, loss.temperature, loss.max_weight, loss.loss_function, loss.reduction),
            tuple(module.training for module in loss.modules()),
        )
        state = self._state()
        graph = self._graphs.get(signature)
        if graph is None:
            graph = self._graphs[signature] = self._traced(state, batch)
        with torch.no_grad():
            results = graph(*state.values(), *batch.values())
        count = len(self.trained)
        for parameter, gradient in zip(self.trained, results[:count], strict=True):
            parameter.grad = gradient
        return tuple(results[count:])

    def _state(self) -> dict[str, Tensor]:
        # The trained ones first, so that the gradients are the first results.
        named = dict(self.loss.named_parameters())
        trained = {name: p for name, p in named.items() if p.requires_grad}
        return {**trained, **named, **dict(self.loss.named_buffers())}

    def _traced(self, state: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Any:
        names, keys, count = list(state), list(batch), len(self.trained)

        def losses_and_gradients(*tensors: Tensor) -> list[Tensor]:
            values = dict(zip(names, tensors[: len(names)], strict=True))
            leaves = [values[name].detach().requires_grad_() for name in names[:count]]
            values.update(zip(names, leaves, strict=False))
            inputs = dict(zip(keys, tensors[len(names) :], strict=True))
            outputs = functional_call(self.loss, values, kwargs=inputs)
            gradients = torch.autograd.grad(outputs[0] + outputs[1] + outputs[2], leaves)
            return [*gradients, *(output.detach() for output in outputs)]

        detached = [tensor.detach() for tensor in (*state.values(), *batch.values())]
        graph = make_fx(losses_and_gradients)(*detached)
        return torch.compile(graph, fullgraph=True, dynamic=False, mode=self.mode)
