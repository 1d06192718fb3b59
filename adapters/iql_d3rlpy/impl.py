"""What d3rlpy calls an implementation: an agent between d3rlpy's tensors and the key layout."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch
from d3rlpy.algos.qlearning import QLearningAlgoImplBase
from d3rlpy.torch_utility import Modules
from tensordict import TensorDict
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn

from iql_d3rlpy.batches import map_batch, observation_keys
from iql_d3rlpy.optimizers import ShownOptimizer, reset
from iql_plugins import checkpoint
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.keys import flat_name, next_key
from iql_plugins.limits import load_torch
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.spaces import Discrete
from iql_plugins.training.agent import Agent

__all__ = ["IQLImpl", "IQLModules", "TrainingState"]


class TrainingState:
    """All that continues a training and is not in the loss, in the form in which d3rlpy saves an optimiser.

    Args:
        agent: whose it is.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    @property
    def optim(self) -> Any:
        """The first optimiser; the only one, unless the configuration has optimiser factories of its own."""
        return self._agent.learner.optimizers[0]

    def reset(self) -> None:
        """Forgets the moments of all optimisers."""
        for optimizer in self._agent.learner.optimizers:
            reset(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The learner's state, and the random state that batches are drawn from."""
        agent = self._agent
        return {
            "learner": agent.learner.state_dict(),
            "generator": agent.generator.get_state(),
            "device": agent.generator.device.type,
            "extra": agent.extra,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; on an error nothing is changed.

        Raises:
            KeyError, ValueError: for a state of other optimisers or parameters.
        """
        agent = self._agent
        generator, device, extra = state["generator"], state["device"], dict(state["extra"])
        agent.learner.load_state_dict(state["learner"])
        # The state of another kind of device's generator means nothing to this one's.
        if device == agent.generator.device.type:
            agent.generator.set_state(generator.cpu())
        agent.extra = extra


@dataclasses.dataclass(frozen=True)
class IQLModules(Modules):  # type: ignore[misc]
    """What d3rlpy saves, and switches between training and evaluation."""

    loss: IQLLoss
    training: TrainingState

    def reset_optimizer_states(self) -> None:
        """Forgets the moments of all optimisers."""
        self.training.reset()


class IQLImpl(QLearningAlgoImplBase):  # type: ignore[misc]
    """An agent as d3rlpy drives it.

    Args:
        observation_shape: d3rlpy's.
        action_size: number of entries of an action, or of discrete actions.
        agent: the loss and its learner.
        keys: the key of each observation, in d3rlpy's order.
        device: d3rlpy's.

    Attributes:
        agent: the loss, its learner and the random state.
        keys: the key of each observation, in d3rlpy's order.
    """

    def __init__(
        self, observation_shape: Any, action_size: int, agent: Agent, keys: Sequence[NestedKey], device: str
    ) -> None:
        self.agent = agent
        self.keys = list(keys)
        integers = [key for key in keys if isinstance(agent.spaces.observations[key], Discrete)]
        self._integers = [*integers, *map(next_key, integers)]
        super().__init__(observation_shape, action_size, IQLModules(agent.loss, TrainingState(agent)), device)

    def save_model(self, f: BinaryIO) -> None:
        """Writes networks, targets, optimisers, step and random state, with their checksum."""
        state = {name: module.state_dict() for name, module in self._checkpointer.modules.items()}
        torch.save({**state, "checksum": checkpoint.checksum(state)}, f)

    def load_model(self, f: BinaryIO) -> None:
        """Reads networks, targets, optimisers, step and random state; on an error nothing is changed.

        Raises:
            RuntimeError, KeyError, ValueError: for another model's.
            CheckpointError: for one that is not as it was written.
        """
        state = load_torch(f)
        # Files of earlier releases have no checksum.
        if not {"loss", "training"} <= state.keys() <= {"loss", "training", "checksum"}:
            raise ValueError(
                f"the file has {', '.join(map(str, state))}: it is another algorithm's, an IQL of iql_d3rlpy has loss "
                "and training"
            )
        if "checksum" in state and state.pop("checksum") != checkpoint.checksum(state):
            raise CheckpointError("the model is not as it was written: its checksum is another one")
        before = {name: tensor.clone() for name, tensor in self.agent.loss.state_dict().items()}
        loss, training = state["loss"], state["training"]
        self.agent.loss.load_state_dict(loss)
        try:
            self._modules.training.load_state_dict(training)
        except BaseException:
            self.agent.loss.load_state_dict(before)
            raise

    def inner_update(self, batch: Any, grad_step: int) -> dict[str, float]:
        """One gradient step.

        Args:
            batch: a ``TorchMiniBatch`` in the networks' units.
            grad_step: not needed: the learner counts.

        Returns:
            The losses by d3rlpy's names; ``critic_loss`` is ``q_loss + v_loss``.

        Raises:
            TypeError: for anything else.
            DivergenceError: if a loss is not finite.
        """
        mapped = map_batch(batch)
        if mapped is None:
            raise TypeError(f"the batch must be a TorchMiniBatch of d3rlpy, got {type(batch).__name__}")
        tensors = dict(mapped.items(True, True))
        positions = observation_keys(batch.observations)
        observed = [(tensors.pop(position), tensors.pop(next_key(position))) for position in positions]
        for key, (before, after) in zip(self.keys, observed, strict=True):
            tensors[key], tensors[next_key(key)] = before, after
        tensors = self._with_dtypes(tensors)
        action = tensors["action"]
        # d3rlpy's tensors of actions are floats.
        discrete = self.agent.spaces.discrete
        tensors["action"] = action.long() - self._start if discrete else self.agent.normalizers.clipped(action)
        learner = self.agent.learner
        learner.step({flat_name(key): tensor for key, tensor in tensors.items()})
        assert learner.last_losses is not None
        actor, qvalue, value, entropy = losses = learner.last_losses.tolist()
        if not all(map(math.isfinite, losses)):
            learner.check_finite()
        return {
            "critic_loss": qvalue + value,
            "q_loss": qvalue,
            "v_loss": value,
            "actor_loss": actor,
            "entropy": entropy,
        }

    @torch.no_grad()
    def inner_predict_best_action(self, x: Any) -> Tensor:
        """``[B, act]`` the mean action in [-1, 1], or ``[B]`` the likeliest discrete one."""
        return self.greedy_action(x, self.policy)

    @torch.no_grad()
    def inner_sample_action(self, x: Any) -> Tensor:
        """As :meth:`inner_predict_best_action`, but a sample."""
        return self._action(x, self.policy, InteractionType.RANDOM)

    @torch.no_grad()
    def inner_predict_value(self, x: Any, action: Tensor) -> Tensor:
        """``[B]`` Q(s, a), the mean over critics, as that of d3rlpy's algorithms."""
        inputs = self._observations(x)
        inputs["action"] = action.reshape(-1, 1).long() - self._start if self.agent.spaces.discrete else action
        return self.agent.loss.qvalues(TensorDict(dict(inputs), batch_size=[len(action)])).mean(0)

    # What another algorithm of the same kind can be started from

    @property
    def policy(self) -> nn.Module:
        """The policy's network."""
        return self.agent.loss.actor_network

    @property
    def q_function(self) -> nn.ModuleList:
        """The critics: one module with stacked parameters."""
        return nn.ModuleList([self.agent.loss.qvalue_network])

    @property
    def policy_optim(self) -> Any:
        """The optimiser that the policy's parameters are in, those of the group that is named ``"actor"``.

        What is set in a group counts, see :class:`~iql_plugins.training.learner.Learner`.
        """
        return ShownOptimizer(self._optimizer("actor")[0])

    @property
    def q_function_optim(self) -> Any:
        """The optimiser that the critics' parameters are in, those of the group that is named ``"critic"``."""
        return ShownOptimizer(self._optimizer("critic")[0])

    def copy_policy_from(self, impl: Any) -> None:
        """Copies the policy of another IQL.

        Raises:
            ValueError: if it is no IQL of this adapter's, or has other networks.
        """
        self._copy_networks(impl, "actor_network")

    def copy_q_function_from(self, impl: Any) -> None:
        """Copies the critics of another IQL, with their targets, from which V and the policy learn.

        Raises:
            ValueError: if it is no IQL of this adapter's, or has other networks.
        """
        self._copy_networks(impl, "qvalue_network", "target_qvalue_network")

    def copy_policy_optim_from(self, impl: Any) -> None:
        """Copies the state of the policy's optimiser.

        Raises:
            ValueError: if it is no IQL of this adapter's, or has other parameters or another optimiser.
        """
        self._copy_optimizer(impl, "actor")

    def copy_q_function_optim_from(self, impl: Any) -> None:
        """Copies the state of the critics' optimiser.

        Raises:
            ValueError: if it is no IQL of this adapter's, or has other parameters or another optimiser.
        """
        self._copy_optimizer(impl, "critic")

    def _copy_networks(self, impl: Any, *names: str) -> None:
        theirs = _of_ours(impl).loss
        try:
            for name in names:
                self.agent.loss.from_stateful_net(name, theirs.get_stateful_net(name, copy=False))
        except RuntimeError as error:
            raise ValueError(f"the networks differ: {error}") from error

    def _copy_optimizer(self, impl: Any, name: str) -> None:
        optimizer, group = self._optimizer(name)
        _of_ours(impl)
        source, source_group = impl._optimizer(name)
        shapes = [[tuple(p.shape) for p in each["params"]] for each in (group, source_group)]
        if type(optimizer) is not type(source) or shapes[0] != shapes[1]:
            raise ValueError(
                f"the optimisers of the {name} differ: {type(optimizer).__name__} of {shapes[0]}, "
                f"{type(source).__name__} of {shapes[1]}"
            )
        for target, parameter in zip(group["params"], source_group["params"], strict=True):
            optimizer.state[target] = copy.deepcopy(source.state.get(parameter, {}))

    def _optimizer(self, name: str) -> tuple[Any, dict[str, Any]]:
        """The optimiser of a network, and the network's parameters in it."""
        for optimizer in self.agent.learner.optimizers:
            for group in optimizer.param_groups:
                if group["name"] == name:
                    return getattr(optimizer, "optim", optimizer), group
        raise ValueError(f"the {name} is not trained: it has no optimiser")

    def greedy_action(self, x: Any, actor: nn.Module) -> Tensor:
        """``[B, act]``, or ``[B]`` discrete, the action that a policy's network takes where it is not explored."""
        return self._action(x, actor, InteractionType.DETERMINISTIC)

    def _action(self, x: Any, actor: nn.Module, kind: InteractionType) -> Tensor:
        # No batch size: that of an exported policy may vary, and tensordict would want a number.
        inputs = TensorDict(dict(self._observations(x)), batch_size=[])
        with set_interaction_type(kind):
            action: Tensor = actor(inputs).get("action")
        # Samples of the paper's Gaussian may leave the bounds; they are clipped when they act.
        return action + self._start if self.agent.spaces.discrete else action.clamp(-1.0, 1.0)

    def _observations(self, x: Any) -> dict[NestedKey, Tensor]:
        values = x if isinstance(x, list | tuple) else [x]
        return self._with_dtypes(dict(zip(self.keys, values, strict=True)))

    def _with_dtypes(self, tensors: dict[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        """As the networks take them: d3rlpy's tensors are all float32, but for images."""
        widest = next(self.agent.loss.parameters()).dtype
        for key, tensor in tensors.items():
            if key in self._integers:
                tensors[key] = tensor.long()
            elif tensor.is_floating_point():
                tensors[key] = tensor.to(torch.promote_types(tensor.dtype, widest))
        return tensors

    @property
    def _start(self) -> int:
        action = self.agent.spaces.action
        return action.start if isinstance(action, Discrete) else 0


def _of_ours(impl: Any) -> Agent:
    if not isinstance(impl, IQLImpl):
        kind = type(impl)
        raise ValueError(
            f"the other algorithm must be an IQL of iql_d3rlpy, got a {kind.__name__} of {kind.__module__}"
        )
    return impl.agent
