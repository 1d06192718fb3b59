"""Between the core and a model: names of hyper-parameters, agents in and out, spaces without an environment."""

from typing import TYPE_CHECKING, Any

from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv
from tensordict import TensorDictBase

from iql_plugins.architecture import ACTIVATIONS
from iql_plugins.config import IQLConfig, hyperparameters, renamed
from iql_plugins.networks.encoders import is_plain
from iql_plugins.spaces import Spaces
from iql_plugins.training.agent import Agent
from iql_plugins.training.learner import NETWORKS
from iql_sb3.policies import NETWORK_NAMES, AgentPolicy, MlpPolicy, network_hyperparameters
from iql_sb3.spaces import check_fits, gymnasium_spaces, layout_spaces, stand_in

if TYPE_CHECKING:
    from iql_sb3.iql import IQL

__all__ = ["NAMES", "NETWORK_NAMES", "OWN", "agent_in", "changeable", "config_of", "model_of", "without_environment"]

#: What the model calls the core's hyper-parameters, where the names differ.
NAMES = {"n_steps": "actor_schedule_steps", "discount": "gamma", "polyak": "tau"}
_RATES = tuple(f"{name}_learning_rate" for name in NETWORKS)
#: Those that are the model's own arguments and attributes, and of these those that count from the next step on.
OWN = [name for name in hyperparameters("loss", "target", "learner", "batches", "data") if name not in _RATES]
_CHANGEABLE = [name for name in hyperparameters("loss", "target", "learner") if name in OWN and name != "compile"]


def config_of(model: "IQL") -> IQLConfig:
    """A model's hyper-parameters as the core names them.

    Raises:
        ValueError: for one out of range; by the model's own name of it.
    """
    given = {name: getattr(model, NAMES.get(name, name)) for name in OWN}
    given |= network_hyperparameters(model.policy_kwargs)
    given |= {f"{name}_learning_rate": schedule(1.0) for name, schedule in model._rates.items()}
    try:
        return IQLConfig(**given)
    except ValueError as error:
        raise renamed(error, NAMES | NETWORK_NAMES) from error


def changeable(model: "IQL") -> list[Any]:
    """What of a model's hyper-parameters can be changed at any time."""
    return [getattr(model, NAMES.get(name, name)) for name in _CHANGEABLE]


def model_of(kind: "type[IQL]", agent: Agent, env: GymEnv | None, **kwargs: Any) -> "IQL":
    """See :meth:`~iql_sb3.iql.IQL.from_agent`."""
    if custom := agent.custom_parts():
        raise ValueError(
            f"{', '.join(custom)} of the agent are not the default ones, which a saved model is built from: "
            "give a policy class of your own to IQL(...), and load the weights into it"
        )
    if len(agent.learner.optimizers) != 1:
        raise ValueError(f"the agent's learner must have one optimiser, it has {len(agent.learner.optimizers)}")
    config = agent.config
    observation_space, action_space = gymnasium_spaces(agent.spaces)
    model = kind(
        MlpPolicy if is_plain(list(agent.spaces.observations.values())) else AgentPolicy,
        stand_in(observation_space, action_space) if env is None else env,
        learning_rate={name: getattr(config, f"{name}_learning_rate") for name in NETWORKS},
        policy_kwargs={
            NETWORK_NAMES.get(name, name): list(value) if isinstance(value, tuple) else value
            for name, value in (config.of("networks") | {"activation": ACTIVATIONS[config.activation]}).items()
        },
        **{NAMES.get(name, name): config.of()[name] for name in OWN},
        device=agent.device,
        _init_setup_model=False,
        **kwargs,
    )
    check_fits(layout_spaces(model.observation_space, model.action_space), agent.spaces)
    model._agent = agent
    model._has_statistics = True
    model._normalized_by_env = False if agent.learner.step_count else None
    model.extra = agent.extra
    model._setup_model()
    return model


def agent_in(model: "IQL") -> Agent:
    """The agent in a model: its very loss, learner, normalisers and generator."""
    model._apply_hyperparameters()
    agent = Agent(
        model.policy.spaces,
        model.config,
        normalizers=model.policy.normalizers,
        loss=model.policy.loss,
        learner=model.learner,
        seed=0,
    )
    agent.generator = model.generator
    agent.extra = model.extra
    return agent


def without_environment(
    observation_space: spaces.Space[Any] | None,
    action_space: spaces.Space[Any] | None,
    loaded: tuple[TensorDictBase, Spaces | None, ReplayBuffer | None] | None,
    required: bool,
) -> Any:
    """A stand-in for the environment, with spaces from whoever has them."""
    if (observation_space is None) != (action_space is None):
        raise ValueError("give both observation_space and action_space, or none")
    if observation_space is not None and action_space is not None:
        return stand_in(observation_space, action_space)
    if loaded is not None:
        dataset, known, buffer = loaded
        if buffer is not None:
            return stand_in(buffer.observation_space, buffer.action_space)
        return stand_in(*gymnasium_spaces(known or Spaces.from_dataset(dataset)))
    if required:
        raise ValueError("IQL needs an environment, a dataset, or observation_space and action_space")
    return None
