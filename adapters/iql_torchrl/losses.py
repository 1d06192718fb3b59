"""IQL's losses as TorchRL's ``LossModule``: drop-ins for ``torchrl.objectives.IQLLoss`` and ``DiscreteIQLLoss``.

The losses are the core's. What is here is TorchRL's: its base class, its names, its value estimators, its
warnings.
"""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams, set_composite_lp_aggregate
from tensordict.utils import NestedKey, unravel_key
from torch import Size, Tensor, nn
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import build_value_estimator, get_value_estimator_entry
from torchrl.objectives.value import ValueEstimatorBase

import iql_plugins
from iql_plugins.keys import DISCOUNT, STEPS_TO_NEXT_OBS, AcceptedKeys, next_key, shown
from iql_plugins.losses.batch import Batch, to_batch_shape
from iql_plugins.losses.bootstrap import ValueEstimator, supported_value_type
from iql_plugins.losses.parameters import ESTIMATOR
from iql_plugins.networks import parameters
from iql_plugins.networks.distributions import at_least_float32
from iql_torchrl import _compat

__all__ = ["DiscreteIQLLoss", "IQLLoss"]

_ESTIMATOR_KEYS = ("value", "reward", "done", "terminated")
# Hyper-parameters that the core's estimators have, too, or that say how TorchRL's compute, not what.
_COMMON = {"gamma", "lmbda", "time_dim", "differentiable"}
_HOW = {"device", "vectorized", "deactivate_vmap", "skip_existing"}


class UnsupportedValueError(NotImplementedError, ValueError):
    """The core's ``ValueError`` where TorchRL raises ``RuntimeError`` or ``NotImplementedError``: caught as any."""


class _Module(LossModule):  # type: ignore[misc]
    """``LossModule`` with the signatures of ``torch.nn.Module``, which the core calls."""

    named_parameters = nn.Module.named_parameters
    _apply = nn.Module._apply


class IQLLoss(iql_plugins.IQLLoss, _Module):
    """:class:`iql_plugins.IQLLoss` as TorchRL's ``LossModule``, in the place of ``torchrl.objectives.IQLLoss``.

    Arguments, keys, outputs, attributes and checkpoints are those of TorchRL's class, which its updaters,
    replay buffers, trainers and value estimators take; where results differ, it is because the core's do.
    Where the core asks for a time dimension, this class does what TorchRL does: TD(1) and TD(λ) take the last
    batch dimension for time, shuffled transitions or not.

    An estimator that was built by the user, or with a hyper-parameter that the core does not know, makes the
    target by its own equation; one made by name is the core's, and looks like TorchRL's. The
    log-probabilities of a composite policy are summed, whether or not TorchRL aggregates them.

    Args:
        actor_network: see :class:`iql_plugins.IQLLoss`.
        qvalue_network: see :class:`iql_plugins.IQLLoss`.
        value_network: see :class:`iql_plugins.IQLLoss`.
        **kwargs: the other arguments of :class:`iql_plugins.IQLLoss`.

    Attributes:
        deterministic_sampling_mode: the exploration type that is in force during a call.
        delay_qvalue: True: there are target critics.

    Raises:
        TypeError: for a network that is not a TensorDict module, or if ``gamma`` is given.
        RuntimeError: if ``priority_key`` is given.
        ValueError: for a hyper-parameter out of range.

    >>> from iql_plugins.networks import critic, gaussian_actor, value_function
    >>> from torchrl.objectives import SoftUpdate
    >>> loss = IQLLoss(gaussian_actor(3, 1), critic(3, 1), value_function(3))
    >>> loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9).value_estimator.tensor_keys.reward
    'reward'
    >>> updater = SoftUpdate(loss, tau=0.005)
    """

    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS: ClassVar = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)
    delay_qvalue = True

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: nn.Module | Sequence[nn.Module],
        value_network: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # The estimator with TorchRL's interface, if it is not the one that is among the modules.
        self.__dict__["_shown_estimator"] = None
        try:
            super().__init__(actor_network, qvalue_network, value_network, **kwargs)
        except ValueError as error:
            raise UnsupportedValueError(*error.args) from error
        if self.reduction == "none" and self.scalar_output_mode is None:
            warnings.warn(
                "with reduction='none' the entropy, a scalar, is left out: pass scalar_output_mode='exclude' if that "
                "is meant, or 'non_tensor' to have it",
                UserWarning,
                stacklevel=3 if isinstance(self, DiscreteIQLLoss) else 2,
            )

    @classmethod
    def from_core(cls, loss: iql_plugins.IQLLoss) -> "IQLLoss":
        """A loss of the core's as a ``LossModule``: over the very same networks, with the same settings.

        Training the one trains the other. Settings are copied: what is set on the one later, the other does not have.

        Args:
            loss: one of the core's two; one that is a ``LossModule`` is returned itself.

        Raises:
            TypeError: for a class derived from the core's: what it computes otherwise would be lost.
        """
        if isinstance(loss, IQLLoss):
            return loss
        if type(loss) not in (iql_plugins.IQLLoss, iql_plugins.DiscreteIQLLoss):
            raise TypeError(
                f"loss must be of the core's classes themselves, got {type(loss).__name__}: derive your class from "
                "iql_torchrl's"
            )
        kind = DiscreteIQLLoss if isinstance(loss, iql_plugins.DiscreteIQLLoss) else IQLLoss
        module: IQLLoss = kind.__new__(kind)
        module.__dict__["_shown_estimator"] = None
        LossModule.__init__(module)
        # Hooks and the tables of a module are each one's own, all else is what the core has set.
        own = vars(nn.Module()).keys() - {"training"}
        module.__dict__.update({name: copy.copy(value) for name, value in vars(loss).items() if name not in own})
        module._modules.update(loss._modules)
        module._register_estimator(copy.deepcopy(loss._estimator))
        return module

    # TorchRL's updaters hold on to the tensors that they found: a cast or a load must not put others in their place.

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._updated()
        applied = super()._apply(fn, recurse)
        self._keep(before)
        return applied

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See :meth:`iql_plugins.IQLLoss.load_state_dict`."""
        before = self._updated()
        result = super().load_state_dict(state_dict, strict, assign)
        self._keep(before)
        return result

    def _updated(self) -> dict[str, dict[str, Tensor]]:
        """What updaters read and write: each network's tensors by name."""
        return {name: parameters.leaves(self._network(name)) for name in ("qvalue_network", "target_qvalue_network")}

    def _keep(self, before: dict[str, dict[str, Tensor]]) -> None:
        for network, tensors in self._updated().items():
            for name, tensor in tensors.items():
                kept = before[network][name]
                if tensor is not kept and _compat.can_hold(kept, tensor):
                    kept.data = tensor.detach()
                    parameters.replace_leaf(self._network(network), name, kept)

    @property
    def device(self) -> torch.device:
        """Refused, as in TorchRL: parameters say where they are.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a loss has no device of its own: ask its parameters")

    # LossModule's metaclass sets exploration type and recurrent mode for the losses in a class's own body.

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`iql_plugins.IQLLoss.actor_loss`."""
        self._warn_without_updater(stacklevel=4)
        return super().actor_loss(tensordict)

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`iql_plugins.IQLLoss.value_loss`."""
        self._warn_without_updater(stacklevel=4)
        return super().value_loss(tensordict)

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`iql_plugins.IQLLoss.qvalue_loss`."""
        return super().qvalue_loss(tensordict)

    @property
    def target_qvalue_network_params(self) -> TensorDictParams:
        """The target critics' tensors, a view of batch size ``[N]``; warns while nothing updates them."""
        self._warn_without_updater(stacklevel=3)
        return super().target_qvalue_network_params

    def _check_updater(self) -> None:
        # LossModule has a hook for it.
        pass

    def _warn_without_updater(self, stacklevel: int) -> None:
        updated = all(self._has_update_associated.values())
        if not updated and not torch.compiler.is_compiling() and _compat.warnings_wanted():
            warnings.warn(self.TARGET_NET_WARNING, UserWarning, stacklevel=stacklevel)

    def _policy_action(self, batch: Batch, distribution: Any, shape: Size) -> Tensor:
        action = batch.tensors[self.tensor_keys.action]
        return action if isinstance(action, TensorDictBase) else super()._policy_action(batch, distribution, shape)

    def _log_prob(self, batch: Batch, distribution: Any, shape: Size) -> Tensor:
        if not isinstance(batch.tensors[self.tensor_keys.action], TensorDictBase):
            return super()._log_prob(batch, distribution, shape)
        with set_composite_lp_aggregate(True):
            return super()._log_prob(batch, distribution, shape)

    # Value estimators: the core's is among the modules, and TorchRL's, which shows it, shares its buffers; or
    # TorchRL's is among the modules, and makes the target itself.

    @property
    def _own_estimator(self) -> ValueEstimatorBase | None:
        """The estimator that makes the target by an equation of its own."""
        module = self._modules[ESTIMATOR]
        return module if isinstance(module, ValueEstimatorBase) else None

    @property
    def value_estimator(self) -> ValueEstimatorBase:
        """What makes the target of Q, as TorchRL's: TD(0) with a discount of 0.99 unless another was made.

        Raises:
            KeyError: if the value network does not write ``tensor_keys.value``.
        """
        if self._own_estimator is None and self._shown_estimator is None:
            self._show(self._build(self.value_type))
        # As TorchRL's, which is made when somebody looks at it, and then is in state_dict().
        self._estimator_in_state = True
        return self._value_estimator

    @value_estimator.setter
    def value_estimator(self, estimator: Any) -> None:
        if isinstance(estimator, ValueEstimatorBase):
            self._use(estimator, type(estimator))
        elif isinstance(estimator, ValueEstimator):
            self._register_estimator(estimator)
        else:
            raise TypeError(f"value_estimator must be one of TorchRL's, got {type(estimator).__name__}")
        self._estimator_in_state = True

    @property
    def _value_estimator(self) -> Any:
        return self._modules.get(ESTIMATOR) if self._shown_estimator is None else self._shown_estimator

    @_value_estimator.setter
    def _value_estimator(self, estimator: Any) -> None:
        # LossModule says None where the default is still to be made.
        if estimator is not None:
            self.value_estimator = estimator
        elif ESTIMATOR in self._modules:
            self._register_estimator(self._new_estimator(supported_value_type(self.default_value_estimator)))
            self._estimator_in_state = False

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "IQLLoss":
        """Chooses how the target of Q is made, and its discount.

        Args:
            value_type: ``ValueEstimators.TD0`` (the default), ``TD1`` or ``TDLambda``, or its name; a value
                estimator, whose keys stay as they are; or the class of one.
            **hyperparams: those of TorchRL's estimator of that type.

        Returns:
            The loss.

        Raises:
            NotImplementedError: for an estimator that IQL does not take.
            KeyError: for an unknown name, or if the value network does not write ``tensor_keys.value``.
            TypeError: for a hyper-parameter that the estimator does not have.
            ValueError: for one out of range.
        """
        value_type = self.default_value_estimator if value_type is None else value_type
        if isinstance(value_type, type) and issubclass(value_type, ValueEstimatorBase):
            value_type = value_type(**self._on_device(hyperparams))
        if isinstance(value_type, ValueEstimatorBase):
            self.value_estimator = value_type
            return self
        get_value_estimator_entry(value_type)
        value_type = ValueEstimators[supported_value_type(value_type).name]
        estimator = self._build(value_type, **hyperparams)
        if hyperparams.keys() <= _COMMON | _HOW:
            super().make_value_estimator(value_type, **{k: v for k, v in hyperparams.items() if k in _COMMON})
            self._show(estimator)
        else:
            self._use(estimator, value_type)
            self._estimator_in_state = True
        return self

    def _on_device(self, hyperparams: dict[str, Any]) -> dict[str, Any]:
        return hyperparams if self._default_device is None else {"device": self._default_device} | hyperparams

    def _build(self, value_type: ValueEstimators, **hyperparams: Any) -> ValueEstimatorBase:
        estimator = build_value_estimator(self, value_type, **self._on_device(hyperparams))
        estimator.set_keys(**{name: getattr(self.tensor_keys, name) for name in _ESTIMATOR_KEYS})
        return estimator

    def _show(self, estimator: ValueEstimatorBase) -> None:
        estimator.__dict__["_buffers"] = self._estimator._buffers
        # Past torch.nn.Module, which would take it for a second module of the loss.
        self.__dict__["_shown_estimator"] = estimator

    def _use(self, estimator: ValueEstimatorBase, value_type: Any) -> None:
        if estimator is self._shown_estimator:
            return
        self._modules[ESTIMATOR] = estimator
        self.__dict__["_shown_estimator"] = None
        self.value_type = value_type

    def _register_estimator(self, estimator: ValueEstimator) -> None:
        super()._register_estimator(estimator)
        self.__dict__["_shown_estimator"] = None
        self.value_type = ValueEstimators[estimator.value_type.name]

    # Keys

    def _check_keys(self, keys: AcceptedKeys, changed: Collection[str]) -> None:
        # As in TorchRL, any name goes until an estimator is there that has to find it.
        if self._estimator_in_state:
            super()._check_keys(keys, {"value"}.intersection(changed))

    def _follow_keys(self) -> None:
        if self._own_estimator is None:
            super()._follow_keys()
        if isinstance(self._value_estimator, ValueEstimatorBase):
            self._value_estimator.set_keys(**{name: getattr(self.tensor_keys, name) for name in _ESTIMATOR_KEYS})

    @property
    def _outcome_keys(self) -> list[NestedKey]:
        # In TorchRL the estimator reads them, by its own names.
        estimator = self._value_estimator
        keys = estimator.tensor_keys if isinstance(estimator, ValueEstimatorBase) else self.tensor_keys
        return [next_key(keys.reward), next_key(keys.done), next_key(keys.terminated)]

    @property
    def _target_keys(self) -> list[NestedKey]:
        own = self._own_estimator
        also = [] if own is None else [unravel_key(key) for key in own.in_keys]
        return [*self._outcome_keys, *self._next_value_keys, *also]

    # The target

    def _target(self, batch: Batch, shape: Size | None) -> Tensor:
        if batch.time_dim is None:
            batch.time_dim = (batch.batch_dims or len(batch.shape)) - 1
        return super()._target(batch, shape) if self._own_estimator is None else self._own_target(batch, shape)

    @torch.no_grad()
    def _own_target(self, batch: Batch, shape: Size | None) -> Tensor:
        """``[*B]`` target of Q by an equation of TorchRL's."""
        assert self._own_estimator is not None
        assert batch.time_dim is not None
        if DISCOUNT in batch.tensors:
            raise ValueError(
                f"{type(self._own_estimator).__name__} discounts by its gamma and {STEPS_TO_NEXT_OBS!r}, the batch has "
                f"{shown(DISCOUNT)}: leave it out, or make_value_estimator by name"
            )
        shape = batch.shape if shape is None else shape
        columns = {key: to_batch_shape(batch.tensors[key], shape, key).unsqueeze(-1) for key in self._outcome_keys}
        # A dimension that is given by number counts those of the TensorDict.
        batch_size = batch.shape[: batch.batch_dims or None]
        names: list[str | None] = [None] * len(batch_size)
        names[batch.time_dim] = "time"
        target = self._own_estimator.value_estimate(
            TensorDict(batch.tensors | columns, batch_size, names=names),
            target_params=TensorDict.from_module(self.value_network).data,
        )
        return at_least_float32(to_batch_shape(target, shape, "value_target"))


class DiscreteIQLLoss(iql_plugins.DiscreteIQLLoss, IQLLoss):
    """:class:`iql_plugins.DiscreteIQLLoss` as TorchRL's ``LossModule``: see :class:`IQLLoss`.

    Actions of the space ``"one-hot"`` are weights of the critics' values, as in TorchRL, and are not checked to be
    one-hot.
    """

    def _chosen(self, values: Tensor, batch: Batch, shape: Size) -> Tensor:
        if self.action_space == "categorical":
            return super()._chosen(values, batch, shape)
        key = self.tensor_keys.action
        action = batch.tensors[key]
        if values.shape[1:-1] != shape or action.shape != values.shape[1:]:
            # Whatever is wrong, the core says it.
            return super()._chosen(values, batch, shape)
        batch.action_index = action.long().argmax(-1)
        return (values * action.to(values.dtype)).sum(-1)
