"""What the losses of a batch are made of: what the networks say, each computed once."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Size, Tensor, nn

from iql_plugins.keys import DISCOUNT, STEPS_TO_NEXT_OBS, shown
from iql_plugins.losses import functional, objectives
from iql_plugins.losses.batch import Batch, to_batch_shape
from iql_plugins.losses.bootstrap import time_dimension
from iql_plugins.losses.functional import LossFunction
from iql_plugins.losses.parameters import NETWORKS
from iql_plugins.losses.temperature import AutomaticTemperature
from iql_plugins.losses.torchrl_contract import TorchRLContract, check_written, in_keys_of
from iql_plugins.networks import calls, parameters
from iql_plugins.networks.builders import ValueDropout
from iql_plugins.networks.distributions import at_least_float32, evaluated_action
from iql_plugins.networks.encoders import Encoded, Evaluations
from iql_plugins.networks.ensemble import CriticEnsemble
from iql_plugins.ranges import AUTOMATIC

__all__ = ["BatchQuantities", "NetworkQuantities"]


class NetworkQuantities(TorchRLContract):
    """What a loss asks its networks for, checked; a subclass may compute one otherwise.

    See :class:`~iql_plugins.losses.iql.IQLLoss` for the arguments.
    """

    expectile: float
    max_weight: float
    loss_function: LossFunction | str
    value_objective: str
    policy_extraction: str
    objective_options: dict[str, float]

    @property
    def temperature(self) -> float | str:
        """The inverse temperature, or ``"auto"``; with a number the loss has no :attr:`automatic_temperature`."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float | str) -> None:
        self._temperature = temperature
        if not isinstance(temperature, str):
            self.automatic_temperature = None
        elif self.automatic_temperature is None:
            parameter = next(self.parameters(), None)
            self.automatic_temperature = AutomaticTemperature(None if parameter is None else parameter.device)

    @property
    def inverse_temperature(self) -> float | Tensor:
        r""":math:`\beta` as it is: a number, with an automatic temperature a tensor ``[]``."""
        if not isinstance(self.temperature, str):
            return self.temperature
        AUTOMATIC.check("temperature", self.temperature)
        assert self.automatic_temperature is not None
        return self.automatic_temperature.value

    def __init__(self, *networks: Any, **arguments: Any) -> None:
        super().__init__(*networks, **arguments)
        # Critics that share everything run once, one critic runs as it is: neither needs stacking.
        together = self.num_qvalue_nets == 1 or self._tied >= parameters.leaves(self.qvalue_network).keys()
        self._ensemble = None if together else CriticEnsemble.read(self.qvalue_network)
        # Of the targets, names of what is evaluated once for all of them.
        self._tied_in_targets = frozenset[str]()
        self._encoder_owners = self._find_encoder_owners()
        self._action_bounds = _bounds(self.actor_network)
        self._value_drops = any(isinstance(module, ValueDropout) for module in self.value_network.modules())

    def _find_encoder_owners(self) -> dict[str, str]:
        """For each network whose encoder would be asked more than once for the same: which one trains it, by names."""
        leaves = parameters.leaves(self.qvalue_network)
        tied = {name: id(leaves[name]) for name in self._tied}
        sharing: dict[Hashable, list[str]] = {}
        owners: dict[str, str] = {}
        for name in NETWORKS:
            encoded = _encoded(self._network(name))
            own = [] if encoded is None else list(map(id, encoded.encoder.parameters()))
            if encoded is None or not own or not calls.is_repeatable(encoded.encoder):
                continue
            sharing.setdefault((type(encoded.encoder), *own), []).append(name)
            if name == "qvalue_network" and set(own) <= set(tied.values()):
                owners["target_qvalue_network"] = "target_qvalue_network"
                self._tied_in_targets = frozenset(leaf for leaf, tensor in tied.items() if tensor in own)
        for names in sharing.values():
            # Where several losses train it, each may be asked for its gradient alone: they have no graph in common.
            if self.separate_losses and len(names) > 1:
                owners |= dict.fromkeys(names, names[0])
        return owners

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        applied = super()._apply(fn, recurse)
        # They go where the networks go: a copy at each step would wait for the device.
        self._action_bounds = {key: (fn(low), fn(high)) for key, (low, high) in self._action_bounds.items()}
        return applied

    def _distribution(self, batch: Batch) -> Any:
        """The policy's, of actions in the batch's states."""
        inputs = batch.select(in_keys_of(self.actor_network))
        with _Explained("actor_network", self.actor_network, inputs), self._sharing("actor_network", batch):
            return calls.distribution(self.actor_network, inputs, batch.shape)

    def _log_prob(self, batch: Batch, distribution: Any, shape: Size) -> Tensor:
        """``[*B]`` log-probability of the dataset's action."""
        log_prob = distribution.log_prob(self._policy_action(batch, distribution, shape))
        if not isinstance(log_prob, Tensor) or log_prob.shape != shape:
            came = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else type(log_prob).__name__
            raise ValueError(
                f"the log-probability of actor_network's {type(distribution).__name__} must have the batch shape "
                f"{tuple(shape)}, got {came}; does the distribution sum over the action's dimensions "
                "(torch.distributions.Independent)?"
            )
        return at_least_float32(log_prob)

    def _value(self, batch: Batch) -> Tensor:
        """``[*B]`` V(s)."""
        return self._value_of(in_keys_of(self.value_network), batch)

    @torch.no_grad()
    def _next_value(self, batch: Batch) -> Tensor:
        """``[*B]`` V(s'), without gradient."""
        return self._value_of(self._next_value_keys, batch)

    def _value_of(self, keys: Sequence[NestedKey], batch: Batch) -> Tensor:
        """``[*B]`` V of the observations under ``keys``, given in the order of the network's own."""
        network, key = self.value_network, self._tensor_keys.value
        inputs = batch.select(keys)
        named = dict(zip(in_keys_of(network), inputs.values(), strict=True))
        untrained = self._untrained["value_network"]
        with _Explained("value_network", network, inputs), self._sharing("value_network", batch):
            tensors = parameters.leaves(network) if untrained else {}
            detached = {name: tensors[name].detach() for name in untrained}
            output = calls.outputs(network, named, batch.shape, detached or None)
        value = _written("value", key, network, output)
        if value.shape[-1:] != (1,) or value.shape[: len(batch.shape)] != batch.shape:
            raise ValueError(
                f"value_network must write {shown(key)} of shape {(*batch.shape, 1)}, got {tuple(value.shape)}"
            )
        return at_least_float32(value.squeeze(-1))

    @torch.no_grad()
    def _target_q(self, batch: Batch, shape: Size) -> Tensor:
        """``[N, *B]`` Q(s, a) of the target critics, without gradient."""
        values = self._critic_values("target_qvalue_network", frozenset(), batch)
        return at_least_float32(self._chosen(values, batch, shape))

    def _q(self, batch: Batch, shape: Size) -> Tensor:
        """``[N, *B]`` Q(s, a) of the critics."""
        values = self._critic_values("qvalue_network", self._untrained["qvalue_network"], batch)
        return at_least_float32(self._chosen(values, batch, shape))

    def _policy_q(self, batch: Batch, distribution: Any, shape: Size) -> Tensor:
        """``[*B]`` min Q(s, π(s)) of the critics; gradients flow to the policy alone."""
        key = self._tensor_keys.action
        # Of composite policies a TensorDict.
        given: Any = batch.tensors[key]
        if key not in in_keys_of(self.qvalue_network):
            raise ValueError(
                f"policy_extraction={self.policy_extraction!r} asks the critics what the policy's action is worth: "
                f"qvalue_network must read {shown(key)}, it reads {', '.join(map(shown, self.qvalue_network.in_keys))}"  # type: ignore[arg-type]
            )
        action = evaluated_action(distribution)
        if not isinstance(given, Tensor) or action.shape != given.shape:
            came = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"policy_extraction={self.policy_extraction!r} gives the critics the policy's action of shape "
                f"{tuple(action.shape)} in the place of {shown(key)}, which must have that shape, got {came}"
            )
        # Critics of half precision take the dataset's, a distribution has float32 at least.
        action = action.to(given.dtype) if given.is_floating_point() else action
        if (bounds := self._action_bounds.get(key)) is not None:
            low, high = bounds
            action = action.clamp(low.to(action), high.to(action))
        values = self._frozen_critic_values(replace(batch, tensors=batch.tensors | {key: action}))
        return functional.minimum_over_critics(at_least_float32(self._chosen(values, batch, shape)))

    def _frozen_critic_values(self, batch: Batch) -> Tensor:
        """``[N, *B, ...]`` what the critics write; no gradient reaches their parameters."""
        everything = frozenset(parameters.leaves(self.qvalue_network))
        return self._critic_values("qvalue_network", everything, batch)

    def _critic_values(self, name: str, untrained: frozenset[str], batch: Batch) -> Tensor:
        """``[N, *B, ...]`` what critics or their targets write; no gradient reaches the leaves of ``untrained``."""
        network, tied = self._network(name), self._tied
        inputs = batch.select(in_keys_of(network))
        key = self._tensor_keys.state_action_value

        def call(tensors: "parameters.Tensors | None") -> Tensor:
            return _written("state_action_value", key, network, calls.outputs(network, inputs, batch.shape, tensors))

        with _Explained("qvalue_network", network, inputs), self._sharing(name, batch):
            if self._critic_count is None and not untrained:
                values = call(None).unsqueeze(0)
            else:
                tensors = parameters.leaves(network)
                tensors = {leaf: t.detach() if leaf in untrained else t for leaf, t in tensors.items()}
                if name == "target_qvalue_network":
                    # They have a slice for each critic of what critics share: all follow the same tensor.
                    tied = self._tied_in_targets
                    tensors |= {leaf: tensors[leaf][0] for leaf in tied}
                if self._critic_count is None:
                    values = call(tensors).unsqueeze(0)
                elif (perceptron := self._usable_ensemble(network, inputs)) is not None:
                    values = perceptron(network, tensors, list(inputs.values()), self._critic_count)
                else:
                    # Measured on CPUs: separate products are faster than batched ones, compiled 1.8 times as fast.
                    on_accelerator = any(tensor.device.type != "cpu" for tensor in tensors.values())
                    values = parameters.call_critics(
                        call,
                        tensors,
                        self._critic_count,
                        tied,
                        vmap=not self.deactivate_vmap and (on_accelerator or self.vmap_randomness != "different"),
                        randomness=self.vmap_randomness,
                    )
        return values

    def _sharing(self, name: str, batch: Batch) -> AbstractContextManager[None]:
        """Inside, a network takes what is known already of features of an encoder that it shares."""
        owner = self._encoder_owners.get(name)
        if owner is None:
            return nullcontext()
        trained, asked = _encoded(self._network(owner)), _encoded(self._network(name))
        if trained is None or asked is None or calls.has_hooks(trained.encoder) or calls.has_hooks(asked.encoder):
            return nullcontext()
        if owner not in batch.evaluations:
            batch.evaluations[owner] = Evaluations(trained.encoder, trained=batch.all_losses)
        return _Sharing(asked, batch.evaluations[owner])

    def _usable_ensemble(self, network: nn.Module, inputs: Mapping[NestedKey, Tensor]) -> CriticEnsemble | None:
        """The critics' steps, if nothing was asked for that they leave out."""
        out_keys: Any = network.out_keys
        first, *others = [tensor.shape[:-1] for tensor in inputs.values()]
        usable = (
            not self.deactivate_vmap
            and self.vmap_randomness == "different"
            and self._tensor_keys.state_action_value in out_keys
            and all(shape == first for shape in others)
            and not calls.has_hooks(network)
        )
        return self._ensemble if usable else None

    def _target(self, batch: Batch, shape: Size | None) -> Tensor:
        """``[*B]`` target of Q, without gradient."""
        next_value = self._next_value(batch)
        shape = next_value.shape if shape is None else shape
        reward, done, terminated = (to_batch_shape(batch.tensors[key], shape, key) for key in self._outcome_keys)
        reward = at_least_float32(reward)
        discount = self._discount(batch, shape, reward.dtype)
        time_dim = time_dimension(self._estimator, batch, shape) if self._estimator.needs_trajectories else -1
        mask = self._mask(batch, shape)
        target: Tensor = self._estimator(
            reward, next_value, done, terminated, discount=discount, mask=mask, time_dim=time_dim
        )
        return target

    def _discount(self, batch: Batch, shape: Size, dtype: torch.dtype) -> Tensor:
        if DISCOUNT in batch.tensors:
            return to_batch_shape(batch.tensors[DISCOUNT], shape, DISCOUNT).to(dtype)
        steps = batch.tensors.get(STEPS_TO_NEXT_OBS)
        return self._estimator.discount(
            None if steps is None else to_batch_shape(steps, shape, STEPS_TO_NEXT_OBS).to(dtype)
        )

    def _weight(self, batch: Batch, shape: Size) -> Tensor | None:
        key = self._tensor_keys.priority_weight
        return to_batch_shape(batch.tensors[key], shape, key) if key in batch.tensors else None

    def _mask(self, batch: Batch, shape: Size) -> Tensor | None:
        if batch.mask is None:
            return None
        return batch.mask.reshape(*batch.mask.shape, *[1] * (len(shape) - batch.mask.ndim)).expand(shape)

    def _policy_action(self, batch: Batch, distribution: Any, shape: Size) -> Tensor:
        """The dataset's action as the policy's distribution takes it; called after the critics."""
        key = self._tensor_keys.action
        action = batch.tensors[key]
        if isinstance(distribution, torch.distributions.Distribution):
            expected = (*distribution.batch_shape, *distribution.event_shape)
            if action.shape != expected:
                raise ValueError(
                    f"{shown(key)} must have shape {tuple(expected)}, that of actor_network's actions, "
                    f"got {tuple(action.shape)}"
                )
        return action

    def _chosen(self, values: Tensor, batch: Batch, shape: Size) -> Tensor:
        """``[N, *B]`` Q of the dataset's action from what the critics wrote."""
        if values.shape[1:] != (*shape, 1):
            raise ValueError(
                f"qvalue_network must write {shown(self._tensor_keys.state_action_value)} of shape {(*shape, 1)}, "
                f"got {tuple(values.shape[1:])}"
            )
        return values.squeeze(-1)


def _encoded(network: nn.Module) -> Encoded | None:
    """What puts an encoder before a perceptron in a network; None where nothing does."""
    return next((module for module in network.modules() if isinstance(module, Encoded)), None)


def _once(compute: Callable[["BatchQuantities"], Any]) -> Any:
    """A property that is computed once; ``functools.cached_property`` breaks a compiled graph."""
    name = compute.__name__

    def quantity(self: "BatchQuantities") -> Any:
        if name not in self.computed:
            self.computed[name] = compute(self)
        return self.computed[name]

    return property(quantity, doc=compute.__doc__)


def _bounds(policy: nn.Module) -> dict[NestedKey, tuple[Tensor, Tensor]]:
    """``[act]`` the lowest and the highest actions by key, where a policy of TorchRL's has a spec that knows them."""
    spec: Any = getattr(policy, "spec", None)
    spaces: dict[NestedKey, Any] = {}
    if spec is not None:
        spaces = {key: getattr(leaf, "space", None) for key, leaf in spec.items(True, True)}
    return {key: (space.low, space.high) for key, space in spaces.items() if hasattr(space, "low")}


class BatchQuantities:
    """What the losses of a batch are made of, each computed when it is first asked for, and once.

    Attributes:
        batch: what was read.
        computed: quantities by name.
        shape: ``*B``, which V(s) or, if it is not asked for, the target of Q tells.
    """

    def __init__(self, loss: NetworkQuantities, batch: Batch) -> None:
        self._loss, self.batch = loss, batch
        self.shape: Size | None = None
        self.computed: dict[str, Any] = {}

    @_once
    def value(self) -> Tensor:
        """``[*B]`` V(s)."""
        value = self._loss._value(self.batch)
        self.shape = value.shape
        return value

    @_once
    def target_q(self) -> Tensor:
        """``[N, *B]`` Q(s, a) of the target critics."""
        return self._loss._target_q(self.batch, self._known_shape)

    @_once
    def advantage(self) -> Tensor:
        """``[*B]`` min Q(s, a) of the target critics - V(s); gradients flow through V."""
        value = self.value
        return functional.advantage(self.target_q, value)

    @_once
    def signal(self) -> Tensor:
        """``[*B]`` what of the advantage counts for an action's weight, without gradient."""
        advantage: Tensor = self.advantage.detach()
        threshold = self._loss.objective_options.get("noise_threshold", 0.0)
        if threshold == 0.0:
            return advantage
        return functional.beyond_noise(advantage, self.noise, threshold)

    @_once
    def noise(self) -> Tensor:
        """``[]`` how far the target critics are apart, of the whole batch."""
        return functional.critic_disagreement(self.target_q, mask=self.mask)

    @_once
    def q(self) -> Tensor:
        """``[N, *B]`` Q(s, a) of the critics."""
        return self._loss._q(self.batch, self._known_shape)

    @_once
    def distribution(self) -> Any:
        """The policy's."""
        return self._loss._distribution(self.batch)

    @_once
    def log_prob(self) -> Tensor:
        """``[*B]`` log-probability of the dataset's action."""
        return self._loss._log_prob(self.batch, self.distribution, self._known_shape)

    @_once
    def policy_q(self) -> Tensor:
        """``[*B]`` min Q(s, π(s)) of the critics, for discrete actions its expectation; gradients reach the policy."""
        return self._loss._policy_q(self.batch, self.distribution, self._known_shape)

    @_once
    def target(self) -> Tensor:
        """``[*B]`` target of Q."""
        target = self._loss._target(self.batch, self.shape)
        self.shape = target.shape
        return target

    @property
    def value_loss(self) -> Tensor:
        """``[*B]`` of V."""
        return objectives.value_objective(self._loss.value_objective).loss(self)

    @_once
    def weight(self) -> Tensor:
        """``[*B]`` of the action, without gradient."""
        return objectives.value_objective(self._loss.value_objective).weight(self.undropped).detach()

    @property
    def undropped(self) -> "BatchQuantities":
        """The same with V as targets have it, see :class:`~iql_plugins.networks.builders.ValueDropout`."""
        return self._undropped if self._loss._value_drops else self

    @_once
    def _undropped(self) -> "BatchQuantities":
        of = BatchQuantities(self._loss, self.batch)
        dropped = ("value", "advantage", "signal")
        of.computed = {name: value for name, value in self.computed.items() if name not in dropped}
        with torch.no_grad():
            of.advantage  # noqa: B018 - computed here, without gradient, and kept
        return of

    @property
    def actor_loss(self) -> Tensor:
        """``[*B]`` of the policy."""
        return objectives.policy_extraction(self._loss.policy_extraction).loss(self)

    @property
    def qvalue_loss(self) -> Tensor:
        """``[*B]`` of the critics, summed over them."""
        return functional.qvalue_loss(self.q, self.target, self._loss.loss_function)

    def setting(self, name: str) -> Any:
        """A hyper-parameter of the loss, or an option of its objectives."""
        loss = self._loss
        if name == "temperature":
            return loss.inverse_temperature
        if name in loss.objective_options:
            return loss.objective_options[name]
        own = objectives.options(loss.value_objective, loss.policy_extraction)
        return own[name].default if name in own else getattr(loss, name)

    @property
    def importance(self) -> Tensor | None:
        """``[*B]`` the samples' importance weights; None where all count alike."""
        return self._loss._weight(self.batch, self._known_shape)

    @property
    def mask(self) -> Tensor | None:
        """``[*B]`` True where an entry counts; None where all do."""
        return self._loss._mask(self.batch, self._known_shape)

    def reduced(self, loss: Tensor) -> Tensor:
        """A loss per sample as the loss's reduction has it, weighted by importance."""
        return functional.reduce_loss(loss, self._loss.reduction, weight=self.importance, mask=self.mask)

    def unmasked(self, errors: Tensor) -> Tensor:
        """``[..., *B]`` zero where an entry does not count."""
        mask = self.mask
        return errors if mask is None else errors.masked_fill(~mask, 0.0)

    @property
    def _known_shape(self) -> Size:
        return self.value.shape if self.shape is None else self.shape


def _written(name: str, key: NestedKey, network: nn.Module, output: calls.Tensors) -> Tensor:
    tensor: Tensor | None = output.get(key, None)
    if tensor is None:
        check_written(name, key, network)
        raise KeyError(f"{type(network).__name__} has {shown(key)} among its out_keys, but did not write it")
    return tensor


class _Sharing(AbstractContextManager[None]):
    """Lends a network the evaluations of its encoder."""

    def __init__(self, encoded: Encoded, evaluations: Evaluations) -> None:
        self._encoded, self._evaluations = encoded, evaluations

    def __enter__(self) -> None:
        self._encoded.evaluations = self._evaluations

    def __exit__(self, *error: object) -> None:
        self._encoded.evaluations = None


class _Explained:
    """Says which network failed on which tensors, when one fails. No part of a compiled graph."""

    def __init__(self, name: str, network: nn.Module, inputs: Mapping[NestedKey, Tensor]) -> None:
        self._name, self._network, self._inputs = name, network, inputs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        # Subclasses (out of memory, say) keep their type for those who handle them.
        if type(error) is RuntimeError and not torch.compiler.is_compiling():
            came = ", ".join(f"{shown(k)}: {tuple(t.shape)} {t.dtype}" for k, t in self._inputs.items())
            parameter = next(self._network.parameters(), None)
            dtype = "" if parameter is None else f"; its parameters are {parameter.dtype} on {parameter.device}"
            raise RuntimeError(f"{self._name} failed on {came}{dtype}: {error}") from error
