"""The loss of a d3rlpy configuration: over the core's networks, or over those of d3rlpy's encoder factories."""

from collections.abc import Sequence
from typing import Any

from d3rlpy.models.encoders import DefaultEncoderFactory, VectorEncoderFactory
from d3rlpy.models.torch import compute_output_size
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from iql_plugins.architecture import Role
from iql_plugins.config import IQLConfig, hyperparameters
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.networks.builders import MLP, networks_for
from iql_plugins.networks.encoders import ObservationEncoder
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import assemble_loss, build_loss

__all__ = ["build", "perceptrons"]


#: What counts with encoder factories of any kind, and what they say themselves.
_WITH_FACTORIES = ("n_critics", "squashed", "hidden_sizes", "actor_dropout")


def perceptrons(config: Any) -> tuple[tuple[int, ...], float] | None:
    """Hidden sizes and the actor's dropout, if that is all that the encoder factories say; None if it is not.

    Args:
        config: a d3rlpy configuration of ours.
    """
    factories = (config.actor_encoder_factory, config.critic_encoder_factory, config.value_encoder_factory)
    dropouts = [factory.dropout_rate or 0.0 if _is_perceptron(factory) else None for factory in factories]
    actor, *others = dropouts
    if actor is None or others != [0.0, 0.0]:
        return None
    sizes = {
        tuple(factory.hidden_units) if isinstance(factory, VectorEncoderFactory) else (256, 256)
        for factory in factories
    }
    return (sizes.pop(), actor) if len(sizes) == 1 else None


def _is_perceptron(factory: Any) -> bool:
    """Whether a factory makes ReLU layers, with dropout at most."""
    plain: Any
    match factory:
        case VectorEncoderFactory():
            plain = VectorEncoderFactory(hidden_units=factory.hidden_units, dropout_rate=factory.dropout_rate)
        case DefaultEncoderFactory():
            plain = DefaultEncoderFactory(dropout_rate=factory.dropout_rate)
        case _:
            return False
    return type(factory) is type(plain) and factory == plain


def build(config: Any, core: IQLConfig, spaces: Spaces, shape: Sequence[Any], keys: Sequence[NestedKey]) -> IQLLoss:
    """The loss of a configuration.

    Vector observations and factories of plain perceptrons give the very networks of
    :func:`iql_plugins.training.agent.build_loss`; so do all observations of an agent that came from elsewhere. Any
    other factory makes the encoder of each network, and a linear layer behind it makes the output.

    Args:
        config: the d3rlpy configuration.
        core: what it says in the core's terms.
        spaces: of the environment.
        shape: d3rlpy's observation shape.
        keys: the key of each observation, in d3rlpy's order.

    Raises:
        ValueError: for tuple observations and a factory that does not take them, and for what the core's perceptrons
            alone have where a factory makes the networks.
    """
    is_vector = len(keys) == 1 and len(shape) == 1
    if perceptrons(config) is not None and (is_vector or config.origin is not None):
        return build_loss(spaces, core)
    for name in hyperparameters("networks"):
        value, default = getattr(core, name), getattr(IQLConfig, name)
        if name not in _WITH_FACTORIES and value != default:
            raise ValueError(
                f"{name} must be {default!r} where encoder factories make the networks, got {value!r}: say it in the "
                "factories, or take vector observations and VectorEncoderFactory with hidden_units alone"
            )
    if len(keys) > 1:
        _check_tuples(config)
    boxes = [Box(tuple(size)) for size in (shape if len(keys) > 1 else [shape])]
    inputs = list(keys)

    def options(role: Role) -> dict[str, Any]:
        encoder = getattr(config, f"{role}_encoder_factory").create(shape)
        size = compute_output_size([shape], encoder)
        made = _Encoder(boxes, encoder, size)
        return {"observation_size": size, "hidden_sizes": (), "in_keys": inputs, "encoder": made}

    def critic_of() -> TensorDictModule:
        assert isinstance(spaces.action, Box)
        body = _StateAction(config.critic_encoder_factory, shape, spaces.action.size, len(inputs))
        return TensorDictModule(body, in_keys=[*inputs, "action"], out_keys=["state_action_value"])

    actor, critics, value = networks_for(
        spaces.action, options, n_critics=core.n_critics, squashed=core.squashed, critic_of=critic_of
    )
    qvalue = critics[0] if core.n_critics == 1 else critics
    return assemble_loss(core, actor, qvalue, value, discrete=spaces.discrete)


def _check_tuples(config: Any) -> None:
    for name in ("actor", "critic", "value"):
        factory = getattr(config, f"{name}_encoder_factory")
        if type(factory).__module__.split(".")[0] == "d3rlpy":
            raise ValueError(
                f"{name}_encoder_factory is d3rlpy's {type(factory).__name__}, which takes one observation, not a "
                "tuple of them: pass an encoder factory of your own"
            )


class _Encoder(ObservationEncoder):
    """An encoder of d3rlpy's as one of ours."""

    def __init__(self, spaces: Sequence[Box], encoder: nn.Module, size: int) -> None:
        super().__init__(spaces)
        self.body = encoder
        self.size = size

    def forward(self, *observations: Tensor) -> Tensor:
        """``[B, size]`` from one observation for each space."""
        features: Tensor = self.body(_observation(observations))
        return features


class _StateAction(nn.Module):
    """Q(s, a) behind an encoder of d3rlpy's that takes the action, too."""

    def __init__(self, factory: Any, shape: Sequence[Any], action_size: int, observations: int) -> None:
        super().__init__()
        self.observations = observations
        self.encoder = factory.create_with_action(shape, action_size)
        self.head = MLP(compute_output_size([shape, (action_size,)], self.encoder), 1, ())

    def forward(self, *inputs: Tensor) -> Tensor:
        """``[B, 1]`` from the observations and the action."""
        value: Tensor = self.head(self.encoder(_observation(inputs[: self.observations]), inputs[-1]))
        return value


def _observation(observations: Sequence[Tensor]) -> Any:
    """What d3rlpy's encoders take: one tensor, or a list of several; images are floats there."""
    floats = [tensor.float() for tensor in observations]
    return floats[0] if len(floats) == 1 else floats
