"""The hyper-parameters: their range, their presets, their JSON."""

import json
import math
from typing import Any

import numpy as np
import pytest
from agents import NETWORKS

from iql_plugins.config import PRESETS, IQLConfig, preset


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("n_steps", 0, "an integer >= 1"),
        ("n_steps", 1e6, "an integer >= 1"),
        ("batch_size", True, "an integer >= 1"),
        ("n_critics", 0, "an integer >= 1"),
        ("hidden_sizes", (256, 0), "a tuple of integers >= 1"),
        ("hidden_sizes", 256, "a tuple of integers >= 1"),
        ("actor_hidden_sizes", (0,), "a tuple of integers >= 1 or None"),
        ("critic_hidden_sizes", 64, "a tuple of integers >= 1 or None"),
        ("activation", "swish", "one of 'relu', .*'tanh'"),
        ("actor_layer_norm", 1, "True or False"),
        ("critic_layer_norm", "yes", "True or False"),
        ("value_layer_norm", 0, "True or False or None"),
        ("value_dropout", 1.0, r"in \[0, 1\)"),
        ("initialization", "xavier", "one of 'orthogonal', 'torch'"),
        ("discount", 1.01, r"in \[0, 1\]"),
        ("discount", math.nan, r"in \[0, 1\]"),
        ("expectile", 0.0, r"in \(0, 1\]"),
        ("expectile", 1.5, r"in \(0, 1\]"),
        ("temperature", -1.0, "a finite number >= 0"),
        ("temperature", "auto_1", "a finite number >= 0 .*or 'auto', or 'auto_0.5'"),
        ("temperature", "automatic", "a finite number >= 0 .*or 'auto', or 'auto_0.5'"),
        ("temperature", True, "a finite number >= 0 .*or 'auto', or 'auto_0.5'"),
        ("temperature", np.True_, "a finite number >= 0 .*or 'auto', or 'auto_0.5'"),
        ("reward_shift", 10**400, "a finite number"),
        ("expectile", True, r"in \(0, 1\]"),
        ("temperature", "0.5", "a finite number >= 0 .*or 'auto', or 'auto_0.5'"),
        ("max_weight", math.inf, "a finite number > 0"),
        ("loss_function", "huber", "one of 'l1', 'l2', 'smooth_l1' or 'huber_20' with a threshold >= 1e-6"),
        ("loss_function", "huber_0", "one of 'l1', 'l2', 'smooth_l1' or 'huber_20' with a threshold >= 1e-6"),
        ("loss_function", "huber_nan", "one of 'l1', 'l2', 'smooth_l1' or 'huber_20' with a threshold >= 1e-6"),
        ("loss_function", "huber_ 20", "one of 'l1', 'l2', 'smooth_l1' or 'huber_20' with a threshold >= 1e-6"),
        ("loss_function", "huber_2_0", "one of 'l1', 'l2', 'smooth_l1' or 'huber_20' with a threshold >= 1e-6"),
        ("loss_function", "huber_1e-7", "one of 'l1', 'l2', 'smooth_l1' or 'huber_20' with a threshold >= 1e-6"),
        ("loss_function", "l2_20", "one of 'l1', 'l2', 'smooth_l1' or 'huber_20' with a threshold >= 1e-6"),
        ("actor_dropout", 1.0, r"in \[0, 1\)"),
        ("squashed", "no", "True or False"),
        ("actor_learning_rate", -1e-3, "a finite number >= 0"),
        ("critic_learning_rate", math.inf, "a finite number >= 0"),
        ("value_learning_rate", math.nan, "a finite number >= 0"),
        ("actor_schedule", "linear", "one of 'cosine', 'constant'"),
        ("polyak", -0.1, r"in \[0, 1\]"),
        ("max_grad_norm", 0.0, "a finite number > 0"),
        ("normalize_observations", 1, "True or False"),
        ("clip_all_actions", "yes", "True or False"),
        ("reward_scale", 0.0, "a finite number > 0 or 'return_range'"),
        ("reward_scale", True, "a finite number > 0 or 'return_range'"),
        ("reward_scale", "max", "a finite number > 0 or 'return_range'"),
        ("reward_shift", math.inf, "a finite number"),
        ("compile", True, "one of 'auto', 'yes', 'no'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {expected}.*, got"):
        IQLConfig(**{name: value})


def test_widths_are_those_of_all_networks_unless_one_has_its_own() -> None:
    config = IQLConfig(hidden_sizes=(4,), critic_hidden_sizes=(5, 6))
    assert [config.sizes_of(role) for role in ("actor", "critic", "value")] == [(4,), (5, 6), (5, 6)]
    assert IQLConfig(hidden_sizes=(4,), actor_hidden_sizes=()).sizes_of("actor") == ()
    with pytest.raises(ValueError, match="n_critics and critic_hidden_sizes must make at most 4096 layers"):
        IQLConfig(critic_hidden_sizes=(1,) * 4096)
    with pytest.raises(ValueError, match="actor_hidden_sizes must make at most 4096 layers"):
        IQLConfig(actor_hidden_sizes=(1,) * 4097)


def test_v_has_layer_norm_as_the_critics_do_unless_it_is_said_of_v() -> None:
    for critics, v, expected in ((True, None, True), (True, False, False), (False, True, True)):
        config = IQLConfig(critic_layer_norm=critics, value_layer_norm=v)
        assert (config.layer_norm_of("critic"), config.layer_norm_of("value")) == (critics, expected)


def test_temperatures_above_one_and_of_zero_are_normal() -> None:
    assert IQLConfig(temperature=10.0).temperature == 10.0
    assert IQLConfig(temperature=0.0).temperature == 0.0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name, hidden_sizes=[32, 16], **NETWORKS["all"])
    assert config.hidden_sizes == (32, 16)
    assert IQLConfig.from_json(json.loads(json.dumps(config.to_json(), allow_nan=False))) == config


#: Expectile, temperature, dropout, shift and scale of the authors' configurations; CORL's for maze2d.
SOURCES: dict[str, tuple[float, float, float, float, object]] = {
    "locomotion": (0.7, 3.0, 0.0, 0.0, "return_range"),
    "locomotion-paper": (0.7, 3.0, 0.0, 0.0, "return_range"),
    "antmaze": (0.9, 10.0, 0.0, -1.0, 1.0),
    "antmaze-finetune": (0.9, 10.0, 0.0, -1.0, 1.0),
    "kitchen": (0.7, 0.5, 0.1, 0.0, 1.0),
    "adroit": (0.7, 0.5, 0.1, 0.0, 1.0),
    "maze2d": (0.7, 3.0, 0.0, 0.0, 1.0),
}


@pytest.mark.parametrize("name", SOURCES)
def test_presets_are_those_of_their_sources(name: str) -> None:
    config = preset(name)
    values = (config.expectile, config.temperature, config.actor_dropout, config.reward_shift, config.reward_scale)
    assert values == SOURCES[name]
    assert config.actor_schedule == ("constant" if name in ("antmaze-finetune", "locomotion") else "cosine")
    assert IQLConfig().actor_schedule == "constant"
    assert config.normalize_observations is (name in ("locomotion", "maze2d"))
    shared = (config.batch_size, config.hidden_sizes, config.discount, config.polyak, config.max_weight)
    assert shared == (256, (256, 256), 0.99, 0.005, 100.0)
    assert {config.actor_learning_rate, config.critic_learning_rate, config.value_learning_rate} == {3e-4}
    assert (config.n_steps, config.n_critics, config.loss_function) == (1_000_000, 2, "l2")


#: The scale of V, the learning rates and the schedule of the authors' configurations and scripts.
OF_OBJECTIVES: dict[tuple[str, str], tuple[dict[str, float], float, str]] = {
    ("locomotion", "gumbel"): ({"loss_temperature": 2.0}, 3e-4, "constant"),
    ("locomotion-paper", "gumbel"): ({"loss_temperature": 2.0}, 3e-4, "cosine"),
    ("antmaze", "gumbel"): ({"loss_temperature": 0.6}, 3e-4, "constant"),
    ("antmaze-finetune", "gumbel"): ({"loss_temperature": 0.8, "max_clip": 5.0}, 3e-4, "constant"),
    ("kitchen", "gumbel"): ({"loss_temperature": 5.0}, 3e-4, "cosine"),
    ("adroit", "gumbel"): ({"loss_temperature": 5.0}, 3e-4, "cosine"),
    ("maze2d", "gumbel"): ({}, 3e-4, "cosine"),
    ("locomotion", "sparse"): ({"alpha": 1.0}, 3e-4, "constant"),
    ("antmaze", "sparse"): ({"alpha": 0.1}, 2e-4, "cosine"),
    ("antmaze-finetune", "sparse"): ({"alpha": 0.1}, 2e-4, "constant"),
    ("kitchen", "sparse"): ({"alpha": 0.5}, 3e-4, "cosine"),
    ("adroit", "sparse"): ({}, 3e-4, "cosine"),
    ("locomotion", "exponential"): ({"alpha": 2.0}, 3e-4, "constant"),
    ("antmaze", "exponential"): ({"alpha": 0.5}, 2e-4, "cosine"),
    ("antmaze-finetune", "exponential"): ({"alpha": 0.5}, 2e-4, "constant"),
    ("kitchen", "exponential"): ({"alpha": 2.0}, 3e-4, "cosine"),
}


@pytest.mark.parametrize(("name", "value_objective"), OF_OBJECTIVES)
def test_a_preset_with_a_value_objective_is_that_of_its_authors(name: str, value_objective: str) -> None:
    config = preset(name, value_objective=value_objective)
    options, rate, schedule = OF_OBJECTIVES[name, value_objective]
    assert config.objective_options == options
    assert {config.actor_learning_rate, config.critic_learning_rate, config.value_learning_rate} == {rate}
    assert config.actor_schedule == schedule
    assert [config.layer_norm_of(role) for role in ("actor", "critic", "value")] == [False, False, True]
    assert config.loss_function == ("huber_20" if value_objective == "gumbel" else "l2")
    others = preset(name).of()
    shared = {"expectile", "temperature", "actor_dropout", "reward_shift", "reward_scale", "batch_size", "polyak"}
    assert all(getattr(config, key) == others[key] for key in shared)


@pytest.mark.parametrize(
    ("name", "options"),
    [("maze2d", {"bc_coefficient": 0.003}), ("antmaze", {"bc_coefficient": 0.3}), ("locomotion", {})],
)
def test_a_preset_with_a_policy_extraction_is_that_of_its_authors(name: str, options: dict[str, float]) -> None:
    assert preset(name, policy_extraction="ddpg_bc") == preset(name).replace(
        policy_extraction="ddpg_bc", objective_options=options
    )
    # Beside those of the value objective's authors.
    both = preset(name, value_objective="gumbel", policy_extraction="ddpg_bc").objective_options
    assert both == {**options, **preset(name, value_objective="gumbel").objective_options}


def test_what_is_given_beside_a_preset_wins_option_by_option() -> None:
    config = preset("antmaze", value_objective="gumbel", objective_options={"max_clip": 5.0})
    assert config.objective_options == {"loss_temperature": 0.6, "max_clip": 5.0}
    assert preset("maze2d", value_objective="sparse").objective_options == {}


def test_unknown_names_are_refused_and_the_known_ones_listed() -> None:
    with pytest.raises(
        ValueError, match=r"preset must be one of locomotion, locomotion-paper, antmaze, .*, got 'hopper'"
    ):
        preset("hopper")
    for make in (IQLConfig().replace, lambda **names: preset("kitchen", **names), lambda **n: IQLConfig.from_json(n)):
        with pytest.raises(TypeError, match=r"tau: no hyper-parameter of IQL; they are n_steps, .* expectile"):
            make(tau=0.7)


def test_a_configuration_is_frozen() -> None:
    config = IQLConfig()
    with pytest.raises(AttributeError):
        config.expectile = 0.9  # type: ignore[misc]
    assert config.replace(expectile=0.9) != config
    assert config.expectile == 0.7
