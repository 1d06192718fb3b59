"""IQL as d3rlpy's algorithms: configurations that are registered by name, and the algorithms that they create."""

import copy
import dataclasses
import functools
import inspect
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from d3rlpy.algos.qlearning import QLearningAlgoBase
from d3rlpy.base import LearnableConfig, register_learnable
from d3rlpy.constants import IMPL_NOT_INITIALIZED_ERROR, ActionSpace
from d3rlpy.logging import LOG
from d3rlpy.models.encoders import EncoderFactory, VectorEncoderFactory, make_encoder_field
from d3rlpy.optimizers import AdamFactory, OptimizerFactory
from d3rlpy.optimizers.optimizers import make_optimizer_field
from d3rlpy.preprocessing import MinMaxActionScaler
from tensordict.utils import NestedKey

from iql_d3rlpy import files, networks
from iql_d3rlpy.batches import observation_keys
from iql_d3rlpy.buffer import FastReplayBuffer, UnsupportedBufferError, as_fast_buffer, columns, draw_share
from iql_d3rlpy.export import export_policy
from iql_d3rlpy.impl import IQLImpl
from iql_d3rlpy.mapped import MappedReplayBuffer
from iql_d3rlpy.optimizers import clip_grad_norm, makers
from iql_d3rlpy.scalers import action_bounds, normalizers_of, scalers_of
from iql_plugins import checkpoint
from iql_plugins.config import IQLConfig as Hyperparameters
from iql_plugins.config import hyperparameters, renamed
from iql_plugins.data.intake import check_columns
from iql_plugins.losses.functional import Health
from iql_plugins.spaces import Box, Discrete, Space, Spaces
from iql_plugins.training import distributed
from iql_plugins.training.agent import Agent
from iql_plugins.training.gradients import compiler_available
from iql_plugins.training.learner import Learner

__all__ = ["IQL", "BaseIQL", "BaseIQLConfig", "DiscreteIQL", "DiscreteIQLConfig", "IQLConfig", "from_agent", "to_agent"]


#: What d3rlpy calls the core's hyper-parameters, where the names differ.
_D3RLPY_NAMES = {
    "n_steps": "actor_schedule_steps",
    "discount": "gamma",
    "temperature": "weight_temp",
    "polyak": "tau",
    "hidden_sizes": "hidden_units",
    "actor_dropout": "dropout_rate",
    "max_grad_norm": "clip_grad_norm",
}


@dataclasses.dataclass()
class BaseIQLConfig(LearnableConfig):  # type: ignore[misc]
    r"""What both of our IQLs have: the fields of d3rlpy's ``IQLConfig``, and those that the core adds.

    Factories of plain ReLU perceptrons (d3rlpy's default, ``VectorEncoderFactory``) give the paper's networks, with
    orthogonal weights; any other factory makes the encoders, and a linear layer comes behind each. Adam without more
    than clipping is the core's one Adam over all networks; any other optimiser factory makes an optimiser for each.

    Args:
        batch_size: transitions a step; with ``enable_ddp``, of each process, as in all of d3rlpy's algorithms.
        gamma: discount :math:`\gamma`.
        observation_scaler: d3rlpy's, of any kind.
        action_scaler: d3rlpy's, continuous actions only; without one they are in [-1, 1].
        reward_scaler: d3rlpy's, of any kind.
        compile_graph: whether to compile losses and gradients into one graph, on the CPU as well, wherever there is a
            compiler.
        actor_learning_rate: of the policy.
        critic_learning_rate: of the critics.
        actor_optim_factory: of the policy.
        critic_optim_factory: of the critics, and of V. ``clip_grad_norm`` clips each network's gradient.
        actor_encoder_factory: of the policy.
        critic_encoder_factory: of each critic.
        value_encoder_factory: of V.
        tau: share of the critics in each update of their targets.
        n_critics: number of critics.
        expectile: of V.
        weight_temp: inverse temperature :math:`\beta`; ``"auto"`` and ``"auto_0.5"`` move it, see ``IQLLoss``.
        max_weight: the largest weight of an action in the policy's loss.
        value_learning_rate: of V; None takes the critics' rate, as d3rlpy's IQL does.
        loss_function: distance of Q to its target: ``"l2"``, ``"l1"``, ``"smooth_l1"``, or ``"huber_20"`` with a
            threshold >= 1e-6.
        value_objective: how V is learned, by its name in :mod:`iql_plugins.losses.objectives`.
        policy_extraction: how the policy is learned from Q and V, likewise.
        objective_options: hyper-parameters that these two alone have, by name.
        actor_hidden_sizes: widths of the policy's hidden layers; None takes those of the encoder factories. It and the
            next ones are for factories of plain perceptrons: of any other, the factory says it.
        critic_hidden_sizes: widths of the critics' and V's hidden layers, likewise.
        activation: what comes behind each hidden layer.
        actor_layer_norm: whether LayerNorm comes before each activation of the policy.
        critic_layer_norm: whether LayerNorm comes before each activation of the critics and of V.
        value_layer_norm: whether it comes before each activation of V; None for ``critic_layer_norm``.
        value_dropout: probability of dropping a hidden unit of V in V's own loss.
        initialization: ``"orthogonal"``, the authors', or ``"torch"``.
        actor_schedule_steps: steps in which the policy's rate falls to 0 along half a cosine, and stays there; None
            keeps the rate, as d3rlpy's IQL does.
        origin: what an agent from elsewhere has that no other field says; see :func:`from_agent`.
        clip_all_actions: whether to train on data of which most actions are beyond the bounds, or one is by an order
            of magnitude. Fewer are clipped in any case. The bounds are the action scaler's, without one -1 and 1.

    Raises:
        ValueError: for a value out of range; names it.
    """

    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    # These calls return dataclasses.field(), as in d3rlpy's own configurations.
    actor_optim_factory: OptimizerFactory = make_optimizer_field()  # noqa: RUF009
    critic_optim_factory: OptimizerFactory = make_optimizer_field()  # noqa: RUF009
    actor_encoder_factory: EncoderFactory = make_encoder_field()  # noqa: RUF009
    critic_encoder_factory: EncoderFactory = make_encoder_field()  # noqa: RUF009
    value_encoder_factory: EncoderFactory = make_encoder_field()  # noqa: RUF009
    tau: float = 0.005
    n_critics: int = 2
    expectile: float = 0.7
    weight_temp: Union[float, str] = 3.0  # noqa: UP007
    max_weight: float = 100.0
    # Behind d3rlpy's own, so that positional arguments mean the same.
    value_learning_rate: Optional[float] = None  # noqa: UP045 - d3rlpy's JSON reads this spelling alone
    loss_function: str = "l2"
    actor_schedule_steps: Optional[int] = None  # noqa: UP045
    origin: Optional[dict[str, Any]] = None  # noqa: UP045
    clip_all_actions: bool = False
    value_objective: str = "expectile"
    policy_extraction: str = "awr"
    objective_options: dict[str, float] = dataclasses.field(default_factory=dict)
    actor_hidden_sizes: Optional[list[int]] = None  # noqa: UP045
    critic_hidden_sizes: Optional[list[int]] = None  # noqa: UP045
    activation: str = "relu"
    actor_layer_norm: bool = False
    critic_layer_norm: bool = False
    value_dropout: float = 0.0
    initialization: str = "orthogonal"
    value_layer_norm: Optional[bool] = None  # noqa: UP045

    def __post_init__(self) -> None:
        self.hyperparameters()
        if self.actor_schedule_steps is not None and self.actor_optim_factory.lr_scheduler_factory is not None:
            raise ValueError("the policy's rate has two schedules: actor_schedule_steps, and actor_optim_factory's own")

    def hyperparameters(self) -> Hyperparameters:
        """The core's, of these fields.

        Raises:
            ValueError: for a value out of range; names it.
        """
        base = Hyperparameters.from_json(self.origin["config"]) if self.origin else Hyperparameters()
        plain = networks.perceptrons(self)
        sizes, dropout = (base.hidden_sizes, base.actor_dropout) if plain is None else plain
        cosine = self.actor_schedule_steps is not None
        differing = {
            "n_steps": self.actor_schedule_steps if cosine else base.n_steps,
            "actor_schedule": "cosine" if cosine else "constant",
            "hidden_sizes": sizes,
            "actor_dropout": dropout,
            "max_grad_norm": clip_grad_norm(self),
            "compile": "yes" if self.compile_graph else "no",
        }
        if self.value_learning_rate is None:
            differing["value_learning_rate"] = self.critic_learning_rate
        try:
            alike = {name: getattr(self, theirs) for name, theirs in named(type(self)).items()}
            return base.replace(**{**alike, **differing})
        except ValueError as error:
            raise renamed(error, _D3RLPY_NAMES) from error


def named(config: type[BaseIQLConfig]) -> dict[str, str]:
    """The fields of a configuration that are hyper-parameters of the core, by the core's name."""
    names = {field.name for field in dataclasses.fields(config)}
    own = {name: _D3RLPY_NAMES.get(name, name) for name in hyperparameters()}
    return {name: theirs for name, theirs in own.items() if theirs in names}


@dataclasses.dataclass()
class IQLConfig(BaseIQLConfig):
    """Implicit Q-Learning for continuous actions, by the core's loss; see :class:`BaseIQLConfig` for the fields.

    Args:
        squashed: whether the policy squashes its samples, and not its mean alone as the paper's does.

    >>> IQLConfig(expectile=0.9).create(device="cpu").config.expectile
    0.9
    """

    squashed: bool = False

    def create(self, device: Any = False, enable_ddp: bool = False) -> "IQL":
        """The algorithm.

        Args:
            device: as in d3rlpy: ``"cuda:0"``, a GPU's number, True for the first GPU, False for the CPU.
            enable_ddp: whether to train with the other processes of the process group, each on ``batch_size``
                transitions of its own: a step of two processes is that of one with twice the ``batch_size``.
        """
        return IQL(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        """The name in d3rlpy's files; ``"iql"`` is d3rlpy's own."""
        return "iql_plugins_iql"


@dataclasses.dataclass()
class DiscreteIQLConfig(BaseIQLConfig):
    """Implicit Q-Learning for discrete actions, which d3rlpy lacks; see :class:`BaseIQLConfig` for the fields.

    The expectile must be below 1.

    >>> DiscreteIQLConfig().create().get_action_type()
    <ActionSpace.DISCRETE: 2>
    """

    def hyperparameters(self) -> Hyperparameters:
        """See :meth:`BaseIQLConfig.hyperparameters`."""
        if self.expectile >= 1.0:
            raise ValueError(f"expectile must be in (0, 1) for discrete actions, got {self.expectile}")
        return super().hyperparameters()

    def create(self, device: Any = False, enable_ddp: bool = False) -> "DiscreteIQL":
        """The algorithm; see :meth:`IQLConfig.create`."""
        return DiscreteIQL(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        """The name in d3rlpy's files."""
        return "iql_plugins_discrete_iql"


class BaseIQL(QLearningAlgoBase):  # type: ignore[misc]
    """What both of our IQLs have. All that d3rlpy's algorithms do, they do.

    ``predict_value`` is the mean over critics, as in d3rlpy. ``fit`` samples from contiguous arrays wherever they give
    the very mini-batches of the dataset that it was given (:func:`~iql_d3rlpy.buffer.as_fast_buffer`).
    """

    def inner_create_impl(self, observation_shape: Any, action_size: int) -> None:
        """Builds networks and optimisers; d3rlpy calls it when it knows the shapes."""
        config = self._config
        hyperparameters = config.hyperparameters().replace(compile="yes" if self.compiled else "no")
        if config.origin is None:
            keys = observation_keys(observation_shape)
            spaces = _spaces(observation_shape, action_size, keys, self.get_action_type())
            normalizers = None
        else:
            spaces = Spaces.from_json(config.origin["spaces"])
            keys = list(spaces.observations)
            normalizers = normalizers_of(config, spaces, keys)
        loss = networks.build(config, hyperparameters, spaces, observation_shape, keys).to(self._device)
        learner = Learner.from_config(loss, hyperparameters, make_optimizers=makers(config))
        learner.step_count = self._grad_step
        seed = int(torch.randint(2**31, (), device="cpu"))
        agent = Agent(spaces, hyperparameters, normalizers=normalizers, loss=loss, learner=learner, seed=seed)
        if self._enable_ddp:
            distributed.synchronize(learner)
        self._impl = IQLImpl(observation_shape, action_size, agent, keys, self._device)

    def fitter(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """As d3rlpy's, but that mini-batches come from contiguous arrays if they are the same ones.

        Beside the losses, the health of each epoch's last batch is logged
        (:class:`~iql_plugins.losses.functional.Health`), as ``temperature`` and ``effective_sample_size`` are.

        With ``enable_ddp``, each process then draws from its own share of the transitions. Evaluators are given the
        dataset itself.

        Raises:
            DatasetError: for values that are not finite, or actions that no clipping explains; names key and row.
            DivergenceError: if losses or weights are no longer finite; the model of that epoch is not saved.
        """
        self._take(dataset)
        if isinstance(dataset, MappedReplayBuffer):
            dataset.fit_scalers(self._config)
        try:
            fast: Any = as_fast_buffer(dataset)
        except UnsupportedBufferError:
            # It samples in a way of its own, and goes on doing so.
            fast = dataset
        if isinstance(fast, FastReplayBuffer) and self._enable_ddp and "draw" not in vars(fast):
            fast = copy.copy(fast)
            fast.draw = draw_share
        if self._enable_ddp:
            size, count = self._config.batch_size, distributed.Processes.of_group().count
            LOG.info(f"batch_size is that of each process, {size}: of all {count} together it is {count * size}")
        given = inspect.signature(super().fitter).bind(fast, *args, **options)
        health: dict[str, float] = {}
        callback = given.arguments.get("epoch_callback")
        given.arguments["epoch_callback"] = functools.partial(_after_epoch, callback, health)
        # What evaluators return is logged, and nothing else that is not of each step.
        given.arguments["evaluators"] = {
            **{name: functools.partial(_logged, health, name) for name in Health._fields},
            **{
                name: functools.partial(_evaluate, evaluator, dataset)
                for name, evaluator in (given.arguments.get("evaluators") or {}).items()
            },
        }
        return super().fitter(*given.args, **given.kwargs)

    def fit_online(self, env: Any, buffer: Any = None, *args: Any, **options: Any) -> None:
        """As d3rlpy's; what the buffer holds already is looked at as in :meth:`fitter`, what is collected is not.

        Raises:
            DatasetError: as :meth:`fitter`.
            DivergenceError: if losses or weights are no longer finite.
        """
        if buffer is not None:
            self._take(buffer)
        super().fit_online(env, buffer, *args, **options)
        implementation(self).agent.learner.check_finite()

    def _take(self, buffer: Any) -> None:
        """Looks at the numbers in a buffer before they are trained on, and logs how many actions are clipped."""
        scaler = self._config.action_scaler
        # Nothing is beyond the bounds of a scaler that will be fitted to these data.
        action: Space = Discrete(1)
        if self.get_action_type() == ActionSpace.CONTINUOUS and scaler is None:
            size = buffer.dataset_info.action_size
            action = Box((size,), low=(-1.0,) * size, high=(1.0,) * size)
        elif isinstance(scaler, MinMaxActionScaler) and scaler.built:
            low, high = action_bounds(scaler)
            action = Box((len(low),), low=low, high=high)
        name = f"the {type(buffer).__name__}"
        excess = check_columns(
            buffer.columns(action) if isinstance(buffer, MappedReplayBuffer) else columns(buffer),
            action,
            clip_all_actions=self._config.clip_all_actions,
            name=name,
            remedy="set action_scaler=MinMaxActionScaler(minimum, maximum) to the bounds",
        )
        if excess.count:
            LOG.warning(f"{name}: {excess}; they are clipped")

    def build_with_dataset(self, dataset: Any) -> None:
        """As d3rlpy's, but with all observations of a tuple."""
        shapes = dataset.sample_transition().observation_signature.shape
        self.create_impl(shapes[0] if len(shapes) == 1 else shapes, dataset.dataset_info.action_size)

    @classmethod
    def from_agent(cls, agent: Agent) -> "BaseIQL":
        """See :func:`from_agent`: an :class:`IQL` or a :class:`DiscreteIQL`, as the agent's actions are."""
        return from_agent(agent)

    def to_agent(self) -> Agent:
        """See :func:`to_agent`."""
        return to_agent(self)

    @property
    def compiled(self) -> bool:
        """Whether losses and gradients are compiled: if ``compile_graph`` says so, and there is a compiler."""
        if self.impl is not None:
            return implementation(self).agent.learner.compiled
        return bool(self._config.compile_graph) and compiler_available(torch.device(self._device))

    @property
    def grad_step(self) -> int:
        """Gradient steps taken, those of a loaded model included."""
        return int(self._grad_step) if self.impl is None else implementation(self).agent.learner.step_count

    def set_grad_step(self, grad_step: int) -> None:
        """Sets the number of gradient steps taken, on which the policy's schedule depends."""
        self._grad_step = grad_step
        if self.impl is not None:
            implementation(self).agent.learner.step_count = grad_step

    def save(self, fname: str | os.PathLike[str]) -> None:
        """Writes what ``d3rlpy.load_learnable`` loads, in a process that knows nothing of this adapter as well.

        Raises:
            RuntimeError: if there is nothing to save yet.
            ValueError: if the networks came with an agent from elsewhere, and are none that the file can describe.
        """
        impl = implementation(self)
        if self._config.origin is not None and (custom := impl.agent.custom_parts()):
            raise ValueError(
                f"{', '.join(custom)} came with the agent and are not the default ones, which d3rlpy's file cannot "
                "describe: save the agent itself, to_agent(algorithm).save(path)"
            )
        files.save(self, fname)

    def save_model(self, fname: str | os.PathLike[str]) -> None:
        """Writes networks, targets, optimisers, step and random state, for ``load_model``.

        Raises:
            RuntimeError: if there is nothing to save yet.
        """
        model = io.BytesIO()
        implementation(self).save_model(model)
        checkpoint.write_bytes(fname, model.getvalue())

    def save_policy(self, fname: str | os.PathLike[str]) -> None:
        """Writes the greedy policy with its scalers as one file, ``.onnx`` or ``.pt`` (TorchScript).

        Inputs are ``input_0``, ``input_1``, ..., float32 with a batch dimension of any size; the output is
        ``output_0``. The algorithm is left as it was, on any error as well.

        Raises:
            RuntimeError: if there is no policy yet.
            ValueError: for another suffix.
            ImportError: for a package that ONNX files need; says how to install it.
        """
        export_policy(implementation(self), self._config, fname)


class IQL(BaseIQL):
    """Implicit Q-Learning for continuous actions; made by :meth:`IQLConfig.create`."""

    def get_action_type(self) -> ActionSpace:
        """Continuous."""
        return ActionSpace.CONTINUOUS


class DiscreteIQL(BaseIQL):
    """Implicit Q-Learning for discrete actions; made by :meth:`DiscreteIQLConfig.create`."""

    def get_action_type(self) -> ActionSpace:
        """Discrete."""
        return ActionSpace.DISCRETE


def _evaluate(evaluator: Any, dataset: Any, algorithm: Any, _: Any) -> Any:
    """What an evaluator says of an algorithm and a dataset, whichever it is given."""
    return evaluator(algorithm, dataset)


def _logged(values: Mapping[str, float], name: str, *_: Any) -> float:
    # Who loads a model in the last step of an epoch leaves no batch to speak of.
    return values.get(name, math.nan)


def _after_epoch(callback: Any, health: dict[str, float], algorithm: Any, epoch: int, total_step: int) -> None:
    """Before d3rlpy logs what evaluators say, and saves the model."""
    learner = implementation(algorithm).agent.learner
    learner.check()
    health.update(learner.health())
    if callback is not None:
        callback(algorithm, epoch, total_step)


register_learnable(IQLConfig)
register_learnable(DiscreteIQLConfig)


def implementation(algorithm: BaseIQL) -> IQLImpl:
    """What an algorithm has once it knows its shapes.

    Raises:
        RuntimeError: if it does not.
    """
    if algorithm.impl is None:
        raise RuntimeError(IMPL_NOT_INITIALIZED_ERROR)
    impl: IQLImpl = algorithm.impl
    return impl


def load(path: str | os.PathLike[str], device: Any = None) -> BaseIQL:
    """The algorithm of a ``.d3`` file of ours. As d3rlpy's loader, but that no code of the file is run.

    Args:
        path: the file.
        device: as that of ``d3rlpy.load_learnable``.

    Raises:
        FileNotFoundError, CheckpointError: see :func:`iql_d3rlpy.files.load`.
    """
    algorithm: BaseIQL = files.load(path, device, BaseIQLConfig)
    return algorithm


def from_agent(agent: Agent) -> BaseIQL:
    """The d3rlpy algorithm that trains an agent's very loss, by its very learner; its normalisers become scalers.

    d3rlpy's observations of a Dict space are tuples, sorted by name.

    Args:
        agent: of any adapter.
    """
    core, spaces = agent.config, agent.spaces
    optimizers = AdamFactory(clip_grad_norm=core.max_grad_norm)
    encoders = VectorEncoderFactory(hidden_units=list(core.hidden_sizes))
    kind, size = (
        (DiscreteIQLConfig, spaces.action.n) if isinstance(spaces.action, Discrete) else (IQLConfig, spaces.action.size)
    )
    fields: dict[str, Any] = {
        **{theirs: core.to_json()[name] for name, theirs in named(kind).items()},
        "compile_graph": core.compile == "yes",
        "actor_optim_factory": optimizers,
        "critic_optim_factory": optimizers,
        "actor_encoder_factory": dataclasses.replace(encoders, dropout_rate=core.actor_dropout or None),
        "critic_encoder_factory": encoders,
        "value_encoder_factory": encoders,
        "actor_schedule_steps": core.n_steps if core.actor_schedule == "cosine" else None,
        "origin": {"spaces": spaces.to_json(), "config": core.to_json()},
        **scalers_of(agent.normalizers, spaces),
    }
    config = kind(**fields)
    device = str(agent.device)
    algorithm: BaseIQL = config.create(device)
    shapes = [list(space.shape) if isinstance(space, Box) else [1] for space in spaces.observations.values()]
    shape = shapes if isinstance(spaces.observation, Mapping) else shapes[0]
    algorithm._impl = IQLImpl(shape, size, agent, list(spaces.observations), device)
    return algorithm


def to_agent(algorithm: BaseIQL) -> Agent:
    """The agent in an algorithm: its very loss and learner; scalers become normalisers.

    Args:
        algorithm: one of ours, whose scalers are fitted.

    Raises:
        RuntimeError: if it has no networks yet.
        ValueError: for a scaler that normalisers cannot follow: one that clips rewards, or one of your own.
    """
    impl = implementation(algorithm)
    agent, config = impl.agent, algorithm.config
    if config.origin is None:
        action = agent.spaces.action
        if config.action_scaler is not None:
            low, high = action_bounds(config.action_scaler)
            action = Box((len(low),), "float32", low, high)
        spaces = Spaces(agent.spaces.observation, action)
        # The algorithm's own agent has the units of its networks; nothing of it changes because somebody looks.
        agent = copy.copy(agent)
        agent.spaces, agent.normalizers = spaces, normalizers_of(config, spaces, impl.keys).to(agent.device)
    return agent


def _spaces(shape: Any, action_size: int, keys: Sequence[NestedKey], actions: ActionSpace) -> Spaces:
    """What d3rlpy's shapes say of an environment whose units are those of the networks."""
    boxes = [_box(size) for size in (shape if len(keys) > 1 else [shape])]
    observation: Any = boxes[0]
    if len(keys) > 1:
        observation = {str(index): box for index, box in enumerate(boxes)}
    action: Space = Discrete(action_size)
    if actions == ActionSpace.CONTINUOUS:
        action = Box((action_size,), "float32", (-1.0,) * action_size, (1.0,) * action_size)
    return Spaces(observation, action)


def _box(shape: Sequence[int]) -> Box:
    # d3rlpy takes three dimensions for an image, and so do we.
    return Box(tuple(int(size) for size in shape), "uint8" if len(shape) == 3 else "float32")
