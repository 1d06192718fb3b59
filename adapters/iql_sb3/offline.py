"""Learning offline: the dataset beside the replay buffer, and the loop in which a gradient step is a step."""

import contextlib
import io
import operator
import pathlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import configure_logger
from tensordict import TensorDictBase

from iql_plugins.config import IQLConfig
from iql_plugins.data.intake import check_numbers
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.keys import next_key
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.learner import Learner, resolve_compile
from iql_sb3 import datasets
from iql_sb3.networks import FeaturesEncoder
from iql_sb3.policies import IQLPolicy
from iql_sb3.reader import ring_transitions
from iql_sb3.spaces import check_fits, layout_spaces

__all__ = ["LearnerState", "OfflineLearning", "loaded_dataset", "steps_of"]

Self = TypeVar("Self", bound="OfflineLearning")


class OfflineLearning(OffPolicyAlgorithm):
    """The part of :class:`~iql_sb3.iql.IQL` that learns from a dataset."""

    policy: IQLPolicy
    learner: Learner
    generator: torch.Generator
    compile: str
    clip_all_actions: bool
    normalize_observations: bool
    reward_scale: float | Literal["return_range"]
    reward_shift: float
    _offline: datasets.OfflineData | None
    _has_statistics: bool
    _clipped_actions: int
    _learns_offline: bool
    _steps: int

    @property
    def config(self) -> IQLConfig:
        """The hyper-parameters as the core names them."""
        raise NotImplementedError

    def _train(self, gradient_steps: int, batch_size: int, offline_ratio: float) -> None:
        raise NotImplementedError

    @property
    def has_dataset(self) -> bool:
        """Whether a dataset is loaded."""
        return self._offline is not None

    def load_dataset(self, source: object, *, trust_pickle: bool = False) -> None:
        """Loads the dataset that :meth:`learn_offline` learns from, and :meth:`learn` mixes into its batches.

        It is kept once, beside the replay buffer. Before the first gradient step its statistics make the
        normalisation, if there is one; later ones leave it as it is.

        Args:
            source: what :func:`iql_plugins.data.load_dataset` takes, or a replay buffer of Stable-Baselines3.
            trust_pickle: whether it may be a pickle, which can run any code.

        Raises:
            ValueError: if it cannot be read or does not fit the spaces, has values that are not finite, or actions that
                no clipping explains; names what. The model is as it was.
        """
        self._set_dataset(*loaded_dataset(source, trust_pickle))

    def _set_dataset(self, dataset: TensorDictBase, _: Spaces | None, buffer: ReplayBuffer | None) -> None:
        known = self.policy.spaces
        # With images turned round, a dataset has no summary.
        stored = dataset
        if buffer is None:
            dataset = _channels_first(dataset, known)
            datasets.check_spaces(dataset, known)
            clipped = check_numbers(stored, known, clip_all_actions=self.clip_all_actions).count
        else:
            _check_buffer(buffer, self.observation_space, self.action_space)
            clipped = self._clipped_in(buffer)
        normalize = self._vec_normalize_env
        if normalize is not None and (self.normalize_observations or self._scales_rewards_twice()):
            raise ValueError(
                "the environment is in a VecNormalize already: leave normalize_observations, reward_scale and "
                "reward_shift as they are, or do without it"
            )
        if self.learner.step_count == 0:
            if not self._has_statistics:
                fitted = Normalizers.fit(stored, known, self.config)
                self.policy.normalizers.load_state_dict(fitted.to(self.device).state_dict())
                self._has_statistics = True
            if normalize is not None:
                datasets.start_statistics(normalize, dataset)
        self._offline = datasets.OfflineData(
            dataset,
            self.policy.inputs,
            scaled=buffer is not None,
            raw=normalize is not None,
            n_steps=self._n_steps(),
            device=self.device,
        )
        self._clipped_actions = clipped

    def _clipped_in(self, buffer: ReplayBuffer) -> int:
        """Transitions of a replay buffer whose actions are clipped; ``ValueError`` if it cannot be trained on."""
        excess = datasets.check_buffer(buffer, self.policy.spaces.action, clip_all_actions=self.clip_all_actions)
        return excess.count

    def _take_experience(self) -> None:
        """Looks at what the replay buffer holds before a training: it may have been loaded, or set by hand."""
        if self.replay_buffer is not None and self.replay_buffer.size():
            self._clipped_actions += self._clipped_in(self.replay_buffer)

    def _scales_rewards_twice(self) -> bool:
        normalize = self._vec_normalize_env
        scaled = self.reward_scale != 1.0 or self.reward_shift != 0.0
        return normalize is not None and normalize.norm_reward and scaled

    def _normalization(self) -> datasets.Normalization | None:
        if self.reward_scale == 1.0 and self.reward_shift == 0.0:
            return self._vec_normalize_env
        return datasets.Rewards(self.policy.normalizers, self._vec_normalize_env)

    def _batch(self, size: int, offline_ratio: float) -> dict[str, torch.Tensor]:
        """A batch of which the given share comes from the dataset, all of it where there is nothing else."""
        online = 0 if self.replay_buffer is None else self.replay_buffer.size()
        if self._offline is None and not online:
            raise ValueError(
                "there is nothing to learn from: load_dataset(source) or load_replay_buffer(path) before, or learn() "
                "in an environment"
            )
        offline = 0 if self._offline is None else round(offline_ratio * size) if online else size
        normalization = self._normalization()
        parts = []
        if offline:
            assert self._offline is not None
            source = self._offline
            index = self.learner.draw(len(source), offline, self.generator, on_disk=source.on_disk)
            parts.append(source.batch(index, self.gamma, normalization))
        if offline < size:
            assert self.replay_buffer is not None
            with datasets.numpy_random(self.generator):
                parts.append(datasets.replay(self.replay_buffer, size - offline, normalization, self.policy.inputs))
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _n_steps(self) -> int:
        """Of a transition of the replay buffer that there is, or will be with an environment."""
        return self._steps if self.replay_buffer is None else steps_of(self.replay_buffer)

    def learn_offline(
        self: Self,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str = "IQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Learns from the dataset, or without one from what is in the replay buffer; the environment is not stepped.

        To callbacks, the logger, the progress bar and the schedules a gradient step is a step. There is no rollout:
        ``on_rollout_start`` and ``on_rollout_end`` are not called.

        Args:
            gradient_steps: how many, at least 0.
            callback: called after each of them.
            log_interval: gradient steps from one line of the log to the next; None writes none.
            tb_log_name: name of the run for TensorBoard; :meth:`learn` has the same, and goes on in it with
                ``reset_num_timesteps=False``.
            reset_num_timesteps: whether to count, and schedule, from the beginning.
            progress_bar: whether to show one.

        Returns:
            The model.

        Raises:
            TypeError: if ``gradient_steps`` or ``log_interval`` is no integer.
            ValueError: if one of them is too small, there is nothing to learn from, or the replay buffer has values
                that are not finite, or actions that no clipping explains.
            DivergenceError: if losses or weights are no longer finite.
        """
        gradient_steps = _count("gradient_steps", gradient_steps, least=0)
        if log_interval is not None:
            log_interval = _count("log_interval", log_interval, least=1)
        total_timesteps, callback = self._setup_learn_offline(
            gradient_steps, callback, tb_log_name, reset_num_timesteps, progress_bar
        )
        offline_ratio = 1.0
        # Callbacks that count episodes read it.
        dones = np.zeros(self.n_envs, dtype=bool)
        callback.on_training_start(locals(), globals())
        self._learns_offline = True
        try:
            with _bars_count_gradient_steps(callback):
                while self.num_timesteps < total_timesteps:
                    self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                    self._train(1, self.batch_size, offline_ratio)
                    self.num_timesteps += 1
                    callback.update_locals(locals())
                    if not callback.on_step():
                        break
                    if log_interval is not None and self.num_timesteps % log_interval == 0:
                        self.dump_logs()
        finally:
            self._learns_offline = False
        if self.num_timesteps:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
        self.learner.check()
        callback.on_training_end()
        return self

    def _setup_learn_offline(
        self,
        gradient_steps: int,
        callback: MaybeCallback,
        tb_log_name: str,
        reset_num_timesteps: bool,
        progress_bar: bool,
    ) -> tuple[int, BaseCallback]:
        """What ``_setup_learn`` does, but for the environment, which is left alone."""
        if self._offline is None and not (self.replay_buffer is not None and self.replay_buffer.size()):
            raise ValueError("there is nothing to learn from: load_dataset(source) or load_replay_buffer(path) before")
        if self._offline is None:
            if self.learner.processes is not None:
                raise ValueError("several processes learn together from a dataset alone: load_dataset(source) before")
            self._take_experience()
        self._compile(gradient_steps)
        self.start_time = time.time_ns()
        if self.ep_info_buffer is None or reset_num_timesteps:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if reset_num_timesteps:
            self.num_timesteps = 0
            self._episode_num = 0
        self._num_timesteps_at_start = self.num_timesteps
        self._total_timesteps = self.num_timesteps + gradient_steps
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        if progress_bar:
            if isinstance(callback, list):
                callback = CallbackList(callback)
            elif not isinstance(callback, BaseCallback):
                callback = ConvertCallback(callback)
            callback = CallbackList([callback, ProgressBarCallback()])
        return self._total_timesteps, self._init_callback(callback)

    def _compile(self, gradient_steps: int) -> None:
        """Goes on with compiled losses and gradients where a training is long enough, and the networks are plain."""
        old, policy = self.learner, self.policy
        extracts = any(isinstance(module, FeaturesEncoder) for module in policy.loss.modules())
        plain = isinstance(self.observation_space, spaces.Box) and not extracts
        if self.compile != "auto" or old.compiled or not plain:
            return
        if resolve_compile("auto", gradient_steps, self.device) == "yes":
            config = self.config.replace(compile="yes")
            self.learner = Learner.from_config(
                policy.loss, config, seed=old.seed, make_optimizers=lambda groups: old.optimizers
            )
            self.learner.load_state_dict(old.state_dict())
            self.learner.processes, self.learner.kept = old.processes, old.kept
            self.optimizer = LearnerState(self.learner)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """As in any algorithm, but that callbacks of :meth:`learn_offline` do not write a buffer that holds nothing."""
        if self._learns_offline and self.replay_buffer is not None and not self.replay_buffer.size():
            return
        super().save_replay_buffer(path)


class LearnerState:
    """What continues a training, as Stable-Baselines3 saves and loads a module."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def state_dict(self) -> dict[str, Any]:
        """The learner's."""
        return self._learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Restores it; without ``strict`` also a part of it."""
        self._learner.load_state_dict(state if strict else {**self._learner.state_dict(), **state})


def _count_one(bar: ProgressBarCallback) -> bool:
    bar.pbar.update(1)
    return True


@contextlib.contextmanager
def _bars_count_gradient_steps(callback: BaseCallback) -> Iterator[None]:
    """Inside, progress bars of the framework's count one for each step, and not one for each environment."""
    found, bars = [callback], []
    while found:
        each = found.pop()
        if isinstance(each, CallbackList):
            found += each.callbacks
        elif type(each) is ProgressBarCallback:
            bars.append(each)
    for bar in bars:
        vars(bar)["_on_step"] = partial(_count_one, bar)
    try:
        yield
    finally:
        for bar in bars:
            vars(bar).pop("_on_step", None)


def _count(name: str, value: Any, least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}") from error
    if isinstance(value, bool) or count < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return count


def loaded_dataset(source: object, trust_pickle: bool) -> tuple[TensorDictBase, Spaces | None, ReplayBuffer | None]:
    """By the key layout, with the spaces that the source tells, and the replay buffer that it is, if it is one."""
    if isinstance(source, ReplayBuffer):
        return ring_transitions(source, f"the {type(source).__name__}"), None, source
    return *datasets.load(source, trust_pickle), None


def steps_of(buffer: ReplayBuffer | None) -> int:
    """Steps of a replay buffer's transitions: a class of the user's own has those of its own."""
    return buffer.n_steps if isinstance(buffer, NStepReplayBuffer) else 1


def _check_buffer(buffer: ReplayBuffer, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    if isinstance(action_space, spaces.Box) and buffer.action_space != action_space:
        raise ValueError(f"the replay buffer's action space is {buffer.action_space}, the environment's {action_space}")
    check_fits(
        layout_spaces(buffer.observation_space, buffer.action_space), layout_spaces(observation_space, action_space)
    )


def _channels_first(dataset: TensorDictBase, known: Spaces) -> TensorDictBase:
    """Images with channels last, as environments have them, where the policy's spaces have them first."""
    result = dataset
    for key, space in known.observations.items():
        image = dataset.get(key, None)
        if not isinstance(space, Box) or not space.is_image or not isinstance(image, torch.Tensor):
            continue
        channels, height, width = space.shape
        if tuple(image.shape[1:]) == (height, width, channels) != space.shape:
            result = result.copy() if result is dataset else result
            for name in (key, next_key(key)):
                result.set(name, dataset.get(name).movedim(-1, 1))
    return result
