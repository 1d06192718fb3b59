"""Who owns the parameters: the loss, as in TorchRL, and in one place."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn

from iql_plugins.losses import replicas
from iql_plugins.losses.temperature import AutomaticTemperature
from iql_plugins.networks import default_value_function, parameters

__all__ = ["LossParameters"]

NETWORKS = ("actor_network", "value_network", "qvalue_network")
#: The name of the value estimator among the modules, and in ``state_dict()``.
ESTIMATOR = "_value_estimator"
_TEMPERATURE = "automatic_temperature.log_value"


class LossParameters(TensorDictModuleBase):  # type: ignore[misc]
    """Holds an actor, V, N critics and their targets; saves, loads, copies and shows them.

    Args:
        actor_network: the policy.
        qvalue_network: one critic, or a list of ``num_qvalue_nets``.
        value_network: V, or None for the paper's on the actor's observations.
        num_qvalue_nets: number N of critics.
        separate_losses: whether a parameter that networks share is trained by the loss of one only: the
            actor's before V's before the critics'.

    Raises:
        TypeError: for a network that is not a TensorDict module.
        ValueError: for a number of critics that is not theirs.
    """

    automatic_temperature: AutomaticTemperature | None

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: nn.Module | Sequence[nn.Module],
        value_network: nn.Module | None,
        num_qvalue_nets: int,
        separate_losses: bool,
    ) -> None:
        critics = _critics(qvalue_network, num_qvalue_nets)
        _check_network("actor_network", actor_network, "get_dist")
        for critic in critics:
            _check_network("qvalue_network", critic)
        if value_network is None:
            value_network = default_value_function(actor_network)
        _check_network("value_network", value_network)

        for network in (actor_network, value_network, *critics):
            parameters.expose_nested(network)
        super().__init__()
        self.automatic_temperature = None
        self.num_qvalue_nets = num_qvalue_nets
        self.separate_losses = separate_losses
        self._critic_count = None if num_qvalue_nets == 1 else num_qvalue_nets
        trunk = parameters.shared_names(critics[0], actor_network, value_network) if separate_losses else frozenset()
        if len(critics) == 1 and self._critic_count is not None:
            originals = parameters.leaves(critics[0])
            critics = parameters.duplicates(critics[0], num_qvalue_nets)
            for duplicate in critics:
                for name in trunk:
                    parameters.replace_leaf(duplicate, name, originals[name])
        critic, tied = (critics[0], frozenset[str]()) if self._critic_count is None else parameters.stack(critics)
        self._tied = tied
        # Names of parameters that another network trains.
        self._untrained = dict.fromkeys(NETWORKS, frozenset[str]())
        if separate_losses:
            self._untrained["value_network"] = parameters.shared_names(value_network, actor_network)
            self._untrained["qvalue_network"] = parameters.shared_names(critic, actor_network, value_network)
        # torch.func.functional_call does not restore a module that it meets under two names: modules
        # that networks share become several that hold the same tensors.
        if parameters.share_modules(actor_network, value_network):
            value_network = parameters.stateful_copy(value_network)
        if parameters.share_modules(critic, actor_network, value_network):
            critic = parameters.stateful_copy(critic)
        # Registered under TorchRL's names, which are those of its state_dict; the properties of
        # these names show the same tensors as TensorDicts.
        self._modules["actor_network_params"] = actor_network
        self._modules["value_network_params"] = value_network
        self._modules["qvalue_network_params"] = critic
        self._modules["target_qvalue_network_params"] = parameters.frozen(critic, self._critic_count, tied)
        # TorchRL's name: its updaters set it for every network, ours by target_updater_attached().
        self._has_update_associated = dict.fromkeys(NETWORKS, True) | {"qvalue_network": False}
        # TorchRL's state_dict has the estimator's entries once one was made, ours likewise.
        self._estimator_in_state = False

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.nn.Module would register a network beside the one in use, past a property of that name.
        attribute = getattr(type(self), name, None)
        if not isinstance(attribute, property):
            super().__setattr__(name, value)
        elif attribute.fset is None:
            raise AttributeError(
                f"{name} of {type(self).__name__} cannot be set: networks are given when the loss is built, values "
                "come in with from_stateful_net() or load_state_dict(), keys are renamed with set_keys()"
            )
        else:
            attribute.fset(self, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        shared = self._shared()
        applied = super()._apply(fn, recurse)
        self._share_again(shared)
        return applied

    def _shared(self) -> list[list[str]]:
        """The names of each tensor that has several."""
        groups: dict[int, list[str]] = {}
        for name, tensor in parameters.leaves(self).items():
            groups.setdefault(id(tensor), []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def _share_again(self, shared: list[list[str]]) -> None:
        # Torch makes a new tensor for each name in some casts and loads; one tensor must stay one.
        tensors = parameters.leaves(self)
        for first, *others in shared:
            for name in others:
                parameters.replace_leaf(self, name, tensors[first])

    @property
    def actor_network(self) -> nn.Module:
        """The policy, trained in place."""
        return self._network("actor_network")

    @property
    def value_network(self) -> nn.Module:
        """V, trained in place."""
        return self._network("value_network")

    @property
    def qvalue_network(self) -> nn.Module:
        """The critics; with more than one, a module with stacked parameters that only a vmap can call."""
        return self._network("qvalue_network")

    def _network(self, name: str) -> nn.Module:
        module: nn.Module = self._modules[f"{name}_params"]
        return module

    def _params(self, name: str) -> parameters.NetworkParams:
        module = self._network(name)
        if name == "qvalue_network":
            tensors = parameters.full_leaves(module, self._critic_count, self._tied)
        else:
            tensors = parameters.leaves(module)
        untrained = self._untrained.get(name, frozenset())
        tensors = {key: t.detach() if key in untrained else t for key, t in tensors.items()}
        batch_size = [] if self._critic_count is None or "qvalue" not in name else [self._critic_count]
        return parameters.NetworkParams(module, tensors, batch_size, untrained)

    @property
    def actor_network_params(self) -> TensorDictParams:
        """The policy's parameters, a view."""
        return self._params("actor_network")

    @property
    def value_network_params(self) -> TensorDictParams:
        """V's parameters, a view."""
        return self._params("value_network")

    @property
    def qvalue_network_params(self) -> TensorDictParams:
        """The critics' parameters, a view of batch size ``[N]`` (``[]`` for one critic)."""
        return self._params("qvalue_network")

    @property
    def target_actor_network_params(self) -> TensorDictBase:
        """The policy's parameters, detached: the policy has no target of its own."""
        return self.actor_network_params.data

    @property
    def target_value_network_params(self) -> TensorDictBase:
        """V's parameters, detached: V has no target of its own."""
        return self.value_network_params.data

    @property
    def target_qvalue_network_params(self) -> TensorDictParams:
        """The target critics' tensors, a view of batch size ``[N]`` (``[]`` for one critic)."""
        return self._params("target_qvalue_network")

    def get_stateful_net(self, network_name: str, copy: bool | None = None) -> nn.Module:
        """A network that holds the loss's own tensors, to initialise them, say.

        Args:
            network_name: ``"actor_network"``, ``"value_network"``, ``"qvalue_network"`` or ``"target_qvalue_network"``.
            copy: whether the module is a copy (the default) or the loss's own; the tensors always are the loss's.

        Raises:
            ValueError: for another name.
        """
        module = self._named_network(network_name)
        return module if copy is False else parameters.stateful_copy(module)

    def from_stateful_net(self, network_name: str, stateful_net: nn.Module) -> None:
        """Copies the values of a network (with stacked parameters for several critics) into the loss.

        Args:
            network_name: see :meth:`get_stateful_net`.
            stateful_net: a network with the same names and shapes.

        Raises:
            ValueError: for another name.
            RuntimeError: if names or shapes differ; nothing has changed then.
        """
        own = parameters.leaves(self._named_network(network_name))
        theirs = parameters.leaves(stateful_net)
        _raise_differences(f"stateful_net does not fit {network_name}", own, theirs)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(theirs[name])

    def _named_network(self, name: str) -> nn.Module:
        known = (*NETWORKS, "target_qvalue_network")
        if name not in known:
            raise ValueError(f"network_name must be one of {', '.join(known)}, got {name!r}")
        return self._network(name)

    @torch.no_grad()
    def reset_parameters_recursive(self) -> None:
        """Initialises all networks anew by their ``reset_parameters`` and copies the critics into their targets."""
        parameters.reset_parameters(self.actor_network)
        parameters.reset_parameters(self.value_network)
        if self._critic_count is None:
            parameters.reset_parameters(self.qvalue_network)
        else:
            parameters.reset_critics(self.qvalue_network, self._critic_count, self._tied)
        self.copy_to_targets()
        if self.automatic_temperature is not None:
            self.automatic_temperature.reset_parameters()

    def target_pairs(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Pairs of a target critic's tensor and its source: those of parameters, and those of buffers."""
        pairs: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
        # The targets are a copy: the same modules in the same order, each once, however many names it has.
        twins = zip(self.qvalue_network.named_modules(), self._network("target_qvalue_network").modules(), strict=True)
        for (prefix, module), twin in twins:
            for found, tensors in zip(pairs, (module._parameters, module._buffers), strict=True):
                for key, tensor in tensors.items():
                    if tensor is None:
                        continue
                    name, target = f"{prefix}.{key}".lstrip("."), twin._buffers.get(key)
                    if target is None:
                        raise RuntimeError(
                            f"the targets have no {name!r}, which the critics have been given since the loss was made: "
                            "change (prune, normalise) critics before"
                        )
                    full = parameters.full(name, tensor, self._critic_count, self._tied)
                    found.append((target, replicas.whole(full)))
        return pairs

    @torch.no_grad()
    def copy_to_targets(self) -> None:
        """Copies the critics into their targets."""
        for target, source in (pair for pairs in self.target_pairs() for pair in pairs):
            target.copy_(source)

    def target_updater_attached(self) -> None:
        """Notes that something updates the target critics, so that calls do not warn."""
        self._has_update_associated["qvalue_network"] = True

    # Saving and loading

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As TorchRL's: stacked critics under one name each; the estimator's entries once one was made, set or used."""
        prefix: str = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        for name in self._tied:
            key = f"{prefix}qvalue_network_params.{name}"
            if key in state:
                state[key] = state[key].expand(self._critic_count, *state[key].shape).contiguous()
        if not self._estimator_in_state and not self._estimator_is_set():
            for name in self._estimator_state():
                state.pop(f"{prefix}{name}", None)
        return state

    def _estimator_is_set(self) -> bool:
        """Whether the value estimator is another one than a new loss has."""
        return False

    def _estimator_state(self) -> dict[str, Tensor]:
        """The value estimator's entries of ``state_dict``, whether or not it has them now."""
        return {f"{ESTIMATOR}.{name}": buffer for name, buffer in self._modules[ESTIMATOR].named_buffers()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads our own state dict or TorchRL's; all is checked before anything changes.

        The value estimator's entries may be absent: the loss keeps its own then. Networks and critics
        that share a tensor must agree in it. As part of a larger module, a loss is loaded whole or not at all.

        Raises:
            RuntimeError: for missing or unexpected names (if ``strict``), a shape that differs, or shared
                tensors that differ.
        """
        self._checked(state_dict, strict)
        shared = self._shared()
        result = super().load_state_dict(state_dict, strict, assign)
        self._share_again(shared)
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        # Torch calls this before any child loads, as part of a larger module, too, and does not say there
        # whether missing names matter: some of a loss without the rest never makes sense.
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        checked = self._checked(given, strict=bool(prefix and given))
        if any(key.startswith(ESTIMATOR) for key in given):
            self._estimator_in_state = True
        for key in given:
            del state_dict[f"{prefix}{key}"]
        state_dict.update({f"{prefix}{key}": value for key, value in checked.items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def _checked(self, given: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        """A state dict as the loss's modules load it, or ``RuntimeError``."""
        own = super().state_dict(keep_vars=True)
        if not any(key.startswith(ESTIMATOR) for key in given):
            given = {**given, **self._estimator_state()}
        # TorchRL saves buffers that are not persistent, too.
        transient = {
            f"{name}.{key}" for name, module in self.named_children() for key, _ in module.named_buffers()
        } - own.keys()
        checked = {key: self._unstacked(key, value, own) for key, value in given.items() if key not in transient}
        _raise_differences("the state dict does not fit this loss", own, checked, strict)
        for names in self._shared():
            first, *others = [checked[name] for name in names if name in checked] or [None]
            if any(not torch.equal(first, other) for other in others):
                raise RuntimeError(
                    f"the state dict does not fit this loss: it differs in {' and '.join(names)}, one tensor"
                )
        return checked

    def _unstacked(self, key: str, value: Any, own: Mapping[str, Any]) -> Any:
        """A saved leaf in the shape this loss keeps it: tied ones once, a single critic without its dimension."""
        if key not in own or not isinstance(value, Tensor) or not isinstance(own[key], Tensor):
            return value
        network, _, name = key.partition(".")
        if network == "qvalue_network_params" and name in self._tied and value.ndim > own[key].ndim:
            if not (value == value[:1]).all():
                raise RuntimeError(f"the critics of this loss share {key!r}, those of the state dict differ in it")
            return value[0]
        single = self._critic_count is None and "qvalue_network_params" in network
        return value[0] if single and value.shape == (1, *own[key].shape) else value


def _critics(qvalue_network: nn.Module | Sequence[nn.Module], count: int) -> list[nn.Module]:
    if count < 1:
        raise ValueError(f"num_qvalue_nets must be >= 1, got {count}")
    if isinstance(qvalue_network, nn.Module) and not isinstance(qvalue_network, nn.ModuleList):
        return [qvalue_network]
    if not isinstance(qvalue_network, Iterable):
        raise TypeError(f"qvalue_network must be a module or a list of them, got {type(qvalue_network).__name__}")
    critics = list(qvalue_network)
    if len(critics) != count:
        raise ValueError(
            f"qvalue_network has {len(critics)} critics, but num_qvalue_nets is {count}: they must be equal"
        )
    return critics


def _check_network(name: str, network: Any, method: str | None = None) -> None:
    attributes = ["in_keys", "out_keys", *([method] if method else [])]
    lacking = [attribute for attribute in attributes if not hasattr(network, attribute)]
    if not isinstance(network, nn.Module) or lacking:
        wanted = "a ProbabilisticTensorDictSequential (with get_dist)" if method else "a TensorDictModule"
        raise TypeError(
            f"{name} must be {wanted} of tensordict.nn, got {type(network).__name__}"
            + (f" without {', '.join(lacking)}" if lacking else "")
        )
    if name == "qvalue_network" and any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise ValueError("qvalue_network has uninitialised lazy parameters: call it once on a sample before")


def _raise_differences(what: str, own: Mapping[str, Any], given: Mapping[str, Any], strict: bool = True) -> None:
    """Raises ``RuntimeError`` that lists missing and unexpected names (if ``strict``) and differing shapes."""
    problems = []
    if strict and (missing := own.keys() - given.keys()):
        hint = " (saved with a number for a temperature: set it first)" if _TEMPERATURE in missing else ""
        problems.append(f"it has no {', '.join(sorted(missing))}{hint}")
    if strict and (unexpected := given.keys() - own.keys()):
        hint = " (saved with an automatic temperature: set it to 'auto' first)" if _TEMPERATURE in unexpected else ""
        if any(key.startswith(ESTIMATOR) for key in unexpected):
            hint = " (saved with another value estimator: call make_value_estimator first)"
        problems.append(f"it has unexpected {', '.join(sorted(unexpected))}{hint}")
    for key in own.keys() & given.keys():
        if isinstance(own[key], Tensor):
            came = tuple(given[key].shape) if isinstance(given[key], Tensor) else type(given[key]).__name__
            if came != tuple(own[key].shape):
                problems.append(f"{key} must have shape {tuple(own[key].shape)}, got {came}")
    if problems:
        raise RuntimeError(f"{what}: {'; '.join(problems)}")
