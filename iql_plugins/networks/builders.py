r"""The networks of the paper: ReLU perceptrons with orthogonal weights, two hidden layers of 256.

Each builder returns a ``tensordict.nn`` module that reads and writes the key layout, so that
it goes straight into :class:`~iql_plugins.IQLLoss`; a module of your own works the same way.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Literal

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

from iql_plugins.networks.distributions import Categorical, TanhMeanNormal, TanhNormal
from iql_plugins.networks.encoders import Encoded, ObservationEncoder
from iql_plugins.spaces import Discrete, Space

__all__ = [
    "MLP",
    "GaussianHead",
    "OrthogonalLinear",
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
Role = Literal["actor", "critic", "value"]


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
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, OrthogonalLinear)]
    named = [(f"{name}.{leaf}", getattr(layer, leaf)) for name, layer in layers for leaf in ("weight", "bias")]
    # Most are told by their first number.
    if unloaded := [
        name
        for name, tensor in named
        if tensor.numel() and tensor[(0,) * tensor.ndim] == _UNLOADED and (tensor == _UNLOADED).all()
    ]:
        raise RuntimeError(f"{', '.join(unloaded)} were not loaded: what is read must have all weights of the networks")


class OrthogonalLinear(nn.Linear):
    r"""A linear layer with orthogonal weights of gain :math:`\sqrt 2` and zero bias, as the authors initialise.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
    """

    def reset_parameters(self) -> None:
        """Draws the weight anew and zeroes the bias."""
        if _INITIALIZES.get():
            nn.init.orthogonal_(self.weight, gain=math.sqrt(2))
            nn.init.zeros_(self.bias)
        else:
            nn.init.constant_(self.weight, _UNLOADED)
            nn.init.constant_(self.bias, _UNLOADED)


class MLP(nn.Module):
    """A perceptron over the concatenation of its inputs.

    Args:
        in_features: total size of the inputs' last dimensions.
        out_features: size of the output's last dimension.
        hidden_sizes: width of each hidden layer.
        dropout: probability of dropping a hidden unit in training mode; the authors use 0.1 in the
            actor for kitchen and Adroit.
        activation: makes what comes behind each hidden layer; the authors' is ReLU.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_sizes: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden_sizes]
        layers: list[nn.Module] = []
        for size, next_size in pairwise(sizes):
            layers += [OrthogonalLinear(size, next_size), activation()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, OrthogonalLinear(sizes[-1], out_features))

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
    body = _body(MLP(observation_size, action_size, hidden_sizes, dropout, activation), encoder)
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
        in_keys: the observations that are concatenated.
        encoder: see :func:`gaussian_actor`.

    >>> categorical_actor(4, 2)(observation=torch.zeros(5, 4))[-1].shape
    torch.Size([5])
    """
    body = _body(MLP(observation_size, action_count, hidden_sizes, dropout, activation), encoder)
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
        in_keys: the observations that are concatenated.
        action_key: the action that is concatenated behind them.
        encoder: see :func:`gaussian_actor`.

    >>> critic(3, 1)(observation=torch.zeros(5, 3), action=torch.zeros(5, 1)).shape
    torch.Size([5, 1])
    """
    body = _body(MLP(observation_size + action_size, 1, hidden_sizes, activation=activation), encoder)
    return TensorDictModule(body, in_keys=[*in_keys, action_key], out_keys=["state_action_value"])


def discrete_critic(
    observation_size: int,
    action_count: int,
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    activation: Activation = nn.ReLU,
    in_keys: Sequence[NestedKey] = ("observation",),
    encoder: ObservationEncoder | None = None,
) -> TensorDictModule:
    """Q(s, ·) of all discrete actions: writes ``state_action_value`` of shape ``[*B, n]``.

    Args:
        observation_size: total size of the observations' last dimensions.
        action_count: number of actions n.
        hidden_sizes: width of each hidden layer.
        activation: see :class:`MLP`.
        in_keys: the observations that are concatenated.
        encoder: see :func:`gaussian_actor`.

    >>> discrete_critic(4, 2)(observation=torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """
    body = _body(MLP(observation_size, action_count, hidden_sizes, activation=activation), encoder)
    return TensorDictModule(body, in_keys=list(in_keys), out_keys=["state_action_value"])


def value_function(
    observation_size: int,
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    activation: Activation = nn.ReLU,
    in_keys: Sequence[NestedKey] = ("observation",),
    encoder: ObservationEncoder | None = None,
) -> TensorDictModule:
    """V(s): writes ``state_value`` of shape ``[*B, 1]``.

    Args:
        observation_size: total size of the observations' last dimensions.
        hidden_sizes: width of each hidden layer.
        activation: see :class:`MLP`.
        in_keys: the observations that are concatenated.
        encoder: see :func:`gaussian_actor`.

    >>> value_function(3)(observation=torch.zeros(5, 3)).shape
    torch.Size([5, 1])
    """
    body = _body(MLP(observation_size, 1, hidden_sizes, activation=activation), encoder)
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
