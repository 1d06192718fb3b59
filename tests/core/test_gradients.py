"""Losses and gradients in one call: eager, traced, compiled."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from agents import NETWORKS, OBJECTIVES, SPACES, make_agent, make_dataset
from conftest import ACTIONS, OBSERVATION, keywords, make_batch, make_loss
from requirements import needs_compiler, needs_onednn
from tensordict.nn import TensorDictModule
from torch import nn

from iql_plugins import IQLLoss, _compat
from iql_plugins.config import IQLConfig
from iql_plugins.data.packed import batch_source
from iql_plugins.losses.bootstrap import ValueEstimators
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training import gradients
from iql_plugins.training import learner as learner_module
from iql_plugins.training.agent import Agent, Observer
from iql_plugins.training.gradients import MOST_GRAPHS, LossGradients, compiler_available
from iql_plugins.training.learner import Learner, adam
from iql_plugins.training.multi_seed import fit_together
from iql_plugins.training.products import PRODUCT, critics_apart


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are traced meanwhile, run as they are: what compilers do to them is not our business."""
    traced: list[Any] = []
    # The bare function: the module's own call hides what a check of the graph has to say.
    monkeypatch.setattr(_compat, "compile_graph", lambda graph, *_, **__: traced.append(graph) or graph.forward)
    monkeypatch.setattr(gradients, "compiler_available", lambda device: True)
    return traced


def both(loss: IQLLoss, batch: dict[str, torch.Tensor], compiled: LossGradients) -> None:
    """Asserts that traced and eager losses and gradients are equal, and what they do to buffers."""
    results, before = [], [buffer.clone() for buffer in loss.buffers()]
    for compute in (LossGradients(loss), compiled):
        for buffer, value in zip(loss.buffers(), before, strict=True):
            buffer.copy_(value)
        torch.manual_seed(7)
        outputs = compute(batch)
        grads = [parameter.grad for parameter in loss.parameters()]
        results.append((outputs, grads, [buffer.clone() for buffer in loss.buffers()]))
    (eager, eager_grads, eager_buffers), (traced, traced_grads, traced_buffers) = results
    torch.testing.assert_close(traced_buffers, eager_buffers)
    assert all(not output.requires_grad and output.shape == () for output in traced)
    torch.testing.assert_close(traced, eager)
    for first, second in zip(eager_grads, traced_grads, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)
            assert second.stride() == first.stride()
    assert any(grad is not None and grad.any() for grad in traced_grads)


@pytest.mark.parametrize("objective", ["expectile-awr", *OBJECTIVES])
def test_the_graph_computes_what_autograd_does(kind: str, objective: str, graphs: list[Any]) -> None:
    loss = make_loss(kind, **OBJECTIVES.get(objective, {}))
    compiled = LossGradients(loss, compile=True)
    for _ in range(2):
        both(loss, keywords(make_batch(kind)), compiled)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in SPACES],
        *[("continuous", options) for options in NETWORKS.values()],
        *[(kind, NETWORKS["all"]) for kind in ("discrete", "dict", "image")],
    ],
    ids=str,
)
def test_the_graph_takes_every_kind_of_observation_and_network(
    kind: str, options: dict[str, Any], graphs: list[Any]
) -> None:
    dataset = make_dataset(SPACES[kind])
    agent = make_agent(kind, dataset, actor_dropout=0.5, **options)
    source = batch_source(dataset, agent.normalizers)
    both(agent.loss, source.batch(torch.arange(8)), LossGradients(agent.loss, compile=True))


class Masked(nn.Module):
    """V of which parts are dropped in a way of its own."""

    def __init__(self, drop: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(OBSERVATION, 8), nn.Linear(8, 1), drop

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.first(observation)))


def _partly(features: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(features)
    mask[:, :4].bernoulli_(0.5)
    return features * mask


@pytest.mark.parametrize(
    "drop", [_partly, lambda features: nn.functional.dropout(features.t()).t()], ids=["a view", "transposed"]
)
def test_masks_are_those_of_autograd_wherever_they_are_drawn(
    drop: Callable[[torch.Tensor], torch.Tensor], graphs: list[Any]
) -> None:
    loss = make_loss("continuous", value_network=TensorDictModule(Masked(drop), ["observation"], ["state_value"]))
    both(loss, keywords(make_batch("continuous")), LossGradients(loss, compile=True))
    assert len(graphs) == 1


@needs_onednn
@pytest.mark.parametrize("reason", ["no CPU", "one mask for all critics"])
def test_critics_are_evaluated_together_where_apart_brings_nothing_or_other_draws(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: True)
    loss = make_agent("continuous", hidden_sizes=(64, 64)).loss
    with critics_apart(loss):
        assert loss.deactivate_vmap == (next(loss.parameters()).device.type == "cpu")
    if reason == "no CPU":
        loss = loss.to("meta")
    else:
        loss.set_vmap_randomness("same")
    with critics_apart(loss):
        assert not loss.deactivate_vmap


@needs_onednn
@pytest.mark.parametrize(("mode", "widths"), [(None, (32, 64)), ("default", (64, 128))])
def test_large_products_are_onednns_where_those_are_faster(
    mode: str | None, widths: tuple[int, int], graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sooner where they are called from C++."""
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: True)
    dataset, counts = make_dataset(SPACES["continuous"], rows=128), []
    for width in widths:
        agent = make_agent("continuous", dataset, hidden_sizes=(width, width), batch_size=128, compile="no")
        batch = batch_source(dataset, agent.normalizers).batch(torch.arange(128))
        both(agent.loss, batch, LossGradients(agent.loss, compile=True, mode=mode))
        found = [sizes for sizes in _products(graphs[-1]) if min(sizes) == width]
        counts.append(len(found))
        assert not any(map(_has_short_rows, graphs[-1].graph.nodes))
    # Of the hidden layer: once in V(s), V(s'), the policy, four critics, and twice for each gradient of four.
    assert counts == [0, 15]


def test_a_tensor_that_is_given_twice_is_known_again(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loss, looks = make_loss("continuous"), []
    monkeypatch.setattr(LossGradients, "signature", lambda self, *given: looks.append(given) or 1)
    compiled, batch = LossGradients(loss, compile=True), keywords(make_batch("continuous"))
    for _ in range(2):
        flags = batch["next_done"].clone()
        compiled(batch | {"next_done": flags, "next_terminated": flags})
    assert len(looks) == 1
    compiled(batch | {"next_done": flags, "next_terminated": flags.clone()})
    assert len(looks) == 2


def test_a_copy_made_between_undisturbed_steps_looks_again(graphs: list[Any]) -> None:
    learner, batch = Learner(make_loss("continuous"), compile=True, seed=0), keywords(make_batch("continuous"))
    with learner.undisturbed():
        for _ in range(2):
            learner.step(batch)
        copies = [copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))]
    for copied in copies:
        reference = copy.deepcopy(learner)
        for trained in (copied, reference):
            trained.step(batch)
            trained.loss.expectile = 0.95
            trained.load_state_dict(learner.state_dict())
            for _ in range(2):
                trained.step(batch)
        for name, tensor in reference.loss.state_dict().items():
            assert torch.equal(copied.loss.state_dict()[name], tensor)


def test_another_class_is_another_graph(graphs: list[Any]) -> None:
    class Doubled(IQLLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(2 * output for output in super().forward(*args, **kwargs))

    loss, batch = make_loss("continuous"), keywords(make_batch("continuous"))
    compiled = LossGradients(loss, compile=True)
    before = compiled(batch)
    loss.__class__ = Doubled
    torch.testing.assert_close(compiled(batch), tuple(2 * output for output in before))


@pytest.mark.parametrize("compile", [False, True])
def test_undisturbed_steps_are_the_others(kind: str, compile: bool, graphs: list[Any]) -> None:
    first, second = (Learner(make_loss(kind), compile=compile, actor_schedule_steps=10, seed=0) for _ in range(2))
    second.loss.load_state_dict(copy.deepcopy(first.loss.state_dict()))

    def step(number: int) -> None:
        # Rates, and the shape of a batch, may be other ones.
        batch = keywords(make_batch(kind, (6 if number != 3 else 7,)))
        for learner in (first, second):
            learner.set_learning_rate("critic", 1e-3 * (number + 1))
            learner.step(batch)
        for name, tensor in first.loss.state_dict().items():
            assert torch.equal(second.loss.state_dict()[name], tensor)

    with second.undisturbed():
        for number in range(6):
            step(number)
    for learner in (first, second):
        learner.loss.expectile, learner.target_updater.tau = 0.9, 0.5
        for group in learner.optimizers[0].param_groups:
            group["weight_decay"] = 0.1
    step(6)
    with pytest.raises(KeyError), second.undisturbed():
        second.step({})
    for learner in (first, second):
        learner.loss.expectile = 0.8
    step(7)


def test_undisturbed_steps_go_on_after_one_that_failed(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def each(groups: Any) -> list[Any]:
        return [made for group in groups for made in adam([group])]

    first, second = (Learner(make_loss("continuous"), compile=True, seed=0, make_optimizers=each) for _ in range(2))
    second.loss.load_state_dict(copy.deepcopy(first.loss.state_dict()))
    batch, take = keywords(make_batch("continuous")), learner_module.take_step

    def fails(optimizer: Any, *known: Any) -> Any:
        if optimizer in (first.optimizers[1], second.optimizers[1]):
            raise RuntimeError("no memory")
        return take(optimizer, *known)

    with second.undisturbed():
        for number in range(4):
            monkeypatch.setattr(learner_module, "take_step", fails if number == 2 else take)
            for trained in (first, second):
                with pytest.raises(RuntimeError, match="no memory") if number == 2 else nullcontext():
                    trained.step(batch)
    for name, tensor in first.loss.state_dict().items():
        assert torch.equal(second.loss.state_dict()[name], tensor)


@pytest.mark.parametrize("alone", [False, True])
def test_steps_look_whether_something_has_changed_unless_nothing_can_have(
    alone: bool, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, looks, seen = make_dataset(SPACES["continuous"]), [], list[int]()
    agent = make_agent("continuous", dataset, compile="yes")
    state = LossGradients.state
    monkeypatch.setattr(LossGradients, "state", lambda self: looks.append(self) or state(self))
    agent.fit(dataset, 5, Observer(seen.append) if alone else seen.append)
    assert (seen, len(looks)) == ([1, 2, 3, 4, 5], 1 if alone else 5)
    agent.fit(dataset, 5)
    assert len(looks) == (2 if alone else 6)


def test_what_a_callback_changes_counts_from_the_next_step(graphs: list[Any]) -> None:
    dataset = make_dataset(SPACES["continuous"])
    changed, twice = (make_agent("continuous", dataset, compile="yes") for _ in range(2))

    def change(step: int) -> None:
        if step == 2:
            changed.loss.expectile = 0.9

    changed.fit(dataset, 4, change)
    twice.fit(dataset, 2)
    twice.loss.expectile = 0.9
    twice.fit(dataset, 2)
    for name, tensor in twice.loss.state_dict().items():
        assert torch.equal(changed.loss.state_dict()[name], tensor)


def test_a_setting_that_changes_inside_counts_from_the_next_call(graphs: list[Any]) -> None:
    loss = make_loss("continuous", **OBJECTIVES["sparse-awr"])
    compiled, batch = LossGradients(loss, compile=True), keywords(make_batch("continuous"))
    before = compiled(batch)
    loss.objective_options["alpha"] = 3.0
    assert not torch.equal(compiled(batch)[2], before[2])
    both(loss, batch, compiled)


def test_a_graph_is_called_from_python_where_there_is_no_cpp_for_it(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def compile_graph(graph: Any, *_: Any, native: bool) -> Any:
        tried.append(native)
        if native:
            raise RuntimeError("a function that C++ does not have")
        return graph.forward

    monkeypatch.setattr(_compat, "compile_graph", compile_graph)
    loss = make_loss("continuous")
    both(loss, keywords(make_batch("continuous")), LossGradients(loss, compile=True))
    assert tried == [True, False] if next(loss.parameters()).device.type == "cpu" else [False]


def _products(graph: Any) -> list[tuple[int, int, int]]:
    """Rows, columns, and what is summed over, of oneDNN's."""
    found = [node for node in graph.graph.nodes if node.target is PRODUCT]
    return [(*node.meta["val"].shape, node.args[0].meta["val"].shape[1]) for node in found]


@needs_onednn
def test_gradients_of_few_columns_are_computed_transposed_for_several_seeds_too(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: True)
    dataset = make_dataset(SPACES["continuous"])
    fit_together([make_agent("continuous", dataset, compile="yes") for _ in range(2)], dataset, 1)
    assert any(node.target is torch.ops.aten.bmm.default for node in graphs[-1].graph.nodes)
    assert not any(map(_has_short_rows, graphs[-1].graph.nodes))


@needs_onednn
@pytest.mark.parametrize(("rows", "count"), [(128, 0), (256, 3)])
def test_narrow_products_of_usual_batches_are_onednns_too(
    rows: int, count: int, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: True)
    columns = 6
    spaces = Spaces(Box((2,)), Box((columns,), "float32", (-1.0,) * columns, (1.0,) * columns))
    config = IQLConfig(hidden_sizes=(256, 256), batch_size=rows, compile="no")
    loss = Agent(spaces, config, seed=0).loss
    batch = {
        name: torch.rand(rows, size)
        for name, size in (("observation", 2), ("action", columns), ("next_observation", 2), ("next_reward", 1))
    } | dict.fromkeys(("next_done", "next_terminated"), torch.zeros(rows, 1, dtype=torch.bool))
    both(loss, batch, LossGradients(loss, compile=True))
    # Of the policy's last layer: forward, and both gradients. Critics have two columns more.
    assert sum(columns in sizes for sizes in _products(graphs[-1])) == count


class LowRank(nn.Module):
    """V with a weight that is a product, and is looked at as a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(3, OBSERVATION))
        self.last = nn.Linear(8, 1)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        weight = (self.left.t() @ self.right).view(-1)
        return self.last(nn.functional.linear(observation, (weight / weight.norm()).view(8, -1)).relu())


@needs_onednn
def test_products_that_are_computed_transposed_lie_in_memory_as_torchs(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: True)
    loss = make_loss("continuous", value_network=TensorDictModule(LowRank(), ["observation"], ["state_value"]))
    both(loss, keywords(make_batch("continuous")), LossGradients(loss, compile=True))


def _has_short_rows(node: torch.fx.Node) -> bool:
    """Whether MKL would be faster at the transpose of a product."""
    if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
        return False
    left, right = (operand.meta["val"] for operand in node.args)
    return left.stride(-2) == 1 < left.stride(-1) and right.shape[-1] < left.shape[-2]


class Batched(nn.Module):
    """V by a batched product, whose weight's gradient comes transposed; backward() lays it out, autograd.grad() not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 8, OBSERVATION))
        self.last = nn.Linear(8, 1)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.last(torch.bmm(observation.unsqueeze(0), self.first.transpose(1, 2)).squeeze(0).relu())


def test_gradients_have_the_layout_of_their_parameters(kind: str, graphs: list[Any]) -> None:
    loss = make_loss(kind, value_network=TensorDictModule(Batched(), ["observation"], ["state_value"]))
    both(loss, keywords(make_batch(kind)), LossGradients(loss, compile=True))


def test_a_graph_is_traced_for_each_signature_of_a_batch(kind: str, graphs: list[Any]) -> None:
    loss = make_loss(kind)
    compiled = LossGradients(loss, compile=True)
    batches = [keywords(make_batch(kind, (size,))) for size in (6, 7)]
    batches.append({name: tensor.double() if name == "next_reward" else tensor for name, tensor in batches[0].items()})
    batches.append(batches[0] | {"priority_weight": torch.rand(6)})
    batches.append(batches[0] | {"steps_to_next_obs": torch.full((6, 1), 3)})
    wide = torch.randn(6, 2 * OBSERVATION)
    batches.append(batches[0] | {"observation": wide[:, ::2]})
    for batch in [*batches, *batches]:
        both(loss, batch, compiled)
    assert len(graphs) == len(batches)


@pytest.mark.parametrize(
    ("name", "value"),
    [("expectile", 0.9), ("temperature", 0.5), ("max_weight", 0.1), ("loss_function", "l1"), ("reduction", "sum")],
)
def test_a_hyper_parameter_counts_from_the_next_call(kind: str, graphs: list[Any], name: str, value: Any) -> None:
    loss, batch = make_loss(kind), keywords(make_batch(kind))
    compiled = LossGradients(loss, compile=True)
    before = compiled(batch)
    setattr(loss, name, value)
    both(loss, batch, compiled)
    assert not all(torch.equal(first, second) for first, second in zip(before, compiled(batch), strict=True))


class Scaled(IQLLoss):
    """A loss with settings of its own, of which :class:`LossGradients` knows nothing."""

    factor = 1.0

    def value_loss_of(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor * self.factors["value"] * self.options.factor * self.array[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        actor, qvalue, value, entropy = super().forward(*args, **kwargs)
        return actor, qvalue, self.value_loss_of(value), entropy


def test_a_setting_of_a_subclass_counts_from_the_next_call(graphs: list[Any]) -> None:
    loss = make_loss("continuous")
    loss.__class__ = Scaled
    loss.factors, loss.options, loss.array = {"value": 1.0}, Options(1.0), np.ones(1)
    compiled = LossGradients(loss, compile=True)
    batch = keywords(make_batch("continuous"))
    both(loss, batch, compiled)
    for change in (
        lambda: setattr(loss, "factor", 2.0),
        lambda: loss.factors.update(value=3.0),
        lambda: setattr(loss.options, "factor", 4.0),
        lambda: setattr(loss, "array", np.full(1, 5.0)),
    ):
        change()
        both(loss, batch, compiled)
    assert len(graphs) == 5
    both(loss, batch, compiled)
    assert len(graphs) == 5


@dataclass
class Options:
    """Equal by value, and so not hashable."""

    factor: float


def test_another_discount_or_estimator_counts_from_the_next_call(kind: str, graphs: list[Any]) -> None:
    loss, batch = make_loss(kind), keywords(make_batch(kind))
    compiled = LossGradients(loss, compile=True)
    before = compiled(batch)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.5)
    both(loss, batch, compiled)
    assert compiled(batch)[1] != before[1]


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_count_from_the_next_call(kind: str, assign: bool, graphs: list[Any]) -> None:
    loss, batch = make_loss(kind), keywords(make_batch(kind))
    compiled = LossGradients(loss, compile=True)
    compiled(batch)
    loss.load_state_dict(make_loss(kind).state_dict(), assign=assign)
    both(loss, batch, compiled)
    assert len(graphs) == 1


@pytest.mark.parametrize("part", [lambda loss: loss, lambda loss: loss.actor_network], ids=["all", "the policy"])
def test_evaluation_mode_is_another_graph(part: Callable[[IQLLoss], nn.Module], graphs: list[Any]) -> None:
    loss = make_agent("continuous", actor_dropout=0.5).loss
    batch = batch_source(make_dataset(SPACES["continuous"])).batch(torch.arange(8))
    compiled = LossGradients(loss, compile=True)
    trained, evaluated = compiled(batch), None
    part(loss).eval()
    evaluated = compiled(batch)
    assert len(graphs) == 2
    assert torch.equal(evaluated[3], compiled(batch)[3])
    assert not torch.equal(evaluated[3], trained[3])


def test_autocast_is_another_graph(graphs: list[Any]) -> None:
    loss, batch = make_loss("continuous"), keywords(make_batch("continuous"))
    compiled = LossGradients(loss, compile=True)
    losses = []
    for enabled in (False, True, False):
        with torch.autocast(batch["action"].device.type, torch.bfloat16, enabled=enabled):
            losses.append(torch.stack(compiled(batch)))
            torch.testing.assert_close(losses[-1], torch.stack(LossGradients(loss)(batch)))
    assert len(graphs) == 2
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], losses[1])


def test_inputs_that_are_to_be_checked_are_checked_at_every_call(graphs: list[Any]) -> None:
    loss, batch = make_loss("continuous", check_finite=True), keywords(make_batch("continuous"))
    compiled = LossGradients(loss, compile=True)
    for check in (True, False, True):
        loss.check_finite = check
        both(loss, batch, compiled)
    with pytest.raises(ValueError, match=r"reward'\) is not finite"):
        compiled(batch | {"next_reward": torch.full((6, 1), torch.nan)})


def test_one_tensor_given_twice_and_tensors_at_odd_addresses_are_nothing_special(graphs: list[Any]) -> None:
    loss, batch = make_loss("continuous"), keywords(make_batch("continuous"))
    compiled = LossGradients(loss, compile=True)
    both(loss, batch | {"next_observation": batch["observation"]}, compiled)
    both(loss, batch, compiled)
    odd = {name: torch.cat([tensor.flatten()[:1], tensor.flatten()]) for name, tensor in batch.items()}
    both(loss, {name: odd[name][1:].view_as(tensor) for name, tensor in batch.items()}, compiled)
    assert len(graphs) == 1


def test_frozen_parameters_get_no_gradient_and_the_others_keep_theirs(kind: str, graphs: list[Any]) -> None:
    loss, batch = make_loss(kind), keywords(make_batch(kind))
    compiled = LossGradients(loss, compile=True)
    both(loss, batch, compiled)
    first = next(iter(loss.actor_network.parameters()))
    first.requires_grad_(False)
    both(loss, batch, compiled)
    assert first.grad is None


class Weighed(nn.Module):
    """V of products with factors, one of them over a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.weight = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(OBSERVATION, 4))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        rows = torch.addmm(self.bias, observation, self.weight, beta=2.0, alpha=0.5).tanh()
        matrices = rows.unsqueeze(-1) * rows.unsqueeze(-2)
        return torch.baddbmm(self.bias, matrices, matrices, beta=0.5, alpha=3.0).sum((-2, -1)).unsqueeze(-1)


def test_the_factors_of_a_product_and_of_its_bias_count(graphs: list[Any]) -> None:
    loss = make_loss("continuous", value_network=TensorDictModule(Weighed(), ["observation"], ["state_value"]))
    both(loss, keywords(make_batch("continuous")), LossGradients(loss, compile=True))


class Unused(nn.Module):
    """A critic with a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(OBSERVATION, ACTIONS), nn.Linear(2, 2)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.used(observation)


def test_a_parameter_that_nothing_uses_gets_no_gradient(graphs: list[Any]) -> None:
    critic = TensorDictModule(Unused(), ["observation"], ["state_action_value"])
    loss = make_loss("discrete", qvalue_network=critic, num_qvalue_nets=1)
    both(loss, keywords(make_batch("discrete")), LossGradients(loss, compile=True))
    assert loss.qvalue_network.module.unused.weight.grad is None


class Normalised(nn.Module):
    """V with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(OBSERVATION), nn.Linear(OBSERVATION, 1)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(observation))


def test_tracing_changes_neither_statistics_nor_random_numbers(graphs: list[Any]) -> None:
    states = []
    for compile in (False, True):
        torch.manual_seed(0)
        value = TensorDictModule(Normalised(), ["observation"], ["state_value"])
        loss = make_loss("continuous", value_network=value)
        compute = LossGradients(loss, compile=compile)
        for _ in range(3):
            compute(keywords(make_batch("continuous")))
        states.append(({name: buffer.clone() for name, buffer in loss.named_buffers()}, torch.rand(1)))
    (eager, eager_draw), (traced, traced_draw) = states
    assert any("running_mean" in name for name in eager)
    for name, buffer in eager.items():
        assert torch.allclose(buffer, traced[name], atol=1e-6), name
    assert torch.equal(eager_draw, traced_draw)


@pytest.mark.parametrize("compile", [False, True])
def test_a_batch_that_is_refused_leaves_the_gradients(kind: str, compile: bool, graphs: list[Any]) -> None:
    loss, batch = make_loss(kind), keywords(make_batch(kind))
    compute = LossGradients(loss, compile=compile)
    compute(batch)
    before = [parameter.grad.clone() for parameter in loss.parameters() if parameter.grad is not None]
    with pytest.raises(ValueError, match="must have shape"):
        compute(batch | {"next_reward": torch.zeros(6, 2)})
    with pytest.raises(KeyError, match="terminated"):
        compute({name: tensor for name, tensor in batch.items() if name != "next_terminated"})
    with pytest.raises(TypeError, match="unexpected tensor 'reward'"):
        compute(batch | {"reward": torch.zeros(6, 1)})
    after = [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_discrete_action_out_of_range_is_refused_by_the_graph(graphs: list[Any]) -> None:
    loss, batch = make_loss("discrete"), keywords(make_batch("discrete"))
    compiled = LossGradients(loss, compile=True)
    compiled(batch)
    with pytest.raises(RuntimeError, match="'action' must be from 0 to 3"):
        compiled(batch | {"action": torch.full((6,), ACTIONS)})


def test_a_loss_without_all_of_its_outputs_is_refused(kind: str) -> None:
    for loss in (make_loss(kind, reduction="none"), make_loss(kind).select_out_keys("loss_value")):
        with pytest.raises(ValueError, match=r"must return loss_actor, .* use reduction='mean' or 'sum'"):
            LossGradients(loss)


def test_compiling_without_a_compiler_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "compiler_available", lambda device: False)
    with pytest.raises(RuntimeError, match=r"there is no compiler for .*: install one"):
        LossGradients(make_loss(kind), compile=True)


def test_a_compiler_is_looked_for_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert not compiler_available(torch.device("cpu"))
    assert not compiler_available(torch.device("meta"))


def test_the_number_of_graphs_is_bounded_and_the_results_are_the_same(kind: str, graphs: list[Any]) -> None:
    loss = make_loss(kind)
    compiled = LossGradients(loss, compile=True)
    for size in range(2, MOST_GRAPHS + 5):
        both(loss, keywords(make_batch(kind, (size,))), compiled)
    assert len(graphs) == MOST_GRAPHS


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_makes_graphs_of_its_own(kind: str, graphs: list[Any], copied: Any) -> None:
    batch = keywords(make_batch(kind))
    compiled = LossGradients(make_loss(kind), compile=True)
    expected = compiled(batch)
    other = copied(compiled)
    assert other.loss is not compiled.loss
    before = [parameter.grad for parameter in compiled.loss.parameters()]
    torch.testing.assert_close(other(batch), expected)
    assert len(graphs) == 2
    assert all(first is parameter.grad for first, parameter in zip(before, compiled.loss.parameters(), strict=True))
    both(other.loss, batch, other)


def test_the_time_that_graphs_take_is_counted(kind: str, graphs: list[Any]) -> None:
    compiled = LossGradients(make_loss(kind), compile=True)
    assert compiled.warm_up_seconds == 0.0
    compiled(keywords(make_batch(kind)))
    first = compiled.warm_up_seconds
    assert first > 0.0
    compiled(keywords(make_batch(kind)))
    assert compiled.warm_up_seconds == first


@pytest.mark.parametrize("change", [torch.float64, "strides"])
def test_parameters_of_another_dtype_or_layout_are_another_graph(kind: str, graphs: list[Any], change: Any) -> None:
    loss, batch = make_loss(kind), keywords(make_batch(kind))
    compiled = LossGradients(loss, compile=True)
    compiled(batch)
    if change == "strides":
        for parameter in loss.value_network.parameters():
            parameter.data = parameter.data.t().contiguous().t()
    else:
        loss.to(change)
        batch = {name: tensor.to(change) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    both(loss, batch, compiled)
    assert len(graphs) == 2


def test_an_unknown_mode_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"mode must be one of default, .* got 'fast'"):
        LossGradients(make_loss(kind), mode="fast")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_compiled_products_are_autograds_whatever_their_sizes(kind: str) -> None:
    dataset = make_dataset(SPACES[kind], rows=130)
    agent = make_agent(kind, dataset, hidden_sizes=(70, 300))
    batch = batch_source(dataset, agent.normalizers).batch(torch.arange(130))
    both(agent.loss, batch, LossGradients(agent.loss, compile=True))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("continuous", {}),
        ("discrete", {}),
        ("continuous", OBJECTIVES["gumbel-ddpg_bc"]),
        ("discrete", OBJECTIVES["exponential-ddpg_bc"]),
        ("continuous", OBJECTIVES["sparse-awr"]),
        ("continuous", OBJECTIVES["automatic"]),
        *[(kind, NETWORKS["all"]) for kind in ("continuous", "discrete")],
    ],
    ids=str,
)
def test_a_compiled_training_is_the_eager_one(kind: str, options: dict[str, Any]) -> None:
    dataset = make_dataset(SPACES[kind])
    options = {"n_steps": 100, "max_grad_norm": 0.5, "actor_dropout": 0.2} | options
    agents = [make_agent(kind, dataset, compile=compile, **options) for compile in ("no", "yes")]
    for agent in agents:
        agent.fit(dataset, 50)
        agent.loss.expectile = 0.9
        agent.fit(dataset, 50)
    eager, compiled = (agent.loss.state_dict() for agent in agents)
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-5, rtol=1e-5)
    # What a compiler makes of a check differs, but it is one, and nothing was trained.
    batch = batch_source(dataset, agents[1].normalizers).batch(torch.arange(8))
    invalid: list[dict[str, torch.Tensor]] = [{"next_reward": torch.zeros(8, 2)}]
    if kind == "discrete":
        invalid += [{"action": torch.full((8, 1), action)} for action in (-1, 4)]
    for entry in invalid:
        with pytest.raises((ValueError, RuntimeError), match=r"must have shape|must be from 0 to 3|out of bounds"):
            agents[1].learner.step(batch | entry)
    assert agents[1].learner.step_count == 100
