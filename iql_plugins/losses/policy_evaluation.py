r"""The losses of fitted Q evaluation: IQL's, with the policy in the place of V."""

import math
from dataclasses import replace

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from iql_plugins.keys import next_key
from iql_plugins.losses.batch import Batch
from iql_plugins.losses.functional import expected_q
from iql_plugins.losses.iql import DiscreteIQLLoss, IQLLoss
from iql_plugins.losses.quantities import NetworkQuantities
from iql_plugins.losses.torchrl_contract import in_keys_of
from iql_plugins.networks.distributions import at_least_float32

__all__ = ["DiscretePolicyEvaluationLoss", "PolicyEvaluationLoss"]


class _PolicyEvaluation(NetworkQuantities):
    #: What no value is beyond, in the critics' rewards.
    value_range: tuple[float, float] = (-math.inf, math.inf)

    @property
    def _next_value_keys(self) -> list[NestedKey]:
        read = [next_key(key) for key in in_keys_of(self.qvalue_network)]
        return list(dict.fromkeys([*read, next_key(self._tensor_keys.action)]))

    @torch.no_grad()
    def _next_value(self, batch: Batch) -> Tensor:
        """``[*B]`` Q'(s', π(s')) of the target critics, their mean, within :attr:`value_range` and as much again."""
        network = self._network("target_qvalue_network")
        after = {key: batch.tensors[next_key(key)] for key in in_keys_of(network)}
        values = self._critic_values("target_qvalue_network", frozenset(), replace(batch, tensors=after))
        mean = at_least_float32(values).mean(0)
        # Exactly its bounds would cut errors off on one side only: values near one would be biased.
        low, high = self.value_range
        width = high - low
        return self._of_policy(mean, batch.tensors[next_key(self._tensor_keys.action)]).clamp(low - width, high + width)

    def _of_policy(self, values: Tensor, next_action: Tensor) -> Tensor:
        return values.squeeze(-1)


class PolicyEvaluationLoss(_PolicyEvaluation, IQLLoss):
    r"""Fitted Q evaluation of a policy over continuous actions.

    .. math:: L_Q = \mathbb{E}\, d\big(Q(s, a),\, r + \gamma (1 - \text{terminated})\, \hat Q(s', \pi(s'))\big)

    Le et al. 2019 (arXiv:1903.08738), algorithm 3, with target critics in the place of one regression after another,
    and :math:`\hat Q` within ``value_range``, by default everything, or its own width beyond it: critics that are asked
    for actions which few data have take the largest of their own errors for the truth, and grow without end.

    All else is :class:`~iql_plugins.IQLLoss`: with a temperature of 0 its actor is the behaviour that it clones.

    **Input** beside that of IQL: ``("next", "action")``, ``[*B, act]``: :math:`\pi(s')`, in the networks' units.
    """


class DiscretePolicyEvaluationLoss(_PolicyEvaluation, DiscreteIQLLoss):
    r"""The same over discrete actions: the target has :math:`\sum_a \pi(a \mid s')\, \hat Q(s', a)`.

    **Input** beside that of IQL: ``("next", "action")``, ``[*B, n]``: the probabilities :math:`\pi(\cdot \mid s')`.
    """

    def _of_policy(self, values: Tensor, next_action: Tensor) -> Tensor:
        return expected_q(values, next_action)
