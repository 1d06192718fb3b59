"""All critics in one pass: a perceptron's layers as batched products over stacked weights.

``torch.vmap`` evaluates critics of any kind together, at a price: the kernels compiled from it are slower
than a loop over critics. A critic that is a perceptron, whose inputs meet nothing but concatenation,
linear layers and elementwise functions, is read once with ``torch.fx`` and evaluated by the few steps
found. Everything else takes the general way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tensordict.nn import TensorDictModule
from torch import Tensor, fx, nn

from iql_plugins.parameters import stateful_copy

__all__ = ["Perceptron"]

_ELEMENTWISE_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
)
_ELEMENTWISE_FUNCTIONS = (F.relu, F.elu, F.gelu, F.silu, F.mish, F.leaky_relu, torch.relu, torch.tanh, torch.sigmoid)


@dataclass(frozen=True)
class _Step:
    """One node of the graph: what it computes, from which earlier values."""

    kind: str
    target: Any
    sources: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Perceptron:
    """The steps of a critic that is a perceptron. The first values are its inputs; each step appends one.

    Attributes:
        steps: in order; the last one's value is the output.
    """

    steps: tuple[_Step, ...]

    @classmethod
    def read(cls, critic: nn.Module) -> "Perceptron | None":
        """The steps of a critic; None for one that is no perceptron."""
        if not isinstance(critic, TensorDictModule) or type(critic).forward is not TensorDictModule.forward:
            return None
        if not isinstance(critic.module, nn.Module) or critic._kwargs is not None or len(critic.out_keys) != 1:
            return None
        # In both modes: what a forward does with self.training is part of no graph.
        found = {_read(stateful_copy(critic).train(mode)) for mode in (True, False)}
        steps = found.pop()
        return cls(steps) if steps and not found else None

    def __call__(self, critic: nn.Module, tensors: dict[str, Tensor], inputs: Sequence[Tensor], count: int) -> Tensor:
        """``[N, *B, out]`` outputs of N critics.

        Args:
            critic: the module that the steps were read from; its elementwise modules are called.
            tensors: its leaves, ``[N, ...]`` but for those that all critics share.
            inputs: ``[*B, f_i]``, in the order of the critic's in_keys.
            count: N.
        """
        shape = inputs[0].shape[:-1]
        values = [tensor.reshape(-1, tensor.shape[-1]) for tensor in inputs]
        for step in self.steps:
            sources = [values[i] for i in step.sources]
            if step.kind == "linear":
                bias = tensors.get(f"{step.target}.bias")
                values.append(_linear(sources[0], tensors[f"{step.target}.weight"], bias, count))
            elif step.kind == "cat":
                stacked = any(source.ndim == 3 for source in sources)
                values.append(torch.cat([_stacked(source, count) if stacked else source for source in sources], -1))
            elif step.kind == "module":
                values.append(critic.get_submodule(step.target)(sources[0]))
            else:
                values.append(step.target(sources[0], **dict(step.options)))
        return _stacked(values[-1], count).reshape(count, *shape, -1)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module, or one inside it, runs hooks of its own."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


def _stacked(x: Tensor, count: int) -> Tensor:
    return x if x.ndim == 3 else x.expand(count, *x.shape)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
    x, weight = _stacked(x, count), _stacked(weight, count).transpose(1, 2)
    if bias is None:
        return torch.bmm(x, weight)
    return torch.baddbmm(bias if bias.ndim == 1 else bias.unsqueeze(1), x, weight)


class _Wrapper(nn.Module):
    """Gives the traced module the name under which its critic holds it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


class _Tracer(fx.Tracer):
    """Traces a module with a fixed number of inputs down to its linear and elementwise layers."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inputs = inputs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_linear(m) or type(m) in _ELEMENTWISE_MODULES

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = [self.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(self.inputs)]
        return root_fn, [self.root, *proxies]


def _is_linear(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "weight" in module._parameters
    )


def _read(critic: TensorDictModule) -> tuple[_Step, ...] | None:
    try:
        graph = _Tracer(len(critic.in_keys)).trace(_Wrapper(critic.module))
    # A stranger's forward meets proxies here; whatever it raises means that it is no perceptron.
    except Exception:
        return None
    indices: dict[fx.Node, int] = {}
    steps: list[_Step] = []
    for node in graph.nodes:
        if node.op == "output":
            return tuple(steps) if node.args == (list(indices)[-1],) else None
        if node.op != "placeholder":
            step = _step(critic, node, indices)
            if step is None:
                return None
            steps.append(step)
        indices[node] = len(indices)
    return None


def _step(critic: nn.Module, node: fx.Node, indices: dict[fx.Node, int]) -> _Step | None:
    if node.op == "call_function" and node.target is torch.cat:
        tensors: Any
        tensors, dim = (*node.args, node.kwargs.get("dim"))[:2]
        last = dim == -1 and isinstance(tensors, list | tuple) and all(tensor in indices for tensor in tensors)
        return _Step("cat", None, tuple(indices[tensor] for tensor in tensors)) if last else None
    if len(node.args) != 1 or not isinstance(source := node.args[0], fx.Node):
        return None
    if any(isinstance(option, fx.Node) for option in node.kwargs.values()):
        return None
    sources = (indices[source],)
    if node.op == "call_module" and not node.kwargs:
        module = critic.get_submodule(str(node.target))
        return _Step("linear" if _is_linear(module) else "module", node.target, sources)
    if node.op == "call_function" and node.target in _ELEMENTWISE_FUNCTIONS:
        return _Step("function", node.target, sources, tuple(node.kwargs.items()))
    return None
