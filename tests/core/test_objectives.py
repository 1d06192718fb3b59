"""The tables of objectives are open: an entry that is made here works in every loss, adapter, file and command."""

import copy
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import SPACES, make_agent, make_dataset
from requirements import needs_compiler
from strangers import good, host_of
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

import iql_plugins
from iql_plugins import plugins
from iql_plugins.config import IQLConfig
from iql_plugins.losses import objectives
from iql_plugins.losses.objectives import Option, PolicyExtraction, Quantities, ValueObjective, exponential_weight
from iql_plugins.networks import critic, gaussian_actor, value_function
from iql_plugins.ranges import POSITIVE, SHARE
from iql_plugins.training.agent import Agent, build_loss
from iql_plugins.training.gradients import LossGradients


def quantile_regression(of: Quantities) -> torch.Tensor:
    side = (of.setting("level") - (of.advantage.detach() < 0).to(of.advantage.dtype)).abs()
    return side * of.advantage.abs()


def cloned(of: Quantities) -> torch.Tensor:
    return -of.setting("strength") * of.log_prob


LEVEL = Option(0.75, SHARE, "of the quantile")
TILTED = ValueObjective("tilted", quantile_regression, exponential_weight, {"level": LEVEL})
CLONED = PolicyExtraction("cloned", cloned, {"strength": Option(1.0, POSITIVE, "of the cloning")})
OPTIONS: dict[str, Any] = {
    "value_objective": "tilted",
    "policy_extraction": "cloned",
    "objective_options": {"level": 0.5, "strength": 2.0},
}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two entries, in tables that are this test's alone."""
    monkeypatch.setattr(objectives, "_OF_PLUGINS", set())
    monkeypatch.setattr(objectives, "_TABLES", {kind: dict(table) for kind, table in objectives._TABLES.items()})
    entries: list[Any] = [*entry_points(group=plugins.PROJECT), good(iql_objectives=lambda: [TILTED, CLONED])]
    host = host_of(*entries)
    monkeypatch.setattr(plugins, "host", lambda: host)


def test_the_loss_composes_the_two_that_it_is_given() -> None:
    spaces = SPACES["continuous"]
    plain, loss = (build_loss(spaces, IQLConfig(hidden_sizes=(8,), **given)) for given in ({}, OPTIONS))
    loss.load_state_dict(plain.state_dict())
    for each in (plain, loss):
        each.target_updater_attached()
    batch = make_dataset(spaces, 32).to(next(loss.parameters()).device)
    with torch.no_grad():
        outputs, expected = loss(batch.clone()), plain(batch)
        of = loss._quantities(batch, {}, loss.in_keys)
        torch.testing.assert_close(outputs["loss_value"], 0.5 * of.advantage.abs().mean())
        torch.testing.assert_close(outputs["loss_actor"], -2.0 * of.log_prob.mean())
        torch.testing.assert_close(outputs["loss_qvalue"], expected["loss_qvalue"])
        loss.objective_options = {}
        torch.testing.assert_close(loss.actor_loss(batch)[0], -of.log_prob.mean())
        levels = torch.where(of.advantage < 0, 0.25, 0.75)
        torch.testing.assert_close(loss.value_loss(batch)[0], (levels * of.advantage.abs()).mean())


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("first", ["mask", "target_q", "q", "target", "log_prob", "policy_q", "weight", "value"])
def test_quantities_can_be_asked_for_in_any_order(first: str, kind: str) -> None:
    spaces = SPACES[kind]
    loss = build_loss(spaces, IQLConfig(hidden_sizes=(8,)))
    loss.target_updater_attached()
    batch = make_dataset(spaces, 32).to(next(loss.parameters()).device)
    if kind == "discrete":
        batch["action"] -= spaces.action.start
    with torch.no_grad():
        usual = loss._quantities(batch, {}, loss.in_keys)
        expected = [usual.advantage, usual.log_prob, usual.q, usual.target, getattr(usual, first)]
        of = loss._quantities(batch, {}, loss.in_keys)
        got = getattr(of, first)
        for ours, theirs in zip([of.advantage, of.log_prob, of.q, of.target, got], expected, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_no_gradient_of_the_policys_reaches_v_through_a_weight() -> None:
    """Also not where two plugins forgot to stop it."""
    objectives.register(ValueObjective("leaking", quantile_regression, lambda of: of.advantage.exp(), {"level": LEVEL}))
    objectives.register(PolicyExtraction("weighing", lambda of: -of.weight * of.log_prob))
    given = {"value_objective": "leaking", "policy_extraction": "weighing"}
    loss = build_loss(SPACES["continuous"], IQLConfig(hidden_sizes=(8,), **given))
    loss.target_updater_attached()
    batch = make_dataset(SPACES["continuous"], 8).to(next(loss.parameters()).device)
    loss.select_out_keys("loss_actor")(batch)["loss_actor"].backward()
    assert all(parameter.grad is None for parameter in loss.value_network.parameters())
    assert any(parameter.grad is not None for parameter in loss.actor_network.parameters())


# DDPG+BC


def cloning_loss(kind: str, *, cloned: float = 0.0, **hyperparameters: Any) -> iql_plugins.IQLLoss:
    """In float64, with as much behaviour cloning."""
    given = {"policy_extraction": "ddpg_bc", "objective_options": {"bc_coefficient": cloned}} | hyperparameters
    loss = build_loss(SPACES[kind], IQLConfig(hidden_sizes=(8,), **given)).double()
    loss.target_updater_attached()
    return loss


def double_batch(kind: str, loss: torch.nn.Module) -> TensorDict:
    batch = make_dataset(SPACES[kind], 16).to(next(loss.parameters()).device)
    return batch.apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def worth_of_the_policy(loss: iql_plugins.IQLLoss, batch: TensorDict) -> torch.Tensor:
    """``[B]`` min Q of what the policy does, from what users see of a loss."""
    distribution = loss.actor_network.get_dist(batch.clone())
    if not isinstance(loss, iql_plugins.DiscreteIQLLoss):
        return loss.qvalues(batch.clone().set("action", distribution.mode)).amin(0)
    probabilities = distribution.probs
    q = [loss.qvalues(batch.clone().set("action", torch.full_like(batch["action"], a))).amin(0) for a in range(4)]
    return (torch.stack(q, -1) * probabilities).sum(-1)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("squashed", [False, True])
@pytest.mark.parametrize(("n_critics", "randomness"), [(1, "different"), (2, "different"), (3, "same")])
def test_the_policy_climbs_the_critics_and_nothing_else_moves(
    kind: str, squashed: bool, n_critics: int, randomness: str
) -> None:
    loss = cloning_loss(kind, squashed=squashed, n_critics=n_critics)
    # What is climbed are the critics, not their targets. Of these multiples would not show: Q is divided by its size.
    loss.target_qvalue_network_params.data.add_(1.0)
    # The same noise for all critics is a vmap, on a CPU as well.
    loss.set_vmap_randomness(randomness)
    batch = double_batch(kind, loss)
    if kind == "discrete":
        batch["action"] -= 1
    worth = worth_of_the_policy(loss, batch).detach()
    scale = worth.abs().mean() + 1e-6
    outputs = loss(batch.clone())
    torch.testing.assert_close(outputs["loss_actor"], -worth.mean() / scale)
    outputs["loss_actor"].backward()
    for network in (loss.qvalue_network, loss.value_network):
        assert all(parameter.grad is None for parameter in network.parameters())
    # By finite differences, of a weight that matters.
    weight = next(parameter for parameter in loss.actor_network.parameters() if parameter.ndim == 2)
    assert weight.grad is not None
    index, step = int(weight.grad.abs().argmax()), 1e-6
    means = []
    with torch.no_grad():
        for change in (step, -2 * step):
            weight.view(-1)[index] += change
            means.append(worth_of_the_policy(loss, batch).mean())
    slope = (means[0] - means[1]) / (2 * step)
    torch.testing.assert_close(weight.grad.view(-1)[index], -slope / scale, rtol=1e-5, atol=1e-7)
    assert slope != 0.0


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_what_is_masked_counts_neither_in_a_loss_nor_in_what_it_takes_of_the_whole_batch(kind: str) -> None:
    for value_objective in objectives._TABLES[ValueObjective]:
        loss = cloning_loss(kind, cloned=0.5, value_objective=value_objective)
        batch = double_batch(kind, loss)
        if kind == "discrete":
            batch["action"] -= 1
        expected = loss(batch[:8].clone())
        batch["observation"][8:] = float("nan")
        batch["collector", "mask"] = torch.arange(16, device=batch["action"].device) < 8
        torch.testing.assert_close(loss(batch)["loss_actor"], expected["loss_actor"])
        torch.testing.assert_close(loss(batch)["loss_value"], expected["loss_value"])


@pytest.mark.parametrize("separate_losses", [False, True])
def test_what_the_policy_shares_with_the_critics_it_trains_as_its_own(separate_losses: bool) -> None:
    """By way of its action, not of what the action is worth."""
    gradients = []
    for copied in (False, True):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(3, 8)
        of_critic = copy.deepcopy(encoder) if copied else encoder
        actor = gaussian_actor(3, 2)
        actor.module[0].module.body = torch.nn.Sequential(encoder, torch.nn.Tanh(), torch.nn.Linear(8, 2))
        qvalue = critic(8, 2, hidden_sizes=(8,))
        joined = TensorDictModule(Joined(of_critic, qvalue.module), ["observation", "action"], ["state_action_value"])
        loss = iql_plugins.IQLLoss(
            actor,
            joined,
            value_function(3, hidden_sizes=(8,)),
            num_qvalue_nets=1,
            policy_extraction="ddpg_bc",
            separate_losses=separate_losses,
        )
        loss.target_updater_attached()
        batch = make_dataset(SPACES["continuous"], 8).to(next(loss.parameters()).device)
        loss(batch)["loss_actor"].backward()
        gradients.append(encoder.weight.grad)
        assert all(parameter.grad is None for parameter in joined.module.head.parameters())
    torch.testing.assert_close(*gradients)


class Joined(torch.nn.Module):
    """A critic behind an encoder of observations."""

    def __init__(self, encoder: torch.nn.Module, head: torch.nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        worth: torch.Tensor = self.head(self.encoder(observation), action)
        return worth


def test_a_policy_that_is_not_weighed_has_healthy_weights() -> None:
    loss = cloning_loss("continuous", temperature=1e6)
    health = loss.health(double_batch("continuous", loss))
    assert health.effective_sample_size == 1.0
    assert health.share_at_max_weight == 0.0


def test_critics_that_cannot_be_asked_about_the_policys_action_are_named() -> None:
    agent = make_agent("continuous")
    plain = TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["state_action_value"])
    networks = agent.loss.actor_network, plain, agent.loss.value_network
    batch = make_dataset(SPACES["continuous"], 8).to(agent.device)
    loss = iql_plugins.IQLLoss(*networks, policy_extraction="ddpg_bc").to(agent.device)
    loss.target_updater_attached()
    with pytest.raises(ValueError, match="qvalue_network must read 'action', it reads 'observation'"):
        loss(batch)
    wide = gaussian_actor(3, 1, hidden_sizes=(4,))
    loss = iql_plugins.IQLLoss(wide, critic(3, 2), value_function(3), policy_extraction="ddpg_bc").to(agent.device)
    loss.target_updater_attached()
    with pytest.raises(ValueError, match=r"action of shape \(8, 1\) in the place of 'action', .* got \(8, 2\)"):
        loss(batch)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_follows_what_is_changed() -> None:
    spaces = SPACES["continuous"]
    loss = build_loss(spaces, IQLConfig(hidden_sizes=(8,)))
    loss.target_updater_attached()
    batch = make_dataset(spaces, 16).to(next(loss.parameters()).device)
    keywords = {iql_plugins.keys.flat_name(key): tensor for key, tensor in batch.items(True, True)}
    compiled, eager = LossGradients(loss, compile=True), LossGradients(loss)
    seen = set()
    for changed in ({}, {"value_objective": "tilted"}, {"objective_options": {"level": 0.1}}, {"max_weight": 0.5}):
        for name, value in changed.items():
            setattr(loss, name, value)
        torch.testing.assert_close(compiled(keywords), eager(keywords))
        seen.add(tuple(output.item() for output in compiled(keywords)))
    loss.objective_options["level"] = 0.9
    torch.testing.assert_close(compiled(keywords), eager(keywords))
    assert len(seen) == 4


def test_an_agent_trains_with_them_and_its_file_knows_them(tmp_path: Path) -> None:
    agent = make_agent("continuous", **OPTIONS)
    agent.fit(make_dataset(SPACES["continuous"]).cpu(), 3)
    agent.save(tmp_path / "agent.safetensors")
    again = Agent.load(tmp_path / "agent.safetensors")
    assert again.config.of("loss") == agent.config.of("loss")
    assert again.config.objective_options == OPTIONS["objective_options"]
    assert again.loss.policy_extraction == "cloned"
    assert again.loss.health(**keywords_of("continuous")).effective_sample_size > 0
    assert IQLConfig.from_json(json.loads(json.dumps(agent.config.to_json()))) == agent.config


def keywords_of(kind: str) -> dict[str, torch.Tensor]:
    batch = make_dataset(SPACES[kind], 8).cpu()
    return {iql_plugins.keys.flat_name(key): tensor for key, tensor in batch.items(True, True)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"value_objective": "tilt"}, "value_objective must be one of 'expectile', .*'tilted', got 'tilt'"),
        ({"policy_extraction": "sac"}, "policy_extraction must be one of 'awr', .*'cloned', got 'sac'"),
        (
            {"objective_options": {"level": 0.5}},
            "objective_options has 'level': those of 'expectile' and 'awr' are noise_threshold",
        ),
        ({**OPTIONS, "objective_options": {"lvl": 1.0}}, "'lvl': those of 'tilted' and 'cloned' are level, strength"),
        ({**OPTIONS, "objective_options": {"level": 1.5}}, r"level must be in \[0, 1\], got 1.5"),
    ],
)
def test_what_is_no_objective_or_option_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IQLConfig(**given)
    agent = make_agent("continuous")
    networks = agent.loss.actor_network, agent.loss.get_stateful_net("qvalue_network"), agent.loss.value_network
    with pytest.raises(ValueError, match=message):
        iql_plugins.IQLLoss(*networks, num_qvalue_nets=1, **given)


def test_a_name_is_taken_once() -> None:
    objectives.register(ValueObjective("mine", quantile_regression, exponential_weight))
    with pytest.raises(ValueError, match="the value_objective 'mine' is there already: take another name"):
        objectives.register(ValueObjective("mine", quantile_regression, exponential_weight))
    with pytest.raises(TypeError, match="must be a ValueObjective or a PolicyExtraction, got str"):
        objectives.register("mine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="softened_by of 'soft' must be one of its options, got 'levle'"):
        objectives.register(
            ValueObjective("soft", quantile_regression, exponential_weight, {"level": LEVEL}, softened_by="levle")
        )


def test_a_plugin_that_breaks_its_word_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    again = ValueObjective("expectile", quantile_regression, exponential_weight)
    entries = [
        good("a", iql_objectives=lambda: [again]),
        good("b", iql_objectives=lambda: 3),
        good("c", iql_objectives=lambda: [TILTED]),
        good("d", iql_objectives=lambda: [TILTED]),
    ]
    host = host_of(*entries)
    monkeypatch.setattr(plugins, "host", lambda: host)
    assert objectives.value_objective("tilted") is TILTED
    errors = {name: info.error for name, info in host.available().items()}
    assert "the value_objective 'expectile' is there already" in (errors["a"] or "")
    assert "failed in iql_objectives()" in (errors["b"] or "")
    assert errors["c"] is None
    assert "the value_objective 'tilted' is there already" in (errors["d"] or "")


def test_a_wrong_name_blames_nobody_whose_entries_are_in_use() -> None:
    assert objectives.value_objective("tilted").name == "tilted"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be one of 'expectile', .*'tilted', got 'typo'"):
            objectives.value_objective("typo")
    assert plugins.host().available()["good"].error is None


def test_names_of_options_are_nobody_elses() -> None:
    objectives._check(objectives.SHIPPED, set())
    own = {"temperature": LEVEL}
    with pytest.raises(ValueError, match="an option of 'hot' has the name of a hyper-parameter: temperature"):
        objectives.register(ValueObjective("hot", quantile_regression, exponential_weight, own))
    objectives.register(PolicyExtraction("level", cloned, {"level": LEVEL}))
    with pytest.raises(ValueError, match="'tilted' and 'level' both have the option level: they do not go together"):
        IQLConfig(value_objective="tilted", policy_extraction="level")


def test_options_are_a_mapping_and_each_ones_own() -> None:
    agent = make_agent("continuous", **OPTIONS)
    networks = agent.loss.actor_network, agent.loss.get_stateful_net("qvalue_network"), agent.loss.value_network
    with pytest.raises(ValueError, match=r"objective_options must be a mapping, got \[\('level', 1\)\]"):
        iql_plugins.IQLLoss(*networks, objective_options=[("level", 1)])  # type: ignore[arg-type]
    agent.loss.objective_options["level"] = 0.1
    agent.config.of("loss")["objective_options"]["level"] = 0.2
    assert agent.config.objective_options["level"] == 0.5


# Through every adapter


def test_tensors_train_with_them() -> None:
    from iql_tensor import IQL

    iql = IQL.build(SPACES["discrete"], hidden_sizes=(4,), compile="no", **OPTIONS)
    iql.update(make_dataset(SPACES["discrete"], 8))
    assert iql.agent.loss.value_objective == "tilted"


def test_torchrls_loss_takes_them() -> None:
    pytest.importorskip("torchrl")
    from iql_torchrl import IQL, IQLLoss

    algorithm = IQL.from_agent(make_agent("continuous", **OPTIONS))
    algorithm.fit(make_dataset(SPACES["continuous"]).cpu(), 2)
    assert isinstance(algorithm.loss, IQLLoss)
    assert algorithm.loss.objective_options == OPTIONS["objective_options"]


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_critics_are_asked_about_the_actions_of_torchrls_policies(kind: str) -> None:
    pytest.importorskip("torchrl")
    from tensordict.nn import NormalParamExtractor
    from torchrl.modules import OneHotCategorical, ProbabilisticActor, TanhNormal, ValueOperator

    from iql_torchrl import DiscreteIQLLoss, IQLLoss

    spaces = SPACES[kind]
    batch = make_dataset(spaces, 8).to(torch.empty(0).device)
    given = {"policy_extraction": "ddpg_bc", "objective_options": {"bc_coefficient": 0.0}}
    value = ValueOperator(torch.nn.Linear(3, 1), in_keys=["observation"])
    if kind == "discrete":
        batch["action"] = torch.nn.functional.one_hot(batch["action"].squeeze(-1) - 1, 4)
        linear = TensorDictModule(torch.nn.Linear(3, 4), ["observation"], ["logits"])
        actor = ProbabilisticActor(linear, in_keys=["logits"], distribution_class=OneHotCategorical)
        qvalue = TensorDictModule(torch.nn.Linear(3, 4), ["observation"], ["state_action_value"])
        loss: IQLLoss = DiscreteIQLLoss(actor, qvalue, value, action_space="one-hot", **given)
        with torch.no_grad():
            q = loss._frozen_critic_values(loss._reader.read(batch, ["observation"])).amin(0)
            worth = (q * linear(batch)["logits"].softmax(-1)).sum(-1)
    else:
        body = torch.nn.Sequential(torch.nn.Linear(3, 4), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(body, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            distribution_kwargs={"low": -2.0, "high": 5.0},
        )
        loss = IQLLoss(actor, critic(3, 2, hidden_sizes=(8,)), value, **given)
        with torch.no_grad():
            action = 1.5 + 3.5 * body(batch["observation"])[0].tanh()
            worth = loss.qvalues(batch.clone().set("action", action)).amin(0)
    loss.target_updater_attached()
    result = loss(batch)["loss_actor"]
    torch.testing.assert_close(result, -worth.mean() / (worth.abs().mean() + 1e-6), rtol=1e-4, atol=1e-4)
    result.backward()
    assert all(parameter.grad is not None for parameter in loss.actor_network.parameters())
    assert all(parameter.grad is None for parameter in loss.qvalue_network.parameters())


def test_stable_baselines3s_model_takes_them_saves_them_and_follows_changes(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    from iql_sb3 import IQL

    dataset = make_dataset(SPACES["continuous"]).cpu()
    model = IQL("MlpPolicy", None, dataset=dataset, batch_size=8, policy_kwargs={"net_arch": [4]}, **OPTIONS)
    model.learn_offline(2)
    assert model.policy.loss.value_objective == "tilted"
    model.objective_options["level"] = 0.9
    model.learn_offline(1)
    assert model.policy.loss.objective_options["level"] == 0.9
    model.save(tmp_path / "model.zip")
    again = IQL.load(tmp_path / "model.zip")
    assert again.config.of("loss") == model.config.of("loss")
    assert IQL.from_agent(again.to_agent()).config.of("loss") == model.config.of("loss")
    with pytest.raises(ValueError, match="value_objective must be one of"):
        IQL("MlpPolicy", None, dataset=dataset, value_objective="tilt")


def test_d3rlpys_algorithm_takes_them_and_its_file_knows_them(tmp_path: Path) -> None:
    d3rlpy = pytest.importorskip("d3rlpy")
    from d3rlpy_helpers import QUIET, config, dataset

    algorithm = config("continuous", **OPTIONS).create()
    algorithm.fit(dataset("continuous"), n_steps=2, n_steps_per_epoch=2, **QUIET)
    assert algorithm.impl.agent.loss.policy_extraction == "cloned"
    algorithm.save(tmp_path / "model.d3")
    again = d3rlpy.load_learnable(tmp_path / "model.d3")
    assert again.config.hyperparameters().of("loss") == algorithm.config.hyperparameters().of("loss")
    assert again.config.objective_options == OPTIONS["objective_options"]
    with pytest.raises(ValueError, match="policy_extraction must be one of"):
        config("continuous", policy_extraction="sac")


def test_the_command_line_trains_with_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    from iql_plugins.cli import main

    options = ["--n-steps", "3", "--env", "Pendulum-v1", "--episodes", "1", "--evaluation-episodes", "1"]
    options += ["--baseline", "none", "--compile", "no", "--hidden-sizes", "4", "--json"]
    chosen = ["--value-objective", "tilted", "--objective-options", "level", "0.5"]
    folder = tmp_path / "run"
    assert main(["train", "--run-dir", str(folder), *options, *chosen]) == 0
    assert Agent.load(folder / "policy.safetensors").loss.objective_options == {"level": 0.5}
    assert "error" not in json.loads(capfd.readouterr().out)
    config = folder / "config.json"
    before = json.loads(config.read_text())
    for changed in ({"objective_options": {"level": 0.9}}, {"value_objective": "expectile", "objective_options": {}}):
        document = json.loads(json.dumps(before))
        document["settings"]["hyperparameters"].update(changed)
        config.write_text(json.dumps(document))
        assert main(["train", "--resume", str(folder), "--json"]) == 2
        assert "in config.json" in json.loads(capfd.readouterr().out)["error"]
    assert main(["train", "--run-dir", str(tmp_path / "other"), *options, "--value-objective", "tilt"]) == 2
    assert "'tilted', got 'tilt'" in capfd.readouterr().err
