r"""Estimates of a policy's return from other policies' episodes: one pure function each, over numbers of episodes.

``[E, T]`` arrays hold an episode a row, padded at its end: rewards, values and log-ratios there are 0. ``weights``
(``[*W, E]``, of a bootstrap's draws) say how often each episode counts; None counts each once.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

__all__ = [
    "ImportanceSampled",
    "agreement",
    "discounted_length",
    "doubly_robust",
    "effective_episodes",
    "importance_weights",
    "padded",
    "powers",
    "return_units",
    "weighted_importance_sampling",
]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class ImportanceSampled(NamedTuple):
    """What the estimators by importance sampling need of episodes.

    Attributes:
        log_ratios: ``[E, T]`` log π(a|s) - log β(a|s), in nats.
        rewards: ``[E, T]``.
    """

    log_ratios: Array
    rewards: Array


def padded(values: Array, lengths: Array) -> Array:
    """``[E, T]`` from one value a transition, episode after episode; 0 behind each end.

    >>> padded(np.array([1.0, 2.0, 3.0]), np.array([1, 2]))
    array([[1., 0.],
           [2., 3.]])

    Args:
        values: ``[N]``.
        lengths: ``[E]`` transitions of each episode, N in all.
    """
    inside = np.arange(lengths.max()) < lengths[:, None]
    result = np.zeros(inside.shape)
    result[inside] = values
    return result


def importance_weights(log_ratios: Array) -> Array:
    r"""How much likelier the policy makes what happened until each step than the behaviour did.

    .. math:: w_{it} \propto \prod_{k \le t} \frac{\pi(a_{ik} \mid s_{ik})}{\beta(a_{ik} \mid s_{ik})}

    Precup, Sutton and Singh 2000. Each column is divided by its largest weight, which no normalised estimate depends
    on, so that products over long episodes stay finite. Behind its end an episode keeps its last weight.

    >>> importance_weights(np.log([[2.0, 1.0], [1.0, 4.0]]))
    array([[1. , 0.5],
           [0.5, 1. ]])

    Args:
        log_ratios: ``[E, T]`` log π(a|s) - log β(a|s).

    Returns:
        ``[E, T]`` in [0, 1]; a column of zeros where the policy would have done what no episode did.
    """
    total = np.cumsum(log_ratios, axis=1)
    largest = total.max(axis=0)
    result: Array = np.exp(total - np.where(np.isfinite(largest), largest, 0.0))
    return result


def effective_episodes(log_ratios: Array) -> float:
    r"""How many episodes carry an estimate by importance sampling, :math:`(\sum_i w_i)^2 / \sum_i w_i^2` in the end.

    Kong 1992. Near 1, a single episode decides: neither the estimate nor its interval means anything then.

    >>> effective_episodes(np.log([[1.0], [1.0], [2.0]]))
    2.6666666666666665

    Args:
        log_ratios: ``[E, T]``, see :func:`importance_weights`.

    Returns:
        In [1, E]; 0 if no episode has a weight.
    """
    last = importance_weights(log_ratios)[:, -1]
    squares = float((last**2).sum())
    return float(last.sum()) ** 2 / squares if squares else 0.0


def weighted_importance_sampling(episodes: ImportanceSampled, discount: float, weights: Array | None = None) -> Any:
    r"""Per-decision weighted importance sampling: each step's mean reward, by that step's weights.

    .. math:: \hat V = \sum_t \gamma^t \frac{\sum_i w_{it} r_{it}}{\sum_i w_{it}}

    Precup, Sutton and Singh 2000; consistent, not unbiased. What comes after an episode's recorded end counts as 0,
    time limits included.

    In the first step both episodes weigh 1 (rewards 1 and 3), in the second 1 and 3 (rewards 4 and 0):
    2 + 0.5 (1 x 4) / 4 = 2.5.

    >>> episodes = ImportanceSampled(np.log([[1.0, 1.0], [1.0, 3.0]]), np.array([[1.0, 4.0], [3.0, 0.0]]))
    >>> float(weighted_importance_sampling(episodes, 0.5))
    2.5

    Args:
        episodes: with rewards in return units.
        discount: γ.
        weights: ``[*W, E]``, see the module.

    Returns:
        ``[*W]`` in return units; NaN where the weights of a step are all 0.
    """
    shares = importance_weights(episodes.log_ratios)
    count = np.ones(len(shares)) if weights is None else weights
    with np.errstate(invalid="ignore"):
        means = count @ (shares * episodes.rewards) / (count @ shares)
    return means @ powers(discount, shares.shape[1])


def doubly_robust(
    episodes: ImportanceSampled,
    qvalues: Array,
    values: Array,
    next_values: Array,
    discount: float,
    weights: Array | None = None,
) -> Any:
    r"""Weighted doubly robust: the value that a model expects, and importance sampling of what it got wrong.

    .. math:: \hat V = \frac1E \sum_i \hat V(s_{i0}) + \sum_t \gamma^t \frac{
        \sum_i w_{it} \big(r_{it} + \gamma \hat V(s_{i,t+1}) - \hat Q(s_{it}, a_{it})\big)}{\sum_i w_{it}}

    Thomas and Brunskill 2016 (arXiv:1604.00923), after Jiang and Li 2016. Right if either the model or the
    ratios are. A time limit is followed by the model's value, a terminal state by 0.

    One episode of one step that ends in a terminal state, reward 3, of which the model expects 2: 2 + (3 - 2) = 3.

    >>> episodes = ImportanceSampled(np.zeros((1, 1)), np.array([[3.0]]))
    >>> two, none = np.array([[2.0]]), np.array([[0.0]])
    >>> float(doubly_robust(episodes, two, two, none, 0.9))
    3.0

    Args:
        episodes: with rewards in return units.
        qvalues: ``[E, T]`` Q(s, a).
        values: ``[E, T]`` V(s), what the policy expects of Q(s, ·).
        next_values: ``[E, T]`` V(s'), 0 for terminal states.
        discount: γ.
        weights: ``[*W, E]``, see the module.

    Returns:
        ``[*W]`` in return units; NaN where the weights of a step are all 0.
    """
    count = np.ones(len(values)) if weights is None else weights
    errors = ImportanceSampled(episodes.log_ratios, episodes.rewards + discount * next_values - qvalues)
    return count @ values[:, 0] / count.sum(-1) + weighted_importance_sampling(errors, discount, weights)


def agreement(actions: Array, policy_actions: Array, span: Array | None) -> Array:
    r"""How close a policy's actions are to the dataset's.

    .. math:: 1 - \frac1d \sum_j \frac{|a_j - \pi(s)_j|}{high_j - low_j}, \qquad \text{discrete: } \pi(a \mid s)

    >>> agreement(np.array([[0.0, 1.0]]), np.array([[0.5, 1.0]]), np.array([2.0, 2.0]))
    array([0.875])
    >>> agreement(np.array([1, 0]), np.array([[0.0, 1.0], [0.0, 1.0]]), None)
    array([1., 0.])

    Args:
        actions: ``[N, act]``, or ``[N]`` discrete ones, from 0 on.
        policy_actions: ``[N, act]``, or ``[N, n]`` probabilities of discrete ones.
        span: ``[act]`` high - low; None for discrete actions.

    Returns:
        ``[N]`` in [0, 1], 1 where they are the same.
    """
    if span is None:
        chosen: Array = policy_actions[np.arange(len(actions)), actions]
        return chosen
    distance: Array = (np.abs(actions - policy_actions) / span).mean(1)
    return 1.0 - distance


def discounted_length(lengths: Array, terminated: Array, discount: float) -> Array:
    r"""What a constant of 1 at every step is worth in each episode; one that a time limit cut is taken to go on.

    .. math:: L_i = \sum_{t < T_i} \gamma^t + (1 - \text{terminated}_i) \frac{\gamma^{T_i}}{1 - \gamma}

    >>> discounted_length(np.array([2, 2]), np.array([True, False]), 0.5)
    array([1.5, 2. ])

    Args:
        lengths: ``[E]`` steps.
        terminated: ``[E]`` bool.
        discount: γ; of 1 a cut episode is worth its length.
    """
    if discount == 1.0:
        return lengths.astype(np.float64)
    beyond = np.where(terminated, discount**lengths, 0.0)
    result: Array = (1.0 - beyond) / (1.0 - discount)
    return result


def return_units(values: Array, scale: float, shift: float, length: Array) -> Array:
    r"""Values of scaled and shifted rewards, :math:`c\, r + d`, as values of the rewards themselves.

    .. math:: \sum_t \gamma^t r_t = \frac1c \Big(\sum_t \gamma^t (c\, r_t + d) - d L\Big), \quad L = \sum_t \gamma^t

    A shift is worth the more the longer an episode is: what it adds to a discounted return is known only as far as the
    policy's own lengths are. Where no state is terminal L is 1 / (1 - γ), and this is exact. Elsewhere L is that of
    the data's episodes (:func:`discounted_length`), and a policy that ends its episodes sooner or later than the data
    is misjudged by d / c times the difference. Fitted Q evaluation has no shift, and no such error.

    Of rewards of 1 in two steps, doubled and lowered by 1, a discount of 0.5 makes 1.5, as of the rewards themselves:

    >>> float(return_units(np.array(1.5), 2.0, -1.0, np.array(1.5)))
    1.5

    Args:
        values: ``[*B]`` as critics learn them.
        scale: c.
        shift: d.
        length: ``[*B]`` L, or broadcastable.
    """
    return (values - shift * length) / scale


def powers(discount: float, count: int) -> Array:
    """``[count]`` γ to the power of each step."""
    result: Array = discount ** np.arange(count)
    return result
