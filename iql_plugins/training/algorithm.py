"""What a user holds around an agent, the same in every adapter whose framework has no class of its own for it."""

import os
from collections.abc import Callable
from typing import Any, Self

from tensordict import TensorDictBase

from iql_plugins.training.agent import Agent, Observation

__all__ = ["Algorithm"]


class Algorithm:
    """An algorithm around an agent.

    Args:
        agent: the parts.

    Attributes:
        agent: the loss, its learner, the normalisers and the random state.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    @classmethod
    def from_agent(cls, agent: Agent) -> Self:
        """The algorithm around an agent of any adapter."""
        return cls(agent)

    def to_agent(self) -> Agent:
        """The agent in it."""
        return self.agent

    def fit(self, dataset: TensorDictBase, n_steps: int, callback: Callable[[int], None] | None = None) -> Self:
        """Trains on a dataset in the environment's units; see :meth:`iql_plugins.training.agent.Agent.fit`.

        Returns:
            Itself.
        """
        self.agent.fit(dataset, n_steps, callback)
        return self

    def act(self, observation: Observation, deterministic: bool = True) -> Any:
        """The policy's action in the environment's units; see :meth:`iql_plugins.training.agent.Agent.act`."""
        return self.agent.act(observation, deterministic)

    def metrics(self) -> dict[str, float]:
        """Means since the last call; see :meth:`iql_plugins.training.learner.Learner.metrics`."""
        return self.agent.learner.metrics()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it into one file, atomically; see :meth:`iql_plugins.training.agent.Agent.save`."""
        self.agent.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **arguments: Any) -> Self:
        """What :meth:`save` wrote; arguments as those of :meth:`iql_plugins.training.agent.Agent.load`."""
        return cls(Agent.load(path, **arguments))
