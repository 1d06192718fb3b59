"""All critics in one pass: a perceptron's layers as batched products over stacked weights.

``torch.vmap`` evaluates critics of any kind together, at a price: the kernels compiled from it are slower
than a loop over critics. Perceptrons, whose forward is known, are evaluated layer by layer instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iql_plugins.networks.builders import MLP, Dropout, LayerNorm
from iql_plugins.networks.calls import has_hooks, plain_module

__all__ = ["CriticEnsemble"]

_ELEMENTWISE = (
    nn.Identity,
    nn.Dropout,
    Dropout,
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


@dataclass(frozen=True)
class CriticEnsemble:
    """The layers of a critic that concatenates its inputs: linear and elementwise ones, and layer normalisation.

    Attributes:
        layers: their names in the critic, in order.
    """

    layers: tuple[str, ...]

    @classmethod
    def read(cls, critic: nn.Module) -> "CriticEnsemble | None":
        """The layers of a critic built of our ``MLP`` or, with one input, of ``nn.Sequential``; None for any other."""
        body = plain_module(critic)
        joins = body is not None and type(body).forward is MLP.forward
        if body is None or has_hooks(critic) or not (joins or len(critic.in_keys) == 1):  # type: ignore[arg-type]
            return None
        root = "module.layers" if joins else "module"
        names = list(_flattened(critic.get_submodule(root), root))
        modules = list(map(critic.get_submodule, names))
        known = all(_is_linear(m) or _is_layer_norm(m) or type(m) in _ELEMENTWISE for m in modules)
        # One that comes twice has one weight, and two names for it.
        weighted = [id(m) for m in modules if next(m.parameters(), None) is not None]
        return cls(tuple(names)) if known and len(set(weighted)) == len(weighted) else None

    def __call__(self, critic: nn.Module, tensors: dict[str, Tensor], inputs: Sequence[Tensor], count: int) -> Tensor:
        """``[N, *B, out]`` outputs of N critics.

        Args:
            critic: the module whose layers these are; its elementwise ones are called.
            tensors: its leaves, ``[N, ...]`` but for those that all critics share.
            inputs: ``[*B, f_i]``, in the order of the critic's in_keys.
            count: N.
        """
        joined = inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), -1)
        # Stacked from the start, so that dropout draws for each critic. Features come before the batch: the
        # gradient of a weight then has the weight's own layout, and needs no copy.
        x = joined.reshape(-1, joined.shape[-1]).t().expand(count, -1, -1)
        for name in self.layers:
            layer, weight, bias = critic.get_submodule(name), tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
            if isinstance(layer, nn.LayerNorm):
                x = _layer_norm(x, weight, bias, layer.eps)
            else:
                x = layer(x) if weight is None else _linear(x, weight, bias)
        return x.transpose(1, 2).reshape(count, *joined.shape[:-1], -1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, out, B]`` from ``[N, in, B]``; weight and bias are stacked, or one for all critics."""
    weight = weight.expand(len(x), *weight.shape[-2:])
    return torch.bmm(weight, x) if bias is None else torch.baddbmm(bias.unsqueeze(-1), weight, x)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``[N, F, B]`` normalised over features; weight and bias are stacked, or one for all critics."""
    x = nn.functional.layer_norm(x.transpose(1, 2), x.shape[1:2], eps=eps).transpose(1, 2)
    x = x if weight is None else x * weight.unsqueeze(-1)
    return x if bias is None else x + bias.unsqueeze(-1)


def _flattened(module: nn.Module, name: str) -> Iterator[str]:
    if type(module) is nn.Sequential:
        # named_children() leaves out what comes again.
        for child_name, child in module._modules.items():
            assert child is not None
            yield from _flattened(child, f"{name}.{child_name}")
    else:
        yield name


def _is_linear(module: nn.Module) -> bool:
    # A parametrised layer computes its weight or its bias: these are no leaves.
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and {"weight", "bias"} <= module._parameters.keys()
    )


def _is_layer_norm(module: nn.Module) -> bool:
    # Features are the only dimension that each sample has of its own here. Parametrised, it is of another class.
    return type(module) in (nn.LayerNorm, LayerNorm) and len(module.normalized_shape) == 1  # type: ignore[arg-type]
