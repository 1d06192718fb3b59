r"""The networks of the paper: ReLU perceptrons with orthogonal weights, two hidden layers of 256; and what may differ.

Each builder returns a ``tensordict.nn`` module that reads and writes the key layout, so that
it goes straight into :class:`~iql_plugins.IQLLoss`; a module of your own works the same way.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Distribution

from iql_plugins.architecture import ACTIVATIONS, ActivationName, Initialization, Role
from iql_plugins.networks.distributions import Categorical, TanhMeanNormal, TanhNormal
from iql_plugins.networks.encoders import Encoded, ObservationEncoder
from iql_plugins.ranges import choice
from iql_plugins.spaces import Discrete, Space

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ActivationName",
    "GaussianHead",
    "Initialization",
    "LayerNorm",
    "Linear",
    "OrthogonalLinear",
    "ValueDropout",
    "categorical_actor",
    "check_loaded",
    "critic",
    "discrete_critic",
    "gaussian_actor",
    "networks_for",
    "uninitialized",
    "value_function",
]

LOG_STD_RANGE = (-5.0, 2.0)

Activation = Callable[[], nn.Module]

_INITIALIZES = ContextVar("initializes", default=True)


#: No training comes to a layer of it, and no cast changes it.
_UNLOADED = -math.inf


@contextmanager
def uninitialized() -> Iterator[None]:
    """Inside, perceptrons are built for weights that are loaded: none is drawn. Other modules draw as they do.

    :func:`check_loaded` tells, once they are loaded, whether all were.
    """
    token = _INITIALIZES.set(False)
    try:
        yield
    finally:
        _INITIALIZES.reset(token)


def check_loaded(module: nn.Module) -> None:
    """Raises ``RuntimeError`` for perceptrons that were built :func:`uninitialized`, and not loaded since."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Linear | LayerNorm)]
    named = [(f"{name}.{leaf}", getattr(layer, leaf)) for name, layer in layers for leaf in ("weight", "bias")]
    # Most are told by their first number.
    if unloaded := [
        name
        for name, tensor in named
        if tensor.numel() and tensor[(0,) * tensor.ndim] == _UNLOADED and (tensor == _UNLOADED).all()
    ]:
        raise RuntimeError(f"{', '.join(unloaded)} were not loaded: what is read must have all weights of the networks")


def _left_to_loading(layer: nn.Module) -> bool:
    """Whether a layer is built :func:`uninitialized`; it is marked then."""
    if _INITIALIZES.get():
        return False
    for parameter in layer.parameters():
        nn.init.constant_(parameter, _UNLOADED)
    return True


class Linear(nn.Linear):
    """A linear layer as torch initialises it: uniform weights and biases up to the root of 1 / in_features.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
    """

    def reset_parameters(self) -> None:
        """Draws weight and bias anew."""
        if not _left_to_loading(self):
            super().reset_parameters()


class OrthogonalLinear(Linear):
    r"""A linear layer with orthogonal weights of gain :math:`\sqrt 2` and zero bias, as the authors initialise.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
    """

    def reset_parameters(self) -> None:
        """Draws the weight anew and zeroes the bias."""
        if not _left_to_loading(self):
            nn.init.orthogonal_(self.weight, gain=math.sqrt(2))
            nn.init.zeros_(self.bias)


class LayerNorm(nn.LayerNorm):
    """Torch's layer normalisation, which is missed, as linear layers are, where it is not loaded."""

    def reset_parameters(self) -> None:
        """Sets the weight to 1 and the bias to 0."""
        if not _left_to_loading(self):
            super().reset_parameters()


class Dropout(nn.Dropout):
    """Dropout whose mask is drawn as a tensor on every device.

    Torch's own draws inside of its kernel on a GPU, where compiled graphs and seeds that are trained together cannot
    take the mask from outside. The numbers are those of torch's own on a CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The input, of which parts are dropped in training mode, and the rest is divided by what is kept of them."""
        if not self.training or self.p == 0.0:
            return input
        keep = 1.0 - self.p
        mask = torch.empty_like(input).bernoulli_(keep)
        return input * (mask.div_(keep) if keep else mask)


class ValueDropout(Dropout):
    """Dropout in V's own loss alone: where no gradient is asked for, in the target r + γV(s'), nothing is dropped.

    Nor is it in the advantages that weigh actions, for which the losses evaluate V(s) without gradient. The authors of
    Sparse Q-Learning build V with dropout of 0.5 for antmaze (``configs/antmaze_config.py``, line 15, of
    github.com/ryanxhr/IVR), but none of their calls of V (``critic.py``, lines 17 and 44; ``actor.py``, line 11) says
    ``training=True``, without which ``common.py``, line 45, drops nothing. So V(s') and the advantages are theirs here,
    and V's loss is what dropout was meant for.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The input, of which parts are dropped in training mode where a gradient is asked for."""
        return super().forward(input) if torch.is_grad_enabled() else input


INITIALIZATIONS: Mapping[Initialization, type[Linear]] = {"orthogonal": OrthogonalLinear, "torch": Linear}


class MLP(nn.Module):
    """A perceptron over the concatenation of its inputs.

    Args:
        in_features: total size of the inputs' last dimensions.
        out_features: size of the output's last dimension.
        hidden_sizes: width of each hidden layer.
        dropout: probability of dropping a hidden unit in training mode; the authors use 0.1 in the
            actor for kitchen and Adroit.
        activation: makes what comes behind each hidden layer; the authors' is ReLU.
        layer_norm: whether each hidden layer is normalised before its activation, as in RLPD (Ball et al. 2023) and
            in V of Extreme and Sparse Q-Learning (``common.py``, lines 37 to 45, of github.com/ryanxhr/IVR).
        initialization: ``"orthogonal"``, see :class:`OrthogonalLinear`, or ``"torch"``, see :class:`Linear`.
        dropout_layer: drops; V's is :class:`ValueDropout`.

    Raises:
        ValueError: for another initialisation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_sizes: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        activation: Activation = nn.ReLU,
        layer_norm: bool = False,
        initialization: Initialization = "orthogonal",
        dropout_layer: type[nn.Dropout] = Dropout,
    ) -> None:
        super().__init__()
        choice(Initialization).check("initialization", initialization)
        linear = INITIALIZATIONS[initialization]
        sizes = [in_features, *hidden_sizes]
        layers: list[nn.Module] = []
        for size, next_size in pairwise(sizes):
            layers += [linear(size, next_size), *([LayerNorm(next_size)] if layer_norm else []), activation()]
            if dropout:
                layers.append(dropout_layer(dropout))
        self.layers = nn.Sequential(*layers, linear(sizes[-1], out_features))

    def forward(self, *inputs: Tensor) -> Tensor:
        """``[*B, out_features]`` from inputs of shape ``[*B, f_i]``."""
        joined: Tensor = self.layers(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))
        return joined


class GaussianHead(nn.Module):
    r"""Mean and standard deviation of the paper's policy, the latter independent of the state.

    Args:
        body: maps the observations to ``[*B, action_size]``, the mean before the tanh.
        action_size: number of action dimensions.
        log_std_range: the log standard deviation is clipped to it; the paper's is [-5, 2].
    """

    def __init__(self, body: nn.Module, action_size: int, log_std_range: tuple[float, float] = LOG_STD_RANGE) -> None:
        super().__init__()
        self.body = body
        self.log_std = nn.Parameter(torch.zeros(action_size))
        self.log_std_range = log_std_range

    def reset_parameters(self) -> None:
        """Sets the standard deviation to 1; the body resets itself."""
        nn.init.zeros_(self.log_std)

    def forward(self, *observations: Tensor) -> tuple[Tensor, Tensor]:
        """``loc`` and ``scale``, each ``[*B, action_size]``."""
        loc = self.body(*observations)
        return loc, self.log_std.clamp(*self.log_std_range).exp().expand_as(loc)


def gaussian_actor(
    observation_size: int,
    action_size: int,
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    dropout: float = 0.0,
    activation: Activation = nn.ReLU,
    layer_norm: bool = False,
    initialization: Initialization = "orthogonal",
    log_std_range: tuple[float, float] = LOG_STD_RANGE,
    squashed: bool = False,
    low: Tensor | float = -1.0,
    high: Tensor | float = 1.0,
    in_keys: Sequence[NestedKey] = ("observation",),
    encoder: ObservationEncoder | None = None,
) -> ProbabilisticTensorDictSequential:
    """The paper's policy for continuous actions.

    Called on a TensorDict it writes ``action`` (deterministic unless the interaction type says otherwise).

    Args:
        observation_size: total size of the observations' last dimensions.
        action_size: number of action dimensions.
        hidden_sizes: width of each hidden layer.
        dropout: see :class:`MLP`.
        activation: see :class:`MLP`.
        layer_norm: see :class:`MLP`.
        initialization: see :class:`MLP`.
        log_std_range: see :class:`GaussianHead`.
        squashed: whether to squash samples (:class:`TanhNormal`) and not the mean alone
            (:class:`TanhMeanNormal`, the paper's).
        low: ``[action_size]`` or scalar lower bound of the actions.
        high: ``[action_size]`` or scalar upper bound.
        in_keys: the observations that are concatenated.
        encoder: what turns the observations into ``observation_size`` features; None concatenates them.

    >>> actor = gaussian_actor(3, 1)
    >>> actor(observation=torch.zeros(5, 3))[-1].shape
    torch.Size([5, 1])
    """
    perceptron = MLP(observation_size, action_size, hidden_sizes, dropout, activation, layer_norm, initialization)
    body = _body(perceptron, encoder)
    head = GaussianHead(body, action_size, log_std_range)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(head, in_keys=list(in_keys), out_keys=["loc", "scale"]),
        _BoxPolicy(TanhNormal if squashed else TanhMeanNormal, low, high),
    )


def categorical_actor(
    observation_size: int,
    action_count: int,
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    dropout: float = 0.0,
    activation: Activation = nn.ReLU,
    layer_norm: bool = False,
    initialization: Initialization = "orthogonal",
    in_keys: Sequence[NestedKey] = ("observation",),
    encoder: ObservationEncoder | None = None,
) -> ProbabilisticTensorDictSequential:
    """A policy over ``action_count`` discrete actions; writes ``action`` of shape ``[*B]``.

    Args:
        observation_size: total size of the observations' last dimensions.
        action_count: number of actions n; actions are 0 to n - 1.
        hidden_sizes: width of each hidden layer.
        dropout: see :class:`MLP`.
        activation: see :class:`MLP`.
        layer_norm: see :class:`MLP`.
        initialization: see :class:`MLP`.
        in_keys: the observations that are concatenated.
        encoder: see :func:`gaussian_actor`.

    >>> categorical_actor(4, 2)(observation=torch.zeros(5, 4))[-1].shape
    torch.Size([5])
    """
    perceptron = MLP(observation_size, action_count, hidden_sizes, dropout, activation, layer_norm, initialization)
    body = _body(perceptron, encoder)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(body, in_keys=list(in_keys), out_keys=["logits"]),
        _Policy(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=Categorical,
            default_interaction_type=InteractionType.DETERMINISTIC,
        ),
    )


class _Policy(ProbabilisticTensorDictModule):  # type: ignore[misc]
    """A distribution over actions, in a module that ``torch.jit.trace`` takes."""

    #: tensordict's raises, and a trace looks at every attribute.
    SAMPLE_LOG_PROB_KEY = None


class _BoxPolicy(_Policy):
    """A distribution over actions between bounds, which move with the module when they are tensors."""

    def __init__(self, distribution: type[Distribution], low: Tensor | float, high: Tensor | float) -> None:
        super().__init__(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=distribution,
            default_interaction_type=InteractionType.DETERMINISTIC,
        )
        for name, bound in (("low", low), ("high", high)):
            if isinstance(bound, Tensor):
                self.register_buffer(name, bound, persistent=False)
            else:
                setattr(self, name, bound)

    def get_dist(self, tensordict: TensorDictBase) -> Distribution:
        """The distribution with these parameters."""
        distribution: type[Any] = self.distribution_class
        return distribution(tensordict.get("loc"), tensordict.get("scale"), self.low, self.high)  # type: ignore[no-any-return]

    build_dist_from_params = get_dist


def critic(
    observation_size: int,
    action_size: int,
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    activation: Activation = nn.ReLU,
    layer_norm: bool = False,
    initialization: Initialization = "orthogonal",
    in_keys: Sequence[NestedKey] = ("observation",),
    action_key: NestedKey = "action",
    encoder: ObservationEncoder | None = None,
) -> TensorDictModule:
    """Q(s, a) for continuous actions: writes ``state_action_value`` of shape ``[*B, 1]``.

    Args:
        observation_size: total size of the observations' last dimensions.
        action_size: number of action dimensions.
        hidden_sizes: width of each hidden layer.
        activation: see :class:`MLP`.
        layer_norm: see :class:`MLP`.
        initialization: see :class:`MLP`.
        in_keys: the observations that are concatenated.
        action_key: the action that is concatenated behind them.
        encoder: see :func:`gaussian_actor`.

    >>> critic(3, 1)(observation=torch.zeros(5, 3), action=torch.zeros(5, 1)).shape
    torch.Size([5, 1])
    """
    perceptron = MLP(observation_size + action_size, 1, hidden_sizes, 0.0, activation, layer_norm, initialization)
    body = _body(perceptron, encoder)
    return TensorDictModule(body, in_keys=[*in_keys, action_key], out_keys=["state_action_value"])


def discrete_critic(
    observation_size: int,
    action_count: int,
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    activation: Activation = nn.ReLU,
    layer_norm: bool = False,
    initialization: Initialization = "orthogonal",
    in_keys: Sequence[NestedKey] = ("observation",),
    encoder: ObservationEncoder | None = None,
) -> TensorDictModule:
    """Q(s, ·) of all discrete actions: writes ``state_action_value`` of shape ``[*B, n]``.

    Args:
        observation_size: total size of the observations' last dimensions.
        action_count: number of actions n.
        hidden_sizes: width of each hidden layer.
        activation: see :class:`MLP`.
        layer_norm: see :class:`MLP`.
        initialization: see :class:`MLP`.
        in_keys: the observations that are concatenated.
        encoder: see :func:`gaussian_actor`.

    >>> discrete_critic(4, 2)(observation=torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """
    perceptron = MLP(observation_size, action_count, hidden_sizes, 0.0, activation, layer_norm, initialization)
    body = _body(perceptron, encoder)
    return TensorDictModule(body, in_keys=list(in_keys), out_keys=["state_action_value"])


def value_function(
    observation_size: int,
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    dropout: float = 0.0,
    activation: Activation = nn.ReLU,
    layer_norm: bool = False,
    initialization: Initialization = "orthogonal",
    in_keys: Sequence[NestedKey] = ("observation",),
    encoder: ObservationEncoder | None = None,
) -> TensorDictModule:
    """V(s): writes ``state_value`` of shape ``[*B, 1]``.

    Args:
        observation_size: total size of the observations' last dimensions.
        hidden_sizes: width of each hidden layer.
        dropout: probability of dropping a hidden unit in V's own loss, see :class:`ValueDropout`.
        activation: see :class:`MLP`.
        layer_norm: see :class:`MLP`.
        initialization: see :class:`MLP`.
        in_keys: the observations that are concatenated.
        encoder: see :func:`gaussian_actor`.

    >>> value_function(3)(observation=torch.zeros(5, 3)).shape
    torch.Size([5, 1])
    """
    perceptron = MLP(observation_size, 1, hidden_sizes, dropout, activation, layer_norm, initialization, ValueDropout)
    body = _body(perceptron, encoder)
    return TensorDictModule(body, in_keys=list(in_keys), out_keys=["state_value"])


def networks_for(
    action: Space,
    options: Callable[[Role], Mapping[str, Any]],
    *,
    n_critics: int = 1,
    dropout: float = 0.0,
    squashed: bool = False,
    critic_of: Callable[[], nn.Module] | None = None,
) -> tuple[ProbabilisticTensorDictSequential, list[nn.Module], TensorDictModule]:
    """A policy, critics and V for a space of actions, built in this order.

    Args:
        action: the space.
        options: the arguments of the functions above for ``"actor"``, ``"critic"`` and ``"value"``; asked anew for each
            critic.
        n_critics: number of critics, each built on its own.
        dropout: of the actor.
        squashed: see :func:`gaussian_actor`.
        critic_of: makes a critic of continuous actions; None takes :func:`critic`.
    """
    critics: list[nn.Module]
    if isinstance(action, Discrete):
        actor = categorical_actor(action_count=action.n, dropout=dropout, **options("actor"))
        critics = [discrete_critic(action_count=action.n, **options("critic")) for _ in range(n_critics)]
    else:
        size = action.size
        actor = gaussian_actor(action_size=size, dropout=dropout, squashed=squashed, **options("actor"))
        make = critic_of or (lambda: critic(action_size=size, **options("critic")))
        critics = [make() for _ in range(n_critics)]
    return actor, critics, value_function(**options("value"))


def _body(perceptron: MLP, encoder: ObservationEncoder | None) -> nn.Module:
    return perceptron if encoder is None else Encoded(encoder, perceptron)


def default_value_function(actor: nn.Module) -> TensorDictModule:
    """The paper's V(s) on the observations of an actor that concatenates them into a linear layer.

    Its input size is that of the actor's first linear layer, its device and dtype that layer's.

    Raises:
        ValueError: if the actor's first layer with parameters is not linear, or not initialised yet.
    """
    layers = (m for m in actor.modules() if not any(True for _ in m.children()))
    first = next((m for m in layers if any(True for _ in m.parameters())), None)
    if not isinstance(first, nn.Linear) or nn.parameter.is_lazy(first.weight):
        raise ValueError(
            "value_network=None builds V(s) only for an actor whose first layer is an initialised "
            f"torch.nn.Linear over its concatenated observations; this actor starts with "
            f"{type(first).__name__}: pass a value_network"
        )
    keys: Sequence[NestedKey] = actor.in_keys  # type: ignore[assignment]
    return value_function(first.in_features, in_keys=keys).to(first.weight.device, first.weight.dtype)
