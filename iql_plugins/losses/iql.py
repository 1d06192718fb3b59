r"""The losses of Implicit Q-Learning over networks, for continuous and for discrete actions."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Size, Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from iql_plugins import _compat
from iql_plugins.config import check
from iql_plugins.keys import shown
from iql_plugins.losses import functional, replicas
from iql_plugins.losses.batch import Batch, dtype_kind, to_batch_shape
from iql_plugins.losses.functional import LossFunction, Reduction
from iql_plugins.losses.objectives import check_options, policy_extraction, reads_temperature
from iql_plugins.losses.quantities import BatchQuantities, NetworkQuantities
from iql_plugins.losses.torchrl_contract import ScalarOutputMode, in_keys_of
from iql_plugins.networks.distributions import at_least_float32
from iql_plugins.ranges import target_share

__all__ = ["DiscreteIQLLoss", "IQLLoss", "Labels"]


class Labels(NamedTuple):
    """What a transition is worth to the policy's loss.

    Attributes:
        value: ``[*B]`` V(s), in the units of the rewards that the critics learn.
        qvalue: ``[*B]`` min Q(s, a) of the target critics.
        advantage: ``[*B]`` their difference.
        weight: ``[*B]`` of the action's log-likelihood; 1 for an extraction that weighs none.
    """

    value: Tensor
    qvalue: Tensor
    advantage: Tensor
    weight: Tensor


class IQLLoss(NetworkQuantities):
    r"""The losses of IQL for continuous actions, with the contract of ``torchrl.objectives.IQLLoss``.

    .. math::
        L_V = \mathbb{E}\, L_2^\tau\big(\min_i \hat Q_i(s, a) - V(s)\big), \quad
        L_Q = \mathbb{E} \sum_i d\big(Q_i(s, a),\, r + \gamma (1 - \text{terminated}) V(s')\big), \quad
        L_\pi = -\mathbb{E}\, \min\big(e^{\beta A}, w_{\max}\big) \log \pi(a \mid s)

    Kostrikov et al. 2021 (arXiv:2110.06169), equations 5 to 7; :mod:`iql_plugins.losses.functional` has each
    of them. Two choices differ among implementations: the critics' losses are *summed* over critics, and
    all three losses are taken at the *same* parameters, so that one backward pass of their sum trains
    everything (the authors' code updates V first and uses the new one in the two others).

    **What trains what.** ``loss_value`` reaches V alone, ``loss_qvalue`` the critics, ``loss_actor`` the
    policy; gradients stop at the target critics, at V(s') and at the advantage. Networks that share
    modules: a parameter of actor and V is trained by both losses, by ``loss_actor`` alone with
    ``separate_losses=True``; one of V or the actor in the critics likewise by both, with
    ``separate_losses=True`` by the actor's (or else V's) loss alone. With it, an encoder that networks share
    (``encoder=`` of :mod:`iql_plugins.networks`) is evaluated once for each observation, and the others have its
    features without gradient; not so one with buffers, dropout or hooks, whose evaluations count. A single
    ``qvalue_network`` duplicated for several critics becomes their own, newly initialised; only with
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
        loss_function: distance of Q to its target: ``"l1"``, ``"l2"``, ``"smooth_l1"``, or ``"huber_20"`` with any
            threshold >= 1e-6, see :func:`~iql_plugins.losses.functional.distance`.
        temperature: inverse temperature :math:`\beta` >= 0; 0 is behaviour cloning, above 1 is normal. ``"auto"`` moves
            it, from 1, until the weights have an effective sample size of 0.7 of a batch, ``"auto_0.5"`` of 0.5:
            :class:`~iql_plugins.losses.temperature.AutomaticTemperature`. It moves as running statistics do: by each
            call that computes ``loss_actor`` in training mode and with gradients enabled. It is in ``state_dict()``.
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
        value_objective: how V is learned, by its name in :mod:`iql_plugins.losses.objectives`.
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

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: nn.Module | Sequence[nn.Module],
        value_network: nn.Module | None = None,
        *,
        num_qvalue_nets: int = 2,
        loss_function: LossFunction | str = "smooth_l1",
        temperature: float | str = 1.0,
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
        settings: dict[str, Any] = {
            "temperature": temperature,
            "expectile": expectile,
            "max_weight": max_weight,
            "loss_function": loss_function,
            "value_objective": value_objective,
            "policy_extraction": policy_extraction,
            "objective_options": {} if objective_options is None else objective_options,
        }
        check(**settings)
        check_options(value_objective, policy_extraction, settings["objective_options"], temperature, num_qvalue_nets)
        super().__init__(
            actor_network,
            qvalue_network,
            value_network,
            num_qvalue_nets=num_qvalue_nets,
            separate_losses=separate_losses,
            gamma=gamma,
            priority_key=priority_key,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            scalar_output_mode=scalar_output_mode,
            check_finite=check_finite,
        )
        for name, value in settings.items():
            setattr(self, name, dict(value) if isinstance(value, Mapping) else value)

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
        of.batch.all_losses = True
        value, actor, qvalue = of.value_loss, of.actor_loss, of.qvalue_loss
        self._move_temperature(of)
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

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_actor`` alone, and no metadata. Writes the log-probability into the input."""
        keys = [*in_keys_of(self.actor_network), *in_keys_of(self.qvalue_network), *in_keys_of(self.value_network)]
        of = self._quantities(tensordict, {}, [*keys, self._tensor_keys.action])
        with torch.no_grad():
            of.advantage  # noqa: B018 - no other loss will ask for V's gradient
        loss = of.reduced(of.actor_loss)
        self._move_temperature(of)
        tensordict.set(self._tensor_keys.log_prob, of.log_prob.detach())
        return loss, {}

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_value`` alone, and no metadata."""
        keys = [*in_keys_of(self.qvalue_network), *in_keys_of(self.value_network), self._tensor_keys.action]
        of = self._quantities(tensordict, {}, keys)
        return of.reduced(of.value_loss), {}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_qvalue`` alone, and as metadata ``"td_error"``: each critic's squared errors, ``[N, *B]``."""
        keys = [*in_keys_of(self.qvalue_network), self._tensor_keys.action, *self._target_keys]
        of = self._quantities(tensordict, {}, keys)
        target = of.target
        return of.reduced(of.qvalue_loss), {"td_error": of.unmasked((of.q.detach() - target).square())}

    @torch.no_grad()
    def qvalues(self, tensordict: TensorDictBase) -> Tensor:
        """``[N, *B]`` Q(s, a) of each critic, in eval or training mode as the loss is, without gradient.

        Args:
            tensordict: observations and actions by the key layout; nothing is written into it.
        """
        keys = [*in_keys_of(self.qvalue_network), self._tensor_keys.action]
        batch = self._reader.read(self._source(tensordict, {}), keys)
        return self._q(batch, batch.shape)

    @torch.no_grad()
    def labels(self, tensordict: TensorDictBase, noise: float | None = None) -> Labels:
        """What the policy's loss makes of each transition, in eval or training mode as the loss is, without gradient.

        Args:
            tensordict: observations and actions by the key layout; nothing is written into it.
            noise: the critics' disagreement that ``noise_threshold`` multiplies; None takes that of these transitions.
        """
        keys = [*in_keys_of(self.qvalue_network), *in_keys_of(self.value_network), self._tensor_keys.action]
        of = self._quantities(tensordict, {}, keys)
        value, advantage = of.value, of.advantage
        if noise is not None:
            of.computed["noise"] = advantage.new_tensor(noise)
        weight = of.weight if policy_extraction(self.policy_extraction).weighs else torch.ones_like(value)
        return Labels(value, functional.minimum_over_critics(of.target_q), advantage, weight)

    @torch.no_grad()
    def health(self, tensordict: TensorDictBase | None = None, **tensors: Tensor) -> functional.Health:
        """What tells whether the training is well on a batch, at the current parameters; see :func:`functional.health`.

        Args:
            tensordict: a batch by the key layout; nothing is written into it.
            **tensors: the batch as keyword tensors instead.
        """
        keys = [*in_keys_of(self.qvalue_network), *in_keys_of(self.value_network), self._tensor_keys.action]
        of = self._quantities(tensordict, tensors, keys)
        value, target_q = of.value, of.target_q
        tempered = reads_temperature(self.value_objective, self.policy_extraction)
        weight, max_weight = None if tempered else of.weight, self.max_weight
        if not policy_extraction(self.policy_extraction).weighs:
            weight, max_weight = torch.ones_like(value), math.inf
        return functional.health(
            target_q,
            value,
            temperature=self.inverse_temperature,
            max_weight=max_weight,
            weight=weight,
            signal=of.signal,
            mask=of.mask,
        )

    def _move_temperature(self, of: BatchQuantities) -> None:
        target = target_share(self.temperature)
        if target is None or not self.training or not torch.is_grad_enabled():
            return
        assert self.automatic_temperature is not None
        # Of all advantages: with a threshold that takes all of them for noise, no temperature is too high.
        exponent, mask = self.inverse_temperature * of.undropped.advantage.detach(), of.mask
        counted = exponent if mask is None else exponent.masked_fill(~mask, -math.inf)
        # Before max_weight clips them: only then does the size always fall as the temperature grows. Relative to the
        # largest one: neither they nor their squares are too large or too small for numbers.
        relative = (exponent - replicas.of_all(counted.amax(), self, largest=True)).exp()
        moments = functional.weight_moments(relative, weight=of.importance, mask=mask)
        moments = replicas.of_all(moments, self)
        self.automatic_temperature.move(functional.effective_sample_size(moments), target)

    def _quantities(
        self, tensordict: TensorDictBase | None, tensors: dict[str, Tensor], keys: Sequence[NestedKey]
    ) -> BatchQuantities:
        return BatchQuantities(self, self._reader.read(self._source(tensordict, tensors), keys))


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
        if batch.action_index is None:
            # The critics say how many actions there are.
            self._target_q(batch, shape)
        index = batch.action_index
        assert index is not None
        # TorchRL's OneHotCategorical has an empty event shape: its mode tells.
        event_shape: Size = distribution.event_shape or distribution.mode.shape[len(shape) :]
        if not event_shape:
            return index
        choices = torch.arange(event_shape[-1], device=index.device)
        return (index.unsqueeze(-1) == choices).to(torch.get_default_dtype())

    def _policy_q(self, batch: Batch, distribution: Any, shape: Size) -> Tensor:
        """``[*B]`` what the policy expects of min Q(s, ·); gradients flow to the policy alone."""
        probabilities = getattr(distribution, "probs", None)
        if not isinstance(probabilities, Tensor):
            raise ValueError(
                f"policy_extraction={self.policy_extraction!r} needs the probabilities of discrete actions, "
                f"actor_network's {type(distribution).__name__} has no probs"
            )
        with torch.no_grad():
            q = functional.minimum_over_critics(at_least_float32(self._frozen_critic_values(batch)))
        return functional.expected_q(q, at_least_float32(probabilities))

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
