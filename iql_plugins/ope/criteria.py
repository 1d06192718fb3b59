r"""What can be said of a policy without its environment; each with an interval over episodes, in return units.

Values of states are discounted returns from an episode's first state on. Which of these tell good policies from bad
ones depends on the data: see ``examples/choosing_a_policy.md``.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from iql_plugins.data.dataset import REWARD, TERMINATED
from iql_plugins.data.episodes import episode_ends, episode_lengths
from iql_plugins.data.summary import CHUNK
from iql_plugins.networks import calls
from iql_plugins.ope import estimators
from iql_plugins.ope.estimators import Array, ImportanceSampled
from iql_plugins.ope.intervals import Criterion
from iql_plugins.ope.policies import Policy, actions, log_probabilities, observations
from iql_plugins.spaces import Box
from iql_plugins.training.agent import Agent
from iql_plugins.training.learner import drawing_from

__all__ = [
    "action_agreement",
    "batches",
    "discounted_returns",
    "doubly_robust_value",
    "fitted_value",
    "importance_sampled_value",
    "initial_qvalue",
    "initial_value",
    "possible_returns",
    "td_error",
]

#: Of continuous policies' actions, to average Q over: already a single one would leave the estimate unbiased.
DRAWS = 4


def discounted_returns(dataset: TensorDictBase, discount: float) -> Array:
    r"""What the data's own behaviour returned in each episode, :math:`\sum_t \gamma^t r_t`.

    Rewards 1, 2 and 4 at a discount of 0.5: 1 + 1 + 1 = 3. What comes after a time limit counts as 0.

    Args:
        dataset: see :func:`initial_value`.
        discount: γ.

    Returns:
        ``[E]`` in return units.
    """
    rewards = _numbers(dataset.get(REWARD).reshape(-1)).astype(np.float64)
    table = estimators.padded(rewards, _numbers(episode_lengths(dataset)))
    returns: Array = table @ estimators.powers(discount, table.shape[1])
    return returns


def largest_return(dataset: TensorDictBase, discount: float) -> float:
    r"""The largest :math:`|\sum_{k \ge t} \gamma^{k - t} r_k|` of any transition t of the data.

    A reward of 8 behind two of 0, at a discount of 0.5: 8, where the episode's own return is 2.

    Args:
        dataset: see :func:`initial_value`.
        discount: γ.
    """
    rewards = _numbers(dataset.get(REWARD).reshape(-1)).astype(np.float64)
    table = estimators.padded(rewards, _numbers(episode_lengths(dataset)))
    following, largest = np.zeros(len(table)), 0.0
    for column in table.T[::-1]:
        following = column + discount * following
        largest = max(largest, float(np.abs(following).max()))
    return largest


def possible_returns(dataset: TensorDictBase, discount: float) -> tuple[float, float]:
    r"""Between which a discounted return is whose rewards are the data's, however long it goes on.

    .. math:: \Big[\frac{\min_t r_t}{1 - \gamma},\, \frac{\max_t r_t}{1 - \gamma}\Big]

    with 0 in it where some state is terminal. Rewards of 1 alone at a discount of 0.99: 0 to 100 where poles fall, 100
    where nothing ends.

    Args:
        dataset: see :func:`initial_value`.
        discount: γ; of 1 there are no bounds.
    """
    if discount == 1.0:
        return -math.inf, math.inf
    rewards = dataset.get(REWARD)
    low, high = (float(extreme) / (1.0 - discount) for extreme in (rewards.min(), rewards.max()))
    return (min(low, 0.0), max(high, 0.0)) if dataset.get(TERMINATED).any() else (low, high)


def initial_value(agent: Agent, dataset: TensorDictBase) -> Criterion:
    r"""The value of initial states under the agent's own V.

    .. math:: \frac1E \sum_i V(s_{i0})

    V is what the data's better actions return, not what the policy does: Paine et al. 2020 (arXiv:2007.09055) found
    such values too high, the more the worse the critics. Rewards that were scaled and shifted are undone, see
    :func:`~iql_plugins.ope.estimators.return_units`.

    With V(s) of 3 and 5 in two first states, and rewards that were doubled: (3 / 2 + 5 / 2) / 2 = 2.

    Args:
        agent: of any adapter.
        dataset: batch size ``[N]``, by the key layout, in the environment's units; episode after episode.

    Returns:
        The mean, with the interval over episodes, in return units.
    """
    first = _first_states(dataset)
    values = torch.cat([agent.loss.labels(batch).value for batch in batches(agent, first)])
    return Criterion.mean(_undone(agent, values, _lengths(agent, dataset)))


def initial_qvalue(agent: Agent, dataset: TensorDictBase, policy: Policy | None = None) -> Criterion:
    r"""The value of initial states under the agent's own critics, of the policy's actions.

    .. math:: \frac1E \sum_i \min_j Q_j(s_{i0}, \pi(s_{i0}))

    As :func:`initial_value`, of which it has the units, the limits and the source; min Q of 4 and 6, with rewards that
    were doubled: (4 / 2 + 6 / 2) / 2 = 2.5.

    Args:
        agent: of any adapter.
        dataset: see :func:`initial_value`.
        policy: whose actions; None takes the agent's.

    Returns:
        As :func:`initial_value`.
    """
    first = _first_states(dataset)
    values = _policy_qvalues(agent, first, policy or Policy.of(agent))
    return Criterion.mean(_undone(agent, values.amin(0), _lengths(agent, dataset)))


def fitted_value(evaluators: Sequence[Agent], dataset: TensorDictBase, policy: Policy) -> Criterion:
    r"""The value of initial states under critics that were fitted to the policy, the mean over their seeds.

    .. math:: \frac1S \sum_k \operatorname{clip}\Big(\frac1E \sum_i Q^\pi_k(s_{i0}, \pi(s_{i0}))\Big)

    Le et al. 2019 (arXiv:1903.08738). Each seed's mean is clipped to the :func:`possible_returns` of the data that its
    critics were fitted to: beyond them it is an error, which is smaller at the bound. The interval is over seeds and
    episodes: it knows what chance does, and not what the critics do not know of actions that the data do not have.

    Two seeds that say 1 and 3 of the first state, 2 and 4 of the second: 2.5.

    Args:
        evaluators: of :func:`~iql_plugins.ope.fqe.fitted_q_evaluation`.
        dataset: see :func:`initial_value`.
        policy: the one that they were fitted to.

    Returns:
        The mean, with the interval over episodes and, of several, seeds, in return units.
    """
    first = _first_states(dataset)
    taken = actions(policy, first, evaluators[0].spaces.action)
    rows = [_undone(agent, _expected_qvalues(agent, first, taken).mean(0), np.zeros(1)) for agent in evaluators]
    values = np.stack(rows).astype(np.float64)
    scale = float(evaluators[0].normalizers.get_buffer("reward_scale"))
    bounds = [bound / scale for bound in evaluators[0].loss.value_range]
    fits = values.mean(1).clip(*bounds).tolist()
    return Criterion.of(lambda drawn: values[:, drawn].mean(-1).clip(*bounds).mean(0), values.shape[1], fits)


def td_error(agent: Agent, dataset: TensorDictBase) -> Criterion:
    r"""How far the agent's critics are from their own targets, on transitions that they may not have seen.

    .. math:: \frac1E \sum_i \frac1{T_i} \sum_t \big|Q(s_t, a_t) - y_t\big|, \quad
        y_t = r_t + \gamma (1 - \text{terminated}_t) V(s_{t+1})

    The mean over critics, in the units of a reward. Zhang and Jiang 2021 (arXiv:2110.14000): a small one can be had by
    critics that are wrong together, of policies that do nothing.

    Errors of 1 and 3 in one episode, and 4 in another: (2 + 4) / 2 = 3.

    Args:
        agent: of any adapter.
        dataset: see :func:`initial_value`.

    Returns:
        The mean, with the interval over episodes, in units of the environment's reward.
    """
    errors = []
    for batch in batches(agent, dataset):
        _, metadata = agent.loss.qvalue_loss(batch)
        errors.append(metadata["td_error"].sqrt().mean(0))
    scale = float(agent.normalizers.get_buffer("reward_scale"))
    return Criterion.mean(_by_episode(_numbers(torch.cat(errors)) / scale, dataset))


def action_agreement(policy: Policy, dataset: TensorDictBase, spaces: Any) -> Criterion:
    r"""How close the policy's actions are to the dataset's, :func:`~iql_plugins.ope.estimators.agreement`.

    .. math:: \frac1E \sum_i \frac1{T_i} \sum_t \text{agreement}\big(a_t, \pi(s_t)\big)

    In [0, 1]. What is unlike the data is what no criterion here can judge well; it says nothing of returns.

    Three of four actions of one episode, and one of two of another: (0.75 + 0.5) / 2 = 0.625.

    Args:
        policy: any.
        dataset: see :func:`initial_value`.
        spaces: of the environment, with bounds of actions.

    Returns:
        The mean, with the interval over episodes.
    """
    taken, space = actions(policy, dataset, spaces.action), spaces.action
    given = dataset.get("action").cpu().numpy()
    if isinstance(space, Box):
        low, high = np.array(space.low), np.array(space.high)
        alike = estimators.agreement(given.clip(low, high), taken.clip(low, high), high - low)
    else:
        alike = estimators.agreement(given.reshape(-1) - space.start, taken, None)
    return Criterion.mean(_by_episode(alike, dataset))


def importance_sampled_value(
    policy: Policy, behaviour: Policy | Array, dataset: TensorDictBase, spaces: Any, discount: float
) -> Criterion:
    r"""Per-decision weighted importance sampling, :func:`~iql_plugins.ope.estimators.weighted_importance_sampling`.

    .. math:: \sum_t \gamma^t \frac{\sum_i w_{it} r_{it}}{\sum_i w_{it}}, \qquad
        w_{it} = \prod_{k \le t} \frac{\pi(a_{ik} \mid s_{ik})}{b(a_{ik} \mid s_{ik})}

    Precup, Sutton and Singh 2000. Two episodes of one step with rewards 1 and 5, of which the policy makes the second
    three times as likely as the behaviour did, the first as likely: (1 + 3 · 5) / (1 + 3) = 4.

    Of the policy's distribution, not of its likeliest actions: the two differ where it is not sure. Look at
    ``effective_episodes``: for long episodes it is near 1 unless the policy is close to the behaviour.

    Args:
        policy: with a distribution.
        behaviour: that of the data: a policy with a distribution, as it is known or cloned
            (:func:`~iql_plugins.ope.fqe.cloned_behaviour`); or ``[N]`` log-probabilities that were recorded, of the
            dataset's actions as they are, even where these are beyond the bounds.
        dataset: see :func:`initial_value`.
        spaces: of the environment.
        discount: γ.

    Returns:
        The estimate, with the interval over episodes, in return units.

    Raises:
        ValueError: for a policy without a distribution.
    """
    episodes = _importance_sampled(policy, behaviour, dataset, spaces)

    def statistic(drawn: Array) -> Any:
        return estimators.weighted_importance_sampling(episodes, discount, _counts(drawn))

    effective = estimators.effective_episodes(episodes.log_ratios)
    return Criterion.of(statistic, len(episodes.rewards), effective_episodes=effective)


def doubly_robust_value(
    policy: Policy, behaviour: Policy | Array, evaluators: Sequence[Agent], dataset: TensorDictBase, discount: float
) -> Criterion:
    r"""Weighted doubly robust, :func:`~iql_plugins.ope.estimators.doubly_robust`, over the mean of fitted critics.

    .. math:: \frac1E \sum_i \hat V(s_{i0}) + \sum_t \gamma^t \frac{
        \sum_i w_{it} \big(r_{it} + \gamma \hat V(s_{i,t+1}) - \hat Q(s_{it}, a_{it})\big)}{\sum_i w_{it}}

    Thomas and Brunskill 2016 (arXiv:1604.00923), with the w of :func:`importance_sampled_value`. One episode of one
    step that ends in a terminal state, reward 3, of which the critics expect 2: 2 + (3 - 2) = 3.

    The value V(s) is what the policy's distribution expects of Q(s, ·): all discrete actions, or 4 draws of continuous
    ones.

    Args:
        policy: see :func:`importance_sampled_value`.
        behaviour: likewise.
        evaluators: of :func:`~iql_plugins.ope.fqe.fitted_q_evaluation`.
        dataset: see :func:`initial_value`.
        discount: γ, that of the evaluators.

    Returns:
        The estimate, with the interval over episodes and, of several, seeds, in return units.

    Raises:
        ValueError: for a policy without a distribution.
    """
    spaces = evaluators[0].spaces
    episodes = _importance_sampled(policy, behaviour, dataset, spaces)
    lengths = _numbers(episode_lengths(dataset))

    goes_on = ~_numbers(dataset.get(TERMINATED).reshape(-1))

    def of_fit(agent: Agent) -> tuple[Array, Array, Array]:
        """Q of the data's actions, V of their states, and of the next ones, ``[E, T]`` each in return units."""
        values = [
            _qvalues(agent, dataset, dataset.get("action")),
            *(_distribution_qvalues(agent, dataset, policy, following=behind) for behind in (False, True)),
        ]
        q, v, after = (_undone(agent, value.mean(0), np.zeros(1)) for value in values)
        return tuple(estimators.padded(part, lengths) for part in (q, v, after * goes_on))  # type: ignore[return-value]

    each = [of_fit(agent) for agent in evaluators]
    q, v, after = (np.mean(parts, axis=0) for parts in zip(*each, strict=True))
    fits = [float(estimators.doubly_robust(episodes, *parts, discount)) for parts in each]

    def statistic(drawn: Array) -> Any:
        return estimators.doubly_robust(episodes, q, v, after, discount, _counts(drawn))

    effective = estimators.effective_episodes(episodes.log_ratios)
    return Criterion.of(statistic, len(lengths), fits, effective)


def _importance_sampled(
    policy: Policy, behaviour: Policy | Array, dataset: TensorDictBase, spaces: Any
) -> ImportanceSampled:
    lengths = _numbers(episode_lengths(dataset))
    if isinstance(behaviour, Policy):
        known = log_probabilities(behaviour, dataset, spaces.action)
    else:
        known = np.asarray(behaviour)
    if known.shape != (len(dataset),) or not np.isfinite(known).all():
        raise ValueError(
            f"the behaviour's log-probabilities of its own actions must be {len(dataset)} finite numbers, "
            f"got shape {known.shape}"
        )
    # What was recorded is of actions as they were drawn.
    clipped = isinstance(behaviour, Policy)
    ratios = log_probabilities(policy, dataset, spaces.action, clipped=clipped) - known
    rewards = _numbers(dataset.get(REWARD).reshape(-1))
    return ImportanceSampled(estimators.padded(ratios, lengths), estimators.padded(rewards, lengths))


def _counts(drawn: Array) -> Array:
    """``[*D, E]`` how often each of E episodes was drawn."""
    size = drawn.shape[-1]
    rows = drawn.reshape(-1, size) + size * np.arange(drawn.size // size)[:, None]
    return np.bincount(rows.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def _first_states(dataset: TensorDictBase) -> TensorDictBase:
    """The first transition of each episode."""
    ends = episode_ends(dataset)
    return dataset[ends - episode_lengths(dataset) + 1]


def _lengths(agent: Agent, dataset: TensorDictBase) -> Array:
    ends = episode_ends(dataset)
    terminated = _numbers(dataset.get(TERMINATED).reshape(-1).cpu()[ends])
    return estimators.discounted_length(_numbers(episode_lengths(dataset)), terminated, agent.config.discount)


def _undone(agent: Agent, values: Tensor, lengths: Array) -> Array:
    """Values as the critics learn them in return units."""
    scale, shift = (float(agent.normalizers.get_buffer(f"reward_{name}")) for name in ("scale", "shift"))
    return estimators.return_units(_numbers(values).astype(np.float64), scale, shift, lengths)


def _by_episode(values: Array, dataset: TensorDictBase) -> Array:
    """``[E]`` means of one value a transition."""
    lengths = _numbers(episode_lengths(dataset))
    sums: Array = np.add.reduceat(values.astype(np.float64), np.cumsum(lengths) - lengths)
    return sums / lengths


def batches(agent: Agent, dataset: TensorDictBase) -> Iterator[TensorDictBase]:
    """A dataset in the networks' units, so much at a time; networks are in evaluation mode meanwhile."""
    with calls.evaluation_mode(agent.loss), torch.no_grad():
        for start in range(0, len(dataset), CHUNK):
            piece = dataset[start : start + CHUNK].select(*agent.loss.accepted_keys, strict=False)
            yield agent.normalizers(piece.to(agent.device))


def _qvalues(agent: Agent, states: TensorDictBase, action: Tensor) -> Tensor:
    """``[N, B]`` Q(s, a) of each critic, for actions in the environment's units."""
    asked = TensorDict({"observation": states.get("observation"), "action": action}, [len(states)])
    return torch.cat([agent.loss.qvalues(batch) for batch in batches(agent, asked)], 1)


def _expected_qvalues(agent: Agent, states: TensorDictBase, taken: Array) -> Tensor:
    """``[N, B]`` Q(s, π(s)), for what :func:`~iql_plugins.ope.policies.actions` returns."""
    space = agent.spaces.action
    chances = torch.as_tensor(taken, dtype=torch.get_default_dtype(), device=agent.device)
    if isinstance(space, Box):
        return _qvalues(agent, states, chances)
    one = torch.ones(len(states), 1, dtype=torch.int64, device=chances.device)
    by_action = [_qvalues(agent, states, (space.start + index) * one) for index in range(space.n)]
    return (torch.stack(by_action, -1) * chances).sum(-1)


def _policy_qvalues(agent: Agent, states: TensorDictBase, policy: Policy) -> Tensor:
    return _expected_qvalues(agent, states, actions(policy, states, agent.spaces.action))


def _distribution_qvalues(agent: Agent, dataset: TensorDictBase, policy: Policy, *, following: bool) -> Tensor:
    """``[N, B]`` what a policy's distribution expects of Q in the states of a dataset, or in the next ones."""
    seen = dataset.get(("next", "observation") if following else "observation")
    states = TensorDict({"observation": seen}, [len(dataset)])
    assert policy.distribution is not None
    distributions: list[Any] = [policy.distribution(piece) for _, piece in observations(dataset, following=following)]
    if agent.spaces.discrete:
        taken = np.concatenate([_numbers(each.probs) for each in distributions])
        return _expected_qvalues(agent, states, taken)
    with drawing_from(0, 0, torch.device(policy.device)):
        draws = [torch.cat([each.sample() for each in distributions]) for _ in range(DRAWS)]
    return torch.stack([_qvalues(agent, states, draw) for draw in draws]).mean(0)


def _numbers(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array
