r"""The losses of Implicit Q-Learning over networks, for continuous and for discrete actions."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from tensordict.utils import NestedKey, unravel_key
from torch import Size, Tensor, nn
from torch.func import functional_call

from iql_plugins import functional, parameters
from iql_plugins.distributions import at_least_float32
from iql_plugins.functional import LossFunction, Reduction
from iql_plugins.keys import (
    AUTO_MASK_KEYS,
    DISCOUNT,
    STEPS_TO_NEXT_OBS,
    AcceptedKeys,
    Batch,
    check_finite,
    is_key,
    keyword_tensors,
    mask_rows,
    next_key,
    shown,
    to_batch_shape,
)
from iql_plugins.networks import default_value_function
from iql_plugins.value_estimators import (
    ValueEstimator,
    ValueEstimators,
    make_estimator,
    supported_value_type,
    time_dimension,
)

__all__ = ["DiscreteIQLLoss", "IQLLoss"]

ScalarOutputMode = Literal["exclude", "non_tensor"]
_NETWORKS = ("actor_network", "value_network", "qvalue_network")
_ESTIMATOR = "_value_estimator"
_NO_UPDATER = (
    "The loss has target critics, but no SoftUpdate or HardUpdate was made for it. If you update "
    "target_qvalue_network_params yourself, ignore this warning; if not, the critics learn from targets that never move."
)


class IQLLoss(TensorDictModuleBase):
    r"""The losses of IQL for continuous actions, with the contract of ``torchrl.objectives.IQLLoss``.

    .. math::
        L_V = \mathbb{E}\, L_2^\tau\big(\min_i \hat Q_i(s, a) - V(s)\big), \quad
        L_Q = \mathbb{E} \sum_i d\big(Q_i(s, a),\, r + \gamma (1 - \text{terminated}) V(s')\big), \quad
        L_\pi = -\mathbb{E}\, \min\big(e^{\beta A}, w_{\max}\big) \log \pi(a \mid s)

    Kostrikov et al. 2021 (arXiv:2110.06169), equations 5 to 7; :mod:`iql_plugins.functional` has each
    of them. Two choices differ among implementations: the critics' losses are *summed* over critics, and
    all three losses are taken at the *same* parameters, so that one backward pass of their sum trains
    everything (the authors' code updates V first and uses the new one in the two others).

    **What trains what.** ``loss_value`` reaches V alone, ``loss_qvalue`` the critics, ``loss_actor`` the
    policy; gradients stop at the target critics, at V(s') and at the advantage. Networks that share
    modules: a parameter of actor and V is trained by both losses, by ``loss_actor`` alone with
    ``separate_losses=True``; one of V or the actor in the critics likewise by both, with
    ``separate_losses=True`` by the actor's (or else V's) loss alone. A single ``qvalue_network``
    duplicated for several critics becomes their own, newly initialised; only with
    ``separate_losses=True`` does it keep following what it shares.

    **Who owns the parameters.** The loss. The actor, V and a single critic (``num_qvalue_nets=1``) are the
    modules that were passed, trained in place; several critics are stacked into one module of the
    loss's own. ``actor_network_params``, ``value_network_params``, ``qvalue_network_params`` and
    ``target_qvalue_network_params`` show them as nested TensorDicts, under the names of ``state_dict()``.

    **Input** by the layout of :mod:`iql_plugins.keys`: a TensorDict, into which the log-probability and the
    priority are written and nothing else; or keyword tensors, with a tuple in the order of
    :attr:`out_keys` in return. Losses are computed in float32 at least, whatever the networks' dtype.

    **Function transforms.** ``torch.func.functional_call(loss, parameters, kwargs=batch)`` computes the losses
    at ``parameters`` (names of ``named_parameters()``), and ``torch.func.grad`` of it equals autograd's.

    Args:
        actor_network: the policy, with ``get_dist`` (``tensordict.nn.ProbabilisticTensorDictSequential``,
            TorchRL's ``ProbabilisticActor``).
        qvalue_network: Q(s, a), writes ``[*B, 1]``. A single module is duplicated, each copy initialised
            by its own ``reset_parameters``. The modules of a list are stacked as they are; the same
            object repeated is one critic, kept once.
        value_network: V(s), writes ``[*B, 1]``. None builds the paper's, on the actor's observations.
        num_qvalue_nets: number N of critics.
        loss_function: distance of Q to its target: ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        temperature: inverse temperature :math:`\beta` >= 0; 0 is behaviour cloning, above 1 is normal.
        expectile: :math:`\tau` in (0, 1].
        gamma: refused; the discount is a hyper-parameter of :meth:`make_value_estimator`.
        priority_key: refused; see :meth:`set_keys`.
        separate_losses: whether parameters that networks share are trained by one loss only, see above.
        reduction: ``"mean"`` (the default, also for None), ``"sum"``, or ``"none"`` for losses of shape ``*B``.
        deactivate_vmap: whether to loop over critics instead of vectorising over them. On a CPU the loop is
            the faster one and always taken.
        scalar_output_mode: with ``reduction="none"`` only: ``"exclude"`` (the default) leaves the entropy
            out, ``"non_tensor"`` returns it as non-tensor data of the TensorDict.
        max_weight: the largest weight of an action in the policy's loss.
        check_finite: whether to check that every input is finite. Reads the batch on the host.

    Attributes:
        use_prioritized_weights: ``"auto"`` or True: importance weights are used if the batch has them; False: never.
        vmap_randomness: how dropout differs among critics, as in :func:`torch.vmap`.

    Raises:
        TypeError: for a network that is not a TensorDict module, or if ``gamma`` is given.
        RuntimeError: if ``priority_key`` is given.
        ValueError: for a hyper-parameter out of range.

    >>> import torch
    >>> from iql_plugins import IQLLoss, SoftUpdate
    >>> from iql_plugins.networks import critic, gaussian_actor, value_function
    >>> loss = IQLLoss(gaussian_actor(3, 1), critic(3, 1), value_function(3), expectile=0.7, temperature=3.0)
    >>> updater = SoftUpdate(loss, tau=0.005)
    >>> loss_actor, loss_qvalue, loss_value, entropy = loss(
    ...     observation=torch.randn(5, 3), action=torch.rand(5, 1), next_observation=torch.randn(5, 3),
    ...     next_reward=torch.randn(5, 1), next_done=torch.zeros(5, 1, dtype=torch.bool),
    ...     next_terminated=torch.zeros(5, 1, dtype=torch.bool),
    ... )
    >>> (loss_actor + loss_qvalue + loss_value).backward()
    >>> updater.step()
    """

    _AcceptedKeys = AcceptedKeys
    default_keys = AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS: ClassVar = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)
    use_prioritized_weights: bool | str = "auto"
    vmap_randomness: str = "different"

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: nn.Module | Sequence[nn.Module],
        value_network: nn.Module | None = None,
        *,
        num_qvalue_nets: int = 2,
        loss_function: LossFunction = "smooth_l1",
        temperature: float = 1.0,
        expectile: float = 0.5,
        gamma: float | None = None,
        priority_key: NestedKey | None = None,
        separate_losses: bool = False,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: ScalarOutputMode | None = None,
        max_weight: float = 100.0,
        check_finite: bool = False,
    ) -> None:
        reduction = "mean" if reduction is None else reduction
        if gamma is not None:
            raise TypeError(
                f"gamma is not an argument of the loss: call make_value_estimator(ValueEstimators.TD0, gamma={gamma})"
            )
        if priority_key is not None:
            raise RuntimeError(f"priority_key is deprecated: call set_keys(priority={priority_key!r})")
        functional.check_expectile(expectile)
        functional.check_temperature(temperature)
        functional.check_max_weight(max_weight)
        functional.check_choice("loss_function", loss_function, LossFunction)
        functional.check_choice("reduction", reduction, Reduction)
        if scalar_output_mode is not None:
            functional.check_choice("scalar_output_mode", scalar_output_mode, ScalarOutputMode)
        critics = _critics(qvalue_network, num_qvalue_nets)
        _check_network("actor_network", actor_network, "get_dist")
        for critic in critics:
            _check_network("qvalue_network", critic)
        if value_network is None:
            value_network = default_value_function(actor_network)
        _check_network("value_network", value_network)

        super().__init__()
        self.temperature = temperature
        self.expectile = expectile
        self.max_weight = max_weight
        self.loss_function = loss_function
        self.reduction = reduction
        self.deactivate_vmap = deactivate_vmap
        self.scalar_output_mode = scalar_output_mode
        self.separate_losses = separate_losses
        self.check_finite = check_finite
        self.num_qvalue_nets = num_qvalue_nets
        self._tensor_keys = AcceptedKeys()
        self._loss_mask_key: NestedKey | None = "auto"
        self._selected_out_keys: list[str] | None = None
        self._has_update_associated = dict.fromkeys(_NETWORKS, True) | {"qvalue_network": False}

        self._critic_count = None if num_qvalue_nets == 1 else num_qvalue_nets
        trunk = parameters.shared_names(critics[0], actor_network, value_network) if separate_losses else frozenset()
        if len(critics) == 1 and self._critic_count is not None:
            originals = parameters.leaves(critics[0])
            critics = parameters.duplicates(critics[0], num_qvalue_nets)
            for duplicate in critics:
                for name in trunk:
                    parameters._set_leaf(duplicate, name, originals[name])
        critic, tied = (critics[0], frozenset[str]()) if self._critic_count is None else parameters.stack(critics)
        self._tied = tied
        # Names of parameters that another network trains.
        self._untrained = dict.fromkeys(_NETWORKS, frozenset[str]())
        if separate_losses:
            self._untrained["value_network"] = parameters.shared_names(value_network, actor_network)
            self._untrained["qvalue_network"] = parameters.shared_names(critic, actor_network, value_network)
        # Registered under TorchRL's names, which are those of its state_dict; the properties of
        # these names show the same tensors as TensorDicts.
        self._modules["actor_network_params"] = actor_network
        self._modules["value_network_params"] = value_network
        self._modules["qvalue_network_params"] = critic
        self._modules["target_qvalue_network_params"] = parameters.frozen(critic, self._critic_count, tied)
        # TorchRL's state_dict has the estimator's entries once one was made, ours likewise.
        self._estimator_in_state = False
        self.value_type = self.default_value_estimator
        self._register_estimator(self._new_estimator(self.value_type))

    # Networks and parameters

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
        module = self._modules[f"{name}_params"]
        assert module is not None
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
        return self.actor_network_params.data  # type: ignore[no-any-return]

    @property
    def target_value_network_params(self) -> TensorDictBase:
        """V's parameters, detached: V has no target of its own."""
        return self.value_network_params.data  # type: ignore[no-any-return]

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
        known = (*_NETWORKS, "target_qvalue_network")
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

    def target_pairs(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Pairs of a target critic's tensor and its source: those of parameters, and those of buffers."""
        sources = parameters.leaves(self.qvalue_network)
        shown_sources = parameters.full_leaves(self.qvalue_network, self._critic_count, self._tied)
        pairs: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
        seen: set[int] = set()
        for name, target in parameters.leaves(self._network("target_qvalue_network")).items():
            if id(target) not in seen:
                seen.add(id(target))
                is_parameter = isinstance(sources[name], nn.Parameter)
                pairs[0 if is_parameter else 1].append((target, shown_sources[name].detach()))
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
        """As TorchRL's: stacked critics under one name each, with the estimator's entries once one was made or used."""
        prefix: str = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        for name in self._tied:
            key = f"{prefix}qvalue_network_params.{name}"
            if key in state:
                state[key] = state[key].expand(self._critic_count, *state[key].shape).contiguous()
        if not self._estimator_in_state:
            for name in self.value_estimator_state():
                state.pop(f"{prefix}{name}", None)
        return state

    def value_estimator_state(self) -> dict[str, Tensor]:
        """The value estimator's entries of ``state_dict``, whether or not it has them now."""
        return {f"{_ESTIMATOR}.{name}": buffer for name, buffer in self._estimator.named_buffers()}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        # Called before any child loads: all is checked here, so that a failed load changes nothing.
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        own = {key: value for key, value in super().state_dict(keep_vars=True).items()}
        estimator = self.value_estimator_state()
        estimator_given = [key for key in given if key.startswith(_ESTIMATOR)]
        if not estimator_given:
            given |= estimator
        hidden = {
            f"{name}.{key}" for name, module in self._modules.items() if module for key, _ in module.named_buffers()
        } - own.keys()
        given = {key: self._unstacked(key, value, own) for key, value in given.items() if key not in hidden}
        _raise_differences("the state dict does not fit this loss", own, given, strict)
        if estimator_given:
            self._estimator_in_state = True
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        state_dict.update({f"{prefix}{key}": value for key, value in given.items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

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

    # Keys

    @property
    def tensor_keys(self) -> AcceptedKeys:
        """The names in force; changed by :meth:`set_keys`."""
        return self._tensor_keys

    def set_keys(self, **kwargs: NestedKey | None) -> None:
        """Renames what the loss reads and writes; None restores a default.

        Args:
            **kwargs: by the names of :class:`~iql_plugins.keys.AcceptedKeys`.

        Raises:
            ValueError: for a name that is not accepted (lists the accepted ones), or a key that is not nested strings.
            KeyError: for a ``value`` or ``state_action_value`` that the network does not write.
        """
        keys = self._tensor_keys.replaced(**kwargs)
        for name, network in (("value", self.value_network), ("state_action_value", self.qvalue_network)):
            if name in kwargs:
                _check_written(name, getattr(keys, name), network)
        self._tensor_keys = keys
        self._estimator.tensor_keys = keys

    @property
    def loss_mask_key(self) -> NestedKey | None:
        """Which entry marks the valid positions: ``"auto"``, a key, or None for no masking.

        ``"auto"`` takes ``("collector", "mask")`` and ``"shifted_valid"`` together, those that are there.
        """
        return self._loss_mask_key

    @loss_mask_key.setter
    def loss_mask_key(self, key: NestedKey | None) -> None:
        if key is not None and not is_key(key):
            raise ValueError(f"loss_mask_key must be 'auto', None or a key, got {key!r}")
        self._loss_mask_key = key if key is None or key == "auto" else unravel_key(key)

    @property
    def _mask_keys(self) -> tuple[NestedKey, ...]:
        if self._loss_mask_key is None:
            return ()
        return AUTO_MASK_KEYS if self._loss_mask_key == "auto" else (self._loss_mask_key,)

    @property
    def _flag_keys(self) -> tuple[NestedKey, NestedKey]:
        return next_key(self._tensor_keys.done), next_key(self._tensor_keys.terminated)

    @property
    def _reward_key(self) -> NestedKey:
        return next_key(self._tensor_keys.reward)

    @property
    def _next_value_keys(self) -> list[NestedKey]:
        return [next_key(key) for key in _in_keys(self.value_network)]

    @property
    def in_keys(self) -> list[NestedKey]:
        """What every batch must have; as keyword tensors, with ``_`` between the parts of a key."""
        required = [
            *_in_keys(self.actor_network),
            *_in_keys(self.qvalue_network),
            *_in_keys(self.value_network),
            self._tensor_keys.action,
            self._reward_key,
            *self._flag_keys,
            *self._next_value_keys,
        ]
        return list(dict.fromkeys(required))

    @property
    def _optional_keys(self) -> list[NestedKey]:
        return [STEPS_TO_NEXT_OBS, DISCOUNT, self._tensor_keys.priority_weight, *self._mask_keys]

    @property
    def out_keys(self) -> list[str]:
        """What a call returns, in the order of the tuple; narrowed by :meth:`select_out_keys`."""
        return self.out_keys_source if self._selected_out_keys is None else list(self._selected_out_keys)

    @property
    def out_keys_source(self) -> list[str]:
        """What a call returns when nothing was selected."""
        losses = ["loss_actor", "loss_qvalue", "loss_value"]
        with_entropy = self.reduction != "none" or self.scalar_output_mode == "non_tensor"
        return [*losses, "entropy"] if with_entropy else losses

    def select_out_keys(self, *out_keys: str) -> "IQLLoss":  # type: ignore[override]
        """Narrows what a call returns, in the order given.

        Raises:
            ValueError: for a key that is not among :attr:`out_keys_source`.
        """
        unknown = [key for key in out_keys if key not in self.out_keys_source]
        if unknown or not out_keys:
            raise ValueError(f"out_keys must be some of {self.out_keys_source}, got {list(out_keys)}")
        self._selected_out_keys = list(out_keys)
        return self

    def reset_out_keys(self) -> "IQLLoss":
        """Undoes :meth:`select_out_keys`."""
        self._selected_out_keys = None
        return self

    # Value estimators

    @property
    def _estimator(self) -> ValueEstimator:
        estimator = self._modules[_ESTIMATOR]
        assert isinstance(estimator, ValueEstimator)
        return estimator

    @property
    def value_estimator(self) -> ValueEstimator:
        """What makes the target of Q; TD(0) with a discount of 0.99 unless :meth:`make_value_estimator` was called."""
        self._estimator_in_state = True
        return self._estimator

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "IQLLoss":
        """Chooses how the target of Q is made, and its discount.

        Args:
            value_type: ``ValueEstimators.TD0`` (the default), ``TD1`` or ``TDLambda``; TorchRL's members
                of these names, or the names, work as well.
            **hyperparams: ``gamma`` (0.99); for TDLambda ``lmbda`` (0.95); for TD1 and TDLambda
                ``time_dim``, which batch dimension is time.

        Returns:
            The loss.

        Raises:
            NotImplementedError: for an estimator that IQL does not take.
            TypeError: for a hyper-parameter that the estimator does not have.
            ValueError: for one out of range.
        """
        value_type = supported_value_type(self.default_value_estimator if value_type is None else value_type)
        self._register_estimator(self._new_estimator(value_type, **hyperparams))
        self.value_type = value_type
        self._estimator_in_state = True
        return self

    def _new_estimator(self, value_type: ValueEstimators, **hyperparams: Any) -> ValueEstimator:
        estimator = make_estimator(value_type, self._tensor_keys, **hyperparams)
        parameter = next(self.parameters(), None)
        return estimator if parameter is None else estimator.to(parameter.device)

    def _register_estimator(self, estimator: ValueEstimator) -> None:
        self._modules[_ESTIMATOR] = estimator

    # The losses

    @staticmethod
    def loss_value_diff(diff: Tensor, expectile: float = 0.8) -> Tensor:
        """The loss of V per sample: :func:`~iql_plugins.functional.expectile_loss` of Q - V."""
        return functional.expectile_loss(diff, expectile)

    def forward(self, tensordict: TensorDictBase | None = None, **tensors: Tensor) -> Any:
        """All losses of a batch.

        Args:
            tensordict: a batch by the key layout. The log-probability and the priority are written into it.
            **tensors: the batch as keyword tensors instead.

        Returns:
            A TensorDict with :attr:`out_keys`; for keyword tensors a tuple in their order (the tensor
            itself if there is one only). Losses have shape ``[]``, ``*B`` with ``reduction="none"``.

        Raises:
            KeyError: for a missing key.
            TypeError: for a keyword that is no key's name, or an entry that is no tensor or has the wrong dtype.
            ValueError: for a wrong shape, device or value, or an empty batch.
            RuntimeError: if a network fails on the batch, or the TensorDict is locked.
        """
        if not self._has_update_associated["qvalue_network"] and not torch.compiler.is_compiling():
            warnings.warn(_NO_UPDATER, UserWarning, stacklevel=3)
        source = self._source(tensordict, tensors)
        batch = self._read(source, self.in_keys)
        value = self._value(batch)
        log_prob = self._log_prob(batch, value.shape)
        target_q = self._target_q(batch, value.shape)
        q = self._q(batch, value.shape)
        losses = functional.losses_from_target(
            q,
            target_q,
            value,
            log_prob,
            self._target(batch, value.shape),
            expectile=self.expectile,
            temperature=self.temperature,
            max_weight=self.max_weight,
            loss_function=self.loss_function,
            reduction=self.reduction,
            weight=self._weight(batch, value.shape),
            mask=self._mask(batch, value.shape),
        )
        if not torch.compiler.is_compiling():
            self._estimator_in_state = True
        outputs = losses._asdict()
        if tensordict is None:
            selected = tuple(outputs[key] for key in self.out_keys)
            return selected[0] if len(selected) == 1 else selected
        tensordict.set(self._tensor_keys.log_prob, log_prob.detach())
        tensordict.set(self._tensor_keys.priority, losses.td_error)
        result = TensorDict(batch_size=value.shape if self.reduction == "none" else [])
        for key in self.out_keys:
            if key == "entropy" and self.reduction == "none":
                result.set_non_tensor(key, outputs[key])
            else:
                result.set(key, outputs[key])
        return result

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_actor`` alone, and no metadata. Writes the log-probability into the input."""
        keys = [*_in_keys(self.actor_network), *_in_keys(self.qvalue_network), *_in_keys(self.value_network)]
        batch = self._read(self._source(tensordict, {}), [*keys, self._tensor_keys.action])
        with torch.no_grad():
            value = self._value(batch)
        log_prob = self._log_prob(batch, value.shape)
        advantage = functional.advantage(self._target_q(batch, value.shape), value)
        weight = functional.advantage_weight(advantage, self.temperature, self.max_weight)
        tensordict.set(self._tensor_keys.log_prob, log_prob.detach())
        return self._reduced(functional.weighted_log_likelihood(log_prob, weight), batch), {}

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_value`` alone, and no metadata."""
        keys = [*_in_keys(self.qvalue_network), *_in_keys(self.value_network), self._tensor_keys.action]
        batch = self._read(self._source(tensordict, {}), keys)
        value = self._value(batch)
        advantage = functional.advantage(self._target_q(batch, value.shape), value)
        return self._reduced(functional.expectile_loss(advantage, self.expectile), batch), {}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_qvalue`` alone, with the squared errors of each critic as ``"td_error"``, ``[N, *B]``, in the metadata."""
        flags = [self._reward_key, *self._flag_keys]
        keys = [*_in_keys(self.qvalue_network), self._tensor_keys.action, *self._next_value_keys, *flags]
        batch = self._read(self._source(tensordict, {}), keys)
        target = self._target(batch, None)
        q = self._q(batch, target.shape)
        loss = functional.qvalue_loss(q, target, self.loss_function)
        errors = (q.detach() - target).square()
        mask = self._mask(batch, target.shape)
        return self._reduced(loss, batch), {"td_error": errors if mask is None else errors.masked_fill(~mask, 0.0)}

    def _reduced(self, loss: Tensor, batch: Batch) -> Tensor:
        weight, mask = self._weight(batch, loss.shape), self._mask(batch, loss.shape)
        return functional.reduce_loss(loss, self.reduction, weight=weight, mask=mask)

    # The quantities, each computed once a call

    def _log_prob(self, batch: Batch, shape: Size) -> Tensor:
        """``[*B]`` log-probability of the dataset's action."""
        inputs = batch.select(_in_keys(self.actor_network))
        with _explained("actor_network", self.actor_network, inputs):
            distribution = self.actor_network.get_dist(TensorDict(inputs, batch_size=batch.shape))  # type: ignore[operator]
        log_prob = distribution.log_prob(self._policy_action(batch, distribution, shape))
        if not isinstance(log_prob, Tensor) or log_prob.shape != shape:
            came = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else type(log_prob).__name__
            raise ValueError(
                f"the log-probability of actor_network's {type(distribution).__name__} must have the batch shape "
                f"{tuple(shape)}, got {came}; does the distribution sum over the action's dimensions "
                "(torch.distributions.Independent)?"
            )
        return at_least_float32(log_prob)

    def _value(self, batch: Batch) -> Tensor:
        """``[*B]`` V(s)."""
        return self._value_of(batch.select(_in_keys(self.value_network)), batch)

    @torch.no_grad()
    def _next_value(self, batch: Batch) -> Tensor:
        """``[*B]`` V(s'), without gradient."""
        return self._value_of(batch.select(_in_keys(self.value_network), next_key), batch)

    def _value_of(self, inputs: dict[NestedKey, Tensor], batch: Batch) -> Tensor:
        network, key = self.value_network, self._tensor_keys.value
        tensordict = TensorDict(inputs, batch_size=batch.shape)
        untrained = self._untrained["value_network"]
        with _explained("value_network", network, inputs):
            if untrained:
                tensors = parameters.leaves(network)
                detached = {name: tensors[name].detach() for name in untrained}
                output = functional_call(network, detached, (tensordict,), tie_weights=False)
            else:
                output = network(tensordict)
        value = _written("value", key, network, output)
        if value.shape[-1:] != (1,) or value.shape[: len(batch.shape)] != batch.shape:
            raise ValueError(
                f"value_network must write {shown(key)} of shape {(*batch.shape, 1)}, got {tuple(value.shape)}"
            )
        return at_least_float32(value.squeeze(-1))

    @torch.no_grad()
    def _target_q(self, batch: Batch, shape: Size) -> Tensor:
        """``[N, *B]`` Q(s, a) of the target critics, without gradient."""
        return self._critic_values(self._network("target_qvalue_network"), frozenset(), frozenset(), batch, shape)

    def _q(self, batch: Batch, shape: Size) -> Tensor:
        """``[N, *B]`` Q(s, a) of the critics."""
        untrained = self._untrained["qvalue_network"]
        return self._critic_values(self.qvalue_network, self._tied, untrained, batch, shape)

    def _critic_values(
        self, network: nn.Module, tied: frozenset[str], untrained: frozenset[str], batch: Batch, shape: Size
    ) -> Tensor:
        inputs = batch.select(_in_keys(network))
        key = self._tensor_keys.state_action_value

        def call(tensors: "parameters.Tensors | None") -> Tensor:
            tensordict = TensorDict(inputs, batch_size=batch.shape)
            if tensors is None:
                return _written("state_action_value", key, network, network(tensordict))
            output = functional_call(network, tensors, (tensordict,), tie_weights=False)
            return _written("state_action_value", key, network, output)

        with _explained("qvalue_network", network, inputs):
            if self._critic_count is None and not untrained:
                values = call(None).unsqueeze(0)
            else:
                tensors = parameters.leaves(network)
                tensors = {name: t.detach() if name in untrained else t for name, t in tensors.items()}
                # Measured on CPUs: separate products are faster than batched ones, compiled 1.8 times as fast.
                on_accelerator = any(tensor.device.type != "cpu" for tensor in tensors.values())
                if self._critic_count is None:
                    values = call(tensors).unsqueeze(0)
                else:
                    values = parameters.call_critics(
                        call,
                        tensors,
                        self._critic_count,
                        tied,
                        vmap=not self.deactivate_vmap and (on_accelerator or self.vmap_randomness != "different"),
                        randomness=self.vmap_randomness,
                    )
        return at_least_float32(self._chosen(values, batch, shape))

    def _target(self, batch: Batch, shape: Size | None) -> Tensor:
        """``[*B]`` target of Q, without gradient."""
        next_value = self._next_value(batch)
        shape = next_value.shape if shape is None else shape
        reward = at_least_float32(to_batch_shape(batch.tensors[self._reward_key], shape, self._reward_key))
        done, terminated = (to_batch_shape(batch.tensors[key], shape, key) for key in self._flag_keys)
        discount = self._discount(batch, shape, reward.dtype)
        time_dim = time_dimension(self._estimator, batch, shape) if self._estimator.needs_trajectories else -1
        mask = self._mask(batch, shape)
        target: Tensor = self._estimator(
            reward, next_value, done, terminated, discount=discount, mask=mask, time_dim=time_dim
        )
        return target

    def _discount(self, batch: Batch, shape: Size, dtype: torch.dtype) -> Tensor:
        if DISCOUNT in batch.tensors:
            return to_batch_shape(batch.tensors[DISCOUNT], shape, DISCOUNT).to(dtype)
        steps = batch.tensors.get(STEPS_TO_NEXT_OBS)
        return self._estimator.discount(
            None if steps is None else to_batch_shape(steps, shape, STEPS_TO_NEXT_OBS).to(dtype)
        )

    def _weight(self, batch: Batch, shape: Size) -> Tensor | None:
        key = self._tensor_keys.priority_weight
        return to_batch_shape(batch.tensors[key], shape, key) if key in batch.tensors else None

    def _mask(self, batch: Batch, shape: Size) -> Tensor | None:
        if batch.mask is None:
            return None
        return batch.mask.reshape(*batch.mask.shape, *[1] * (len(shape) - batch.mask.ndim)).expand(shape)

    def _policy_action(self, batch: Batch, distribution: Any, shape: Size) -> Tensor:
        """The dataset's action as the policy's distribution takes it."""
        key = self._tensor_keys.action
        action = batch.tensors[key]
        if isinstance(distribution, torch.distributions.Distribution):
            expected = (*distribution.batch_shape, *distribution.event_shape)
            if action.shape != expected:
                raise ValueError(
                    f"{shown(key)} must have shape {tuple(expected)}, that of actor_network's actions, "
                    f"got {tuple(action.shape)}"
                )
        return action

    def _chosen(self, values: Tensor, batch: Batch, shape: Size) -> Tensor:
        """``[N, *B]`` Q of the dataset's action from what the critics wrote."""
        if values.shape[1:] != (*shape, 1):
            raise ValueError(
                f"qvalue_network must write {shown(self._tensor_keys.state_action_value)} of shape {(*shape, 1)}, "
                f"got {tuple(values.shape[1:])}"
            )
        return values.squeeze(-1)

    # Reading a batch

    def _source(
        self, tensordict: TensorDictBase | None, tensors: dict[str, Tensor]
    ) -> TensorDictBase | dict[NestedKey, Tensor]:
        if tensordict is None:
            # A next key of any network may be given, as TorchRL asks for the actor's.
            also = [next_key(key) for network in _NETWORKS for key in _in_keys(self._network(network))]
            return keyword_tensors(tensors, [*self.in_keys, *self._optional_keys, *also])
        if not isinstance(tensordict, TensorDictBase):
            raise TypeError(
                f"the batch must be a TensorDict, or keyword tensors such as observation=..., got "
                f"{type(tensordict).__name__}"
            )
        if tensors:
            raise TypeError(f"give a TensorDict or keyword tensors, not both; got a TensorDict and {sorted(tensors)}")
        if tensordict.is_locked:
            raise RuntimeError(
                f"the loss writes {shown(self._tensor_keys.priority)} and {shown(self._tensor_keys.log_prob)} into its "
                "input, which is locked: unlock_() it, or pass a copy()"
            )
        return tensordict

    def _read(self, source: TensorDictBase | dict[NestedKey, Tensor], required: Iterable[NestedKey]) -> Batch:
        required = list(dict.fromkeys(required))
        tensors: dict[NestedKey, Tensor] = {}
        for key in (*required, *self._optional_keys):
            tensor = source.get(key, None)
            if tensor is not None:
                tensors[key] = tensor
        missing = [key for key in required if key not in tensors]
        if self._loss_mask_key not in (None, "auto", *tensors):
            missing.append(self._loss_mask_key)  # type: ignore[arg-type]
        if missing:
            raise KeyError(
                f"the batch has no {', '.join(map(shown, missing))}; it has {', '.join(map(shown, tensors)) or 'none'} "
                f"of the keys that the loss reads{self._hint(missing)}"
            )
        if self.use_prioritized_weights is False:
            tensors.pop(self._tensor_keys.priority_weight, None)
        is_tensordict = isinstance(source, TensorDictBase)
        shape = self._batch_shape(source.batch_size if is_tensordict else Size(), tensors)  # type: ignore[union-attr]
        self._check_tensors(tensors, shape)
        names = source.names if isinstance(source, TensorDictBase) and self._estimator.needs_trajectories else []
        batch = Batch(tensors, shape, time_dim=names.index("time") if "time" in names else None)
        masks = [_expand_mask(tensors[key], shape, key) for key in self._mask_keys if key in tensors]
        if masks:
            mask = masks[0]
            for other in masks[1:]:
                mask = mask & other
            batch.mask = mask
            batch.tensors = {
                key: tensor if key in self._mask_keys else mask_rows(tensor, mask) for key, tensor in tensors.items()
            }
        if self.check_finite:
            if torch.compiler.is_compiling():
                raise RuntimeError("check_finite=True reads the batch on the host and cannot be compiled: turn it off")
            for key, tensor in batch.tensors.items():
                check_finite(key, tensor)
        return batch

    def _hint(self, missing: Sequence[NestedKey]) -> str:
        if self._flag_keys[1] in missing:
            return (
                f". {shown(self._flag_keys[1])} must say where an episode ended in a terminal state: it is never taken "
                "from 'done', because a time limit would then stop the bootstrap"
            )
        return ". set_keys renames the loss's keys; a network's are its in_keys"

    def _batch_shape(self, given: Size, tensors: Mapping[NestedKey, Tensor]) -> Size:
        """``*B``, or a prefix of it where the reward's own shape leaves it open."""
        reward = tensors.get(self._reward_key)
        if reward is None or (len(given) and reward.shape == given):
            return given
        return reward.shape[:-1] if reward.shape[-1:] == (1,) else reward.shape

    def _check_tensors(self, tensors: Mapping[NestedKey, Tensor], shape: Size) -> None:
        dtypes: dict[NestedKey, str] = {
            self._reward_key: "floating",
            **dict.fromkeys(self._flag_keys, "bool"),
            STEPS_TO_NEXT_OBS: "integer",
            DISCOUNT: "floating",
            self._tensor_keys.priority_weight: "floating",
            **dict.fromkeys(self._mask_keys, "bool"),
        }
        parameter = next(self.parameters(), None)
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{shown(key)} must be a tensor, got {type(tensor).__name__}")
            if tensor.numel() == 0:
                raise ValueError(f"the batch is empty: {shown(key)} has shape {tuple(tensor.shape)}")
            if parameter is not None and tensor.device != parameter.device:
                raise ValueError(
                    f"{shown(key)} must be on {parameter.device}, where the loss's parameters are, got {tensor.device}"
                )
            expected = dtypes.get(key)
            if expected is not None and _kind(tensor) != expected:
                raise TypeError(f"{shown(key)} must have a {expected} dtype, got {tensor.dtype}")
            if key not in self._mask_keys and tensor.shape[: len(shape)] != shape:
                raise ValueError(
                    f"{shown(key)} must begin with the batch shape {tuple(shape)}, as {shown(self._reward_key)} does, "
                    f"got {tuple(tensor.shape)}"
                )


class DiscreteIQLLoss(IQLLoss):
    r"""The losses of IQL for discrete actions, with the contract of ``torchrl.objectives.DiscreteIQLLoss``.

    As :class:`IQLLoss`, but that the critics write Q(s, ·) of all n actions, ``[*B, n]``, of which the
    dataset's is taken.

    Args:
        actor_network: as in :class:`IQLLoss`, with a distribution over indices or over one-hot vectors.
        qvalue_network: Q(s, ·), writes ``[*B, n]``; otherwise as in :class:`IQLLoss`.
        value_network: as in :class:`IQLLoss`.
        action_space: how the dataset writes actions: ``"categorical"`` (integers, ``[*B]`` or ``[*B, 1]``) or
            ``"one-hot"`` (``[*B, n]``), or TorchRL's ``Categorical`` or ``OneHot`` spec. None warns and means one-hot.
        expectile: in (0, 1): 1 is refused, as in TorchRL.
        **kwargs: the other arguments of :class:`IQLLoss`.

    Raises:
        ValueError: for another action space, and as :class:`IQLLoss`.

    >>> import torch
    >>> from iql_plugins.networks import categorical_actor, discrete_critic
    >>> loss = DiscreteIQLLoss(categorical_actor(4, 2), discrete_critic(4, 2), action_space="categorical")
    >>> loss.target_updater_attached()
    >>> loss.select_out_keys("loss_value")(
    ...     observation=torch.randn(5, 4), action=torch.randint(2, (5,)), next_observation=torch.randn(5, 4),
    ...     next_reward=torch.randn(5, 1), next_done=torch.zeros(5, 1, dtype=torch.bool),
    ...     next_terminated=torch.zeros(5, 1, dtype=torch.bool),
    ... ).shape
    torch.Size([])
    """

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: nn.Module | Sequence[nn.Module],
        value_network: nn.Module | None = None,
        *,
        action_space: Any = None,
        expectile: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if expectile >= 1.0:
            raise ValueError(f"expectile must be in (0, 1) for discrete actions, got {expectile}")
        if action_space is None:
            warnings.warn(
                "action_space was not given: DiscreteIQLLoss takes actions as one-hot vectors. Pass "
                "action_space='one-hot' or 'categorical'.",
                UserWarning,
                stacklevel=2,
            )
            action_space = "one-hot"
        action_space = _action_space(action_space)
        super().__init__(actor_network, qvalue_network, value_network, expectile=expectile, **kwargs)
        self.action_space = action_space

    def _policy_action(self, batch: Batch, distribution: Any, shape: Size) -> Tensor:
        index = self._action_index(batch, shape)
        event_shape: Size = distribution.event_shape
        if not event_shape:
            return index
        choices = torch.arange(event_shape[-1], device=index.device)
        return (index.unsqueeze(-1) == choices).to(torch.get_default_dtype())

    def _chosen(self, values: Tensor, batch: Batch, shape: Size) -> Tensor:
        if values.shape[1:-1] != shape:
            raise ValueError(
                f"qvalue_network must write {shown(self._tensor_keys.state_action_value)} of shape "
                f"{(*shape, 'n')}, got {tuple(values.shape[1:])}"
            )
        index = self._action_index(batch, shape, values.shape[-1])
        return values.gather(-1, index.unsqueeze(-1).expand(values.shape[0], *shape, 1)).squeeze(-1)

    def _action_index(self, batch: Batch, shape: Size, count: int | None = None) -> Tensor:
        """``[*B]`` the dataset's actions as indices, checked against the number of actions where that is cheap."""
        key = self._tensor_keys.action
        action = batch.tensors[key]
        if self.action_space == "categorical":
            if _kind(action) != "integer":
                raise TypeError(f"{shown(key)} must have an integer dtype, got {action.dtype}")
            index = to_batch_shape(action, shape, key).long()
            valid = (index >= 0) & (index < count) if count is not None else None
            expected = f"must be from 0 to {(count or 0) - 1}"
        else:
            if action.shape[:-1] != shape or (count is not None and action.shape[-1] != count):
                raise ValueError(
                    f"{shown(key)} must be one-hot of shape {(*shape, 'n' if count is None else count)}, got "
                    f"{tuple(action.shape)}; for indices pass action_space='categorical'"
                )
            index = action.long().argmax(-1)
            valid = ((action == 0) | (action == 1)).all(-1) & (action.long().sum(-1) == 1) if count is not None else None
            expected = "must be one-hot"
        if valid is not None:
            _check_values(valid, action, key, expected)
        return index


def _check_values(valid: Tensor, action: Tensor, key: NestedKey, expected: str) -> None:
    """Raises ``ValueError`` for an invalid action; on an accelerator, or compiled, asserts without a host sync."""
    if valid.is_meta:
        return
    if torch.compiler.is_compiling() or valid.device.type != "cpu":
        torch._assert_async(valid.all(), f"{shown(key)} {expected}")
    elif not torch._C._functorch.peek_interpreter_stack() and not valid.all():
        row = tuple(int(i) for i in (~valid).nonzero()[0])
        raise ValueError(f"{shown(key)} {expected}, got {action[row].tolist()} in row {row[0] if row else 0}")


def _critics(qvalue_network: nn.Module | Sequence[nn.Module], count: int) -> list[nn.Module]:
    if count < 1:
        raise ValueError(f"num_qvalue_nets must be >= 1, got {count}")
    if isinstance(qvalue_network, nn.Module) and not isinstance(qvalue_network, nn.ModuleList):
        return [qvalue_network]
    critics = list(qvalue_network)
    if len(critics) != count:
        raise ValueError(
            f"qvalue_network has {len(critics)} critics and num_qvalue_nets is {count}: pass num_qvalue_nets={len(critics)}"
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


def _in_keys(network: nn.Module) -> list[NestedKey]:
    keys: list[NestedKey] = network.in_keys  # type: ignore[assignment]
    return keys


def _check_written(name: str, key: NestedKey, network: nn.Module) -> None:
    out_keys: Any = network.out_keys
    if key not in out_keys:
        raise KeyError(
            f"the {'value' if name == 'value' else 'qvalue'} network does not write {shown(key)}; it writes "
            f"{', '.join(map(shown, out_keys))}: set_keys({name}=...) tells the loss which to read"
        )


def _written(name: str, key: NestedKey, network: nn.Module, output: TensorDictBase) -> Tensor:
    tensor = output.get(key, None)
    if tensor is None:
        _check_written(name, key, network)
        raise KeyError(f"{type(network).__name__} has {shown(key)} among its out_keys, but did not write it")
    return tensor


class _explained:
    """Says which network failed on which tensors, when one fails. No part of a compiled graph."""

    def __init__(self, name: str, network: nn.Module, inputs: Mapping[NestedKey, Tensor]) -> None:
        self._name, self._network, self._inputs = name, network, inputs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and not torch.compiler.is_compiling():
            came = ", ".join(f"{shown(k)}: {tuple(t.shape)} {t.dtype}" for k, t in self._inputs.items())
            parameter = next(self._network.parameters(), None)
            dtype = "" if parameter is None else f"; its parameters are {parameter.dtype} on {parameter.device}"
            raise RuntimeError(f"{self._name} failed on {came}{dtype}: {error}") from error


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return "floating" if tensor.is_floating_point() else "integer"


def _expand_mask(mask: Tensor, shape: Size, key: NestedKey) -> Tensor:
    """A mask as ``[*shape]``: trailing singletons dropped, missing trailing dimensions expanded."""
    squeezed = mask
    while squeezed.ndim > len(shape) and squeezed.shape[-1] == 1:
        squeezed = squeezed.squeeze(-1)
    if squeezed.ndim > len(shape) or squeezed.shape != shape[: squeezed.ndim]:
        raise ValueError(f"{shown(key)} must have shape {(*shape, 1)} or {tuple(shape)}, got {tuple(mask.shape)}")
    return squeezed.reshape(*squeezed.shape, *[1] * (len(shape) - squeezed.ndim)).expand(shape)


def _raise_differences(
    what: str, own: Mapping[str, Any], given: Mapping[str, Any], strict: bool = True
) -> None:
    """Raises ``RuntimeError`` that lists missing and unexpected names (if ``strict``) and differing shapes."""
    problems = []
    if strict and (missing := own.keys() - given.keys()):
        problems.append(f"it has no {', '.join(sorted(missing))}")
    if strict and (unexpected := given.keys() - own.keys()):
        hint = ""
        if any(key.startswith(_ESTIMATOR) for key in unexpected):
            hint = " (saved with another value estimator: call make_value_estimator first)"
        problems.append(f"it has unexpected {', '.join(sorted(unexpected))}{hint}")
    for key in own.keys() & given.keys():
        if isinstance(own[key], Tensor):
            came = tuple(given[key].shape) if isinstance(given[key], Tensor) else type(given[key]).__name__
            if came != tuple(own[key].shape):
                problems.append(f"{key} must have shape {tuple(own[key].shape)}, got {came}")
    if problems:
        raise RuntimeError(f"{what}: {'; '.join(problems)}")


def _action_space(action_space: Any) -> str:
    """``"categorical"`` or ``"one_hot"``, also from TorchRL's specs, recognised by name: nothing is imported."""
    names = {"categorical": "categorical", "one-hot": "one_hot", "one_hot": "one_hot"}
    if isinstance(action_space, str) and action_space in names:
        return names[action_space]
    for base in type(action_space).__mro__:
        if base.__module__.split(".")[0] == "torchrl" and base.__name__ in ("Categorical", "OneHot"):
            return "categorical" if base.__name__ == "Categorical" else "one_hot"
    raise ValueError(
        f"action_space must be 'categorical', 'one-hot', or TorchRL's Categorical or OneHot spec, got {action_space!r}"
    )
