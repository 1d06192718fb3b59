"""The algorithms of the d3rlpy adapter: what d3rlpy's users do with an algorithm, they can do with ours."""

import copy
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from agents import NETWORKS
from d3rlpy.algos import BCConfig
from d3rlpy.dataset import MDPDataset, MultiStepTransitionPicker, create_fifo_replay_buffer
from d3rlpy.logging import FileAdapterFactory
from d3rlpy.metrics import (
    AverageValueEstimationEvaluator,
    ContinuousActionDiffEvaluator,
    DiscountedSumOfAdvantageEvaluator,
    DiscreteActionMatchEvaluator,
    EnvironmentEvaluator,
    InitialStateValueEstimationEvaluator,
    SoftOPCEvaluator,
    TDErrorEvaluator,
)
from d3rlpy.models import DefaultEncoderFactory, VectorEncoderFactory
from d3rlpy.models.encoders import EncoderFactory, SimBaEncoderFactory, register_encoder_factory
from d3rlpy.ope import FQE, DiscreteFQE, FQEConfig
from d3rlpy.optimizers import (
    AdamFactory,
    AdamWFactory,
    CosineAnnealingLRFactory,
    GPTAdamWFactory,
    RMSpropFactory,
    SGDFactory,
    WarmupSchedulerFactory,
)
from d3rlpy.preprocessing import (
    ClipRewardScaler,
    ConstantShiftRewardScaler,
    MinMaxActionScaler,
    MinMaxObservationScaler,
    MinMaxRewardScaler,
    MultiplyRewardScaler,
    PixelObservationScaler,
    ReturnBasedRewardScaler,
    StandardObservationScaler,
    StandardRewardScaler,
)
from d3rlpy_helpers import (
    ACTION,
    ACTIONS,
    CONTINUOUS,
    DISCRETE,
    PIXEL,
    QUIET,
    SMALL,
    STEPS,
    VECTOR,
    assert_same_weights,
    assert_trains_on,
    config,
    dataset,
    fitted,
    observations,
    pixel_config,
    weights,
)
from tensordict import TensorDict
from torch import nn

import iql_d3rlpy
from iql_d3rlpy import BoundedActionScaler, IQLConfig
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.losses.functional import Health

# torch deprecates TorchScript, which is d3rlpy's format.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def place(device: torch.device) -> str:
    """The device as d3rlpy writes it."""
    return f"{device.type}:0"


OBSERVATION_SCALERS = {
    "none": None,
    "standard": StandardObservationScaler,
    "min_max": MinMaxObservationScaler,
}
ACTION_SCALERS = {"none": None, "min_max": MinMaxActionScaler, "bounded": BoundedActionScaler}
REWARD_SCALERS = {
    "none": lambda: None,
    "multiply": lambda: MultiplyRewardScaler(0.1),
    "clip": lambda: ClipRewardScaler(-1.0, 1.0),
    "min_max": MinMaxRewardScaler,
    "standard": StandardRewardScaler,
    "return": ReturnBasedRewardScaler,
    "shift": lambda: ConstantShiftRewardScaler(-1.0),
}


def check_algorithm(algorithm: Any, kind: str, shape: tuple[int, ...], path: Path, place: str) -> None:
    """Fits, predicts, and survives every round trip."""
    data = dataset(kind, shape)
    fitted(algorithm, data)
    x = observations(shape)
    action, sampled = algorithm.predict(x), algorithm.sample_action(x)
    if kind == DISCRETE:
        assert action.shape == sampled.shape == (7,)
        assert action.dtype == sampled.dtype == np.int64
        assert set(action) | set(sampled) <= set(range(ACTIONS))
    else:
        assert action.shape == sampled.shape == (7, ACTION)
        assert action.dtype == sampled.dtype == np.float32
        limit = 1.0 if algorithm.action_scaler is None else 2.0
        assert np.abs(action).max() <= limit + 1e-5
        assert np.abs(sampled).max() <= limit + 1e-5
        np.testing.assert_array_equal(action, algorithm.predict(x))
    value = algorithm.predict_value(x, action)
    assert value.shape == (7,)
    assert value.dtype == np.float32

    algorithm.save(path / "algorithm.d3")
    loaded = d3rlpy.load_learnable(str(path / "algorithm.d3"), device=place)
    assert type(loaded) is type(algorithm)
    assert loaded.grad_step == algorithm.grad_step == 4
    np.testing.assert_array_equal(loaded.predict(x), action)
    np.testing.assert_array_equal(loaded.predict_value(x, action), value)

    algorithm.save_model(path / "model.pt")
    fresh = type(loaded)(algorithm.config, place, False)
    fresh.create_impl(algorithm.observation_shape, algorithm.action_size)
    fresh.load_model(path / "model.pt")
    np.testing.assert_array_equal(fresh.predict(x), action)

    for suffix in (".pt", ".onnx"):
        algorithm.save_policy(path / f"policy{suffix}")
    scripted = torch.jit.load(path / "policy.pt")(torch.as_tensor(x, dtype=torch.float32, device="cpu")).numpy()
    session = onnxruntime.InferenceSession(path / "policy.onnx")
    (exported,) = session.run(["output_0"], {"input_0": x.astype(np.float32)})
    for other in (scripted, exported):
        assert other.shape == action.shape
        np.testing.assert_allclose(other, action, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaler", OBSERVATION_SCALERS)
def test_everything_with_vectors_and_each_observation_scaler(
    kind: str, scaler: str, tmp_path: Path, place: str
) -> None:
    made = OBSERVATION_SCALERS[scaler]
    algorithm = config(kind, observation_scaler=made and made()).create(place)
    check_algorithm(algorithm, kind, VECTOR, tmp_path, place)


@pytest.mark.parametrize("scaler", ["none", "pixel"])
def test_everything_with_images(kind: str, scaler: str, tmp_path: Path, place: str) -> None:
    algorithm = pixel_config(kind, observation_scaler=PixelObservationScaler() if scaler == "pixel" else None)
    check_algorithm(algorithm.create(place), kind, PIXEL, tmp_path, place)


@pytest.mark.parametrize("scaler", ["min_max", "bounded"])
def test_everything_with_each_action_scaler(scaler: str, tmp_path: Path, place: str) -> None:
    made = ACTION_SCALERS[scaler]
    assert made is not None
    check_algorithm(config(CONTINUOUS, action_scaler=made()).create(place), CONTINUOUS, VECTOR, tmp_path, place)


@pytest.mark.parametrize("scaler", REWARD_SCALERS)
def test_rewards_are_scaled_by_each_reward_scaler(scaler: str, kind: str, place: str) -> None:
    algorithm = fitted(config(kind, reward_scaler=REWARD_SCALERS[scaler](), batch_size=64).create(place), dataset(kind))
    batch = dataset(kind).sample_transition_batch(64)
    rewards = (
        batch.rewards if algorithm.reward_scaler is None else algorithm.reward_scaler.transform_numpy(batch.rewards)
    )
    plain = config(kind, batch_size=64).create(place)
    plain.create_impl(VECTOR, ACTIONS if kind == DISCRETE else ACTION)
    plain.impl.agent.loss.load_state_dict(weights(algorithm))
    expected = plain.update(dataclasses.replace(batch, rewards=rewards.astype(np.float32)))
    assert algorithm.update(batch) == pytest.approx(expected, rel=1e-4)


def test_a_discrete_algorithm_takes_no_action_scaler() -> None:
    with pytest.raises(AssertionError, match="action_scaler cannot be used with discrete"):
        config(DISCRETE, action_scaler=MinMaxActionScaler()).create()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expectile", 1.5),
        ("weight_temp", -1.0),
        ("max_weight", 0.0),
        ("loss_function", "l3"),
        ("gamma", 1.1),
        ("tau", -0.1),
        ("n_critics", 0),
        ("batch_size", 0),
        ("actor_learning_rate", -1.0),
        ("value_learning_rate", float("inf")),
        ("actor_schedule_steps", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_d3rlpys_name(kind: str, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        config(kind, **{field: value})


def test_an_automatic_temperature_that_nothing_reads_is_refused_by_d3rlpys_name(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^weight_temp='auto' does not go with 'expectile' and 'ddpg_bc'"):
        config(kind, weight_temp="auto", policy_extraction="ddpg_bc")


def test_an_expectile_of_one_is_for_continuous_actions_only() -> None:
    assert config(CONTINUOUS, expectile=1.0).expectile == 1.0
    with pytest.raises(ValueError, match=r"expectile must be in \(0, 1\) for discrete actions"):
        config(DISCRETE, expectile=1.0)


def test_fields_have_d3rlpys_names_and_defaults() -> None:
    ours, theirs = IQLConfig(), d3rlpy.algos.IQLConfig()
    for name, value in vars(theirs).items():
        assert getattr(ours, name) == value, name
    assert set(vars(ours)) - set(vars(theirs)) == {
        "value_learning_rate",
        "loss_function",
        "actor_schedule_steps",
        "squashed",
        "origin",
        "clip_all_actions",
        "value_objective",
        "policy_extraction",
        "objective_options",
        *NETWORKS["all"],
    }
    # Positional arguments mean the same.
    assert list(vars(ours))[: len(vars(theirs))] == list(vars(theirs))


@pytest.mark.parametrize(
    "factory",
    [
        DefaultEncoderFactory(),
        DefaultEncoderFactory(activation="tanh", use_batch_norm=True, dropout_rate=0.1),
        VectorEncoderFactory([8, 8], dropout_rate=0.1),
        VectorEncoderFactory([8], activation="gelu", use_layer_norm=True),
        VectorEncoderFactory([8, 8], last_activation="tanh"),
        SimBaEncoderFactory(8, 8),
    ],
    ids=lambda factory: f"{factory.get_type()}-{getattr(factory, 'activation', '')}",
)
def test_encoder_factories_for_vectors(kind: str, factory: EncoderFactory, tmp_path: Path, place: str) -> None:
    names = ("actor", "critic", "value")
    algorithm = config(kind, **{f"{name}_encoder_factory": factory for name in names}, n_critics=3).create(place)
    fitted(algorithm, dataset(kind))
    algorithm.save(tmp_path / "algorithm.d3")
    loaded = d3rlpy.load_learnable(str(tmp_path / "algorithm.d3"), device=place)
    assert_same_weights(weights(algorithm), weights(loaded))
    np.testing.assert_array_equal(algorithm.predict(observations()), loaded.predict(observations()))


def test_what_perceptrons_alone_have_is_refused_beside_other_factories(kind: str, place: str) -> None:
    own = {"critic_encoder_factory": VectorEncoderFactory([8], activation="gelu")}
    for changes, shape in ((own, VECTOR), ({}, PIXEL)):
        algorithm = config(kind, critic_layer_norm=True, **changes).create(place)
        with pytest.raises(ValueError, match="critic_layer_norm must be False where encoder factories make"):
            algorithm.build_with_dataset(dataset(kind, shape))


def test_the_default_encoder_of_images_is_d3rlpys(kind: str, place: str) -> None:
    factories = {f"{name}_encoder_factory": DefaultEncoderFactory() for name in ("actor", "critic", "value")}
    algorithm = fitted(config(kind, **factories).create(place), dataset(kind, PIXEL), steps=1)
    names = {type(module).__name__ for module in algorithm.impl.policy.modules()}
    assert "PixelEncoder" in names
    assert algorithm.predict(observations(PIXEL)).shape[0] == 7


def test_one_critic_and_five(kind: str, place: str) -> None:
    for count in (1, 5):
        algorithm = fitted(config(kind, n_critics=count).create(place), dataset(kind))
        assert algorithm.impl.agent.loss.num_qvalue_nets == count
        assert algorithm.predict_value(observations(), algorithm.predict(observations())).shape == (7,)


class TupleEncoder(nn.Module):
    """Concatenates the observations of a tuple, and an action if there is one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 8)

    def forward(self, x: Any, action: torch.Tensor | None = None) -> torch.Tensor:
        features: torch.Tensor = self.layer(torch.cat([*x, *([] if action is None else [action])], -1))
        return features.relu()


class TupleEncoderFactory(EncoderFactory):  # type: ignore[misc]
    """What a user of d3rlpy writes for tuple observations."""

    def create(self, observation_shape: Any) -> nn.Module:
        return TupleEncoder(sum(shape[0] for shape in observation_shape))

    def create_with_action(self, observation_shape: Any, action_size: int, discrete_action: bool = False) -> nn.Module:
        return TupleEncoder(sum(shape[0] for shape in observation_shape) + action_size)

    @staticmethod
    def get_type() -> str:
        return "iql_plugins_test_tuple"


register_encoder_factory(TupleEncoderFactory)


def tuple_dataset(kind: str) -> MDPDataset:
    base = dataset(kind)
    for episode in base.episodes:
        object.__setattr__(episode, "observations", [episode.observations[:, :3], episode.observations[:, 3:]])
    return MDPDataset(
        [np.concatenate([episode.observations[i] for episode in base.episodes]) for i in (0, 1)],
        np.concatenate([episode.actions for episode in base.episodes]),
        np.concatenate([episode.rewards for episode in base.episodes]),
        np.eye(STEPS)[19],
        np.eye(STEPS)[39] + np.eye(STEPS)[59],
    )


def test_tuple_observations_with_an_encoder_that_takes_them(kind: str, tmp_path: Path, place: str) -> None:
    factories = {f"{name}_encoder_factory": TupleEncoderFactory() for name in ("actor", "critic", "value")}
    algorithm = fitted(config(kind, **factories).create(place), tuple_dataset(kind))
    built = config(kind, **factories).create(place)
    built.build_with_dataset(tuple_dataset(kind))
    assert built.observation_shape == algorithm.observation_shape == [(3,), (2,)]
    x = [observations()[:, :3], observations()[:, 3:]]
    action = algorithm.predict(x)
    assert algorithm.predict_value(x, action).shape == (7,)
    algorithm.save(tmp_path / "algorithm.d3")
    loaded = d3rlpy.load_learnable(str(tmp_path / "algorithm.d3"), device=place)
    np.testing.assert_array_equal(loaded.predict(x), action)
    algorithm.save_policy(tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    (exported,) = session.run(None, {"input_0": x[0], "input_1": x[1]})
    np.testing.assert_allclose(exported, action, rtol=1e-4, atol=1e-5)


def test_tuple_observations_are_refused_by_d3rlpys_encoders(kind: str, place: str) -> None:
    with pytest.raises(ValueError, match="actor_encoder_factory is d3rlpy's VectorEncoderFactory, which takes one"):
        fitted(config(kind).create(place), tuple_dataset(kind))


OPTIMIZERS = {
    "clipped": AdamFactory(clip_grad_norm=0.1),
    "adam": AdamFactory(weight_decay=1e-3, betas=(0.8, 0.9)),
    "adam_w": AdamWFactory(weight_decay=1e-2),
    "sgd": SGDFactory(momentum=0.9),
    "rmsprop": RMSpropFactory(),
    "scheduled": AdamFactory(lr_scheduler_factory=WarmupSchedulerFactory(10)),
    "cosine": AdamFactory(clip_grad_norm=1.0, lr_scheduler_factory=CosineAnnealingLRFactory(20)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_factories_train_and_go_on_after_loading(kind: str, name: str, tmp_path: Path, place: str) -> None:
    factory, data = OPTIMIZERS[name], dataset(kind)
    algorithm = config(kind, actor_optim_factory=factory, critic_optim_factory=factory).create(place)
    algorithm.build_with_dataset(data)
    before = weights(algorithm)
    fitted(algorithm, data)
    assert all(not torch.equal(before[key], value) for key, value in weights(algorithm).items() if "weight" in key)
    algorithm.save(tmp_path / "algorithm.d3")
    assert_trains_on(algorithm, d3rlpy.load_learnable(str(tmp_path / "algorithm.d3"), device=place), data)


def test_an_optimizers_schedule_moves_the_rate(place: str) -> None:
    factory = AdamFactory(lr_scheduler_factory=WarmupSchedulerFactory(10))
    algorithm = config(CONTINUOUS, actor_optim_factory=factory, critic_optim_factory=factory, actor_learning_rate=0.1)
    algorithm = fitted(algorithm.create(place), dataset(CONTINUOUS), steps=4)
    # After t steps the rate of the next one is (t + 1) / 10 of the whole.
    assert algorithm.impl.policy_optim.param_groups[0]["lr"] == pytest.approx(0.05)


def test_an_optimizer_that_splits_the_parameters_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="GPTAdamWFactory splits the parameters of the actor into 2 groups"):
        config(CONTINUOUS, actor_optim_factory=GPTAdamWFactory()).create(place).create_impl(VECTOR, ACTION)


def test_the_policys_rate_follows_its_schedule_and_stays_at_zero(kind: str, place: str) -> None:
    data = dataset(kind)
    algorithm = fitted(config(kind, actor_schedule_steps=8).create(place), data, steps=4)
    learner = algorithm.impl.agent.learner
    assert learner.learning_rate("actor") == pytest.approx(3e-4 / 2)
    fitted(algorithm, data, steps=6)
    assert learner.learning_rate("actor") == 0.0
    policy = {key: value for key, value in weights(algorithm).items() if key.startswith("actor")}
    fitted(algorithm, data, steps=1)
    after = weights(algorithm)
    assert_same_weights(policy, {key: after[key] for key in policy})


def test_two_schedules_of_one_rate_are_refused() -> None:
    factory = AdamFactory(lr_scheduler_factory=WarmupSchedulerFactory(10))
    with pytest.raises(ValueError, match="the policy's rate has two schedules"):
        IQLConfig(actor_optim_factory=factory, actor_schedule_steps=10)


def test_v_has_a_rate_of_its_own(kind: str, place: str) -> None:
    algorithm = config(kind, value_learning_rate=0.0).create(place)
    algorithm.build_with_dataset(dataset(kind))
    before = weights(algorithm)
    fitted(algorithm, dataset(kind))
    for key, value in weights(algorithm).items():
        if key.startswith(("actor", "value", "qvalue")):
            assert torch.equal(before[key], value) == key.startswith("value"), key


def test_v_is_trained_at_the_critics_rate_unless_told_otherwise(kind: str, place: str) -> None:
    algorithm = config(kind, critic_learning_rate=2e-3).create(place)
    algorithm.build_with_dataset(dataset(kind))
    learner = algorithm.impl.agent.learner
    assert learner.learning_rate("value") == learner.learning_rate("critic") == 2e-3
    assert learner.learning_rate("actor") == 3e-4


def test_n_step_transitions_are_discounted_by_their_interval(kind: str, place: str) -> None:
    algorithm = config(kind, gamma=0.5, batch_size=64).create(place)
    algorithm.build_with_dataset(dataset(kind))
    batch = dataset(kind, transition_picker=MultiStepTransitionPicker(3, 0.5)).sample_transition_batch(400)
    assert set(np.unique(batch.intervals)) == {1.0, 2.0, 3.0}
    agent = algorithm.impl.agent

    def tensor(array: Any) -> torch.Tensor:
        return torch.as_tensor(array, device=agent.device)

    with torch.no_grad():
        v = agent.loss.value_network(observation=tensor(batch.next_observations))
        target = tensor(batch.rewards) + 0.5 ** tensor(batch.intervals) * v * (1.0 - tensor(batch.terminals))
        action = tensor(batch.actions)
        inputs = {"observation": tensor(batch.observations), "action": action.long() if kind == DISCRETE else action}
        q = agent.loss.qvalues(TensorDict(inputs, [400]))
        expected = (q - target.squeeze(-1)).square().mean(-1).sum()
    assert algorithm.update(batch)["q_loss"] == pytest.approx(float(expected), rel=1e-5)


def environment(kind: str) -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1" if kind == DISCRETE else "Pendulum-v1", max_episode_steps=20)


def test_fit_online_and_collect(kind: str, place: str) -> None:
    scaler = {} if kind == DISCRETE else {"action_scaler": MinMaxActionScaler()}
    algorithm, env = config(kind, **scaler).create(place), environment(kind)
    buffer = create_fifo_replay_buffer(50, env=env)
    algorithm.fit_online(
        env, buffer, n_steps=60, n_steps_per_epoch=30, update_start_step=30, eval_env=environment(kind), **QUIET
    )
    assert algorithm.grad_step == 30
    assert buffer.transition_count == 50
    for deterministic in (False, True):
        collected = algorithm.collect(env, deterministic=deterministic, n_steps=40, show_progress=False)
        assert 30 <= collected.transition_count <= 40


def test_build_with_env_and_with_dataset(kind: str, place: str) -> None:
    env = environment(kind)
    algorithm = config(kind).create(place)
    assert algorithm.impl is None
    assert algorithm.observation_shape is None
    algorithm.build_with_env(env)
    assert tuple(algorithm.observation_shape) == env.observation_space.shape
    assert algorithm.action_size == (2 if kind == DISCRETE else 1)
    algorithm.build_with_dataset(dataset(kind))
    assert tuple(algorithm.observation_shape) == VECTOR


def test_an_algorithm_without_networks_says_how_to_get_them(kind: str, tmp_path: Path) -> None:
    algorithm = config(kind).create()
    for method in (algorithm.save, algorithm.save_model, algorithm.save_policy):
        with pytest.raises(RuntimeError, match="build_with_dataset"):
            method(tmp_path / "file.onnx")


def test_evaluators_loggers_and_callbacks(kind: str, tmp_path: Path, place: str) -> None:
    data, seen = dataset(kind), []
    evaluators: dict[str, Any] = {
        "td_error": TDErrorEvaluator(),
        "value": AverageValueEstimationEvaluator(),
        "advantage": DiscountedSumOfAdvantageEvaluator(),
        "initial": InitialStateValueEstimationEvaluator(),
        "opc": SoftOPCEvaluator(0.0),
        "actions": DiscreteActionMatchEvaluator() if kind == DISCRETE else ContinuousActionDiffEvaluator(),
    }
    algorithm = config(kind).create(place)
    history = algorithm.fit(
        data,
        n_steps=4,
        n_steps_per_epoch=2,
        logger_adapter=FileAdapterFactory(str(tmp_path)),
        experiment_name="run",
        with_timestamp=False,
        show_progress=False,
        evaluators=evaluators,
        callback=lambda algo, epoch, step: seen.append((epoch, step)),
        epoch_callback=lambda algo, epoch, step: seen.append(epoch),
    )
    assert seen == [(1, 1), (1, 2), 1, (2, 3), (2, 4), 2]
    assert [epoch for epoch, _ in history] == [1, 2]
    losses = {"critic_loss", "q_loss", "v_loss", "actor_loss", "entropy"}
    assert losses | set(evaluators) | set(Health._fields) <= set(history[0][1])
    assert history[1][1]["temperature"] == algorithm.config.weight_temp
    assert 0.0 < history[1][1]["effective_sample_size"] <= 1.0
    assert all(np.isfinite(value) for value in history[1][1].values())
    files = set(os.listdir(tmp_path / "run"))
    assert {"params.json", "q_loss.csv", "td_error.csv", "model_2.d3", "model_4.d3"} <= files
    assert any(name.endswith("_grad.csv") for name in files)

    from_json = type(algorithm).from_json(str(tmp_path / "run" / "params.json"), device=place)
    assert from_json.config == algorithm.config
    assert json.loads((tmp_path / "run" / "params.json").read_text())["config"]["type"] == algorithm.config.get_type()
    loaded = d3rlpy.load_learnable(str(tmp_path / "run" / "model_4.d3"), device=place)
    assert_same_weights(weights(loaded), weights(algorithm))


def test_the_environment_evaluator(kind: str, place: str) -> None:
    env = environment(kind)
    algorithm = config(kind, **({} if kind == DISCRETE else {"action_scaler": BoundedActionScaler()})).create(place)
    algorithm.fit_online(env, n_steps=2, **QUIET)
    score = EnvironmentEvaluator(env, n_trials=2)(algorithm, create_fifo_replay_buffer(10, env=env))
    assert score > 0.0 if kind == DISCRETE else score < 0.0


def test_evaluators_are_given_the_very_dataset(kind: str, place: str) -> None:
    data, seen = dataset(kind), []

    def evaluate(algorithm: Any, given: Any) -> float:
        seen.append(given)
        return 0.0

    algorithm = fitted(config(kind).create(place), data, evaluators={"own": evaluate})
    list(algorithm.fitter(data, 2, 2, evaluators={"own": evaluate}, **QUIET))
    assert len(seen) == 2
    assert all(given is data for given in seen)


def test_fitter_yields_each_epoch(kind: str, place: str) -> None:
    algorithm = config(kind).create(place)
    steps = [algorithm.grad_step for _ in algorithm.fitter(dataset(kind), n_steps=6, n_steps_per_epoch=2, **QUIET)]
    assert steps == [2, 4, 6]


def test_the_wrong_kind_of_actions_is_refused(kind: str, place: str) -> None:
    other = CONTINUOUS if kind == DISCRETE else DISCRETE
    with pytest.raises(AssertionError, match="action-space"):
        fitted(config(kind).create(place), dataset(other))


def test_grad_step_counts_updates_and_can_be_set(kind: str, place: str) -> None:
    algorithm = config(kind, actor_schedule_steps=100).create(place)
    algorithm.set_grad_step(40)
    fitted(algorithm, dataset(kind))
    assert algorithm.grad_step == 44
    algorithm.set_grad_step(100)
    assert algorithm.impl.agent.learner.learning_rate("actor") == 0.0
    algorithm.update(dataset(kind).sample_transition_batch(8))
    assert algorithm.grad_step == 101


def test_policies_and_critics_are_copied_with_their_optimizers(kind: str, place: str) -> None:
    data = dataset(kind)
    source, target = (fitted(config(kind).create(place), data) for _ in range(2))
    before = weights(target)
    target.copy_policy_from(source)
    copied = weights(source)
    for key, value in weights(target).items():
        expected = copied if key.startswith("actor") else before
        assert torch.equal(value, expected[key]), key
    target.copy_q_function_from(source)
    for key, value in weights(target).items():
        expected = before if key.startswith("value_network") else copied
        assert torch.equal(value, expected[key]), key
    target.copy_policy_optim_from(source)
    target.copy_q_function_optim_from(source)
    for name in ("actor", "critic"):
        (optimizer, group), (other, other_group) = (algorithm.impl._optimizer(name) for algorithm in (target, source))
        for mine, theirs in zip(group["params"], other_group["params"], strict=True):
            torch.testing.assert_close(optimizer.state[mine], other.state[theirs], rtol=0.0, atol=0.0)
            assert optimizer.state[mine]["exp_avg"] is not other.state[theirs]["exp_avg"]
    # Both are trained on alike where all that they learn with is alike.
    target.impl.agent.loss.load_state_dict(source.impl.agent.loss.state_dict())
    fitted(target, data)


def test_copies_from_other_algorithms_and_other_networks_are_refused(kind: str, place: str) -> None:
    algorithm = fitted(config(kind).create(place), dataset(kind))
    wide = fitted(config(kind, actor_encoder_factory=VectorEncoderFactory([9])).create(place), dataset(kind))
    before = weights(algorithm)
    with pytest.raises(ValueError, match="the networks differ"):
        algorithm.copy_policy_from(wide)
    with pytest.raises(ValueError, match="the optimisers of the actor differ"):
        algorithm.copy_policy_optim_from(wide)
    if kind == CONTINUOUS:
        cloned = BCConfig().create(place)
        cloned.create_impl(VECTOR, ACTION)
        with pytest.raises(ValueError, match="must be an IQL of iql_d3rlpy, got a BCImpl of d3rlpy"):
            algorithm.copy_policy_from(cloned)
    assert_same_weights(before, weights(algorithm))


COPIES = ("copy_policy_from", "copy_policy_optim_from", "copy_q_function_from", "copy_q_function_optim_from")


@pytest.mark.parametrize("copy_from", COPIES)
@pytest.mark.parametrize("factory", [AdamFactory(), AdamWFactory()], ids=["adam", "adam_w"])
def test_d3rlpys_algorithms_and_ours_refuse_each_others_copies(
    kind: str, factory: Any, copy_from: str, place: str
) -> None:
    data = dataset(kind)
    optimizers = {"actor_optim_factory": factory, "critic_optim_factory": factory}
    ours = fitted(config(kind, **optimizers).create(place), data)
    for theirs_are in (CONTINUOUS, DISCRETE):
        make = d3rlpy.algos.DiscreteSACConfig if theirs_are == DISCRETE else d3rlpy.algos.IQLConfig
        encoders = {"actor_encoder_factory": SMALL, "critic_encoder_factory": SMALL}
        theirs = fitted(make(batch_size=16, **encoders, **optimizers).create(place), dataset(theirs_are))
        for to, source in ((theirs, ours), (ours, theirs)):
            before = saved_model(to)
            with pytest.raises(ValueError, match=r"Invalid (policy|Q-function)|must be an IQL of iql_d3rlpy, got a"):
                getattr(to, copy_from)(source)
            assert saved_model(to) == before
        fitted(theirs, dataset(theirs_are))
    fitted(ours, data)


@pytest.mark.parametrize("copy_from", COPIES)
def test_continuous_and_discrete_ones_refuse_each_others_copies(copy_from: str, place: str) -> None:
    algorithms = [fitted(config(kind).create(place), dataset(kind)) for kind in (CONTINUOUS, DISCRETE)]
    for to, source in (algorithms, algorithms[::-1]):
        before = saved_model(to)
        with pytest.raises(ValueError, match=r"the (networks|optimisers of the \w+) differ"):
            getattr(to, copy_from)(source)
        assert saved_model(to) == before


def saved_model(algorithm: Any) -> bytes:
    file = io.BytesIO()
    algorithm.impl.save_model(file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["clipped", "adam_w"])
def test_the_optimizers_that_are_shown_are_the_learners(kind: str, name: str, place: str) -> None:
    factory, data = OPTIMIZERS[name], dataset(kind)
    algorithm = fitted(config(kind, actor_optim_factory=factory, critic_optim_factory=factory).create(place), data)
    for network, shown in (("actor", algorithm.impl.policy_optim), ("critic", algorithm.impl.q_function_optim)):
        assert isinstance(shown, torch.optim.Optimizer)
        optimizer, group = algorithm.impl._optimizer(network)
        assert any(group is each for each in shown.param_groups)
        assert shown.state is optimizer.state
        assert shown.defaults is optimizer.defaults
        twin = copy.deepcopy(shown)
        assert twin.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
        for moments in shown.state.values():
            moments["exp_avg"] += 1.0
        shown.load_state_dict(twin.state_dict())
        assert all(torch.equal(*pair) for pair in zip(first_moments(optimizer), first_moments(twin), strict=True))
        before = weights(algorithm)
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
        shown.step()
        assert any(not torch.equal(before[key], value) for key, value in weights(algorithm).items())
        shown.zero_grad()
        assert all(parameter.grad is None for parameter in group["params"])
    fitted(algorithm, data)


def first_moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [moments["exp_avg"] for moments in optimizer.state.values()]


@pytest.mark.parametrize("scheduler", [WarmupSchedulerFactory(10), CosineAnnealingLRFactory(T_max=6, eta_min=1e-5)])
def test_a_factorys_schedule_is_d3rlpys_whatever_the_rate_was_set_to(scheduler: Any, place: str) -> None:
    factory = AdamFactory(lr_scheduler_factory=scheduler)
    rate, steps = 0.1, 15
    algorithm = config(CONTINUOUS, actor_optim_factory=factory, critic_optim_factory=factory, actor_learning_rate=rate)
    algorithm = algorithm.create(place)
    algorithm.build_with_dataset(dataset(CONTINUOUS))
    theirs = factory.create([("", nn.Linear(1, 1))], lr=rate, compiled=False)
    learner = algorithm.impl.agent.learner
    for taken in range(steps):
        expected = theirs.optim.param_groups[0]["lr"]
        if taken == 8:
            learner.set_learning_rate("actor", 0.4)
        assert learner.learning_rate("actor") == pytest.approx(expected * (1.0 if taken < 8 else 4.0))
        fitted(algorithm, dataset(CONTINUOUS), steps=1)
        theirs.step()


def test_a_schedule_of_the_rate_0_waits_for_another_rate(place: str) -> None:
    factory = AdamFactory(lr_scheduler_factory=WarmupSchedulerFactory(10))
    algorithm = config(CONTINUOUS, actor_optim_factory=factory, critic_optim_factory=factory, actor_learning_rate=0.0)
    algorithm = fitted(algorithm.create(place), dataset(CONTINUOUS))
    learner = algorithm.impl.agent.learner
    assert learner.learning_rate("actor") == 0.0
    learner.set_learning_rate("actor", 1.0)
    assert learner.learning_rate("actor") == pytest.approx(0.5)


def test_schedules_in_files_of_earlier_releases_go_on(tmp_path: Path, place: str) -> None:
    factory = AdamFactory(lr_scheduler_factory=WarmupSchedulerFactory(10))
    algorithm = config(CONTINUOUS, actor_optim_factory=factory, critic_optim_factory=factory, actor_learning_rate=0.1)
    algorithm = fitted(algorithm.create(place), dataset(CONTINUOUS))
    algorithm.save_model(tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    del state["checksum"], state["training"]["learner"]["learning_rates"]
    state["training"]["learner"]["actor_learning_rate"] = 0.1
    for optimizer in state["training"]["learner"]["optimizers"]:
        del optimizer["param_groups"][0]["schedule"]
    torch.save(state, tmp_path / "model.pt")
    loaded = type(algorithm)(algorithm.config, place, False)
    loaded.create_impl(VECTOR, ACTION)
    loaded.load_model(tmp_path / "model.pt")
    for network in ("actor", "critic", "value"):
        expected = algorithm.impl.agent.learner.learning_rate(network)
        assert loaded.impl.agent.learner.learning_rate(network) == pytest.approx(expected)
    assert_trains_on(algorithm, loaded, dataset(CONTINUOUS))


@pytest.mark.parametrize("name", ["clipped", "adam_w"])
def test_optimizer_states_are_reset(kind: str, name: str, place: str) -> None:
    data = dataset(kind)
    factory = OPTIMIZERS[name]
    algorithm = fitted(config(kind, actor_optim_factory=factory, critic_optim_factory=factory).create(place), data)
    before = weights(algorithm)
    optimizers = algorithm.impl.agent.learner.optimizers
    assert all(optimizer.state for optimizer in optimizers)
    algorithm.reset_optimizer_states()
    assert not any(optimizer.state for optimizer in optimizers)
    assert_same_weights(before, weights(algorithm))
    fitted(algorithm, data)


def test_predict_value_is_the_mean_over_critics(kind: str, place: str) -> None:
    algorithm = fitted(config(kind).create(place), dataset(kind))
    x = observations()
    action = algorithm.predict(x)
    critics = algorithm.impl.agent.loss
    inputs = {"observation": torch.as_tensor(x, device=critics_device(algorithm))}
    inputs["action"] = torch.as_tensor(action, device=critics_device(algorithm))
    q = critics.qvalues(TensorDict(inputs, [7]))
    assert q.shape == (2, 7)
    assert not torch.equal(q[0], q[1])
    np.testing.assert_allclose(algorithm.predict_value(x, action), q.mean(0).cpu().numpy(), rtol=1e-6)


def critics_device(algorithm: Any) -> torch.device:
    device: torch.device = algorithm.impl.agent.device
    return device


def test_fqe_evaluates_our_policies(kind: str, place: str) -> None:
    data = dataset(kind)
    scalers: dict[str, Any] = {"observation_scaler": StandardObservationScaler()}
    if kind == CONTINUOUS:
        scalers["action_scaler"] = MinMaxActionScaler()
    algorithm = fitted(config(kind, **scalers).create(place), data)
    before = weights(algorithm)
    evaluation = (DiscreteFQE if kind == DISCRETE else FQE)(
        algorithm, FQEConfig(encoder_factory=SMALL, batch_size=16, **scalers), device=place
    )
    seen: list[torch.Tensor] = []
    act = algorithm.impl.predict_best_action
    algorithm.impl.predict_best_action = lambda x: seen.append(x) or act(x)
    batch = data.sample_transition_batch(16)
    evaluation.build_with_dataset(data)
    assert np.isfinite(evaluation.update(batch)["loss"])
    # It asks the policy about the next observations, in the networks' units.
    expected = scalers["observation_scaler"].transform_numpy(batch.next_observations)
    np.testing.assert_allclose(seen[0].cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
    evaluation.fit(data, n_steps=4, n_steps_per_epoch=4, evaluators={"td": TDErrorEvaluator()}, **QUIET)
    assert evaluation.predict_value(observations(), algorithm.predict(observations())).shape == (7,)
    assert_same_weights(before, weights(algorithm))


def test_saved_states_go_on_as_if_nothing_had_been(kind: str, tmp_path: Path, place: str) -> None:
    data = dataset(kind)
    algorithm = fitted(config(kind, actor_schedule_steps=20).create(place), data)
    algorithm.save(tmp_path / "algorithm.d3")
    assert_trains_on(algorithm, d3rlpy.load_learnable(str(tmp_path / "algorithm.d3"), device=place), data)


def test_a_model_that_does_not_fit_changes_nothing(kind: str, tmp_path: Path, place: str) -> None:
    algorithm, other = (fitted(config(kind).create(place), dataset(kind)) for _ in range(2))
    other.save_model(tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    state["training"]["learner"]["optimizers"] *= 2
    # As in an earlier release's file.
    del state["checksum"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    before = weights(algorithm)
    with pytest.raises(ValueError, match="the state has 2 optimisers, the learner 1"):
        algorithm.impl.load_model(file)
    assert_same_weights(before, weights(algorithm))
    wide = config(kind, actor_encoder_factory=VectorEncoderFactory([9])).create(place)
    wide.build_with_dataset(dataset(kind))
    with pytest.raises(RuntimeError, match="does not fit this loss"):
        wide.load_model(tmp_path / "model.pt")
    cloned = BCConfig().create(place)
    cloned.create_impl(VECTOR, ACTION)
    cloned.save_model(str(tmp_path / "cloned.pt"))
    with pytest.raises(ValueError, match="another algorithm's, an IQL of iql_d3rlpy has loss and training"):
        algorithm.load_model(tmp_path / "cloned.pt")


@pytest.mark.parametrize("suffix", [".onnx", ".pt"])
def test_a_failed_export_leaves_everything_as_it_was(
    kind: str, suffix: str, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = fitted(config(kind).create(place), dataset(kind))
    path = tmp_path / f"policy{suffix}"
    path.write_bytes(b"before")

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(torch.jit, "trace", fail)
    before, training = weights(algorithm), algorithm.impl.agent.loss.training
    with pytest.raises(MemoryError):
        algorithm.save_policy(path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]
    assert all(parameter.requires_grad for parameter in algorithm.impl.agent.loss.parameters())
    assert algorithm.impl.agent.loss.training == training
    assert_same_weights(before, weights(algorithm))


def test_an_export_is_one_file_and_the_training_goes_on(kind: str, tmp_path: Path, place: str) -> None:
    data = dataset(kind)
    algorithm, other = (config(kind).create(place) for _ in range(2))
    for each in (algorithm, other):
        each.build_with_dataset(data)
    other.impl.agent.loss.load_state_dict(weights(algorithm))
    algorithm.save_policy(str(tmp_path / "policy.onnx"))
    assert os.listdir(tmp_path) == ["policy.onnx"]
    assert all(parameter.requires_grad for parameter in algorithm.impl.agent.loss.parameters())
    assert_trains_on(algorithm, other, data)
    with pytest.raises(ValueError, match=r"saved as \.onnx or \.pt"):
        algorithm.save_policy(tmp_path / "policy.tflite")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


def test_a_fresh_process_loads_what_it_never_heard_of(tmp_path: Path, place: str) -> None:
    paths, expected = [], []
    for kind in (CONTINUOUS, DISCRETE):
        algorithm = fitted(config(kind).create(place), dataset(kind))
        paths.append(str(tmp_path / f"{kind}.d3"))
        algorithm.save(paths[-1])
        expected.append(algorithm.predict(np.zeros((1, *VECTOR), np.float32)).reshape(-1))
    program = (
        "import sys, d3rlpy, numpy\n"
        "assert 'iql_d3rlpy' not in sys.modules\n"
        "for path in sys.argv[1:]:\n"
        "    algorithm = d3rlpy.load_learnable(path)\n"
        "    print('RESULT', algorithm.predict(numpy.zeros((1, 5), 'f')).reshape(-1).tolist())\n"
        "sys.modules.update(dict.fromkeys([n for n in sys.modules if n.startswith('iql_d3rlpy')]))\n"
        "try:\n"
        "    d3rlpy.load_learnable(sys.argv[1])\n"
        "except ModuleNotFoundError as error:\n"
        "    print('MISSING', error.name)\n"
    )
    result = run(program, *paths)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    for line, action in zip(lines, expected, strict=True):
        np.testing.assert_allclose(json.loads(line.removeprefix("RESULT ")), action, rtol=1e-5)
    assert "MISSING iql_d3rlpy" in result.stdout


def test_the_import_registers_names_that_d3rlpy_does_not_have() -> None:
    program = (
        "import sys\n"
        "from iql_plugins.plugins import Host\n"
        "import importlib.metadata\n"
        "entry = importlib.metadata.EntryPoint('d3rlpy', 'iql_d3rlpy.plugin', 'iql_plugins')\n"
        "registry = Host(find=lambda: [entry])\n"
        "try:\n"
        "    registry.map_batch(object())\n"
        "except TypeError:\n"
        "    print('NOBODY', 'd3rlpy' in sys.modules)\n"
        "del sys.modules['iql_d3rlpy']\n"
        "sys.modules['d3rlpy'] = None\n"
        "try:\n"
        "    import iql_d3rlpy\n"
        "except ImportError as error:\n"
        "    print('NEEDS', error)\n"
        "del sys.modules['d3rlpy']\n"
        "import iql_d3rlpy\n"
        "from d3rlpy.base import LearnableConfig\n"
        "from d3rlpy.serializable_config import CONFIG_STORAGE\n"
        "names = CONFIG_STORAGE[LearnableConfig].config_list\n"
        "print('NAMES', [names[name].__module__ for name in ('iql', 'iql_plugins_iql', 'iql_plugins_discrete_iql')])\n"
    )
    result = run(program)
    assert result.returncode == 0, result.stderr
    assert "NOBODY False" in result.stdout
    assert "NEEDS iql_d3rlpy needs d3rlpy: pip install 'iql-plugins[d3rlpy]'" in result.stdout
    assert "NAMES ['d3rlpy.algos.qlearning.iql', 'iql_d3rlpy.algorithm', 'iql_d3rlpy.algorithm']" in result.stdout


def test_our_loader_runs_no_code_of_a_file(kind: str, tmp_path: Path, place: str) -> None:
    algorithm = fitted(config(kind).create(place), dataset(kind))
    algorithm.save(tmp_path / "algorithm.d3")
    loaded = iql_d3rlpy.load(tmp_path / "algorithm.d3", device=place)
    assert_same_weights(weights(algorithm), weights(loaded))

    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "attacked"),)

    (tmp_path / "attack.d3").write_bytes(pickle.dumps({"config": Attack()}))
    with pytest.raises(CheckpointError, match=r"it asks for \w+\.mkdir"):
        iql_d3rlpy.load(tmp_path / "attack.d3")
    assert not (tmp_path / "attacked").exists()
    content = (tmp_path / "algorithm.d3").read_bytes()
    (tmp_path / "cut.d3").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="or damaged"):
        iql_d3rlpy.load(tmp_path / "cut.d3")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        iql_d3rlpy.load(tmp_path / "none.d3")
    with pytest.raises(RuntimeError, match="warp"):
        iql_d3rlpy.load(tmp_path / "algorithm.d3", device="warp:0")
