r"""How the target of Q is made from rewards and V: TD(0), TD(1), TD(:math:`\lambda`)."""

import abc
from enum import Enum
from typing import Any, ClassVar, final

import torch
from torch import Size, Tensor, nn

from iql_plugins.keys import AcceptedKeys
from iql_plugins.losses.batch import Batch
from iql_plugins.losses.functional import td_lambda_target, td_target

__all__ = [
    "TD0Estimator",
    "TD1Estimator",
    "TDLambdaEstimator",
    "ValueEstimator",
    "ValueEstimators",
    "default_value_kwargs",
]


class ValueEstimators(Enum):
    """The estimators that TorchRL names. IQL takes ``TD0``, ``TD1`` and ``TDLambda``."""

    TD0 = "Bootstrapped TD (1-step return)"
    TD1 = "TD(1) (infinity-step return)"
    TDLambda = "TD(lambda)"
    GAE = "Generalized advantage estimate"
    MAGAE = "Multi-agent generalized advantage estimate"
    VTrace = "V-trace"


class ValueEstimator(nn.Module, abc.ABC):
    r"""Makes the target of Q; owns its discount as a buffer, so that a schedule can change it in place.

    Args:
        gamma: discount per environment step, in [0, 1].
        differentiable: accepted because TorchRL's defaults carry it. IQL's target never has a gradient.

    Attributes:
        tensor_keys: the key names of the loss that holds the estimator, for whoever reads a batch as it does.
        value_type: the estimator's member of :class:`ValueEstimators`.

    Raises:
        ValueError: if ``gamma`` is outside [0, 1].
    """

    gamma: Tensor
    value_type: ClassVar[ValueEstimators]
    needs_trajectories: ClassVar[bool]

    def __init__(self, *, gamma: float | Tensor = 0.99, differentiable: bool = True) -> None:
        super().__init__()
        self.differentiable = differentiable
        self.tensor_keys = AcceptedKeys()
        self.register_buffer("gamma", _unit_interval("gamma", gamma))

    @abc.abstractmethod
    def forward(
        self,
        reward: Tensor,
        next_value: Tensor,
        done: Tensor,
        terminated: Tensor,
        *,
        discount: Tensor | None = None,
        mask: Tensor | None = None,
        time_dim: int = -1,
    ) -> Tensor:
        """The target of Q(s, a), in return units, without gradient.

        Args:
            reward: ``[*B]``.
            next_value: ``[*B]`` V(s').
            done: ``[*B]`` bool.
            terminated: ``[*B]`` bool.
            discount: ``[*B]`` of each transition, ``gamma`` when None; see :meth:`discount`.
            mask: ``[*B]`` bool, True where an entry is valid. No valid target sees an invalid entry.
            time_dim: which dimension of ``*B`` is time.

        Returns:
            ``[*B]``.
        """

    def discount(self, steps: Tensor | None) -> Tensor:
        r"""``[*B]`` discount :math:`\gamma^n` of n-step transitions, or ``gamma`` when ``steps`` is None."""
        return self.gamma if steps is None else self.gamma**steps

    def set_keys(self, **names: Any) -> None:
        """Refuses: an estimator reads by its loss's names.

        Raises:
            AttributeError: always; ``set_keys`` of the loss renames for both.
        """
        raise AttributeError(f"call set_keys({', '.join(names)}) on the loss: its value estimator follows it")

    def _apply(self, fn: Any, recurse: bool = True) -> "ValueEstimator":
        # In bfloat16 a discount of 0.99 would become 0.988: a cast may widen the dtype, never narrow it. And
        # the numbers stay real on the meta device, which would forget them.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                device = buffer.device if moved.is_meta else moved.device
                self._buffers[name] = buffer.to(device, torch.promote_types(buffer.dtype, moved.dtype))
        return self


def _unit_interval(name: str, value: float | Tensor) -> Tensor:
    tensor = value.clone() if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    if tensor.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(tensor.shape)}")
    if not 0.0 <= tensor.item() <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {tensor.item()}")
    return tensor.reshape(())


@final
class TD0Estimator(ValueEstimator):
    """One-step target; see :func:`~iql_plugins.losses.functional.td_target`."""

    value_type = ValueEstimators.TD0
    needs_trajectories = False

    def forward(
        self,
        reward: Tensor,
        next_value: Tensor,
        done: Tensor,
        terminated: Tensor,
        *,
        discount: Tensor | None = None,
        mask: Tensor | None = None,
        time_dim: int = -1,
    ) -> Tensor:
        """As :meth:`ValueEstimator.forward`; ``done`` and ``time_dim`` play no part."""
        return td_target(reward, next_value, terminated, self.gamma if discount is None else discount)


class _TrajectoryEstimator(ValueEstimator):
    needs_trajectories = True

    def __init__(self, *, time_dim: int | None = None, **hyperparams: Any) -> None:
        super().__init__(**hyperparams)
        if time_dim is not None and (isinstance(time_dim, bool) or not isinstance(time_dim, int)):
            raise TypeError(f"time_dim must be an integer or None, got {time_dim!r}")
        self.time_dim = time_dim

    @abc.abstractmethod
    def decay(self) -> Tensor | float:
        """λ."""

    def forward(
        self,
        reward: Tensor,
        next_value: Tensor,
        done: Tensor,
        terminated: Tensor,
        *,
        discount: Tensor | None = None,
        mask: Tensor | None = None,
        time_dim: int = -1,
    ) -> Tensor:
        """As :meth:`ValueEstimator.forward`."""

        def time_last(x: Tensor) -> Tensor:
            return x.movedim(time_dim, -1)

        discount = self.gamma if discount is None else discount
        done = time_last(done)
        if mask is not None:
            # The step before an invalid one is the last of its trajectory.
            next_invalid = ~time_last(mask)[..., 1:]
            done = done | torch.nn.functional.pad(next_invalid, (0, 1), value=False)
        target = td_lambda_target(
            time_last(reward),
            time_last(next_value),
            done,
            time_last(terminated),
            time_last(discount) if discount.ndim else discount,
            self.decay(),
        )
        return target.movedim(-1, time_dim)


@final
class TD1Estimator(_TrajectoryEstimator):
    r"""Monte-Carlo return along a trajectory, bootstrapped where it is cut: TD(:math:`\lambda`) with λ = 1.

    Args:
        gamma: discount per environment step, in [0, 1].
        time_dim: which dimension of the rewards is time; a negative one counts back from a TensorDict's last batch
            dimension, or from the last of ``*B`` for keyword tensors. When None, it is the one that a TensorDict
            names ``"time"``, or its last batch dimension; keyword tensors need it.
        differentiable: see :class:`ValueEstimator`.

    Raises:
        TypeError: if ``time_dim`` is no integer.
        ValueError: if ``gamma`` is outside [0, 1].
    """

    value_type = ValueEstimators.TD1

    def decay(self) -> float:
        """1."""
        return 1.0


@final
class TDLambdaEstimator(_TrajectoryEstimator):
    r"""See :func:`~iql_plugins.losses.functional.td_lambda_target`.

    Args:
        gamma: discount per environment step, in [0, 1].
        lmbda: :math:`\lambda` in [0, 1].
        time_dim: which dimension of the rewards is time; a negative one counts back from a TensorDict's last batch
            dimension, or from the last of ``*B`` for keyword tensors. When None, it is the one that a TensorDict
            names ``"time"``, or its last batch dimension; keyword tensors need it.
        differentiable: see :class:`ValueEstimator`.

    Raises:
        TypeError: if ``time_dim`` is no integer.
        ValueError: if ``gamma`` or ``lmbda`` is outside [0, 1].
    """

    value_type = ValueEstimators.TDLambda
    lmbda: Tensor

    def __init__(self, *, lmbda: float | Tensor = 0.95, **hyperparams: Any) -> None:
        super().__init__(**hyperparams)
        self.register_buffer("lmbda", _unit_interval("lmbda", lmbda))

    def decay(self) -> Tensor:
        """λ."""
        return self.lmbda


_ESTIMATORS: dict[ValueEstimators, type[ValueEstimator]] = {
    estimator.value_type: estimator for estimator in (TD0Estimator, TD1Estimator, TDLambdaEstimator)
}


def default_value_kwargs(value_type: ValueEstimators) -> dict[str, Any]:
    """The hyper-parameters that an estimator has when none are given, as TorchRL's function of that name.

    >>> default_value_kwargs(ValueEstimators.TDLambda)
    {'gamma': 0.99, 'differentiable': True, 'lmbda': 0.95}

    Raises:
        NotImplementedError: for an estimator that IQL does not take.
    """
    value_type = supported_value_type(value_type)
    defaults: dict[str, Any] = {"gamma": 0.99, "differentiable": True}
    return defaults | {"lmbda": 0.95} if value_type is ValueEstimators.TDLambda else defaults


def supported_value_type(value_type: object) -> ValueEstimators:
    """Our enum's member for ours, TorchRL's, or a name (``"td0"``).

    Raises:
        NotImplementedError: for an estimator that IQL does not take.
    """
    name = value_type.name if isinstance(value_type, Enum) else value_type
    for member in _ESTIMATORS:
        if isinstance(name, str) and member.name.lower() == name.lower():
            return member
    supported = ", ".join(member.name for member in _ESTIMATORS)
    raise NotImplementedError(f"value_type must be one of {supported}, got {value_type!r}")


def make_estimator(value_type: ValueEstimators, **hyperparams: Any) -> ValueEstimator:
    """An estimator of a supported type.

    Raises:
        TypeError: for a hyper-parameter that it does not have.
        ValueError: for one out of range.
    """
    accepted = {*default_value_kwargs(value_type)}
    if _ESTIMATORS[value_type].needs_trajectories:
        accepted.add("time_dim")
    unknown = hyperparams.keys() - accepted
    if unknown:
        raise TypeError(
            f"{value_type.name} has no hyper-parameter {', '.join(sorted(unknown))}; "
            f"it takes {', '.join(sorted(accepted))}"
        )
    return _ESTIMATORS[value_type](**hyperparams)


def time_dimension(estimator: ValueEstimator, batch: Batch, shape: Size) -> int:
    """Which dimension of ``shape`` is time.

    Raises:
        ValueError: if nothing says so: shuffled transitions have none, and the last dimension of plain tensors may
            be that of agents.
    """
    given: int | None = getattr(estimator, "time_dim", None)
    count = len(shape) if batch.batch_dims is None else batch.batch_dims
    if given is not None:
        time_dim = given + count if given < 0 else given
        if not 0 <= time_dim < len(shape):
            raise ValueError(
                f"time_dim={given} is not a dimension of the batch shape {tuple(shape[:count] if given < 0 else shape)}"
            )
        return time_dim
    if batch.time_dim is not None:
        return batch.time_dim
    needs = f"{type(estimator).__name__} needs trajectories"
    if batch.batch_dims is None:
        raise ValueError(
            f"{needs}, and keyword tensors do not say which dimension is time: pass time_dim to make_value_estimator "
            "(time_dim=1 for rewards of shape [B, T, 1]), or give a TensorDict; for shuffled transitions use "
            "ValueEstimators.TD0"
        )
    if count < 2:
        raise ValueError(
            f"{needs}, a TensorDict of batch size [*B, T] with time last, got batch size {tuple(shape[:count])}; if "
            "its one dimension is time, name it 'time' or pass time_dim=0 to make_value_estimator; for shuffled "
            "transitions use ValueEstimators.TD0"
        )
    return count - 1
