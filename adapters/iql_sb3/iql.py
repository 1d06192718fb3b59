"""IQL as an off-policy algorithm of Stable-Baselines3, which learns offline as well."""

import contextlib
import copy
import io
import os
import pathlib
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import (
    ConstantSchedule,
    FloatSchedule,
    LinearSchedule,
    check_for_correct_spaces,
    configure_logger,
)
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from iql_plugins import checkpoint
from iql_plugins.config import ActorSchedule, Compile, IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.losses.functional import LossFunction
from iql_plugins.networks.builders import check_loaded, uninitialized
from iql_plugins.training.agent import Agent
from iql_plugins.training.gradients import OUTPUTS, compiler_available
from iql_plugins.training.learner import NETWORKS, Learner
from iql_sb3 import datasets, exploration
from iql_sb3.conversion import agent_in, changeable, config_of, model_of, without_environment
from iql_sb3.files import add_agent
from iql_sb3.metrics import Metrics
from iql_sb3.offline import LearnerState, OfflineLearning, loaded_dataset, steps_of
from iql_sb3.optimizers import NetworkOptimizer
from iql_sb3.policies import (
    NO_EXPLORATION,
    Actor,
    CnnPolicy,
    Critic,
    IQLPolicy,
    MlpPolicy,
    MultiInputPolicy,
    set_hyperparameters,
)
from iql_sb3.spaces import check_fits, is_stand_in, layout_spaces, stand_in

__all__ = ["IQL"]

Rates = float | Schedule | Mapping[str, float | Schedule]


class IQL(OfflineLearning):
    r"""Implicit Q-Learning: offline from a dataset, online as any off-policy algorithm, or the one after the other.

    Kostrikov et al. 2021 (arXiv:2110.06169). Losses and gradient steps are the core's
    (:class:`iql_plugins.IQLLoss`, :class:`iql_plugins.training.learner.Learner`); the policy holds the loss.

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a subclass of
            :class:`~iql_sb3.policies.IQLPolicy`.
        env: the environment. None if there is none: the spaces are then those given, or the dataset's.
        learning_rate: of Adam; a number, a schedule of the remaining progress, or a mapping of ``"actor"``,
            ``"critic"`` and ``"value"`` to these. It can be changed at any time, as ``lr_schedule`` can, which is one
            for all networks. A rate that is written into ``policy.optimizer`` stays, and follows a schedule in
            proportion, see :class:`~iql_plugins.training.learner.Learner`.
        buffer_size: transitions of the replay buffer, which holds online experience.
        learning_starts: online steps before the first gradient step. An untrained policy acts at random
            meanwhile, a trained one as it was trained.
        batch_size: transitions of a gradient step.
        tau: share of the critics in each update of their targets.
        gamma: the discount.
        train_freq: how often to train online, in steps or ``(n, "episode")``.
        gradient_steps: how many steps then; -1 for as many as were taken in the environment.
        action_noise: added to actions online.
        replay_buffer_class: None chooses it by the spaces and ``n_steps``.
        replay_buffer_kwargs: its further arguments.
        optimize_memory_usage: see ``ReplayBuffer``.
        n_steps: steps of a transition, of the dataset as of the replay buffer.
        expectile: :math:`\tau` of V in (0, 1]; discrete actions below 1.
        temperature: inverse temperature :math:`\beta` >= 0; 0 is behaviour cloning. ``"auto"``, or ``"auto_0.5"`` with
            another effective sample size than 0.7, moves it, see :class:`iql_plugins.IQLLoss`.
        max_weight: the largest weight of an action in the policy's loss.
        loss_function: distance of Q to its target: ``"l2"``, ``"l1"``, ``"smooth_l1"``, or ``"huber_20"`` with a
            threshold >= 1e-6.
        value_objective: how V is learned, by its name in :mod:`iql_plugins.losses.objectives`.
        policy_extraction: how the policy is learned from Q and V, likewise.
        objective_options: hyper-parameters that these two alone have, by name.
        actor_schedule: ``"cosine"`` multiplies the actor's learning rate by a cosine from 1 to 0 over
            ``actor_schedule_steps`` gradient steps, offline and online together, and by 0 after them.
        actor_schedule_steps: see above; what is ``"constant"`` has none.
        max_grad_norm: the largest norm of each network's gradient; None for no clipping.
        normalize_observations: whether to standardise observations by the dataset's mean and deviation.
        reward_scale: factor of rewards, offline and online; ``"return_range"`` is 1000 over the range of the dataset's
            returns.
        reward_shift: added to the scaled rewards.
        clip_all_actions: whether to train on data of which most actions are beyond the environment's bounds, or one is
            by an order of magnitude. Fewer are clipped in any case.
        compile: whether to compile losses and gradients; ``"auto"``: long offline trainings of plain perceptrons.
        dataset: what :meth:`load_dataset` takes.
        trust_pickle: whether ``dataset`` may be a pickle, which can run any code.
        offline_ratio: share of the dataset in each batch when learning online, in [0, 1]. Without a dataset batches are
            experience alone, whatever it is. With 0 the critics forget the dataset for the few transitions that there
            are online at first, and what was learned offline is lost more easily than with 0.5, which is no guarantee.
        exploration_fraction: share of an online training over which the rate of random discrete actions falls from
            ``exploration_initial_eps`` to ``exploration_final_eps``, as DQN's; in (0, 1].
        exploration_initial_eps: in [0, 1]. Default (None): 1.0 for a policy that begins untrained. A trained one would
            be lost in random actions, and begins with ``exploration_final_eps``.
        exploration_final_eps: in [0, 1]. Default (None): 0.05, and 0 for a policy that has learned offline. Continuous
            actions have ``action_noise`` instead, and take both as None or 0 only. :meth:`predict` does not explore.
        observation_space: where there is neither an environment nor a dataset to tell it.
        action_space: likewise.
        use_sde: refused: the policy has no state-dependent exploration.
        sde_sample_freq: not read.
        use_sde_at_warmup: refused, as ``use_sde``.
        stats_window_size: episodes that the logged means are over.
        tensorboard_log: folder for TensorBoard.
        policy_kwargs: arguments of the policy, see :class:`~iql_sb3.policies.IQLPolicy`.
        verbose: 0 to 2.
        seed: of everything random.
        device: where the networks are.
        _init_setup_model: whether to build the networks.

    Attributes:
        learner: takes the gradient steps, and counts them.
        generator: draws batches; its state is saved.

    Raises:
        ValueError: for a hyper-parameter out of range, if there are neither spaces nor an environment nor a dataset,
            or if the dataset does not fit the environment.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: IQLPolicy
    actor: Actor
    critic: Critic
    critic_target: Critic

    def __init__(
        self,
        policy: str | type[IQLPolicy],
        env: GymEnv | str | None = None,
        learning_rate: Rates = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        expectile: float = 0.7,
        temperature: float | str = 3.0,
        max_weight: float = 100.0,
        loss_function: LossFunction | str = "l2",
        value_objective: str = "expectile",
        policy_extraction: str = "awr",
        objective_options: Mapping[str, float] | None = None,
        actor_schedule: ActorSchedule = "constant",
        actor_schedule_steps: int = 1_000_000,
        max_grad_norm: float | None = None,
        normalize_observations: bool = False,
        reward_scale: float | Literal["return_range"] = 1.0,
        reward_shift: float = 0.0,
        clip_all_actions: bool = False,
        compile: Compile = "auto",
        dataset: object = None,
        trust_pickle: bool = False,
        offline_ratio: float = 0.5,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float | None = None,
        exploration_final_eps: float | None = None,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if use_sde or use_sde_at_warmup:
            raise ValueError(NO_EXPLORATION)
        if not 0.0 <= offline_ratio <= 1.0:
            raise ValueError(f"offline_ratio must be in [0, 1], got {offline_ratio}")
        loaded = None if dataset is None else loaded_dataset(dataset, trust_pickle)
        derived = env is None and observation_space is None and loaded is not None
        if env is None:
            env = without_environment(observation_space, action_space, loaded, required=_init_setup_model)
        elif observation_space is not None or action_space is not None:
            raise ValueError("give an environment or spaces, not both: the environment has spaces")
        super().__init__(
            policy,
            env,
            learning_rate,  # type: ignore[arg-type]
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_sample_freq=sde_sample_freq,
            sde_support=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete),
            support_multi_env=True,
        )
        self.expectile = expectile
        self.temperature = temperature
        self.max_weight = max_weight
        self.loss_function = loss_function
        self.value_objective = value_objective
        self.policy_extraction = policy_extraction
        self.objective_options = dict(objective_options or {})
        self.actor_schedule = actor_schedule
        self.actor_schedule_steps = actor_schedule_steps
        self.max_grad_norm = max_grad_norm
        self.normalize_observations = normalize_observations
        self.reward_scale = reward_scale
        self.reward_shift = reward_shift
        self.clip_all_actions = clip_all_actions
        self.compile = compile
        self.offline_ratio = offline_ratio
        self.exploration_fraction = exploration_fraction
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_final_eps = exploration_final_eps
        self.exploration_schedule = LinearSchedule(0.0, 0.0, 1.0)
        self.exploration_rate = 0.0
        self.extra: dict[str, Any] = {}
        self._spaces_from_dataset = derived
        self._has_statistics = not normalize_observations and not isinstance(reward_scale, str)
        self._generator_state: tuple[str, Any] | None = None
        self._agent: Agent | None = None
        self._offline: datasets.OfflineData | None = None
        self._learns_offline = False
        # Of the data that were taken last, until the logger has been told.
        self._clipped_actions = 0
        self._applied: tuple[Any, ...] | None = None
        # What the rates were last set to by learning_rate, by network.
        self._starts: dict[str, float] = {}
        # Whether the networks were trained behind a VecNormalize; None before the first gradient step.
        self._normalized_by_env: bool | None = None
        if _init_setup_model:
            self._setup_model()
            if loaded is not None:
                self._set_dataset(*loaded)

    # Building

    def _setup_lr_schedule(self) -> None:
        rates: Any = self.learning_rate
        if isinstance(rates, Mapping):
            if unknown := sorted(rates.keys() - set(NETWORKS)):
                raise ValueError(f"learning_rate has {', '.join(unknown)}; the networks are {', '.join(NETWORKS)}")
            rates = {name: rates.get(name, IQLConfig.actor_learning_rate) for name in NETWORKS}
        else:
            rates = dict.fromkeys(NETWORKS, rates)
        self._rates = {name: FloatSchedule(rate) for name, rate in rates.items()}
        self.lr_schedule = self._rates["critic"]

    def _follow_lr_schedule(self) -> None:
        """Takes what was put in the place of ``learning_rate``, or of ``lr_schedule``, then for all networks."""
        if self.lr_schedule is not self._rates["critic"]:
            self.learning_rate = self.lr_schedule
        self._setup_lr_schedule()

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, IQLPolicy):
            raise TypeError(f"policy must be a subclass of iql_sb3.IQLPolicy, got {self.policy_class.__name__}")
        exploration.check(self)
        self._setup_lr_schedule()
        config = self.config
        if self.env is None:
            self.env = stand_in(self.observation_space, self.action_space, self.n_envs)
        loaded = self._generator_state is not None
        if loaded and config.compile == "yes" and not compiler_available(self.device):
            # Compiled or not, a training goes on.
            config = config.replace(compile="no")
        agent, self._agent = self._agent, None
        # The user's arguments stay his, so that a saved model compares with them.
        given = self.policy_kwargs
        extra: dict[str, Any] = {"normalize_observations": True} if self.normalize_observations else {}
        if agent is not None:
            extra = {"loss": agent.loss, "normalizers": agent.normalizers}
        self.policy_kwargs = {**given, **extra}
        # Without an environment there is no experience to hold. The buffer is made when one comes; a row of it says
        # already what it refuses, and of how many steps its transitions are.
        purely_offline, size = is_stand_in(self.env) and self.replay_buffer is None, self.buffer_size
        if purely_offline:
            self.buffer_size = 1
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs, self.buffer_size = given, size
        self._steps = steps_of(self.replay_buffer)
        if purely_offline:
            self.replay_buffer = None
        self.actor, self.critic, self.critic_target = self.policy.actor, self.policy.critic, self.policy.critic_target
        if agent is None:
            self._set_reward_units(self.policy.normalizers)
            self.learner = Learner.from_config(
                self.policy.loss,
                config.replace(compile="no" if config.compile == "auto" else config.compile),
                seed=self.seed,
                make_optimizers=self.policy.make_optimizers,
            )
            self.generator = torch.Generator(self.device)
            if self.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.seed)
        else:
            self.learner, self.generator = agent.learner, agent.generator
        # The state of another kind of device's generator means nothing to this one's.
        if self._generator_state is not None and self._generator_state[0] == self.generator.device.type:
            self.generator.set_state(torch.from_numpy(self._generator_state[1]))
        self.optimizer = LearnerState(self.learner)
        self.policy.optimizer = self.learner.optimizers[0]
        for name, view in (("actor", self.actor), ("critic", self.critic)):
            view.optimizer = NetworkOptimizer(self.policy.optimizer, name)
        self._applied = None
        self._apply_hyperparameters()
        if agent is not None:
            self._starts = {name: _start(schedule) for name, schedule in self._rates.items()}
            # A schedule that brought it there is not this model's: the rate is.
            for group in self.policy.optimizer.param_groups:
                if group.get("schedule", 1.0) != 1.0:
                    rate = self.learner.learning_rate(group["name"])
                    self.learner.set_schedule(group["name"], 1.0)
                    group["lr"] = rate
        elif not loaded:
            self._apply_learning_rates()

    def _set_reward_units(self, normalizers: Normalizers) -> None:
        if not isinstance(self.reward_scale, str):
            normalizers.get_buffer("reward_scale").fill_(self.reward_scale)
        normalizers.get_buffer("reward_shift").fill_(self.reward_shift)

    @property
    def config(self) -> IQLConfig:
        """The hyper-parameters as the core names them; learning rates are those of the beginning.

        Raises:
            ValueError: for one out of range; names it.
        """
        return config_of(self)

    # Training

    def metrics(self) -> dict[str, float]:
        """What :meth:`iql_plugins.training.learner.Learner.metrics` tells since the last call.

        The logger asks whenever it writes, whoever dumps it.

        Raises:
            DivergenceError: if losses or weights are no longer finite.
        """
        return self.learner.metrics()

    def _update_learning_rate(self, optimizers: Any = None) -> None:
        self._apply_learning_rates()
        self._logger.record("train/learning_rate", self.learner.learning_rate("critic"))
        self._logger.record("train/learning_rate_actor", self.learner.learning_rate("actor"))
        self._logger.record("train/learning_rate_value", self.learner.learning_rate("value"))

    def _apply_learning_rates(self) -> None:
        """Schedules multiply the rates, whoever set them; one that begins elsewhere than the last one sets them."""
        self._follow_lr_schedule()
        for name, schedule in self._rates.items():
            start = _start(schedule)
            if self._starts.get(name) != start:
                self._starts[name] = start
                self.learner.set_learning_rate(name, start)
            self.learner.set_schedule(name, schedule(self._current_progress_remaining) / start if start else 1.0)

    def _apply_hyperparameters(self) -> None:
        """Attributes of an algorithm can be changed at any time, and count from the next step on."""
        wanted = tuple([copy.copy(value) for value in changeable(self)])
        if wanted == self._applied:
            return
        config, loss, learner = self.config, self.policy.loss, self.learner
        set_hyperparameters(loss, config)
        learner.target_updater.tau = config.polyak
        learner.max_grad_norm = config.max_grad_norm
        learner.actor_schedule_steps = config.n_steps if config.actor_schedule == "cosine" else None
        self._applied = wanted

    def _prepare_training(self) -> None:
        if "_logger" not in self.__dict__:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, "IQL")
        Metrics.of(self._logger).model = weakref.ref(self)
        if not self._has_statistics:
            raise ValueError(
                "normalize_observations and reward_scale='return_range' need the statistics of a dataset: "
                "load_dataset(source) before the first gradient step"
            )
        normalized = self._vec_normalize_env is not None
        if self._normalized_by_env not in (None, normalized):
            raise ValueError(
                f"the networks were trained {'with' if self._normalized_by_env else 'without'} a VecNormalize around "
                f"the environment, which now has {'one' if normalized else 'none'}: load the model, or set_env(env), "
                "with an environment as it was (VecNormalize.load(path, env) brings the statistics)"
            )
        if self._offline is not None and self._offline.raw != normalized:
            raise ValueError("the environment's VecNormalize came or went: load_dataset(source) again")
        if self._offline is not None and self._offline.n_steps != self._n_steps():
            raise ValueError(
                f"transitions of the dataset have {self._offline.n_steps} steps, those of the replay buffer "
                f"{self._n_steps()}: load_dataset(source) after load_replay_buffer(path)"
            )
        self._apply_hyperparameters()
        if self._clipped_actions:
            self._logger.record("train/clipped_actions", self._clipped_actions)
            self._clipped_actions = 0

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """Takes gradient steps on the dataset, the replay buffer, or both, mixed by ``offline_ratio``.

        Args:
            gradient_steps: how many.
            batch_size: transitions of each; None for the model's.

        Raises:
            ValueError: if there is neither a dataset nor experience.
        """
        self._train(gradient_steps, self.batch_size if batch_size is None else batch_size, self.offline_ratio)
        if gradient_steps and self.learner.last_losses is not None:
            for name, value in zip(OUTPUTS, self.learner.last_losses.tolist(), strict=True):
                self._logger.record(f"train/{name}", value)

    def _train(self, gradient_steps: int, batch_size: int, offline_ratio: float) -> None:
        self._prepare_training()
        self._update_learning_rate()
        if not self.policy.training:
            self.policy.set_training_mode(True)
        with self.learner.undisturbed():
            for _ in range(gradient_steps):
                self.learner.step(self._batch(batch_size, offline_ratio))
        if gradient_steps:
            self._normalized_by_env = self._vec_normalize_env is not None
        self._n_updates = self.learner.step_count
        self._logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str = "IQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> "IQL":
        """Learns online; a policy that was trained before acts from the first step on.

        Args:
            total_timesteps: steps in the environment.
            callback: called after each of them.
            log_interval: episodes from one line of the log to the next.
            tb_log_name: name of the run for TensorBoard.
            reset_num_timesteps: whether to count, and schedule, from the beginning.
            progress_bar: whether to show one.

        Returns:
            The model.

        Raises:
            RuntimeError: if the model has no environment.
            ValueError: if the replay buffer has values that are not finite, or actions that no clipping explains.
            DivergenceError: if losses or weights are no longer finite.
        """
        if is_stand_in(self.env):
            raise RuntimeError("this model was made without an environment: give it one with set_env(env)")
        if self.learner.processes is not None:
            raise ValueError("several processes learn together from a dataset alone: learn_offline()")
        self._take_experience()
        super().learn(
            total_timesteps,
            callback,
            log_interval,  # type: ignore[arg-type]
            tb_log_name,
            reset_num_timesteps,
            progress_bar,
        )
        self.learner.check_finite()
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        self.exploration_schedule = exploration.schedule(self, restart=reset_num_timesteps)
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        # Noise is for a policy that knows nothing; a trained one would be lost in it.
        sampled = super()._sample_action(0 if self.learner.step_count else learning_starts, action_noise, n_envs)
        if not isinstance(self.action_space, spaces.Discrete):
            return sampled
        self.exploration_rate = self.exploration_schedule(1.0 - self.num_timesteps / self._total_timesteps)
        self._logger.record("rollout/exploration_rate", self.exploration_rate)
        if self.exploration_rate == 0.0:
            return sampled
        actions = exploration.explored(sampled[0], self.exploration_rate, self.action_space)
        return actions, actions

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in any algorithm; spaces that came from a dataset give way to the environment's, if they fit.

        Raises:
            ValueError: if the spaces do not fit.
        """
        if is_stand_in(self.env):
            wrapped = self._wrap_env(env, self.verbose)
            if self._spaces_from_dataset:
                check_fits(layout_spaces(wrapped.observation_space, wrapped.action_space), self.policy.spaces)
            else:
                check_for_correct_spaces(wrapped, self.observation_space, self.action_space)
            self._replace_stand_in(wrapped)
            env = wrapped
        super().set_env(env, force_reset)

    def _replace_stand_in(self, env: VecEnv) -> None:
        """Takes an environment's spaces and number, which an empty replay buffer is made for anew."""
        buffer = self.replay_buffer
        filled = buffer is not None and buffer.size() > 0
        if buffer is not None and filled and buffer.n_envs != env.num_envs:
            raise ValueError(
                f"the replay buffer is that of {buffer.n_envs} environments, the new one has {env.num_envs}"
            )
        for holder in (self, self.policy, self.actor, self.critic, self.critic_target):
            holder.observation_space, holder.action_space = env.observation_space, env.action_space
        self._spaces_from_dataset = False
        self.n_envs = env.num_envs
        kind = self.replay_buffer_class if buffer is None else type(buffer)
        assert kind is not None
        hindsight: dict[str, Any] = {"env": env} if issubclass(kind, HerReplayBuffer) else {}
        if isinstance(buffer, HerReplayBuffer) and filled:
            buffer.env = env
        elif not filled:
            self.replay_buffer = kind(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                optimize_memory_usage=self.optimize_memory_usage,
                **self.replay_buffer_kwargs,
                **hindsight,
            )

    # Saving, loading and moving

    def _excluded_save_params(self) -> list[str]:
        own = ["actor", "critic", "critic_target", "learner", "generator", "_offline", "_rates", "_agent", "_applied"]
        own += ["_clipped_actions", "_learns_offline"]
        return super()._excluded_save_params() + own

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "optimizer"], []

    def set_parameters(
        self,
        load_path_or_dict: Any,
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """As in any algorithm, but whole or not at all.

        ``"optimizer"`` is all that continues a training: moments, rates and the step.
        """
        before = copy.deepcopy(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except BaseException:
            super().set_parameters(before)  # type: ignore[arg-type]
            raise
        # The loss has loaded its discount; the algorithm's own counts from the next step on.
        self._applied = None
        self._n_updates = self.learner.step_count

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """As in any algorithm, with the random state that batches are drawn from; whole, or not at all.

        Beside its own members the zip has the agent as ``iql_plugins.safetensors``, from which the command line reads
        it without running anything. A model with classes of your own has none: only pickles describe it.
        """
        self._follow_lr_schedule()
        self._generator_state = (self.generator.device.type, self.generator.get_state().numpy())
        content = io.BytesIO()
        super().save(content, exclude, include)
        behind = bool(self._normalized_by_env) or self._vec_normalize_env is not None
        # A model that cannot be described is saved all the same.
        with contextlib.suppress(TypeError, ValueError):
            add_agent(content, agent_in(self), self.policy, normalized_by_env=behind)
        if not isinstance(path, str | pathlib.Path):
            path.write(content.getbuffer())
            return
        # Names, and folders that are made, are Stable-Baselines3's.
        target = pathlib.Path(path) if pathlib.Path(path).suffix else pathlib.Path(f"{path}.zip")
        target = pathlib.Path(f"{target}_2") if target.is_dir() else target
        target.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(target, content.getvalue())

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        dataset: object = None,
        trust_pickle: bool = False,
        **kwargs: Any,
    ) -> "IQL":
        """As in any algorithm; ``dataset`` is loaded with it, see :meth:`load_dataset`.

        As in any algorithm, too, loading runs code that is in the file: ``data`` holds cloudpickles, of spaces,
        schedules and the policy's class, which can be anything. Load what you trust. The ``.pth`` members are read by
        ``torch.load(weights_only=True)``, and a ``dataset`` runs nothing unless ``trust_pickle`` says so. To read a
        stranger's file, ``iql-plugins convert`` it: the command line takes the agent in it from
        ``iql_plugins.safetensors``, and runs nothing.
        """
        start = path.tell() if isinstance(path, io.IOBase) else None
        arguments: Any = (device, custom_objects, print_system_info, force_reset)
        try:
            with uninitialized():
                model = super().load(path, env, *arguments, **kwargs)
        except ValueError:
            if env is None:
                raise
            if start is not None:
                path.seek(start)  # type: ignore[union-attr]
            with uninitialized():
                model = super().load(path, None, *arguments, **kwargs)
            # A dataset does not tell the bounds of observations.
            if not model._spaces_from_dataset:
                raise
            model.set_env(env)
        check_loaded(model.policy)
        model._apply_learning_rates()
        if dataset is not None:
            model.load_dataset(dataset, trust_pickle=trust_pickle)
        return model

    @classmethod
    def from_agent(cls, agent: Agent, env: GymEnv | None = None, **kwargs: Any) -> "IQL":
        """A model that holds an agent's very loss, learner, normalisers and generator.

        Args:
            agent: from any adapter.
            env: the environment; None for none.
            **kwargs: further arguments of the model, for learning online.

        Raises:
            ValueError: if the environment does not fit, or the agent's networks or optimisers cannot be built again
                when the model is loaded.
        """
        return model_of(cls, agent, env, **kwargs)

    def to_agent(self) -> Agent:
        """The agent in this model: its very loss, learner, normalisers and generator.

        Raises:
            TypeError: for spaces that agents do not have.
            ValueError: with a ``VecNormalize``, which no agent knows of.
        """
        if self._vec_normalize_env is not None or self._normalized_by_env:
            raise ValueError(
                "an agent takes the environment's observations, this policy those of a VecNormalize: use "
                "normalize_observations=True in its place"
            )
        return agent_in(self)

    def export(self, path: str | os.PathLike[str], format: Literal["onnx", "torchscript", "torch"] = "onnx") -> None:
        """Writes the deterministic policy as one file: what :meth:`predict` takes in, its actions out.

        Args:
            path: replaced in one step, once the actions were compared.
            format: ``"onnx"``, ``"torchscript"``, or ``"torch"`` for ``torch.export``; see
                :func:`iql_plugins.export.export_policy`.

        Raises:
            ValueError: for another format.
            ImportError: for a missing package; says how to install it.
            ExportError: if the policy's networks cannot be exported, or what was written acts differently.
        """
        # What it needs is imported by those who export.
        from iql_plugins.export import export_policy

        export_policy(agent_in(self), path, format)


def _start(schedule: FloatSchedule) -> float:
    """The rate that a schedule multiplies: that of its beginning, or the default one if it rises from 0."""
    constant = isinstance(schedule.value_schedule, ConstantSchedule)
    return schedule(1.0) if constant else schedule(1.0) or IQLConfig.critic_learning_rate
