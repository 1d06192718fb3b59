"""An agent: a loss, how it is trained, and what its policy needs to act. What is saved, and moved among adapters."""

import os
from collections.abc import Mapping
from typing import Any, overload

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn

from iql_plugins import checkpoint
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.config import IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.encoders import ObservationEncoder, is_plain
from iql_plugins.keys import flat_name
from iql_plugins.learner import Learner, resolve_compile
from iql_plugins.loss import DiscreteIQLLoss, IQLLoss
from iql_plugins.networks import categorical_actor, critic, discrete_critic, gaussian_actor, value_function
from iql_plugins.spaces import Box, Discrete, Space, Spaces
from iql_plugins.value_estimators import ValueEstimators

__all__ = ["Agent", "Observation", "build_loss"]

#: One observation or a batch of them: an array, or one for each name of a Dict space.
Observation = Tensor | np.ndarray[Any, Any] | int | Mapping[str, "Tensor | np.ndarray[Any, Any] | int"]


def build_loss(spaces: Spaces, config: IQLConfig) -> IQLLoss:
    """The loss over the paper's networks for an environment; weights from torch's random state.

    Vectors go straight into the perceptrons of :mod:`iql_plugins.networks`; each network has an encoder of its own
    (:mod:`iql_plugins.encoders`) for images, integers and mixtures.

    Args:
        spaces: of the environment.
        config: the hyper-parameters.

    Raises:
        ValueError: for spaces that the default networks do not take.
    """
    keys = list(spaces.observations)
    kinds = list(spaces.observations.values())

    def options(*, dropout: bool = False) -> dict[str, Any]:
        encoder = None if is_plain(kinds) else ObservationEncoder(kinds)
        size = sum(kind.size for kind in kinds if isinstance(kind, Box)) if encoder is None else encoder.size
        given = {"observation_size": size, "hidden_sizes": config.hidden_sizes, "in_keys": keys, "encoder": encoder}
        return given | ({"dropout": config.actor_dropout} if dropout else {})

    shared: dict[str, Any] = {
        "num_qvalue_nets": config.n_critics,
        "loss_function": config.loss_function,
        "temperature": config.temperature,
        "expectile": config.expectile,
        "max_weight": config.max_weight,
    }
    loss: IQLLoss
    if isinstance(spaces.action, Discrete):
        count = spaces.action.n
        loss = DiscreteIQLLoss(
            categorical_actor(action_count=count, **options(dropout=True)),
            discrete_critic(action_count=count, **options()),
            value_function(**options()),
            action_space="categorical",
            **shared,
        )
    else:
        size = spaces.action.size
        loss = IQLLoss(
            gaussian_actor(action_size=size, squashed=config.squashed, **options(dropout=True)),
            critic(action_size=size, **options()),
            value_function(**options()),
            **shared,
        )
    return loss.make_value_estimator(ValueEstimators.TD0, gamma=config.discount)


class Agent:
    """What a trained agent consists of.

    Args:
        spaces: of the environment.
        config: the hyper-parameters; ``compile="auto"`` is resolved, so that a repetition does the same.
        normalizers: between the environment's units and the networks'; None brings actions to [-1, 1] only.
        loss: owns the networks; None builds the paper's, from ``seed``.
        learner: trains the loss; None makes it from the configuration.
        seed: of the weights that are built, and of :attr:`generator`; None draws one.
        device: where the networks are built.

    Attributes:
        learner: trains the loss, and counts its steps.
        generator: draws the indices of batches; its state is saved.
        extra: JSON values of an adapter that are saved and loaded along.

    >>> agent = Agent(Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,))), IQLConfig(n_steps=10), seed=0)
    >>> agent.act(np.zeros(3, np.float32)).shape
    (1,)
    """

    def __init__(
        self,
        spaces: Spaces,
        config: IQLConfig,
        *,
        normalizers: Normalizers | None = None,
        loss: IQLLoss | None = None,
        learner: Learner | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        if loss is None:
            loss = _seeded_loss(spaces, config, seed).to(device)
        parameter = next(loss.parameters())
        self.spaces = spaces
        self.config = config.replace(compile=resolve_compile(config.compile, config.n_steps, parameter.device))
        self.loss = loss
        self.normalizers = (Normalizers(spaces) if normalizers is None else normalizers).to(parameter.device)
        self.learner = Learner.from_config(loss, self.config) if learner is None else learner
        self.generator = torch.Generator(parameter.device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.extra: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        device: torch.device = next(self.loss.parameters()).device
        return device

    @overload
    def act(self, observation: Tensor | Mapping[str, Tensor], deterministic: bool = True) -> Tensor: ...

    @overload
    def act(self, observation: Any, deterministic: bool = True) -> Any: ...

    @torch.no_grad()
    def act(self, observation: Any, deterministic: bool = True) -> Any:
        """The policy's action, in the environment's units and within its bounds.

        Args:
            observation: one, or a batch ``[B, *obs]``, in the environment's units; a mapping for Dict spaces.
            deterministic: the mean (the likeliest of discrete actions), or a sample from torch's random state.

        Returns:
            ``[act]`` or ``[B, act]``, for discrete actions an integer or ``[B]``; a tensor for tensors, else NumPy.

        Raises:
            ValueError: for a shape that the space does not have.
            KeyError: for a missing entry of a Dict observation.
        """
        inputs, batched, numpy = self._inputs(observation)
        count = len(next(iter(inputs.values())))
        actor = self.loss.actor_network
        training = actor.training
        actor.eval()
        try:
            with set_interaction_type(InteractionType.DETERMINISTIC if deterministic else InteractionType.RANDOM):
                action = actor(TensorDict(dict(inputs), batch_size=[count])).get("action")
        finally:
            actor.train(training)
        action = self.normalizers.environment_action(action)
        action = action if batched else action[0]
        if not numpy:
            return action
        array = action.cpu().numpy()
        return array if array.ndim else array.item()

    def _inputs(self, observation: Any) -> tuple[dict[NestedKey, Tensor], bool, bool]:
        """Normalised observations with a batch dimension; whether they had one; whether they were NumPy's."""
        spaces = self.spaces.observations
        if isinstance(self.spaces.observation, Mapping):
            if not isinstance(observation, Mapping | TensorDictBase):
                raise ValueError(f"the observation must be a mapping of {sorted(self.spaces.observation)}")
            if missing := sorted(self.spaces.observation.keys() - set(observation.keys())):
                raise KeyError(f"the observation has no {', '.join(missing)}")
            given = {key: observation[key[-1]] for key in spaces}
        else:
            given = {"observation": observation}
        numpy = not any(isinstance(value, Tensor) for value in given.values())
        inputs: dict[NestedKey, Tensor] = {}
        depths = set()
        for key, value in given.items():
            tensor, is_batch = _batched(key, spaces[key], torch.as_tensor(value, device=self.device))
            inputs[key] = self.normalizers.observation(key, tensor)
            depths.add(is_batch)
        if len(depths) > 1:
            raise ValueError("the entries of a Dict observation must all have a batch dimension, or none")
        return inputs, depths.pop(), numpy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it into one file, atomically: networks, targets, optimisers, normalisers, random state, step.

        Networks of your own are saved, too, but whoever loads them must bring the modules.
        """
        learner, learner_tensors = checkpoint.flatten(self.learner.state_dict(), "learner")
        document = {
            "spaces": self.spaces.to_json(),
            "config": self.config.to_json(),
            "normalizers": self.normalizers.extra_state(),
            "learner": learner,
            "custom": self.custom_networks(),
            "generator": self.generator.device.type,
            "extra": self.extra,
        }
        tensors = {f"loss.{name}": tensor for name, tensor in self.loss.state_dict().items()}
        tensors |= {f"normalizers.{name}": tensor for name, tensor in self.normalizers.state_dict().items()}
        tensors |= learner_tensors | {"generator": self.generator.get_state()}
        checkpoint.write(path, document, tensors)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", loss: IQLLoss | None = None
    ) -> "Agent":
        """The agent that :meth:`save` wrote, ready to act and to go on training.

        Args:
            path: the file.
            device: where the networks go.
            loss: receives the weights; needed only if the networks are not those that :func:`build_loss` makes.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is no checkpoint, or its networks are custom and ``loss`` is not given.
        """
        document, tensors = checkpoint.read(path)
        try:
            spaces = Spaces.from_json(document["spaces"])
            config = IQLConfig.from_json(document["config"])
            custom = document["custom"]
            if custom and loss is None:
                raise CheckpointError(
                    f"{', '.join(custom)} of {os.fspath(path)!r} are not the default networks: pass loss=, "
                    "with networks like those that were saved"
                )
            parts = {name: _part(tensors, name) for name in ("loss", "normalizers")}
            normalizers = Normalizers.restored(spaces, document["normalizers"], parts["normalizers"])
            agent = cls(spaces, config, normalizers=normalizers, loss=loss, seed=0, device=device)
            agent.loss.load_state_dict(parts["loss"])
            agent.learner.load_state_dict(checkpoint.unflatten(document["learner"], tensors))
            # The state of another kind of device's generator means nothing to this one's.
            if document["generator"] == agent.generator.device.type:
                agent.generator.set_state(tensors["generator"])
            agent.extra = dict(document["extra"])
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{os.fspath(path)!r} does not hold a whole agent: {error}") from error
        return agent

    def custom_networks(self) -> list[str]:
        """The networks that are not those that :func:`build_loss` makes for these spaces and hyper-parameters."""
        with torch.device("meta"):
            default = build_loss(self.spaces, self.config)
        names = ("actor_network", "value_network", "qvalue_network")
        return [name for name in names if _structure(getattr(self.loss, name)) != _structure(getattr(default, name))]


def _seeded_loss(spaces: Spaces, config: IQLConfig, seed: int | None) -> IQLLoss:
    if seed is None:
        return build_loss(spaces, config)
    # The caller's random state is his own. Weights are drawn on the CPU, the same ones for every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_loss(spaces, config)


def _structure(network: nn.Module) -> tuple[str, dict[str, torch.Size]]:
    return repr(network), {name: tensor.shape for name, tensor in network.state_dict().items()}


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _batched(key: NestedKey, space: Space, value: Tensor) -> tuple[Tensor, bool]:
    """An observation with a batch dimension, and whether it had one."""
    shape = space.shape if isinstance(space, Box) else ()
    if isinstance(space, Discrete):
        if value.is_floating_point():
            raise ValueError(f"{flat_name(key)} must be integers, got {value.dtype}")
        value = value.squeeze(-1) if value.ndim == 2 else value
    elif not value.is_floating_point() and space.dtype != "uint8":
        value = value.to(torch.get_default_dtype())
    if tuple(value.shape) == shape:
        return (value.unsqueeze(0) if isinstance(space, Box) else value.reshape(1, 1)), False
    if tuple(value.shape[1:]) == shape and value.ndim == len(shape) + 1:
        return (value if isinstance(space, Box) else value.unsqueeze(-1)), True
    raise ValueError(f"{flat_name(key)} must have shape {shape}, or that behind a batch's, got {tuple(value.shape)}")
