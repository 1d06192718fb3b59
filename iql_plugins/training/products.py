"""Matrix products of compiled steps on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iql_plugins import _compat
from iql_plugins.losses.iql import IQLLoss

__all__ = ["critics_apart", "decompositions", "large", "product"]

#: Multiplications of a product, and its smallest dimension, from which on oneDNN is faster than MKL on AMD's processors
#: with AVX-512: below, calling it costs more than it saves.
_LEAST_MULTIPLICATIONS, _LEAST_SIZE = 3 * 2**19, 6

#: Of a layer's weight, both ways, from which on oneDNN computes all of its products at usual batch sizes.
_WIDE = 64

#: Of a batched product that is taken apart: a graph grows by each.
_MOST_MATRICES = 32

_aten = torch.ops.aten

if not hasattr(torch.ops.iql_plugins, "product"):
    torch.library.define("iql_plugins::product", "(Tensor left, Tensor right) -> Tensor")

    @torch.library.impl("iql_plugins::product", "CPU")
    def _product(left: Tensor, right: Tensor) -> Tensor:
        return _compat.onednn_product(left, right)

    torch.library.register_fake("iql_plugins::product", lambda left, right: left.new_empty(len(left), right.shape[1]))


def product(left: Tensor, right: Tensor) -> Tensor:
    """``[M, N]`` from ``[M, K]`` and ``[K, N]``, float32 on a CPU, by oneDNN.

    Torch takes MKL, which leaves AVX-512 to Intel's processors: on AMD's, oneDNN is twice as fast. A name of its own
    keeps Inductor from copying what is transposed.
    """
    result: Tensor = torch.ops.iql_plugins.product(left, right)
    return result


def large(left: Tensor, right: Tensor) -> bool:
    """Whether a product, ``[*N, M, K]`` by ``[*N, K, P]``, is one that oneDNN is faster at."""
    rows, inner = left.shape[-2:]
    sizes = rows, inner, right.shape[-1]
    return (
        left.dtype is torch.float32 and min(sizes) >= _LEAST_SIZE and rows * inner * sizes[2] >= _LEAST_MULTIPLICATIONS
    )


def decompositions(device: torch.device) -> dict[Any, Callable[..., Any]]:
    """What a graph has in the place of torch's products, by operator; of a CPU's alone."""
    if device.type != "cpu":
        return {}
    table: dict[Any, Callable[..., Any]] = {_aten.addmm.default: _addmm, _aten.baddbmm.default: _baddbmm}
    return table | ({_aten.mm.default: _mm, _aten.bmm.default: _bmm} if _compat.onednn_is_faster() else {})


@contextmanager
def critics_apart(loss: IQLLoss) -> Iterator[None]:
    """Evaluates one critic after the other, meanwhile, where oneDNN computes: it has no batched products to gain from.

    Narrow critics stay together, whose products torch computes, and those that draw, as they do when nothing is traced.
    """
    network = loss.qvalue_network
    weights = [weight for weight in network.parameters() if weight.ndim > 1 and weight.device.type == "cpu"]
    wide = any(min(weight.shape[-2:]) >= _WIDE for weight in weights)
    drops = loss.vmap_randomness != "different" or any(isinstance(m, nn.Dropout) for m in network.modules())
    apart = wide and not drops and _compat.onednn_is_faster()
    before, loss.deactivate_vmap = loss.deactivate_vmap, loss.deactivate_vmap or apart
    try:
        yield
    finally:
        loss.deactivate_vmap = before


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    # On a CPU a bias is cheaper in the kernel of the activation than in the product, which takes a copy of it in
    # every row. A sum Inductor would put back into the product.
    return alpha * torch.mm(left, right) - (-beta * bias)


def _baddbmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return alpha * torch.bmm(left, right) + beta * bias


def _mm(left: Tensor, right: Tensor) -> Any:
    if _has_short_rows(left, right):
        return torch.mm(right.t(), left.t()).t().contiguous()
    if not large(left, right):
        return NotImplemented
    # oneDNN's call would copy a transposed matrix on one thread: the kernel that makes it can as well write it so.
    return product(left.contiguous(), right)


def _bmm(left: Tensor, right: Tensor) -> Any:
    if _has_short_rows(left, right):
        return torch.bmm(right.mT, left.mT).mT.contiguous()
    # Narrow ones are faster together.
    if not large(left, right) or min(*left.shape[1:], right.shape[-1]) < _WIDE or len(left) > _MOST_MATRICES:
        return NotImplemented
    return torch.stack([_mm(*matrices) for matrices in zip(left.unbind(), right.unbind(), strict=True)])


def _has_short_rows(left: Tensor, right: Tensor) -> bool:
    """Whether a product is the gradient of the weight of few inputs, whose transpose MKL computes faster.

    Its vectors go along rows.
    """
    return left.stride(-2) == 1 < left.stride(-1) and right.shape[-1] < min(_WIDE, left.shape[-2])
