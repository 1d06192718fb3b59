"""Private names of torch and tensordict: nowhere else, each with its reason, and with what does if it is gone.

What is public and does as well is used in place of them. Modules' registries (``_parameters``, ``_buffers``,
``_modules``, hooks) are not here: ``torch.nn.Module`` saves and copies by them, and they are read as attributes.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

__all__ = [
    "assert_on_device",
    "compile_graph",
    "copy_all",
    "has_triton",
    "host_compilers",
    "in_transform",
    "lerp_all",
    "mode_options",
    "passes_tensors_on",
    "unwrapped",
    "writes",
]


def passes_tensors_on(network: TensorDictModule) -> bool:
    """Whether a ``TensorDictModule`` calls its module with the tensors of its in_keys, and does nothing else.

    No public name tells what a subclass, or a later release, does beside that: one whose parts are not those that are
    known here is called as it is, which is slower and never wrong.
    """
    kind: Any = type(network)
    try:
        return bool(
            kind.forward is TensorDictModule.forward
            and kind._call_module is TensorDictModule._call_module
            and kind._write_to_tensordict is TensorDictModule._write_to_tensordict
            and not (network._kwargs or network.method or network.method_kwargs or network._get_kwargs)
        )
    except AttributeError:
        return False


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is active, under which no value can be read on the host.

    Public in no release; without it, values are read as outside of one.
    """
    peek = _functorch("peek_interpreter_stack")
    return peek is not None and peek() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """A tensor without the levels of ``torch.vmap``, which has no rule for an assertion."""
    is_batched, unwrap = _functorch("is_batchedtensor"), _functorch("get_unwrapped")
    while is_batched is not None and unwrap is not None and is_batched(tensor):
        tensor = unwrap(tensor)
    return tensor


def _functorch(name: str) -> Callable[..., Any] | None:
    return getattr(getattr(torch._C, "_functorch", None), name, None)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Asserts where the tensor is, without a wait for it.

    ``torch._assert_async`` has no public name. Without it a graph cannot check, and anything else waits.

    Raises:
        RuntimeError: at once on a CPU, at the next synchronisation on a GPU.
    """
    if hasattr(torch, "_assert_async"):
        torch._assert_async(condition, message)
    elif not torch.compiler.is_compiling() and not condition:
        raise RuntimeError(message)


def lerp_all(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Moves each target by the share ``weight`` to its source, all in one kernel.

    ``torch.optim.swa_utils.get_ema_multi_avg_fn`` is this for ``1 - decay``, which rounds another weight.
    """
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(list(targets), list(sources), weight)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.lerp_(source, weight)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target, all in one kernel."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(list(targets), list(sources))
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def writes(tensor: Tensor) -> Hashable:
    """Another value after each write into the tensor; without torch's count of them, another one each time."""
    return getattr(tensor, "_version", object())


def mode_options() -> Mapping[str, Mapping[str, Any]]:
    """Inductor's options for each ``mode`` of :func:`torch.compile`, whose documentation names this function."""
    return torch._inductor.list_mode_options()


def compile_graph(graph: nn.Module, examples: Sequence[Tensor], options: Mapping[str, Any]) -> Callable[..., Any]:
    """A graph of tensors compiled for these very shapes, strides, dtypes and devices.

    By :func:`torch.compile` nothing is left for Dynamo to do but to check its guards, 0.1 ms a step.
    """
    compile = getattr(torch._inductor, "compile", None)
    if compile is None:
        return torch.compile(graph, options=dict(options))
    function: Callable[..., Any] = compile(graph, list(examples), options=dict(options))
    return function


def host_compilers() -> tuple[str, ...]:
    """The C++ compilers that Inductor looks for."""
    try:
        from torch._inductor import config

        return tuple(name for name in (*config.cpp.cxx, "clang++") if name is not None)
    except (ImportError, AttributeError):
        return ("g++", "clang++")


def has_triton() -> bool:
    """Whether Triton is there, and knows this GPU."""
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return False
    return has_triton()
