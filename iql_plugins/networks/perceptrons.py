"""Perceptrons of ReLUs as one function of autograd, on CPUs where oneDNN multiplies faster than torch's own products.

Torch multiplies by MKL, which leaves AVX-512 to Intel's processors: eager steps on AMD's are made of products that
take twice as long as they need. What is compiled multiplies by
:mod:`~iql_plugins.training.products`.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from iql_plugins import _compat
from iql_plugins.networks.calls import is_hooked

__all__ = ["LEAST", "WIDE", "has_short_rows", "is_large", "linear_layers", "perceptron"]

#: Multiplications of a product from which on oneDNN is faster than MKL on AMD's processors with AVX-512, by torch's
#: operator: below, calling it costs more than it saves.
LEAST = 3 * 2**19

#: Of a layer's weight, both ways, from which on oneDNN computes all of its products at usual batch sizes.
WIDE = 64


def is_large(left: Tensor, right: Tensor, least: int = LEAST) -> bool:
    """Whether a product, ``[*N, M, K]`` by ``[*N, K, P]``, is one that oneDNN is faster at."""
    rows, inner = left.shape[-2:]
    return left.dtype is torch.float32 and rows * inner * right.shape[-1] >= least


def has_short_rows(left: Tensor, right: Tensor) -> bool:
    """Whether a product is the gradient of the weight of few inputs, whose transpose is computed faster.

    Its vectors go along rows.
    """
    return left.stride(-2) == 1 < left.stride(-1) and right.shape[-1] < min(WIDE, left.shape[-2])


def linear_layers(modules: Iterable[nn.Module]) -> list[nn.Linear] | None:
    """The linear layers of modules that are nothing but these, and a ReLU between each two; None for any other."""
    layers = list(modules)
    linear = [layer for layer in layers[::2] if isinstance(layer, nn.Linear) and _is_torchs(layer)]
    is_perceptron = 2 * len(linear) == len(layers) + 1 and all(
        isinstance(layer, nn.ReLU) and _is_torchs(layer) for layer in layers[1::2]
    )
    return linear if is_perceptron else None


def perceptron(inputs: Tensor, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """``[*B, out]``, or ``[N, *B, out]`` of N perceptrons, by oneDNN; None where torch computes it better by itself.

    That is on GPUs, with few units, and for whoever sees each call: graphs, transforms and modes.

    Args:
        inputs: ``[*B, in]``.
        tensors: weight ``[out, in]`` and bias ``[out]``, or None, of each layer in turn; or all of them stacked over N
            perceptrons.
    """
    # Of a graph sizes may be symbols.
    if torch.compiler.is_compiling() or type(inputs) is not Tensor:
        return None
    weights = [weight for weight in tensors[::2] if weight is not None]
    first, most = weights[0], max([weight.shape[-2] * weight.shape[-1] for weight in weights])
    if inputs.numel() * most < LEAST * inputs.shape[-1] or not inputs.numel():
        return None
    if (
        not (_compat.calls_kernels() and _compat.onednn_is_faster())
        or not all(map(_is_ordinary, (inputs, *tensors)))
        or any(weight.ndim != first.ndim for weight in weights)
        or any(bias is not None and bias.ndim != first.ndim - 1 for bias in tensors[1::2])
        or inputs.shape[-1] != first.shape[-1]
        or any(before.shape[-2] != weight.shape[-1] for before, weight in pairwise(weights))
    ):
        return None
    rows = inputs.reshape(-1, inputs.shape[-1])
    outputs: Tensor = _Perceptrons.apply(rows, *tensors)  # type: ignore[no-untyped-call]  # torch has no type for it
    return outputs if inputs.ndim == 2 else outputs.reshape(*outputs.shape[:-2], *inputs.shape[:-1], outputs.shape[-1])


class _Perceptrons(torch.autograd.Function):
    """One perceptron, or several of the same inputs, whose tensors are stacked."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *tensors: Tensor | None) -> Tensor:
        outputs, hidden = [], list[Tensor]()
        for layers in _apart(tensors):
            *activations, output = _activations(inputs, layers)
            hidden += activations
            outputs.append(output)
        ctx.save_for_backward(inputs, *tensors, *hidden)
        return torch.stack(outputs) if _are_stacked(tensors) else outputs[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 1
        inputs, *saved = ctx.saved_tensors
        tensors, hidden = saved[:count], saved[count:]
        if torch.is_grad_enabled():
            return _differentiable_gradients(gradient, (inputs, *tensors), ctx.needs_input_grad)
        stacked, per_member = _are_stacked(tensors), count // 2 - 1
        found = [
            _gradients(each, [inputs, *hidden[index * per_member :][:per_member]], layers, ctx.needs_input_grad)
            for index, (each, layers) in enumerate(
                zip(gradient.unbind() if stacked else [gradient], _apart(tensors), strict=True)
            )
        ]
        of_inputs, *of_tensors = zip(*found, strict=True)
        of_all = of_inputs[0] if of_inputs[0] is None else sum(of_inputs[1:], of_inputs[0])
        return (of_all, *(each[0] if each[0] is None or not stacked else torch.stack(each) for each in of_tensors))


Layers = list[tuple[Tensor, Tensor | None]]


def _are_stacked(tensors: Sequence[Tensor | None]) -> bool:
    weight = tensors[0]
    assert weight is not None
    return weight.ndim == 3


def _apart(tensors: Sequence[Tensor | None]) -> list[Layers]:
    """Weights and biases of each perceptron."""
    weights, biases = tensors[::2], tensors[1::2]
    if not _are_stacked(tensors):
        return [list(zip(weights, biases, strict=True))]  # type: ignore[arg-type]  # weights are there
    count = len(weights[0])  # type: ignore[arg-type]
    each = [[None] * count if tensor is None else tensor.unbind() for tensor in tensors]
    return [list(zip(member[::2], member[1::2], strict=True)) for member in zip(*each, strict=True)]


def _activations(inputs: Tensor, layers: Layers) -> list[Tensor]:
    """Of each layer, those of the last as they are."""
    found = [inputs]
    for weight, bias in layers:
        # oneDNN's own ReLU makes zeros of NaN.
        x = found[-1] if len(found) == 1 else found[-1].relu_()
        by_onednn = is_large(x, weight.t())
        found.append(_compat.onednn_linear(x, weight, bias) if by_onednn else nn.functional.linear(x, weight, bias))
    return found[1:]


def _gradients(
    gradient: Tensor, activations: Sequence[Tensor], layers: Layers, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of the inputs, and of each weight and bias.

    Args:
        gradient: ``[B, out]`` of the outputs.
        activations: what each layer multiplies.
        layers: of one perceptron.
        needed: of which, in the order of the result.
    """
    found: list[Tensor | None] = []
    gradient = gradient.contiguous()
    for index in reversed(range(len(layers))):
        (weight, _), x = layers[index], activations[index]
        of_weight, of_bias = needed[1 + 2 * index : 3 + 2 * index]
        found = [
            _product(gradient.t(), x) if of_weight else None,
            gradient.sum(0) if of_bias else None,
            *found,
        ]
        if not any(needed[: 1 + 2 * index]):
            return [None] * (1 + 2 * index) + found
        gradient = _product(gradient, weight)
        if index:
            gradient = torch.ops.aten.threshold_backward(gradient, x, 0)
    return [gradient if needed[0] else None, *found]


def _product(left: Tensor, right: Tensor) -> Tensor:
    if has_short_rows(left, right):
        return _product(right.t(), left.t()).t()
    return _compat.onednn_product(left, right) if is_large(left, right) else torch.mm(left, right)


def _differentiable_gradients(
    gradient: Tensor, given: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients: those of torch's own functions."""
    # Views: what one of them was computed of may be another.
    inputs, *tensors = (None if tensor is None else tensor.view_as(tensor) for tensor in given)
    assert inputs is not None
    outputs = []
    for layers in _apart(tensors):
        x = inputs
        for index, (weight, bias) in enumerate(layers):
            x = nn.functional.linear(x.relu() if index else x, weight, bias)
        outputs.append(x)
    output = torch.stack(outputs) if _are_stacked(tensors) else outputs[0]
    asked: list[Tensor] = [
        each for each, asks in zip((inputs, *tensors), needed, strict=True) if asks and each is not None
    ]
    found = iter(torch.autograd.grad(output, asked, gradient, create_graph=True))
    return tuple(next(found) if asks else None for asks in needed)


def _is_ordinary(tensor: Tensor | None) -> bool:
    return tensor is None or (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
    )


def _is_torchs(module: nn.Linear | nn.ReLU) -> bool:
    """Whether a module computes as torch's own does, and nothing else."""
    kind = nn.Linear if isinstance(module, nn.Linear) else nn.ReLU
    return type(module).forward is kind.forward and "forward" not in vars(module) and not is_hooked(module)
