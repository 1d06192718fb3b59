"""The one gradient step: rates, schedule, clipping, metrics, resuming."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import recorder
import torch
from agents import SPACES, make_agent, make_dataset, same, weights
from conftest import keywords, make_batch, make_loss
from tensordict import TensorDict
from torch.optim import SGD, Adam, Optimizer
from torch.overrides import TorchFunctionMode

from iql_plugins.config import IQLConfig
from iql_plugins.losses import iql as loss_module
from iql_plugins.training import learner as module
from iql_plugins.training.agent import build_loss
from iql_plugins.training.learner import DivergenceError, Groups, Learner, cosine_decay, resolve_compile


def rates(learner: Learner) -> dict[str, float]:
    """The rates that the optimisers have."""
    return {group["name"]: float(group["lr"]) for optimizer in learner.optimizers for group in optimizer.param_groups}


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.loss.state_dict().items()}


def per_group(make: Callable[..., Optimizer] = Adam) -> Callable[[Groups], list[Optimizer]]:
    return lambda groups: [make([group]) for group in groups]


def test_a_step_is_that_of_a_loop_written_by_hand(kind: str) -> None:
    learner = Learner(make_loss(kind), actor_learning_rate=1e-2, critic_learning_rate=2e-2, value_learning_rate=3e-2)
    torch.manual_seed(0)
    loss = make_loss(kind)
    loss.load_state_dict(learner.loss.state_dict())
    networks = (loss.actor_network, loss.qvalue_network, loss.value_network)
    optimizers = [Adam(network.parameters(), lr=lr) for network, lr in zip(networks, (1e-2, 2e-2, 3e-2), strict=True)]
    for _ in range(3):
        batch = keywords(make_batch(kind))
        learner.step(batch)
        outputs = loss(**batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(outputs[:3]).backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for target, source in loss.target_pairs()[0]:
                target.mul_(0.995).add_(source, alpha=0.005)
    for name, tensor in loss.state_dict().items():
        torch.testing.assert_close(learner.loss.state_dict()[name], tensor, msg=name)


def test_the_actor_s_rate_falls_as_a_cosine_and_is_held_at_the_end() -> None:
    assert [cosine_decay(step, 4) for step in (0, 2, 4, 5, 1000)] == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.0])
    learner = Learner(make_loss("continuous"), actor_learning_rate=0.4, actor_schedule_steps=4)
    batch, seen = keywords(make_batch("continuous")), []
    for _ in range(7):
        expected = learner.learning_rate("actor")
        learner.step(batch)
        seen.append(rates(learner)["actor"])
        assert seen[-1] == pytest.approx(expected)
        assert rates(learner)["critic"] == rates(learner)["value"] == pytest.approx(3e-4)
    half = math.sqrt(0.5) / 2
    assert seen == pytest.approx([0.4, 0.4 * (0.5 + half), 0.2, 0.4 * (0.5 - half), 0.0, 0.0, 0.0])


def test_at_the_end_of_the_schedule_the_actor_rests_and_the_others_learn() -> None:
    learner = Learner(make_loss("continuous"), actor_schedule_steps=1)
    batch = keywords(make_batch("continuous"))
    learner.step(batch)
    before = snapshot(learner)
    learner.step(batch)
    moved = {name.split("_")[0] for name, tensor in snapshot(learner).items() if not torch.equal(tensor, before[name])}
    assert moved == {"qvalue", "value", "target"}


def test_a_rate_that_is_set_counts_the_actor_s_before_its_schedule() -> None:
    learner = Learner(make_loss("continuous"), actor_schedule_steps=2)
    batch = keywords(make_batch("continuous"))
    learner.step(batch)
    learner.set_learning_rate("actor", 1.0)
    learner.set_learning_rate("value", 0.25)
    assert learner.learning_rate("actor") == pytest.approx(0.5)
    learner.step(batch)
    assert rates(learner) == pytest.approx({"actor": 0.5, "critic": 3e-4, "value": 0.25})
    with pytest.raises(ValueError, match="network must be one of actor, critic, value, got 'q'"):
        learner.set_learning_rate("q", 0.1)
    with pytest.raises(ValueError, match="the learning rate must be a finite number >= 0, got nan"):
        learner.set_learning_rate("actor", math.nan)
    assert learner.learning_rate("value") == 0.25


def tensor_rates(groups: Groups) -> list[Optimizer]:
    return [Adam([{**group, "lr": torch.tensor(group["lr"])} for group in groups], fused=True)]


def test_rates_that_are_tensors_are_filled_in_place() -> None:
    learner = Learner(
        make_loss("continuous"), actor_learning_rate=0.4, actor_schedule_steps=2, make_optimizers=tensor_rates
    )
    rate = learner.optimizers[0].param_groups[0]["lr"]
    for _ in range(2):
        learner.step(keywords(make_batch("continuous")))
    assert rate.item() == pytest.approx(0.2)


def test_the_gradient_of_each_network_is_clipped_on_its_own() -> None:
    norms: list[float] = []

    class Recording(SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                grads = [p.grad for p in group["params"] if p.grad is not None]
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

    for largest in (None, 1e-3):
        torch.manual_seed(0)
        learner = Learner(
            make_loss("continuous"), max_grad_norm=largest, make_optimizers=lambda g: [Recording(list(g))]
        )
        learner.step(keywords(make_batch("continuous")))
    free, clipped = norms[:3], norms[3:]
    assert min(free) > 1e-3
    assert clipped == pytest.approx([1e-3] * 3, rel=1e-3)


def test_importance_weights_and_n_steps_reach_the_loss(kind: str) -> None:
    batch = make_batch(kind)
    changed = []
    for extra in ({}, {"priority_weight": torch.rand(6)}, {"steps_to_next_obs": torch.full((6, 1), 5)}):
        torch.manual_seed(1)
        learner = Learner(make_loss(kind))
        learner.step(keywords(batch) | extra)
        changed.append(snapshot(learner))
    assert not same(changed[0], changed[1])
    assert not same(changed[0], changed[2])


def test_a_tensordict_may_have_entries_that_the_loss_does_not_read(kind: str) -> None:
    batch, learners = make_batch(kind), []
    for extra in ({}, {"index": torch.arange(6), "info": TensorDict({"x": torch.zeros(6)}, [6])}):
        torch.manual_seed(1)
        learners.append(Learner(make_loss(kind)))
        learners[-1].step(batch.clone().update(extra))
    assert same(*map(snapshot, learners))
    assert set(batch.keys()) == {"observation", "action", "next"}, "the batch was written into"


def test_a_batch_that_is_refused_changes_nothing(kind: str) -> None:
    learner = Learner(make_loss(kind))
    before = snapshot(learner)
    with pytest.raises(KeyError, match="terminated"):
        learner.step({name: t for name, t in keywords(make_batch(kind)).items() if name != "next_terminated"})
    assert learner.step_count == 0
    assert same(before, snapshot(learner))
    assert learner.metrics() == {}


def test_metrics_are_means_since_the_last_call_and_the_health_of_the_last_batch(kind: str) -> None:
    learner, losses = Learner(make_loss(kind)), []
    assert learner.metrics() == {}
    for _ in range(3):
        batch = keywords(make_batch(kind))
        losses.append([output.item() for output in learner.loss(**batch)])
        learner.step(batch)
    metrics = learner.metrics()
    means = [sum(column) / 3 for column in zip(*losses, strict=True)]
    assert [metrics[name] for name in ("loss_actor", "loss_qvalue", "loss_value", "entropy")] == pytest.approx(means)
    health = learner.loss.health(**batch)
    assert {name: metrics[name] for name in health._fields} == pytest.approx(
        {name: float(value) for name, value in health._asdict().items()}
    )
    assert learner.metrics() == {}


def test_metrics_are_of_the_batch_that_was_given_whatever_becomes_of_its_mapping() -> None:
    learner, batch = Learner(make_loss("continuous")), keywords(make_batch("continuous"))
    learner.step(batch)
    batch.clear()
    assert learner.metrics().keys() >= {"loss_actor", "effective_sample_size"}


def test_health_is_a_number_where_all_weights_vanish() -> None:
    loss = make_loss("continuous", temperature=1e6)
    with torch.no_grad():
        list(loss.value_network.parameters())[-1].fill_(50.0)
    health = loss.health(make_batch("continuous"))
    assert all(value.isfinite() for value in health)
    assert 0.0 < health.effective_sample_size <= 1.0
    assert health.share_value_above_q == 1.0


class HostReads(TorchFunctionMode):
    """Counts what would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero", "__index__"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_on_the_host() -> None:
    learner = Learner(make_loss("continuous"), actor_schedule_steps=10, max_grad_norm=0.5)
    batch = keywords(make_batch("continuous"))
    learner.step(batch)
    with HostReads() as reads:
        learner.step(batch)
    assert reads.names == []
    with HostReads() as reads:
        learner.metrics()
    assert reads.names == ["tolist"]
    with HostReads() as reads:
        learner.check_finite()
    assert reads.names == ["tolist"]
    learner.step(batch)
    with HostReads() as reads:
        learner.warnings()
    assert reads.names == ["tolist"]


def poison(learner: Learner, network: str, value: float = math.nan) -> None:
    """Makes one weight of a network a number that is not finite."""
    with torch.no_grad():
        getattr(learner.loss, network).get_parameter(
            next(name for name, parameter in getattr(learner.loss, network).named_parameters() if parameter.ndim > 1)
        ).view(-1)[0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("network", "name"), [("actor_network", "actor"), ("qvalue_network", "critic"), ("value_network", "value")]
)
def test_weights_that_are_not_finite_are_named_when_metrics_are_read(
    kind: str, network: str, name: str, value: float
) -> None:
    learner, batch = Learner(make_loss(kind)), keywords(make_batch(kind))
    good = copy.deepcopy(learner.state_dict())
    weights_before = snapshot(learner)
    learner.step(batch)
    learner.metrics()
    learner.step(batch)
    poison(learner, network, value)
    for read in (learner.metrics, learner.check_finite):
        with pytest.raises(DivergenceError, match=f"the {name}'s weights not finite at step 2: lower the learning"):
            read()
    # Whoever goes back to a good state goes on.
    learner.loss.load_state_dict(weights_before)
    learner.load_state_dict(good)
    learner.step(batch)
    assert set(learner.metrics()) >= {"loss_actor", "loss_qvalue", "loss_value", "entropy"}


def test_a_loss_that_was_not_finite_once_is_named_whatever_came_later(kind: str) -> None:
    learner, batch = Learner(make_loss(kind)), keywords(make_batch(kind))
    learner.step(batch)
    learner.count(torch.tensor([0.0, math.inf, 0.0, 0.0]), batch)
    learner.step(batch)
    for read in (learner.metrics, learner.check_finite):
        with pytest.raises(DivergenceError, match=r"^loss_qvalue not finite at step 3"):
            read()


def test_large_weights_are_finite() -> None:
    learner = Learner(make_loss("continuous"))
    poison(learner, "value_network", 3e38)
    learner.check_finite()


def test_a_training_that_nobody_looks_at_stops_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS_BETWEEN_CHECKS", 4)
    learner, batch = Learner(make_loss("continuous")), keywords(make_batch("continuous"))
    for step in range(8):
        if step == 5:
            poison(learner, "value_network")
        with HostReads() as reads, pytest.raises(DivergenceError) if step == 7 else nullcontext():
            learner.step(batch)
        assert reads.names == (["tolist"] if step % 4 == 3 else [])


def test_a_step_calls_nothing_that_waits_for_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below Python, too: a number that becomes a tensor, or one that an operator reads."""
    # As on a GPU: the kernel asserts, where on a CPU the host looks.
    monkeypatch.setattr(loss_module, "_check_values", lambda valid, _, text: torch._assert_async(valid.all(), text))
    learner = Learner(make_loss(kind), actor_schedule_steps=10, max_grad_norm=0.5)
    batch = keywords(make_batch(kind))
    for _ in range(2):
        with recorder.HostReads():
            learner.step(batch)
    assert learner.step_count == 2


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_a_whole_step_runs_without_data(kind: str) -> None:
    spaces = SPACES[kind]
    with torch.device("meta"):
        learner = Learner(build_loss(spaces, IQLConfig(hidden_sizes=(8,))), actor_schedule_steps=10, max_grad_norm=0.5)
    rows = make_dataset(spaces, 8)
    for _ in range(2):
        learner.step(rows.to("meta"))
    assert learner.step_count == 2


def test_what_a_step_draws_depends_on_seed_and_step_alone() -> None:
    dataset = make_dataset(SPACES["continuous"])
    agents = [make_agent("continuous", dataset, actor_dropout=0.5) for _ in range(2)]
    for seed, agent in enumerate(agents):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        agent.fit(dataset, 3)
        assert torch.equal(state, torch.get_rng_state())
    assert same(*map(weights, agents))
    agents[1].learner.seed += 1
    for agent in agents:
        agent.fit(dataset, 1)
    assert not same(*map(weights, agents))


def test_masks_differ_from_step_to_step() -> None:
    agent = make_agent("continuous", actor_dropout=0.5, actor_learning_rate=0.0)
    batch = agent.normalizers(make_dataset(SPACES["continuous"], 8))
    entropies = []
    for _ in range(2):
        agent.learner.step(batch)
        entropies.append(agent.learner.metrics()["entropy"])
    assert entropies[0] != entropies[1]


@pytest.mark.parametrize("make_optimizers", [module.adam, per_group(), per_group(SGD)])
def test_a_resumed_training_is_the_uninterrupted_one(kind: str, make_optimizers: Any) -> None:
    def new() -> Learner:
        torch.manual_seed(0)
        return Learner(make_loss(kind), actor_schedule_steps=8, make_optimizers=make_optimizers)

    batches = [keywords(make_batch(kind)) for _ in range(8)]
    whole, first, second = new(), new(), new()
    for learner, given in ((whole, batches), (first, batches[:5])):
        for batch in given:
            learner.step(batch)
    second.loss.load_state_dict(first.loss.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.step_count == 5
    assert second.learning_rate("actor") == first.learning_rate("actor")
    for batch in batches[5:]:
        second.step(batch)
    assert same(snapshot(whole), snapshot(second))
    assert whole.step_count == second.step_count


def test_rates_that_were_set_are_resumed() -> None:
    first, second = (Learner(make_loss("continuous"), actor_schedule_steps=10) for _ in range(2))
    for name, rate in (("actor", 0.5), ("critic", 0.25)):
        first.set_learning_rate(name, rate)
    first.step(keywords(make_batch("continuous")))
    second.load_state_dict(first.state_dict())
    assert second.base_rates() == pytest.approx({"actor": 0.5, "critic": 0.25, "value": 3e-4})
    second.set_learning_rate("critic", 0.125)
    assert rates(second)["critic"] == 0.125


def other_states() -> dict[str, tuple[Callable[[dict[str, Any]], Any], str]]:
    def change(**entries: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda state: state["optimizers"][0].update(entries)

    return {
        "another optimiser": (change(type="SGD"), "the state is that of SGD, the optimiser is Adam"),
        "more of them": (lambda s: s["optimizers"].append(s["optimizers"][0]), "the state has 2 optimisers"),
        "fewer groups": (lambda s: s["optimizers"][0]["param_groups"].pop(), "the optimiser's groups have"),
        "groups by other names": (
            lambda s: s["optimizers"][0]["param_groups"].reverse(),
            "the optimiser's groups have",
        ),
        "other shapes": (
            lambda s: s["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(2, 2)),
            r"exp_avg of parameter 0 has shape \(2, 2\)",
        ),
        "no step": (lambda s: s.pop("step_count"), "step_count"),
        "another updater": (lambda s: s.update(target_updater={"counter": 1}), "counter"),
    }


@pytest.mark.parametrize("case", other_states())
def test_a_state_that_does_not_fit_changes_nothing(case: str) -> None:
    change, message = other_states()[case]
    learner = Learner(make_loss("continuous"), actor_schedule_steps=10)
    for _ in range(2):
        learner.step(keywords(make_batch("continuous")))
    before = copy.deepcopy(learner.state_dict())
    state = copy.deepcopy(before)
    state |= {"seed": 99, "learning_rates": {"actor": [9.0, 1.0]}}
    change(state)
    with pytest.raises((KeyError, ValueError), match=message):
        learner.load_state_dict(state)
    after = learner.state_dict()
    assert {name: after[name] for name in ("step_count", "seed", "learning_rates")} == {
        name: before[name] for name in ("step_count", "seed", "learning_rates")
    }
    for index, moments in before["optimizers"][0]["state"].items():
        assert same(moments, after["optimizers"][0]["state"][index])


def test_the_state_of_another_device_keeps_how_this_one_computes() -> None:
    first, second = Learner(make_loss("continuous")), Learner(make_loss("continuous"))
    first.step(keywords(make_batch("continuous")))
    state = copy.deepcopy(first.state_dict())
    for group in state["optimizers"][0]["param_groups"]:
        group |= {"capturable": True, "fused": None, "foreach": True}
    own = [group["fused"] for group in second.optimizers[0].param_groups]
    second.load_state_dict(state)
    assert [group["fused"] for group in second.optimizers[0].param_groups] == own
    second.step(keywords(make_batch("continuous")))


def numbers(groups: Groups) -> list[Optimizer]:
    return [Adam(list(groups), fused=True)]


@pytest.mark.parametrize(("writes", "reads"), [(tensor_rates, numbers), (numbers, tensor_rates)])
def test_rates_are_saved_as_numbers_and_loaded_as_the_device_has_them(writes: Any, reads: Any) -> None:
    first, second = (
        Learner(make_loss("continuous"), actor_schedule_steps=10, make_optimizers=make) for make in (writes, reads)
    )
    first.set_learning_rate("critic", 0.25)
    for _ in range(3):
        first.step(keywords(make_batch("continuous")))
    state = copy.deepcopy(first.state_dict())
    assert [type(group["lr"]) for group in state["optimizers"][0]["param_groups"]] == [float] * 3
    before = rates(first)
    # A state of an earlier release has what the optimiser had.
    state["optimizers"][0]["param_groups"][2]["lr"] = torch.tensor(0.125)
    for _ in range(2):
        kinds = [type(group["lr"]) for group in second.optimizers[0].param_groups]
        second.load_state_dict(state)
        assert [type(group["lr"]) for group in second.optimizers[0].param_groups] == kinds
        assert rates(second) == pytest.approx(before | {"value": 0.125})
        second.step(keywords(make_batch("continuous")))
    # The state is as it was, and a tensor of the learner's is nobody else's.
    assert state["optimizers"][0]["param_groups"][2]["lr"] == 0.125
    assert rates(first) == before


def test_optimisers_must_keep_every_group_under_its_name() -> None:
    def unnamed(groups: Groups) -> list[Optimizer]:
        return [Adam([{"params": group["params"]} for group in groups])]

    def twice(groups: Groups) -> list[Optimizer]:
        return [Adam(list(groups)), SGD([groups[0]])]

    for make in (unnamed, twice, lambda groups: [Adam(groups[:2])]):
        with pytest.raises(ValueError, match="make_optimizers must keep every group once and under its name"):
            Learner(make_loss("continuous"), make_optimizers=make)


def test_a_parameter_that_networks_share_is_trained_once() -> None:
    loss = make_loss("discrete")
    shared = loss.actor_network[0].module.layers[0]
    loss.value_network.module.layers[0] = shared
    learner = Learner(loss)
    parameters = [p for o in learner.optimizers for group in o.param_groups for p in group["params"]]
    assert len(parameters) == len({id(parameter) for parameter in parameters})


def test_a_frozen_network_is_left_alone() -> None:
    loss = make_loss("continuous")
    loss.actor_network.requires_grad_(False)
    before = {name: p.clone() for name, p in loss.actor_network.named_parameters()}
    learner = Learner(loss, actor_schedule_steps=10)
    learner.step(keywords(make_batch("continuous")))
    assert same(before, dict(loss.actor_network.named_parameters()))
    assert set(rates(learner)) == {"critic", "value"}


def test_the_configuration_reaches_the_learner() -> None:
    config = IQLConfig(
        n_steps=10,
        actor_learning_rate=0.1,
        critic_learning_rate=0.2,
        value_learning_rate=0.3,
        actor_schedule="cosine",
        polyak=0.5,
        max_grad_norm=2.0,
    )
    learner = Learner.from_config(make_loss("continuous"), config)
    assert rates(learner) == pytest.approx({"actor": 0.1, "critic": 0.2, "value": 0.3})
    assert (learner.target_updater.tau, learner.max_grad_norm, learner.actor_schedule_steps) == (0.5, 2.0, 10)
    constant = Learner.from_config(make_loss("continuous"), config.replace(actor_schedule="constant"))
    assert constant.actor_schedule_steps is None


def test_automatic_compilation_asks_for_a_compiler_and_a_long_training(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(module, "compiler_available", lambda device: True)
    assert resolve_compile("auto", module.LONG_ENOUGH_TO_COMPILE, cpu) == "yes"
    assert resolve_compile("auto", module.LONG_ENOUGH_TO_COMPILE - 1, cpu) == "no"
    monkeypatch.setattr(module, "compiler_available", lambda device: False)
    assert resolve_compile("auto", 10**6, cpu) == "no"
    assert resolve_compile("yes", 1, cpu) == "yes"
