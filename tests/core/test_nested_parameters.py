"""Networks that hold a TensorDictParams, against the same networks of ordinary modules."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ACTION, OBSERVATION, gradients, keywords, make_batch, total
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictParams,
)
from torch import Tensor, nn

from iql_plugins import HardUpdate, IQLLoss, SoftUpdate
from iql_plugins.losses.targets import TargetUpdater
from iql_plugins.training.gradients import LossGradients

AGENTS = 3


class Agents(nn.Module):
    """A linear layer an agent, of the concatenated inputs: ``[*B, agents, out]``, with an offset that is a buffer."""

    def __init__(self, features: int, outputs: int, *, nested: bool) -> None:
        super().__init__()
        weight, bias = torch.randn(AGENTS, outputs, features), torch.randn(AGENTS, outputs)
        if nested:
            tensors = TensorDict({"head": {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}}, [AGENTS])
            tensors["offset"] = torch.ones(AGENTS, 1)
            self.params = TensorDictParams(tensors, no_convert=True)
        else:
            self.params = nn.Module()
            self.params.register_module("head", nn.Module())
            self.params.head.weight, self.params.head.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.params.register_buffer("offset", torch.ones(AGENTS, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        if isinstance(self.params, TensorDictParams):
            params = self.params
        else:
            params = TensorDict(self.params.state_dict(keep_vars=True)).unflatten_keys(".")
        x = torch.cat(inputs, -1).unsqueeze(-1)
        return (params["head", "weight"] @ x).squeeze(-1) + params["head", "bias"] + params["offset"]


def independent_normal(loc: Tensor, scale: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Independent(torch.distributions.Normal(loc, scale, validate_args=False), 1)


def networks(*, nested: bool, shared: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Actor, critic and V; ``shared``: V reads what the actor's body writes."""
    body = Agents(OBSERVATION, 2 * ACTION, nested=nested)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Sequential(body, NormalParamExtractor()), ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=independent_normal),
    )
    value = nn.Sequential(body, nn.Linear(2 * ACTION, 1)) if shared else Agents(OBSERVATION, 1, nested=nested)
    return (
        actor,
        TensorDictModule(
            Agents(OBSERVATION + ACTION, 1, nested=nested), ["observation", "action"], ["state_action_value"]
        ),
        TensorDictModule(value, ["observation"], ["state_value"]),
    )


def make_pair(critics: int | str, *, shared: bool = False, **kwargs: Any) -> tuple[IQLLoss, IQLLoss]:
    """A loss whose networks hold TensorDictParams, and one of ordinary modules with the same tensors."""
    losses = []
    for nested in (True, False):
        actor, critic, value = networks(nested=nested, shared=shared)
        given = [critic, networks(nested=nested)[1]] if critics == "list" else critic
        count = 2 if critics == "list" else critics
        losses.append(IQLLoss(actor, given, value, num_qvalue_nets=count, **kwargs))
        losses[-1].target_updater_attached()
    first, second = losses
    state = first.state_dict()
    assert list(state) == list(second.state_dict())
    for name, tensor in state.items():
        if name.startswith("target_") and name.endswith("weight"):
            state[name] = tensor + torch.randn_like(tensor)
    for loss in losses:
        loss.load_state_dict(state)
    return first, second


def make_agents_batch() -> TensorDict:
    return make_batch("continuous", (4, AGENTS))


def assert_equal(loss: IQLLoss, expected: IQLLoss) -> None:
    batch = make_agents_batch()
    outputs, of_expected = loss(batch.clone()), expected(batch.clone())
    torch.testing.assert_close(dict(outputs.items()), dict(of_expected.items()))
    torch.testing.assert_close(gradients(loss, outputs), gradients(expected, of_expected))


@pytest.fixture(params=[1, 2, "list"], ids=str)
def critics(request: pytest.FixtureRequest) -> int | str:
    """One critic, one that is duplicated, and two that were given."""
    return request.param


@pytest.mark.parametrize("randomness", ["different", "same"], ids=["loop", "vmap"])
def test_losses_and_gradients_are_those_of_ordinary_modules(critics: int | str, randomness: str) -> None:
    losses = make_pair(critics)
    names = [[name for name, _ in loss.named_parameters()] for loss in losses]
    assert names[0] == names[1]
    assert not any("target" in name for name in names[0])
    for loss in losses:
        loss.set_vmap_randomness(randomness)
    assert_equal(*losses)


@pytest.mark.parametrize("separate_losses", [False, True])
def test_a_body_that_networks_share_is_trained_as_an_ordinary_one(separate_losses: bool, critics: int | str) -> None:
    assert_equal(*make_pair(critics, shared=True, separate_losses=separate_losses))


def test_every_critic_of_a_list_keeps_its_weights() -> None:
    actor, first, value = networks(nested=True)
    second = networks(nested=True)[1]
    expected = [copy.deepcopy(critic) for critic in (first, second)]
    loss, batch = IQLLoss(actor, [first, second], value), make_agents_batch()
    values = [critic(batch.clone())["state_action_value"].squeeze(-1) for critic in expected]
    torch.testing.assert_close(loss.qvalues(batch), torch.stack(values).detach())


def test_the_networks_that_were_passed_are_trained_in_place() -> None:
    actor, critic, value = networks(nested=True)
    before = [*actor.parameters(), *value.parameters(), *critic.parameters()]
    loss = IQLLoss(actor, critic, value, num_qvalue_nets=1)
    assert all(own is parameter for own, parameter in zip(loss.parameters(), before, strict=True))
    with torch.no_grad():
        critic.module.params["head", "weight"].zero_()
        critic.module.params["head", "bias"].zero_()
    assert (loss.qvalues(make_agents_batch()) == 1.0).all()


def test_duplicates_of_a_critic_differ() -> None:
    weights = make_pair(3)[0].qvalue_network_params["module", "params", "head", "weight"]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 3


UPDATERS: dict[str, Callable[[IQLLoss], TargetUpdater]] = {
    "soft": lambda loss: SoftUpdate(loss, tau=1.0),
    "hard": lambda loss: HardUpdate(loss, value_network_update_interval=1),
}


@pytest.mark.parametrize("updater", UPDATERS)
def test_targets_are_not_trained_and_follow_an_updater(critics: int | str, updater: str) -> None:
    loss, _ = make_pair(critics)
    targets = loss.target_qvalue_network_params
    assert not any(tensor.requires_grad for tensor in targets.values(True, True))
    before = targets["module", "params", "head", "weight"].clone()
    total(loss(make_agents_batch())).backward()
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert torch.equal(targets["module", "params", "head", "weight"], before)
    UPDATERS[updater](loss).step()
    torch.testing.assert_close(targets.data.to_dict(), loss.qvalue_network_params.data.to_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["copy", "pickle"])
def test_a_copy_has_the_losses_of_the_original_and_tensors_of_its_own(critics: int | str, how: Any) -> None:
    loss, expected = make_pair(critics)
    copied = how(loss)
    assert_equal(copied, expected)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.add_(1.0)
    assert_equal(loss, expected)


@pytest.mark.slow
def test_a_compiled_step_trains_as_an_ordinary_one(critics: int | str) -> None:
    loss, expected = make_pair(critics)
    batch = keywords(make_agents_batch())
    outputs = [LossGradients(each, compile=each is loss)(batch) for each in (loss, expected)]
    torch.testing.assert_close(*outputs)
    for parameter, other in zip(loss.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_a_cast_and_a_load_reach_what_the_network_computes_with(critics: int | str) -> None:
    loss, expected = (each.double() for each in make_pair(critics))
    state = {name: torch.randn_like(tensor) for name, tensor in expected.state_dict().items()}
    loss.load_state_dict(state)
    expected.load_state_dict(state)
    batch = make_batch("continuous", (4, AGENTS), dtype=torch.float64)
    torch.testing.assert_close(dict(loss(batch.clone()).items()), dict(expected(batch).items()))


def test_tensordicts_to_module_swaps_tensors_and_puts_them_back() -> None:
    loss, batch = make_pair(1)[0], make_agents_batch()
    before = dict(loss.named_parameters())
    with (loss.value_network_params.data * 0).to_module(loss.value_network):
        assert not loss.value_network(batch.clone())["state_value"].any()
    assert loss.value_network(batch.clone())["state_value"].any()
    assert all(parameter is before[name] for name, parameter in loss.named_parameters())


def test_an_entry_that_would_be_replaced_for_the_network_alone_is_refused() -> None:
    loss, _ = make_pair(1)
    params = loss.qvalue_network.module.params
    before = params["head", "bias"]
    with pytest.raises(RuntimeError, match="can be changed in place, not replaced"):
        params["head", "bias"] = torch.zeros(AGENTS, 1)
    assert params["head", "bias"] is before
