"""Fitted Q evaluation: critics of a policy that is given, by IQL's networks, learner and compiled step."""

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase

from iql_plugins.config import IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.losses.policy_evaluation import DiscretePolicyEvaluationLoss, PolicyEvaluationLoss
from iql_plugins.ope.criteria import largest_return, possible_returns
from iql_plugins.ope.policies import Policy, actions
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent, seeded_loss
from iql_plugins.training.multi_seed import fit_together

__all__ = ["cloned_behaviour", "evaluation_config", "fitted_q_evaluation"]

#: That critics are asked to tell: Adam's rate is that of outputs of this size.
LARGEST_RETURN = 3.0


def fitted_q_evaluation(
    policy: Policy,
    dataset: TensorDictBase,
    spaces: Spaces,
    config: IQLConfig,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    callback: Callable[[int], None] | None = None,
) -> list[Agent]:
    r"""Critics of a policy, one agent for each seed, trained together.

    .. math:: Q \leftarrow \arg\min_Q \mathbb{E}_{(s, a, r, s')}
        \big(Q(s, a) - r - \gamma (1 - \text{terminated})\, \mathbb{E}_{a' \sim \pi(s')} \hat Q(s', a')\big)^2

    Le et al. 2019 (arXiv:1903.08738); Voloshin et al. 2021 (arXiv:1911.06854) compare it with others. Targets are
    averages of earlier critics, as in IQL. What these say of next states is brought into what rewards like the data's
    can come to (:func:`~iql_plugins.ope.possible_returns`), widened by its own width on either side: nothing diverges
    where the data are few, and values at a bound, as those of a policy that always gets the largest reward, are still
    means of errors to either side. The policy is asked once for each transition, before the first step. Beside it the
    actor clones the behaviour that the data are of, which importance sampling asks for.

    One state, from which each action leads back with reward 1, at a discount of 0.9: Q = 1 + 0.9 Q = 10.

    Args:
        policy: any; continuous actions are those that it takes, discrete ones may be probabilities.
        dataset: transitions by the key layout, batch size ``[N]``, in the environment's units.
        spaces: of the environment.
        config: steps, batches, networks, rates, discount, normalisers and the critics' loss function count; the square
            above is that of ``"l2"``. There is one critic for each seed, nothing drops hidden units, the actor is
            behaviour cloning at a constant rate, and rewards are not shifted, so that values can be undone.
        seeds: of weights and batches; several are an ensemble.
        device: where it is computed.
        callback: called with the number of steps after each.

    Returns:
        Agents whose critics are :math:`Q^\pi`, in scaled rewards (see
        :func:`~iql_plugins.ope.criteria.fitted_value`), and whose policies are clones of the behaviour. They cannot be
        saved.

    Raises:
        ValueError: for a policy whose actions do not fit the spaces, or a dataset that does not.
        DivergenceError: if losses or weights are no longer finite.
    """
    own = IQLConfig()
    config = config.replace(
        n_critics=1,
        temperature=0.0,
        reward_shift=0.0,
        actor_dropout=0.0,
        value_dropout=0.0,
        actor_schedule="constant",
        expectile=own.expectile,
        value_objective=own.value_objective,
        policy_extraction=own.policy_extraction,
        objective_options={},
    )
    spaces.check(dataset)
    normalizers = Normalizers.fit(dataset, spaces, config).to(device)
    found = actions(policy, dataset, spaces.action, following=True)
    taken = torch.as_tensor(found, dtype=torch.get_default_dtype(), device=device)
    if isinstance(spaces.action, Box):
        taken = normalizers.policy_action(taken)
    asked = dataset.copy()
    asked["next"] = dataset["next"].copy().set("action", taken.to(dataset.get("action").device))
    evaluators = []
    for seed in seeds:
        loss = seeded_loss(spaces, config, seed, (PolicyEvaluationLoss, DiscretePolicyEvaluationLoss)).to(device)
        scale = float(normalizers.get_buffer("reward_scale"))
        low, high = possible_returns(dataset, config.discount)
        loss.value_range = (scale * low, scale * high)
        # Nobody asks for V.
        loss.value_network.requires_grad_(False)
        evaluators.append(Agent(spaces, config, normalizers=normalizers, loss=loss, seed=seed))
    fit_together(evaluators, asked, config.n_steps, callback)
    return evaluators


def evaluation_config(
    dataset: TensorDictBase, *, n_steps: int, discount: float, hidden_sizes: Sequence[int] = (256, 256)
) -> IQLConfig:
    """Hyper-parameters of a fitted Q evaluation: the same ones for all policies that are to be compared.

    Observations are standardised, and rewards are scaled so that no discounted return of the data, from whichever
    transition on, is beyond 3. Targets
    move by a twentieth at each step: values need some five times 1 / (1 - γ) of these times to be there, for which
    10,000 steps are enough up to a discount of 0.99.

    Args:
        dataset: see :func:`fitted_q_evaluation`.
        n_steps: gradient steps.
        discount: γ.
        hidden_sizes: widths of the hidden layers.
    """
    largest = largest_return(dataset, discount)
    return IQLConfig(
        n_steps=n_steps,
        discount=discount,
        hidden_sizes=tuple(hidden_sizes),
        critic_learning_rate=1e-3,
        actor_learning_rate=1e-3,
        polyak=0.05,
        normalize_observations=True,
        reward_scale=LARGEST_RETURN / largest if largest else 1.0,
    )


def cloned_behaviour(evaluators: Sequence[Agent]) -> Policy:
    """The behaviour of the data as the first of the evaluators has cloned it.

    The maximum of the likelihood of the data's actions: of one state with actions 0, 0, 1 the probabilities 2/3, 1/3.

    Args:
        evaluators: of :func:`fitted_q_evaluation`, whatever policy they are of.
    """
    return Policy.of(evaluators[0], deterministic=False)
