"""Devices, networks and batches that the tests share."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from iql_plugins import DiscreteIQLLoss, IQLLoss, SoftUpdate, plugins
from iql_plugins.networks import categorical_actor, critic, discrete_critic, gaussian_actor, value_function
from iql_plugins.networks.encoders import ObservationEncoder
from iql_plugins.spaces import Box

OBSERVATION, ACTION, ACTIONS = 5, 3, 4

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core: more threads than that wait for one another. Child processes read the variable.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``pytest tests/stress --stress 50``: the stress tests, fifty times as long as among the other tests."""
    parser.addoption("--stress", type=int, default=1, help="rounds of tests/stress, as a multiple of their default")


@pytest.fixture
def stress(request: pytest.FixtureRequest) -> int:
    """How many times as many rounds as by default."""
    return request.config.getoption("--stress")


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES, autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device that this machine has: every test runs on each of them, which is the default device meanwhile."""
    device = torch.device(request.param)
    if device.type == "cpu":
        yield device
        return
    torch.set_default_device(device)
    yield device
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    """Every test has a plugin host of its own, which sees the plugins that the test installs."""
    yield
    plugins.host.cache_clear()


@pytest.fixture(params=["continuous", "discrete"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two losses."""
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers every time."""
    torch.manual_seed(0)


def make_batch(
    kind: str,
    shape: tuple[int, ...] = (6,),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """A random batch by the key layout; discrete actions are indices of shape ``*B``."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    terminated = torch.rand(*shape, 1, device=device) < 0.2
    action = (
        torch.randint(ACTIONS, shape, device=device)
        if kind == "discrete"
        else torch.rand(*shape, ACTION, **options) * 2 - 1
    )
    return TensorDict(
        {
            "observation": torch.randn(*shape, OBSERVATION, **options),
            "action": action,
            "next": {
                "observation": torch.randn(*shape, OBSERVATION, **options),
                "reward": torch.randn(*shape, 1, **options),
                "done": terminated | (torch.rand(*shape, 1, device=device) < 0.2),
                "terminated": terminated,
            },
        },
        shape,
    )


def keywords(batch: TensorDict) -> dict[str, torch.Tensor]:
    """A batch as keyword tensors."""
    return {key if isinstance(key, str) else "_".join(key): tensor for key, tensor in batch.items(True, True)}


def make_loss(kind: str, *, updater: bool = True, **kwargs: Any) -> IQLLoss:
    """A loss over small networks of the paper, with an updater so that it does not warn."""
    sizes = {"hidden_sizes": (8,)}
    kwargs.setdefault("value_network", value_function(OBSERVATION, **sizes))
    if kind == "discrete":
        kwargs = {"action_space": "categorical"} | kwargs
        loss: IQLLoss = DiscreteIQLLoss(
            kwargs.pop("actor_network", None) or categorical_actor(OBSERVATION, ACTIONS, **sizes),
            kwargs.pop("qvalue_network", None) or discrete_critic(OBSERVATION, ACTIONS, **sizes),
            **kwargs,
        )
    else:
        loss = IQLLoss(
            kwargs.pop("actor_network", None) or gaussian_actor(OBSERVATION, ACTION, **sizes),
            kwargs.pop("qvalue_network", None) or critic(OBSERVATION, ACTION, **sizes),
            **kwargs,
        )
    if updater:
        SoftUpdate(loss, tau=0.005)
    return loss


class Encoder(ObservationEncoder):
    """One layer, and what else is given."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__([Box((OBSERVATION,))])
        self.layers = torch.nn.Sequential(torch.nn.Linear(OBSERVATION, 6), *layers, torch.nn.Tanh())
        self.size = 6

    def forward(self, *observations: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(*observations)
        return features


def dtypes_given(encoder: type[torch.nn.Module], monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of the observations that encoders of a class are called with from here on, in order."""
    given: list[torch.dtype] = []
    forward = encoder.forward

    def encoded(self: torch.nn.Module, observation: torch.Tensor) -> torch.Tensor:
        given.append(observation.dtype)
        features: torch.Tensor = forward(self, observation)
        return features

    monkeypatch.setattr(encoder, "forward", encoded)
    return given


def shared_encoder_loss(kind: str, encoder: ObservationEncoder | None = None, **kwargs: Any) -> IQLLoss:
    """A loss with ``separate_losses`` whose networks share an encoder."""
    encoder = encoder or Encoder()
    options: dict[str, Any] = {"hidden_sizes": (8,), "encoder": encoder}
    size, actions = encoder.size, ACTIONS if kind == "discrete" else ACTION
    make_actor, make_critic = (categorical_actor, discrete_critic) if kind == "discrete" else (gaussian_actor, critic)
    return make_loss(
        kind,
        actor_network=make_actor(size, actions, **options),
        qvalue_network=make_critic(size, actions, **options),
        value_network=value_function(size, **options),
        **{"separate_losses": True, **kwargs},
    )


def total(outputs: TensorDict | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum of the three losses."""
    if isinstance(outputs, tuple):
        return outputs[0] + outputs[1] + outputs[2]
    return outputs["loss_actor"] + outputs["loss_qvalue"] + outputs["loss_value"]


def gradients(
    loss: torch.nn.Module, outputs: Any, reduce: Callable[[Any], torch.Tensor] = total
) -> dict[str, torch.Tensor]:
    """The gradient of the summed losses by parameter name; zeros where none came."""
    named = dict(loss.named_parameters())
    grads = torch.autograd.grad(reduce(outputs), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named.items(), grads, strict=True)
    }
