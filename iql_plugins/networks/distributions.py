r"""The policy distributions of IQL, safe at and beyond the bounds of the action space.

All follow :class:`torch.distributions.Distribution`. They never validate arguments, because that
reads tensors on the host; they compute densities in float32 at least; and ``deterministic_sample``
is the action that an evaluation takes.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Categorical as _Categorical
from torch.distributions import Distribution, constraints

__all__ = ["Categorical", "TanhMeanNormal", "TanhNormal", "at_least_float32", "evaluated_action"]

Shape = torch.Size | list[int] | tuple[int, ...]

# The authors clip the dataset's actions to +-(1 - 1e-5): atanh(1) is infinite.
BOUNDARY = 1e-5
_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, in float32 if it has a half-precision dtype."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def evaluated_action(distribution: Any) -> Tensor:
    """The action that an evaluation takes, with gradient; inside the bounds if the distribution has any.

    Raises:
        ValueError: for a distribution that knows none.
    """
    try:
        # Before the mode, which TorchRL's squashed Gaussian searches for.
        action = getattr(distribution, "deterministic_sample", None)
        mode: Tensor = distribution.mode if action is None else action
    except NotImplementedError as error:
        raise ValueError(
            f"the policy's distribution must have a deterministic_sample or a mode, {type(distribution).__name__} has "
            "neither"
        ) from error
    return mode


class _BoxDistribution(Distribution):
    """A distribution over ``[*B, act]`` actions, written in coordinates where the bounds are -1 and 1."""

    has_rsample = True
    arg_constraints: ClassVar = {"loc": constraints.real_vector, "scale": constraints.positive}
    support = constraints.real_vector
    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, low: Tensor | float = -1.0, high: Tensor | float = 1.0) -> None:
        self.loc, self.scale = torch.broadcast_tensors(at_least_float32(loc), at_least_float32(scale))
        self._center = (high + low) / 2
        self._half_range = (high - low) / 2
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=False)

    @property
    def deterministic_sample(self) -> Tensor:
        """``[*B, act]`` the action of an evaluation: tanh of ``loc``, scaled to the bounds."""
        return self._scaled(self.loc.tanh())

    @property
    def mode(self) -> Tensor:
        """As :attr:`deterministic_sample`."""
        return self.deterministic_sample

    def _scaled(self, unit_action: Tensor) -> Tensor:
        return self._center + self._half_range * unit_action

    def _unit(self, action: Tensor) -> Tensor:
        return (at_least_float32(action) - self._center) / self._half_range

    def _normal_log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        return (-0.5 * ((x - mean) / self.scale).square() - self.scale.log() - _HALF_LOG_2_PI).sum(-1)

    def _noise(self, sample_shape: Shape) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def _log_half_range(self) -> Tensor:
        half_range = self._half_range
        # A tensor made of a number is copied from the host, which waits for a GPU; a fill does not.
        half_range = half_range.to(self.loc) if isinstance(half_range, Tensor) else self.loc.new_full((), half_range)
        return half_range.log().expand(self.event_shape).sum(-1)


class TanhMeanNormal(_BoxDistribution):
    r"""The paper's policy: a Gaussian whose mean, and nothing else, is squashed.

    .. math:: a \sim \mathcal{N}(\tanh(\text{loc}), \text{scale}^2) \quad\text{in units where the bounds are } \pm 1

    Samples may leave the bounds; the authors clip them when they act.

    >>> policy = TanhMeanNormal(torch.zeros(1), torch.ones(1))
    >>> policy.log_prob(torch.tensor([1.0]))  # -(1**2) / 2 - log(2 * pi) / 2
    tensor(-1.4189)

    Args:
        loc: ``[*B, act]`` mean before the tanh.
        scale: ``[*B, act]`` (or broadcastable) standard deviation > 0, as a share of half the range.
        low: ``[act]`` or scalar lower bound of the action space.
        high: ``[act]`` or scalar upper bound.
    """

    @property
    def mean(self) -> Tensor:
        """``[*B, act]``."""
        return self.deterministic_sample

    def log_prob(self, value: Tensor) -> Tensor:
        """``[*B]`` log-density (nats) of ``[*B, act]`` actions, at and outside the bounds as well."""
        return self._normal_log_prob(self._unit(value), self.loc.tanh()) - self._log_half_range()

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """``[*sample_shape, *B, act]`` reparametrised samples, not clipped to the bounds."""
        return self._scaled(self.loc.tanh() + self._noise(sample_shape))

    def entropy(self) -> Tensor:
        """``[*B]`` differential entropy in nats."""
        return (0.5 + _HALF_LOG_2_PI + self.scale.log()).sum(-1) + self._log_half_range()


class TanhNormal(_BoxDistribution):
    r"""A Gaussian squashed into the bounds, :math:`\tanh(x)` of :math:`x \sim \mathcal{N}(\text{loc}, \text{scale}^2)`.

    Actions at, or outside, the bounds are clipped to 1 - 1e-5 of the range before their density is
    taken, as the authors clip their datasets; torch's own ``TanhTransform`` gives NaN there.

    >>> policy = TanhNormal(torch.zeros(1), torch.ones(1))
    >>> policy.log_prob(torch.tensor([0.0]))  # -log(2 * pi) / 2
    tensor(-0.9189)
    >>> policy.log_prob(torch.tensor([1.0])).isfinite()
    tensor(True)

    Args:
        loc: ``[*B, act]`` mean before the tanh.
        scale: ``[*B, act]`` (or broadcastable) standard deviation > 0 before the tanh.
        low: ``[act]`` or scalar lower bound of the action space.
        high: ``[act]`` or scalar upper bound.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """``[*B]`` log-density (nats) of ``[*B, act]`` actions; finite for any finite action."""
        unit = self._unit(value).clamp(-1.0 + BOUNDARY, 1.0 - BOUNDARY)
        log_slope = torch.log1p(-unit.square()).sum(-1)
        return self._normal_log_prob(unit.atanh(), self.loc) - log_slope - self._log_half_range()

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """``[*sample_shape, *B, act]`` reparametrised samples inside the bounds."""
        return self._scaled((self.loc + self._noise(sample_shape)).tanh())


class Categorical(_Categorical):
    """A categorical policy that takes actions of shape ``[*B]`` or ``[*B, 1]``.

    torch's own would broadcast ``[B, 1]`` against ``[B]`` to ``[B, B]``.

    >>> policy = Categorical(logits=torch.zeros(3, 2))
    >>> policy.log_prob(torch.zeros(3, 1, dtype=torch.int64))
    tensor([-0.6931, -0.6931, -0.6931])

    Args:
        logits: ``[*B, n]`` unnormalised log-probabilities.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=at_least_float32(logits), validate_args=False)

    @property
    def deterministic_sample(self) -> Tensor:
        """``[*B]`` the most probable action."""
        return self.logits.argmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """``[*B]`` log-probability (nats) of integer actions.

        Raises:
            ValueError: if ``value`` ends neither in ``*B`` nor in ``*B, 1``.
        """
        if value.shape[-self.logits.ndim :] == (*self.batch_shape, 1):
            value = value.squeeze(-1)
        if value.shape[value.ndim - len(self.batch_shape) :] != self.batch_shape:
            raise ValueError(
                f"action must have shape {tuple(self.batch_shape)} or {(*self.batch_shape, 1)}, "
                f"got {tuple(value.shape)}"
            )
        log_prob: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]
        return log_prob
