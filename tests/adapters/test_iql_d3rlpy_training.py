"""What the d3rlpy adapter trains: the core's losses, agents from elsewhere, several processes, compiled graphs."""

import copy
import math
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import pytest
import torch
from d3rlpy.models import PixelEncoderFactory, VectorEncoderFactory
from d3rlpy.preprocessing import (
    ClipRewardScaler,
    ConstantShiftRewardScaler,
    MinMaxActionScaler,
    MinMaxObservationScaler,
    MinMaxRewardScaler,
    MultiplyRewardScaler,
    ReturnBasedRewardScaler,
    StandardObservationScaler,
    StandardRewardScaler,
)
from d3rlpy.torch_utility import TorchMiniBatch
from d3rlpy_helpers import (
    ACTION,
    ACTIONS,
    CONTINUOUS,
    DISCRETE,
    PIXEL,
    QUIET,
    VECTOR,
    assert_same_weights,
    config,
    dataset,
    fitted,
    observations,
    pixel_config,
    weights,
)
from processes import ranks
from requirements import data_of_others
from tensordict import TensorDict
from torch import nn

from iql_d3rlpy import (
    BoundedActionScaler,
    DiscreteIQLConfig,
    IQLConfig,
    as_fast_buffer,
    from_agent,
    plugin,
    to_agent,
    to_replay_buffer,
)
from iql_plugins import load_dataset
from iql_plugins.config import IQLConfig as Hyperparameters
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.ope import Criterion, Policy, difference, fitted_q_evaluation, fitted_value
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent, build_loss
from iql_plugins.training.distributed import Processes


@pytest.fixture
def place(device: torch.device) -> str:
    """The device as d3rlpy writes it."""
    return f"{device.type}:0"


def built(kind: str, place: str, **changes: Any) -> Any:
    """An algorithm that has taken no step."""
    algorithm = config(kind, **changes).create(place)
    algorithm.create_impl(VECTOR, ACTIONS if kind == DISCRETE else ACTION)
    return algorithm


def test_an_update_is_the_losses_and_gradients_of_the_core(kind: str, place: str) -> None:
    algorithm = built(kind, place)
    batch = dataset(kind).sample_transition_batch(32)
    loss = copy.deepcopy(algorithm.impl.agent.loss)
    mapped = plugin.iql_map_batch(TorchMiniBatch.from_batch(batch, 0.99, False, place))
    assert mapped is not None
    outputs = loss(mapped)
    (outputs["loss_actor"] + outputs["loss_qvalue"] + outputs["loss_value"]).backward()
    metrics = algorithm.update(batch)
    assert metrics == {
        "critic_loss": outputs["loss_qvalue"].item() + outputs["loss_value"].item(),
        "q_loss": outputs["loss_qvalue"].item(),
        "v_loss": outputs["loss_value"].item(),
        "actor_loss": outputs["loss_actor"].item(),
        "entropy": outputs["entropy"].item(),
    }
    gradients = {name: parameter.grad for name, parameter in algorithm.impl.agent.loss.named_parameters()}
    expected = {name: parameter.grad for name, parameter in loss.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=0.0, atol=0.0)


def test_the_networks_are_those_of_the_core(kind: str, place: str) -> None:
    algorithm = built(kind, place)
    space = Discrete(ACTIONS) if kind == DISCRETE else Box((ACTION,), "float32", (-1.0,) * ACTION, (1.0,) * ACTION)
    expected = build_loss(Spaces(Box(VECTOR), space), Hyperparameters(hidden_sizes=(8,)))
    state = algorithm.impl.agent.loss.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in expected.state_dict().items()
    }
    assert to_agent(algorithm).custom_parts() == []


def test_to_agent_changes_nothing_of_the_algorithm(kind: str, place: str) -> None:
    algorithm = built(kind, place)
    own = algorithm.impl.agent
    before = own.spaces, own.normalizers
    agent = to_agent(algorithm)
    assert (own.spaces, own.normalizers) == before
    assert algorithm.impl.agent is own
    assert all(getattr(agent, part) is getattr(own, part) for part in ("loss", "learner", "generator"))


def copy_layers(source: nn.Module, target: nn.Module, index: int | None = None) -> None:
    """Copies the linear layers of one network into another's, or into slice ``index`` of stacked ones."""
    layers = [[m for m in each.modules() if isinstance(m, nn.Linear)] for each in (source, target)]
    with torch.no_grad():
        for theirs, ours in zip(*layers, strict=True):
            for name in ("weight", "bias"):
                tensor = getattr(ours, name)
                (tensor if index is None else tensor[index]).copy_(getattr(theirs, name))


def test_the_losses_are_those_of_d3rlpys_own_iql_in_its_order(place: str) -> None:
    """d3rlpy updates critics and V together and weighs actions with the *new* V; ours takes all three at once.

    Its policy has another parametrisation of the deviation, sigmoid instead of clipping, and so another gradient of it;
    it adds losses up over critics, as we do. All else is the same.
    """
    theirs = d3rlpy.algos.IQLConfig(batch_size=64).create(place)
    theirs.create_impl(VECTOR, ACTION)
    # Rates of 0 leave the one weights in place that both are compared at.
    ours = IQLConfig(actor_learning_rate=0.0, critic_learning_rate=0.0, value_learning_rate=0.0, tau=0.0).create(place)
    ours.create_impl(VECTOR, ACTION)
    loss = ours.impl.agent.loss
    modules = theirs.impl.modules

    def take_over() -> None:
        copy_layers(modules.policy, loss.actor_network)
        copy_layers(modules.value_func, loss.value_network)
        for index in range(2):
            copy_layers(modules.q_funcs[index], loss.qvalue_network, index)
            copy_layers(modules.targ_q_funcs[index], loss.get_stateful_net("target_qvalue_network", copy=False), index)
        with torch.no_grad():
            raw = modules.policy._logstd.reshape(-1)
            loss.actor_network.get_parameter("module.0.module.log_std").copy_(-5.0 + 7.0 * raw.sigmoid())

    data = dataset(CONTINUOUS)
    for _ in range(5):
        batch = data.sample_transition_batch(64)
        take_over()
        before = ours.update(batch)
        expected = theirs.update(batch)
        # V as it is after their update, the rest as before: what their policy's loss was taken at.
        copy_layers(modules.value_func, loss.value_network)
        after = ours.update(batch)
        assert before["q_loss"] == pytest.approx(expected["q_loss"], rel=1e-5)
        assert before["v_loss"] == pytest.approx(expected["v_loss"], rel=1e-5)
        assert before["critic_loss"] == pytest.approx(expected["critic_loss"], rel=1e-5)
        assert after["actor_loss"] == pytest.approx(expected["actor_loss"], rel=1e-5)


# Agents that move among adapters


def agent(kind: str, device: torch.device, **changes: Any) -> Agent:
    """One whose normalisers all have something to do."""
    action: Any = Discrete(ACTIONS, start=1) if kind == DISCRETE else Box((ACTION,), "float32", (-2.0, 0.0), (2.0, 5.0))
    spaces = Spaces(Box(VECTOR), action)
    hyperparameters = Hyperparameters(
        **{
            "n_steps": 100,
            "batch_size": 16,
            "hidden_sizes": (8,),
            "compile": "no",
            "max_grad_norm": 0.5,
            "clip_all_actions": True,
            **changes,
        }
    )
    normalizers = Normalizers(
        spaces,
        observation_moments={"observation": (torch.linspace(-1.0, 2.0, *VECTOR), torch.linspace(0.1, 3.0, *VECTOR))},
        reward_scale=0.37,
        reward_shift=-0.11,
    )
    return Agent(spaces, hyperparameters, normalizers=normalizers, seed=1, device=device)


def rows(kind: str, count: int = 50) -> TensorDict:
    """Transitions in the environment's units, on the CPU; every seventh episode terminates, others are cut."""
    rng = np.random.default_rng(0)
    data = {
        "observation": rng.normal(size=(count + 1, *VECTOR)),
        "action": rng.normal(size=(count, ACTION)) * 3.0,
        "reward": rng.normal(size=(count, 1)),
    }
    tensors = {name: torch.tensor(array, dtype=torch.float32, device="cpu") for name, array in data.items()}
    action = tensors["action"]
    if kind == DISCRETE:
        action = torch.tensor(rng.integers(1, ACTIONS + 1, (count, 1)), device="cpu")
    step = torch.arange(count, device="cpu").unsqueeze(-1)
    terminated = step % 14 == 13
    return TensorDict(
        {
            "observation": tensors["observation"][:-1],
            "action": action,
            "next": {
                "observation": tensors["observation"][1:],
                "reward": tensors["reward"],
                "done": terminated | (step % 10 == 9) | (step == count - 1),
                "terminated": terminated,
            },
        },
        [count],
    )


def test_the_algorithm_around_an_agent_holds_its_very_parts(kind: str, device: torch.device) -> None:
    original = agent(kind, device)
    algorithm = from_agent(original)
    assert to_agent(algorithm) is original
    assert algorithm.impl.agent.loss is original.loss
    x = np.random.default_rng(0).normal(size=(6, *VECTOR)).astype(np.float32)
    np.testing.assert_array_equal(algorithm.predict(x), original.act(x))
    if kind == CONTINUOUS:
        sampled = np.concatenate([algorithm.sample_action(x) for _ in range(20)])
        assert (sampled >= [-2.0, 0.0]).all()
        assert (sampled <= [2.0, 5.0]).all()


@pytest.mark.parametrize("n_steps", [3, 12])
def test_the_command_lines_training_is_that_of_the_agent_itself(
    kind: str, n_steps: int, device: torch.device, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iql_d3rlpy.training._STEPS_AN_EPOCH", 5)
    training = plugin.iql_adapter().training
    assert training is not None
    data, first, second = rows(kind), agent(kind, device), agent(kind, device)
    steps: list[int] = []
    random_state = torch.get_rng_state()
    training.fit(training.from_agent(first), data, n_steps, steps.append)
    assert torch.equal(torch.get_rng_state(), random_state)
    second.fit(data, n_steps)
    assert steps == list(range(1, n_steps + 1))
    # The same batches, whose rows lie otherwise in memory: some processors round products of such otherwise.
    torch.testing.assert_close(dict(first.loss.state_dict()), dict(second.loss.state_dict()), rtol=1e-5, atol=1e-8)
    assert torch.equal(first.generator.get_state(), second.generator.get_state())
    assert first.learner.metrics() == pytest.approx(second.learner.metrics(), rel=1e-5)
    assert capfd.readouterr().out == ""


def test_native_files_hold_the_whole_agent(kind: str, device: torch.device, tmp_path: Path) -> None:
    training = plugin.iql_adapter().training
    assert training is not None
    original = agent(kind, device, actor_dropout=0.1, squashed=kind == CONTINUOUS)
    original.extra = {"run": {"best": [1.5, None]}}
    algorithm = training.from_agent(original)
    training.fit(algorithm, rows(kind), 4, lambda step: None)
    path = tmp_path / f"agent{training.suffix}"
    training.save(algorithm, path)
    for loaded in (training.load(path), d3rlpy.load_learnable(str(path))):
        restored = training.to_agent(loaded)
        assert restored.config == original.config
        assert restored.spaces == original.spaces
        assert restored.extra == original.extra
        assert restored.learner.step_count == 4
        assert_same_weights(restored.loss.state_dict(), {k: v.cpu() for k, v in original.loss.state_dict().items()})
        torch.testing.assert_close(
            restored.normalizers.state_dict(), original.normalizers.cpu().state_dict(), rtol=0.0, atol=0.0
        )
        original.normalizers.to(device)
        x = np.random.default_rng(0).normal(size=(6, *VECTOR)).astype(np.float32)
        np.testing.assert_allclose(restored.act(x), original.act(x), rtol=1e-6)
    if device.type == "cpu":
        # The random states go on, too: dropout and the draws of batches.
        again = training.load(path)
        training.fit(again, rows(kind), 3, lambda step: None)
        training.fit(algorithm, rows(kind), 3, lambda step: None)
        assert_same_weights(to_agent(again).loss.state_dict(), original.loss.state_dict())


def test_an_agent_of_dict_observations_and_integers(tmp_path: Path) -> None:
    spaces = Spaces(
        {"z": Box((2,)), "image": Box((36, 36, 3), "uint8"), "code": Discrete(4)},
        Box((1,), "float32", (-1.0,), (1.0,)),
    )
    original = Agent(spaces, Hyperparameters(hidden_sizes=(8,), compile="no", batch_size=4), seed=0)
    rng = np.random.default_rng(0)
    base = {
        "z": torch.tensor(rng.normal(size=(9, 2)), dtype=torch.float32),
        "image": torch.tensor(rng.integers(0, 256, (9, 36, 36, 3)), dtype=torch.uint8),
        "code": torch.tensor(rng.integers(0, 4, (9, 1))),
    }
    flags = torch.zeros(8, 1, dtype=torch.bool)
    data = TensorDict(
        {
            "observation": {name: tensor[:-1] for name, tensor in base.items()},
            "action": torch.rand(8, 1),
            "next": {
                "observation": {name: tensor[1:] for name, tensor in base.items()},
                "reward": torch.rand(8, 1),
                "done": flags,
                "terminated": flags,
            },
        },
        [8],
    ).cpu()
    training = plugin.iql_adapter().training
    assert training is not None
    algorithm = training.from_agent(original)
    training.fit(algorithm, data, 2, lambda step: None)
    x = [base[name].cpu().numpy() for name in ("code", "image", "z")]
    action = algorithm.predict(x)
    mapping = {"z": x[2], "image": x[1], "code": x[0]}
    np.testing.assert_allclose(action, original.act(mapping), rtol=1e-5, atol=1e-6)
    training.save(algorithm, tmp_path / "agent.d3")
    np.testing.assert_allclose(training.load(tmp_path / "agent.d3").predict(x), action, rtol=1e-5, atol=1e-6)


def test_networks_that_the_file_cannot_describe_are_refused(device: torch.device, tmp_path: Path) -> None:
    original = agent(CONTINUOUS, device)
    loss = build_loss(original.spaces, original.config.replace(hidden_sizes=(9,)))
    other = Agent(original.spaces, original.config, loss=loss)
    with pytest.raises(ValueError, match="came with the agent and are not the default ones"):
        from_agent(other).save(tmp_path / "agent.d3")
    assert not list(tmp_path.iterdir())


OBSERVATION_SCALERS = {"none": lambda: None, "standard": StandardObservationScaler, "min_max": MinMaxObservationScaler}
REWARD_SCALERS = {
    "none": lambda: None,
    "multiply": lambda: MultiplyRewardScaler(0.1),
    "min_max": lambda: MinMaxRewardScaler(multiplier=3.0),
    "standard": StandardRewardScaler,
    "return": lambda: ReturnBasedRewardScaler(multiplier=1000.0),
    "shift": lambda: ConstantShiftRewardScaler(-1.0, 0.5),
    "shift_after": lambda: ConstantShiftRewardScaler(-1.0, 0.5, multiply_first=True),
}


@pytest.mark.parametrize("observation", OBSERVATION_SCALERS)
@pytest.mark.parametrize("action", ["none", "min_max", "bounded"])
@pytest.mark.parametrize("reward", REWARD_SCALERS)
def test_scalers_become_normalisers(observation: str, action: str, reward: str, tmp_path: Path, place: str) -> None:
    scalers = {
        "observation_scaler": OBSERVATION_SCALERS[observation](),
        "action_scaler": {"none": None, "min_max": MinMaxActionScaler(), "bounded": BoundedActionScaler()}[action],
        "reward_scaler": REWARD_SCALERS[reward](),
    }
    algorithm = fitted(config(CONTINUOUS, **scalers).create(place), dataset(CONTINUOUS), steps=1)
    moved = to_agent(algorithm)
    x = observations()
    np.testing.assert_allclose(moved.act(x), algorithm.predict(x), rtol=1e-4, atol=1e-5)
    rewards = torch.linspace(-3.0, 3.0, 7)
    used = algorithm.reward_scaler
    expected = rewards if used is None else used.transform(rewards)
    torch.testing.assert_close(moved.normalizers.reward(rewards), expected, rtol=1e-5, atol=1e-5)
    moved.save(tmp_path / "agent.safetensors")
    np.testing.assert_array_equal(Agent.load(tmp_path / "agent.safetensors").act(x), moved.act(x))


def test_scalers_that_normalisers_cannot_follow_are_named(place: str) -> None:
    algorithm = fitted(config(CONTINUOUS, reward_scaler=ClipRewardScaler(-1.0, 1.0)).create(place), dataset(CONTINUOUS))
    with pytest.raises(ValueError, match="the reward scaler does, a ClipRewardScaler"):
        to_agent(algorithm)
    unfitted = built(CONTINUOUS, place, observation_scaler=StandardObservationScaler())
    with pytest.raises(ValueError, match="the observation scaler does, a StandardObservationScaler that is not fitted"):
        to_agent(unfitted)
    with pytest.raises(RuntimeError, match="build_with_dataset"):
        to_agent(config(CONTINUOUS).create())


def test_the_bounded_scaler_keeps_actions_within_bounds(place: str) -> None:
    scaler = BoundedActionScaler(minimum=np.array([-2.0, 0.0]), maximum=np.array([2.0, 5.0]))
    actions = torch.tensor([[-9.0, 2.5], [2.0, 99.0], [0.0, 0.0]])
    unit = scaler.transform(actions)
    torch.testing.assert_close(unit, torch.tensor([[-0.99999, 0.0], [0.99999, 0.99999], [0.0, -0.99999]]))
    torch.testing.assert_close(
        scaler.reverse_transform(torch.tensor([[1.0, -1.0], [1.5, 0.0]])), torch.tensor([[2.0, 0.0], [2.0, 2.5]])
    )
    np.testing.assert_allclose(scaler.transform_numpy(actions.cpu().numpy()), unit.cpu().numpy())


def test_images_move_to_an_agent(kind: str, place: str) -> None:
    algorithm = fitted(pixel_config(kind).create(place), dataset(kind, PIXEL), steps=1)
    x = observations(PIXEL)
    np.testing.assert_allclose(to_agent(algorithm).act(x), algorithm.predict(x), rtol=1e-4, atol=1e-5)
    assert to_agent(algorithm).custom_parts() == ["actor_network", "value_network", "qvalue_network"]


@pytest.mark.slow
def test_a_compiled_training_is_the_same(kind: str, place: str) -> None:
    data, results = dataset(kind), []
    for compile_graph in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        algorithm = fitted(config(kind, compile_graph=compile_graph).create(place), data)
        assert algorithm.compiled == compile_graph == algorithm.impl.agent.learner.compiled
        results.append(weights(algorithm))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_the_same_is_done_uncompiled(
    kind: str, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = built(kind, place, compile_graph=True)
    assert compiled.compiled
    compiled.save(tmp_path / "algorithm.d3")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("iql_plugins._compat.has_triton", lambda: False)
    assert not config(kind, compile_graph=True).create(place).compiled
    loaded = d3rlpy.load_learnable(str(tmp_path / "algorithm.d3"), device=place)
    assert not loaded.compiled
    assert loaded.config.compile_graph
    fitted(loaded, dataset(kind))
    assert loaded.grad_step == 4


PROGRAM = """
import sys
import d3rlpy, numpy as np, torch
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy_helpers import CONTINUOUS, config, dataset
from d3rlpy.models import VectorEncoderFactory

rank = d3rlpy.distributed.init_process_group("gloo")
torch.manual_seed(rank)
np.random.seed(0)
encoder = VectorEncoderFactory([8], use_batch_norm=True)
algorithm = config(CONTINUOUS, actor_encoder_factory=encoder, weight_temp="auto").create("cpu:0", enable_ddp=True)
data, seen = dataset(CONTINUOUS), []
algorithm.build_with_dataset(data)
update = algorithm.update
algorithm.update = lambda batch: seen.extend(batch.rewards.reshape(-1).tolist()) or update(batch)
quiet = dict(logger_adapter=NoopAdapterFactory(), show_progress=False)
algorithm.fit(data, n_steps=5, n_steps_per_epoch=5, **quiet)
torch.save((algorithm.impl.agent.loss.state_dict(), seen), f"{sys.argv[1]}/{rank}.pt")
d3rlpy.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_hold_equal_weights_and_draw_from_shares_of_their_own(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with ranks(program, tmp_path) as processes:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    (first, first_seen), (second, second_seen) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same_weights(first, second)
    assert first["automatic_temperature.log_value"] != 0.0
    assert not set(first_seen) & set(second_seen)
    assert not any(math.isnan(value) for value in first_seen)


def test_several_processes_need_a_group(kind: str) -> None:
    algorithm = config(kind).create("cpu:0", enable_ddp=True)
    with pytest.raises(RuntimeError, match="init_process_group"):
        algorithm.create_impl(VECTOR, 3)


def test_the_shares_are_no_lasting_part_of_a_dataset(
    kind: str, place: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn = []

    def draw(count: int, size: int) -> Any:
        drawn.append(size)
        return np.zeros(size, np.int64)

    monkeypatch.setattr("iql_d3rlpy.algorithm.draw_share", draw)
    monkeypatch.setattr(Processes, "of_group", lambda: Processes(0, 2))
    algorithm, data = built(kind, place), as_fast_buffer(dataset(kind))
    algorithm._enable_ddp = True
    fitted(algorithm, data)
    assert drawn == [16] * 4
    assert "batch_size is that of each process, 16: of all 2 together it is 32" in capfd.readouterr().out
    data.sample_transition_batch(7)
    assert len(drawn) == 4


def mean_return(algorithm: Any, env: gymnasium.Env[Any, Any], episodes: int) -> float:
    """Of the greedy policy."""
    returns = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(algorithm.predict(observation[None])[0])
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def learning() -> dict[str, Any]:
    """What learns within seconds. Scalers remember what they were fitted to."""
    names = ("actor", "critic", "value")
    return {
        "observation_scaler": StandardObservationScaler(),
        **{f"{name}_encoder_factory": VectorEncoderFactory([64, 64]) for name in names},
        **{f"{name}_learning_rate": 1e-3 for name in names},
    }


@pytest.mark.slow
def test_it_learns_more_than_the_data_show(place: str) -> None:
    d3rlpy.seed(0)
    data = to_replay_buffer("pendulum-v1-sac")
    algorithm = IQLConfig(
        **learning(),
        action_scaler=BoundedActionScaler(minimum=np.full(1, -2.0), maximum=np.full(1, 2.0)),
        reward_scaler=MultiplyRewardScaler(0.1),
        actor_schedule_steps=2500,
    ).create(place)
    algorithm.fit(data, n_steps=2500, n_steps_per_epoch=500, **QUIET)
    shown = np.mean([episode.compute_return() for episode in data.episodes])
    assert shown == pytest.approx(-326.0, abs=1.0)
    assert mean_return(algorithm, gymnasium.make("Pendulum-v1"), 10) > shown + 40.0


@pytest.mark.slow
def test_discrete_actions_learn_more_than_the_data_show(place: str) -> None:
    path = data_of_others("reagent_cartpole_mixed")
    d3rlpy.seed(0)
    data = to_replay_buffer(path)
    algorithm = DiscreteIQLConfig(**learning()).create(place)
    algorithm.fit(data, n_steps=1500, n_steps_per_epoch=500, **QUIET)
    assert mean_return(algorithm, gymnasium.make("CartPole-v1", max_episode_steps=200), 10) > 58.0


def test_small_images_are_no_trouble_for_an_encoder_of_ones_own(kind: str, place: str) -> None:
    factory = PixelEncoderFactory(filters=[[2, 3, 1]], feature_size=4)
    factories = {f"{name}_encoder_factory": factory for name in ("actor", "critic", "value")}
    shape = (1, 6, 6)
    algorithm = config(kind, **factories).create(place)
    algorithm.fit(dataset(kind, shape), n_steps=1, n_steps_per_epoch=1, **QUIET)
    assert len(algorithm.predict(observations(shape))) == 7


def cart_pole_in_cells(episodes: int) -> dict[str, Any]:
    """Random episodes of CartPole, of which 16 cells of the pole's angle and speed are seen: a table is exact."""
    env, random = gymnasium.make("CartPole-v1"), np.random.default_rng(0)
    rows: list[tuple[Any, int, float, Any, bool]] = []
    for seed in range(episodes):
        before, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            action = int(random.integers(2))
            after, reward, ended, _, _ = env.step(action)
            rows.append((before, action, float(reward), after, ended))
            before = after
    before, action, reward, after, ended = map(np.array, zip(*rows, strict=True))

    def cells(states: Any) -> Any:
        angle, speed = np.digitize(states[:, 2], [-0.05, 0.0, 0.05]), np.digitize(states[:, 3], [-0.5, 0.0, 0.5])
        return np.eye(16, dtype=np.float32)[4 * angle + speed]

    return {
        "observations": cells(before),
        "actions": action,
        "rewards": reward.astype(np.float32),
        "next_observations": cells(after),
        "terminals": ended,
        "timeouts": np.zeros(len(ended)),
    }


@pytest.mark.slow
def test_fitted_q_evaluation_says_what_d3rlpys_own_says() -> None:
    columns = cart_pole_in_cells(150)
    data, terminals = load_dataset(columns, discrete=True), columns["terminals"]
    observations = columns["observations"]
    cell = observations.argmax(1)
    # Pushes away from where the pole falls: what that is worth depends on the state.
    wanted = (cell // 4 + cell % 4 <= 3).astype(np.int64)[:, None]
    d3rlpy.seed(0)
    clone = d3rlpy.algos.DiscreteBCConfig(batch_size=256, learning_rate=1e-3, beta=0.0).create()
    clone.fit(d3rlpy.dataset.MDPDataset(observations, wanted, columns["rewards"], terminals), 300, 300, **QUIET)
    buffer = d3rlpy.dataset.MDPDataset(observations, columns["actions"][:, None], columns["rewards"], terminals)
    ends = np.flatnonzero(terminals)[:8]
    first = observations[[0, *(ends[:-1] + 1)]]
    values = []
    for seed in range(3):
        d3rlpy.seed(seed)
        config = d3rlpy.ope.FQEConfig(gamma=0.8, learning_rate=5e-4, batch_size=256, target_update_interval=10)
        fitted = d3rlpy.ope.DiscreteFQE(clone, config)
        fitted.fit(buffer, 1500, 1500, **QUIET)
        values.append(fitted.predict_value(first, clone.predict(first)))
    theirs = Criterion.mean(np.stack(values))
    # Theirs has Huber's loss, which a rare fall moves less than its share.
    settings = Hyperparameters(
        n_steps=1500, discount=0.8, critic_learning_rate=5e-4, batch_size=256, polyak=0.1, hidden_sizes=(64, 64),
        loss_function="smooth_l1", compile="no",
    )  # fmt: skip
    policy = Policy(clone.predict)
    evaluators = fitted_q_evaluation(policy, data, Spaces(Box((16,)), Discrete(2)), settings)
    ours = fitted_value(evaluators, data[: int(ends[-1]) + 1], policy)
    assert theirs.value == pytest.approx(ours.value, rel=0.02)
    # Single fits of either differ by as much as a hundredth.
    gap = difference(ours, theirs)
    assert gap.low < 0.0 < gap.high
