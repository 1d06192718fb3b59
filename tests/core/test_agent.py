"""Agents: acting, training, saving, loading, going on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import (
    NETWORKS,
    OBJECTIVES,
    ROWS,
    SPACES,
    draw,
    draw_nothing,
    make_agent,
    make_dataset,
    observations,
    same,
    weights,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.optim import SGD, Optimizer

from iql_plugins import IQLLoss, checkpoint
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.config import IQLConfig
from iql_plugins.losses.bootstrap import ValueEstimators
from iql_plugins.networks import critic, gaussian_actor, value_function
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training import agent as module
from iql_plugins.training import gradients
from iql_plugins.training.agent import Agent, build_loss
from iql_plugins.training.learner import Groups, Learner

STANDARDIZED = {"normalize_observations": True, "reward_scale": "return_range", "reward_shift": -1.0}


def custom_loss(spaces: Spaces = SPACES["continuous"], **hyperparameters: Any) -> IQLLoss:
    """A loss over networks that build_loss() does not make."""
    options = {"expectile": 0.7, "temperature": 3.0, "loss_function": "l2"} | hyperparameters
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    value = TensorDictModule(body, ["observation"], ["state_value"])
    return IQLLoss(gaussian_actor(3, 2, hidden_sizes=(8,)), critic(3, 2, hidden_sizes=(8,)), value, **options)


# Acting


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_are_the_environment_s_one_or_a_batch_of_them(kind: str, deterministic: bool) -> None:
    agent, space = make_agent(kind), SPACES[kind].action
    batch = observations(SPACES[kind], 5)
    many = agent.act(batch, deterministic)
    one = agent.act({name: t[0] for name, t in batch.items()} if isinstance(batch, dict) else batch[0], deterministic)
    if isinstance(space, Discrete):
        assert (many.shape, one.shape) == ((5,), ())
        assert many.min() >= space.start
        assert many.max() < space.start + space.n
    else:
        assert (many.shape, one.shape) == ((5, 2), (2,))
        low, high = torch.tensor(space.low), torch.tensor(space.high)
        assert ((many >= low) & (many <= high)).all()
    if deterministic:
        torch.testing.assert_close(many[0], one)


@pytest.mark.parametrize("kind", SPACES)
def test_numpy_in_is_numpy_out_and_the_same_action(kind: str) -> None:
    agent, batch = make_agent(kind), observations(SPACES[kind], 5)
    arrays = {n: t.cpu().numpy() for n, t in batch.items()} if isinstance(batch, dict) else batch.cpu().numpy()
    action = agent.act(arrays)
    assert isinstance(action, np.ndarray)
    np.testing.assert_allclose(action, agent.act(batch).cpu().numpy(), rtol=1e-6)
    one = agent.act({n: a[0] for n, a in arrays.items()} if isinstance(arrays, dict) else arrays[0])
    assert isinstance(one, int if SPACES[kind].discrete else np.ndarray)


def test_what_environments_return_is_taken() -> None:
    agent = make_agent("continuous")
    array = np.array([1.0, 2.0, 3.0])
    expected = agent.act(array.astype(np.float32))
    frozen = array.copy()
    frozen.flags.writeable = False
    for given in (array, frozen, array[::-1][::-1], array.astype(np.int64), [1.0, 2.0, 3.0]):
        np.testing.assert_array_equal(agent.act(given), expected)
    np.testing.assert_array_equal(agent.act(array[::-1]), agent.act(array[::-1].copy()))


def test_discrete_observations_are_numbers() -> None:
    agent = Agent(Spaces(Discrete(3, start=2), Discrete(2)), IQLConfig(hidden_sizes=(8,)), seed=0)
    one = agent.act(3)
    assert one == agent.act(np.int64(3)) == agent.act(torch.tensor(3)).item()
    assert agent.act(torch.tensor([2, 3, 4])).tolist()[1] == one
    assert agent.act(torch.tensor([[2], [3], [4]])).tolist()[1] == one
    for wrong in (1, 5):
        with pytest.raises(ValueError, match="observation must be from 2 to 4"):
            agent.act(wrong)
    with pytest.raises(ValueError, match=r"observation must be integers, got torch\.float32"):
        agent.act(torch.tensor(2.0))


def test_images_act_alike_with_channels_first_and_last() -> None:
    config = IQLConfig(hidden_sizes=(8,))
    first, last = (Agent(Spaces(Box(s, "uint8"), Discrete(4)), config, seed=0) for s in ((3, 36, 40), (36, 40, 3)))
    last.loss.load_state_dict(first.loss.state_dict())
    images = torch.randint(0, 256, (16, 3, 36, 40), dtype=torch.uint8)
    assert torch.equal(first.act(images), last.act(images.movedim(1, -1)))


@pytest.mark.parametrize(
    ("kind", "observation", "message"),
    [
        ("continuous", np.zeros(4), r"observation must have shape \(3,\), or that behind a batch's, got \(4,\)"),
        ("continuous", np.zeros((2, 2, 3)), r"observation must have shape \(3,\)"),
        ("dict", np.zeros(3), r"the observation must be a mapping of \['gear', 'speed'\]"),
        ("dict", {"speed": np.zeros((2, 2)), "gear": 0}, "must all have a batch dimension, or none"),
    ],
)
def test_an_observation_of_another_shape_is_refused(kind: str, observation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(kind).act(observation)


def test_a_missing_entry_of_an_observation_is_named() -> None:
    with pytest.raises(KeyError, match="the observation has no gear"):
        make_agent("dict").act({"speed": np.zeros(2)})


def test_a_dict_observation_may_be_a_tensordict_with_more_in_it() -> None:
    agent, batch = make_agent("dict"), observations(SPACES["dict"], 5)
    expected = agent.act(batch)
    assert torch.equal(agent.act(TensorDict(batch | {"more": torch.zeros(5)}, [5])), expected)


def test_acting_is_without_dropout_and_leaves_training_as_it_was() -> None:
    agent = make_agent("continuous", actor_dropout=0.5)
    first, *others = [m for m in agent.loss.actor_network.modules() if not any(True for _ in m.children())]
    first.eval()
    batch = draw(SPACES["continuous"].observation, 5)
    action = agent.act(batch)
    assert not action.requires_grad
    assert all(torch.equal(action, agent.act(batch)) for _ in range(3))
    assert not first.training
    assert all(other.training for other in others)


def test_actions_are_within_the_bounds_however_wide_the_policy() -> None:
    agent = make_agent("continuous")
    with torch.no_grad():
        agent.loss.actor_network[0].module.log_std.fill_(2.0)
    actions = agent.act(torch.randn(1000, 3), deterministic=False)
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 5.0])
    assert torch.equal(actions.amin(0), low)
    assert torch.equal(actions.amax(0), high)


def test_observations_are_normalised_before_the_policy_sees_them() -> None:
    dataset = make_dataset(SPACES["continuous"])
    dataset["observation"] = 100.0 + dataset["observation"]
    agent = make_agent("continuous", dataset, normalize_observations=True)
    plain = Agent(agent.spaces, agent.config, loss=agent.loss, seed=0)
    batch = dataset["observation"]
    expected = plain.act(agent.normalizers.observation("observation", batch))
    assert torch.equal(agent.act(batch), expected)
    assert not torch.equal(agent.act(batch), plain.act(batch))


# Building


def test_the_seed_makes_weights_and_batches_and_leaves_torch_s_random_state(kind: str) -> None:
    state = torch.get_rng_state()
    first, second, third = (Agent(SPACES[kind], IQLConfig(hidden_sizes=(8,)), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(third))
    draws = [torch.rand(3, generator=agent.generator, device=agent.device) for agent in (first, second, third)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_without_a_seed_agents_draw_different_batches() -> None:
    agents = [Agent(SPACES["continuous"], IQLConfig(hidden_sizes=(8,))) for _ in range(2)]
    first, second = (torch.rand(3, generator=agent.generator, device=agent.device) for agent in agents)
    assert not torch.equal(first, second)


def test_the_hyper_parameters_reach_the_loss() -> None:
    config = IQLConfig(
        expectile=0.9,
        temperature=0.5,
        max_weight=7.0,
        loss_function="l1",
        n_critics=3,
        discount=0.5,
        hidden_sizes=(4, 4),
        actor_dropout=0.25,
    )
    loss = build_loss(SPACES["continuous"], config)
    assert (loss.expectile, loss.temperature, loss.max_weight, loss.loss_function) == (0.9, 0.5, 7.0, "l1")
    assert loss.num_qvalue_nets == 3
    assert float(loss.value_estimator.gamma) == 0.5
    rates = {name: [m.p for m in net.modules() if isinstance(m, nn.Dropout)] for name, net in loss.named_children()}
    assert rates["actor_network_params"] == [0.25, 0.25]
    assert rates["value_network_params"] == rates["qvalue_network_params"] == []


def test_a_loss_with_other_hyper_parameters_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"built with expectile=0\.9, the configuration has 0\.7: both must be the same"
    ):
        Agent(SPACES["continuous"], IQLConfig(), loss=custom_loss(expectile=0.9))
    discounting = custom_loss().make_value_estimator(ValueEstimators.TD0, gamma=0.5)
    with pytest.raises(ValueError, match=r"built with discount=0\.5"):
        Agent(SPACES["continuous"], IQLConfig(), loss=discounting)


def test_the_discount_is_that_of_n_step_rewards() -> None:
    assert make_agent("continuous", discount=0.5).normalizers.discount == 0.5


def test_a_learner_of_another_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="the learner must train the agent's loss"):
        Agent(SPACES["continuous"], IQLConfig(), loss=custom_loss(), learner=Learner(custom_loss()))


def test_what_is_resolved_is_what_is_kept() -> None:
    assert make_agent("continuous", compile="auto").config.compile == "no"


# Training


@pytest.mark.parametrize("kind", SPACES)
def test_fit_takes_the_steps_and_counts_them(kind: str) -> None:
    dataset = make_dataset(SPACES[kind])
    agent, seen = make_agent(kind, dataset), []
    before = weights(agent)
    for _ in range(2):
        agent.fit(dataset, 3, seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert agent.learner.step_count == 6
    after = weights(agent)
    changed = {name.split("_")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"actor", "qvalue", "value", "target"}
    assert all(np.isfinite(value) for value in agent.learner.metrics().values())


def test_fit_leaves_out_what_the_loss_does_not_read() -> None:
    dataset = make_dataset(SPACES["continuous"])
    more = dataset.clone().update({"index": torch.arange(ROWS), "info": {"text": torch.zeros(ROWS, 100)}})
    agents = []
    for given in (dataset, more):
        agents.append(make_agent("continuous", given))
        agents[-1].fit(given, 3)
    assert same(*map(weights, agents))


def test_a_mapped_dataset_trains_as_one_in_memory(tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["continuous"])
    agents = []
    for given in (dataset, dataset.memmap(tmp_path)):
        agents.append(make_agent("continuous", given, normalize_observations=True))
        agents[-1].fit(given, 5)
    assert same(*map(weights, agents))


def test_a_dataset_that_does_not_fit_is_refused_before_anything_changes() -> None:
    agent = make_agent("continuous")
    before = weights(agent)
    with pytest.raises(
        ValueError,
        match=r"'observation' of the dataset has shape \(36, 36, 3\)|has no 'observation'|the dataset has no",
    ):
        agent.fit(make_dataset(SPACES["dict"]), 1)
    with pytest.raises(ValueError, match="the dataset is empty"):
        agent.fit(make_dataset(SPACES["continuous"])[:0], 1)
    assert same(before, weights(agent))
    assert agent.learner.step_count == 0


def test_time_limits_bootstrap_and_terminal_states_do_not() -> None:
    dataset = make_dataset(SPACES["continuous"])
    dataset["next", "reward"].zero_()
    dataset["next", "done"].fill_(True)
    means = []
    for terminated in (False, True):
        dataset["next", "terminated"].fill_(terminated)
        agent = make_agent("continuous", reward_shift=0.0, critic_learning_rate=0.0, value_learning_rate=0.0)
        with torch.no_grad():
            for parameter in agent.loss.qvalue_network.parameters():
                parameter.zero_()
            *_, bias = agent.loss.value_network.parameters()
            bias.fill_(10.0)
        agent.fit(dataset, 1)
        means.append(agent.learner.metrics()["loss_qvalue"])
    assert means[0] > 100.0
    assert means[1] == 0.0


# Saving and loading


@pytest.mark.parametrize("kind", ["continuous", "discrete", "dict"])
@pytest.mark.parametrize("options", [{}, *OBJECTIVES.values(), *NETWORKS.values()], ids=str)
def test_a_training_that_was_saved_goes_on_as_if_it_had_not_stopped(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    dataset, path = make_dataset(SPACES[kind]), tmp_path / "agent.safetensors"
    options = STANDARDIZED | options | {"actor_dropout": 0.3, "max_grad_norm": 1.0, "n_steps": 12, "polyak": 0.25}
    whole, first = (make_agent(kind, dataset, **options) for _ in range(2))
    whole.fit(dataset, 15)
    first.fit(dataset, 6)
    first.save(path)
    torch.manual_seed(99)
    second = Agent.load(path, device=first.device)
    assert second.config == whole.config
    assert second.spaces == whole.spaces
    assert second.learner.step_count == 6
    second.fit(dataset, 9)
    assert same(weights(whole), weights(second))
    assert same(dict(whole.normalizers.state_dict()), dict(second.normalizers.state_dict()))
    assert torch.equal(whole.generator.get_state(), second.generator.get_state())
    batch = observations(SPACES[kind], 5)
    assert torch.equal(whole.act(batch), second.act(batch))


@pytest.mark.parametrize("kind", SPACES)
def test_an_agent_is_loaded_without_drawing_what_the_file_has(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(kind)
    agent.save(tmp_path / "x")
    draw_nothing(monkeypatch)
    state = torch.get_rng_state()
    loaded = Agent.load(tmp_path / "x", device=agent.device)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(loaded), weights(agent))
    with pytest.raises(AssertionError, match="weights are drawn"):
        make_agent(kind)


def test_a_checkpoint_of_a_release_with_fewer_hyper_parameters_has_the_defaults() -> None:
    agent = make_agent("continuous")
    document, tensors = agent.state()
    for name in NETWORKS["all"]:
        del document["config"][name]
    loaded = Agent.from_state(document, tensors, name="agent", device=agent.device)
    assert loaded.config == agent.config
    assert same(weights(loaded), weights(agent))


def test_agents_that_go_on_upon_another_kind_of_device_draw_batches_of_their_own() -> None:
    draws = []
    for seed, steps in ((0, 0), (1, 0), (0, 7), (0, 7)):
        agent = Agent(SPACES["continuous"], IQLConfig(hidden_sizes=(8,)), seed=seed)
        agent.learner.step_count = steps
        document, tensors = agent.state()
        loaded = Agent.from_state(document | {"generator": "another"}, tensors, name="agent")
        draws.append(tuple(torch.rand(3, generator=loaded.generator).tolist()))
    assert len(set(draws[:3])) == 3
    assert draws[2] == draws[3]


def test_a_traced_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)
    for place in (gradients, module):
        monkeypatch.setattr(place, "compiler_available", lambda device: True)
    dataset, path = make_dataset(SPACES["continuous"]), tmp_path / "agent.safetensors"
    whole, first = (make_agent("continuous", dataset, actor_dropout=0.3, compile="yes") for _ in range(2))
    whole.fit(dataset, 10)
    first.fit(dataset, 4)
    first.save(path)
    second = Agent.load(path, device=first.device)
    assert second.learner.compiled
    second.fit(dataset, 6)
    assert same(weights(whole), weights(second))


def test_the_targets_are_resumed_and_not_copied_from_the_critics(tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["continuous"])
    agent = make_agent("continuous", dataset, critic_learning_rate=0.1)
    agent.fit(dataset, 3)
    agent.save(tmp_path / "x")
    loss = Agent.load(tmp_path / "x").loss
    networks = (loss.target_qvalue_network_params, loss.qvalue_network_params)
    pairs = zip(*(network.values(True, True) for network in networks), strict=True)
    assert not any(torch.equal(target, source) for target, source in pairs)
    assert same(weights(agent), {name: tensor.to(agent.device) for name, tensor in loss.state_dict().items()})


def test_what_was_changed_on_the_way_is_saved(tmp_path: Path) -> None:
    agent = make_agent("continuous")
    agent.loss.expectile, agent.loss.temperature = 0.9, 1.5
    agent.loss.make_value_estimator(ValueEstimators.TD0, gamma=0.5)
    agent.learner.max_grad_norm = 2.0
    agent.learner.set_learning_rate("actor", 0.125)
    agent.learner.set_learning_rate("value", 0.25)
    agent.extra["adapter"] = {"version": 3}
    agent.save(tmp_path / "x")
    loaded = Agent.load(tmp_path / "x")
    assert (loaded.loss.expectile, loaded.loss.temperature) == (0.9, 1.5)
    assert (loaded.config.expectile, loaded.config.discount) == (0.9, 0.5)
    assert float(loaded.loss.value_estimator.gamma) == 0.5
    assert loaded.learner.max_grad_norm == 2.0
    assert loaded.learner.base_rates() == {"actor": 0.125, "critic": 3e-4, "value": 0.25}
    assert loaded.extra == {"adapter": {"version": 3}}


def test_networks_of_ones_own_are_named_and_loaded_into_a_loss(tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["continuous"])
    config = IQLConfig(hidden_sizes=(8,), batch_size=8, compile="no")
    agent = Agent(SPACES["continuous"], config, loss=custom_loss(), seed=0)
    assert agent.custom_parts() == ["value_network"]
    agent.fit(dataset.to(agent.device), 2)
    agent.save(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"value_network of .* are not the default ones: pass loss="):
        Agent.load(tmp_path / "x")
    loss = custom_loss()
    loaded = Agent.load(tmp_path / "x", loss=loss)
    assert loaded.loss is loss
    assert same(weights(agent), weights(loaded))


def test_what_shapes_and_names_do_not_tell_makes_a_network_ones_own() -> None:
    config = IQLConfig(hidden_sizes=(8,))

    def parts(actor: dict[str, Any], **options: Any) -> list[str]:
        hyperparameters = {"expectile": 0.7, "temperature": 3.0, "loss_function": "l2"}
        sizes = {"hidden_sizes": (8,)}
        actor_network = gaussian_actor(3, 2, **sizes, **actor)
        loss = IQLLoss(actor_network, critic(3, 2, **sizes), value_function(3, **sizes), **hyperparameters, **options)
        return Agent(SPACES["continuous"], config, loss=loss).custom_parts()

    assert parts({}) == []
    assert parts({"log_std_range": (-20.0, 2.0)}) == ["actor_network"]
    assert parts({"squashed": True}) == ["actor_network"]
    assert parts({"low": -2.0}) == ["actor_network"]
    assert parts({"dropout": 0.1}) == ["actor_network"]
    assert parts({}, reduction="sum") == ["reduction"]


def test_optimisers_of_ones_own_are_asked_for(tmp_path: Path) -> None:
    def sgd(groups: Groups) -> list[Optimizer]:
        return [SGD([group], momentum=0.9) for group in groups]

    dataset = make_dataset(SPACES["continuous"])
    config = IQLConfig(n_steps=10, compile="no", hidden_sizes=(8,), batch_size=8)
    whole, first = (
        Agent(
            SPACES["continuous"],
            config,
            loss=loss,
            learner=Learner.from_config(loss, config, make_optimizers=sgd),
            seed=0,
        )
        for loss in (build_loss(SPACES["continuous"], config) for _ in range(2))
    )
    first.loss.load_state_dict(whole.loss.state_dict())
    whole.fit(dataset, 6)
    first.fit(dataset, 3)
    first.save(tmp_path / "x")
    with pytest.raises(CheckpointError, match="the state has 3 optimisers, the learner 1"):
        Agent.load(tmp_path / "x")
    second = Agent.load(tmp_path / "x", make_optimizers=sgd)
    second.fit(dataset, 3)
    assert same(weights(whole), weights(second))


def test_a_training_that_was_compiled_loads_where_there_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (gradients, module):
        monkeypatch.setattr(place, "compiler_available", lambda device: True)
    make_agent("continuous", compile="yes").save(tmp_path / "x")
    for place in (gradients, module):
        monkeypatch.setattr(place, "compiler_available", lambda device: False)
    loaded = Agent.load(tmp_path / "x")
    assert loaded.config.compile == "no"
    loaded.fit(make_dataset(SPACES["continuous"]), 1)


def forged(path: Path, change: Any) -> None:
    """Writes the checkpoint anew with something changed, its checksum right."""
    document, tensors = checkpoint.read(path)
    change(document, tensors)
    checkpoint.write(path, document, tensors)


BROKEN = {
    "no configuration": (lambda d, t: d.pop("config"), "does not hold a whole agent: 'config'"),
    "an unknown hyper-parameter": (lambda d, t: d["config"].update(tau=0.7), "tau: no hyper-parameter"),
    "a value out of range": (lambda d, t: d["config"].update(expectile=2.0), "expectile must be in"),
    "other spaces": (
        lambda d, t: d["spaces"]["observation"].update(box=[4]),
        "exp_avg of parameter|other networks than the default",
    ),
    "a missing weight": (
        lambda d, t: t.pop(next(n for n in t if n.startswith("loss.actor"))),
        "does not fit this loss",
    ),
    "a missing normaliser": (lambda d, t: t.pop("normalizers.reward_scale"), "reward_scale"),
    "a missing moment": (lambda d, t: t.pop(next(n for n in t if "exp_avg" in n)), "the checkpoint has no tensor"),
    "a missing optimiser": (lambda d, t: d["learner"]["optimizers"].clear(), "the state has 0 optimisers"),
    "no random state": (lambda d, t: t.pop("generator"), "generator"),
    "a short random state": (lambda d, t: t.update(generator=t["generator"][:7].clone()), "whole agent"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_holds_no_whole_agent_is_refused_and_leaves_the_loss(case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    dataset, path = make_dataset(SPACES["continuous"]), tmp_path / "x"
    agent = make_agent("continuous", dataset)
    agent.fit(dataset, 2)
    agent.save(path)
    forged(path, change)
    mine = make_agent("continuous").loss
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    for loss in (None, mine):
        with pytest.raises(CheckpointError, match=message):
            Agent.load(path, loss=loss, device=agent.device)
    assert same(before, dict(mine.state_dict()))


def test_a_loss_that_does_not_fit_the_file_is_refused(tmp_path: Path) -> None:
    make_agent("continuous").save(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"the loss was built with temperature=1\.0"):
        Agent.load(tmp_path / "x", loss=custom_loss(temperature=1.0))
    with pytest.raises(CheckpointError, match=r"other networks than the default ones in \[\], the loss in \['value_"):
        Agent.load(tmp_path / "x", loss=custom_loss())


def test_an_unknown_device_is_no_fault_of_the_file(tmp_path: Path) -> None:
    make_agent("continuous").save(tmp_path / "x")
    with pytest.raises(RuntimeError, match="nodevice") as caught:
        Agent.load(tmp_path / "x", device="nodevice")
    assert not isinstance(caught.value, CheckpointError)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    agent, path = make_agent("continuous"), tmp_path / "x"
    agent.save(path)
    before = path.read_bytes()
    agent.extra["value"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        agent.save(path)
    assert path.read_bytes() == before


def test_agents_work_in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        dataset = make_dataset(SPACES["dict"])
        agent = make_agent("dict", dataset, **STANDARDIZED)
        agent.fit(dataset, 2)
        assert agent.act(observations(SPACES["dict"], 5)).dtype == torch.float64
        assert {parameter.dtype for parameter in agent.loss.parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)
