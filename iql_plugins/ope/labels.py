"""What an agent makes of each transition of a dataset, for who trains something else on it."""

import math
from collections.abc import Iterator

import numpy as np
from tensordict import TensorDictBase

from iql_plugins.data.episodes import episode_lengths
from iql_plugins.ope.criteria import batches
from iql_plugins.ope.estimators import Array
from iql_plugins.training.agent import Agent

__all__ = ["labels"]


def labels(agent: Agent, dataset: TensorDictBase) -> Iterator[dict[str, Array]]:
    r"""Value, advantage and weight of each transition, in the dataset's order, so many rows at a time.

    .. math:: A = \min_j \hat Q_j(s, a) - V(s), \qquad w = \min\big(e^{\beta A}, w_{\max}\big)

    The equations of IQL's policy (Kostrikov et al. 2021, equation 7), or those of the agent's own objectives. A policy
    that minimises the mean of :math:`-w \log \pi(a \mid s)` is trained as the agent's is at its present critics.

    Values are in the units of the rewards that the critics learn, ``reward_scale`` times the environment's plus
    ``reward_shift``: the weight is that of the advantage as it stands here. Divided by ``reward_scale`` an advantage
    is in the environment's units, but for what a shift adds; see
    :func:`~iql_plugins.ope.estimators.return_units`.

    What a ``noise_threshold`` multiplies is the critics' disagreement over the whole dataset, where a training takes
    that of each batch. A policy extraction that weighs no actions has weights of 1.

    With V of 1, critics that say 2 and 3, and a temperature of 3: an advantage of 1 and a weight of exp(3) = 20.1.

    Args:
        agent: of any adapter.
        dataset: batch size ``[N]``, by the key layout, in the environment's units; episode after episode.

    Yields:
        ``[n]`` columns ``value``, ``qvalue``, ``advantage``, ``weight`` (float32), ``episode`` and ``step`` (int64,
        from 0; the step counts from the episode's first).

    Raises:
        ValueError: if the dataset does not fit the agent; before the first rows.
    """
    agent.check(dataset)
    noise = _disagreement(agent, dataset) if agent.loss.objective_options.get("noise_threshold") else None
    lengths = episode_lengths(dataset).numpy()
    first = np.cumsum(lengths) - lengths
    start = 0
    for batch in batches(agent, dataset):
        found = agent.loss.labels(batch, noise)._asdict()
        columns: dict[str, Array] = {name: tensor.float().cpu().numpy() for name, tensor in found.items()}
        rows = np.arange(start, start + len(batch))
        episode = np.searchsorted(first, rows, side="right") - 1
        yield columns | {"episode": episode, "step": rows - first[episode]}
        start += len(batch)


def _disagreement(agent: Agent, dataset: TensorDictBase) -> float:
    squares = sum(
        len(batch) * float(agent.loss.health(batch).critic_disagreement) ** 2 for batch in batches(agent, dataset)
    )
    return math.sqrt(squares / len(dataset))
