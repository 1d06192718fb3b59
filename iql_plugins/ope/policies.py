"""Any policy in one form: what it does, and how likely, for batches of the environment's observations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch.distributions import Distribution

from iql_plugins.data.summary import CHUNK
from iql_plugins.ope.estimators import Array
from iql_plugins.spaces import Box, Space
from iql_plugins.training.agent import Agent

__all__ = ["Policy", "actions", "log_probabilities"]


@dataclass(frozen=True)
class Policy:
    """A policy, whoever made it.

    ::

        Policy.of(agent)  # ours, of any adapter
        Policy(lambda observation: model.predict(observation, deterministic=True)[0])  # Stable-Baselines3's
        Policy(algorithm.predict)  # d3rlpy's

    Attributes:
        act: from NumPy observations ``[B, *obs]``, by name for Dict spaces, to actions in the environment's units,
            ``[B, act]``; discrete: integers ``[B]``, or the probabilities of all n, float ``[B, n]``.
        distribution: from observations to a ``torch.distributions.Distribution`` over the environment's actions, of
            discrete ones from 0 on (``Categorical``); None where it is not known. Importance sampling asks for it.
        device: where the distribution's tensors are.
    """

    act: Callable[[Any], Any]
    distribution: Callable[[Any], Distribution] | None = None
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, agent: Agent, *, deterministic: bool = True) -> "Policy":
        """An agent's policy.

        Args:
            agent: of any adapter.
            deterministic: whether it acts as evaluations have it; else by its distribution: the probabilities of
                discrete actions, one draw of continuous ones from torch's random state.
        """

        def probabilities(observation: Any) -> Array:
            chances: Array = agent.distribution(observation).probs.double().cpu().numpy()  # type: ignore[attr-defined]
            return chances

        if not deterministic and agent.spaces.discrete:
            return cls(probabilities, agent.distribution, agent.device)
        return cls(lambda observation: agent.act(observation, deterministic), agent.distribution, agent.device)


def observations(dataset: TensorDictBase, *, following: bool = False) -> Iterator[tuple[slice, Any]]:
    """The observations of a dataset as :class:`Policy` takes them, so many at a time, and their rows."""
    for start in range(0, len(dataset), CHUNK):
        rows = slice(start, min(start + CHUNK, len(dataset)))
        piece = dataset[rows].get(("next", "observation") if following else "observation")
        if isinstance(piece, TensorDictBase):
            yield rows, {name: tensor.cpu().numpy() for name, tensor in piece.items()}
        else:
            array = piece.cpu().numpy()
            yield rows, array


def actions(policy: Policy, dataset: TensorDictBase, space: Space, *, following: bool = False) -> Array:
    """What a policy does in each state of a dataset.

    Args:
        policy: any.
        dataset: batch size ``[N]``, by the key layout, in the environment's units.
        space: of actions.
        following: whether in the next states.

    Returns:
        ``[N, act]`` in the environment's units; ``[N, n]`` probabilities of discrete actions.

    Raises:
        ValueError: for actions that the space does not have.
    """
    found = [
        _action(policy.act(seen), rows.stop - rows.start, space)
        for rows, seen in observations(dataset, following=following)
    ]
    return np.concatenate(found)


def _action(returned: Any, count: int, space: Space) -> Array:
    if isinstance(returned, tuple):
        raise ValueError(
            "the policy must return actions, got a tuple: of Stable-Baselines3's predict() take the first, "
            "Policy(lambda observation: model.predict(observation, deterministic=True)[0])"
        )
    given = np.asarray(returned)
    if given.shape[:1] != (count,):
        raise ValueError(f"the policy must return one action for each of {count} states, got shape {given.shape}")
    if isinstance(space, Box):
        if given.shape[1:] != space.shape or not np.isfinite(given).all():
            raise ValueError(f"the policy's actions must be finite, of shape {space.shape}, got {given.shape[1:]}")
        return given
    if given.dtype.kind == "f" and given.shape[1:] == (space.n,):
        if not np.allclose(given.sum(1), 1.0, atol=1e-4):
            raise ValueError(f"the policy's probabilities must add up to 1, got {given[0].tolist()}")
        return given
    index = given.reshape(len(given), -1)
    if index.shape[1] != 1 or not np.isin(index - space.start, np.arange(space.n)).all():
        raise ValueError(
            f"the policy must return integers from {space.start} to {space.start + space.n - 1}, or the probabilities "
            f"of {space.n} actions, got {given.dtype} of shape {given.shape[1:]}"
        )
    one_hot: Array = np.eye(space.n)[index[:, 0].astype(np.int64) - space.start]
    return one_hot


def _clipped(action: torch.Tensor, space: Box) -> torch.Tensor:
    action = action if action.is_floating_point() else action.to(torch.get_default_dtype())
    low, high = (
        None if bound is None else torch.tensor(bound, dtype=action.dtype, device="cpu")
        for bound in (space.low, space.high)
    )
    return action if low is None and high is None else action.clamp(low, high)


def log_probabilities(policy: Policy, dataset: TensorDictBase, space: Space, *, clipped: bool = True) -> Array:
    """``[N]`` log-probability (nats; of continuous actions log-density) of a dataset's actions under a policy.

    Args:
        policy: one whose distribution is known.
        dataset: see :func:`actions`.
        space: of actions.
        clipped: whether an action beyond the bounds is taken for the one on the bounds that the environment makes of
            it, as it was for whoever learned from it.

    Raises:
        ValueError: for a policy that has no distribution, or of which densities are no numbers.
    """
    if policy.distribution is None:
        raise ValueError(
            "importance sampling needs the policy's distribution: give Policy one, Policy(act, distribution)"
        )
    found = []
    for rows, seen in observations(dataset):
        action = dataset[rows].get("action")
        if not isinstance(space, Box):
            action = action.reshape(-1) - space.start
        elif clipped:
            action = _clipped(action.cpu(), space)
        with torch.no_grad():
            density = policy.distribution(seen).log_prob(action.to(policy.device))
            found.append(density.double().cpu().numpy())
    result = np.concatenate(found)
    if result.shape != (len(dataset),) or np.isnan(result).any():
        raise ValueError(
            f"log-probabilities must be {len(dataset)} numbers, one a state, got shape {result.shape}, NaN or not: "
            "torch.distributions.Independent(distribution, 1) has one for all entries of an action"
        )
    return result
