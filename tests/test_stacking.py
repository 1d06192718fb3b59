"""Critics evaluated by their perceptron's steps: the same numbers as one critic after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ACTION, OBSERVATION, gradients, make_batch, make_loss
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from iql_plugins import IQLLoss
from iql_plugins.networks import critic
from iql_plugins.stacking import Perceptron

WIDTH = OBSERVATION + ACTION


class Critic(nn.Module):
    """Q(s, a) with a body of choice."""

    def __init__(self, body: nn.Module, join: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.body = body
        self.join = join

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        join = self.join or (lambda *inputs: torch.cat(inputs, -1))
        return self.body(join(observation, action))


class LateAction(nn.Module):
    """The action comes in behind the first layer, as in DDPG."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(OBSERVATION, 8), nn.Linear(8 + ACTION, 1, bias=False)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.second(torch.cat([F.relu(self.first(observation)), action], dim=-1))


class Residual(nn.Module):
    """No perceptron: it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.linear(torch.cat([observation, action], -1)) + observation[..., :1]


class Moody(nn.Module):
    """No perceptron: it is another function when it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        layer = self.linear if self.training else self.other
        return layer(torch.cat([observation, action], -1))


def sequential(*layers: nn.Module) -> nn.Module:
    return Critic(nn.Sequential(nn.Linear(WIDTH, 8), *layers, nn.Linear(8, 1)))


PERCEPTRONS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Critic(nn.Linear(WIDTH, 1)),
    "late action": LateAction,
    "no bias": lambda: Critic(nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.Tanh(), nn.Linear(8, 1))),
    **{
        activation.__name__: lambda activation=activation: sequential(activation())
        for activation in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh)
    },
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: sequential(nn.LayerNorm(8)),
    "softmax": lambda: sequential(nn.Softmax(dim=0)),
    "residual": Residual,
    "moody": Moody,
    "another dimension": lambda: Critic(nn.Linear(WIDTH, 1), lambda *inputs: torch.cat([x.mT for x in inputs], -2).mT),
}


def loss_of(body: nn.Module, **options: Any) -> IQLLoss:
    network = TensorDictModule(body, ["observation", "action"], ["state_action_value"])
    return make_loss("continuous", qvalue_network=network, num_qvalue_nets=3, **options)


def assert_equal_to_the_loop(loss: IQLLoss, shape: tuple[int, ...]) -> None:
    batch = make_batch("continuous", shape)
    stacked = loss(batch.clone())
    stacked_gradients = gradients(loss, stacked)
    loss.deactivate_vmap = True
    looped = loss(batch.clone())
    torch.testing.assert_close(stacked, looped)
    torch.testing.assert_close(stacked_gradients, gradients(loss, looped))
    loss.deactivate_vmap = False


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1,)])
@pytest.mark.parametrize("name", PERCEPTRONS)
def test_a_perceptron_has_the_numbers_of_the_loop(name: str, shape: tuple[int, ...]) -> None:
    loss = loss_of(PERCEPTRONS[name]())
    assert loss._perceptron is not None
    assert_equal_to_the_loop(loss, shape)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_perceptron_takes_the_general_way(name: str) -> None:
    loss = loss_of(OTHERS[name]())
    assert loss._perceptron is None
    assert_equal_to_the_loop(loss, (6,))


def test_a_sequence_of_modules_takes_the_general_way() -> None:
    first = TensorDictModule(nn.Linear(OBSERVATION, 4), ["observation"], ["features"])
    second = TensorDictModule(Critic(nn.Linear(4 + ACTION, 1)), ["features", "action"], ["state_action_value"])
    assert Perceptron.read(TensorDictSequential(first, second)) is None
    assert Perceptron.read(TensorDictModule(lambda x: x, ["observation"], ["state_action_value"])) is None


def test_critics_that_share_a_layer_are_stacked_in_the_others() -> None:
    trunk = nn.Linear(WIDTH, 8)
    networks = [
        TensorDictModule(
            Critic(nn.Sequential(trunk, nn.ReLU(), nn.Linear(8, 1))), ["observation", "action"], ["state_action_value"]
        )
        for _ in range(3)
    ]
    loss = make_loss("continuous", qvalue_network=networks, num_qvalue_nets=3)
    assert loss._perceptron is not None
    assert_equal_to_the_loop(loss, (6,))


def test_dropout_follows_the_mode_of_the_loss() -> None:
    loss, batch = loss_of(sequential(nn.Dropout(0.5))), make_batch("continuous")
    assert loss._perceptron is not None
    assert not torch.equal(loss(batch)["loss_qvalue"], loss(batch)["loss_qvalue"])
    loss.eval()
    assert torch.equal(loss(batch)["loss_qvalue"], loss(batch)["loss_qvalue"])


def test_hooks_of_a_critic_run() -> None:
    loss = loss_of(sequential(nn.ReLU()))
    calls = []
    loss.qvalue_network.module.body[0].register_forward_hook(lambda *_: calls.append(1))
    loss(make_batch("continuous"))
    assert len(calls) == 3


def test_the_papers_critics_are_perceptrons() -> None:
    assert make_loss("continuous")._perceptron is not None
    assert make_loss("discrete")._perceptron is not None
    assert Perceptron.read(critic(3, 1)) is not None
