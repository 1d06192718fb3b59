"""Agents trained together: each ends where it would have come to on its own."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import NETWORKS, OBJECTIVES, SPACES, make_dataset
from requirements import needs_compiler, needs_onednn
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from iql_plugins import _compat
from iql_plugins.config import IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.networks import critic, gaussian_actor
from iql_plugins.training import multi_seed as population
from iql_plugins.training.agent import Agent, assemble_loss
from iql_plugins.training.distributed import Processes
from iql_plugins.training.learner import DivergenceError, Learner
from iql_plugins.training.multi_seed import fit_together

STEPS = 20
DROPOUT = {"actor_dropout": 0.2, "value_dropout": 0.5}
VECTORS = ["continuous", "discrete", "dict"]


def make(kind: str, seed: int, **hyperparameters: Any) -> Agent:
    spaces, dataset = SPACES[kind], make_dataset(SPACES[kind])
    options = {"n_steps": 2 * STEPS, "batch_size": 8, "hidden_sizes": (8, 8), "compile": "no"} | hyperparameters
    config = IQLConfig(normalize_observations=kind != "image", **options)
    normalizers = Normalizers.fit(dataset, spaces, config)
    return Agent(spaces, config, normalizers=normalizers, seed=seed, device=torch.empty(0).device)


@pytest.fixture
def alike(kind: str) -> Callable[..., list[Agent]]:
    """Makes agents of three seeds, always the same ones; the data are drawn as often as there are agents."""

    def agents(count: int = 3, **hyperparameters: Any) -> list[Agent]:
        made = []
        for seed in range(count):
            torch.manual_seed(0)
            made.append(make(kind, seed, **hyperparameters))
        return made

    return agents


def dataset_of(kind: str) -> Any:
    torch.manual_seed(0)
    return make_dataset(SPACES[kind])


def assert_equal(agent: Agent, alone: Agent, tolerance: float = 1e-5) -> None:
    """All that a checkpoint holds, random state and step included, and what was measured since the last look."""
    (document, tensors), (expected_document, expected) = agent.state(), alone.state()
    assert document == expected_document
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, atol=tolerance, rtol=tolerance, msg=name)
    assert agent.learner.metrics() == pytest.approx(alone.learner.metrics(), rel=1e-4, abs=1e-4)
    assert agent.learner.last_losses is not None
    torch.testing.assert_close(agent.learner.last_losses, alone.learner.last_losses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in VECTORS],
        *[(kind, {"max_grad_norm": 0.1, "n_critics": 3, "polyak": 0.3}) for kind in VECTORS],
        *[("continuous", options) for options in OBJECTIVES.values()],
        *[("discrete", OBJECTIVES[name]) for name in ("exponential-ddpg_bc", "automatic")],
        *[("continuous", options) for options in NETWORKS.values()],
        *[(kind, NETWORKS["all"] | DROPOUT) for kind in VECTORS],
    ],
    ids=str,
)
def test_each_agent_ends_where_it_would_have_alone(
    kind: str, options: dict[str, Any], alike: Callable[..., list[Agent]]
) -> None:
    dataset = dataset_of(kind)
    together, alone = alike(**options), alike(**options)
    for agent in alone:
        agent.fit(dataset, STEPS)
    fit_together(together, dataset, STEPS)
    for agent, other in zip(together, alone, strict=True):
        assert_equal(agent, other)
    before = {name: tensor.clone() for name, tensor in together[0].state()[1].items()}
    assert any(not torch.equal(tensor, together[1].state()[1][name]) for name, tensor in before.items())


@needs_onednn
@pytest.mark.parametrize("kind", ["continuous"])
def test_wide_agents_end_where_each_would_have_alone_by_onednn(
    kind: str, alike: Callable[..., list[Agent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: True)
    dataset, wide = dataset_of(kind), {"hidden_sizes": (128, 128), "batch_size": 128}
    together, alone = alike(2, **wide), alike(2, **wide)
    fit_together(together, dataset, 3)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 3)
        assert_equal(agent, other)


@pytest.mark.parametrize("kind", ["image"])
def test_images_are_trained_together_to_the_precision_of_their_gradients(
    kind: str, alike: Callable[..., list[Agent]]
) -> None:
    dataset = dataset_of(kind)
    together, alone = alike(2), alike(2)
    for agent in alone:
        agent.fit(dataset, 1)
    fit_together(together, dataset, 1)
    for agent, other in zip(together, alone, strict=True):
        assert agent.learner.last_losses is not None
        torch.testing.assert_close(agent.learner.last_losses, other.learner.last_losses)


def test_together_alone_and_together_again_is_one_training(kind: str, alike: Callable[..., list[Agent]]) -> None:
    dataset = dataset_of(kind)
    together, alone = alike(), alike()
    fit_together(together, dataset, 5)
    for agent in together:
        agent.fit(dataset, 5)
    fit_together(together, dataset, 10)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 20)
        assert_equal(agent, other)


def test_on_the_way_agents_act_measure_and_are_saved(
    kind: str, alike: Callable[..., list[Agent]], tmp_path: Path
) -> None:
    dataset = dataset_of(kind)
    together, alone = alike(2), alike(2)
    seen: list[tuple[int, Any, dict[str, float]]] = []
    expected: list[tuple[int, Any, dict[str, float]]] = []
    rates: list[list[float]] = []

    def look(agent: Agent, notes: list[Any], path: Path | None) -> Callable[[int], None]:
        def callback(step: int) -> None:
            if step in (3, 7):
                notes.append((step, agent.act(torch.zeros(3)), agent.learner.metrics()))
            if step == 7 and path is not None:
                agent.save(path)
            if step == 9:
                (optimizer,) = agent.learner.state_dict()["optimizers"]
                rates.append([group["lr"] for group in optimizer["param_groups"]])

        return callback

    looks = [look(together[0], seen, None), look(together[1], [], tmp_path / "middle.safetensors")]
    fit_together(together, dataset, 10, lambda step: [each(step) for each in looks])
    alone[0].fit(dataset, 10, look(alone[0], expected, None))
    for (step, action, metrics), (other_step, other_action, other_metrics) in zip(seen, expected, strict=True):
        assert step == other_step
        torch.testing.assert_close(action, other_action, atol=1e-5, rtol=1e-5)
        assert metrics == pytest.approx(other_metrics, rel=1e-4, abs=1e-4)
    assert rates[0] == rates[1] == pytest.approx(rates[2])
    # The last three steps are still to be told.
    assert together[0].learner.metrics().keys() == metrics.keys()
    resumed = Agent.load(tmp_path / "middle.safetensors", device=together[1].device)
    resumed.fit(dataset, 3)
    alone[1].fit(dataset, 10)
    (document, tensors), (expected_document, expected_tensors) = resumed.state(), alone[1].state()
    assert document == expected_document
    for name, tensor in expected_tensors.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_agents_are_on_their_own_again_whatever_happens(kind: str, alike: Callable[..., list[Agent]]) -> None:
    together, alone = alike(), alike()
    dataset = dataset_of(kind)

    def interrupt(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_together(together, dataset, 10, interrupt)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 5)
        assert_equal(agent, other)
        assert not agent.learner.stacked
        for tensor in agent.state()[1].values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    storages = [tensor.data_ptr() for agent in together for tensor in agent.loss.parameters()]
    assert len(set(storages)) == len(storages)


def _rates(agent: Agent) -> None:
    agent.learner.set_learning_rate("actor", 0.1)
    agent.learner.set_learning_rate("critic", 0.2)


def _horizon(agent: Agent) -> None:
    agent.learner.actor_schedule_steps = 3


def _norm(agent: Agent) -> None:
    agent.learner.max_grad_norm = 1e-3


def _polyak(agent: Agent) -> None:
    agent.learner.target_updater.tau = 1.0


@pytest.mark.parametrize("kind", ["continuous"])
@pytest.mark.parametrize("change", [_rates, _horizon, _norm, _polyak])
def test_what_is_set_meanwhile_counts_from_the_next_call(
    kind: str, change: Callable[[Agent], None], alike: Callable[..., list[Agent]]
) -> None:
    dataset = dataset_of(kind)
    together, alone = alike(2), alike(2)

    def callback(step: int) -> None:
        if step == 2:
            for agent in together:
                change(agent)
        if step == 4:
            together[0].learner.metrics()

    fit_together(together, dataset, 5, callback)
    fit_together(together, dataset, 5)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 5)
        change(other)
        other.fit(dataset, 5)
        (document, tensors), (expected_document, expected) = agent.state(), other.state()
        assert document == expected_document
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["continuous"])
def test_weights_that_are_loaded_meanwhile_count_from_the_next_step(
    kind: str, alike: Callable[..., list[Agent]]
) -> None:
    dataset = dataset_of(kind)
    together, alone = alike(2), alike(2)
    weights = {name: tensor.clone() for name, tensor in together[0].loss.state_dict().items()}
    fit_together(together, dataset, 6, lambda step: step == 3 and together[1].loss.load_state_dict(weights))
    alone[1].fit(dataset, 6, lambda step: step == 3 and alone[1].loss.load_state_dict(weights))
    assert_equal(together[1], alone[1])


def _trained_beside(agent: Agent, dataset: Any) -> None:
    agent.fit(dataset, 1)


def _loaded(agent: Agent, dataset: Any) -> None:
    state = agent.learner.state_dict()
    agent.learner.load_state_dict(state | {"step_count": 0})


def _loaded_at_the_same_step(agent: Agent, dataset: Any) -> None:
    (optimizer,) = agent.learner.optimizers
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _moved(agent: Agent, dataset: Any) -> None:
    for parameter in agent.loss.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("kind", ["continuous"])
@pytest.mark.parametrize("interfere", [_trained_beside, _loaded, _loaded_at_the_same_step, _moved])
@pytest.mark.parametrize("when", [2, 4])
def test_agents_that_something_else_changes_meanwhile_are_noticed(
    kind: str, interfere: Callable[[Agent, Any], None], when: int, alike: Callable[..., list[Agent]]
) -> None:
    agents, dataset = alike(2), dataset_of(kind)
    with pytest.raises(RuntimeError, match="agent 1 was trained, moved, or given another state while"):
        fit_together(agents, dataset, 4, lambda step: interfere(agents[1], dataset) if step == when else None)
    for agent in agents:
        agent.fit(dataset, 1)


@pytest.mark.parametrize("kind", ["continuous"])
def test_agents_that_are_being_trained_together_are_refused(kind: str, alike: Callable[..., list[Agent]]) -> None:
    agents, dataset = alike(2), dataset_of(kind)

    def nested(step: int) -> None:
        with pytest.raises(ValueError, match="is being trained together with others already"):
            fit_together(agents, dataset, 1)

    fit_together(agents, dataset, 1, nested)
    assert [agent.learner.step_count for agent in agents] == [1, 1]


def test_agents_that_share_networks_are_refused() -> None:
    value = nn.Linear(3, 1)
    agents = [custom(seed, lambda: value) for seed in range(2)]
    with pytest.raises(ValueError, match="must not share parameters or buffers with each other"):
        fit_together(agents, dataset_of("continuous"), 1)


@pytest.mark.parametrize("kind", ["continuous"])
def test_agents_share_the_time_for_the_graph(kind: str, alike: Callable[..., list[Agent]]) -> None:
    agents = alike(3)
    begin = time.perf_counter()
    fit_together(agents, dataset_of(kind), 0)
    elapsed = time.perf_counter() - begin
    shares = [agent.learner.warm_up_seconds for agent in agents]
    assert min(shares) > 0.0
    assert sum(shares) < elapsed


def test_one_agent_is_trained_as_ever(kind: str, alike: Callable[..., list[Agent]]) -> None:
    (agent,), (other,) = alike(1), alike(1)
    dataset = dataset_of(kind)
    fit_together([agent], dataset, 3)
    other.fit(dataset, 3)
    assert_equal(agent, other, tolerance=0.0)


def _frozen(agent: Agent) -> None:
    next(iter(agent.loss.actor_network.parameters())).requires_grad_(False)


def _slower(agent: Agent) -> None:
    agent.learner.set_learning_rate("critic", 1e-5)


def _evaluated(agent: Agent) -> None:
    agent.loss.eval()


def _sharper(agent: Agent) -> None:
    agent.loss.expectile = 0.9


def _further(agent: Agent) -> None:
    agent.learner.step_count += 1


def _other_horizon(agent: Agent) -> None:
    agent.learner.actor_schedule_steps = 5


def _doubled(agent: Agent) -> None:
    agent.loss.to(torch.float64)


def _stepped(agent: Agent) -> None:
    batch = agent.transitions(dataset_of("discrete" if agent.spaces.discrete else "continuous")).batch(torch.arange(8))
    agent.learner.step(batch)
    agent.learner.step_count = 0


def _summed(agent: Agent) -> None:
    agent.loss.reduction = "sum"


def _unweighted(agent: Agent) -> None:
    agent.loss.use_prioritized_weights = False


def _other_betas(agent: Agent) -> None:
    agent.learner.optimizers[0].param_groups[0]["betas"] = (0.5, 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_frozen, "frozen parameters of agent 2"),
        (_slower, "config of agent 2"),
        (_evaluated, "the loss of agent 2"),
        (_sharper, "config of agent 2"),
        (_other_horizon, "the actor's schedule of agent 2"),
        (_doubled, "the tensors of agent 2"),
        (_stepped, "the optimiser's steps of agent 2"),
        (_summed, "the settings of the loss of agent 2"),
        (_unweighted, "the settings of the loss of agent 2"),
        (_further, "the number of steps of agent 2"),
        (_other_betas, "the optimiser of agent 2"),
    ],
)
def test_agents_that_differ_in_more_than_their_seeds_are_refused(
    kind: str, change: Callable[[Agent], None], message: str, alike: Callable[..., list[Agent]]
) -> None:
    agents = alike()
    change(agents[2])
    states = [{name: tensor.clone() for name, tensor in agent.loss.state_dict().items()} for agent in agents]
    with pytest.raises(ValueError, match=f"must differ in their seeds alone: {message} is not that of the first"):
        fit_together(agents, dataset_of(kind), 3)
    for agent, state in zip(agents, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in agent.loss.state_dict().items())


def test_other_statistics_or_sizes_are_refused(kind: str, alike: Callable[..., list[Agent]]) -> None:
    first, second = alike(2)
    wide = make(kind, 1, hidden_sizes=(16, 8))
    with pytest.raises(ValueError, match=r"config of agent 1"):
        fit_together([first, wide], dataset_of(kind), 3)
    name = next(name for name, _ in second.normalizers.named_buffers() if "mean" in name)
    second.normalizers.get_buffer(name).add_(1.0)
    with pytest.raises(ValueError, match=r"(normalizers|statistics) of agent 1"):
        fit_together([first, second], dataset_of(kind), 3)


def test_what_cannot_be_stacked_is_refused(kind: str, alike: Callable[..., list[Agent]]) -> None:
    dataset = dataset_of(kind)
    (agent,) = alike(1)
    with pytest.raises(ValueError, match="there is no agent"):
        fit_together([], dataset, 1)
    with pytest.raises(ValueError, match="every agent must be there once"):
        fit_together([agent, agent], dataset, 1)
    others = alike(2)
    others[1].loss.check_finite = True
    with pytest.raises(ValueError, match="check_finite reads every batch on the host"):
        fit_together(others, dataset, 1)
    others = alike(2)
    for other in others:
        other.learner.processes = Processes(0, 2)
    with pytest.raises(ValueError, match="several processes"):
        fit_together(others, dataset, 1)
    others = alike(2)
    for other in others:
        other.learner.optimizers = [torch.optim.SGD(other.loss.parameters(), lr=0.1)]
    with pytest.raises(ValueError, match="must have one Adam each, got SGD"):
        fit_together(others, dataset, 1)


class Noisy(nn.Module):
    """V that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, observation: Tensor) -> Tensor:
        return self.linear(observation + torch.randn_like(observation))


def custom(
    seed: int, make_value: Callable[[], nn.Module], qvalue: Callable[[], nn.Module] | None = None, n_critics: int = 1
) -> Agent:
    torch.manual_seed(seed)
    value = make_value()
    config = IQLConfig(n_steps=10, batch_size=8, n_critics=2 if qvalue is None else n_critics, compile="no")
    network = TensorDictModule(value, ["observation"], ["state_value"])
    q = critic(3, 2, hidden_sizes=(4,)) if qvalue is None else qvalue()
    loss = assemble_loss(config, gaussian_actor(3, 2, hidden_sizes=(4,)), q, network, discrete=False)
    return Agent(SPACES["continuous"], config, loss=loss, seed=seed)


def test_networks_of_your_own_that_draw_are_refused_before_anything_is_trained() -> None:
    agents = [custom(seed, Noisy) for seed in range(2)]
    with pytest.raises(ValueError, match=r"the networks cannot be stacked: .*random"):
        fit_together(agents, dataset_of("continuous"), 3)
    assert all(agent.learner.step_count == 0 for agent in agents)
    assert torch.equal(agents[0].generator.get_state(), custom(0, Noisy).generator.get_state())
    for agent in agents:
        agent.fit(dataset_of("continuous"), 1)


def dropping_critic() -> nn.Module:
    """Q with torch's own dropout, of which each of several critics has masks of its own."""
    layers = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    return TensorDictModule(Joined(layers), ["observation", "action"], ["state_action_value"])


class Joined(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.layers(torch.cat([observation, action], -1))


@pytest.mark.parametrize("count", [1, 3])
def test_critics_that_drop_units_are_stacked_and_go_on_alone(count: int) -> None:
    dataset = dataset_of("continuous")

    def agents() -> list[Agent]:
        return [custom(seed, lambda: nn.Linear(3, 1), dropping_critic, count) for seed in range(2)]

    together, alone = agents(), agents()
    fit_together(together, dataset, 3)
    for agent, other in zip(together, alone, strict=True):
        agent.fit(dataset, 2)
        other.fit(dataset, 5)
    fit_together(together, dataset, 2)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 2)
        assert_equal(agent, other)


def test_networks_of_your_own_are_stacked() -> None:
    together, alone = ([custom(seed, lambda: nn.Linear(3, 1)) for seed in range(2)] for _ in range(2))
    dataset = dataset_of("continuous")
    fit_together(together, dataset, 5)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 5)
        torch.testing.assert_close(agent.loss.state_dict(), other.loss.state_dict(), atol=1e-5, rtol=1e-5)


class Tracking(nn.Module):
    """A critic with running statistics, which its target copies."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        q = self.linear(torch.cat([observation, action], -1))
        # Its target's own would be another one.
        self.mean.mul_(0.9).add_(0.1 * q.detach().mean(0))
        return q - self.mean


def test_running_statistics_are_the_agents_own_and_copied_to_their_targets() -> None:
    def agents() -> list[Agent]:
        def qvalue() -> nn.Module:
            return TensorDictModule(Tracking(), ["observation", "action"], ["state_action_value"])

        return [custom(seed, lambda: nn.Linear(3, 1), qvalue) for seed in range(2)]

    together, alone, dataset = agents(), agents(), dataset_of("continuous")
    fit_together(together, dataset, 5)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 5)
        torch.testing.assert_close(agent.loss.state_dict(), other.loss.state_dict(), atol=1e-5, rtol=1e-5)
    means = [buffer for agent in together for name, buffer in agent.loss.named_buffers() if name.endswith("mean")]
    assert not torch.equal(means[0], means[-1])
    assert all(mean.any() for mean in means)


def test_a_discrete_action_out_of_range_is_refused() -> None:
    agents = [make("discrete", seed) for seed in range(2)]
    stacked = population._Population(agents)
    batch = agents[0].transitions(dataset_of("discrete")).batch(torch.arange(16))
    batch = {name: rows.unflatten(0, (2, 8)) for name, rows in batch.items()}
    stacked.prepare(batch)
    stacked.step(batch)
    action = batch["action"].clone()
    action[1, 3] = 4
    with pytest.raises(RuntimeError, match="'action' must be from 0 to 3"):
        stacked.step(batch | {"action": action})


def test_a_frozen_network_stays_as_it_is(kind: str, alike: Callable[..., list[Agent]]) -> None:
    dataset = dataset_of(kind)
    made: list[list[Agent]] = []
    for _ in range(2):
        agents = alike(2)
        for index, agent in enumerate(agents):
            agent.loss.value_network.requires_grad_(False)
            learner = Learner.from_config(agent.loss, agent.config, seed=index)
            agents[index] = Agent(
                agent.spaces,
                agent.config,
                normalizers=agent.normalizers,
                loss=agent.loss,
                learner=learner,
                seed=index,
                device=agent.device,
            )
        made.append(agents)
    together, alone = made
    fit_together(together, dataset, 5)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 5)
        assert_equal(agent, other)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in VECTORS],
        *[("continuous", OBJECTIVES[name]) for name in ("gumbel-ddpg_bc", "automatic")],
        *[(kind, NETWORKS["all"] | DROPOUT) for kind in ("continuous", "discrete")],
    ],
    ids=str,
)
def test_compiled_agents_end_where_each_would_have_alone(
    kind: str, options: dict[str, Any], alike: Callable[..., list[Agent]]
) -> None:
    dataset = dataset_of(kind)
    together, alone = alike(compile="yes", n_steps=100, **options), alike(n_steps=100, **options)
    fit_together(together, dataset, 100)
    for agent, other in zip(together, alone, strict=True):
        other.fit(dataset, 100)
        torch.testing.assert_close(agent.loss.state_dict(), other.loss.state_dict(), atol=1e-5, rtol=1e-5)
        assert agent.learner.metrics() == pytest.approx(other.learner.metrics(), rel=1e-4, abs=1e-4)
        assert agent.learner.warm_up_seconds > 0.0


@pytest.mark.parametrize("every", [4, 1000])
def test_an_agent_that_diverges_stops_all_of_them(
    kind: str, every: int, alike: Callable[..., list[Agent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "STEPS_BETWEEN_CHECKS", every)
    agents, seen = alike(2), list[int]()

    def callback(step: int) -> None:
        seen.append(step)
        if step == 1:
            with torch.no_grad():
                next(agents[1].loss.value_network.parameters()).fill_(torch.nan)

    with pytest.raises(DivergenceError, match="loss_value"):
        fit_together(agents, dataset_of(kind), STEPS, callback)
    # Looked at every so many steps, and in the end.
    assert seen == list(range(1, min(every, STEPS + 1)))
    agents[0].learner.check_finite()
