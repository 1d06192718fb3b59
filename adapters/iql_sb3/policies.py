"""Policies that hold the loss: whoever saves one saves actor, critics, V, their targets and the normalisers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from iql_plugins.architecture import ACTIVATIONS, Initialization, Role
from iql_plugins.config import IQLConfig, hyperparameters
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.losses.bootstrap import ValueEstimators
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.networks.builders import networks_for
from iql_plugins.networks.encoders import is_plain
from iql_plugins.spaces import Box
from iql_plugins.training.agent import assemble_loss, build_loss
from iql_plugins.training.learner import Groups, adam
from iql_sb3.networks import Actor, Critic, FeaturesEncoder, Inputs, Loaded
from iql_sb3.spaces import layout_spaces

__all__ = [
    "Actor",
    "AgentPolicy",
    "CnnPolicy",
    "Critic",
    "IQLPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "set_hyperparameters",
]

NO_EXPLORATION = (
    "IQL has no state-dependent exploration: its policy is a Gaussian with a deviation of its own; leave use_sde and "
    "use_sde_at_warmup False, and pass action_noise to explore more"
)
#: What Stable-Baselines3 calls the networks in ``net_arch``.
_ARCHITECTURE = {"actor": "pi", "critic": "qf", "value": "vf"}
#: What the policy calls the core's hyper-parameters of networks, where the names differ.
NETWORK_NAMES = {"hidden_sizes": "net_arch", "activation": "activation_fn", "actor_dropout": "dropout"}
NetArch = Sequence[int] | Mapping[str, Sequence[int]]


def layer_sizes(
    net_arch: NetArch | None, actor: Sequence[int] | None = None, critic: Sequence[int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Widths of the hidden layers of the policy (``pi``), the critics (``qf``) and V (``vf``).

    >>> layer_sizes({"pi": [64], "qf": [128, 128]})
    {'pi': (64,), 'qf': (128, 128), 'vf': (128, 128)}

    Args:
        net_arch: one list for all, or a mapping with ``pi`` and ``qf``, and ``vf`` if V's are not the critics'. None
            takes the paper's.
        actor: the policy's beside a list; None for the list's.
        critic: the critics' and V's beside a list; None for the list's.

    Raises:
        ValueError: for a mapping without ``pi`` or ``qf``, with another name, or beside others' widths.
    """
    if net_arch is None:
        net_arch = IQLConfig.hidden_sizes
    if not isinstance(net_arch, Mapping):
        pi, qf = (tuple(net_arch if own is None else own) for own in (actor, critic))
        return {"pi": pi, "qf": qf, "vf": qf}
    if actor is not None or critic is not None:
        raise ValueError(
            "net_arch must be a list beside actor_hidden_sizes or critic_hidden_sizes: they are a dict's 'pi' and 'qf'"
        )
    if not {"pi", "qf"} <= net_arch.keys() <= {"pi", "qf", "vf"}:
        raise ValueError(f"net_arch must be a list, or a dict of 'pi', 'qf' and, if V differs, 'vf', got {net_arch}")
    return {name: tuple(net_arch.get(name, net_arch["qf"])) for name in ("pi", "qf", "vf")}


def network_hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy's arguments say of the networks, by the core's names.

    An activation, or widths of V alone, that the core has no name for are left out: such networks are not the core's.

    Args:
        arguments: of :class:`IQLPolicy`, or some of them.

    Raises:
        ValueError: as :func:`layer_sizes`.
    """
    names = {name: NETWORK_NAMES.get(name, name) for name in hyperparameters("networks")}
    given = {name: arguments[own] for name, own in names.items() if own in arguments}
    net_arch = given.pop("hidden_sizes", None)
    sizes = layer_sizes(net_arch, given.get("actor_hidden_sizes"), given.get("critic_hidden_sizes"))
    if isinstance(net_arch, Mapping):
        given["hidden_sizes"] = sizes["pi"]
        given["critic_hidden_sizes"] = None if sizes["qf"] == sizes["pi"] else sizes["qf"]
    elif net_arch is not None:
        given["hidden_sizes"] = tuple(net_arch)
    by_class = {kind: name for name, kind in ACTIVATIONS.items()}
    given["activation"] = by_class.get(given.get("activation", nn.ReLU), IQLConfig.activation)
    return given


def set_hyperparameters(loss: IQLLoss, config: IQLConfig) -> None:
    """Brings a policy's loss, which is built with the defaults, to an algorithm's hyper-parameters."""
    for name, value in config.of("loss").items():
        setattr(loss, name, value)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=config.discount)


class IQLPolicy(Loaded, BasePolicy):
    """Actor, critics and V of IQL, in the core's loss.

    Vector observations go straight into the perceptrons of :mod:`iql_plugins.networks`: with the same layers the
    networks are those of :func:`iql_plugins.training.agent.build_loss`. Anything else, or another class of features
    extractor, puts a features extractor before each network.

    Args:
        observation_space: the environment's.
        action_space: Box or Discrete.
        lr_schedule: not read: the learner has the learning rates.
        net_arch: widths of the hidden layers, see :func:`layer_sizes`.
        activation_fn: behind each hidden layer.
        dropout: probability of dropping a hidden unit of the actor while it trains.
        squashed: whether the policy squashes its samples, and not its mean alone as the paper's does.
        n_critics: number of critics, each with a features extractor of its own.
        features_extractor_class: the class of the features extractors.
        features_extractor_kwargs: its arguments besides the observation space.
        share_features_extractor: whether all networks share one, which the actor's loss alone trains. It runs once for
            s and once for s' in a step, and that of the target critics once; one with buffers (batch norm), dropout or
            hooks runs for each network.
        normalize_images: whether pixels are divided by 255.
        optimizer_class: of the one optimiser of all networks.
        optimizer_kwargs: its arguments, besides the learning rate.
        normalize_observations: whether there is a mean and a deviation of observations, which a dataset gives.
        use_sde: False: the policy has no state-dependent exploration.
        log_std_init: of that exploration, as the next two: without it SAC's policy does not read them either.
        use_expln: likewise.
        clip_mean: likewise.
        loss: what an agent brings; None builds it.
        normalizers: likewise.
        actor_hidden_sizes: see :class:`~iql_plugins.config.IQLConfig`, as for all that follow; the ``pi`` of
            ``net_arch`` where that is a list.
        critic_hidden_sizes: its ``qf``.
        actor_layer_norm: whether LayerNorm comes before each activation of the actor.
        critic_layer_norm: whether LayerNorm comes before each activation of the critics and of V.
        value_layer_norm: whether it comes before each activation of V; None for ``critic_layer_norm``.
        value_dropout: probability of dropping a hidden unit of V in V's own loss.
        initialization: of the perceptrons, ``"orthogonal"`` or ``"torch"``.

    Raises:
        ValueError: with ``use_sde``.

    Attributes:
        loss: owns the networks.
        normalizers: between the environment's units and the networks'.
        actor: the policy, callable.
        critic: the critics, callable.
        critic_target: their targets, callable.
    """

    actor: Actor
    critic: Critic
    critic_target: Critic
    inputs: Inputs

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule | None = None,
        net_arch: NetArch | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
        squashed: bool = False,
        n_critics: int = 2,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = False,
        normalize_images: bool = True,
        optimizer_class: type[Optimizer] = Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        normalize_observations: bool = False,
        use_sde: bool = False,
        log_std_init: float = -3.0,
        use_expln: bool = False,
        clip_mean: float = 2.0,
        loss: IQLLoss | None = None,
        normalizers: Normalizers | None = None,
        actor_hidden_sizes: Sequence[int] | None = None,
        critic_hidden_sizes: Sequence[int] | None = None,
        actor_layer_norm: bool = False,
        critic_layer_norm: bool = False,
        value_dropout: float = 0.0,
        initialization: Initialization = "orthogonal",
        value_layer_norm: bool | None = None,
    ) -> None:
        if use_sde:
            raise ValueError(NO_EXPLORATION)
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            # The base class writes into it.
            dict(features_extractor_kwargs or {}),
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
            normalize_images=normalize_images,
        )
        self._arguments = {
            "net_arch": net_arch,
            "activation_fn": activation_fn,
            "dropout": dropout,
            "squashed": squashed,
            "n_critics": n_critics,
            "features_extractor_class": features_extractor_class,
            "features_extractor_kwargs": features_extractor_kwargs,
            "share_features_extractor": share_features_extractor,
            "optimizer_class": optimizer_class,
            "optimizer_kwargs": optimizer_kwargs,
            "actor_hidden_sizes": actor_hidden_sizes,
            "critic_hidden_sizes": critic_hidden_sizes,
            "actor_layer_norm": actor_layer_norm,
            "critic_layer_norm": critic_layer_norm,
            "value_layer_norm": value_layer_norm,
            "value_dropout": value_dropout,
            "initialization": initialization,
        }
        self.layer_sizes = layer_sizes(net_arch, actor_hidden_sizes, critic_hidden_sizes)
        self.activation_fn = activation_fn
        self.dropout = dropout
        self.squashed = squashed
        self.n_critics = n_critics
        self.share_features_extractor = share_features_extractor
        self.spaces = layout_spaces(observation_space, action_space)
        self.loss = self._build_loss() if loss is None else loss
        self.loss.target_updater_attached()
        self.normalizers = self._identity(normalize_observations) if normalizers is None else normalizers
        self.inputs = Inputs(self.spaces, self.normalizers)
        # Views, not submodules: the loss has these modules already.
        self.__dict__["actor"] = Actor(self)
        self.__dict__["critic"] = Critic(self, "qvalue_network")
        self.__dict__["critic_target"] = Critic(self, "target_qvalue_network")
        self.critic_target.eval()

    def _identity(self, normalize_observations: bool) -> Normalizers:
        """Normalisers that change no observation and no reward until a dataset's statistics are put into them."""
        moments = {
            key: (torch.zeros(space.shape), torch.ones(space.shape))
            for key, space in self.spaces.observations.items()
            if normalize_observations and isinstance(space, Box) and space.dtype == "float32"
        }
        return Normalizers(self.spaces, observation_moments=moments)

    def _build_loss(self) -> IQLLoss:
        keys = list(self.spaces.observations)
        vectors = isinstance(self.observation_space, spaces.Box) and is_plain(list(self.spaces.observations.values()))
        plain = vectors and self.features_extractor_class is FlattenExtractor
        shared = None if plain or not self.share_features_extractor else self._encoder(keys)

        config = IQLConfig(**network_hyperparameters(self._arguments))

        def options(role: Role) -> dict[str, Any]:
            encoder = None if plain else shared or self._encoder(keys)
            boxes = [space for space in self.spaces.observations.values() if isinstance(space, Box)]
            return {
                **config.network(role),
                "observation_size": sum(box.size for box in boxes) if encoder is None else encoder.size,
                "hidden_sizes": self.layer_sizes[_ARCHITECTURE[role]],
                "activation": self.activation_fn,
                "in_keys": keys,
                "encoder": encoder,
            }

        networks = networks_for(
            self.spaces.action, options, n_critics=self.n_critics, dropout=self.dropout, squashed=self.squashed
        )
        return assemble_loss(config, *networks, discrete=self.spaces.discrete, separate_losses=shared is not None)

    def _encoder(self, keys: Sequence[NestedKey]) -> FeaturesEncoder:
        return FeaturesEncoder(keys, self.observation_space, self.make_features_extractor(), self.normalize_images)

    def make_optimizers(self, groups: Groups) -> list[Optimizer]:
        """The one optimiser of all networks; the learner's own Adam unless something else was asked for."""
        if self.optimizer_class is Adam and not self.optimizer_kwargs:
            return adam(groups)
        return [self.optimizer_class(list(groups), **self.optimizer_kwargs)]

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        """As :meth:`Actor.forward`."""
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self.actor(observation, deterministic)  # type: ignore[no-any-return]

    def unscale_action(self, scaled_action: Any) -> Any:
        """As :meth:`Actor.unscale_action`."""
        return self.actor.unscale_action(scaled_action)

    def train(self, mode: bool = True) -> "IQLPolicy":
        """Switches dropout and batch norm, but for the target critics, which never train."""
        super().train(mode)
        self.actor.training = self.critic.training = mode
        self.critic_target.eval()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; with ``strict=False`` what is missing keeps its value."""
        own = self.state_dict()
        if not strict:
            state_dict = {**own, **state_dict}
        # A policy that is loaded on its own has no hyper-parameters, nor the state of one.
        state = "loss.automatic_temperature."
        state_dict = {name: value for name, value in state_dict.items() if name in own or not name.startswith(state)}
        return super().load_state_dict(state_dict, strict, assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        normalized = {"normalize_observations": bool(self.normalizers.standardized)}
        return super()._get_constructor_parameters() | self._arguments | normalized


MlpPolicy = IQLPolicy


class CnnPolicy(IQLPolicy):
    """:class:`IQLPolicy` for images: a ``NatureCNN`` before each network unless something else is asked for."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule | None = None,
        net_arch: NetArch | None = None,
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            features_extractor_class=features_extractor_class,
            **kwargs,
        )


class MultiInputPolicy(IQLPolicy):
    """:class:`IQLPolicy` for Dict observations: a ``CombinedExtractor`` unless something else is asked for."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule | None = None,
        net_arch: NetArch | None = None,
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            features_extractor_class=features_extractor_class,
            **kwargs,
        )


class AgentPolicy(IQLPolicy):
    """:class:`IQLPolicy` over the core's own encoders of images, integers and mixtures.

    An agent that comes from another adapter acts through it, and can go back.
    """

    def _build_loss(self) -> IQLLoss:
        return build_loss(self.spaces, IQLConfig(**network_hyperparameters(self._arguments)))
