"""Code that reaches into an off-policy algorithm's networks: actor, critics, their targets, extractors, optimisers."""

import copy
import csv
import gc
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")

from agents import SPACES, draw_nothing, make_agent, make_dataset
from gymnasium import spaces
from sb3_helpers import NETWORKS, SMALL, RandomEnv, SmallPolicy, Widened
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import polyak_update
from torch import nn
from torch.optim import SGD, Optimizer

from iql_plugins.data import load_dataset
from iql_sb3 import IQL, IQLPolicy
from iql_sb3.files import load_agent
from iql_sb3.policies import Actor, Critic
from iql_sb3.spaces import layout_spaces

BOUNDED = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([5.0, 0.1], np.float32))
IMAGES = spaces.Box(0, 255, (3, 36, 36), np.uint8)


def vectors(**kwargs: Any) -> IQL:
    """A model of Box observations and actions."""
    return IQL(
        "MlpPolicy", RandomEnv(spaces.Box(-1.0, 1.0, (3,)), BOUNDED), **{"policy_kwargs": NETWORKS, **SMALL, **kwargs}
    )


def images(action_space: Any = BOUNDED, **policy_kwargs: Any) -> IQL:
    """A model of images."""
    policy_kwargs = {**NETWORKS, "features_extractor_kwargs": {"features_dim": 8}, **policy_kwargs}
    return IQL("CnnPolicy", RandomEnv(IMAGES, action_space), policy_kwargs=policy_kwargs, **SMALL)


def discrete() -> IQL:
    return IQL("MlpPolicy", RandomEnv(spaces.Discrete(4), spaces.Discrete(3)), policy_kwargs=NETWORKS, **SMALL)


def normalized() -> IQL:
    kwargs = {**SMALL, "policy_kwargs": NETWORKS, "dataset": load_dataset("pendulum-v1-sac")[:200]}
    return IQL("MlpPolicy", "Pendulum-v1", normalize_observations=True, **kwargs)


MODELS = {"vectors": vectors, "images": images, "discrete": discrete, "normalized": normalized}


def logged() -> Any:
    """Transitions of the environment of :func:`vectors`, the same ones whenever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_dataset(layout_spaces(spaces.Box(-1.0, 1.0, (3,)), BOUNDED), 50).cpu()


def samples(model: IQL, count: int = 5) -> Any:
    model.observation_space.seed(0)
    return np.stack([model.observation_space.sample() for _ in range(count)])


def assert_equal(ours: Any, theirs: Any) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize("kind", MODELS)
def test_an_actor_is_a_policy_that_predicts_and_is_saved_alone(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    observations = samples(model)
    expected, _ = model.predict(observations, deterministic=True)
    model.actor.save(tmp_path / "actor")
    loaded = Actor.load(tmp_path / "actor")
    loaded.save(tmp_path / "again")
    for actor in (model.actor, loaded, Actor.load(tmp_path / "again")):
        assert isinstance(actor, BasePolicy)
        np.testing.assert_array_equal(actor.predict(observations, deterministic=True)[0], expected)
        assert actor.observation_space == model.observation_space
    assert model.actor.device == model.device
    model.actor.set_training_mode(True)
    assert model.actor.training
    model.policy.set_training_mode(False)
    assert not model.actor.training
    assert not model.critic.training


@pytest.mark.parametrize("name", ["critic", "critic_target"])
@pytest.mark.parametrize("n_critics", [1, 2])
def test_critics_are_saved_alone(name: str, n_critics: int, tmp_path: Path) -> None:
    model = vectors(policy_kwargs={**NETWORKS, "n_critics": n_critics}).learn(14)
    critic = getattr(model, name)
    observations, actions = torch.as_tensor(samples(model), device=model.device), torch.zeros(5, 2, device=model.device)
    critic.save(tmp_path / "critic")
    assert_equal(Critic.load(tmp_path / "critic")(observations, actions), critic(observations, actions))


@pytest.mark.parametrize("share", [False, True])
def test_targets_have_the_parameters_of_the_critics_and_follow_them(share: bool) -> None:
    model = images(share_features_extractor=share)
    names, targets = zip(*model.critic_target.named_parameters(), strict=True)
    assert names == tuple(name for name, _ in model.critic.named_parameters())
    assert model.critic_target.device == model.device
    for target, parameter in zip(model.critic_target.parameters(), model.critic.parameters(), strict=True):
        torch.testing.assert_close(target, parameter.expand_as(target))
    model.learn(9)
    before = [target.clone() for target in targets]
    model.tau = 0.0
    model.train(1)
    assert_equal(model.critic_target.parameters(), before)
    parameters = [parameter.clone() for parameter in model.critic.parameters()]
    model.tau, model.lr_schedule = 0.5, lambda _: 0.0
    model.train(1)
    assert_equal(model.critic.parameters(), parameters)
    assert not any(torch.equal(*pair) for pair in zip(model.critic_target.parameters(), before, strict=True))


def test_targets_can_be_moved_by_hand() -> None:
    model = vectors().learn(14)
    observations, actions = torch.as_tensor(samples(model), device=model.device), torch.zeros(5, 2, device=model.device)
    assert not torch.equal(model.critic(observations, actions)[0], model.critic_target(observations, actions)[0])
    polyak_update(model.critic.parameters(), model.critic_target.parameters(), 1.0)
    assert_equal(model.critic_target(observations, actions), model.critic(observations, actions))


# Features extractors


@pytest.mark.parametrize("n_critics", [1, 2])
@pytest.mark.parametrize("share", [False, True])
def test_features_extractors_can_be_called(n_critics: int, share: bool) -> None:
    model = images(share_features_extractor=share, n_critics=n_critics)
    pixels = torch.rand(5, 3, 36, 36, device=model.device)
    for network in (model.actor, model.critic, model.critic_target):
        assert isinstance(network.features_extractor, NatureCNN)
        assert network.features_extractor(pixels).shape == (5, 8)
    assert (model.actor.features_extractor is model.critic.features_extractor) == share
    assert_equal([model.critic_target.features_extractor(pixels)], [model.critic.features_extractor(pixels)])
    assert torch.equal(model.actor.features_extractor(pixels), model.critic.features_extractor(pixels)) == share
    # The features are those of the first critic, and what is done to them is done to it.
    with torch.no_grad():
        for parameter in model.critic.features_extractor.parameters():
            parameter.zero_()
    assert not model.critic.features_extractor(pixels).any()
    action = torch.zeros(5, 2, device=model.device)
    values = model.critic((255 * pixels).to(torch.uint8), action)
    assert all(torch.equal(value, value[:1].expand_as(value)) for value in values)


def test_observations_that_need_no_extractor_have_one_that_flattens_them() -> None:
    for share in (False, True):
        model = vectors(policy_kwargs={**NETWORKS, "share_features_extractor": share})
        assert isinstance(model.actor.features_extractor, FlattenExtractor)
        assert (model.actor.features_extractor is model.critic.features_extractor) == share
        observations = torch.as_tensor(samples(model))
        assert torch.equal(model.critic.extract_features(observations, model.critic.features_extractor), observations)


def test_what_was_copied_extracts_features_of_its_own() -> None:
    policy = copy.deepcopy(images().policy)
    copied = pickle.loads(pickle.dumps(policy))
    pixels = torch.rand(5, 3, 36, 36, device=policy.device)
    expected = policy.critic.features_extractor(pixels)
    with torch.no_grad():
        for parameter in policy.critic.parameters():
            parameter.zero_()
    assert not policy.critic.features_extractor(pixels).any()
    assert_equal([copied.critic.features_extractor(pixels)], [expected])


# Optimisers


def test_a_network_s_optimiser_is_its_group_of_the_one_of_all() -> None:
    model = vectors().learn(14)
    groups = {group["name"]: group for group in model.policy.optimizer.param_groups}
    for name, network in (("actor", model.actor), ("critic", model.critic)):
        assert isinstance(network.optimizer, Optimizer)
        assert network.optimizer.param_groups == [groups[name]]
        assert network.optimizer.param_groups[0] is groups[name]
        parameters = list(network.parameters())
        assert [id(p) for p in network.optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]
        assert network.optimizer.state.keys() == set(parameters)
        state = network.optimizer.state_dict()
        assert state["state"].keys() == set(range(len(parameters)))
        assert state["param_groups"][0]["lr"] == groups[name]["lr"]
    assert len(model.policy.optimizer.param_groups) == 3


@pytest.mark.parametrize("when", ["at once", "after parameters were put back"])
def test_a_rate_that_is_written_into_a_network_s_optimiser_counts(when: str) -> None:
    model, optimizers = vectors().learn(14), {}
    for name in ("actor", "critic"):
        optimizers[name] = getattr(model, name).optimizer
    if when != "at once":
        model.set_parameters(model.get_parameters())
    optimizers["critic"].param_groups[0]["lr"] = 0.0
    before = {name: [p.clone() for p in getattr(model, name).parameters()] for name in optimizers}
    model.train(2)
    assert_equal(model.critic.parameters(), before["critic"])
    assert not any(torch.equal(*pair) for pair in zip(model.actor.parameters(), before["actor"], strict=True))
    assert model.learner.learning_rate("critic") == 0.0
    assert model.learner.learning_rate("actor") > 0.0


def test_a_network_s_optimiser_steps_and_loads_that_network_alone() -> None:
    model = vectors().learn(14)
    optimizer, state = model.critic.optimizer, copy.deepcopy(model.critic.optimizer.state_dict())
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    moments = copy.deepcopy(model.actor.optimizer.state_dict())
    sum(parameter.square().sum() for parameter in model.policy.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    changed = [name for name, p in model.policy.named_parameters() if not torch.equal(p, before[name])]
    assert changed
    assert all("qvalue" in name for name in changed)
    assert all(parameter.grad is None for parameter in model.critic.parameters())
    assert all(parameter.grad is not None for parameter in model.actor.parameters())
    assert optimizer.state_dict()["state"][0]["step"] == state["state"][0]["step"] + 1
    # A state of the framework's own has no names.
    state["param_groups"][0].pop("name")
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["state"][0]["step"] == state["state"][0]["step"]
    assert [group["name"] for group in model.policy.optimizer.param_groups] == ["actor", "critic", "value"]
    after = model.actor.optimizer.state_dict()
    assert all(torch.equal(after["state"][i][k], v) for i, s in moments["state"].items() for k, v in s.items())
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(SGD([nn.Parameter(torch.zeros(1))], 0.1).state_dict() | {"param_groups": []})
    model.learner.step(model._batch(8, 0.0))
    with pytest.raises(NotImplementedError, match="of your own"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_an_optimiser_that_would_train_nothing_is_refused() -> None:
    model = vectors()
    with pytest.raises(AttributeError, match=r"SGD would train nothing.*optimizer_class"):
        model.actor.optimizer = SGD(model.actor.parameters(), 0.1)
    assert model.actor.optimizer.param_groups[0]["name"] == "actor"
    for network in (model.critic_target, IQLPolicy(model.observation_space, model.action_space).actor):
        assert not hasattr(network, "optimizer")


def test_optimisers_are_copied_with_their_networks() -> None:
    model = vectors().learn(14)
    for policy in (copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))):
        group = policy.actor.optimizer.param_groups[0]
        assert group is policy.optimizer.param_groups[0]
        assert [id(parameter) for parameter in group["params"]] == [id(p) for p in policy.actor.parameters()]
        assert group is not model.policy.optimizer.param_groups[0]


# Tracing


class Deterministic(nn.Module):
    """A policy as those wrap it who export it."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.policy(observation, deterministic=True)


TRACED = {
    **MODELS,
    "shared": lambda: images(share_features_extractor=True),
    "discrete images": lambda: images(spaces.Discrete(3)),
}


@pytest.mark.parametrize("part", ["actor", "policy"])
@pytest.mark.parametrize("kind", TRACED)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_traced_policy_acts_as_predict_does(kind: str, part: str) -> None:
    model = TRACED[kind]()
    policy = getattr(model.policy, part) if part == "actor" else model.policy
    observations = torch.as_tensor(samples(model), device=model.device)
    file = io.BytesIO()
    traced = torch.jit.trace(Deterministic(policy).eval(), observations[:1])
    frozen = torch.jit.freeze(traced)
    # Convolutions that are optimised cannot be saved, be they SAC's or ours.
    torch.jit.save(frozen if "images" in kind or kind == "shared" else torch.jit.optimize_for_inference(frozen), file)
    actions = torch.jit.load(io.BytesIO(file.getvalue()))(observations).detach().cpu().numpy()
    expected, _ = model.predict(observations.cpu().numpy(), deterministic=True)
    if isinstance(model.action_space, spaces.Box):
        actions = model.policy.unscale_action(actions)
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_an_actor_that_is_written_as_onnx_acts_as_predict_does(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = vectors(device="cpu")
    observations = samples(model, 1)
    path, module = tmp_path / "actor.onnx", Deterministic(model.policy.actor)
    torch.onnx.export(
        module, torch.as_tensor(observations), path, opset_version=18, input_names=["input"], verbose=False
    )
    actions = onnxruntime.InferenceSession(path).run(None, {"input": observations})[0]
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(model.policy.unscale_action(actions), expected, rtol=1e-5, atol=1e-6)


# Loading


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_loaded_without_drawing_what_the_file_has(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]()
    model.save(tmp_path / "model.zip")
    model.policy.save(tmp_path / "policy")
    draw_nothing(monkeypatch)
    expected = model.policy.state_dict()
    loaded = [IQL.load(tmp_path / "model.zip").policy, type(model.policy).load(tmp_path / "policy")]
    for policy in loaded:
        state = policy.state_dict()
        assert state.keys() == expected.keys()
        assert_equal(state.values(), expected.values())
    ours, theirs = load_agent(tmp_path / "model.zip").loss.state_dict(), model.policy.loss.state_dict()
    assert all(torch.equal(ours[name], tensor.cpu()) for name, tensor in theirs.items())
    with pytest.raises(AssertionError, match="weights are drawn"):
        MODELS[kind]()


def test_a_model_s_own_modules_are_made_as_they_are_whether_it_is_loaded_or_not(tmp_path: Path) -> None:
    model = vectors(policy_kwargs={**NETWORKS, "features_extractor_class": Constant})
    model.save(tmp_path / "model")
    loaded = IQL.load(tmp_path / "model")
    assert loaded.actor.features_extractor.constant == torch.full((), 2.0)
    observations = samples(model)
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)


class Constant(Widened):
    """A features extractor with what no file has."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.register_buffer("constant", torch.full((), 2.0), persistent=False)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.constant * super().forward(observations)


class Forgetful(SmallPolicy):
    """A policy that loads what is there."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        kept = {name: tensor for name, tensor in state_dict.items() if "value_network" not in name}
        return super().load_state_dict(kept, False, assign)


def test_a_weight_that_a_file_does_not_bring_is_an_error(tmp_path: Path) -> None:
    model = IQL(Forgetful, RandomEnv(spaces.Box(-1.0, 1.0, (3,))), **SMALL)
    model.save(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"value_network_params.*layers\.0\.weight.* were not loaded"):
        IQL.load(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    with pytest.raises(RuntimeError, match="were not loaded"):
        Forgetful.load(tmp_path / "policy")


def test_an_agent_acts_through_networks_that_the_framework_s_users_know(tmp_path: Path) -> None:
    agent = make_agent("continuous", make_dataset(SPACES["continuous"]), normalize_observations=True)
    model = IQL.from_agent(agent)
    model.actor.save(tmp_path / "actor")
    model.policy.save(tmp_path / "policy")
    observations = samples(model)
    for loaded in (Actor.load(tmp_path / "actor"), IQLPolicy.load(tmp_path / "policy")):
        actions, _ = loaded.predict(observations, deterministic=True)
        np.testing.assert_allclose(actions, agent.act(observations), rtol=1e-5)


def test_who_predicts_while_a_model_is_trained_changes_nothing_of_what_it_learns() -> None:
    weights = []
    for part in (None, "policy", "actor"):
        model = vectors(policy_kwargs={**NETWORKS, "dropout": 0.5}, dataset=logged(), seed=0)
        observation = samples(model)

        def look(local: Any, _: Any, part: Any = part, observation: Any = observation) -> bool:
            if part is not None:
                random = torch.get_rng_state()
                getattr(local["self"], part).predict(observation, deterministic=True)
                torch.set_rng_state(random)
            return True

        model.learn_offline(4, callback=look)
        weights.append(torch.cat([p.flatten() for p in model.policy.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_a_network_that_was_switched_to_evaluation_is_trained_as_all_are(part: str) -> None:
    model = vectors(dataset=logged())
    getattr(model, part).set_training_mode(False)
    model.train(1)
    assert getattr(model, part).network.training
    assert model.policy.training


def test_a_networks_state_of_an_earlier_release_is_loaded() -> None:
    model, other = normalized(), normalized()
    old = {name: tensor + 1 for name, tensor in model.actor.state_dict().items() if not name.startswith("normalizers.")}
    statistics = {name: tensor.clone() for name, tensor in other.policy.normalizers.state_dict().items()}
    other.actor.load_state_dict(old)
    assert_equal(old.values(), [other.actor.state_dict()[name] for name in old])
    assert_equal(statistics.values(), other.policy.normalizers.state_dict().values())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.actor.load_state_dict(dict(list(old.items())[1:]))


def test_the_state_of_a_network_s_optimiser_is_what_is_written_into_it() -> None:
    model = vectors(dataset=logged())
    model.train(2)
    actor, critic = model.actor.optimizer, model.critic.optimizer
    assert len(actor.state) > 0
    before = len(critic.state)
    parameter = actor.param_groups[0]["params"][0]
    actor.state[parameter] = {**actor.state[parameter], "exp_avg": torch.ones_like(parameter)}
    assert torch.equal(model.learner.optimizers[0].state[parameter]["exp_avg"], torch.ones_like(parameter))
    actor.state.clear()
    assert (len(actor.state), len(critic.state)) == (0, before)
    assert parameter not in model.learner.optimizers[0].state
    model.train(1)
    assert float(actor.state[parameter]["step"]) == 1.0


def test_models_that_share_a_logger_write_their_own_metrics_and_are_let_go(tmp_path: Path) -> None:
    shared = configure(str(tmp_path / "shared"), ["csv"])

    def rows(logger: Any, models: int) -> list[str]:
        for number in range(models):
            model = vectors(dataset=logged(), seed=number)
            model.set_logger(logger)
            model.learn_offline(2, log_interval=2)
            if number == 0 and models == 2:
                with torch.no_grad():
                    next(model.policy.loss.actor_network.parameters()).fill_(torch.nan)
            alive.append(weakref.ref(model))
        text = (Path(logger.dir) / "progress.csv").read_text().splitlines()
        return [row["train/mean_value"] for row in csv.DictReader(text)]

    alive: list[Any] = []
    both = rows(shared, 2)
    own = configure(str(tmp_path / "alone"), ["csv"])
    alone = rows(own, 1)
    assert both[0] == alone[0]
    assert both[1] not in both[0]
    gc.collect()
    assert [model() for model in alive] == [None, None, None]
    # Whoever is gone writes nothing.
    shared.dump()
    shared.close()
    own.close()
