"""What a user sets on an optimiser that an adapter shows counts: in every adapter, for every network, after loading."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import SPACES, make_agent, make_dataset
from requirements import needs_compiler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

pytest.importorskip("d3rlpy")
pytest.importorskip("stable_baselines3")
pytest.importorskip("torchrl")

import iql_d3rlpy
import iql_sb3
import iql_tensor
import iql_torchrl
from iql_plugins.training.learner import NETWORKS
from iql_sb3.spaces import gymnasium_spaces

HORIZON, RATE = 12, 1e-3
with torch.random.fork_rng():
    torch.manual_seed(0)
    DATA = make_dataset(SPACES["continuous"])


class Adapter:
    """An algorithm as its users train it, for the same questions to all of them."""

    def __init__(self, schedule: bool, folder: Path) -> None:
        self.schedule, self.folder = schedule, folder
        self.algorithm = self.make()

    def make(self) -> Any:
        raise NotImplementedError

    def train(self, steps: int) -> None:
        raise NotImplementedError

    def shown(self) -> list[torch.optim.Optimizer]:
        """The optimisers that users see."""
        return list(self.agent().learner.optimizers)

    def agent(self) -> Any:
        return self.algorithm.to_agent()

    def load(self) -> Any:
        return type(self.algorithm).load(self.folder / "saved")

    def reload(self) -> None:
        """Saves it, and goes on with what is loaded."""
        self.algorithm.save(self.folder / "saved")
        self.algorithm = self.load()

    def group(self, network: str) -> dict[str, Any]:
        return next(group for each in self.shown() for group in each.param_groups if group["name"] == network)

    def weights(self) -> dict[str, list[Tensor]]:
        """Copies of the parameters of each network."""
        loss = self.agent().loss
        networks = zip(NETWORKS, (loss.actor_network, loss.qvalue_network, loss.value_network), strict=True)
        return {name: [p.detach().clone() for p in network.parameters()] for name, network in networks}

    def moves(self, steps: int = 1) -> dict[str, list[Tensor]]:
        """How the parameters change in further steps."""
        before = self.weights()
        self.train(steps)
        return {
            name: [new - old for new, old in zip(after, before[name], strict=True)]
            for name, after in self.weights().items()
        }

    def moving(self) -> set[str]:
        return {name for name, moves in self.moves().items() if any(move.any() for move in moves)}


class TensorAdapter(Adapter):
    kind: Any = iql_tensor.IQL
    compile = "no"

    def make(self) -> Any:
        schedule = {"actor_schedule": "cosine" if self.schedule else "constant", "n_steps": HORIZON}
        rates = {f"{network}_learning_rate": RATE for network in NETWORKS}
        return self.kind(make_agent("continuous", compile=self.compile, **schedule, **rates))

    def train(self, steps: int) -> None:
        self.algorithm.fit(DATA, steps)


class CompiledAdapter(TensorAdapter):
    compile = "yes"


class TorchRLAdapter(TensorAdapter):
    kind = iql_torchrl.IQL


class SB3Adapter(Adapter):
    def make(self) -> Any:
        options: dict[str, Any] = {"batch_size": 8, "buffer_size": 100, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
        schedule = {"actor_schedule": "cosine" if self.schedule else "constant", "actor_schedule_steps": HORIZON}
        rate: Any = (lambda left: RATE if left == 1.0 else RATE / 2) if self.schedule else RATE
        observation, action = gymnasium_spaces(SPACES["continuous"])
        return iql_sb3.IQL(
            "MlpPolicy", dataset=DATA, learning_rate=rate, observation_space=observation, action_space=action,
            **options, **schedule,
        )  # fmt: skip

    def train(self, steps: int) -> None:
        self.algorithm.learn_offline(steps, log_interval=None, reset_num_timesteps=False)

    def shown(self) -> list[torch.optim.Optimizer]:
        return [self.algorithm.policy.optimizer]

    def load(self) -> Any:
        return iql_sb3.IQL.load(self.folder / "saved", dataset=DATA)


class D3rlpyAdapter(Adapter):
    factory: Any = None

    def make(self) -> Any:
        from d3rlpy.models import VectorEncoderFactory
        from d3rlpy.optimizers import AdamFactory

        encoders = {f"{name}_encoder_factory": VectorEncoderFactory([8]) for name in NETWORKS}
        factory = self.factory() if self.schedule and self.factory else AdamFactory()
        algorithm = iql_d3rlpy.IQLConfig(
            batch_size=8, actor_optim_factory=factory, critic_optim_factory=factory, actor_learning_rate=RATE,
            critic_learning_rate=RATE, clip_all_actions=True,
            actor_schedule_steps=HORIZON if self.schedule and not self.factory else None,
            **encoders,
        ).create()  # fmt: skip
        torch.manual_seed(0)
        self.buffer = iql_d3rlpy.to_replay_buffer(DATA)
        algorithm.build_with_dataset(self.buffer)
        return algorithm

    def train(self, steps: int) -> None:
        from d3rlpy.logging import NoopAdapterFactory

        self.algorithm.fit(
            self.buffer, n_steps=steps, n_steps_per_epoch=steps, show_progress=False,
            logger_adapter=NoopAdapterFactory(),
        )  # fmt: skip

    def shown(self) -> list[torch.optim.Optimizer]:
        impl = self.algorithm.impl
        return [impl.policy_optim, impl.q_function_optim, *super().shown()]

    def agent(self) -> Any:
        return self.algorithm.impl.agent

    def load(self) -> Any:
        return iql_d3rlpy.load(self.folder / "saved")


def cosine() -> Any:
    from d3rlpy.optimizers import AdamFactory, CosineAnnealingLRFactory

    return AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=HORIZON))


def warm_up() -> Any:
    from d3rlpy.optimizers import AdamWFactory, WarmupSchedulerFactory

    return AdamWFactory(lr_scheduler_factory=WarmupSchedulerFactory(HORIZON))


class CosineAdapter(D3rlpyAdapter):
    factory = staticmethod(cosine)


class WarmUpAdapter(D3rlpyAdapter):
    factory = staticmethod(warm_up)


ADAPTERS = {
    "tensor": TensorAdapter,
    "torchrl": TorchRLAdapter,
    "sb3": SB3Adapter,
    "d3rlpy": D3rlpyAdapter,
    "d3rlpy, cosine": CosineAdapter,
    "d3rlpy, warm-up": WarmUpAdapter,
}


#: A factory without a schedule is d3rlpy's plain one.
CASES = [(name, schedule) for name in ADAPTERS for schedule in (False, True) if schedule or "," not in name]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}{', scheduled' * case[1]}")
def make(request: pytest.FixtureRequest, tmp_path: Path, device: torch.device) -> Iterator[Callable[[], Adapter]]:
    """Makes the same algorithm again and again, a few steps old."""
    name, schedule = request.param
    if device.type != "cpu":
        pytest.skip(
            "on a GPU a rate is a tensor: that one which is written counts is tested once, of the core's learner"
        )

    def made() -> Adapter:
        torch.manual_seed(0)
        np.random.seed(0)
        adapter = ADAPTERS[name](schedule, tmp_path)
        adapter.train(3)
        return adapter

    return made


def both_move(first: Adapter, second: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The first further step of two, parameter by parameter, on the same batch."""
    moves = []
    for adapter in (first, second):
        np.random.seed(1)
        moves.append(adapter.moves())
    for network in NETWORKS:
        for pair in zip(moves[0][network], moves[1][network], strict=True):
            yield network, *pair


@pytest.mark.parametrize("network", NETWORKS)
def test_zero_stops_one_network_until_another_rate_lets_it_go_on(make: Callable[[], Adapter], network: str) -> None:
    adapter = make()
    before = adapter.group(network)["lr"]
    adapter.group(network)["lr"] = 0.0
    assert adapter.moving() == set(NETWORKS) - {network}
    adapter.reload()
    assert adapter.moving() == set(NETWORKS) - {network}
    assert adapter.group(network)["lr"] == 0.0
    adapter.group(network)["lr"] = before
    assert adapter.moving() == set(NETWORKS)


def test_zero_for_every_group_stops_everything(make: Callable[[], Adapter]) -> None:
    adapter = make()
    for optimizer in adapter.shown():
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    assert adapter.moving() == set()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_rate_that_is_written_is_that_of_the_next_step(
    make: Callable[[], Adapter], network: str, loaded: bool
) -> None:
    written, plain = make(), make()
    factor = written.agent().learner.learning_rate(network)
    written.group(network)["lr"] = 20.0 * factor
    if loaded:
        written.reload()
        plain.reload()
    for name, move, other in both_move(written, plain):
        # Adam's steps are in proportion to the rate.
        torch.testing.assert_close(move, other * (20.0 if name == network else 1.0), rtol=1e-3, atol=1e-6)
    # What comes then is in proportion, too.
    rates = [adapter.agent().learner.learning_rate(network) for adapter in (written, plain)]
    assert rates[0] == pytest.approx(20.0 * rates[1])


@pytest.mark.parametrize("network", NETWORKS)
def test_a_rate_that_is_set_by_name_counts_before_the_schedule(make: Callable[[], Adapter], network: str) -> None:
    adapter, other = make(), make()
    learner = adapter.agent().learner
    factor = learner.learning_rate(network) / learner.base_rates()[network]
    learner.set_learning_rate(network, 0.5)
    assert adapter.group(network)["lr"] == learner.learning_rate(network) == pytest.approx(0.5 * factor)
    ratio = learner.learning_rate(network) / other.agent().learner.learning_rate(network)
    for name, move, plain in both_move(adapter, other):
        torch.testing.assert_close(move, plain * (ratio if name == network else 1.0), rtol=1e-3, atol=1e-5)
    learner.set_learning_rate(network, 0.0)
    assert adapter.moving() == set(NETWORKS) - {network}


@pytest.mark.parametrize(("option", "value"), [("weight_decay", 0.5), ("betas", (0.1, 0.2)), ("eps", 1.0)])
@pytest.mark.parametrize("loaded", [False, True])
def test_other_settings_of_a_group_count(make: Callable[[], Adapter], option: str, value: Any, loaded: bool) -> None:
    changed, plain = make(), make()
    changed.group("critic")[option] = value
    if loaded:
        changed.reload()
        plain.reload()
    differ: set[str] = {name for name, move, other in both_move(changed, plain) if not torch.equal(move, other)}
    assert differ == {"critic"}


def test_what_was_written_goes_on_after_loading_as_if_nothing_had_been(make: Callable[[], Adapter]) -> None:
    whole, resumed = make(), make()
    for adapter in (whole, resumed):
        adapter.group("actor")["lr"] = 0.01
        np.random.seed(1)
        adapter.train(2)
        adapter.group("critic")["lr"] = 0.02
    resumed.reload()
    for adapter in (whole, resumed):
        np.random.seed(2)
        adapter.train(3)
    weights = resumed.weights()
    for network, tensors in whole.weights().items():
        assert all(map(torch.equal, tensors, weights[network])), network


@pytest.mark.parametrize("network", NETWORKS)
def test_a_rate_that_is_written_at_the_end_of_a_schedule_is_the_next_trainings_whoever_looked(
    tmp_path: Path, network: str
) -> None:
    rates = []
    for look in ("nobody", "learning_rate", "reload", "learn"):
        adapter = SB3Adapter(False, tmp_path)
        algorithm = adapter.algorithm
        algorithm.actor_schedule = "constant"
        algorithm.learning_rate = lambda left: RATE * left
        algorithm.learn_offline(100, log_interval=None)
        assert adapter.group(network)["lr"] == pytest.approx(RATE / 100)
        adapter.group(network)["lr"] = RATE
        if look == "learning_rate":
            assert adapter.agent().learner.learning_rate(network) == RATE
        elif look == "reload":
            adapter.reload()
        adapter.algorithm.learn_offline(1, log_interval=1 if look == "learn" else None)
        rates.append(adapter.group(network)["lr"])
    assert rates == [RATE] * 4


def test_a_scheduler_of_torch_moves_what_is_shown(make: Callable[[], Adapter]) -> None:
    adapter = make()
    optimizer = adapter.shown()[0]
    LambdaLR(optimizer, lambda _: 0.0)
    assert "actor" not in adapter.moving()


@needs_compiler
@pytest.mark.slow
def test_what_is_written_counts_where_losses_are_compiled(tmp_path: Path) -> None:
    adapter = CompiledAdapter(True, tmp_path)
    adapter.train(2)
    for network in NETWORKS:
        before = adapter.group(network)["lr"]
        before = before.clone() if isinstance(before, Tensor) else before
        adapter.group(network)["lr"] = 0.0
        adapter.group("value")["weight_decay"] = 0.5
        assert adapter.moving() == set(NETWORKS) - {network}
        adapter.group(network)["lr"] = before
        assert adapter.moving() == set(NETWORKS)
