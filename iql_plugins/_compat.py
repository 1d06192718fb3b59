"""Private names of torch and tensordict: nowhere else, each with its reason, and with what does if it is gone.

What is public and does as well is used in place of them. Modules' registries (``_parameters``, ``_buffers``,
``_modules``, hooks) are not here: ``torch.nn.Module`` saves and copies by them, and they are read as attributes.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module

__all__ = [
    "add_to_all",
    "assert_on_device",
    "check_of",
    "compile_graph",
    "copy_all",
    "fused_kernel",
    "has_triton",
    "host_compilers",
    "in_transform",
    "lerp_all",
    "lower_to_cpp",
    "mode_options",
    "onednn_is_faster",
    "onednn_product",
    "passes_tensors_on",
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


def assert_on_device(condition: Tensor, message: str) -> None:
    """Asserts that all of a tensor is True, where it is, without a wait for it.

    ``torch._assert_async`` has no public name, and no rule for what ``torch.vmap`` maps over, which is asserted at
    once. Without the names that this takes a graph, or what is mapped, is not checked, and anything else waits.

    Raises:
        RuntimeError: at once on a CPU, at the next synchronisation on a GPU.
    """
    is_batched, unwrap = _functorch("is_batchedtensor"), _functorch("get_unwrapped")
    while is_batched is not None and unwrap is not None and is_batched(condition):
        condition = unwrap(condition)
    recorded = torch.compiler.is_compiling() or get_proxy_mode() is not None
    if hasattr(torch, "_assert_async") and (is_batched is not None or not recorded):
        torch._assert_async(condition.all(), message)
    elif not recorded and not in_transform() and not condition.all():
        raise RuntimeError(message)


def _functorch(name: str) -> Callable[..., Any] | None:
    return getattr(getattr(torch._C, "_functorch", None), name, None)


def lerp_all(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Moves each target by the share ``weight`` to its source, all in one kernel.

    ``torch.optim.swa_utils.get_ema_multi_avg_fn`` is this for ``1 - decay``, which rounds another weight.
    """
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(list(targets), list(sources), weight)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.lerp_(source, weight)


def fused_kernel(optimizer: Optimizer) -> Callable[..., None] | None:
    """The kernel of torch's fused Adam; None where there is none, or ``step()`` has more to do than to call it.

    Hooks are run by ``step()``; torch's schedules put a ``step`` of their own into the optimiser, gradient scalers a
    factor.
    """
    names = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    own = vars(optimizer)
    unknown: Any = True  # what cannot be looked up may be there
    hooks = [own.get(name, unknown) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")]
    hooks += [getattr(optimizer_module, name, unknown) for name in names]
    if any(hooks) or any(name in own for name in ("step", "grad_scale", "found_inf")):
        return None
    return getattr(torch, "_fused_adam_", None)


def add_to_all(tensors: Sequence[Tensor], number: float) -> None:
    """Adds a number to each, all in one kernel."""
    if hasattr(torch, "_foreach_add_"):
        torch._foreach_add_(list(tensors), number)
    else:
        for tensor in tensors:
            tensor.add_(number)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target, all in one kernel."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(list(targets), list(sources))
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def writes(tensor: Tensor) -> int | None:
    """How often the tensor was written into; None where torch does not count it."""
    return getattr(tensor, "_version", None)


def check_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors have the types, shapes, strides, dtypes and devices of these, and require gradients as these do.

    Dynamo's guard tells in one call, in a quarter of the time. Without it no tensors are known to.
    """
    guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    if not hasattr(guards, "TensorGuards"):
        return lambda *_: False
    # It knows each tensor once.
    firsts = {id(tensor): index for index, tensor in reversed(list(enumerate(tensors)))}
    once = sorted(firsts.values())
    twice = [(index, firsts[id(tensor)]) for index, tensor in enumerate(tensors) if firsts[id(tensor)] != index]
    distinct = [tensors[index] for index in once]
    shapes, strides = [list(tensor.shape) for tensor in distinct], [list(tensor.stride()) for tensor in distinct]
    guard = guards.TensorGuards(*distinct, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guard.check
    if not twice:
        return check
    return lambda *given: all(given[a] is given[b] for a, b in twice) and check(*[given[index] for index in once])


def mode_options() -> Mapping[str, Mapping[str, Any]]:
    """Inductor's options for each ``mode`` of :func:`torch.compile`, whose documentation names this function."""
    return getattr(torch._inductor, "list_mode_options", dict)()


def compile_graph(
    graph: Callable[..., Any], examples: Sequence[Tensor], options: Mapping[str, Any], *, native: bool = False
) -> Callable[..., Any]:
    """A graph of tensors compiled for these very shapes, strides, dtypes and devices.

    On a CPU it comes from Inductor's cache on disk, if it was compiled before, in a third of the time. By
    :func:`torch.compile` nothing is left for Dynamo to do but to check its guards, 0.1 ms a step.

    Args:
        graph: to be compiled.
        examples: its inputs.
        options: of Inductor.
        native: whether to call kernels from C++, on a CPU; by Inductor's Python where not.

    Raises:
        RuntimeError: if Inductor cannot compile it.
    """
    standalone = getattr(torch._inductor, "standalone_compile", None)
    if standalone is not None and all(example.device.type == "cpu" for example in examples):
        patches = {"config_patches": {**_without_probes(), "cpp_wrapper": native, **options}}
        artifact: Callable[..., Any] = standalone(
            graph, list(examples), dynamic_shapes="from_example_inputs", options=patches
        )
        return artifact
    compile = getattr(torch._inductor, "compile", None)
    if compile is None:
        return torch.compile(graph, options=dict(options))
    function: Callable[..., Any] = compile(graph, list(examples), options=dict(options))
    return function


def _without_probes() -> dict[str, bool]:
    """Inductor's settings without a second of tests, in every process, whether compilers know AVX2 and AVX-512.

    Those that can compile torch's headers do. AMX is newer.
    """
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and sys.platform == "linux" and not amx()
    try:
        # What a user has set stays.
        asked = torch._inductor.config.cpp.vec_isa_ok is None
    except AttributeError:
        asked = False
    return {"cpp.vec_isa_ok": True} if known and asked else {}


def lower_to_cpp(operator: Any, function: str, source: str) -> bool:
    """Makes Inductor's C++ call a function for an operator of two matrices; whether it can.

    Args:
        operator: ``[M, N]`` from ``[M, K]`` and ``[K, N]``.
        function: its name in C++; it takes handles of the result and of both matrices, whose rows are contiguous.
        source: its definition.
    """
    try:
        _lower(operator, function, source)
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def _lower(operator: Any, function: str, source: str) -> None:
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.virtualized import V

    class Call(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            if source not in wrapper._included_extra_headers:
                wrapper._included_extra_headers.add(source)
                wrapper.header.splice(source)
            super().codegen(wrapper)

    from_python = fallback_handler(operator, add_to_fallback_set=False)

    @register_lowering(operator, type_promotion_kind=None)
    def lowered(left: Any, right: Any) -> Any:
        if not V.graph.cpp_wrapper:
            return from_python(left, right)
        matrices = [Call.require_stride_order(Call.realize_input(matrix), [1, 0]) for matrix in (left, right)]
        size = [left.get_size()[0], right.get_size()[1]]
        # Flexible: what it is a part of may have it compute into its own memory.
        layout = ir.FlexibleLayout(device=left.get_device(), dtype=left.get_dtype(), size=size)
        return ir.TensorBox.create(Call(layout=layout, inputs=matrices, cpp_kernel_name=function))


def onednn_is_faster() -> bool:
    """Whether oneDNN's products of float32 are faster than torch's own: those of MKL, with AVX-512 but not by Intel."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AMD" in str(capabilities.get("cpu_name"))
    )


def onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices by oneDNN, which has no other name in torch."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, right.t(), None, "none", (), "")
    return result


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
