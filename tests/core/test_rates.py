"""Learning rates of the core: what is set, in a group or by name, and what schedules make of it."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agents import SPACES, make_agent, make_dataset
from conftest import keywords, make_batch, make_loss
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from iql_plugins.training.learner import Groups, Learner, cosine_decay
from iql_plugins.training.multi_seed import fit_together


def tensor_rates(groups: Groups) -> list[Optimizer]:
    return [Adam([{**group, "lr": torch.tensor(group["lr"])} for group in groups], fused=True)]


def make_learner(**options: Any) -> Learner:
    return Learner(make_loss("continuous"), **{"seed": 0, "actor_learning_rate": 1e-2} | options)


def group_of(learner: Learner, network: str) -> dict[str, Any]:
    groups = [group for optimizer in learner.optimizers for group in optimizer.param_groups]
    return next(group for group in groups if group["name"] == network)


def write(learner: Learner, network: str, rate: float) -> None:
    group_of(learner, network)["lr"] = rate


def fill(learner: Learner, network: str, rate: float) -> None:
    group_of(learner, network)["lr"].fill_(rate)


def step(learner: Learner, count: int = 1) -> None:
    for _ in range(count):
        learner.step(keywords(make_batch("continuous")))


WAYS: dict[str, tuple[Any, Callable[[Learner, str, float], None]]] = {
    "a number": ({}, write),
    "a number for a tensor": ({"make_optimizers": tensor_rates}, write),
    "into a tensor": ({"make_optimizers": tensor_rates}, fill),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", ["actor", "critic", "value"])
def test_a_rate_that_is_written_is_that_of_the_next_step_and_follows_its_schedule(way: str, network: str) -> None:
    options, put = WAYS[way]
    learner = make_learner(actor_schedule_steps=8, **options)
    before = group_of(learner, network)["lr"]
    step(learner, 2)
    put(learner, network, 0.5)
    assert learner.learning_rate(network) == 0.5
    for taken in range(2, 10):
        factor = cosine_decay(taken, 8) / cosine_decay(2, 8) if network == "actor" else 1.0
        assert learner.learning_rate(network) == pytest.approx(0.5 * factor)
        step(learner)
        assert float(group_of(learner, network)["lr"]) == pytest.approx(0.5 * factor)
    # A graph has the address of the tensor, unless somebody put something else in its place.
    assert (group_of(learner, network)["lr"] is before) == (way == "into a tensor")
    assert isinstance(group_of(learner, network)["lr"], type(before))


@pytest.mark.parametrize("options", [{}, {"make_optimizers": tensor_rates}])
def test_what_was_there_before_can_be_put_back(options: dict[str, Any]) -> None:
    learner = make_learner(**options)
    step(learner)
    groups = learner.optimizers[0].param_groups
    before = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    step(learner)
    for group, rate in zip(groups, before, strict=True):
        group["lr"] = rate
    step(learner)
    rates = {"actor": 1e-2, "critic": 3e-4, "value": 3e-4}
    assert learner.base_rates() == {network: float(group_of(learner, network)["lr"]) for network in rates}
    assert learner.base_rates() == pytest.approx(rates)


def test_a_tensor_that_a_user_writes_stays_as_it_is() -> None:
    for options in ({}, {"make_optimizers": tensor_rates}):
        learner = make_learner(actor_schedule_steps=4, **options)
        rate = torch.tensor(0.5)
        for group in learner.optimizers[0].param_groups:
            group["lr"] = rate
        step(learner, 3)
        assert rate.item() == 0.5
        assert learner.base_rates() == {"actor": 0.5, "critic": 0.5, "value": 0.5}


def test_who_multiplies_the_rate_that_is_shown_multiplies_the_next_one() -> None:
    learner, other = make_learner(actor_schedule_steps=8), make_learner(actor_schedule_steps=8)
    for each in (learner, other):
        step(each, 3)
    group_of(learner, "actor")["lr"] = other.learning_rate("actor") / 2
    for _ in range(7):
        assert learner.learning_rate("actor") == pytest.approx(other.learning_rate("actor") / 2)
        for each in (learner, other):
            step(each)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_a_rate_that_is_written_at_the_end_of_the_schedule_stays(rate: float) -> None:
    learner = make_learner(actor_schedule_steps=2)
    step(learner, 3)
    assert group_of(learner, "actor")["lr"] == 0.0
    write(learner, "actor", rate)
    step(learner)
    assert group_of(learner, "actor")["lr"] == rate
    # Where it is meant to start again, that counts, too.
    learner.actor_schedule_steps = 100
    assert learner.learning_rate("actor") == rate
    learner.set_learning_rate("actor", 0.5)
    assert learner.learning_rate("actor") == pytest.approx(0.5 * cosine_decay(4, 100))


@pytest.mark.parametrize("factor", [1e-9, 0.01, 0.5])
@pytest.mark.parametrize(
    "look",
    [
        lambda learner: None,
        lambda learner: learner.rates(),
        lambda learner: learner.base_rates(),
        lambda learner: learner.learning_rate("critic"),
        lambda learner: learner.load_state_dict(copy.deepcopy(learner.state_dict())),
    ],
    ids=["nobody", "rates", "base_rates", "learning_rate", "state_dict"],
)
def test_what_is_written_before_a_schedule_starts_again_is_the_next_rate_whoever_looked(
    factor: float, look: Callable[[Learner], Any]
) -> None:
    learner = make_learner()
    learner.set_schedule("critic", factor)
    step(learner)
    write(learner, "critic", 1e-3)
    look(learner)
    learner.set_schedule("critic", 1.0)
    step(learner)
    assert group_of(learner, "critic")["lr"] == 1e-3
    learner.set_schedule("critic", 0.5)
    step(learner)
    assert group_of(learner, "critic")["lr"] == 5e-4


@pytest.mark.parametrize("look", [False, True])
def test_a_rate_that_is_written_near_the_end_of_a_schedule_survives_a_longer_one(look: bool) -> None:
    learner = make_learner(actor_schedule_steps=1000)
    learner.step_count = 999
    write(learner, "actor", 1e-3)
    if look:
        assert learner.learning_rate("actor") == 1e-3
    step(learner)
    learner.actor_schedule_steps = 100_000
    step(learner)
    assert group_of(learner, "actor")["lr"] == 1e-3


def test_who_writes_the_very_rate_that_is_shown_keeps_it_for_the_next_step() -> None:
    learner = make_learner(actor_schedule_steps=8)
    step(learner, 3)
    shown = group_of(learner, "actor")["lr"]
    assert learner.learning_rate("actor") < shown
    write(learner, "actor", float(str(shown)))
    assert learner.learning_rate("actor") == shown


def test_the_newest_of_two_settings_counts() -> None:
    learner = make_learner(actor_schedule_steps=4)
    step(learner, 2)
    write(learner, "actor", 0.5)
    learner.set_learning_rate("actor", 0.5)
    assert learner.learning_rate("actor") == group_of(learner, "actor")["lr"] == pytest.approx(0.25)
    write(learner, "actor", 0.125)
    assert learner.learning_rate("actor") == 0.125
    assert learner.base_rates()["actor"] == pytest.approx(0.25)


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_what_is_no_rate_is_refused_before_anything_is_trained(rate: float) -> None:
    learner = make_learner()
    step(learner)
    write(learner, "critic", rate)
    before = {name: tensor.clone() for name, tensor in learner.loss.state_dict().items()}
    for _ in range(2):
        with pytest.raises(ValueError, match="the learning rate in the critic's group must be a finite number >= 0"):
            step(learner)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.loss.state_dict().items())
    assert learner.step_count == 1
    write(learner, "critic", 1e-3)
    step(learner)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_what_was_written_is_resumed_bit_for_bit(way: str, rate: float) -> None:
    options, put = WAYS[way]
    whole, resumed = (make_learner(actor_schedule_steps=20, **options) for _ in range(2))
    batches = [keywords(make_batch("continuous")) for _ in range(9)]
    for batch in batches[:3]:
        whole.step(batch)
    put(whole, "actor", rate)
    put(whole, "critic", rate / 2)
    for batch in batches[3:6]:
        whole.step(batch)
    # Not yet read by any step.
    put(whole, "value", 0.125)
    resumed.loss.load_state_dict(whole.loss.state_dict())
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for learner in (whole, resumed):
        assert learner.learning_rate("value") == 0.125
        for batch in batches[6:]:
            learner.step(batch)
    assert whole.rates() == resumed.rates()
    expected = whole.loss.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.loss.state_dict().items())


def test_states_of_earlier_releases_load() -> None:
    learner, other = make_learner(actor_schedule_steps=8), make_learner(actor_schedule_steps=8)
    learner.set_learning_rate("critic", 0.5)
    step(learner, 2)
    state = learner.state_dict()
    assert state.pop("learning_rates") == {"actor": [1e-2, 1.0], "critic": [0.5, 1.0], "value": [3e-4, 1.0]}
    for group in state["optimizers"][0]["param_groups"]:
        group.pop("schedule", None)
    other.load_state_dict(state | {"actor_learning_rate": 0.25})
    assert other.base_rates() == {"actor": 0.25, "critic": 0.5, "value": 3e-4}
    assert other.learning_rate("actor") == 0.25 * cosine_decay(2, 8)


def test_an_optimiser_that_loads_a_state_goes_on_with_its_rates_and_its_schedule() -> None:
    learner = make_learner(actor_schedule_steps=8)
    step(learner, 2)
    state = copy.deepcopy(learner.optimizers[0].state_dict())
    for group in state["param_groups"]:
        group["lr"] *= 0.5
    shown = group_of(learner, "actor")["lr"]
    learner.optimizers[0].load_state_dict(state)
    step(learner)
    assert group_of(learner, "actor")["lr"] == shown / 2
    step(learner)
    assert group_of(learner, "actor")["lr"] == pytest.approx(shown / 2 * cosine_decay(3, 8) / cosine_decay(2, 8))
    assert group_of(learner, "critic")["lr"] == 1.5e-4


def test_a_schedule_of_torchs_own_counts() -> None:
    learner = make_learner()
    schedule = LambdaLR(learner.optimizers[0], lambda taken: 0.5**taken)
    for taken in range(3):
        step(learner)
        assert group_of(learner, "actor")["lr"] == pytest.approx(1e-2 * 0.5**taken)
        schedule.step()
        assert learner.learning_rate("critic") == pytest.approx(3e-4 * 0.5 ** (taken + 1))


def test_rates_that_the_optimisers_were_made_with_count() -> None:
    learner = make_learner(make_optimizers=lambda groups: [Adam([group | {"lr": 0.5} for group in groups])])
    step(learner)
    assert learner.base_rates() == {"actor": 0.5, "critic": 0.5, "value": 0.5}
    assert group_of(learner, "actor")["lr"] == 0.5


def test_rates_that_are_not_written_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(actor_schedule_steps=8, make_optimizers=tensor_rates)
    step(learner)
    reads: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: reads.append(tensor) or 0.5, raising=False)
    step(learner, 3)
    assert reads == []
    fill(learner, "critic", 0.5)
    step(learner, 3)
    assert [rate is group_of(learner, "critic")["lr"] for rate in reads] == [True]


def test_agents_that_train_together_keep_what_was_written() -> None:
    dataset = make_dataset(SPACES["continuous"])
    together = [make_agent("continuous") for _ in range(2)]
    alone = make_agent("continuous")
    for agent in (*together, alone):
        agent.fit(dataset, 2)
        write(agent.learner, "actor", 0.25)
        write(agent.learner, "value", 0.0)
    fit_together(together, dataset, 4)
    alone.fit(dataset, 4)
    for agent in together:
        assert agent.learner.rates() == alone.learner.rates()
        for network in ("actor", "critic", "value"):
            expected = group_of(alone.learner, network)["lr"]
            assert float(group_of(agent.learner, network)["lr"]) == pytest.approx(float(expected))
        for name, tensor in alone.loss.state_dict().items():
            torch.testing.assert_close(agent.loss.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)
    write(together[1].learner, "critic", 0.5)
    with pytest.raises(ValueError, match="must differ in their seeds alone: config of agent 1"):
        fit_together(together, dataset, 1)


def test_a_training_together_of_no_step_takes_nothing_for_written() -> None:
    dataset = make_dataset(SPACES["continuous"])
    agents = [make_agent("continuous", actor_schedule="cosine", n_steps=20) for _ in range(2)]
    for agent in agents:
        agent.fit(dataset, 19)
        write(agent.learner, "actor", 1e-3)
    fit_together(agents, dataset, 0)
    for agent in agents:
        agent.learner.actor_schedule_steps = 1000
        assert agent.learner.learning_rate("actor") == 1e-3


@pytest.mark.parametrize("rate", [0.25, None])
def test_rates_are_seen_where_writes_are_not_counted(rate: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iql_plugins._compat.writes", lambda tensor: None)
    learner = make_learner(actor_schedule_steps=10, make_optimizers=tensor_rates)
    for taken in range(9):
        if rate is not None and taken == 4:
            fill(learner, "actor", rate)
        step(learner)
    expected = 1e-2 * cosine_decay(8, 10) if rate is None else rate * cosine_decay(8, 10) / cosine_decay(4, 10)
    assert float(group_of(learner, "actor")["lr"]) == pytest.approx(expected, rel=1e-5)


def test_a_rate_that_is_written_while_agents_train_together_is_that_of_the_next_calls_first_step() -> None:
    dataset = make_dataset(SPACES["continuous"])
    agents = [make_agent("continuous", actor_schedule="cosine", n_steps=20) for _ in range(2)]

    def change(taken: int) -> None:
        if taken == 4:
            for agent in agents:
                write(agent.learner, "actor", 0.25)

    fit_together(agents, dataset, 12, change)
    for agent in agents:
        assert agent.learner.learning_rate("actor") == pytest.approx(0.25)


def test_what_is_written_while_agents_train_together_counts_from_the_next_call() -> None:
    dataset = make_dataset(SPACES["continuous"])
    agents = [make_agent("continuous") for _ in range(2)]

    def freeze(taken: int) -> None:
        if taken == 2:
            for agent in agents:
                write(agent.learner, "actor", 0.0)

    fit_together(agents, dataset, 4, freeze)
    before = [parameter.clone() for parameter in agents[0].loss.actor_network.parameters()]
    for agent in agents:
        assert agent.learner.learning_rate("actor") == 0.0
    fit_together(agents, dataset, 2)
    assert all(map(torch.equal, before, agents[0].loss.actor_network.parameters()))
