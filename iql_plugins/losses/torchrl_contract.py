"""What users of TorchRL rely on beside the losses: keys, outputs, estimators, masks, what a batch may be."""

import warnings
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from iql_plugins.keys import AcceptedKeys, is_key, next_key, shown
from iql_plugins.losses import functional, replicas
from iql_plugins.losses.batch import BatchReader, keyword_tensors
from iql_plugins.losses.bootstrap import ValueEstimator, ValueEstimators, make_estimator, supported_value_type
from iql_plugins.losses.functional import Reduction
from iql_plugins.losses.parameters import ESTIMATOR, NETWORKS, LossParameters
from iql_plugins.networks import parameters
from iql_plugins.ranges import choice

__all__ = ["ScalarOutputMode", "TorchRLContract", "check_written", "in_keys_of"]

ScalarOutputMode = Literal["exclude", "non_tensor"]
Self = TypeVar("Self", bound="TorchRLContract")
_NO_UPDATER = (
    "The loss has target critics, but no SoftUpdate or HardUpdate was made for it: unless you update "
    "target_qvalue_network_params yourself, the critics learn from targets that never move."
)


class TorchRLContract(LossParameters):
    """A loss over an actor, V and critics with the contract of ``torchrl.objectives.LossModule``, without the losses.

    See :class:`~iql_plugins.losses.iql.IQLLoss` for the arguments.
    """

    _AcceptedKeys = AcceptedKeys
    default_keys = AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS: ClassVar = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)
    use_prioritized_weights: bool | str = "auto"
    vmap_randomness: str = "different"
    _targets_replicated = False

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: nn.Module | Sequence[nn.Module],
        value_network: nn.Module | None,
        *,
        num_qvalue_nets: int,
        separate_losses: bool,
        gamma: float | None,
        priority_key: NestedKey | None,
        reduction: Reduction | None,
        deactivate_vmap: bool,
        scalar_output_mode: ScalarOutputMode | None,
        check_finite: bool,
    ) -> None:
        reduction = "mean" if reduction is None else reduction
        if gamma is not None:
            raise TypeError(
                f"gamma is not an argument of the loss: call make_value_estimator(ValueEstimators.TD0, gamma={gamma})"
            )
        if priority_key is not None:
            raise RuntimeError(f"priority_key is deprecated: call set_keys(priority={priority_key!r})")
        choice(Reduction).check("reduction", reduction)
        if scalar_output_mode is not None:
            choice(ScalarOutputMode).check("scalar_output_mode", scalar_output_mode)
        super().__init__(actor_network, qvalue_network, value_network, num_qvalue_nets, separate_losses)
        self.reduction = reduction
        self.deactivate_vmap = deactivate_vmap
        self.scalar_output_mode = scalar_output_mode
        self.check_finite = check_finite
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
                check_written(name, getattr(keys, name), network)

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
        return [next_key(key) for key in in_keys_of(self.value_network)]

    @property
    def _target_keys(self) -> list[NestedKey]:
        """What the target of Q is made from."""
        return [*self._outcome_keys, *self._next_value_keys]

    @property
    def in_keys(self) -> list[NestedKey]:
        """What every batch must have; as keyword tensors, with ``_`` between the parts of a key."""
        required = [
            *in_keys_of(self.actor_network),
            *in_keys_of(self.qvalue_network),
            *in_keys_of(self.value_network),
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

    def select_out_keys(self: Self, *out_keys: str) -> Self:
        """Narrows what a call returns, in the order given.

        Raises:
            ValueError: for a key that is not among :attr:`out_keys_source`.
        """
        unknown = [key for key in out_keys if key not in self.out_keys_source]
        if unknown or not out_keys:
            raise ValueError(f"out_keys must be some of {self.out_keys_source}, got {list(out_keys)}")
        self._selected_out_keys = list(out_keys)
        return self

    def reset_out_keys(self: Self) -> Self:
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
        estimator = self._modules[ESTIMATOR]
        assert isinstance(estimator, ValueEstimator)
        return estimator

    @property
    def value_estimator(self) -> ValueEstimator:
        """What makes the target of Q; TD(0) with a discount of 0.99 unless :meth:`make_value_estimator` was called."""
        return self._estimator

    @value_estimator.setter
    def value_estimator(self, estimator: ValueEstimator) -> None:
        if not isinstance(estimator, ValueEstimator):
            raise TypeError(f"value_estimator must be a ValueEstimator, got {type(estimator).__name__}")
        self._register_estimator(estimator)
        self._estimator_in_state = True

    def make_value_estimator(self: Self, value_type: Any = None, **hyperparams: Any) -> Self:
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

    def _estimator_is_set(self) -> bool:
        own = self._modules[ESTIMATOR]
        new = self._new_estimator(supported_value_type(self.default_value_estimator))
        if not isinstance(own, ValueEstimator):
            return False
        pairs = zip(own.buffers(), new.buffers(), strict=False)
        return any(not buffer.is_meta and not torch.equal(buffer, other.to(buffer)) for buffer, other in pairs)

    def _register_estimator(self, estimator: ValueEstimator) -> None:
        estimator.tensor_keys = self._tensor_keys
        self._modules[ESTIMATOR] = estimator
        self.value_type = estimator.value_type

    # Calls

    @staticmethod
    def loss_value_diff(diff: Tensor, expectile: float = 0.8) -> Tensor:
        """The loss of V per sample: :func:`~iql_plugins.losses.functional.expectile_loss` of Q - V."""
        return functional.expectile_loss(diff, expectile)

    def _check_updater(self) -> None:
        if not self._has_update_associated["qvalue_network"] and not torch.compiler.is_compiling():
            # Past this method, forward, and the two frames of torch.nn.Module's call.
            warnings.warn(_NO_UPDATER, UserWarning, stacklevel=5)

    def _check_wrapper(self, tensordict: TensorDictBase | None) -> None:
        if tensordict is not None:
            replicas.check_output(self)
        # DDP may leave buffers, which the targets are, as each process drew them.
        if not self._targets_replicated and (ddp := replicas.active_ddp()) is not None:
            buffers = list(parameters.leaves(self._network("target_qvalue_network")).values())
            if self.automatic_temperature is not None:
                buffers += self.automatic_temperature.buffers()
            replicas.replicate(buffers, ddp)
            self._targets_replicated = True

    def _source(
        self, tensordict: TensorDictBase | None, tensors: dict[str, Tensor]
    ) -> TensorDictBase | dict[NestedKey, Tensor]:
        if tensordict is None:
            # A next key of any network may be given, as TorchRL asks for the actor's.
            also = [next_key(key) for network in NETWORKS for key in in_keys_of(self._network(network))]
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


def in_keys_of(network: nn.Module) -> list[NestedKey]:
    """What a network reads."""
    keys: list[NestedKey] = network.in_keys  # type: ignore[assignment]
    if not isinstance(network, TensorDictSequential):
        return keys
    # What one module writes as ("params", "loc"), and another takes as "params", is no input.
    out_keys: Any = network.out_keys
    written = {key[:length] for key in out_keys if isinstance(key, tuple) for length in range(1, len(key))}
    return [key for key in keys if (key if isinstance(key, tuple) else (key,)) not in written]


def check_written(name: str, key: NestedKey, network: nn.Module) -> None:
    """Raises ``KeyError`` unless V or the critics write a key."""
    out_keys: Any = network.out_keys
    if key not in out_keys:
        raise KeyError(
            f"the {'value' if name == 'value' else 'qvalue'} network does not write {shown(key)}; it writes "
            f"{', '.join(map(shown, out_keys))}: set_keys({name}=...) tells the loss which to read"
        )
