"""Shortcuts past the general way: critics evaluated layer by layer, networks called past their wrappers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ACTION, ACTIONS, OBSERVATION, gradients, make_batch, make_loss
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn

from iql_plugins import IQLLoss
from iql_plugins.networks import MLP, critic, value_function
from iql_plugins.networks.builders import Dropout
from iql_plugins.networks.ensemble import CriticEnsemble

ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Identity)


def mlp(**options: Any) -> nn.Module:
    return MLP(OBSERVATION + ACTION, 1, (8,), **options)


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(OBSERVATION, 8), *layers, nn.Linear(8, ACTIONS, bias=False))


class Own(nn.Module):
    """A critic with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(OBSERVATION + ACTION, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.linear(torch.cat([observation, action], -1))

    def other(self, observation: Tensor, action: Tensor) -> Tensor:
        return 100.0 + self.forward(observation, action)


def loss_of(body: nn.Module, count: int = 3, **options: Any) -> IQLLoss:
    """A loss over critics with this body: discrete for one that reads the observation alone."""
    kind = "discrete" if isinstance(body, nn.Sequential) else "continuous"
    in_keys = ["observation"] if kind == "discrete" else ["observation", "action"]
    network = TensorDictModule(body, in_keys, ["state_action_value"], **options)
    return make_loss(kind, qvalue_network=network, num_qvalue_nets=count)


def assert_equal_to_the_loop(loss: IQLLoss, shape: tuple[int, ...] = (6,)) -> None:
    batch = make_batch("discrete" if hasattr(loss, "action_space") else "continuous", shape)
    stacked = loss(batch.clone())
    stacked_gradients = gradients(loss, stacked)
    loss.deactivate_vmap = True
    looped = loss(batch.clone())
    torch.testing.assert_close(stacked, looped)
    torch.testing.assert_close(stacked_gradients, gradients(loss, looped))


def repeated(layer: nn.Module, between: nn.Module) -> nn.Module:
    return sequential(layer, between, layer)


PERCEPTRONS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "nested": lambda: sequential(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Tanh()),
    **{kind.__name__: lambda kind=kind: sequential(kind()) for kind in ELEMENTWISE},
    "mlp with layer norm": lambda: mlp(layer_norm=True, activation=nn.GELU, initialization="torch"),
    "layer norm": lambda: sequential(nn.LayerNorm(8)),
    "layer norm without weights": lambda: sequential(nn.LayerNorm(8, elementwise_affine=False, eps=0.1)),
    "layer norm without bias": lambda: sequential(nn.LayerNorm(8, bias=False)),
    "an activation twice": lambda: repeated(nn.Tanh(), nn.Linear(8, 8)),
    "a layer without bias": lambda: sequential(nn.Linear(8, 8, bias=False)),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a forward of its own": Own,
    "layer norm of more": lambda: nn.Sequential(nn.LayerNorm((6, OBSERVATION)), nn.Linear(OBSERVATION, ACTIONS)),
    "softmax": lambda: sequential(nn.Softmax(dim=0)),
    "a layer twice": lambda: repeated(nn.Linear(8, 8), nn.Tanh()),
    "computed bias": lambda: sequential(
        nn.utils.parametrize.register_parametrization(nn.Linear(8, 8), "bias", nn.Softplus())
    ),
    "computed weight": lambda: sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
}


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1,)])
@pytest.mark.parametrize("name", PERCEPTRONS)
def test_a_perceptron_has_the_numbers_of_the_loop(name: str, shape: tuple[int, ...]) -> None:
    loss = loss_of(PERCEPTRONS[name]())
    assert loss._ensemble is not None
    # Weights of a normalisation begin alike in all critics.
    with torch.no_grad():
        for parameter in loss.qvalue_network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert_equal_to_the_loop(loss, shape)


@pytest.mark.parametrize("vmap", [False, True])
def test_a_layer_that_comes_twice_is_one_layer(vmap: bool) -> None:
    loss = loss_of(repeated(nn.Linear(8, 8), nn.Tanh()))
    # As on a GPU, where critics are evaluated together.
    loss.set_vmap_randomness("same" if vmap else "different")
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    batch = make_batch("discrete", (6,))
    values = loss.qvalues(batch.clone())
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())
    critic = repeated(nn.Linear(8, 8), nn.Tanh())
    for index, found in enumerate(values):
        stacked = loss.qvalue_network.state_dict()
        critic.load_state_dict({name.removeprefix("module."): tensor[index] for name, tensor in stacked.items()})
        expected = critic(batch["observation"]).gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_perceptron_takes_the_general_way(name: str) -> None:
    loss = loss_of(OTHERS[name]())
    assert loss._ensemble is None
    assert_equal_to_the_loop(loss)


def test_wrappers_that_do_more_than_pass_tensors_on_take_the_general_way() -> None:
    assert loss_of(Own(), method="other")(make_batch("continuous"))["loss_qvalue"] > 100
    first = TensorDictModule(nn.Linear(OBSERVATION, 4), ["observation"], ["features"])
    second = TensorDictModule(MLP(4 + ACTION, 1), ["features", "action"], ["state_action_value"])
    for network in (
        TensorDictSequential(first, second),
        TensorDictModule(mlp(), {"observation": "observation", "action": "action"}, ["state_action_value"]),
        TensorDictModule(mlp(), ["observation", "action"], ["state_action_value"], method="forward"),
    ):
        assert CriticEnsemble.read(network) is None


@pytest.mark.parametrize("shared", [nn.Linear(OBSERVATION, 8), nn.LayerNorm(8)], ids=["linear", "layer norm"])
def test_critics_that_share_a_layer_are_stacked_in_the_others(shared: nn.Module) -> None:
    def body() -> nn.Module:
        if isinstance(shared, nn.Linear):
            return nn.Sequential(shared, nn.ReLU(), nn.Linear(8, ACTIONS))
        return nn.Sequential(nn.Linear(OBSERVATION, 8), shared, nn.Linear(8, ACTIONS))

    bodies = [body() for _ in range(3)]
    networks = [TensorDictModule(body, ["observation"], ["state_action_value"]) for body in bodies]
    loss = make_loss("discrete", qvalue_network=networks, num_qvalue_nets=3)
    assert loss._ensemble is not None
    assert_equal_to_the_loop(loss)


@pytest.mark.parametrize("dropout", [nn.Dropout, Dropout])
@pytest.mark.parametrize("before", [False, True])
def test_dropout_draws_for_each_critic_and_follows_the_mode(before: bool, dropout: type[nn.Dropout]) -> None:
    layers = [dropout(0.5), nn.Linear(OBSERVATION, ACTIONS)] if before else [sequential(dropout(0.5))]
    body = nn.Sequential(*layers)
    loss = loss_of(body, count=2)
    assert loss._ensemble is not None
    with torch.no_grad():
        for weight in loss.qvalue_network_params.values(True, True):
            weight[1] = weight[0]
    batch = make_batch("discrete", (32,))
    first, second = loss.qvalue_loss(batch)[1]["td_error"]
    assert not torch.equal(first, second)
    loss.eval()
    first, second = loss.qvalue_loss(batch)[1]["td_error"]
    assert torch.equal(first, second)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_of_a_critic_run(hook: str) -> None:
    loss, calls = loss_of(mlp()), []
    getattr(loss.qvalue_network.module.layers[2], hook)(lambda *_: calls.append(1))
    loss(make_batch("continuous"))["loss_qvalue"].backward()
    assert len(calls) == 3


def test_the_papers_critics_are_perceptrons(kind: str) -> None:
    assert make_loss(kind)._ensemble is not None
    assert make_loss(kind, num_qvalue_nets=1)._ensemble is None
    assert CriticEnsemble.read(critic(3, 1)) is not None


class Dictionary(nn.Module):
    """V that returns its output by name, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(OBSERVATION), nn.Linear(OBSERVATION, 1)

    def forward(self, observation: Tensor) -> dict[str, Tensor]:
        return {"state_value": self.linear(self.norm(observation))}


def test_a_network_that_returns_a_dictionary_is_evaluated_once() -> None:
    value = TensorDictModule(Dictionary(), ["observation"], ["state_value"])
    loss = make_loss("continuous", value_network=value)
    loss(make_batch("continuous"))
    assert value.module.norm.num_batches_tracked == 2  # at s and at s'


def test_a_network_that_returns_too_few_tensors_is_named() -> None:
    value = TensorDictModule(nn.Linear(OBSERVATION, 1), ["observation"], ["state_value", "spread"])
    with pytest.raises(RuntimeError, match=r"value_network failed on .*returned 1 tensors for the out_keys"):
        make_loss("continuous", value_network=value)(make_batch("continuous"))


class Masked(torch.distributions.Categorical):
    """A policy that knows which actions are allowed."""

    def __init__(self, logits: Tensor, mask: Tensor) -> None:
        super().__init__(logits=logits.masked_fill(~mask, -1e8))


def test_a_distribution_may_read_the_batch_itself() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(OBSERVATION, ACTIONS)

        def forward(self, observation: Tensor, mask: Tensor) -> Tensor:
            return self.linear(observation)

    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(Body(), ["observation", "mask"], ["logits"]),
        ProbabilisticTensorDictModule(["logits", "mask"], ["action"], distribution_class=Masked),
    )
    batch = make_batch("discrete")
    batch["mask"] = torch.ones(6, ACTIONS, dtype=torch.bool)
    batch["mask"][:, -1] = False
    batch["action"].clamp_(max=ACTIONS - 2)
    loss = make_loss("discrete", actor_network=actor, value_network=value_function(OBSERVATION))
    loss(batch)
    expected = actor.get_dist(batch.clone()).log_prob(batch["action"])
    torch.testing.assert_close(batch["_log_prob"], expected.detach())
    assert isinstance(actor.get_dist(TensorDict(batch)), Masked)
