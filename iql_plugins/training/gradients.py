"""Losses and gradients of a batch in one call: by autograd, or compiled into one graph."""

import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from iql_plugins import _compat
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.training.products import called_from_cpp, critics_apart, decompositions

__all__ = ["MOST_GRAPHS", "Draw", "Graph", "LossGradients", "compiled", "compiler_available", "slots", "traced"]

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
        undisturbed: whether the loss and its settings are those of the last call, and need not be looked at.
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
        self.undisturbed = False
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
        return vars(self) | {"undisturbed": False, "_graphs": {}, "_last": None}

    def _look_up(self) -> None:
        # Walking the modules takes longer than small kernels: where their tensors are is looked up once, which ones
        # these are (they may be replaced, or frozen) at every step.
        self._estimator, self._temperature = self.loss.value_estimator, self.loss.automatic_temperature
        self._modules = list(self.loss.modules())
        self._parameters = slots(self.loss, "_parameters")
        self._buffers = slots(self.loss, "_buffers")
        self._last: _Last | None = None

    def _eager(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.loss(**batch)
        for registry, key in self._parameters.values():
            registry[key].grad = None
        (outputs[0] + outputs[1] + outputs[2]).backward()
        return tuple(output.detach() for output in outputs)

    def _compiled(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        last = self._last
        if last is None or not (self.undisturbed and last.takes(batch)):
            state = self.state()
            # Where they have been looked up again, it is another one.
            last = self._last
            if last is None or not last.fits(state, batch):
                graph = self._graph(state, batch)
                if graph is None:
                    return self._eager(batch)
                settings = self.loss, self.loss.value_estimator
                last = self._last = _Last(graph, state, batch, settings, self._modules)
        for name in self._parameters:
            last.state[name].grad = None
        gradients, outputs = last.graph(last.state, batch, [draw.sample() for draw in last.graph.draws])
        for name, gradient in gradients.items():
            last.state[name].grad = gradient
        return outputs

    def _graph(self, state: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> "Graph | None":
        """Made if there is none yet; None if there are too many."""
        signature = self.signature(state, batch)
        graph = self._graphs.get(signature)
        if graph is None and len(self._graphs) < MOST_GRAPHS:
            begin = time.perf_counter()
            graph = self._graphs[signature] = compiled(self.loss, state, batch, mode=self.mode)
            self.warm_up_seconds += time.perf_counter() - begin
        return graph

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
        autocast = _autocast(next(iter(state.values())))
        return _signature(batch), _signature(state), tuple(_trained(state)), self._settings(), autocast

    def _settings(self) -> tuple[Any, ...]:
        """What is set on the loss and its estimator, by whichever class, and on the modules inside."""
        loss = self.loss
        return _set_on(loss), _set_on(loss.value_estimator), tuple([module.training for module in self._modules])


@dataclass(frozen=True)
class Draw:
    """Zeros and ones that a graph does not draw itself: dropout's, the same where losses are compiled and where not.

    Attributes:
        shape: of the mask; where trainings are stacked, of all of them.
        stride: in memory, which CPUs fill in its order.
        dtype: of the mask.
        device: of the mask.
        probability: of a one.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    probability: float = 0.5

    def sample(self) -> Tensor:
        """A mask from the device's default generator."""
        return self.fill(self.empty())

    def empty(self) -> Tensor:
        """Memory for a mask."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def fill(self, mask: Tensor) -> Tensor:
        """Draws into a mask, or a part of it."""
        return mask.bernoulli_(self.probability)


@dataclass(frozen=True)
class Graph:
    """Losses and gradients as a function of plain tensors.

    Attributes:
        function: takes the tensors of the state, those of the batch, and the masks; returns a gradient, or None, for
            each name that is trained, and the loss's outputs.
        trained: names of parameters.
        draws: of the masks, in the order in which the loss draws them.
    """

    function: Callable[..., Sequence[Tensor]]
    trained: Sequence[str]
    draws: Sequence[Draw]

    def __call__(
        self, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], masks: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The gradients by name, and the loss's outputs.

        Args:
            state: as the graph was traced for.
            batch: as the graph was traced for.
            masks: one for each of :attr:`draws`.
        """
        with torch.no_grad():
            results = self.function(*state.values(), *batch.values(), *masks)
        count = len(self.trained)
        return dict(zip(self.trained, results[:count], strict=True)), tuple(results[count:])


class _Last:
    """The graph of the last step, and whether it is that of the next one, too.

    Looking at a signature takes a tenth of a millisecond when the step before has taken the caches.

    Args:
        graph: of what follows.
        state: parameters and buffers by name.
        batch: keyword tensors by the key layout.
        settings: modules that have them.
        modules: that are in a mode.
    """

    def __init__(
        self,
        graph: Graph,
        state: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        settings: Sequence[nn.Module],
        modules: Sequence[nn.Module],
    ) -> None:
        self.graph, self.state = graph, state
        self._tensors, self._names = list(state.values()), list(batch)
        self._alike = _compat.check_of([*self._tensors, *batch.values()])
        self._autocast = _autocast(self._tensors[0])
        self._settings = [_Settings(module) for module in settings]
        self._modules, self._modes = modules, [module.training for module in modules]

    def takes(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether the tensors have the signature of then; False may be wrong, True is not."""
        return list(batch) == self._names and self._alike(*self._tensors, *batch.values())

    def fits(self, state: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> bool:
        """Whether all of the signature is that of then; False may be wrong, True is not."""
        return (
            all(map(is_, state.values(), self._tensors))
            and self.takes(batch)
            and self._autocast == _autocast(self._tensors[0])
            and [module.training for module in self._modules] == self._modes
            and all(settings.are_as_they_were() for settings in self._settings)
        )


class _Settings:
    """What was set on a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind, self._own = module, type(module), vars(module)
        self._names, self._values = list(self._own), list(self._own.values())
        found = [value for name, value in self._own.items() if name not in _NO_SETTING and type(value) not in _PLAIN]
        self._inner = [(value, _constant(value)) for value in found if _constant(value) is not value]

    def are_as_they_were(self) -> bool:
        """Whether it is all still there, and has not changed inside."""
        return (
            type(self._module) is self._kind
            and list(self._own) == self._names
            and all(map(is_, self._own.values(), self._values))
            and all(_constant(value) == constant for value, constant in self._inner)
        )


def _autocast(tensor: Tensor) -> tuple[bool, torch.dtype]:
    device = tensor.device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def traced(
    loss: IQLLoss, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, stacked: bool, native: bool = False
) -> Graph:
    """Losses and gradients as one graph of plain tensors.

    Args:
        loss: is called with the tensors of the state in place of its own.
        state: parameters and buffers by name; the gradients are those of what requires one.
        batch: keyword tensors by the key layout.
        stacked: whether all tensors have one more dimension in front, of as many trainings; so do the outputs then, and
            the masks.
        native: whether it is called from C++, by which products are that are worth a call of oneDNN's.

    Raises:
        ValueError: if a network draws other random numbers than masks where trainings are stacked: each has its own.
    """
    names, keys, trained = list(state), list(batch), _trained(state)

    def losses(values: dict[str, Tensor], inputs: dict[str, Tensor]) -> Any:
        return functional_call(loss, values, kwargs=inputs)

    compute = torch.vmap(losses, randomness="different") if stacked else losses

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
    device = copies[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), critics_apart(loss):
        tracer = make_fx(losses_and_gradients, decomposition_table=decompositions(device, native=native))
        graph: GraphModule = tracer(*copies, *(tensor.detach() for tensor in batch.values()))
    draws = _draws_outside(graph)
    drawing = {str(node.target) for node in graph.graph.nodes if _is_random(node.target)}
    if stacked and drawing:
        raise ValueError(f"they draw random numbers, by {', '.join(sorted(drawing))}")
    return Graph(graph, trained, draws)


def _draws_outside(graph: GraphModule) -> list[Draw]:
    """Makes the masks that a graph draws its last inputs; returns them in the order in which it draws."""
    aten = torch.ops.aten
    nodes: list[Any] = list(graph.graph.nodes)
    after_inputs = next(node for node in nodes if node.op != "placeholder")
    draws: list[Draw] = []
    for node in nodes:
        if node.target not in (aten.bernoulli_.float, aten.bernoulli.p):
            continue
        example = node.meta["val"]
        draws.append(Draw(example.shape, example.stride(), example.dtype, example.device, *node.args[1:]))
        with graph.graph.inserting_before(after_inputs):
            mask = graph.graph.placeholder(f"mask{len(draws)}")
        with graph.graph.inserting_before(node):
            # What follows may write into the mask, inputs stay as they are, and what is drawn into may be a view.
            if node.target is aten.bernoulli.p:
                own = graph.graph.call_function(aten.clone.default, (mask,))
            else:
                own = graph.graph.call_function(aten.copy_.default, (node.args[0], mask))
        mask.meta, own.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(own)
        graph.graph.erase_node(node)
    graph.recompile()
    return draws


def _is_random(operation: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())


def compiled(
    loss: IQLLoss,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    *,
    stacked: bool = False,
    mode: str | None = None,
) -> Graph:
    """The graph of :func:`traced`, compiled for these very shapes, strides, dtypes and devices; it checks none of them.

    Args:
        loss: see :func:`traced`.
        state: see :func:`traced`.
        batch: see :func:`traced`.
        stacked: see :func:`traced`.
        mode: of :func:`torch.compile`.
    """
    if mode is None and next(iter(state.values())).device.type == "cpu" and called_from_cpp():
        # There may be no C++ for what a network calls.
        with suppress(RuntimeError):
            return _compiled(loss, state, batch, stacked, native=True)
    return _compiled(loss, state, batch, stacked, **_options(mode))


def _compiled(
    loss: IQLLoss,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    stacked: bool,
    *,
    native: bool = False,
    **options: Any,
) -> Graph:
    graph = traced(loss, state, batch, stacked=stacked, native=native)
    examples = [tensor.detach() for tensor in (*state.values(), *batch.values())]
    examples += [draw.empty() for draw in graph.draws]
    return replace(graph, function=_compat.compile_graph(graph.function, examples, options, native=native))


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
