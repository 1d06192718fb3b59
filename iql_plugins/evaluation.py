"""Calling networks: past tensordict's wrapper where it does nothing but pass tensors on.

Writing an output through ``TensorDictModule`` costs 0.2 ms, more than the small networks of offline RL take
to compute it, and every wrapper makes a compiled call check more guards.
"""

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import NestedKey
from torch import Size, Tensor, nn

__all__ = ["distribution", "outputs"]

Tensors = Mapping[NestedKey, Tensor]


def plain_module(network: nn.Module) -> nn.Module | None:
    """The module inside a ``TensorDictModule`` that only passes tensors on; None for any other network."""
    kind: Any = type(network)
    if (
        isinstance(network, TensorDictModule)
        and kind.forward is TensorDictModule.forward
        and kind._call_module is TensorDictModule._call_module
        and kind._write_to_tensordict is TensorDictModule._write_to_tensordict
        and isinstance(network.module, nn.Module)
        and not (network._kwargs or network.method or network.method_kwargs or network._get_kwargs)
        and not (network._forward_hooks or network._forward_pre_hooks)
    ):
        module: nn.Module = network.module
        return module
    return None


def outputs(network: nn.Module, inputs: Tensors, shape: Size) -> Tensors:
    """What a network writes, by its out_keys.

    Args:
        network: a TensorDict module.
        inputs: its inputs, by its in_keys and in their order.
        shape: the batch shape of the inputs.
    """
    module, out_keys = plain_module(network), _out_keys(network)
    if module is not None:
        written = module(*inputs.values())
        written = written if isinstance(written, tuple) else (written,)
        if len(written) == len(out_keys) and all(isinstance(tensor, Tensor) for tensor in written):
            return dict(zip(out_keys, written, strict=True))
    result: Tensors = network(TensorDict(dict(inputs), batch_size=shape))
    return result


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
    return plain_module(first) is not None and list(first.in_keys) == list(actor.in_keys) and bool(last.in_keys)


def _out_keys(network: nn.Module) -> list[NestedKey]:
    out_keys: Any = network.out_keys
    return list(out_keys)
