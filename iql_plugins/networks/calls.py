"""Calling networks: past tensordict's wrapper where it does nothing but pass tensors on.

Writing an output through ``TensorDictModule`` costs 0.2 ms, more than the small networks of offline RL take
to compute it, and every wrapper makes a compiled call check more guards.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import NestedKey
from torch import Size, Tensor, nn
from torch.func import functional_call

from iql_plugins import _compat

__all__ = ["distribution", "evaluation_mode", "has_hooks", "is_repeatable", "outputs"]

Tensors = Mapping[NestedKey, Tensor]

_DRAWING = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.RReLU,
)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """No dropout, and running statistics that stay as they are, inside; the modes are what they were after it."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def plain_module(network: nn.Module) -> nn.Module | None:
    """The module inside a ``TensorDictModule`` that only passes tensors on; None for any other network."""
    if (
        isinstance(network, TensorDictModule)
        and isinstance(network.module, nn.Module)
        and _compat.passes_tensors_on(network)
        and not _hooked(network)
    ):
        module: nn.Module = network.module
        return module
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module, or one inside it, runs hooks of its own."""
    return any(_hooked(submodule) for submodule in module.modules())


def is_repeatable(module: nn.Module) -> bool:
    """Whether each call of a module has the same result: it has no buffers, such as running statistics, nor dropout.

    What its code draws or counts beside torch's modules nobody can tell.
    """
    dropout = (m.dropout for m in module.modules() if isinstance(m, nn.RNNBase | nn.MultiheadAttention))
    drawing = any(isinstance(submodule, _DRAWING) for submodule in module.modules()) or any(dropout)
    return not drawing and next(module.buffers(), None) is None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def outputs(network: nn.Module, inputs: Tensors, shape: Size, leaves: Mapping[str, Tensor] | None = None) -> Tensors:
    """What a network writes, by its out_keys.

    Args:
        network: a TensorDict module.
        inputs: its inputs, by its in_keys and in their order.
        shape: the batch shape of the inputs.
        leaves: parameters and buffers by name, in place of its own; None for these.

    Raises:
        RuntimeError: if a module returns more or fewer tensors than the network has out_keys.
    """
    module = plain_module(network)
    if module is None:
        result: Tensors = _call(network, leaves, TensorDict(dict(inputs), batch_size=shape))
        return result
    if leaves is not None:
        leaves = {name.removeprefix("module."): tensor for name, tensor in leaves.items()}
    written = _call(module, leaves, *inputs.values())
    if isinstance(written, Mapping | TensorDictBase):
        return written
    tensors = written if isinstance(written, tuple) else (written,)
    out_keys: Any = network.out_keys
    if len(tensors) != len(out_keys):
        raise RuntimeError(f"the module returned {len(tensors)} tensors for the out_keys {list(out_keys)}")
    return dict(zip(out_keys, tensors, strict=True))


def _call(module: nn.Module, leaves: Mapping[str, Tensor] | None, *inputs: Any) -> Any:
    if leaves is None:
        return module(*inputs)
    # What functional_call finds in a module that it meets under two names, it does not put back.
    paths = {path for path, _ in module.named_modules()}
    again = {path for path, _ in module.named_modules(remove_duplicate=False) if path not in paths}
    once = {name: tensor for name, tensor in leaves.items() if name.rpartition(".")[0] not in again}
    return functional_call(module, once, inputs, tie_weights=False)


def distribution(actor: nn.Module, inputs: Tensors, shape: Size) -> Any:
    """The policy's distribution.

    Args:
        actor: a TensorDict module with ``get_dist``.
        inputs: see :func:`outputs`.
        shape: see :func:`outputs`.
    """
    if isinstance(actor, ProbabilisticTensorDictSequential) and _is_plain(actor):
        first, last = actor.module
        return last.get_dist(TensorDict(dict(outputs(first, inputs, shape)), batch_size=shape))
    return actor.get_dist(TensorDict(dict(inputs), batch_size=shape))  # type: ignore[operator]


def _is_plain(actor: ProbabilisticTensorDictSequential) -> bool:
    """Whether an actor is one plain module and one distribution, taken as it is."""
    if type(actor).get_dist is not ProbabilisticTensorDictSequential.get_dist or getattr(
        actor, "return_composite", False
    ):
        return False
    if len(actor.module) != 2 or not isinstance(actor.module[1], ProbabilisticTensorDictModule):
        return False
    first, last = actor.module
    # A distribution may read an entry of the batch, too: an action mask, say.
    return plain_module(first) is not None and set(last.in_keys) <= set(first.out_keys)
