r"""The losses of Implicit Q-Learning over networks, for continuous and for discrete actions."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torch import Size, Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from iql_plugins import _compat, distributed, evaluation, functional, objectives, parameters
from iql_plugins.batch import Batch, BatchReader, dtype_kind, keyword_tensors, to_batch_shape
from iql_plugins.config import check
from iql_plugins.distributions import at_least_float32
from iql_plugins.functional import LossFunction, Reduction
from iql_plugins.keys import DISCOUNT, STEPS_TO_NEXT_OBS, AcceptedKeys, is_key, next_key, shown
from iql_plugins.ownership import NETWORKS, NetworkOwner
from iql_plugins.ranges import choice
from iql_plugins.stacking import Perceptron
from iql_plugins.value_estimators import (
    ValueEstimator,
    ValueEstimators,
    make_estimator,
    supported_value_type,
    time_dimension,
)

__all__ = ["DiscreteIQLLoss", "IQLLoss"]

ScalarOutputMode = Literal["exclude", "non_tensor"]
_ESTIMATOR = "_value_estimator"
_NO_UPDATER = (
    "The loss has target critics, but no SoftUpdate or HardUpdate was made for it: unless you update "
    "target_qvalue_network_params yourself, the critics learn from targets that never move."
)


class IQLLoss(NetworkOwner):
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
    loss's own. In the place of a ``TensorDictParams`` inside a network (TorchRL's ``MultiAgentMLP`` has one) the loss
    puts one that keeps the same tensors in modules. ``actor_network_params``, ``value_network_params``,
    ``qvalue_network_params`` and ``target_qvalue_network_params`` show the networks' parameters as nested
    TensorDicts, under the names of ``state_dict()``.

    **Input** by the layout of :mod:`iql_plugins.keys`: a TensorDict, into which the log-probability and the
    priority are written and nothing else; or keyword tensors, with a tuple in the order of
    :attr:`out_keys` in return. Losses are computed in float32 at least, whatever the networks' dtype.

    **Several processes.** ``DistributedDataParallel(loss)`` trains all replicas alike: the first call that trains
    gives the target critics of rank 0 to all, whether or not DDP synchronises buffers. ``fully_shard(loss)``, over
    ranks with equal weights as FSDP asks for, and DDP with ``find_unused_parameters=True`` look for the losses in what
    a call returns, and see none in a TensorDict: they are given keyword tensors, a TensorDict is refused. Updaters are
    stepped by every rank. Call the wrapper, not the loss inside it.

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
        value_objective: how V is learned, by its name in :mod:`iql_plugins.objectives`.
        policy_extraction: how the policy is learned from Q and V, likewise.
        objective_options: hyper-parameters that these two alone have, by name.
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
    temperature: float
    expectile: float
    max_weight: float
    loss_function: LossFunction
    value_objective: str
    policy_extraction: str
    objective_options: dict[str, float]
    _targets_replicated = False

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
        value_objective: str = "expectile",
        policy_extraction: str = "awr",
        objective_options: Mapping[str, float] | None = None,
        check_finite: bool = False,
    ) -> None:
        reduction = "mean" if reduction is None else reduction
        if gamma is not None:
            raise TypeError(
                f"gamma is not an argument of the loss: call make_value_estimator(ValueEstimators.TD0, gamma={gamma})"
            )
        if priority_key is not None:
            raise RuntimeError(f"priority_key is deprecated: call set_keys(priority={priority_key!r})")
        settings = {
            "temperature": temperature,
            "expectile": expectile,
            "max_weight": max_weight,
            "loss_function": loss_function,
            "value_objective": value_objective,
            "policy_extraction": policy_extraction,
            "objective_options": dict(objective_options or {}),
        }
        check(**settings)
        objectives.check_options(value_objective, policy_extraction, objective_options or {})
        choice(Reduction).check("reduction", reduction)
        if scalar_output_mode is not None:
            choice(ScalarOutputMode).check("scalar_output_mode", scalar_output_mode)
        super().__init__(actor_network, qvalue_network, value_network, num_qvalue_nets, separate_losses)
        for name, value in settings.items():
            setattr(self, name, value)
        self.reduction = reduction
        self.deactivate_vmap = deactivate_vmap
        self.scalar_output_mode = scalar_output_mode
        self.check_finite = check_finite
        # Critics that share everything run once, one critic runs as it is: neither needs stacking.
        together = num_qvalue_nets == 1 or self._tied >= parameters.leaves(self.qvalue_network).keys()
        self._perceptron = None if together else Perceptron.read(self.qvalue_network)
        self._tensor_keys = AcceptedKeys()
        self._loss_mask_key: NestedKey | None = "auto"
        self._selected_out_keys: list[str] | None = None
        self._register_estimator(self._new_estimator(supported_value_type(self.default_value_estimator)))

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
        self._check_keys(keys, kwargs.keys())
        self._tensor_keys = keys
        self._follow_keys()

    def _check_keys(self, keys: AcceptedKeys, changed: Collection[str]) -> None:
        for name, network in (("value", self.value_network), ("state_action_value", self.qvalue_network)):
            if name in changed:
                _check_written(name, getattr(keys, name), network)

    def _follow_keys(self) -> None:
        self._estimator.tensor_keys = self._tensor_keys

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
    def _reader(self) -> BatchReader:
        parameter = next(self.parameters(), None)
        return BatchReader(
            self._tensor_keys,
            self._loss_mask_key,
            weighted=self.use_prioritized_weights is not False,
            device=None if parameter is None else parameter.device,
            finite=self.check_finite,
        )

    @property
    def _outcome_keys(self) -> list[NestedKey]:
        keys = self._tensor_keys
        return [next_key(keys.reward), next_key(keys.done), next_key(keys.terminated)]

    @property
    def _next_value_keys(self) -> list[NestedKey]:
        return [next_key(key) for key in _in_keys(self.value_network)]

    @property
    def _target_keys(self) -> list[NestedKey]:
        """What the target of Q is made from."""
        return [*self._outcome_keys, *self._next_value_keys]

    @property
    def in_keys(self) -> list[NestedKey]:
        """What every batch must have; as keyword tensors, with ``_`` between the parts of a key."""
        required = [
            *_in_keys(self.actor_network),
            *_in_keys(self.qvalue_network),
            *_in_keys(self.value_network),
            self._tensor_keys.action,
            *self._target_keys,
        ]
        return list(dict.fromkeys(required))

    @property
    def accepted_keys(self) -> list[NestedKey]:
        """What a batch may have: :attr:`in_keys`, and the optional ones."""
        return [*self.in_keys, *self._reader.optional]

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

    def select_out_keys(self, *out_keys: str) -> "IQLLoss":
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

    def set_vmap_randomness(self, randomness: str) -> None:
        """Sets how dropout differs among critics.

        Raises:
            ValueError: for anything but ``"error"``, ``"same"`` or ``"different"``.
        """
        choice(Literal["error", "same", "different"]).check("randomness", randomness)
        self.vmap_randomness = randomness

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

    @value_estimator.setter
    def value_estimator(self, estimator: ValueEstimator) -> None:
        if not isinstance(estimator, ValueEstimator):
            raise TypeError(f"value_estimator must be a ValueEstimator, got {type(estimator).__name__}")
        self._register_estimator(estimator)
        self._estimator_in_state = True

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "IQLLoss":
        """Chooses how the target of Q is made, and its discount.

        Args:
            value_type: ``ValueEstimators.TD0`` (the default), ``TD1`` or ``TDLambda``; TorchRL's members
                of these names, or the names, work as well.
            **hyperparams: ``gamma`` (0.99); for TDLambda ``lmbda`` (0.95); for TD1 and TDLambda
                ``time_dim``, which dimension is time: the last of a TensorDict's batch size (or the one named
                ``"time"``) when None. Keyword tensors need it: their last dimension may be that of agents.

        Returns:
            The loss.

        Raises:
            NotImplementedError: for an estimator that IQL does not take.
            TypeError: for a hyper-parameter that the estimator does not have, or of the wrong type.
            ValueError: for one out of range.
        """
        value_type = supported_value_type(self.default_value_estimator if value_type is None else value_type)
        self.value_estimator = self._new_estimator(value_type, **hyperparams)
        return self

    def _new_estimator(self, value_type: ValueEstimators, **hyperparams: Any) -> ValueEstimator:
        estimator = make_estimator(value_type, **hyperparams)
        parameter = next(self.parameters(), None)
        return estimator if parameter is None else estimator.to(parameter.device)

    def _register_estimator(self, estimator: ValueEstimator) -> None:
        estimator.tensor_keys = self._tensor_keys
        self._modules[_ESTIMATOR] = estimator
        self.value_type = estimator.value_type

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
            RuntimeError: if a network fails on the batch, the TensorDict is locked, or a wrapper for several
                processes cannot take a TensorDict.
        """
        self._check_updater()
        if torch.is_grad_enabled():
            self._check_wrapper(tensordict)
        of = self._quantities(tensordict, tensors, self.in_keys)
        value, actor, qvalue = of.value_loss, of.actor_loss, of.qvalue_loss
        outputs = {
            "loss_actor": of.reduced(actor),
            "loss_qvalue": of.reduced(qvalue),
            "loss_value": of.reduced(value),
            "entropy": functional.entropy(of.log_prob, of.mask),
        }
        if not torch.compiler.is_compiling():
            self._estimator_in_state = True
        if tensordict is None:
            selected = tuple(outputs[key] for key in self.out_keys)
            return selected[0] if len(selected) == 1 else selected
        tensordict.set(self._tensor_keys.log_prob, of.log_prob.detach())
        tensordict.set(self._tensor_keys.priority, of.unmasked(functional.td_error(of.q, of.target)))
        result = TensorDict(batch_size=value.shape if self.reduction == "none" else [])
        for key in self.out_keys:
            if key == "entropy" and self.reduction == "none":
                result.set_non_tensor(key, outputs[key])
            else:
                result.set(key, outputs[key])
        return result

    def _check_updater(self) -> None:
        if not self._has_update_associated["qvalue_network"] and not torch.compiler.is_compiling():
            # Past this method, forward, and the two frames of torch.nn.Module's call.
            warnings.warn(_NO_UPDATER, UserWarning, stacklevel=5)

    def _check_wrapper(self, tensordict: TensorDictBase | None) -> None:
        if tensordict is not None:
            distributed.check_output(self)
        # DDP may leave buffers, which the targets are, as each process drew them.
        if not self._targets_replicated and (ddp := distributed.active_ddp()) is not None:
            distributed.replicate(parameters.leaves(self._network("target_qvalue_network")).values(), ddp)
            self._targets_replicated = True

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_actor`` alone, and no metadata. Writes the log-probability into the input."""
        keys = [*_in_keys(self.actor_network), *_in_keys(self.qvalue_network), *_in_keys(self.value_network)]
        of = self._quantities(tensordict, {}, [*keys, self._tensor_keys.action])
        with torch.no_grad():
            of.advantage  # noqa: B018 - no other loss will ask for V's gradient
        loss = of.reduced(of.actor_loss)
        tensordict.set(self._tensor_keys.log_prob, of.log_prob.detach())
        return loss, {}

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_value`` alone, and no metadata."""
        keys = [*_in_keys(self.qvalue_network), *_in_keys(self.value_network), self._tensor_keys.action]
        of = self._quantities(tensordict, {}, keys)
        return of.reduced(of.value_loss), {}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_qvalue`` alone, and as metadata ``"td_error"``: each critic's squared errors, ``[N, *B]``."""
        keys = [*_in_keys(self.qvalue_network), self._tensor_keys.action, *self._target_keys]
        of = self._quantities(tensordict, {}, keys)
        target = of.target
        return of.reduced(of.qvalue_loss), {"td_error": of.unmasked((of.q.detach() - target).square())}

    @torch.no_grad()
    def qvalues(self, tensordict: TensorDictBase) -> Tensor:
        """``[N, *B]`` Q(s, a) of each critic, in eval or training mode as the loss is, without gradient.

        Args:
            tensordict: observations and actions by the key layout; nothing is written into it.
        """
        keys = [*_in_keys(self.qvalue_network), self._tensor_keys.action]
        batch = self._reader.read(self._source(tensordict, {}), keys)
        return self._q(batch, batch.shape)

    @torch.no_grad()
    def health(self, tensordict: TensorDictBase | None = None, **tensors: Tensor) -> functional.Health:
        """What tells whether the training is well on a batch, at the current parameters; see :func:`functional.health`.

        Args:
            tensordict: a batch by the key layout; nothing is written into it.
            **tensors: the batch as keyword tensors instead.
        """
        keys = [*_in_keys(self.qvalue_network), *_in_keys(self.value_network), self._tensor_keys.action]
        of = self._quantities(tensordict, tensors, keys)
        value, target_q = of.value, of.target_q
        weight = None if self.value_objective == "expectile" else of.weight
        return functional.health(
            target_q,
            value,
            temperature=self.temperature,
            max_weight=self.max_weight,
            weight=weight,
            mask=of.mask,
        )

    def _quantities(
        self, tensordict: TensorDictBase | None, tensors: dict[str, Tensor], keys: Sequence[NestedKey]
    ) -> "_Quantities":
        return _Quantities(self, self._reader.read(self._source(tensordict, tensors), keys))

    # How each quantity is computed; nobody but _Quantities asks

    def _log_prob(self, batch: Batch, shape: Size) -> Tensor:
        """``[*B]`` log-probability of the dataset's action."""
        inputs = batch.select(_in_keys(self.actor_network))
        with _Explained("actor_network", self.actor_network, inputs):
            distribution = evaluation.distribution(self.actor_network, inputs, batch.shape)
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
        return self._value_of(_in_keys(self.value_network), batch)

    @torch.no_grad()
    def _next_value(self, batch: Batch) -> Tensor:
        """``[*B]`` V(s'), without gradient."""
        return self._value_of(self._next_value_keys, batch)

    def _value_of(self, keys: Sequence[NestedKey], batch: Batch) -> Tensor:
        """``[*B]`` V of the observations under ``keys``, given in the order of the network's own."""
        network, key = self.value_network, self._tensor_keys.value
        inputs = batch.select(keys)
        named = dict(zip(_in_keys(network), inputs.values(), strict=True))
        untrained = self._untrained["value_network"]
        with _Explained("value_network", network, inputs):
            if untrained:
                tensors = parameters.leaves(network)
                detached = {name: tensors[name].detach() for name in untrained}
                tensordict = TensorDict(named, batch_size=batch.shape)
                output = functional_call(network, detached, (tensordict,), tie_weights=False)
            else:
                output = evaluation.outputs(network, named, batch.shape)
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
            if tensors is None:
                return _written("state_action_value", key, network, evaluation.outputs(network, inputs, batch.shape))
            tensordict = TensorDict(inputs, batch_size=batch.shape)
            output = functional_call(network, tensors, (tensordict,), tie_weights=False)
            return _written("state_action_value", key, network, output)

        with _Explained("qvalue_network", network, inputs):
            if self._critic_count is None and not untrained:
                values = call(None).unsqueeze(0)
            else:
                tensors = parameters.leaves(network)
                tensors = {name: t.detach() if name in untrained else t for name, t in tensors.items()}
                if self._critic_count is None:
                    values = call(tensors).unsqueeze(0)
                elif (perceptron := self._usable_perceptron(network, inputs)) is not None:
                    values = perceptron(network, tensors, list(inputs.values()), self._critic_count)
                else:
                    # Measured on CPUs: separate products are faster than batched ones, compiled 1.8 times as fast.
                    on_accelerator = any(tensor.device.type != "cpu" for tensor in tensors.values())
                    values = parameters.call_critics(
                        call,
                        tensors,
                        self._critic_count,
                        tied,
                        vmap=not self.deactivate_vmap and (on_accelerator or self.vmap_randomness != "different"),
                        randomness=self.vmap_randomness,
                    )
        return at_least_float32(self._chosen(values, batch, shape))

    def _usable_perceptron(self, network: nn.Module, inputs: Mapping[NestedKey, Tensor]) -> Perceptron | None:
        """The critics' steps, if nothing was asked for that they leave out."""
        out_keys: Any = network.out_keys
        first, *others = [tensor.shape[:-1] for tensor in inputs.values()]
        usable = (
            not self.deactivate_vmap
            and self.vmap_randomness == "different"
            and self._tensor_keys.state_action_value in out_keys
            and all(shape == first for shape in others)
            and not evaluation.has_hooks(network)
        )
        return self._perceptron if usable else None

    def _target(self, batch: Batch, shape: Size | None) -> Tensor:
        """``[*B]`` target of Q, without gradient."""
        next_value = self._next_value(batch)
        shape = next_value.shape if shape is None else shape
        reward, done, terminated = (to_batch_shape(batch.tensors[key], shape, key) for key in self._outcome_keys)
        reward = at_least_float32(reward)
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
        """The dataset's action as the policy's distribution takes it; called after the critics."""
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

    def _source(
        self, tensordict: TensorDictBase | None, tensors: dict[str, Tensor]
    ) -> TensorDictBase | dict[NestedKey, Tensor]:
        if tensordict is None:
            # A next key of any network may be given, as TorchRL asks for the actor's.
            also = [next_key(key) for network in NETWORKS for key in _in_keys(self._network(network))]
            return keyword_tensors(tensors, [*self.in_keys, *self._reader.optional, *also])
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


def _once(compute: Callable[["_Quantities"], Tensor]) -> Any:
    """A property that is computed once; ``functools.cached_property`` breaks a compiled graph."""
    name = compute.__name__

    def quantity(self: "_Quantities") -> Tensor:
        if name not in self.computed:
            self.computed[name] = compute(self)
        return self.computed[name]

    return property(quantity, doc=compute.__doc__)


class _Quantities:
    """What the losses of a batch are made of, each computed when it is first asked for, and once.

    Attributes:
        batch: what was read.
        computed: quantities by name.
        shape: ``*B``, which V(s) or, if it is not asked for, the target of Q tells.
    """

    def __init__(self, loss: IQLLoss, batch: Batch) -> None:
        self._loss, self.batch = loss, batch
        self.shape: Size | None = None
        self.computed: dict[str, Tensor] = {}

    @_once
    def value(self) -> Tensor:
        """``[*B]`` V(s)."""
        value = self._loss._value(self.batch)
        self.shape = value.shape
        return value

    @_once
    def target_q(self) -> Tensor:
        """``[N, *B]`` Q(s, a) of the target critics."""
        return self._loss._target_q(self.batch, self._known_shape)

    @_once
    def advantage(self) -> Tensor:
        """``[*B]`` min Q(s, a) of the target critics - V(s); gradients flow through V."""
        value = self.value
        return functional.advantage(self.target_q, value)

    @_once
    def q(self) -> Tensor:
        """``[N, *B]`` Q(s, a) of the critics."""
        return self._loss._q(self.batch, self._known_shape)

    @_once
    def log_prob(self) -> Tensor:
        """``[*B]`` log-probability of the dataset's action."""
        return self._loss._log_prob(self.batch, self._known_shape)

    @_once
    def target(self) -> Tensor:
        """``[*B]`` target of Q."""
        target = self._loss._target(self.batch, self.shape)
        self.shape = target.shape
        return target

    @property
    def value_loss(self) -> Tensor:
        """``[*B]`` of V."""
        return objectives.value_objective(self._loss.value_objective).loss(self)

    @_once
    def weight(self) -> Tensor:
        """``[*B]`` of the action, without gradient."""
        return objectives.value_objective(self._loss.value_objective).weight(self)

    @property
    def actor_loss(self) -> Tensor:
        """``[*B]`` of the policy."""
        return objectives.policy_extraction(self._loss.policy_extraction).loss(self)

    @property
    def qvalue_loss(self) -> Tensor:
        """``[*B]`` of the critics, summed over them."""
        return functional.qvalue_loss(self.q, self.target, self._loss.loss_function)

    def setting(self, name: str) -> Any:
        """A hyper-parameter of the loss, or an option of its objectives."""
        loss = self._loss
        if name in loss.objective_options:
            return loss.objective_options[name]
        own = objectives.options(loss.value_objective, loss.policy_extraction)
        return own[name].default if name in own else getattr(loss, name)

    @property
    def mask(self) -> Tensor | None:
        """``[*B]`` True where an entry counts; None where all do."""
        return self._loss._mask(self.batch, self._known_shape)

    def reduced(self, loss: Tensor) -> Tensor:
        """A loss per sample as the loss's reduction has it, weighted by importance."""
        weight = self._loss._weight(self.batch, loss.shape)
        return functional.reduce_loss(loss, self._loss.reduction, weight=weight, mask=self.mask)

    def unmasked(self, errors: Tensor) -> Tensor:
        """``[..., *B]`` zero where an entry does not count."""
        mask = self.mask
        return errors if mask is None else errors.masked_fill(~mask, 0.0)

    @property
    def _known_shape(self) -> Size:
        assert self.shape is not None
        return self.shape


class DiscreteIQLLoss(IQLLoss):
    r"""The losses of IQL for discrete actions, with the contract of ``torchrl.objectives.DiscreteIQLLoss``.

    As :class:`IQLLoss`, but that the critics write Q(s, ·) of all n actions, ``[*B, n]``, of which the
    dataset's is taken.

    Args:
        actor_network: as in :class:`IQLLoss`, with a distribution over indices or over one-hot vectors.
        qvalue_network: Q(s, ·), writes ``[*B, n]``; otherwise as in :class:`IQLLoss`.
        value_network: as in :class:`IQLLoss`.
        action_space: how the dataset writes actions: ``"categorical"`` (integers, ``[*B]`` or ``[*B, 1]``) or
            ``"one-hot"`` (``[*B, n]``), or TorchRL's ``Categorical`` or ``OneHot`` spec, also as the ``"action"``
            of a ``Composite``. None warns and means one-hot.
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
        index = batch.action_index
        assert index is not None
        # TorchRL's OneHotCategorical has an empty event shape: its mode tells.
        event_shape: Size = distribution.event_shape or distribution.mode.shape[len(shape) :]
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
        if batch.action_index is None:
            batch.action_index = self._action_index(batch, shape, values.shape[-1])
        return values.gather(-1, batch.action_index.unsqueeze(-1).expand(values.shape[0], *shape, 1)).squeeze(-1)

    def _action_index(self, batch: Batch, shape: Size, count: int) -> Tensor:
        """``[*B]`` the dataset's actions as indices below ``count``."""
        key = self._tensor_keys.action
        action = batch.tensors[key]
        if self.action_space == "categorical":
            if dtype_kind(action) != "integer":
                raise TypeError(f"{shown(key)} must have an integer dtype, got {action.dtype}")
            index = to_batch_shape(action, shape, key).long()
            _check_values((index >= 0) & (index < count), action, f"{shown(key)} must be from 0 to {count - 1}")
        else:
            if action.shape != (*shape, count):
                raise ValueError(
                    f"{shown(key)} must be one-hot of shape {(*shape, count)}, got {tuple(action.shape)}; "
                    "for indices pass action_space='categorical'"
                )
            index = action.long().argmax(-1)
            binary = ((action == 0) | (action == 1)).all(-1)
            _check_values(binary & (action.long().sum(-1) == 1), action, f"{shown(key)} must be one-hot")
        return index


def _check_values(valid: Tensor, action: Tensor, expected: str) -> None:
    """Raises ``ValueError`` for an invalid action; on an accelerator, or compiled, asserts without a host sync."""
    if valid.is_meta:
        return
    # A graph that is traced or captured cannot read a value on the host.
    if torch.compiler.is_compiling() or get_proxy_mode() is not None or valid.device.type != "cpu":
        _compat.assert_on_device(valid, expected)
    elif not _compat.in_transform() and not valid.all():
        row = tuple(int(i) for i in (~valid).nonzero()[0])
        raise ValueError(f"{expected}, got {action[row].tolist()} in row {row[0] if row else 0}")


def _in_keys(network: nn.Module) -> list[NestedKey]:
    keys: list[NestedKey] = network.in_keys  # type: ignore[assignment]
    if not isinstance(network, TensorDictSequential):
        return keys
    # What one module writes as ("params", "loc"), and another takes as "params", is no input.
    out_keys: Any = network.out_keys
    written = {key[:length] for key in out_keys if isinstance(key, tuple) for length in range(1, len(key))}
    return [key for key in keys if (key if isinstance(key, tuple) else (key,)) not in written]


def _check_written(name: str, key: NestedKey, network: nn.Module) -> None:
    out_keys: Any = network.out_keys
    if key not in out_keys:
        raise KeyError(
            f"the {'value' if name == 'value' else 'qvalue'} network does not write {shown(key)}; it writes "
            f"{', '.join(map(shown, out_keys))}: set_keys({name}=...) tells the loss which to read"
        )


def _written(name: str, key: NestedKey, network: nn.Module, output: evaluation.Tensors) -> Tensor:
    tensor: Tensor | None = output.get(key, None)
    if tensor is None:
        _check_written(name, key, network)
        raise KeyError(f"{type(network).__name__} has {shown(key)} among its out_keys, but did not write it")
    return tensor


class _Explained:
    """Says which network failed on which tensors, when one fails. No part of a compiled graph."""

    def __init__(self, name: str, network: nn.Module, inputs: Mapping[NestedKey, Tensor]) -> None:
        self._name, self._network, self._inputs = name, network, inputs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        # Subclasses (out of memory, say) keep their type for those who handle them.
        if type(error) is RuntimeError and not torch.compiler.is_compiling():
            came = ", ".join(f"{shown(k)}: {tuple(t.shape)} {t.dtype}" for k, t in self._inputs.items())
            parameter = next(self._network.parameters(), None)
            dtype = "" if parameter is None else f"; its parameters are {parameter.dtype} on {parameter.device}"
            raise RuntimeError(f"{self._name} failed on {came}{dtype}: {error}") from error


def _action_space(action_space: Any) -> str:
    """``"categorical"`` or ``"one_hot"``, also from TorchRL's specs, recognised by name: nothing is imported."""
    names = {"categorical": "categorical", "one-hot": "one_hot", "one_hot": "one_hot"}
    if isinstance(action_space, str) and action_space in names:
        return names[action_space]
    for base in type(action_space).__mro__:
        name = base.__name__ if base.__module__.split(".")[0] == "torchrl" else ""
        if name == "Composite":
            return _action_space(action_space["action"])
        if name in ("Categorical", "OneHot"):
            return "categorical" if name == "Categorical" else "one_hot"
    raise ValueError(
        f"action_space must be 'categorical', 'one-hot', or TorchRL's Categorical or OneHot spec, got {action_space!r}"
    )
