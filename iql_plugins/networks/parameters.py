"""The parameters of a loss's networks: stacking critics, freezing targets, and TorchRL's view of them all.

Networks stay ordinary modules, so that saving, copying, casting and ``functional_call`` are torch's
own. N critics are one module whose every leaf has N slices along its first dimension, but for
*tied* leaves, the very same tensor in all critics, which is kept once.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

__all__ = ["NetworkParams"]

Tensors = dict[str, Tensor]
_IN_PLACE = "the parameters of a loss can be changed in place, not replaced; see from_stateful_net"


def leaves(module: nn.Module) -> Tensors:
    """All parameters and buffers by name; a shared one under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def replace_leaf(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in the place of a leaf; a parameter can become a buffer, not the reverse."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf not in owner._parameters:
        owner._buffers[leaf] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        del owner._parameters[leaf]
        owner.register_buffer(leaf, value)


def stateful_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that holds the very tensors of the original: what changes one changes the other."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in leaves(module).values()})


def reset_parameters(module: nn.Module) -> None:
    """Calls ``reset_parameters`` of every submodule that has one."""
    for submodule in module.modules():
        if callable(reset := getattr(submodule, "reset_parameters", None)):
            reset()


@torch.no_grad()
def duplicates(module: nn.Module, count: int) -> list[nn.Module]:
    """``count`` copies of a critic, each initialised by its own ``reset_parameters``.

    A trainable parameter that belongs to a module without ``reset_parameters``, and that no module above
    it drew anew, is drawn uniformly between the smallest and the largest of its values, as TorchRL does:
    equal critics would stay equal.
    """
    copies = [copy.deepcopy(module) for _ in range(count)]
    for duplicate in copies:
        reset_parameters(duplicate)
    for name, first in copies[0].named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        tensors = [duplicate.get_parameter(name) for duplicate in copies]
        if hasattr(owner, "reset_parameters") or not first.requires_grad or first.is_meta or not first.numel():
            continue
        if all(torch.equal(first, tensor) for tensor in tensors):
            low, high = first.min().item(), first.max().item()
            for tensor in tensors:
                tensor.uniform_(low, high)
    return copies


def _description(critic: nn.Module) -> dict[str, Any]:
    """What critics that are stacked into one module must agree in."""
    return {
        "in_keys": critic.in_keys,
        "out_keys": critic.out_keys,
        "parameters": {name: tuple(tensor.shape) for name, tensor in leaves(critic).items()},
        "trainable parameters": [name for name, tensor in leaves(critic).items() if tensor.requires_grad],
        "modules": [(name, type(module).__name__, module.extra_repr()) for name, module in critic.named_modules()],
    }


@torch.no_grad()
def stack(critics: Sequence[nn.Module]) -> tuple[nn.Module, frozenset[str]]:
    """One module with the leaves of all critics stacked, and the names of its tied leaves.

    Raises:
        ValueError: if the critics differ in keys, modules, or the names, shapes or trainability of their
            leaves, or if some, but not all, of them share a leaf.
    """
    tensors = [leaves(critic) for critic in critics]
    for index, other in enumerate(critics[1:], start=1):
        for what, description in _description(critics[0]).items():
            if description != _description(other)[what]:
                raise ValueError(
                    f"all critics of qvalue_network must have the same {what}: critic 0 has {description}, "
                    f"critic {index} has {_description(other)[what]}"
                )
    module, tied = stateful_copy(critics[0]), set()
    stacked: dict[tuple[int, ...], Tensor] = {}
    for name, first in tensors[0].items():
        slices = [leaf[name] for leaf in tensors]
        identities = tuple(map(id, slices))
        if len(set(identities)) == 1:
            tied.add(name)
            continue
        if len(set(identities)) < len(slices):
            raise ValueError(
                f"qvalue_network shares {name!r} among some of its critics, not all: pass critics that are all "
                "different, or all the same object"
            )
        if identities not in stacked:
            together = torch.stack([tensor.detach() for tensor in slices])
            is_parameter = isinstance(first, nn.Parameter)
            stacked[identities] = nn.Parameter(together, first.requires_grad) if is_parameter else together
        replace_leaf(module, name, stacked[identities])
    return module, frozenset(tied)


@torch.no_grad()
def frozen(module: nn.Module, count: int | None, tied: frozenset[str]) -> nn.Module:
    """The targets of stacked critics: a copy whose leaves are all buffers, tied ones stacked in full."""
    copied = stateful_copy(module)
    for name, tensor in leaves(module).items():
        replace_leaf(copied, name, full(name, tensor, count, tied).detach().clone())
    return copied


def full(name: str, tensor: Tensor, count: int | None, tied: frozenset[str]) -> Tensor:
    """A leaf with N slices (a tied one is an expanded view); as it is when ``count`` is None."""
    return tensor.expand(count, *tensor.shape) if count is not None and name in tied else tensor


def full_leaves(module: nn.Module, count: int | None, tied: frozenset[str]) -> Tensors:
    """All leaves, each by :func:`full`."""
    return {name: full(name, tensor, count, tied) for name, tensor in leaves(module).items()}


def call_critics(
    call: Callable[[Tensors], Tensor],
    tensors: Tensors,
    count: int,
    tied: frozenset[str],
    *,
    vmap: bool,
    randomness: str,
) -> Tensor:
    """``[N, ...]`` outputs of N critics with stacked leaves.

    Args:
        call: the output of one critic with these leaves.
        tensors: all leaves, stacked but for the tied ones.
        count: N.
        tied: names of the leaves that all critics share. Critics that share everything run once.
        vmap: vectorise over critics, or loop.
        randomness: of dropout among critics, as in :func:`torch.vmap`.
    """
    common = {name: tensor for name, tensor in tensors.items() if name in tied}
    own = {name: tensor for name, tensor in tensors.items() if name not in tied}
    if not own:
        output = call(common)
        return output.unsqueeze(0).expand(count, *output.shape)
    if vmap:
        return torch.vmap(lambda slices: call({**common, **slices}), randomness=randomness)(own)
    # unbind, not an index each: its gradient is one stack instead of a zero-filled tensor per critic.
    slices = {name: tensor.unbind(0) for name, tensor in own.items()}
    return torch.stack([call({**common, **{name: parts[i] for name, parts in slices.items()}}) for i in range(count)])


@torch.no_grad()
def reset_critics(module: nn.Module, count: int, tied: frozenset[str]) -> None:
    """Resets stacked critics in place, one after the other."""
    tensors = leaves(module)
    for index in range(count):
        critic = stateful_copy(module)
        for name, tensor in tensors.items():
            if name not in tied:
                part = tensor[index].clone()
                replace_leaf(critic, name, nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part)
        reset_parameters(critic)
        for name, tensor in leaves(critic).items():
            if name not in tied:
                tensors[name][index] = tensor


def shared_names(module: nn.Module, *others: nn.Module) -> frozenset[str]:
    """The parameters of ``module``, by all their names, that ``others`` hold, too."""
    identities = {id(parameter) for other in others for parameter in other.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if id(parameter) in identities)


def share_modules(module: nn.Module, *others: nn.Module) -> bool:
    """Whether a submodule that holds tensors belongs to ``others``, too."""
    held = {submodule for other in others for submodule in other.modules()}
    return any(submodule in held and (submodule._parameters or submodule._buffers) for submodule in module.modules())


class NestedParams(TensorDictParams):  # type: ignore[misc]
    """A ``TensorDictParams`` inside a network, with its tensors where torch looks for them: in modules.

    The original records its tensors twice, and computes with the record that ``functional_call``, copies and
    replaced leaves do not reach. This one looks up what its modules hold whenever the network reads it.

    Args:
        params: the original, whose tensors and names it takes over.
    """

    no_convert = "skip"
    _is_locked = _lock_content = False
    state_dict = nn.Module.state_dict
    load_state_dict = nn.Module.load_state_dict
    _load_from_state_dict = nn.Module._load_from_state_dict
    _apply = nn.Module._apply

    def __init__(self, params: TensorDictParams) -> None:
        nn.Module.__init__(self)
        self._original_batch_size, self._get_post_hook = params.batch_size, params._get_post_hook
        for key, tensor in params.items(True, True):
            *path, name = key if isinstance(key, tuple) else (key,)
            owner: nn.Module = self
            for part in path:
                owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            (owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers)[name] = tensor

    @property
    def _param_td(self) -> TensorDict:
        tensors = leaves(self)
        known = [tensor for tensor in tensors.values() if not nn.parameter.is_lazy(tensor)]
        shapes = {tensor.shape[: len(self._original_batch_size)] for tensor in known} or {self._original_batch_size}
        # Stacked critics that share some of their leaves have no common batch size.
        return _nested(tensors, shapes.pop() if len(shapes) == 1 else ())

    @_param_td.setter
    def _param_td(self, tensordict: TensorDictBase) -> None:
        # TensorDict.to_module sets it, and sets it back.
        for key, tensor in tensordict.items(True, True):
            *path, name = key if isinstance(key, tuple) else (key,)
            owner = self.get_submodule(".".join(path))
            (owner._parameters if name in owner._parameters else owner._buffers)[name] = tensor

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self._param_td, name)

    def __getstate__(self) -> dict[str, Any]:
        # Without the caches and locks of TensorDicts around it.
        return {name: vars(self)[name] for name in (*vars(nn.Module()), "_original_batch_size", "_get_post_hook")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NestedParams":
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def _reset_params(self, params: dict[str, Any] | None = None, buffers: dict[str, Any] | None = None) -> None:
        raise RuntimeError(_IN_PLACE)


def expose_nested(network: nn.Module) -> None:
    """Puts :class:`NestedParams` in the place of every ``TensorDictParams`` inside a network."""
    for module in list(network.modules()):
        for name, child in module._modules.items():
            if isinstance(child, TensorDictParams) and not isinstance(child, NestedParams):
                module._modules[name] = NestedParams(child)


def _nested(tensors: Tensors, batch_size: Sequence[int]) -> TensorDict:
    """Tensors by dotted name as a nested TensorDict."""
    nested = TensorDict(batch_size=batch_size)
    for name, tensor in tensors.items():
        nested[tuple(name.split("."))] = tensor
    return nested


class NetworkParams(TensorDictParams):  # type: ignore[misc]
    """A network's parameters as TorchRL shows them: a nested TensorDict, one entry a leaf.

    It is a view: values are the tensors that the loss trains, changes in place reach them, and the
    entries themselves cannot be replaced. Made anew at every access.

    Args:
        module: the network that owns the tensors.
        tensors: its leaves by dotted name, as they are to be seen.
        batch_size: ``[N]`` for stacked critics.
        untrained: names whose tensors another network trains; not among :meth:`named_parameters`.
    """

    def __init__(
        self, module: nn.Module, tensors: Tensors, batch_size: Sequence[int], untrained: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(_nested(tensors, batch_size), no_convert="skip", lock=True)
        # The registries are the module's own, so that torch.func.functional_call, which walks
        # attributes to the leaf that a name means, swaps the tensor that the loss will read.
        self.__dict__.update(
            _parameters=module._parameters, _buffers=module._buffers, _modules=module._modules, _untrained=untrained
        )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As :meth:`torch.nn.Module.named_parameters`, of those that this network's loss trains."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if name not in self._untrained:
                yield name, parameter

    def _select(self, *args: Any, **kwargs: Any) -> TensorDictBase:
        # The base class takes every selection for one in place; TorchRL's updaters select from views.
        return self._param_td._select(*args, **kwargs)

    def _reset_params(self, params: dict[str, Any] | None = None, buffers: dict[str, Any] | None = None) -> None:
        if "_untrained" in self.__dict__:
            raise RuntimeError(_IN_PLACE)
        super()._reset_params(params, buffers)
