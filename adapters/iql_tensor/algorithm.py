"""IQL for people with a training loop of their own, or none."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_plugins.config import IQLConfig
from iql_plugins.data.intake import check_numbers
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent
from iql_plugins.training.algorithm import Algorithm
from iql_plugins.training.learner import Learner
from iql_plugins.training.multi_seed import fit_together
from iql_tensor.batches import map_batch

__all__ = ["IQL"]


class IQL(Algorithm):
    """Implicit Q-Learning on plain tensors, in the environment's units.

    Args:
        agent: the parts; :meth:`build` and :meth:`from_sizes` make them.

    Attributes:
        agent: the loss, its learner, the normalisers and the random state.

    >>> iql = IQL.from_sizes(3, 1, action_low=-2.0, action_high=2.0, seed=0)
    >>> iql.update(
    ...     observation=torch.randn(5, 3), action=torch.rand(5, 1), next_observation=torch.randn(5, 3),
    ...     next_reward=torch.randn(5, 1), next_done=torch.zeros(5, 1, dtype=torch.bool),
    ...     next_terminated=torch.zeros(5, 1, dtype=torch.bool),
    ... )
    >>> iql.act(torch.zeros(5, 3)).shape
    torch.Size([5, 1])
    """

    @classmethod
    def build(
        cls,
        observation_space: Any = None,
        action_space: Any = None,
        *,
        dataset: TensorDictBase | None = None,
        config: IQLConfig | None = None,
        loss: IQLLoss | None = None,
        learner: Learner | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        **hyperparameters: Any,
    ) -> "IQL":
        """An agent for gymnasium's spaces, or for those that a dataset tells.

        Args:
            observation_space: Box, Discrete or Dict of these; or a :class:`~iql_plugins.spaces.Spaces` of both.
            action_space: Box of one dimension, or Discrete.
            dataset: transitions by the key layout; its statistics make the normalisers.
            config: the hyper-parameters; None takes the defaults.
            loss: over networks of your own; None builds the paper's.
            learner: of that loss, with optimisers of your own.
            seed: of the weights and the batches.
            device: where the networks are built.
            **hyperparameters: changes of ``config``.

        Raises:
            ValueError: if there are neither spaces nor a dataset, if they disagree, for values that are not finite or
                actions that no clipping explains, or for a hyper-parameter out of range.
            TypeError: for a space that is not supported, or a name that is no hyper-parameter.
        """
        config = (config or IQLConfig()).replace(**hyperparameters)
        if isinstance(observation_space, Spaces):
            spaces = observation_space
        elif observation_space is not None and action_space is not None:
            spaces = Spaces.from_gymnasium(observation_space, action_space)
        elif dataset is not None:
            spaces = Spaces.from_dataset(dataset)
        else:
            raise ValueError("observation_space and action_space must be given, or a dataset to take them from")
        normalizers = None
        if dataset is not None:
            spaces.check(dataset)
            check_numbers(dataset, spaces, clip_all_actions=config.clip_all_actions)
            normalizers = Normalizers.fit(dataset, spaces, config)
        elif config.normalize_observations or isinstance(config.reward_scale, str):
            raise ValueError(
                "normalize_observations and reward_scale='return_range' need the statistics of a dataset: pass dataset="
            )
        else:
            normalizers = Normalizers(spaces, reward_scale=config.reward_scale, reward_shift=config.reward_shift)
        return cls(Agent(spaces, config, normalizers=normalizers, loss=loss, learner=learner, seed=seed, device=device))

    @classmethod
    def from_sizes(
        cls,
        observation_size: int,
        action_size: int | None = None,
        *,
        action_count: int | None = None,
        action_low: float = -1.0,
        action_high: float = 1.0,
        **arguments: Any,
    ) -> "IQL":
        """An agent for vector observations.

        Args:
            observation_size: number of entries of an observation.
            action_size: number of entries of a continuous action.
            action_count: number of discrete actions, instead.
            action_low: lower bound of every entry of a continuous action.
            action_high: upper bound.
            **arguments: of :meth:`build`.

        Raises:
            ValueError: unless exactly one of ``action_size`` and ``action_count`` is given.
        """
        if (action_size is None) == (action_count is None):
            raise ValueError(
                f"exactly one of action_size and action_count must be given, got {action_size} and {action_count}"
            )
        action: Box | Discrete
        if action_size is None:
            assert action_count is not None
            action = Discrete(action_count)
        else:
            bounds = ((float(low),) * action_size for low in (action_low, action_high))
            action = Box((action_size,), "float32", *bounds)
        return cls.build(Spaces(Box((observation_size,)), action), **arguments)

    def update(self, batch: TensorDictBase | Mapping[str, Tensor] | None = None, **tensors: Tensor) -> None:
        """One gradient step on a batch in the environment's units.

        Args:
            batch: a TensorDict by the key layout, or a mapping of keyword tensors.
            **tensors: the keyword tensors themselves instead.

        Raises:
            KeyError, TypeError, ValueError: for a batch that the loss refuses; nothing was trained.
        """
        if batch is None:
            batch = tensors
        elif tensors:
            raise TypeError(f"give a batch or keyword tensors, not both; got both, with {sorted(tensors)}")
        if isinstance(batch, Mapping) and not isinstance(batch, TensorDictBase):
            batch = {
                name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value
                for name, value in batch.items()
            }
            for name, value in batch.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        mapped = map_batch(batch, self.agent.spaces.observations)
        if mapped is None:
            raise TypeError(
                f"the batch must be a TensorDict, or keyword tensors, got {type(batch).__name__}: {batch!r:.50}"
            )
        self.agent.learner.step(self.agent.normalizers(mapped))

    @staticmethod
    def fit_together(
        algorithms: "Sequence[IQL]",
        dataset: TensorDictBase,
        n_steps: int,
        callback: Callable[[int], None] | None = None,
    ) -> None:
        """Trains several that differ in their seeds alone; see :func:`iql_plugins.training.multi_seed.fit_together`."""
        fit_together([algorithm.agent for algorithm in algorithms], dataset, n_steps, callback)
