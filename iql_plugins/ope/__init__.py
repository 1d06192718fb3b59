"""Off-policy evaluation: what a policy is worth, from data alone.

>>> import numpy as np
>>> from iql_plugins import load_dataset
>>> from iql_plugins.config import IQLConfig
>>> from iql_plugins.spaces import Spaces
>>> dataset = load_dataset("pendulum-v1-sac")[:2000]
>>> policy = Policy(lambda observation: np.clip(-observation[:, 2:], -2.0, 2.0))
>>> spaces = Spaces.from_dataset(dataset)
>>> config = IQLConfig(n_steps=20, hidden_sizes=(8,), normalize_observations=True)
>>> evaluators = fitted_q_evaluation(policy, dataset, spaces, config, seeds=(0, 1))
>>> value = fitted_value(evaluators, dataset, policy)
>>> value.low <= value.value <= value.high
True
"""

from iql_plugins.ope.criteria import (
    action_agreement,
    discounted_returns,
    doubly_robust_value,
    fitted_value,
    importance_sampled_value,
    initial_qvalue,
    initial_value,
    possible_returns,
    td_error,
)
from iql_plugins.ope.fqe import cloned_behaviour, evaluation_config, fitted_q_evaluation
from iql_plugins.ope.intervals import Criterion, difference
from iql_plugins.ope.labels import labels
from iql_plugins.ope.policies import Policy

__all__ = [
    "Criterion",
    "Policy",
    "action_agreement",
    "cloned_behaviour",
    "difference",
    "discounted_returns",
    "doubly_robust_value",
    "evaluation_config",
    "fitted_q_evaluation",
    "fitted_value",
    "importance_sampled_value",
    "initial_qvalue",
    "initial_value",
    "labels",
    "possible_returns",
    "td_error",
]
