r"""The equations of Implicit Q-Learning and its family as pure tensor functions.

Kostrikov, Nair and Levine 2021, "Offline Reinforcement Learning with Implicit Q-Learning"
(arXiv:2110.06169), unless a function names another source. ``*B`` is any batch shape, the same one
in every argument of a call: shapes are compared, never broadcast, because ``[B, 1]`` against ``[B]``
would silently give ``[B, B]``.
No function here owns parameters, reads a device value on the host or draws a random number.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, l1_loss, mse_loss, smooth_l1_loss

from iql_plugins.ranges import EXPECTILE, HUBER, NON_NEGATIVE, POSITIVE, QUANTILE, TEMPERATURE, choice, huber_threshold

__all__ = [
    "LOSS_FUNCTION",
    "Health",
    "IQLLosses",
    "LossFunction",
    "Reduction",
    "advantage",
    "advantage_weight",
    "beyond_noise",
    "critic_disagreement",
    "ddpg_bc_loss",
    "distance",
    "effective_sample_size",
    "entropy",
    "expected_q",
    "expectile_loss",
    "exponential_loss",
    "gumbel_loss",
    "health",
    "iql_losses",
    "minimum_over_critics",
    "quantile_loss",
    "qvalue_loss",
    "reduce_loss",
    "sparse_loss",
    "sparse_weight",
    "td_error",
    "td_lambda_target",
    "td_target",
    "weight_moments",
    "weighted_log_likelihood",
]

#: Or ``"huber_20"``, with any threshold, see :func:`distance`.
LossFunction = Literal["l1", "l2", "smooth_l1"]
Reduction = Literal["mean", "sum", "none"]

LOSS_FUNCTION = choice(LossFunction) | HUBER
_DISTANCES = {"l1": l1_loss, "l2": mse_loss, "smooth_l1": smooth_l1_loss}


def _check_shapes(expected: torch.Size, expected_name: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"{name} must have the shape of {expected_name}, {tuple(expected)}, "
                f"got {tuple(tensor.shape)}; squeeze or unsqueeze it, nothing is broadcast"
            )


def expectile_loss(diff: Tensor, expectile: float) -> Tensor:
    r"""Asymmetric squared error whose minimiser is the ``expectile`` of the data.

    .. math:: L_2^\tau(u) = |\tau - \mathbb{1}(u < 0)|\, u^2

    Equation 5 of the paper with :math:`u = Q(s, a) - V(s)`: ``critic.py``, lines 8 to 10, of
    github.com/ikostrikov/implicit_q_learning, its authors' code.

    >>> expectile_loss(torch.tensor([2.0, -2.0]), expectile=0.75)  # V too low by 2, V too high by 2
    tensor([3., 1.])

    Args:
        diff: ``[*B]`` target minus prediction, ``Q(s, a) - V(s)``, in return units. Gradients flow
            through all of it: detach Q first.
        expectile: in (0, 1]; 0.5 is half the squared error.

    Returns:
        ``[*B]`` unreduced losses, in squared return units, with ``diff``'s dtype.

    Raises:
        ValueError: if ``expectile`` is outside (0, 1].
    """
    EXPECTILE.check("expectile", expectile)
    weight = torch.where(diff > 0, expectile, 1.0 - expectile)
    return (weight * diff.square()).to(diff.dtype)


def quantile_loss(diff: Tensor, quantile: float) -> Tensor:
    r"""Asymmetric absolute error whose minimiser is the ``quantile`` of the data: the pinball loss.

    .. math:: |\tau - \mathbb{1}(u < 0)|\, |u|

    Koenker and Bassett 1978, with :math:`u = Q(s, a) - V(s)`. IDQL (Hansen-Estruch et al. 2023, arXiv:2304.10573)
    compares it with the expectile: ``jaxrl5/agents/ddpm_iql/ddpm_iql_learner.py``, lines 21 to 23, of
    github.com/philippe-eecs/IDQL.

    >>> quantile_loss(torch.tensor([2.0, -2.0]), quantile=0.75)  # V too low by 2, V too high by 2
    tensor([1.5000, 0.5000])

    Args:
        diff: ``[*B]`` target minus prediction, ``Q(s, a) - V(s)``, in return units. Gradients flow
            through all of it: detach Q first.
        quantile: in (0, 1); 0.5 is half the absolute error.

    Returns:
        ``[*B]`` unreduced losses, in return units, with ``diff``'s dtype.

    Raises:
        ValueError: if ``quantile`` is outside (0, 1).
    """
    QUANTILE.check("quantile", quantile)
    weight = torch.where(diff > 0, quantile, 1.0 - quantile)
    return (weight * diff.abs()).to(diff.dtype)


def gumbel_loss(
    diff: Tensor, temperature: float, largest_exponent: float = 7.0, *, mask: Tensor | None = None
) -> Tensor:
    r"""Gumbel regression, of Extreme Q-Learning, whose minimiser is a soft maximum of the data.

    .. math:: e^{z - m} - z e^{-m} - e^{-m}, \qquad z = \min(u / \beta_V,\, c), \quad m = \max(\max_B z,\, -1)

    Garg et al. 2023 (arXiv:2301.02328), with :math:`u = Q(s, a) - V(s)`: ``offline/critic.py``, lines 10 to 21, of
    github.com/Div99/XQL. Without clipping V is :math:`\beta_V \log \mathbb{E}\, e^{Q / \beta_V}`. The factor
    :math:`e^{-m}` of the whole batch keeps the numbers small; where a batch is split, each part has its own.

    >>> gumbel_loss(torch.tensor([1.0, 0.0]), temperature=1.0)  # m = 1: 1 - 2 / e, and 1 / e - 1 / e
    tensor([0.2642, 0.0000])

    Args:
        diff: ``[*B]`` target minus prediction, ``Q(s, a) - V(s)``, in return units. Gradients flow
            through it where z is not clipped, and stop at m: detach Q first.
        temperature: :math:`\beta_V` > 0, in return units; the smaller, the closer V is to the maximum.
        largest_exponent: c > 0.
        mask: ``[*B]`` bool, True where a sample counts in m.

    Returns:
        ``[*B]`` unreduced losses >= 0, without a unit, with ``diff``'s dtype.

    Raises:
        ValueError: if ``temperature`` or ``largest_exponent`` is not positive and finite, or a shape differs.
    """
    POSITIVE.check("temperature", temperature)
    POSITIVE.check("largest_exponent", largest_exponent)
    exponent = (diff / temperature).clamp(max=largest_exponent)
    largest = _largest_exponent(exponent, mask)
    return (exponent - largest).exp() - (exponent + 1.0) * (-largest).exp()


def _largest_exponent(exponent: Tensor, mask: Tensor | None) -> Tensor:
    """``[]`` of a batch, at least -1, without gradient."""
    _check_shapes(exponent.shape, "diff", mask=mask)
    exponent = exponent.detach()
    if mask is not None:
        exponent = exponent.masked_fill(~mask, -1.0)
    return exponent.amax().clamp(min=-1.0)


def sparse_loss(diff: Tensor, value: Tensor, alpha: float) -> Tensor:
    r"""The loss of V of Sparse Q-Learning, under which bad actions do not count at all.

    .. math:: \mathbb{1}(t > 0)\, t^2 + V(s) / \alpha, \qquad t = u / 2\alpha + 1

    Xu et al. 2023 (arXiv:2303.15810), with :math:`u = Q(s, a) - V(s)`: ``critic.py``, lines 18 to 21, of
    github.com/ryanxhr/IVR. At the minimum :math:`\mathbb{E} \max(t, 0) = 1`.

    >>> sparse_loss(torch.tensor([2.0, -3.0]), torch.tensor([1.0, 1.0]), alpha=1.0)  # t = 2 and -1/2
    tensor([5., 1.])

    Args:
        diff: ``[*B]`` target minus prediction, ``Q(s, a) - V(s)``, in return units. Gradients flow
            through all of it: detach Q first.
        value: ``[*B]`` V(s), in return units; gradients flow through it.
        alpha: :math:`\alpha` > 0, in return units; the smaller, the closer V is to the maximum.

    Returns:
        ``[*B]`` unreduced losses, without a unit, with ``diff``'s dtype.

    Raises:
        ValueError: if ``alpha`` is not positive and finite, or the shapes differ.
    """
    POSITIVE.check("alpha", alpha)
    _check_shapes(diff.shape, "diff", value=value)
    return (diff / (2.0 * alpha) + 1.0).clamp(min=0.0).square() + value / alpha


def sparse_weight(advantage: Tensor, max_weight: float = 100.0) -> Tensor:
    r"""Weight of a dataset action in the policy's regression of Sparse Q-Learning.

    .. math:: w = \operatorname{clip}\big(A(s, a),\, 0,\, w_{\max}\big)

    The authors' code, ``actor.py``, lines 15 to 21, of github.com/ryanxhr/IVR; the paper (see :func:`sparse_loss`)
    has :math:`\max(1 + A / 2\alpha,\, 0)`.

    >>> sparse_weight(torch.tensor([-1.0, 2.0, 1e6]))
    tensor([  0.,   2., 100.])

    Args:
        advantage: ``[*B]`` in return units. Detach it: the weight is a constant of the policy's loss.
        max_weight: the largest weight, > 0.

    Returns:
        ``[*B]`` weights in [0, ``max_weight``], with ``advantage``'s dtype.

    Raises:
        ValueError: if ``max_weight`` is not positive and finite.
    """
    POSITIVE.check("max_weight", max_weight)
    return advantage.clamp(0.0, max_weight)


def exponential_loss(diff: Tensor, value: Tensor, alpha: float, *, mask: Tensor | None = None) -> Tensor:
    r"""The loss of V of Exponential Q-Learning, whose minimiser is a soft maximum of the data.

    .. math:: e^{t - m} + e^{-m}\, V(s) / \alpha, \qquad t = \min(u / \alpha,\, 5), \quad m = \max(\max_B t,\, -1)

    Xu et al. 2023 (arXiv:2303.15810), with :math:`u = Q(s, a) - V(s)`: ``critic.py``, lines 22 to 28, of
    github.com/ryanxhr/IVR. Without clipping V is :math:`\alpha \log \mathbb{E}\, e^{Q / \alpha}`, as that of
    :func:`gumbel_loss`, from whose gradient this one differs where t is clipped.

    >>> exponential_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), alpha=1.0)  # m = 1: 1, and 2 / e
    tensor([1.0000, 0.7358])

    Args:
        diff: ``[*B]`` target minus prediction, ``Q(s, a) - V(s)``, in return units. Gradients flow
            through it where t is not clipped, and stop at m: detach Q first.
        value: ``[*B]`` V(s), in return units; gradients flow through it.
        alpha: :math:`\alpha` > 0, in return units; the smaller, the closer V is to the maximum.
        mask: ``[*B]`` bool, True where a sample counts in m.

    Returns:
        ``[*B]`` unreduced losses, without a unit, with ``diff``'s dtype.

    Raises:
        ValueError: if ``alpha`` is not positive and finite, or a shape differs.
    """
    POSITIVE.check("alpha", alpha)
    _check_shapes(diff.shape, "diff", value=value)
    exponent = (diff / alpha).clamp(max=5.0)
    largest = _largest_exponent(exponent, mask)
    return (exponent - largest).exp() + (-largest).exp() * value / alpha


def advantage_weight(advantage: Tensor, temperature: float | Tensor, max_weight: float = 100.0) -> Tensor:
    r"""Weight of a dataset action in the policy's regression.

    .. math:: w = \min\big(e^{\beta A(s, a)},\, w_{\max}\big), \qquad A(s, a) = Q(s, a) - V(s)

    Equation 7 of the paper, with the clip of its authors' code, ``actor.py``, lines 15 to 16, of
    github.com/ikostrikov/implicit_q_learning. The exponent is clamped before it is exponentiated, so
    nothing overflows in any dtype.

    >>> advantage_weight(torch.tensor([0.0, 1.0, 1e6]), temperature=3.0)
    tensor([  1.0000,  20.0855, 100.0000])

    Args:
        advantage: ``[*B]`` in return units. Detach it: the weight is a constant of the policy's loss.
        temperature: inverse temperature :math:`\beta` >= 0, per return unit; 0 is behaviour cloning. A tensor ``[]`` is
            not checked, and must be above 0.
        max_weight: the largest weight, > 0.

    Returns:
        ``[*B]`` weights in [0, ``max_weight``], with ``advantage``'s dtype.

    Raises:
        ValueError: if ``temperature`` is negative or not finite, or ``max_weight`` not positive.
    """
    if not isinstance(temperature, Tensor):
        TEMPERATURE.check("temperature", temperature)
    POSITIVE.check("max_weight", max_weight)
    if _is_zero(temperature):
        # 0 * inf is not a number, and every action weighs the same whatever its advantage.
        return torch.full_like(advantage, min(1.0, max_weight))
    largest = math.log(max_weight)
    exponent = temperature * advantage
    # exp(log(100)) is not exactly 100 in float32: the clipped side takes the constant itself.
    return torch.where(exponent >= largest, max_weight, exponent.clamp(max=largest).exp())


def _is_zero(temperature: float | Tensor) -> bool:
    return not isinstance(temperature, Tensor) and temperature == 0.0


def critic_disagreement(target_q: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""How far critics are apart: the root mean square of their differences, over the batch and all pairs of critics.

    .. math:: \sigma = \sqrt{\mathbb{E}_B\, \tfrac{2}{N (N - 1)} \sum_{i < j} (Q_i - Q_j)^2}

    That of a pair is twice the unbiased variance over critics; of two critics it is :math:`(Q_1 - Q_2)^2`. They are
    trained alike on the same data, so what they differ in is error.

    >>> critic_disagreement(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))  # of 9 and 16
    tensor(3.5355)

    Args:
        target_q: ``[N, *B]`` values of N critics.
        mask: ``[*B]`` bool, True where a sample counts.

    Returns:
        ``[]`` in return units, detached; 0 for a single critic, which tells nothing of its error.
    """
    q = target_q.detach()
    variance = q.var(0) if len(q) > 1 else torch.zeros_like(q[0])
    return reduce_loss(2.0 * variance, "mean", mask=mask).sqrt()


def beyond_noise(advantage: Tensor, disagreement: Tensor, noise_threshold: float) -> Tensor:
    r"""What of an advantage the critics' disagreement does not explain, by soft thresholding.

    .. math:: u' = \operatorname{sign}(u) \max(|u| - \kappa \sigma,\, 0)

    Donoho and Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage", with the noise's scale as the critics
    tell it.

    >>> beyond_noise(torch.tensor([3.0, 0.5, -2.0]), torch.tensor(1.0), noise_threshold=1.0)
    tensor([ 2.,  0., -1.])

    Args:
        advantage: ``[*B]`` u, in return units.
        disagreement: ``[]`` σ of :func:`critic_disagreement`.
        noise_threshold: κ >= 0; 0 leaves all as it is.

    Returns:
        ``[*B]`` in return units.

    Raises:
        ValueError: if ``noise_threshold`` is negative or not finite.
    """
    NON_NEGATIVE.check("noise_threshold", noise_threshold)
    return advantage.sign() * (advantage.abs() - noise_threshold * disagreement).clamp(min=0.0)


def weight_moments(action_weight: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    r"""The means of the actions' weights and of their squares, :math:`\mathbb{E}\, w` and :math:`\mathbb{E}\, w^2`.

    Args:
        action_weight: ``[*B]`` w >= 0, of the actions in the policy's loss.
        weight: ``[*B]`` importance weights >= 0 of the samples, by which both means are taken: they are those of the
            data that the batch stands for.
        mask: ``[*B]`` bool, True where a sample counts.

    Returns:
        ``[2]``, detached.

    Raises:
        ValueError: if a shape differs.
    """
    powers = action_weight.detach(), action_weight.detach().square()
    return torch.stack([reduce_loss(power, "mean", weight=weight, mask=mask) for power in powers])


def effective_sample_size(moments: Tensor) -> Tensor:
    r"""The share of a batch that teaches the policy.

    .. math:: \frac{(\sum_i w_i)^2}{n \sum_i w_i^2} = \frac{(\mathbb{E}\, w)^2}{\mathbb{E}\, w^2}

    Kong, Liu and Wong 1994. It is :math:`e^{-D}`, where D is the Rényi divergence of order 2 of the weighted data from
    the data.

    >>> effective_sample_size(weight_moments(torch.tensor([3.0, 1.0, 0.0, 0.0])))  # 4² / (4 * 10)
    tensor(0.4000)

    Args:
        moments: ``[2]`` of :func:`weight_moments`, or their mean over parts of a batch.

    Returns:
        ``[]`` in [0, 1]; 0 where all weights are too small for their squares to be numbers.
    """
    mean, mean_square = moments.unbind()
    return mean.square() / mean_square.clamp(min=torch.finfo(moments.dtype).tiny)


def weighted_log_likelihood(log_prob: Tensor, weight: Tensor) -> Tensor:
    r"""The policy's loss per sample: negative log-likelihood, weighted by the advantage.

    .. math:: -w\, \log \pi(a \mid s)

    >>> weighted_log_likelihood(torch.tensor([-0.5]), torch.tensor([2.0]))
    tensor([1.])

    Args:
        log_prob: ``[*B]`` log-density (nats) of the dataset action; gradients flow through it.
        weight: ``[*B]`` of :func:`advantage_weight`; gradients stop here.

    Returns:
        ``[*B]`` unreduced losses.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(log_prob.shape, "log_prob", weight=weight)
    return -(weight.detach() * log_prob)


def ddpg_bc_loss(q: Tensor, log_prob: Tensor, bc_coefficient: float, *, mask: Tensor | None = None) -> Tensor:
    r"""The policy's loss per sample that climbs the critics and stays near the data: DDPG+BC.

    .. math:: -\frac{Q(s, \pi(s))}{\mathbb{E}_B |Q(s, \pi(s))|} - \alpha \log \pi(a \mid s)

    Park et al. 2024 (arXiv:2406.09329), with the normalisation of TD3+BC (Fujimoto and Gu 2021):
    ``impls/agents/gciql.py``, lines 92 to 110, of github.com/seohongpark/ogbench. The denominator is of the whole
    batch; where a batch is split, each part has its own.

    >>> ddpg_bc_loss(torch.tensor([1.0, -3.0]), torch.tensor([-1.0, -2.0]), bc_coefficient=1.0)  # mean |Q| is 2
    tensor([0.5000, 3.5000])

    Args:
        q: ``[*B]`` Q(s, π(s)) of the policy's own action, in return units; gradients flow through it to the action, and
            stop at the denominator.
        log_prob: ``[*B]`` log-density (nats) of the dataset action; gradients flow through it.
        bc_coefficient: :math:`\alpha` >= 0, what behaviour cloning counts; the larger, the nearer to the data.
        mask: ``[*B]`` bool, True where a sample counts in the denominator.

    Returns:
        ``[*B]`` unreduced losses.

    Raises:
        ValueError: if ``bc_coefficient`` is negative or not finite, or a shape differs.
    """
    NON_NEGATIVE.check("bc_coefficient", bc_coefficient)
    _check_shapes(q.shape, "q", log_prob=log_prob, mask=mask)
    scale = reduce_loss(q.detach().abs(), "mean", mask=mask) + 1e-6
    return -q / scale - bc_coefficient * log_prob


def expected_q(q: Tensor, probabilities: Tensor) -> Tensor:
    r"""What a policy over discrete actions expects, :math:`\sum_a \pi(a \mid s)\, Q(s, a)`.

    What Q of the policy's action is in :func:`ddpg_bc_loss`, for an index has no gradient. As in discrete SAC
    (Christodoulou 2019, arXiv:1910.07207): ``sacd/agent/sacd.py``, lines 115 to 125, of
    github.com/toshikwa/sac-discrete.pytorch.

    >>> expected_q(torch.tensor([[1.0, 5.0]]), torch.tensor([[0.75, 0.25]]))
    tensor([2.])

    Args:
        q: ``[*B, n]`` Q(s, ·) of all actions, in return units. Gradients stop here.
        probabilities: ``[*B, n]`` of the policy; gradients flow through them.

    Returns:
        ``[*B]`` in return units.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(q.shape, "q", probabilities=probabilities)
    return (q.detach() * probabilities).sum(-1)


def minimum_over_critics(q: Tensor) -> Tensor:
    r"""Clipped double Q: the smallest of the critics' values, :math:`\min_i Q_i(s, a)`.

    >>> minimum_over_critics(torch.tensor([[1.0, 5.0], [3.0, 4.0]]))
    tensor([1., 4.])

    Args:
        q: ``[N, *B]`` values of N critics, in return units.

    Returns:
        ``[*B]``.
    """
    return q.amin(0)


def td_target(reward: Tensor, next_value: Tensor, terminated: Tensor, discount: Tensor | float) -> Tensor:
    r"""One-step (or n-step) bootstrapped target of Q.

    .. math:: y = r + \gamma\,(1 - \text{terminated})\, V(s')

    Equation 6 of the paper. A time limit is not a terminal state: pass ``terminated``, not ``done``.

    >>> td_target(torch.tensor([1.0, 1.0]), torch.tensor([10.0, 10.0]), torch.tensor([False, True]), 0.9)
    tensor([10.,  1.])

    Args:
        reward: ``[*B]``; for an n-step transition the discounted sum of n rewards.
        next_value: ``[*B]`` V(s'), ignored (even when not finite) where terminated. Gradients stop here.
        terminated: ``[*B]`` bool, whether s' is a terminal state.
        discount: :math:`\gamma`, or ``[*B]`` with :math:`\gamma^n` of each transition.

    Returns:
        ``[*B]`` targets in return units, without gradient to ``next_value``.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(reward.shape, "reward", next_value=next_value, terminated=terminated)
    if isinstance(discount, Tensor) and discount.ndim > 0:
        _check_shapes(reward.shape, "reward", discount=discount)
    return reward + discount * next_value.detach().masked_fill(terminated, 0.0)


def td_lambda_target(
    reward: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    discount: Tensor | float,
    lmbda: Tensor | float,
) -> Tensor:
    r"""TD(:math:`\lambda`) target of Q along trajectories; :math:`\lambda = 1` is TD(1).

    .. math::
        y_t = r_t + \gamma_t (1 - \text{terminated}_t)
              \big[(1 - \lambda_t) V(s_{t+1}) + \lambda_t y_{t+1}\big], \qquad
        \lambda_t = \lambda\,(1 - \text{done}_t), \quad \lambda_{T-1} = 0

    Sutton and Barto 2018, equation 12.18, with expected values. Where an episode is cut (``done``
    without ``terminated``, or the end of the slice) the target bootstraps from V.

    >>> td_lambda_target(
    ...     reward=torch.tensor([1.0, 1.0]), next_value=torch.tensor([4.0, 6.0]),
    ...     done=torch.tensor([False, False]), terminated=torch.tensor([False, False]),
    ...     discount=0.5, lmbda=0.5,
    ... )  # y_1 = 1 + 0.5 * 6 = 4; y_0 = 1 + 0.5 * (0.5 * 4 + 0.5 * 4) = 3
    tensor([3., 4.])

    Args:
        reward: ``[*B, T]``, consecutive steps along the last dimension.
        next_value: ``[*B, T]`` V(s'), ignored where terminated. Gradients stop here.
        done: ``[*B, T]`` bool, whether the episode ended with this step, for any reason.
        terminated: ``[*B, T]`` bool, whether s' is a terminal state.
        discount: :math:`\gamma`, or ``[*B, T]`` with the discount of each step.
        lmbda: :math:`\lambda` in [0, 1].

    Returns:
        ``[*B, T]`` targets in return units, without gradient to ``next_value``.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(reward.shape, "reward", next_value=next_value, done=done, terminated=terminated)
    if isinstance(discount, Tensor) and discount.ndim > 0:
        _check_shapes(reward.shape, "reward", discount=discount)
    last = torch.zeros_like(done)
    last[..., -1] = True
    cut = done | last
    bootstrap = discount * next_value.detach().masked_fill(terminated, 0.0)
    target = reward + torch.where(cut, bootstrap, bootstrap * (1 - lmbda))
    decay = torch.as_tensor(discount * lmbda).to(reward).expand_as(reward).masked_fill(cut, 0.0)
    return _reverse_scan(target, decay)


def _reverse_scan(x: Tensor, decay: Tensor) -> Tensor:
    """Solves ``y[t] = x[t] + decay[t] * y[t + 1]`` along the last dimension in log2(T) vector steps."""
    length = x.shape[-1]
    shift = 1
    while shift < length:
        # Entry t has summed [t, t + shift); it takes over what entry t + shift has summed.
        later_x = torch.nn.functional.pad(x[..., shift:], (0, shift))
        later_decay = torch.nn.functional.pad(decay[..., shift:], (0, shift))
        x = x + decay * later_x
        decay = decay * later_decay
        shift *= 2
    return x


def distance(prediction: Tensor, target: Tensor, loss_function: LossFunction | str) -> Tensor:
    """Elementwise distance: ``"l1"`` |d|, ``"l2"`` d², ``"smooth_l1"`` d²/2 below 1 and |d| - 1/2 above.

    ``"huber_20"`` is d²/2 below 20 and 20 |d| - 200 above, the critics' of Extreme Q-Learning: ``offline/critic.py``,
    lines 126 and 186 to 203, of github.com/Div99/XQL, its authors' code. Any threshold >= 1e-6 may stand for 20.

    >>> d = torch.tensor([0.5, 3.0])
    >>> [distance(d, torch.zeros(2), name).tolist() for name in ("l1", "l2", "smooth_l1", "huber_2")]
    [[0.5, 3.0], [0.25, 9.0], [0.125, 2.5], [0.125, 4.0]]

    Args:
        prediction: ``[*B]``.
        target: ``[*B]``.
        loss_function: which distance.

    Returns:
        ``[*B]`` unreduced.

    Raises:
        ValueError: for another name, or if the shapes differ.
    """
    LOSS_FUNCTION.check("loss_function", loss_function)
    _check_shapes(prediction.shape, "prediction", target=target)
    threshold = huber_threshold(loss_function)
    if threshold is not None:
        return huber_loss(prediction, target, reduction="none", delta=threshold)
    return _DISTANCES[loss_function](prediction, target, reduction="none")


def qvalue_loss(q: Tensor, target: Tensor, loss_function: LossFunction | str) -> Tensor:
    r"""The critics' loss per sample, summed over critics: :math:`\sum_i d(Q_i(s, a), y)`.

    Summed, not averaged, as in the authors' code: two critics have twice the loss of one.

    >>> qvalue_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([4.0]), "l2")
    tensor([13.])

    Args:
        q: ``[N, *B]`` predictions of N critics, in return units; gradients flow through them.
        target: ``[*B]`` of :func:`td_target` or :func:`td_lambda_target`; gradients stop here.
        loss_function: see :func:`distance`.

    Returns:
        ``[*B]`` unreduced.

    Raises:
        ValueError: for an unknown ``loss_function``, or if ``target`` has not the shape of a critic's values.
    """
    _check_shapes(q.shape[1:], "q without its first dimension", target=target)
    return distance(q, target.detach().expand_as(q), loss_function).sum(0)


def td_error(q: Tensor, target: Tensor) -> Tensor:
    r"""Priority of a sample: the largest squared TD error over the critics, :math:`\max_i (Q_i - y)^2`.

    >>> td_error(torch.tensor([[1.0], [2.0]]), torch.tensor([4.0]))
    tensor([9.])

    Args:
        q: ``[N, *B]`` predictions of N critics.
        target: ``[*B]``.

    Returns:
        ``[*B]`` in squared return units, detached.

    Raises:
        ValueError: if ``target`` has not the shape of a critic's values.
    """
    _check_shapes(q.shape[1:], "q without its first dimension", target=target)
    errors = (q.detach() - target.detach()).square().amax(0)
    # An infinite priority would be drawn for ever.
    return errors.clamp(max=torch.finfo(errors.dtype).max)


def reduce_loss(
    loss: Tensor, reduction: Reduction = "mean", *, weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""Reduces per-sample losses, with importance weights and a validity mask.

    ``"mean"`` is :math:`\sum_i m_i w_i l_i / \sum_i m_i w_i`, ``"sum"`` the numerator alone, ``"none"``
    :math:`m_i w_i l_i`. Where nothing is valid the result is 0.

    >>> reduce_loss(torch.tensor([1.0, 3.0]), weight=torch.tensor([3.0, 1.0]))
    tensor(1.5000)

    Args:
        loss: ``[*B]``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``[*B]`` importance weights >= 0. Gradients stop here.
        mask: ``[*B]`` bool, True where the sample counts. A masked loss may be NaN: it is selected
            away, not multiplied by zero.

    Returns:
        ``[]``, or ``[*B]`` with ``"none"``.

    Raises:
        ValueError: for another ``reduction``, or if the shapes differ.
    """
    choice(Reduction).check("reduction", reduction)
    _check_shapes(loss.shape, "loss", weight=weight, mask=mask)
    if mask is not None:
        loss = loss.masked_fill(~mask, 0.0)
    if weight is not None:
        weight = weight.detach()
        if mask is not None:
            weight = weight.masked_fill(~mask, 0.0)
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight is None and mask is None:
        return loss.mean()
    total = weight.sum() if weight is not None else mask.sum() if mask is not None else loss.new_zeros(())
    return loss.sum() / torch.where(total > 0, total, 1)


class IQLLosses(NamedTuple):
    """What one evaluation of the losses returns, in the order of ``IQLLoss.out_keys``.

    Attributes:
        loss_actor: ``[]`` (``[*B]`` with ``reduction="none"``), trains the policy alone.
        loss_qvalue: likewise, trains the critics alone.
        loss_value: likewise, trains V alone.
        entropy: ``[]``, minus the mean log-probability of the dataset's actions (nats), detached.
        td_error: ``[*B]`` priorities, detached; see :func:`td_error`.
    """

    loss_actor: Tensor
    loss_qvalue: Tensor
    loss_value: Tensor
    entropy: Tensor
    td_error: Tensor


def iql_losses(
    q: Tensor,
    target_q: Tensor,
    value: Tensor,
    next_value: Tensor,
    log_prob: Tensor,
    reward: Tensor,
    terminated: Tensor,
    *,
    discount: Tensor | float = 0.99,
    expectile: float = 0.7,
    temperature: float = 3.0,
    max_weight: float = 100.0,
    loss_function: LossFunction | str = "l2",
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> IQLLosses:
    r"""The three losses of IQL from plain tensors: the whole algorithm in one call.

    The defaults are the paper's for locomotion. All three losses are taken at the same parameters;
    add them up and one backward pass trains all networks, because each loss reaches only its own.

    >>> from torch import tensor
    >>> losses = iql_losses(
    ...     q=tensor([[2.0], [4.0]]), target_q=tensor([[3.0], [5.0]]), value=tensor([1.0]),
    ...     next_value=tensor([10.0]), log_prob=tensor([-0.5]), reward=tensor([1.0]),
    ...     terminated=tensor([False]), discount=0.5, expectile=0.7, temperature=1.0,
    ... )
    >>> losses.loss_value  # 0.7 * (min(3, 5) - 1)**2
    tensor(2.8000)
    >>> losses.loss_qvalue  # y = 1 + 0.5 * 10 = 6; (2 - 6)**2 + (4 - 6)**2
    tensor(20.)
    >>> losses.loss_actor  # exp(1.0 * (3 - 1)) * 0.5
    tensor(3.6945)

    Args:
        q: ``[N, *B]`` Q_i(s, a) of the critics that are trained.
        target_q: ``[N, *B]`` Q_i(s, a) of the target critics. Gradients stop here.
        value: ``[*B]`` V(s). Trained by ``loss_value`` alone.
        next_value: ``[*B]`` V(s'). Gradients stop here.
        log_prob: ``[*B]`` log-probability (nats) of the dataset's action.
        reward: ``[*B]``.
        terminated: ``[*B]`` bool.
        discount: see :func:`td_target`.
        expectile: see :func:`expectile_loss`.
        temperature: see :func:`advantage_weight`.
        max_weight: see :func:`advantage_weight`.
        loss_function: see :func:`distance`.
        reduction: see :func:`reduce_loss`.
        weight: ``[*B]`` importance weights, for all three losses.
        mask: ``[*B]`` bool, for all outputs; a masked ``td_error`` is 0. Masked *inputs* of the
            networks that are not finite must be replaced before the networks see them: a NaN
            activation makes a NaN gradient even where the loss is selected away.

    Returns:
        The reduced losses, the entropy and the priorities.

    Raises:
        ValueError: for a hyper-parameter out of range, or if a shape differs.
    """
    target = td_target(reward, next_value, terminated, discount)
    _check_shapes(q.shape, "q", target_q=target_q)
    diff = advantage(target_q, value)
    weights = advantage_weight(diff.detach(), temperature, max_weight)
    errors = td_error(q, target)
    return IQLLosses(
        reduce_loss(weighted_log_likelihood(log_prob, weights), reduction, weight=weight, mask=mask),
        reduce_loss(qvalue_loss(q, target, loss_function), reduction, weight=weight, mask=mask),
        reduce_loss(expectile_loss(diff, expectile), reduction, weight=weight, mask=mask),
        entropy(log_prob, mask),
        errors if mask is None else errors.masked_fill(~mask, 0.0),
    )


def advantage(target_q: Tensor, value: Tensor) -> Tensor:
    r"""Advantage of the dataset's action, :math:`A = \min_i \hat Q_i(s, a) - V(s)`.

    >>> advantage(torch.tensor([[3.0], [5.0]]), torch.tensor([1.0]))
    tensor([2.])

    Args:
        target_q: ``[N, *B]`` of the target critics. Gradients stop here.
        value: ``[*B]`` V(s); gradients flow through it.

    Returns:
        ``[*B]`` in return units.

    Raises:
        ValueError: if ``value`` has not the shape of a critic's values.
    """
    minimum = minimum_over_critics(target_q.detach())
    _check_shapes(minimum.shape, "target_q without its first dimension", value=value)
    return minimum - value


def entropy(log_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """Minus the mean log-probability of the dataset's actions: ``[]``, nats, detached.

    >>> entropy(torch.tensor([-1.0, -3.0]), torch.tensor([True, False]))
    tensor(1.)

    Args:
        log_prob: ``[*B]``.
        mask: ``[*B]`` bool, True where the sample counts.
    """
    return reduce_loss(-log_prob.detach(), "mean", mask=mask)


class Health(NamedTuple):
    """What tells whether a training is well, beside its losses.

    Attributes:
        share_at_max_weight: ``[]``, share of the samples whose weight is clipped; above a few percent the temperature
            is too high for the scale of the returns.
        effective_sample_size: ``[]``, (Σw)² / (B Σw²) in [0, 1]: the share of the batch that teaches the policy.
        share_value_above_q: ``[]``, share of the samples with V(s) above min Q̂(s, a): more than half of them for an
            expectile above 1/2, the more the higher it is.
        mean_value: ``[]``, in return units.
        mean_qvalue: ``[]``, of min Q̂(s, a), in return units.
        temperature: ``[]``, β; objectives that do without leave it as it is.
        critic_disagreement: ``[]``, σ of :func:`critic_disagreement`, in return units.
        signal_to_noise: ``[]``, the standard deviation of the advantages over σ; 0 where critics do not differ, as one
            alone does not. Where it is about 1 advantages are the critics' errors.
    """

    share_at_max_weight: Tensor
    effective_sample_size: Tensor
    share_value_above_q: Tensor
    mean_value: Tensor
    mean_qvalue: Tensor
    temperature: Tensor
    critic_disagreement: Tensor
    signal_to_noise: Tensor


def health(
    target_q: Tensor,
    value: Tensor,
    *,
    temperature: float | Tensor = 3.0,
    max_weight: float = 100.0,
    weight: Tensor | None = None,
    signal: Tensor | None = None,
    mask: Tensor | None = None,
) -> Health:
    """The health of a batch.

    >>> batch = torch.tensor([[3.0, 0.0, 0.5, 0.0]]), torch.ones(4)
    >>> health(*batch, temperature=0.0).effective_sample_size  # all weigh the same
    tensor(1.)
    >>> health(*batch, temperature=10.0).share_at_max_weight  # exp(10 * 2) is clipped, the others are below 1
    tensor(0.2500)
    >>> health(*batch).share_value_above_q
    tensor(0.7500)
    >>> health(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([2.0, 2.0])).signal_to_noise  # 0 and -2; 1 apart
    tensor(1.)

    Args:
        target_q: ``[N, *B]`` of the target critics.
        value: ``[*B]`` V(s).
        temperature: see :func:`advantage_weight`.
        max_weight: see :func:`advantage_weight`.
        weight: ``[*B]`` >= 0, of another objective, instead of :func:`advantage_weight`'s.
        signal: ``[*B]`` what is exponentiated in the place of the advantage, see :func:`beyond_noise`.
        mask: ``[*B]`` bool, True where a sample counts.

    Returns:
        All detached.

    Raises:
        ValueError: as :func:`advantage` and :func:`advantage_weight`.
    """
    diff = advantage(target_q, value).detach()
    tiny = torch.finfo(diff.dtype).tiny

    def largest(quantity: Tensor) -> Tensor:
        return (quantity if mask is None else quantity.masked_fill(~mask, -math.inf)).amax()

    # Relative to the largest weight: all of them may be too small for their squares to be numbers.
    if weight is None:
        signal = diff if signal is None else signal
        weight = advantage_weight(signal, temperature, max_weight)
        limit = math.log(max_weight)
        log_weight = torch.zeros_like(diff) if _is_zero(temperature) else (temperature * signal).clamp(max=limit)
        relative = (log_weight - largest(log_weight)).exp()
    else:
        relative = weight / largest(weight).clamp(min=tiny)

    def mean(quantity: Tensor) -> Tensor:
        return reduce_loss(quantity, "mean", mask=mask)

    noise = critic_disagreement(target_q, mask=mask)
    deviation = mean((diff - mean(diff)).square()).sqrt()
    return Health(
        mean((weight >= max_weight).to(weight.dtype)),
        effective_sample_size(weight_moments(relative, mask=mask)),
        mean((diff < 0).to(weight.dtype)),
        mean(value.detach()),
        mean(minimum_over_critics(target_q.detach())),
        temperature.to(diff.dtype) if isinstance(temperature, Tensor) else diff.new_full((), temperature),
        noise,
        torch.where(noise > 0, deviation / noise.clamp(min=tiny), 0.0).clamp(max=torch.finfo(diff.dtype).max),
    )
