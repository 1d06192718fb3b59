"""An agent: a loss, how it is trained, and what its policy needs to act. What is saved, and moved among adapters."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, overload

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, TransformedDistribution
from torch.optim import Optimizer

from iql_plugins import checkpoint
from iql_plugins.architecture import Role
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.config import IQLConfig, hyperparameters
from iql_plugins.data.intake import check_numbers
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.data.packed import BatchSource, batch_source
from iql_plugins.keys import flat_name
from iql_plugins.limits import WeightLimit
from iql_plugins.losses.bootstrap import ValueEstimator, ValueEstimators
from iql_plugins.losses.iql import DiscreteIQLLoss, IQLLoss
from iql_plugins.losses.parameters import ESTIMATOR, NETWORKS
from iql_plugins.networks import calls
from iql_plugins.networks.builders import check_loaded, networks_for, uninitialized
from iql_plugins.networks.encoders import ObservationEncoder, is_plain
from iql_plugins.spaces import Box, Discrete, Space, Spaces
from iql_plugins.training.gradients import compiler_available
from iql_plugins.training.learner import Groups, Learner, adam, resolve_compile

__all__ = ["Agent", "Observation", "Observer", "assemble_loss", "build_loss", "seeded_loss"]

_LOGGER = logging.getLogger(__name__)

#: One observation or a batch of them: an array, or one for each name of a Dict space.
Observation = Tensor | np.ndarray[Any, Any] | int | Mapping[str, "Tensor | np.ndarray[Any, Any] | int"]


#: The classes of a loss for continuous and for discrete actions.
Losses = tuple[type[IQLLoss], type[DiscreteIQLLoss]]
_IQL: Losses = (IQLLoss, DiscreteIQLLoss)


def build_loss(spaces: Spaces, config: IQLConfig, losses: Losses = _IQL) -> IQLLoss:
    """The loss over the paper's networks for an environment; weights from torch's random state.

    Vectors go straight into the perceptrons of :mod:`iql_plugins.networks`; each network has an encoder of its own
    (:mod:`iql_plugins.networks.encoders`) for images, integers and mixtures.

    Args:
        spaces: of the environment.
        config: the hyper-parameters.
        losses: the classes to take one of.

    Raises:
        ValueError: for spaces that the default networks do not take.
    """
    keys = list(spaces.observations)
    kinds = list(spaces.observations.values())

    def options(role: Role) -> dict[str, Any]:
        encoder = None if is_plain(kinds) else ObservationEncoder(kinds)
        size = sum(kind.size for kind in kinds if isinstance(kind, Box)) if encoder is None else encoder.size
        return {**config.network(role), "observation_size": size, "in_keys": keys, "encoder": encoder}

    actor, [qvalue], value = networks_for(
        spaces.action, options, dropout=config.actor_dropout, squashed=config.squashed
    )
    return assemble_loss(config, actor, qvalue, value, discrete=spaces.discrete, losses=losses)


def assemble_loss(
    config: IQLConfig,
    actor: nn.Module,
    qvalue: nn.Module | Sequence[nn.Module],
    value: nn.Module,
    *,
    discrete: bool,
    separate_losses: bool = False,
    losses: Losses = _IQL,
) -> IQLLoss:
    """The loss of a configuration over networks of your own.

    Args:
        config: the hyper-parameters.
        actor: the policy.
        qvalue: one critic, or a list of ``config.n_critics``.
        value: V.
        discrete: whether actions are discrete, and written as integers.
        separate_losses: whether parameters that networks share are trained by one loss only, see
            :class:`~iql_plugins.IQLLoss`.
        losses: as in :func:`build_loss`.
    """
    shared: dict[str, Any] = {
        "separate_losses": separate_losses,
        "num_qvalue_nets": config.n_critics,
        **config.of("loss"),
    }
    continuous_loss, discrete_loss = losses
    loss = (
        discrete_loss(actor, qvalue, value, action_space="categorical", **shared)
        if discrete
        else continuous_loss(actor, qvalue, value, **shared)
    )
    return loss.make_value_estimator(ValueEstimators.TD0, gamma=config.discount)


@dataclass(frozen=True)
class Observer:
    """A callback that changes nothing that is trained: steps need not look in between whether something has changed.

    Attributes:
        call: takes the number of all steps.
    """

    call: Callable[[int], None]

    def __call__(self, step: int) -> None:
        """Tells it of a step."""
        self.call(step)


class Agent:
    """What a trained agent consists of.

    Args:
        spaces: of the environment.
        config: the hyper-parameters; ``compile="auto"`` is resolved, so that a repetition does the same.
        normalizers: between the environment's units and the networks'; None brings actions to [-1, 1] only.
        loss: owns the networks; None builds the paper's, from ``seed``.
        learner: trains the loss; None makes it from the configuration.
        seed: of the weights that are built, of :attr:`generator` and of the learner; None draws one.
        device: where the networks are built.

    Raises:
        ValueError: if a loss was built with other hyper-parameters than the configuration's; names the first.

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
        if loss is None:
            with WeightLimit.of_memory():
                loss = seeded_loss(spaces, config, seed).to(torch.device(device))
        for name, value in _hyperparameters(loss).items():
            if not _equal(value, getattr(config, name)):
                raise ValueError(
                    f"the loss was built with {name}={value!r}, the configuration has {getattr(config, name)!r}: "
                    "both must be the same"
                )
        parameter = next(loss.parameters())
        self.spaces = spaces
        self.config = config.replace(compile=resolve_compile(config.compile, config.n_steps, parameter.device))
        self.loss = loss
        self.normalizers = (Normalizers(spaces) if normalizers is None else normalizers).to(parameter.device)
        self.normalizers.discount = config.discount
        self.learner = Learner.from_config(loss, self.config, seed=seed) if learner is None else learner
        if self.learner.loss is not loss:
            raise ValueError("the learner must train the agent's loss, it was made for another one")
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

    def fit(self, dataset: TensorDictBase, n_steps: int, callback: Callable[[int], None] | None = None) -> None:
        """Trains on a dataset in the environment's units, transitions drawn uniformly with replacement.

        Args:
            dataset: transitions by the key layout, batch size ``[N]``; memory-mapped ones stay on disk.
            n_steps: gradient steps, further ones if some were taken already.
            callback: called with the number of all steps after each of them; an :class:`Observer` lets steps be faster.

        Raises:
            ValueError: as :meth:`check`.
            DivergenceError: if losses or weights are no longer finite.
        """
        source = self.transitions(dataset)
        rows, size, on_disk = len(source), self.config.batch_size, source.on_disk

        def draw() -> Mapping[str, Tensor]:
            return source.batch(self.learner.draw(rows, size, self.generator, on_disk=on_disk))

        self.train(draw, n_steps, callback)

    def train(
        self,
        draw: Callable[[], Mapping[str, Tensor] | TensorDictBase],
        n_steps: int,
        callback: Callable[[int], None] | None = None,
    ) -> None:
        """Trains on batches in the networks' units.

        Args:
            draw: returns a batch, as :meth:`iql_plugins.training.learner.Learner.step` takes it, and changes nothing.
            n_steps: as in :meth:`fit`.
            callback: as in :meth:`fit`.

        Raises:
            DivergenceError: if losses or weights are no longer finite.
        """
        alone = callback is None or isinstance(callback, Observer)
        with self.learner.undisturbed() if alone else nullcontext():
            for _ in range(n_steps):
                self.learner.step(draw())
                if callback is not None:
                    callback(self.learner.step_count)
        self.learner.check()

    def check(self, dataset: TensorDictBase) -> None:
        """Looks at a dataset in the environment's units before it is trained on; one pass over it.

        How many of its actions are beyond the environment's bounds, and are clipped, is logged as a warning.

        Raises:
            ValueError: if it does not fit the spaces, has values that are not finite, or actions that no clipping
                explains, unless the configuration has ``clip_all_actions``; names the key, and the row.
        """
        self.spaces.check(dataset)
        excess = check_numbers(dataset, self.spaces, clip_all_actions=self.config.clip_all_actions)
        if excess.count:
            _LOGGER.warning("%s: they are clipped, as the environment clips them", excess)

    def transitions(self, dataset: TensorDictBase) -> BatchSource:
        """A dataset in the environment's units as batches for the learner; what the loss does not read is left out.

        Raises:
            ValueError: if the dataset is empty, or as :meth:`check`.
        """
        self.check(dataset)
        return batch_source(dataset.select(*self.loss.accepted_keys, strict=False), self.normalizers, self.device)

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
        kind = InteractionType.DETERMINISTIC if deterministic else InteractionType.RANDOM
        with calls.evaluation_mode(actor), set_interaction_type(kind):
            action = actor(TensorDict(dict(inputs), batch_size=[count])).get("action")
        action = self.normalizers.environment_action(action)
        action = action if batched else action[0]
        if not numpy:
            return action
        array = action.cpu().numpy()
        return array if array.ndim else array.item()

    @torch.no_grad()
    def distribution(self, observation: Any) -> Distribution:
        """The policy's distribution over actions: continuous ones in the environment's units, discrete ones from 0 on.

        Args:
            observation: a batch, as :meth:`act` takes it.

        Returns:
            Of batch shape ``[B]``; of continuous actions densities are those per unit of the environment's.

        Raises:
            ValueError, KeyError: as :meth:`act`.
        """
        inputs, _, _ = self._inputs(observation)
        actor = self.loss.actor_network
        with calls.evaluation_mode(actor):
            policy: Distribution = calls.distribution(actor, inputs, next(iter(inputs.values())).shape[:1])
        if self.spaces.discrete:
            return policy
        low, high = self.normalizers.get_buffer("action_low"), self.normalizers.get_buffer("action_high")
        half = (high - low) / 2
        return TransformedDistribution(policy, [AffineTransform(low + half, half, event_dim=1)], validate_args=False)

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
        depths: set[bool | None] = set()
        dtype = next(self.loss.actor_network.parameters()).dtype
        for key, value in given.items():
            # A copy of NumPy's: views of it may be read-only, or run backwards, which tensors cannot.
            value = np.array(value, order="C") if isinstance(value, np.ndarray) else value
            tensor, is_batch = _batched(key, spaces[key], torch.as_tensor(value, device=self.device), dtype)
            inputs[key] = self.normalizers.observation(key, tensor)
            depths.add(is_batch)
        depths.discard(None)
        if len(depths) > 1:
            raise ValueError("the entries of a Dict observation must all have a batch dimension, or none")
        return inputs, depths != {False}, numpy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it into one file, atomically: networks, targets, optimisers, normalisers, random state, step.

        Networks of your own are saved, too, but whoever loads them must bring the modules.
        """
        checkpoint.write(path, *self.state())

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`save` writes: JSON values, and tensors by name; ``loss.NAME`` are those of the loss."""
        learner, learner_tensors = checkpoint.flatten(self.learner.state_dict(), "learner")
        document = {
            "spaces": self.spaces.to_json(),
            "config": self._config_in_force().to_json(),
            "normalizers": self.normalizers.extra_state(),
            "learner": learner,
            "custom": self.custom_parts(),
            "generator": self.generator.device.type,
            "extra": self.extra,
        }
        tensors = {f"loss.{name}": tensor for name, tensor in self.loss.state_dict().items()}
        tensors |= {f"normalizers.{name}": tensor for name, tensor in self.normalizers.state_dict().items()}
        tensors |= learner_tensors | {"generator": self.generator.get_state()}
        return document, tensors

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        loss: IQLLoss | None = None,
        make_optimizers: Callable[[Groups], Sequence[Optimizer]] = adam,
    ) -> "Agent":
        """The agent that :meth:`save` wrote, ready to act and to go on training.

        A training that was compiled goes on uncompiled where there is no compiler.

        Args:
            path: the file.
            device: where the networks go.
            loss: receives the weights; needed only if it is not one that :func:`build_loss` makes. It must have the
                hyper-parameters of the one that was saved.
            make_optimizers: makes the optimisers if those that were saved are not
                :func:`~iql_plugins.training.learner.adam`.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is no checkpoint, or holds no agent that fits ``loss`` and ``make_optimizers``;
                a loss that was given is as it was.
        """
        document, tensors = checkpoint.read(path)
        return cls.from_state(
            document, tensors, name=os.fspath(path), device=device, loss=loss, make_optimizers=make_optimizers
        )

    @classmethod
    def from_state(
        cls,
        document: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        name: str,
        device: torch.device | str = "cpu",
        loss: IQLLoss | None = None,
        make_optimizers: Callable[[Groups], Sequence[Optimizer]] = adam,
    ) -> "Agent":
        """The agent of :meth:`state`; see :meth:`load`.

        Args:
            document: the JSON values.
            tensors: by name.
            name: of where they came from, for errors.
            device: as in :meth:`load`.
            loss: as in :meth:`load`.
            make_optimizers: as in :meth:`load`.

        Raises:
            CheckpointError: as :meth:`load`.
        """
        # An unknown device is no fault of the file.
        device = torch.empty(0, device=device).device
        try:
            spaces = Spaces.from_json(document["spaces"])
            config = IQLConfig.from_json(document["config"])
            custom = document["custom"]
            # The dtype is in the tensors.
            modules = [part for part in custom if part != _DTYPE]
            if modules and loss is None:
                raise CheckpointError(
                    f"{', '.join(modules)} of {name!r} are not the default ones: pass loss=, "
                    "built like the one that was saved"
                )
            if config.compile == "yes" and not compiler_available(device):
                config = config.replace(compile="no")
            parts = {part: _part(tensors, part) for part in ("loss", "normalizers")}
            normalizers = Normalizers.restored(spaces, document["normalizers"], parts["normalizers"])
            normalizers.to(_dtype(parts["normalizers"]))
            if loss is None:
                limit = WeightLimit.of_file(sum(tensor.nbytes for tensor in tensors.values()))
                with limit, uninitialized():
                    loss = seeded_loss(spaces, config, seed=0)
                loss.to(device, _dtype(_of_networks(parts["loss"])))
            _check_dtypes(name, _of_networks(parts["loss"]), loss)
            learner = Learner.from_config(loss, config, seed=0, make_optimizers=make_optimizers)
            agent = cls(spaces, config, normalizers=normalizers, loss=loss, learner=learner, seed=0)
            learner.load_state_dict(checkpoint.unflatten(document["learner"], tensors))
            # The state of another kind of device's generator means nothing to this one's: it draws anew, and for
            # every seed something else.
            if document["generator"] == agent.generator.device.type:
                agent.generator.set_state(tensors["generator"])
            else:
                agent.generator.manual_seed(learner.seed + learner.step_count)
            if (parts_of_loss := [part for part in agent.custom_parts() if part != _DTYPE]) != modules:
                raise CheckpointError(
                    f"{name!r} has other networks than the default ones in {modules}, the loss in {parts_of_loss}"
                )
            agent.extra = dict(document["extra"])
            # Last, because it is the one part that may be the caller's: all of it is loaded, or nothing.
            loss.load_state_dict(parts["loss"])
            check_loaded(loss)
        except CheckpointError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{name!r} does not hold a whole agent: {error}") from error
        return agent

    def custom_parts(self) -> list[str]:
        """What of the loss is not as :func:`build_loss` makes it for these spaces and hyper-parameters."""
        try:
            with torch.device("meta"), uninitialized():
                default = build_loss(self.spaces, self.config)
        except ValueError:
            # The default networks do not take these spaces.
            return list(NETWORKS)
        custom = [
            name for name in NETWORKS if _structure(getattr(self.loss, name)) != _structure(getattr(default, name))
        ]
        custom += [name for name in _OPTIONS if _option(self.loss, name) != _option(default, name)]
        # A framework's class has the name of the core's.
        if type(self.loss).__name__ != type(default).__name__:
            custom.append("class")
        if any(parameter.dtype != torch.get_default_dtype() for parameter in self.loss.parameters()):
            custom.append(_DTYPE)
        return custom

    def options(self) -> dict[str, Any]:
        """What is set on the loss and is no hyper-parameter."""
        return {name: _option(self.loss, name) for name in _OPTIONS}

    def _config_in_force(self) -> IQLConfig:
        """The configuration with what was changed in the loss or the learner since."""
        learner = self.learner
        values = _hyperparameters(self.loss) | {
            "max_grad_norm": learner.max_grad_norm,
            "polyak": learner.target_updater.tau,
            **{f"{name}_learning_rate": rate for name, rate in learner.base_rates().items()},
        }
        return self.config.replace(
            **{name: value for name, value in values.items() if not _equal(value, getattr(self.config, name))}
        )


_DTYPE = "dtype"
#: Settings of a loss that are not hyper-parameters.
_OPTIONS = (
    "value_type",
    "reduction",
    "separate_losses",
    "tensor_keys",
    "loss_mask_key",
    "use_prioritized_weights",
    "action_space",
)


def _option(loss: IQLLoss, name: str) -> Any:
    value = getattr(loss, name, None)
    estimator = dict(loss.named_children())[ESTIMATOR]
    if name == "value_type" and not isinstance(estimator, ValueEstimator):
        # A framework's own, with an equation of its own, may go by the name of one of ours.
        return type(estimator).__name__
    # A framework's enumeration of estimators has the same names.
    return value.name if isinstance(value, Enum) else value


def _hyperparameters(loss: IQLLoss) -> dict[str, Any]:
    """The hyper-parameters that a loss has, by their names in :class:`IQLConfig`."""
    own = {name: getattr(loss, name) for name in hyperparameters("loss")}
    return own | {"n_critics": loss.num_qvalue_nets, "discount": float(loss.value_estimator.gamma)}


def _equal(value: Any, other: Any) -> bool:
    # The discount is kept in float32.
    numbers = isinstance(value, float) and isinstance(other, float)
    return math.isclose(value, other, rel_tol=1e-6) if numbers else value == other


def seeded_loss(spaces: Spaces, config: IQLConfig, seed: int | None, losses: Losses = _IQL) -> IQLLoss:
    """:func:`build_loss`, on the CPU and with weights from a seed; None draws from torch's random state."""
    if seed is None:
        return build_loss(spaces, config, losses)
    # The caller's random state is his own. Weights are drawn on the CPU, the same ones for every device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return build_loss(spaces, config, losses)


def _structure(network: nn.Module) -> tuple[object, ...]:
    """What two networks have in common that differ in their weights and their device alone."""
    modules = [
        (
            name,
            type(module).__qualname__,
            module.extra_repr(),
            [getattr(module, keys, None) for keys in ("in_keys", "out_keys")],
            str(getattr(module, "distribution_kwargs", None)),
            {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | tuple | type)}
            | {"training": None},
        )
        for name, module in network.named_modules()
    ]
    return modules, {name: tensor.shape for name, tensor in network.state_dict().items()}


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _of_networks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "_network_params." in key}


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """The one dtype of all numbers that are not integers; None if there are several."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _check_dtypes(name: str, saved: Mapping[str, Tensor], loss: IQLLoss) -> None:
    own = loss.state_dict()
    for key, tensor in saved.items():
        if key in own and own[key].dtype != tensor.dtype:
            raise CheckpointError(
                f"{key} of {name!r} is {tensor.dtype}, that of the loss {own[key].dtype}: pass a loss of the same dtype"
            )


def _batched(key: NestedKey, space: Space, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool | None]:
    """An observation with a batch dimension, and whether it had one: None for ``[1]`` of a Discrete space."""
    shape, given = space.shape if isinstance(space, Box) else (), tuple(value.shape)
    if isinstance(space, Discrete):
        if value.is_floating_point():
            raise ValueError(f"{flat_name(key)} must be integers, got {value.dtype}")
        value = value.squeeze(-1) if value.ndim == 2 else value
        if not ((value >= space.start) & (value < space.start + space.n)).all():
            raise ValueError(f"{flat_name(key)} must be from {space.start} to {space.start + space.n - 1}, got {value}")
    elif value.is_floating_point() or space.dtype != "uint8":
        value = value.to(dtype)
    if tuple(value.shape) == shape:
        return (value.unsqueeze(0) if isinstance(space, Box) else value.reshape(1, 1)), False
    if tuple(value.shape[1:]) == shape and value.ndim == len(shape) + 1:
        return (value, True) if isinstance(space, Box) else (value.unsqueeze(-1), None if given == (1,) else True)
    raise ValueError(f"{flat_name(key)} must have shape {shape}, or that behind a batch's, got {tuple(value.shape)}")
