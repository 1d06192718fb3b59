"""Matrix products of compiled steps on a CPU."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iql_plugins import _compat
from iql_plugins.losses.iql import IQLLoss

__all__ = ["PRODUCT", "called_from_cpp", "critics_apart", "decompositions", "product"]

#: Multiplications of a product from which on oneDNN is faster than MKL on AMD's processors with AVX-512, by torch's
#: operator and from C++: below, calling it costs more than it saves.
_LEAST, _LEAST_NATIVE = 3 * 2**19, 2**18

#: Of a layer's weight, both ways, from which on oneDNN computes all of its products at usual batch sizes.
_WIDE = 64

#: Of a batched product that is taken apart: a graph grows by each.
_MOST_MATRICES = 32

_aten = torch.ops.aten

#: What compiled steps call, and its name: Inductor keeps what it has compiled under it.
_SOURCE = Path(__file__).with_name("product.h").read_text()
_NAME = f"product_{hashlib.sha256(_SOURCE.encode()).hexdigest()[:8]}"

if not hasattr(torch.ops.iql_plugins, _NAME):
    torch.library.define(f"iql_plugins::{_NAME}", "(Tensor left, Tensor right) -> Tensor")

    @torch.library.impl(f"iql_plugins::{_NAME}", "CPU")
    def _product(left: Tensor, right: Tensor) -> Tensor:
        return _compat.onednn_product(left, right)

    torch.library.register_fake(f"iql_plugins::{_NAME}", lambda left, right: left.new_empty(len(left), right.shape[1]))

#: The operator of :func:`product`.
PRODUCT = getattr(torch.ops.iql_plugins, _NAME).default


def product(left: Tensor, right: Tensor) -> Tensor:
    """``[M, N]`` from ``[M, K]`` and ``[K, N]``, float32 on a CPU, by oneDNN.

    Torch takes MKL, which leaves AVX-512 to Intel's processors: on AMD's, oneDNN is twice as fast. In compiled steps
    it is ``product.h``, if Inductor can call it, and one of torch's operators where not.
    """
    result: Tensor = PRODUCT(left, right)
    return result


@cache
def called_from_cpp() -> bool:
    """Whether a graph's C++ can call all of its products, whether or not it has any by oneDNN."""
    return _compat.lower_to_cpp(PRODUCT, "aoti_torch_cpu_iql_plugins_product", _SOURCE)


def decompositions(device: torch.device, *, native: bool) -> dict[Any, Callable[..., Any]]:
    """What a graph has in the place of torch's products, by operator; of a CPU's alone.

    Args:
        device: where it computes.
        native: whether it is called from C++.
    """
    if device.type != "cpu":
        return {}
    table: dict[Any, Callable[..., Any]] = {_aten.addmm.default: _addmm, _aten.baddbmm.default: _baddbmm}
    if _compat.onednn_is_faster():
        least = _LEAST_NATIVE if native else _LEAST
        table |= {_aten.mm.default: partial(_mm, least), _aten.bmm.default: partial(_bmm, least)}
    return table


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


def _mm(least: int, left: Tensor, right: Tensor) -> Any:
    if _is_of_vectors(left, right):
        return _of_vectors(left, right)
    if _has_short_rows(left, right):
        return torch.mm(right.t(), left.t()).t().contiguous()
    if not _is_large(left, right, least):
        return NotImplemented
    # The kernel that makes a matrix can as well write it by rows.
    return product(*(matrix if matrix.stride(-1) == 1 else matrix.contiguous() for matrix in (left, right)))


def _bmm(least: int, left: Tensor, right: Tensor) -> Any:
    if _is_of_vectors(left, right):
        return _of_vectors(left, right)
    if _has_short_rows(left, right):
        return torch.bmm(right.mT, left.mT).mT.contiguous()
    # Narrow ones are faster together.
    if not _is_large(left, right, least) or min(*left.shape[1:], right.shape[-1]) < _WIDE or len(left) > _MOST_MATRICES:
        return NotImplemented
    return torch.stack([_mm(least, *matrices) for matrices in zip(left.unbind(), right.unbind(), strict=True)])


def _is_large(left: Tensor, right: Tensor, least: int) -> bool:
    """Whether a product, ``[*N, M, K]`` by ``[*N, K, P]``, is one that oneDNN is faster at."""
    rows, inner = left.shape[-2:]
    return left.dtype is torch.float32 and rows * inner * right.shape[-1] >= least


def _is_of_vectors(left: Tensor, right: Tensor) -> bool:
    """Whether a side of the product is one long: that of V's or a critic's last layer, and both of its gradients."""
    return left.dtype in (torch.float32, torch.float64) and min(*left.shape[-2:], right.shape[-1]) == 1


def _of_vectors(left: Tensor, right: Tensor) -> Tensor:
    # As sums they become a part of the kernels around them, which have one side in the cache.
    if left.shape[-1] == 1:
        return left * right
    if right.shape[-1] == 1:
        return (left * right.mT).sum(-1, keepdim=True)
    return (left.mT * right).sum(-2, keepdim=True)


def _has_short_rows(left: Tensor, right: Tensor) -> bool:
    """Whether a product is the gradient of the weight of few inputs, whose transpose MKL computes faster.

    Its vectors go along rows.
    """
    return left.stride(-2) == 1 < left.stride(-1) and right.shape[-1] < min(_WIDE, left.shape[-2])
