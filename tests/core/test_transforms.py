"""Losses under torch.compile, torch.func, the meta device and half precision, and without a host sync."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agents import NETWORKS
from conftest import (
    ACTION,
    ACTIONS,
    OBSERVATION,
    gradients,
    keywords,
    make_batch,
    make_loss,
    shared_encoder_loss,
    total,
)
from tensordict import TensorDict
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from iql_plugins import IQLLoss, SoftUpdate
from iql_plugins.config import IQLConfig
from iql_plugins.networks import categorical_actor, critic, discrete_critic, gaussian_actor, value_function
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import build_loss

HIDDEN = {"hidden_sizes": (8,)}
ESTIMATORS = ["TD0", "TD1", "TDLambda"]


def shared_trunk_loss(kind: str, **kwargs: Any) -> IQLLoss:
    """A loss whose actor and V share their first layer, with ``separate_losses``."""
    value = value_function(OBSERVATION, **HIDDEN)
    if kind == "discrete":
        actor = categorical_actor(OBSERVATION, ACTIONS, **HIDDEN)
        value.module.layers[0] = actor.module[0].module.layers[0]
    else:
        actor = gaussian_actor(OBSERVATION, ACTION, **HIDDEN)
        value.module.layers[0] = actor.module[0].module.body.layers[0]
    return make_loss(kind, actor_network=actor, value_network=value, separate_losses=True, **kwargs)


def tied_loss(kind: str) -> IQLLoss:
    """A loss whose critics are one and the same."""
    make = discrete_critic if kind == "discrete" else critic
    qvalue = make(OBSERVATION, ACTIONS if kind == "discrete" else ACTION, **HIDDEN)
    return make_loss(kind, qvalue_network=[qvalue, qvalue])


def climbing_loss(kind: str) -> IQLLoss:
    """A loss of which both objectives take something of the whole batch."""
    return make_loss(kind, value_objective="gumbel", policy_extraction="ddpg_bc")


def automatic_loss(kind: str) -> IQLLoss:
    """A loss with a temperature that moves, and of whose advantages the critics' disagreement is taken off."""
    return make_loss(kind, temperature="auto", objective_options={"noise_threshold": 0.5})


#: Of which a loss takes something of the whole batch.
OF_THE_BATCH = {"gumbel_ddpg_bc", "exponential"}
VARIANTS: dict[str, Callable[[str], IQLLoss]] = {
    "one_critic": lambda kind: make_loss(kind, num_qvalue_nets=1),
    "two_critics": make_loss,
    "tied": tied_loss,
    "shared_trunk": shared_trunk_loss,
    "shared_encoder": shared_encoder_loss,
    # With a large α no action is so bad that it does not count.
    "sparse": lambda kind: make_loss(kind, value_objective="sparse", objective_options={"alpha": 100.0}),
    "exponential": lambda kind: make_loss(kind, value_objective="exponential"),
    "gumbel_ddpg_bc": climbing_loss,
}


@pytest.fixture(params=VARIANTS)
def loss(request: pytest.FixtureRequest, kind: str, device: torch.device) -> IQLLoss:
    """Each variant of both losses, with weights and biases that are not zero."""
    loss = VARIANTS[request.param](kind).to(device)
    with torch.no_grad():
        for tensor in loss.state_dict().values():
            tensor.normal_()
    return loss


def masked_and_weighted(batch: TensorDict) -> TensorDict:
    """A batch with a mask and importance weights."""
    mask = torch.ones(*batch.shape, 1, dtype=torch.bool)
    mask[0, -1] = False
    batch["collector", "mask"] = mask.to(batch["observation"].device)
    batch["priority_weight"] = torch.rand(batch.shape).to(batch["observation"].device)
    return batch


# torch.compile


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "make", "backend", "estimator", "as_keywords", "masked", "randomness"),
    [
        ("continuous", make_loss, "inductor", "TD0", False, False, "different"),
        ("discrete", make_loss, "aot_eager", "TDLambda", True, True, "different"),
        # Any other randomness vectorises over critics on a CPU, too.
        ("continuous", shared_trunk_loss, "aot_eager", "TDLambda", True, False, "same"),
        ("discrete", shared_trunk_loss, "aot_eager", "TD0", False, True, "same"),
        ("continuous", climbing_loss, "aot_eager", "TD0", False, True, "same"),
        ("discrete", climbing_loss, "aot_eager", "TD0", True, True, "different"),
        ("continuous", automatic_loss, "aot_eager", "TD0", False, True, "different"),
        ("continuous", shared_encoder_loss, "aot_eager", "TD0", True, False, "different"),
        ("discrete", shared_encoder_loss, "aot_eager", "TD0", False, True, "same"),
    ],
    ids=[
        "inductor",
        "masked_keywords",
        "separate_losses_vmap",
        "masked_separate_losses_vmap",
        "masked_climbing_vmap",
        "masked_climbing_keywords",
        "masked_automatic",
        "shared_encoder_keywords",
        "masked_shared_encoder_vmap",
    ],
)
@pytest.mark.slow
def test_a_compiled_loss_has_no_graph_break_and_equals_the_eager_one(
    kind: str,
    make: Callable[[str], IQLLoss],
    backend: str,
    estimator: str,
    as_keywords: bool,
    masked: bool,
    randomness: str,
    device: torch.device,
) -> None:
    torch._dynamo.reset()
    loss = make(kind).to(device)
    loss.make_value_estimator(estimator, **({"time_dim": 1} if estimator == "TDLambda" else {}))
    loss.vmap_randomness = randomness
    batch = make_batch(kind, (2, 3), device)
    if masked:
        batch = masked_and_weighted(batch)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    eager, graph = batch.copy(), batch.copy()
    before, moved, results = {name: buffer.clone() for name, buffer in loss.named_buffers()}, [], []
    for call, given in ((loss, eager), (compiled, graph)):
        loss.load_state_dict(before, strict=False)
        results.append(call(**keywords(given)) if as_keywords else call(given))
        moved.append({name: buffer.clone() for name, buffer in loss.named_buffers()})
    expected, outputs = results
    torch.testing.assert_close(*moved)
    of_graph, of_eager = (
        outs if as_keywords else dict(outs.items()) | {key: given[key] for key in ("td_error", "_log_prob")}
        for outs, given in ((outputs, graph), (expected, eager))
    )
    torch.testing.assert_close(of_graph, of_eager)
    torch.testing.assert_close(gradients(loss, outputs), gradients(loss, expected))


# torch.func


def test_functional_call_with_the_losss_own_parameters_equals_a_call(loss: IQLLoss, kind: str) -> None:
    batch = keywords(make_batch(kind, device=next(loss.parameters()).device))
    outputs = functional_call(loss, dict(loss.named_parameters()), kwargs=batch)
    torch.testing.assert_close(outputs, loss(**batch))


def test_functional_call_computes_the_losses_at_the_parameters_passed(loss: IQLLoss, kind: str) -> None:
    batch = keywords(make_batch(kind, device=next(loss.parameters()).device))
    own = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
    own = {name: tensor for name, tensor in own.items() if not name.startswith("_value_estimator")}
    before = torch.stack(loss(**batch))
    for name, tensor in own.items():
        original, passed = tensor.detach().clone(), torch.randn_like(tensor)
        outputs = torch.stack(functional_call(loss, {name: passed}, kwargs=batch))
        with torch.no_grad():
            tensor.copy_(passed)
            expected = torch.stack(loss(**batch))
            tensor.copy_(original)
        torch.testing.assert_close(outputs, expected)
        assert not torch.allclose(outputs, before, rtol=1e-4), name


def test_functional_call_takes_a_tensordict(loss: IQLLoss, kind: str) -> None:
    batch = make_batch(kind, device=next(loss.parameters()).device)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in loss.named_parameters()}
    outputs = functional_call(loss, zeros, (batch.copy(),))
    expected = functional_call(loss, zeros, kwargs=keywords(batch))
    torch.testing.assert_close(tuple(outputs[key] for key in loss.out_keys), expected)
    assert not torch.allclose(outputs["loss_value"], loss(batch)["loss_value"])


def test_functional_call_changes_nothing_in_the_loss(loss: IQLLoss, kind: str) -> None:
    batch = keywords(make_batch(kind, device=next(loss.parameters()).device))
    loss(**batch)
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    functional_call(loss, {name: torch.zeros_like(p) for name, p in loss.named_parameters()}, kwargs=batch)
    torch.testing.assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)


def test_the_gradient_of_functional_call_equals_autograds(loss: IQLLoss, kind: str) -> None:
    batch = keywords(make_batch(kind, device=next(loss.parameters()).device))

    def of_parameters(parameters: dict[str, Tensor]) -> Tensor:
        return total(functional_call(loss, parameters, kwargs=batch))

    at = {name: parameter.detach() for name, parameter in loss.named_parameters()}
    grads = torch.func.grad(of_parameters)(at)
    torch.testing.assert_close(grads, gradients(loss, loss(**batch)))


def test_the_gradient_of_functional_call_is_that_at_the_parameters_passed(loss: IQLLoss, kind: str) -> None:
    batch = keywords(make_batch(kind, device=next(loss.parameters()).device))
    at = {name: torch.randn_like(parameter) for name, parameter in loss.named_parameters()}
    grads = torch.func.grad(lambda parameters: total(functional_call(loss, parameters, kwargs=batch)))(at)
    with torch.no_grad():
        for name, parameter in loss.named_parameters():
            parameter.copy_(at[name])
    torch.testing.assert_close(grads, gradients(loss, loss(**batch)))


@pytest.mark.parametrize("loss", sorted(VARIANTS.keys() - OF_THE_BATCH), indirect=True)
def test_gradients_of_each_sample_average_to_the_batchs(loss: IQLLoss, kind: str) -> None:
    batch = keywords(make_batch(kind, (5,), next(loss.parameters()).device))
    at = {name: parameter.detach() for name, parameter in loss.named_parameters()}

    def of_sample(parameters: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
        rows = {name: tensor.unsqueeze(0) for name, tensor in sample.items()}
        return total(functional_call(loss, parameters, kwargs=rows))

    per_sample = torch.vmap(torch.func.grad(of_sample), in_dims=(None, 0))(at, batch)
    assert all(grad.shape == (5, *at[name].shape) for name, grad in per_sample.items())
    average = {name: grad.mean(0) for name, grad in per_sample.items()}
    torch.testing.assert_close(average, gradients(loss, loss(**batch)))


def test_an_ensemble_of_losses_is_evaluated_by_vmap_over_parameters(loss: IQLLoss, kind: str) -> None:
    batch = keywords(make_batch(kind, device=next(loss.parameters()).device))
    members = [{name: torch.randn_like(p) for name, p in loss.named_parameters()} for _ in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    together = torch.vmap(lambda parameters: functional_call(loss, parameters, kwargs=batch))(stacked)
    separate = [functional_call(loss, member, kwargs=batch) for member in members]
    torch.testing.assert_close(together, tuple(map(torch.stack, zip(*separate, strict=True))))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_transform_moves_an_automatic_temperature_that_it_is_given(transform: str, device: torch.device) -> None:
    """Each member of an ensemble its own; without it nothing is trained silently."""
    loss, batch = automatic_loss("continuous").to(device), keywords(make_batch("continuous", device=device))
    eager = copy.deepcopy(loss)
    eager(**batch)
    own = {name: parameter.detach() for name, parameter in loss.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    if transform == "vmap":
        own, buffers = ({name: torch.stack([t, t]) for name, t in tensors.items()} for tensors in (own, buffers))
    apply = torch.func.grad if transform == "grad" else torch.vmap

    def of(*tensors: dict[str, Tensor]) -> Tensor:
        return total(functional_call(loss, tensors, kwargs=batch))

    apply(of)(own, buffers)
    moved = buffers["automatic_temperature.log_value"]
    torch.testing.assert_close(moved, eager.automatic_temperature.log_value.expand_as(moved))
    assert moved.all()
    with pytest.raises(RuntimeError, match=r"temperature='auto' moves a buffer, .* must be given"):
        apply(of)(own)
    assert loss.automatic_temperature.log_value == 0.0


# The meta device


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("variant", [*VARIANTS, "automatic"])
def test_a_loss_is_built_and_runs_on_the_meta_device(kind: str, variant: str, estimator: str) -> None:
    with torch.device("meta"):
        loss = (VARIANTS | {"automatic": automatic_loss})[variant](kind)
        loss.make_value_estimator(estimator)
        updater = SoftUpdate(loss, tau=0.005)
        batch = make_batch(kind, (2, 3), "meta")
        outputs = loss(batch)
        total(outputs).backward()
        updater.step()
    assert all(tensor.is_meta and tensor.shape == () for tensor in outputs.values())
    assert batch["td_error"].shape == batch["_log_prob"].shape == (2, 3)
    assert all(p.grad is not None and p.grad.is_meta and p.grad.shape == p.shape for p in loss.parameters())


def test_a_loss_built_on_the_meta_device_takes_weights_when_it_is_materialised(kind: str, device: torch.device) -> None:
    with torch.device("meta"):
        loss = make_loss(kind)
    other = make_loss(kind).to(device)
    loss.to_empty(device=device).load_state_dict(other.state_dict())
    batch = make_batch(kind, device=device)
    losses = [
        {key: out[key] for key in ("loss_actor", "loss_value")} for out in (loss(batch.copy()), other(batch.copy()))
    ]
    torch.testing.assert_close(*losses)


# Host syncs


class HostReads(TorchDispatchMode):
    """Collects the operators whose result depends on a tensor's values on the host."""

    READS = (
        "aten._local_scalar_dense",
        "aten.is_nonzero",
        "aten.item",
        "aten.equal",
        "aten.nonzero",
        "aten.masked_select",
        "aten.unique",
        "aten._unique",
        "aten.repeat_interleave.Tensor",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith(self.READS):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def step_of(loss: IQLLoss, batch: TensorDict) -> list[str]:
    """A gradient step and a target update; returns what it read on the host."""
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    updater = SoftUpdate(loss, tau=0.005)
    with HostReads() as reads:
        total(loss(batch)).backward()
        optimizer.step()
        updater.step()
    return reads.found


def test_the_search_for_host_reads_finds_one() -> None:
    with HostReads() as reads:
        _ = bool(torch.ones(1).all())
        torch.ones(2).nonzero()
    assert len(reads.found) == 2


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "mask_weight"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("on", ["meta", "cpu"])
@pytest.mark.parametrize("make", [make_loss, climbing_loss, automatic_loss])
def test_a_step_reads_nothing_on_the_host_but_checks_discrete_actions(
    kind: str, make: Callable[[str], IQLLoss], on: str, estimator: str, rich: bool
) -> None:
    loss = make(kind).to(on)
    loss.make_value_estimator(estimator)
    batch = make_batch(kind, (2, 3), on)
    if rich:
        batch = masked_and_weighted(batch)
    checks = ["aten._local_scalar_dense.default"] if kind == "discrete" and on == "cpu" else []
    assert step_of(loss, batch) == checks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the waits for a GPU, and there is none")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("make", [make_loss, climbing_loss, automatic_loss])
def test_a_step_on_a_gpu_does_not_synchronise(kind: str, make: Callable[[str], IQLLoss], estimator: str) -> None:
    loss = make(kind).to("cuda")
    loss.make_value_estimator(estimator)
    batches = [masked_and_weighted(make_batch(kind, (2, 3), "cuda")) for _ in range(2)]
    step_of(loss, batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert step_of(loss, batches[1]) == []
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Half precision and extreme values


def boundary_batch(device: torch.device, dtype: torch.dtype) -> TensorDict:
    """Actions at, and slightly outside, the bounds."""
    batch = make_batch("continuous", (6,), device, dtype)
    rows = torch.tensor([1.0, -1.0, 1.001, -1.001, 1.01, -1.01], device=device, dtype=dtype)
    batch["action"] = rows.unsqueeze(-1).expand(6, ACTION).clone()
    return batch


@pytest.mark.parametrize("squashed", [True, False], ids=["tanh_normal", "tanh_mean_normal"])
@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16", "float16"])
def test_actions_at_and_outside_the_bounds_give_finite_losses_and_gradients(
    squashed: bool, how: str, device: torch.device
) -> None:
    actor = gaussian_actor(OBSERVATION, ACTION, squashed=squashed, **HIDDEN)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(how, torch.float32)
    loss = make_loss("continuous", actor_network=actor).to(device, dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=how == "autocast"):
        outputs = loss(boundary_batch(device, dtype))
    assert all(tensor.isfinite() for tensor in outputs.values())
    assert all(grad.isfinite().all() for grad in gradients(loss, outputs).values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("make", [make_loss, climbing_loss, automatic_loss])
def test_losses_in_half_precision_are_near_those_in_full(
    kind: str, make: Callable[[str], IQLLoss], how: str, estimator: str, device: torch.device
) -> None:
    loss = make(kind).to(device)
    loss.make_value_estimator(estimator)
    batch = make_batch(kind, (8, 4), device)
    expected = loss(batch.copy())
    if how == "bfloat16":
        loss = loss.to(torch.bfloat16)
        batch = batch.apply(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    with torch.autocast(device.type, torch.bfloat16, enabled=how == "autocast"):
        outputs = loss(batch)
    assert all(tensor.dtype == torch.float32 for tensor in outputs.values())
    torch.testing.assert_close(dict(outputs.items()), dict(expected.items()), rtol=0.05, atol=0.05)
    assert all(grad.isfinite().all() for grad in gradients(loss, outputs).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e30, -1e30])
def test_huge_advantages_and_rewards_leave_the_actors_loss_and_gradient_finite(
    kind: str, size: float, dtype: torch.dtype, device: torch.device
) -> None:
    loss = make_loss(kind, temperature=10.0).to(device, dtype)
    batch = make_batch(kind, device=device, dtype=dtype)
    batch["next", "reward"] = torch.full_like(batch["next", "reward"], size)
    with torch.no_grad():
        for name, tensor in loss.get_stateful_net("target_qvalue_network", copy=False).named_buffers():
            if name.endswith("layers.2.bias"):
                tensor.fill_(size)
    outputs = loss(batch)
    weight = 100.0 if size > 0 else 0.0
    torch.testing.assert_close(outputs["loss_actor"], weight * -batch["_log_prob"].mean())
    grads = torch.autograd.grad(outputs["loss_actor"], list(loss.actor_network.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.count_nonzero() for grad in grads) == (size > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_advantage_is_clipped_like_any_other(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    loss = make_loss(kind, temperature=3.0).to(device, dtype)
    with torch.no_grad():
        for name, tensor in loss.get_stateful_net("target_qvalue_network", copy=False).named_buffers():
            if name.endswith("layers.2.bias"):
                tensor.fill_(float("inf"))
    batch = make_batch(kind, device=device, dtype=dtype)
    outputs = loss(batch)
    torch.testing.assert_close(outputs["loss_actor"], -100.0 * batch["_log_prob"].mean())
    grads = torch.autograd.grad(outputs["loss_actor"], list(loss.actor_network.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", [{}, NETWORKS["all"]], ids=["default", "all"])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_a_compiled_loss_takes_batches_of_every_size_without_a_graph_break(
    kind: str, options: dict[str, Any], dynamic: bool | None, device: torch.device
) -> None:
    """The last batch of an epoch is short."""
    torch._dynamo.reset()
    config = IQLConfig(hidden_sizes=(8,), **options)
    action = Discrete(ACTIONS) if kind == "discrete" else Box((ACTION,))
    loss = build_loss(Spaces(Box((OBSERVATION,)), action), config).to(device)
    loss.target_updater_attached()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="eager")
    for size in (8, 5, 3):
        batch = make_batch(kind, (size,), device)
        results = []
        for call in (compiled, loss):
            torch.manual_seed(0)
            results.append(dict(call(batch.copy()).items()))
        torch.testing.assert_close(*results)
