"""A captured step is the ordinary one: on the CPU with emulated CUDA graphs, on a GPU with real ones."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import SPACES, make_agent, make_dataset, same, weights
from conftest import keywords, make_batch, make_loss
from recorder import HostReadError, HostReads, Recorder
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from iql_plugins import checkpoint
from iql_plugins.losses import iql as loss_module
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.training import cuda_graph as captured
from iql_plugins.training.agent import Agent
from iql_plugins.training.cuda_graph import WARM_UP_STEPS
from iql_plugins.training.distributed import Processes
from iql_plugins.training.learner import DivergenceError, Groups, Learner, adam

#: Adam's state comes into being in the first step; its tensors must be there before others count as ordinary.
ORDINARY = WARM_UP_STEPS + 1
OPTIONS: dict[str, Any] = {
    "actor_learning_rate": 1e-2,
    "critic_learning_rate": 2e-2,
    "actor_schedule_steps": 12,
    "max_grad_norm": 0.5,
    "polyak": 0.1,
}


def tensor_rates(groups: Groups) -> list[Optimizer]:
    """What :func:`adam` makes on a GPU."""
    return adam([group | {"lr": torch.as_tensor(group["lr"])} for group in groups])


@pytest.fixture
def recorder(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    if device.type != "cpu":
        pytest.skip("emulated on the CPU: on a GPU the tests of real CUDA graphs run")
    recorder = Recorder()
    monkeypatch.setattr(captured, "graphs_on", lambda device: recorder)
    # As on a GPU: the kernel asserts, where on a CPU the host looks.
    monkeypatch.setattr(loss_module, "_check_values", lambda valid, _, text: torch._assert_async(valid.all(), text))
    return recorder


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("captures a real CUDA graph, and there is no GPU: the emulated one is tested")
    return device


def make_learner(kind: str, *, of_loss: Mapping[str, Any] | None = None, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(
        make_loss(kind, **(of_loss or {})), **{"seed": 0, "make_optimizers": tensor_rates, **OPTIONS} | options
    )


def pair(kind: str, **options: Any) -> tuple[Learner, Learner]:
    """The same learner twice, the first of them captured."""
    return make_learner(kind, capture=True, **options), make_learner(kind, **options)


def train(learners: tuple[Learner, ...], kind: str, steps: int, size: int = 6) -> None:
    for _ in range(steps):
        batch = keywords(make_batch(kind, (size,)))
        for learner in learners:
            learner.step(batch)


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    """Everything that training changes."""
    document, state = checkpoint.flatten(learner.state_dict(), "learner")
    rates = [group["lr"] for optimizer in document["optimizers"] for group in optimizer["param_groups"]]
    assert learner.last_losses is not None
    return learner.loss.state_dict() | state | {"rates": torch.tensor(rates), "losses": learner.last_losses}


def trained(learner: Learner) -> dict[str, Tensor]:
    """A copy of that, but for the actor's rate, which every step sets."""
    return {name: tensor.clone() for name, tensor in tensors_of(learner).items() if name != "rates"}


def assert_same(captured: Learner, ordinary: Learner) -> None:
    first, second = tensors_of(captured), tensors_of(ordinary)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert captured.step_count == ordinary.step_count


# On the CPU


@pytest.mark.parametrize("make_optimizers", [tensor_rates, lambda groups: [tensor_rates([g])[0] for g in groups]])
def test_captured_steps_are_the_ordinary_ones(kind: str, make_optimizers: Any, recorder: Recorder) -> None:
    learners = pair(kind, make_optimizers=make_optimizers)
    losses: list[tuple[Tensor | None, ...]] = []
    for _ in range(15):
        train(learners, kind, 1)
        assert_same(*learners)
        losses.append(tuple(learner.last_losses for learner in learners))
    assert (recorder.ordinary, recorder.captures, recorder.replays) == (ORDINARY, 1, 15 - ORDINARY)
    # Each step's are its own, not what the next replay left in their place.
    assert all(torch.equal(*pair) for pair in losses)
    assert learners[0].metrics() == pytest.approx(learners[1].metrics())
    steps = {float(state["step"]) for optimizer in learners[0].optimizers for state in optimizer.state.values()}
    assert steps == {15.0}


def test_an_automatic_temperature_moves_in_replays(kind: str, recorder: Recorder) -> None:
    given = {"temperature": "auto", "objective_options": {"noise_threshold": 0.5}}
    learners, moved = pair(kind, of_loss=given), set()
    for _ in range(ORDINARY + 5):
        train(learners, kind, 1)
        assert_same(*learners)
        moved.add(float(learners[0].loss.automatic_temperature.log_value))
    assert (recorder.captures, len(moved)) == (1, ORDINARY + 5)


def test_the_schedule_goes_on_in_replays(recorder: Recorder) -> None:
    falling, constant = (
        make_learner("continuous", capture=True, actor_schedule_steps=horizon) for horizon in (ORDINARY + 1, None)
    )
    train((falling, constant), "continuous", ORDINARY + 1)
    before = [
        [parameter.clone() for parameter in learner.loss.actor_network.parameters()] for learner in (falling, constant)
    ]
    train((falling, constant), "continuous", 1)
    moved = [
        any(not torch.equal(old, new) for old, new in zip(olds, learner.loss.actor_network.parameters(), strict=True))
        for olds, learner in zip(before, (falling, constant), strict=True)
    ]
    assert moved == [False, True]
    assert recorder.captures == 2


def set_option(name: str, value: Any) -> Callable[[Learner], None]:
    return lambda learner: learner.optimizers[0].param_groups[1].update({name: value})


def move(learner: Learner) -> None:
    """As ``loss.to()`` does: the parameters stay, their memory does not."""
    for parameter in learner.loss.parameters():
        parameter.data = parameter.data.clone()


def reload_optimizer(learner: Learner) -> None:
    learner.optimizers[0].load_state_dict(learner.optimizers[0].state_dict())


def freeze(learner: Learner) -> None:
    next(learner.loss.value_network.parameters()).requires_grad_(False)


#: A change, and how many graphs are captured on account of it.
CHANGES: dict[str, tuple[Callable[[Learner], Any], int]] = {
    "expectile": (lambda learner: setattr(learner.loss, "expectile", 0.9), 1),
    "temperature": (lambda learner: setattr(learner.loss, "temperature", 0.5), 1),
    "polyak": (lambda learner: setattr(learner.target_updater, "tau", 0.9), 1),
    "norm": (lambda learner: setattr(learner, "max_grad_norm", 1e-3), 1),
    "no norm": (lambda learner: setattr(learner, "max_grad_norm", None), 1),
    "betas": (set_option("betas", (0.5, 0.9)), 1),
    "weight decay": (set_option("weight_decay", 0.1), 1),
    "a rate": (lambda learner: learner.set_learning_rate("critic", 0.3), 0),
    "the actor's rate": (lambda learner: learner.set_learning_rate("actor", 0.3), 0),
    "a rate that is a number": (set_option("lr", 0.3), 1),
    "discount": (lambda learner: learner.loss.value_estimator.gamma.fill_(0.5), 0),
    "evaluation mode": (lambda learner: learner.loss.eval(), 1),
    "a frozen parameter": (freeze, 1),
    "moved parameters": (move, 1),
    "weights": (lambda learner: learner.loss.load_state_dict(make_loss("continuous").state_dict()), 0),
    "an optimiser's state": (reload_optimizer, 1),
    "a learner's state": (lambda learner: learner.load_state_dict(learner.state_dict()), 1),
    "seed and step": (lambda learner: vars(learner).update(seed=3, step_count=1), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_counts_from_the_next_step(change: str, recorder: Recorder) -> None:
    learners = pair("continuous")
    train(learners, "continuous", ORDINARY + 2)
    act, captures = CHANGES[change]
    for learner in learners:
        torch.manual_seed(1)
        act(learner)
    for _ in range(ORDINARY + 2):
        train(learners, "continuous", 1)
        assert_same(*learners)
    assert recorder.captures == 1 + captures
    assert recorder.replays > 2


def test_a_setting_that_comes_back_finds_its_graph(recorder: Recorder) -> None:
    learners = pair("continuous")
    for expectile in (0.7, 0.9, 0.7, 0.9):
        for learner in learners:
            learner.loss.expectile = expectile
        train(learners, "continuous", ORDINARY + 1)
    assert_same(*learners)
    assert recorder.captures == 2


def test_a_smaller_last_batch_has_a_graph_of_its_own(kind: str, recorder: Recorder) -> None:
    learners = pair(kind)
    for _ in range(ORDINARY + 2):
        train(learners, kind, 2)
        train(learners, kind, 1, size=3)
    assert_same(*learners)
    assert recorder.captures == 2


def test_a_batch_that_is_written_to_afterwards_was_copied(recorder: Recorder) -> None:
    learners = pair("continuous")
    batch = keywords(make_batch("continuous"))
    for _ in range(ORDINARY + 3):
        for learner in learners:
            learner.step(batch)
        for tensor in batch.values():
            tensor.copy_(torch.rand_like(tensor, dtype=torch.float32) > 0.5)
    assert_same(*learners)
    assert recorder.replays == 3


def test_extra_entries_of_a_batch_have_a_graph_of_their_own(recorder: Recorder) -> None:
    learners = pair("continuous")
    train(learners, "continuous", ORDINARY + 1)
    for _ in range(ORDINARY + 1):
        batch = keywords(make_batch("continuous")) | {"priority_weight": torch.rand(6)}
        for learner in learners:
            learner.step(batch)
    assert_same(*learners)
    assert recorder.captures == 2


def test_there_is_an_end_to_graphs(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MOST_GRAPHS", 2)
    learners = pair("continuous")
    for _ in range(ORDINARY + 2):
        for size in (3, 4, 5, 6):
            train(learners, "continuous", 1, size=size)
            assert_same(*learners)
    assert recorder.captures == 2


def test_a_training_that_diverges_stops_when_metrics_are_read(kind: str, recorder: Recorder) -> None:
    learner = make_learner(kind, capture=True)
    train((learner,), kind, ORDINARY + 1)
    learner.metrics()
    batch = keywords(make_batch(kind))
    batch["next_reward"][2] = torch.nan
    learner.step(batch)
    with pytest.raises(DivergenceError, match=r"loss_qvalue, .*the critic's weights not finite at step 6"):
        learner.metrics()


def test_what_draws_draws_the_same(recorder: Recorder) -> None:
    """Dropout, whose masks differ from step to step."""
    dataset = make_dataset(SPACES["continuous"])
    agents = []
    for capture in (True, False):
        agent = make_agent("continuous", dataset, actor_dropout=0.5)
        agent.learner = Learner.from_config(
            agent.loss, agent.config, seed=0, capture=capture, make_optimizers=tensor_rates
        )
        torch.manual_seed(int(capture))
        state = torch.get_rng_state()
        agent.fit(dataset, ORDINARY + 4)
        assert torch.equal(state, torch.get_rng_state())
        agents.append(agent)
    assert same(*map(weights, agents))
    assert recorder.replays == 4


def test_a_checkpoint_on_the_way_is_that_of_ordinary_training(recorder: Recorder, tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["discrete"])
    agents = []
    for capture in (True, False):
        agent = make_agent("discrete", dataset)
        agent.learner = Learner.from_config(
            agent.loss, agent.config, seed=0, capture=capture, make_optimizers=tensor_rates
        )
        agent.fit(dataset, ORDINARY + 3)
        path = tmp_path / f"{capture}.safetensors"
        agent.save(path)
        agents.append(Agent.load(path))
        agent.fit(dataset, 4)
        agents[-1].fit(dataset, 4)
        # Rates are tensors here and numbers there: the last digit may differ.
        for name, tensor in weights(agent).items():
            torch.testing.assert_close(weights(agents[-1])[name], tensor)
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()
    assert same(*map(weights, agents))
    assert recorder.replays == 7


def test_processes_that_train_together_take_ordinary_steps(recorder: Recorder) -> None:
    learners, calls = pair("continuous"), []
    train(learners, "continuous", ORDINARY + 1)

    class Counted(Processes):
        def average(self, loss: IQLLoss) -> None:
            calls.append(loss)

    for learner in learners:
        learner.processes = Counted(0, 2)
    train(learners, "continuous", 3)
    assert_same(*learners)
    assert len(calls) == 6
    assert recorder.replays == 1


def test_a_captured_step_waits_for_nothing(kind: str, recorder: Recorder) -> None:
    learner = make_learner(kind, capture=True)
    batch = keywords(make_batch(kind))
    for _ in range(ORDINARY + 2):
        with HostReads():
            learner.step(batch)
    assert recorder.replays == 2


def test_the_emulation_notices_what_waits() -> None:
    for wait in (
        lambda: torch.ones(1).item(),
        lambda: bool(torch.ones(1) > 0),
        lambda: torch.ones(2).nonzero(),
        lambda: torch.ones(2)[torch.ones(2) > 0],
        lambda: torch.tensor(1.0, device="cpu"),
        lambda: torch.ones(2, device="meta").to("cpu"),
    ):
        with pytest.raises((HostReadError, NotImplementedError)), HostReads():
            wait()


def test_an_optimiser_is_declared_capturable_while_it_is_captured_alone(recorder: Recorder) -> None:
    """Torch refuses to capture one that is not, and warns of one that is and steps outside."""
    declared: list[bool] = []

    class Declaring(Adam):
        def step(self, closure: Any = None) -> Any:
            declared.extend(group["capturable"] for group in self.param_groups)
            return super().step(closure)

    def make_optimizers(groups: Groups) -> list[Optimizer]:
        return [Declaring([group | {"lr": torch.tensor(group["lr"])}], fused=True) for group in groups]

    learner = make_learner("continuous", capture=True, make_optimizers=make_optimizers)
    train((learner,), "continuous", ORDINARY + 2)
    train((learner,), "continuous", 1, size=3)
    assert declared == [False] * 3 * ORDINARY + [True] * 3 + [False] * 3
    assert recorder.replays == 2


def test_gradients_are_not_left_in_a_graph_s_memory(recorder: Recorder) -> None:
    learners = pair("continuous")
    train(learners, "continuous", ORDINARY + 1)
    gradients = [[parameter.grad for parameter in learner.loss.parameters()] for learner in learners]
    assert {type(gradient) for gradient in gradients[0]} == {type(None)}
    assert any(gradient is not None for gradient in gradients[1])
    assert recorder.captures == 1


def test_a_batch_that_is_refused_changes_nothing(recorder: Recorder) -> None:
    learners = pair("continuous")
    for _ in range(ORDINARY + 2):
        train(learners, "continuous", 1)
        before = trained(learners[0])
        for name, wrong in (("action", torch.zeros(6, 9)), ("reward", torch.zeros(6, 1))):
            with pytest.raises((RuntimeError, TypeError), match=name):
                learners[0].step(keywords(make_batch("continuous")) | {name: wrong})
        assert same(before, trained(learners[0]))
    train(learners, "continuous", 1)
    assert_same(*learners)
    assert recorder.captures == 1


def test_a_capture_that_fails_trains_nothing(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    learners = pair("continuous")
    train(learners, "continuous", ORDINARY)
    before = trained(learners[0])
    step, waits = learners[0].target_updater.step, [True]

    def reading() -> None:
        step()
        if waits:
            next(learners[0].loss.parameters()).sum().item()

    monkeypatch.setattr(learners[0].target_updater, "step", reading)
    with pytest.raises(HostReadError):
        train(learners[:1], "continuous", 1)
    assert same(before, trained(learners[0]))
    assert learners[0].step_count == ORDINARY
    waits.clear()
    train(learners, "continuous", 3)
    assert_same(*learners)


@pytest.mark.slow
def test_a_mode_reaches_the_compiler_and_leaves_no_gradients() -> None:
    reduced, plain = (make_learner("continuous", compile=True, mode=mode) for mode in ("reduce-overhead", None))
    train((reduced, plain), "continuous", 3)
    assert reduced._gradients.mode == "reduce-overhead"
    assert_close(reduced, plain, 1e-5)
    assert {type(parameter.grad) for parameter in reduced.loss.parameters()} == {type(None)}


def test_a_gpu_s_streams_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls alone: a step beside the caller's stream comes after what is in it, and before what follows."""
    events: list[Any] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.device = self.name = name

        def wait_stream(self, other: "Stream") -> None:
            events.append((self.name, "waits for", other.name))

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    names = iter(["aside", "captured"])

    @contextmanager
    def entered(*arguments: Any, **options: Any) -> Iterator[None]:
        stream = options.pop("stream", arguments[0])
        events.append((stream.name, options))
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "graph", entered)

    def compute() -> Tensor:
        events.append("compute")
        return torch.zeros(4)

    graphs = captured.graphs_on(torch.device("cuda"))
    graphs.aside(compute)
    waits = ("aside", "waits for", "current"), ("current", "waits for", "aside")
    assert events == [waits[0], ("aside", {}), "compute", "left", waits[1]]
    events.clear()
    replay = graphs.capture(compute)
    assert events == [("captured", {"capture_error_mode": "thread_local"}), "compute", "left"]
    assert replay() is replay()
    assert events[3:] == ["replay", "replay"]


# What is refused


def test_capturing_needs_a_gpu(device: torch.device) -> None:
    with torch.device("cpu"), pytest.raises(ValueError, match="needs a CUDA graph, and the loss is on cpu: move it"):
        Learner(make_loss("continuous"), capture=True)


@pytest.mark.parametrize(
    "make_optimizers",
    [
        lambda groups: [Adam(list(groups), fused=True)],
        lambda groups: [Adam([group | {"lr": torch.tensor(0.1)} for group in groups])],
        lambda groups: [SGD(list(groups))],
    ],
)
def test_optimisers_that_need_the_host_are_refused(make_optimizers: Any, recorder: Recorder) -> None:
    with pytest.raises(ValueError, match=r"optimisers that compute on the device alone, \w+ has fused=.* as adam\(\)"):
        Learner(make_loss("continuous"), capture=True, make_optimizers=make_optimizers)
    assert recorder.ordinary == 0


def test_one_capture_is_enough(recorder: Recorder) -> None:
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(ValueError, match=f"mode='{mode}' captures a graph of its own"):
            Learner(make_loss("continuous"), compile=True, mode=mode, capture=True, make_optimizers=tensor_rates)
    with pytest.raises(ValueError, match="mode='reduce-overhead' is one of compiled code: pass compile=True"):
        Learner(make_loss("continuous"), mode="reduce-overhead")
    with pytest.raises(ValueError, match="mode must be one of"):
        Learner(make_loss("continuous"), compile=True, mode="fast")
    mode = "max-autotune-no-cudagraphs"
    Learner(make_loss("continuous"), compile=True, mode=mode, capture=True, make_optimizers=tensor_rates)
    assert recorder.captures == 0


# On a GPU


def assert_close(first: Learner, second: Learner, tolerance: float) -> None:
    expected = tensors_of(second)
    for name, tensor in tensors_of(first).items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("compile", [False, True])
def test_real_graphs_take_the_ordinary_steps(kind: str, compile: bool, gpu: torch.device) -> None:
    learners = pair(kind, compile=compile, make_optimizers=adam)
    for _ in range(20):
        train(learners, kind, 1)
        assert_close(*learners, 1e-6)
    learners[0].loss.expectile = learners[1].loss.expectile = 0.9
    for size in (6, 3):
        train(learners, kind, ORDINARY + 3, size=size)
        assert_close(*learners, 1e-4)
    states = [learner.state_dict() for learner in learners]
    for learner, state in zip(learners, states, strict=True):
        learner.load_state_dict(state)
    train(learners, kind, ORDINARY + 3)
    assert_close(*learners, 1e-4)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_real_graphs_wait_for_nothing(kind: str, gpu: torch.device) -> None:
    learner = make_learner(kind, capture=True, make_optimizers=adam)
    batch = keywords(make_batch(kind))
    for step in range(ORDINARY + 4):
        # A capture itself waits, once.
        torch.cuda.set_sync_debug_mode("default" if step == ORDINARY else "error")
        try:
            learner.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_real_graphs_draw_the_same(gpu: torch.device) -> None:
    dataset = make_dataset(SPACES["continuous"])
    agents = []
    for capture in (True, False):
        agent = make_agent("continuous", dataset, actor_dropout=0.5)
        agent.learner = Learner.from_config(agent.loss, agent.config, seed=0, capture=capture)
        state = torch.cuda.get_rng_state()
        agent.fit(dataset, ORDINARY + 16)
        assert torch.equal(state, torch.cuda.get_rng_state())
        agents.append(agent)
    for name, tensor in weights(agents[0]).items():
        torch.testing.assert_close(tensor, weights(agents[1])[name], rtol=1e-6, atol=1e-6, msg=name)


def test_reduced_overhead_takes_the_ordinary_steps(kind: str, gpu: torch.device) -> None:
    # Two of them, turn and turn about: the outputs of one must not be in the other's way.
    learners = [
        make_learner(kind, make_optimizers=adam, compile=True, mode=mode)
        for mode in ("reduce-overhead", "reduce-overhead", None)
    ]
    for _ in range(20):
        train(tuple(learners), kind, 1)
        for learner in learners[:2]:
            assert_close(learner, learners[2], 1e-5)
