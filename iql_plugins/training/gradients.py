"""Losses and gradients of a batch in one call: by autograd, or compiled into one graph."""

import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from iql_plugins import _compat
from iql_plugins.losses.iql import IQLLoss

__all__ = ["MOST_GRAPHS", "Graph", "LossGradients", "compiled", "compiler_available", "slots", "traced"]

#: What :class:`LossGradients` returns, in order.
OUTPUTS = ("loss_actor", "loss_qvalue", "loss_value", "entropy")
#: Each takes seconds to make, or memory of its own: a training whose batches or settings change at every step is
#: better off without.
MOST_GRAPHS = 8


def compiler_available(device: torch.device) -> bool:
    """Whether ``torch.compile`` can make code for a device here: a C++ compiler for the CPU, Triton for a GPU."""
    if device.type == "cpu":
        return any(map(shutil.which, _compat.host_compilers()))
    return device.type == "cuda" and _compat.has_triton()


class LossGradients:
    """Computes the losses of a batch and leaves their gradients in ``parameter.grad``.

    The gradient is that of ``loss_actor + loss_qvalue + loss_value``; each loss reaches its own network.

    Compiled, losses and gradients become *one* graph of plain tensors, traced once for each signature of a batch
    (names, shapes, dtypes, devices), of what is set on the loss, and of autocast: neither a backward pass nor
    autograd's bookkeeping is left at run time. What the loss checks on shapes and dtypes it checks while it is traced;
    networks must not hide state from torch, such as a Python counter, nor may their modules be replaced. After 8
    graphs further signatures are computed uncompiled, so that what compilation costs is bounded; so are all with
    ``check_finite``, which reads the batch on the host.

    Args:
        loss: with ``reduction="mean"`` or ``"sum"`` and all of its outputs selected.
        compile: whether to compile.
        mode: of :func:`torch.compile`; ``"reduce-overhead"`` captures a CUDA graph.

    Raises:
        ValueError: for a loss that does not return all of its scalars, or an unknown mode.
        RuntimeError: if ``compile`` is asked for where there is no compiler.

    Attributes:
        warm_up_seconds: spent on tracing and compiling so far.
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
        _options(mode)
        device = next(loss.parameters()).device
        if compile and not compiler_available(device):
            raise RuntimeError(f"there is no compiler for {device.type}: install one (g++), or do not compile")
        self.warm_up_seconds = 0.0
        self._graphs: dict[Any, Graph] = {}
        self._look_up()

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Computes, and replaces the gradients.

        Args:
            batch: keyword tensors by the key layout.

        Returns:
            ``loss_actor``, ``loss_qvalue``, ``loss_value`` and ``entropy``: ``[]`` each, detached.
        """
        return self._compiled(batch) if self.compile and not self.loss.check_finite else self._eager(batch)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions cannot be pickled; they are made again.
        return vars(self) | {"_graphs": {}}

    def _look_up(self) -> None:
        # Walking the modules takes longer than small kernels: where their tensors are is looked up once, which ones
        # these are (they may be replaced, or frozen) at every step.
        self._estimator, self._temperature = self.loss.value_estimator, self.loss.automatic_temperature
        self._modules = list(self.loss.modules())
        self._parameters = slots(self.loss, "_parameters")
        self._buffers = slots(self.loss, "_buffers")

    def _eager(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.loss(**batch)
        for registry, key in self._parameters.values():
            registry[key].grad = None
        (outputs[0] + outputs[1] + outputs[2]).backward()
        return tuple(output.detach() for output in outputs)

    def _compiled(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        state = self.state()
        signature = self.signature(state, batch)
        parameters = {name: state[name] for name in self._parameters}
        trained = _trained(state)
        graph = self._graphs.get(signature)
        if graph is None:
            if len(self._graphs) == MOST_GRAPHS:
                return self._eager(batch)
            begin = time.perf_counter()
            graph = self._graphs[signature] = compiled(self.loss, state, trained, batch, mode=self.mode)
            self.warm_up_seconds += time.perf_counter() - begin
        for parameter in parameters.values():
            parameter.grad = None
        with torch.no_grad():
            results = graph(*state.values(), *batch.values())
        gradients = dict(zip(trained, results, strict=False))
        for name, parameter in parameters.items():
            parameter.grad = gradients.get(name)
        return tuple(results[len(trained) :])

    def state(self) -> dict[str, Tensor]:
        """The parameters and buffers that the losses have now; one with several names under the first."""
        found = self.loss.value_estimator, self.loss.automatic_temperature
        if self._estimator is not found[0] or self._temperature is not found[1]:
            self._look_up()
        places = (*self._parameters.items(), *self._buffers.items())
        return {name: registry[key] for name, (registry, key) in places}

    def signature(self, state: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """What a graph has as constants wherever tensors are: it is another one if this is.

        Args:
            state: of :meth:`state`.
            batch: keyword tensors by the key layout.
        """
        device = next(iter(state.values())).device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return _signature(batch), _signature(state), tuple(_trained(state)), self._settings(), autocast

    def _settings(self) -> tuple[Any, ...]:
        """What is set on the loss and its estimator, by whichever class, and on the modules inside."""
        loss = self.loss
        return _set_on(loss), _set_on(loss.value_estimator), tuple([module.training for module in self._modules])


#: Takes the tensors of the state, then those of the batch; returns a gradient for each name that is trained, or None,
#: and the loss's outputs.
Graph = Callable[..., Sequence[Tensor]]


def traced(
    loss: IQLLoss, state: Mapping[str, Tensor], trained: Sequence[str], batch: Mapping[str, Tensor], *, stacked: bool
) -> GraphModule:
    """Losses and gradients as one graph of plain tensors, see :data:`Graph`.

    Args:
        loss: is called with the tensors of the state in place of its own.
        state: parameters and buffers by name.
        trained: names of those whose gradients are wanted.
        batch: keyword tensors by the key layout.
        stacked: whether all tensors have one more dimension in front, of as many trainings; so do the outputs then.
    """
    names, keys = list(state), list(batch)

    def losses(values: dict[str, Tensor], inputs: dict[str, Tensor]) -> Any:
        return functional_call(loss, values, kwargs=inputs)

    compute = torch.vmap(losses) if stacked else losses

    def losses_and_gradients(*tensors: Tensor) -> list[Tensor | None]:
        values = dict(zip(names, tensors[: len(names)], strict=True))
        leaves = {name: values[name].detach().requires_grad_() for name in trained}
        outputs = compute(values | leaves, dict(zip(keys, tensors[len(names) :], strict=True)))
        # The sum over trainings: none depends on the parameters of another.
        total = (outputs[0] + outputs[1] + outputs[2]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        laid_out = [_laid_out(gradient, leaf) for gradient, leaf in zip(gradients, leaves.values(), strict=True)]
        return [*laid_out, *(output.detach() for output in outputs)]

    # Tracing computes: on copies, and with the random state put back, it changes no running statistics and no draw.
    copies = [tensor.detach().clone() for tensor in state.values()]
    devices = [copies[0].device] if copies[0].is_cuda else []
    aten = torch.ops.aten
    table: dict[Any, Callable[..., Any]] = {
        aten.addmm.default: _addmm,
        aten.baddbmm.default: _baddbmm,
        aten.bernoulli_.float: _bernoulli_,
    }
    with torch.random.fork_rng(devices):
        tracer = make_fx(losses_and_gradients, decomposition_table=table if copies[0].device.type == "cpu" else None)
        graph: GraphModule = tracer(*copies, *(tensor.detach() for tensor in batch.values()))
    return graph


def compiled(
    loss: IQLLoss,
    state: Mapping[str, Tensor],
    trained: Sequence[str],
    batch: Mapping[str, Tensor],
    *,
    stacked: bool = False,
    mode: str | None = None,
) -> Graph:
    """The graph of :func:`traced`, compiled for these very shapes, strides, dtypes and devices; it checks none of them.

    Args:
        loss: see :func:`traced`.
        state: see :func:`traced`.
        trained: see :func:`traced`.
        batch: see :func:`traced`.
        stacked: see :func:`traced`.
        mode: of :func:`torch.compile`.
    """
    graph = traced(loss, state, trained, batch, stacked=stacked)
    examples: list[Any] = [tensor.detach() for tensor in (*state.values(), *batch.values())]
    return _compat.compile_graph(graph, examples, _options(mode))


def _laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    # As backward() leaves it: fused optimisers walk both in the order of memory.
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _options(mode: str | None) -> dict[str, Any]:
    """Of Inductor, for a mode."""
    if mode is None:
        return {}
    modes = _compat.mode_options()
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    return dict(modes[mode])


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    # On a CPU a bias is cheaper in the kernel of the activation than in the product, which takes a copy of it in
    # every row. A sum Inductor would put back into the product.
    return alpha * torch.mm(left, right) - (-beta * bias)


def _baddbmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return alpha * torch.bmm(left, right) + beta * bias


def _bernoulli_(mask: Tensor, p: float = 0.5, *, generator: None = None) -> Tensor:
    # What dropout draws on a CPU. Inductor (torch 2.13) fills a mask in place by a call of its own, which it may put
    # behind the kernels that read the mask: they read NaN.
    return mask.copy_(torch.rand_like(mask) < p)


def _trained(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in state.items() if tensor.requires_grad]


#: What torch itself keeps in a module, and whether an estimator was used, which ``state_dict()`` alone reads. A mode is
#: told apart from settings: it is that of every module inside, too.
_NO_SETTING = vars(nn.Module()).keys() | {"_estimator_in_state"}


#: Most settings: they are looked at in every step.
_PLAIN = frozenset((bool, int, float, str, frozenset, type(None)))


def _set_on(module: nn.Module) -> tuple[Hashable, ...]:
    return type(module), *[(name, _constant(value)) for name, value in vars(module).items() if name not in _NO_SETTING]


def _constant(value: Any) -> Hashable:
    """A value that equals another one as long as code that reads it does the same."""
    if type(value) in _PLAIN:
        return value  # type: ignore[no-any-return]
    if isinstance(value, list | tuple):
        return tuple(map(_constant, value))
    if isinstance(value, dict):
        return tuple([(key, _constant(entry)) for key, entry in value.items()])
    if type(value).__hash__ is None:
        # An array, say, has nothing to look into: another one is another value.
        return frozenset(value) if isinstance(value, set) else _constant(getattr(value, "__dict__", id(value)))
    hashable: Hashable = value
    return hashable


def _signature(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple(
        [(name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for name, tensor in tensors.items()]
    )


def slots(module: nn.Module, registry: str) -> dict[str, tuple[dict[str, Any], str]]:
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
