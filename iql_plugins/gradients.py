"""Losses and gradients of a batch in one call: by autograd, or compiled into one graph."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton

from iql_plugins.loss import IQLLoss

__all__ = ["LossGradients", "compiler_available"]

#: What :class:`LossGradients` returns, in order.
OUTPUTS = ("loss_actor", "loss_qvalue", "loss_value", "entropy")


def compiler_available(device: torch.device) -> bool:
    """Whether ``torch.compile`` can make code for a device here: a C++ compiler for the CPU, Triton for a GPU."""
    if device.type == "cpu":
        from torch._inductor import config

        return any(name is not None and shutil.which(name) for name in (*config.cpp.cxx, "clang++"))
    return device.type == "cuda" and has_triton()


class LossGradients:
    """Computes the losses of a batch and leaves their gradients in ``parameter.grad``.

    The gradient is that of ``loss_actor + loss_qvalue + loss_value``; each loss reaches its own network.

    Compiled, losses and gradients become *one* graph of plain tensors, traced once for each signature of a batch
    (names, shapes, dtypes, devices) and of what is set on the loss: neither a backward pass nor autograd's bookkeeping
    is left at run time. What the loss checks on shapes and dtypes it checks while it is traced; networks must not
    hide state from torch, such as a Python counter.

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
        device = next(loss.parameters()).device
        if compile and not compiler_available(device):
            raise RuntimeError(f"there is no compiler for {device.type}: install one (g++), or do not compile")
        self._graphs: dict[Any, Any] = {}
        self._look_up()

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Computes, and replaces the gradients.

        Args:
            batch: keyword tensors by the key layout.

        Returns:
            ``loss_actor``, ``loss_qvalue``, ``loss_value`` and ``entropy``: ``[]`` each, detached.
        """
        return self._compiled(batch) if self.compile else self._eager(batch)

    def _look_up(self) -> None:
        # Walking the modules takes longer than small kernels: where their tensors are is looked up once, which ones
        # these are (they may be replaced, or frozen) at every step.
        self._estimator = self.loss.value_estimator
        self._modules = list(self.loss.modules())
        self._parameters = _slots(self.loss, "_parameters")
        self._buffers = _slots(self.loss, "_buffers")

    def _eager(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.loss(**batch)
        for registry, key in self._parameters.values():
            registry[key].grad = None
        (outputs[0] + outputs[1] + outputs[2]).backward()
        return tuple(output.detach() for output in outputs)

    def _compiled(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if self._estimator is not self.loss.value_estimator:
            self._look_up()
        parameters = {name: registry[key] for name, (registry, key) in self._parameters.items()}
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
        state = parameters | {name: registry[key] for name, (registry, key) in self._buffers.items()}
        signature = (
            tuple((name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for name, tensor in batch.items()),
            tuple(trained),
            self._settings(),
        )
        graph = self._graphs.get(signature)
        if graph is None:
            graph = self._graphs[signature] = self._traced(state, trained, batch)
        with torch.no_grad():
            results = graph(*state.values(), *batch.values())
        gradients = dict(zip(trained, results, strict=False))
        for name, parameter in parameters.items():
            parameter.grad = gradients.get(name)
        return tuple(results[len(trained) :])

    def _settings(self) -> tuple[Any, ...]:
        """What a graph has as constants."""
        loss = self.loss
        return (
            (loss.expectile, loss.temperature, loss.max_weight, loss.loss_function, loss.reduction),
            (loss.use_prioritized_weights, loss.loss_mask_key, *vars(loss.tensor_keys).values()),
            (loss.value_estimator, loss.vmap_randomness, loss.deactivate_vmap),
            tuple([module.training for module in self._modules]),
        )

    def _traced(self, state: Mapping[str, Tensor], trained: Sequence[str], batch: Mapping[str, Tensor]) -> Any:
        names, keys = list(state), list(batch)

        def losses_and_gradients(*tensors: Tensor) -> list[Tensor | None]:
            values = dict(zip(names, tensors[: len(names)], strict=True))
            leaves = {name: values[name].detach().requires_grad_() for name in trained}
            inputs = dict(zip(keys, tensors[len(names) :], strict=True))
            outputs = functional_call(self.loss, values | leaves, kwargs=inputs)
            total = outputs[0] + outputs[1] + outputs[2]
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            return [*gradients, *(output.detach() for output in outputs)]

        # Tracing computes: on copies, and with the random state put back, it changes no running statistics and no draw.
        copies = [tensor.detach().clone() for tensor in state.values()]
        devices = [copies[0].device] if copies[0].is_cuda else []
        with torch.random.fork_rng(devices):
            graph = make_fx(losses_and_gradients)(*copies, *(tensor.detach() for tensor in batch.values()))
        # Not the module: its wrapper hides what a check of the graph has to say.
        return torch.compile(graph.forward, fullgraph=True, dynamic=False, mode=self.mode)


def _slots(module: nn.Module, registry: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each parameter or buffer is registered, by its full name; one with several names under the first."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    for prefix, submodule in module.named_modules():
        tensors = getattr(submodule, registry)
        for key, tensor in tensors.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                slots[f"{prefix}.{key}" if prefix else key] = (tensors, key)
    return slots
