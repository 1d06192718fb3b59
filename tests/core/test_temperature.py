"""An automatic temperature: when it moves, by how much, and where to; and advantages that count as noise."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import OBSERVATION, gradients, keywords, make_batch, make_loss, total
from torch import Tensor

from iql_plugins import IQLLoss, _compat
from iql_plugins.config import IQLConfig
from iql_plugins.losses import functional
from iql_plugins.losses.batch import Batch
from iql_plugins.losses.quantities import BatchQuantities
from iql_plugins.losses.temperature import LIMIT, STEP, AutomaticTemperature
from iql_plugins.networks import value_function
from iql_plugins.training import gradients as compiled_gradients
from iql_plugins.training.learner import Learner

NAME = "automatic_temperature.log_value"


def log_temperature(loss: IQLLoss) -> Tensor:
    assert loss.automatic_temperature is not None
    return loss.automatic_temperature.log_value


def test_only_an_automatic_temperature_has_a_state(kind: str) -> None:
    plain, automatic = make_loss(kind), make_loss(kind, temperature="auto")
    assert automatic.state_dict().keys() - plain.state_dict().keys() == {NAME}
    assert plain.inverse_temperature == 1.0
    assert automatic.inverse_temperature == 1.0
    assert not any(name.startswith("automatic") for name, _ in automatic.named_parameters())
    for given, loss, hint in (
        (automatic, plain, "an automatic temperature: set it to 'auto' first"),
        (plain, automatic, "a number for a temperature: set it first"),
    ):
        with pytest.raises(RuntimeError, match=rf"{NAME} \(saved with {hint}\)"):
            loss.load_state_dict(given.state_dict())


@pytest.mark.parametrize(
    ("call", "moves"),
    [
        (lambda loss, batch: loss(batch), True),
        (lambda loss, batch: loss(**keywords(batch)), True),
        (lambda loss, batch: loss.actor_loss(batch), True),
        (lambda loss, batch: loss.value_loss(batch), False),
        (lambda loss, batch: loss.qvalue_loss(batch), False),
        (lambda loss, batch: loss.health(batch), False),
        (lambda loss, batch: torch.no_grad()(loss)(batch), False),
        (lambda loss, batch: loss.eval()(batch), False),
    ],
)
def test_it_moves_once_where_the_policys_loss_is_computed_to_train(
    kind: str, call: Callable[..., Any], moves: bool
) -> None:
    loss, batch = make_loss(kind, temperature="auto_0.4"), make_batch(kind)
    found = loss.health(batch)
    call(loss, batch.copy())
    expected = STEP * (found.effective_sample_size - 0.4) if moves else torch.zeros(())
    torch.testing.assert_close(log_temperature(loss), expected)
    # The call itself was at the temperature before.
    torch.testing.assert_close(loss.health(batch).temperature, expected.exp())


@pytest.mark.parametrize("call", [lambda loss, batch: loss(batch), lambda loss, batch: loss.actor_loss(batch)])
def test_it_moves_by_advantages_without_dropout_and_before_any_count_as_noise(
    kind: str, call: Callable[..., Any]
) -> None:
    value = value_function(OBSERVATION, dropout=0.5, hidden_sizes=(32,))
    loss = make_loss(kind, value_network=value, temperature="auto_0.4", objective_options={"noise_threshold": 1e9})
    batch = make_batch(kind)
    with torch.no_grad():
        # V drops nothing where no gradient is asked for.
        of = loss._quantities(batch, {}, loss.in_keys)
        weights = of.advantage.exp()
    assert loss.health(batch).effective_sample_size == 1.0
    call(loss, batch.copy())
    size = weights.mean().square() / weights.square().mean()
    torch.testing.assert_close(log_temperature(loss), STEP * (size - 0.4))


def test_a_sample_size_above_the_target_raises_it_and_one_below_lowers_it() -> None:
    temperature = AutomaticTemperature()
    for size, expected in ((0.9, 0.002), (0.2, -0.003), (math.nan, -0.003), (0.0, -0.003)):
        temperature.move(torch.tensor(size), 0.7)
        assert temperature.log_value == pytest.approx(expected, abs=1e-7)
    for size, limit in ((1.0, LIMIT), (0.01, -LIMIT)):
        for _ in range(6000):
            temperature.move(torch.tensor(size), 0.5)
        assert temperature.log_value == pytest.approx(limit)
        assert 0.0 < temperature.value < math.inf


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_the_sample_size_comes_to_its_target_whatever_the_unit(scale: float, target: float) -> None:
    """Also where half of the weights are clipped at the start, and clipped ones would have a size above the target."""
    loss, advantages = make_loss("continuous", temperature=f"auto_{target}"), scale * torch.randn(256)
    of = BatchQuantities(loss, Batch({}, (256,)))
    of.shape, of.computed = (256,), {"advantage": advantages}
    for _ in range(3000):
        loss._move_temperature(of)
    weight = (log_temperature(loss).exp() * advantages).double().exp()
    assert weight.mean().square() / weight.square().mean() == pytest.approx(target, abs=0.01)


def test_gradients_are_those_of_the_number_that_it_is(kind: str) -> None:
    batch = make_batch(kind)
    loss = make_loss(kind, temperature="auto")
    log_temperature(loss).fill_(math.log(2.0))
    fixed = make_loss(kind, temperature=2.0)
    fixed.load_state_dict({name: tensor for name, tensor in loss.state_dict().items() if name != NAME})
    log_temperature(loss).requires_grad_()
    outputs, expected = loss(batch.copy()), fixed(batch.copy())
    torch.testing.assert_close(dict(outputs), dict(expected))
    (of_temperature,) = torch.autograd.grad(
        total(outputs), [log_temperature(loss)], allow_unused=True, retain_graph=True
    )
    assert of_temperature is None
    torch.testing.assert_close(gradients(loss, outputs), gradients(fixed, expected))


def test_what_is_masked_does_not_move_it_and_importance_weighs_the_others(kind: str) -> None:
    loss, batch = make_loss(kind, temperature="auto", objective_options={"noise_threshold": 0.3}), make_batch(kind)
    part = copy.deepcopy(loss)
    part(batch[:4].copy())
    masked = copy.deepcopy(loss)
    rows = torch.arange(6, device=batch["observation"].device)
    marked = batch.copy().set(("collector", "mask"), (rows < 4).unsqueeze(-1))
    marked["observation"][4:] = math.nan
    masked(marked)
    torch.testing.assert_close(log_temperature(masked), log_temperature(part))
    before = log_temperature(masked).clone()
    masked(batch.copy().set(("collector", "mask"), torch.zeros_like(marked["collector", "mask"])))
    assert torch.equal(log_temperature(masked), before)
    repeated, weighted = copy.deepcopy(loss), copy.deepcopy(loss)
    batch = batch[:3]
    rows = torch.tensor([0, 0, 1, 2, 2, 2])
    # The threshold is of the batch as it was drawn.
    for each in (repeated, weighted):
        each.objective_options = {}
    repeated(batch[rows].copy())
    weighted(batch.set("priority_weight", torch.tensor([2.0, 1.0, 3.0], device=batch["observation"].device)))
    torch.testing.assert_close(log_temperature(weighted), log_temperature(repeated))


def test_it_is_copied_cast_and_reset_with_the_loss(kind: str) -> None:
    loss = make_loss(kind, temperature="auto")
    log_temperature(loss).fill_(0.25)
    other = copy.deepcopy(loss).to(torch.bfloat16)
    # A step of a hundredth would be lost in bfloat16.
    assert (log_temperature(other), log_temperature(other).dtype) == (0.25, torch.float32)
    assert log_temperature(copy.deepcopy(loss).double()).dtype == torch.float64
    loss.reset_parameters_recursive()
    assert (log_temperature(loss), log_temperature(other)) == (0.0, 0.25)


def test_a_learner_moves_it_once_a_step_and_tells_it(kind: str) -> None:
    learner = Learner(make_loss(kind, temperature="auto"), seed=0)
    other = copy.deepcopy(learner.loss)
    batch = keywords(make_batch(kind))
    other(**batch)
    learner.step(batch)
    assert torch.equal(log_temperature(learner.loss), log_temperature(other))
    metrics = learner.metrics()
    assert metrics["temperature"] == pytest.approx(float(log_temperature(other).exp()))
    assert torch.equal(log_temperature(learner.loss), log_temperature(other))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "auto_1.5"}, "temperature must be a finite number >= 0 .*or 'auto'"),
        ({"temperature": "auto", "value_objective": "sparse"}, "'auto' does not go with 'sparse' and 'awr'"),
        ({"temperature": "auto", "value_objective": "exponential"}, "'auto' does not go with 'exponential'"),
        ({"temperature": "auto_0.5", "policy_extraction": "ddpg_bc"}, "'auto_0.5' does not go with 'expectile' and"),
        ({"objective_options": {"noise_threshold": -1.0}}, "noise_threshold must be a finite number >= 0"),
        (
            {"objective_options": {"noise_threshold": 1.0}, "policy_extraction": "ddpg_bc"},
            "objective_options has 'noise_threshold': those of 'expectile' and 'ddpg_bc' are bc_coefficient",
        ),
        ({"objective_options": {"noise_threshold": 1.0}, "num_qvalue_nets": 1}, "needs two at least, got 1"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss("continuous", **given)
    with pytest.raises(ValueError, match=message):
        IQLConfig(**{"n_critics" if name == "num_qvalue_nets" else name: value for name, value in given.items()})


def test_it_can_be_set_later_and_has_a_state_as_long_as_it_is_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that is traced anew moves what an ordinary step moves, and tracing it moves nothing."""
    monkeypatch.setattr(_compat, "compile_graph", lambda graph, *_, **__: graph.forward)
    monkeypatch.setattr(compiled_gradients, "compiler_available", lambda device: True)
    batch = keywords(make_batch("continuous"))
    plain = make_loss("continuous")
    learners = [Learner(loss, seed=0, compile=loss is not plain) for loss in (plain, copy.deepcopy(plain))]
    for value in (1.0, "auto_0.9", "auto_0.9", "auto_0.9"):
        for learner in learners:
            learner.loss.temperature = value
            learner.step(batch)
    eager, compiled = (learner.loss for learner in learners)
    torch.testing.assert_close(log_temperature(compiled), log_temperature(eager))
    assert learners[1].metrics()["temperature"] == pytest.approx(float(log_temperature(eager).exp()))
    for learner in learners:
        learner.loss.temperature = "auto_2"
        with pytest.raises(ValueError, match="temperature must be 'auto'"):
            learner.step(batch)
        learner.loss.temperature = 0.0
        learner.step(batch)
        assert NAME not in learner.loss.state_dict()
        assert learner.metrics()["effective_sample_size"] == 1.0


# Noise


@pytest.mark.parametrize("value_objective", ["expectile", "quantile", "gumbel", "sparse", "exponential"])
@pytest.mark.parametrize("critics", [2, 3])
def test_weights_are_of_what_is_beyond_the_critics_disagreement(value_objective: str, critics: int, kind: str) -> None:
    options = {"num_qvalue_nets": critics, "value_objective": value_objective}
    loss = make_loss(kind, **options, objective_options={"noise_threshold": 0.5})
    batch = make_batch(kind, (32,))
    with torch.no_grad():
        of = loss._quantities(batch, {}, loss.in_keys)
        advantage, noise = of.advantage, functional.critic_disagreement(of.target_q)
        shrunk = advantage.sign() * (advantage.abs() - 0.5 * noise).clamp(min=0.0)
        assert 0 < (shrunk == 0.0).sum() < 32
        weights = {
            "sparse": shrunk.clamp(0.0, 100.0),
            "exponential": (5.0 * shrunk).exp().clamp(max=100.0),
        }
        expected = weights.get(value_objective, shrunk.exp())
        torch.testing.assert_close(of.weight, expected)
        outputs = loss(batch.copy())
        torch.testing.assert_close(outputs["loss_actor"], -(expected * of.log_prob).mean())
        size = expected.mean().square() / expected.square().mean()
        torch.testing.assert_close(loss.health(batch).effective_sample_size, size)
        loss.objective_options = {}
        plain = loss(batch)
    torch.testing.assert_close(outputs["loss_value"], plain["loss_value"])
    torch.testing.assert_close(outputs["loss_qvalue"], plain["loss_qvalue"])
    assert not torch.isclose(outputs["loss_actor"], plain["loss_actor"])
