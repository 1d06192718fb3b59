"""The agent beside the pickles in a zip: the same one, read without running anything."""

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")

from agents import SPACES, make_agent, make_dataset
from gymnasium import spaces
from sb3_helpers import NETWORKS, OBSERVATIONS, RandomEnv, SmallPolicy, Widened
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from iql_plugins import checkpoint
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.cli import main
from iql_plugins.export import random_observations
from iql_plugins.spaces import Box
from iql_plugins.training.agent import Agent
from iql_sb3 import IQL
from iql_sb3.files import MEMBER, load_agent

SMALL: dict[str, Any] = {"batch_size": 8, "buffer_size": 100, "learning_starts": 10, "seed": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def device() -> None:
    """The CPU alone, where files are read to."""


def model_of(policy: Any, env: Any, **arguments: Any) -> IQL:
    """A model after a few steps."""
    return IQL(policy, env, **{"policy_kwargs": NETWORKS, **SMALL, **arguments}).learn(14)


def images() -> RandomEnv:
    return RandomEnv(spaces.Box(0, 255, (36, 40, 3), np.uint8), spaces.Discrete(3))


def convolutions(**more: Any) -> dict[str, Any]:
    return {**NETWORKS, "features_extractor_kwargs": {"features_dim": 16}, **more}


def behind_vecnormalize() -> IQL:
    return model_of("MlpPolicy", VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")])))


def from_the_core(kind: str) -> IQL:
    dataset = make_dataset(SPACES[kind])
    agent = make_agent(kind, dataset, normalize_observations=True, reward_scale=2.0, actor_dropout=0.1)
    agent.extra["run"] = {"env": "Pendulum-v1"}
    agent.fit(dataset, 3)
    return IQL.from_agent(agent)


def with_schedules() -> IQL:
    return model_of(
        "MlpPolicy",
        RandomEnv(OBSERVATIONS["box"]),
        learning_rate={"actor": lambda left: 1e-3 * left, "value": 1e-4},
        policy_kwargs={**NETWORKS, "optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"betas": (0.9, 0.99)}},
        **{"temperature": 1.0, "expectile": 0.8, "gamma": 0.9, "loss_function": "l1", "max_grad_norm": 1.0},
    )


ARCHITECTURE = {"net_arch": {"pi": [4], "qf": [5, 6]}, "activation_fn": torch.nn.Tanh, "n_critics": 3, "dropout": 0.1}
MIXED = spaces.Dict({name: OBSERVATIONS[name] for name in ("box", "discrete", "multi-discrete", "multi-binary")})
MODELS: dict[str, Callable[[], IQL]] = {
    **{name: lambda space=space: model_of("MlpPolicy", RandomEnv(space)) for name, space in OBSERVATIONS.items()},
    "discrete actions": lambda: model_of("MlpPolicy", RandomEnv(OBSERVATIONS["box"], spaces.Discrete(3))),
    "one critic": lambda: model_of("MlpPolicy", "Pendulum-v1", policy_kwargs={**NETWORKS, "n_critics": 1}),
    "squashed": lambda: model_of("MlpPolicy", "Pendulum-v1", policy_kwargs={**NETWORKS, "squashed": True}),
    "architecture": lambda: model_of("MlpPolicy", RandomEnv(OBSERVATIONS["box"]), policy_kwargs=ARCHITECTURE),
    "schedules": with_schedules,
    "images": lambda: model_of("CnnPolicy", images(), policy_kwargs=convolutions()),
    "small images": lambda: model_of("MlpPolicy", RandomEnv(spaces.Box(0, 255, (7, 7, 3), np.uint8))),
    "shared": lambda: model_of("CnnPolicy", images(), policy_kwargs=convolutions(share_features_extractor=True)),
    "dict": lambda: model_of("MultiInputPolicy", SimpleMultiObsEnv(channel_last=True, random_start=False)),
    "mixed": lambda: model_of("MultiInputPolicy", RandomEnv(MIXED)),
    "core, discrete": lambda: from_the_core("discrete"),
    "core, dict": lambda: from_the_core("dict"),
}


def assert_same_agent(agent: Agent, other: Agent) -> None:
    assert agent.spaces == other.spaces
    (document, tensors), (other_document, other_tensors) = agent.state(), other.state()
    # No schedule is one of 1.
    for state in (document, other_document):
        for group in (group for optimizer in state["learner"]["optimizers"] for group in optimizer["param_groups"]):
            group.setdefault("schedule", 1.0)
    assert document == other_document
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_the_agent_is_the_one_that_the_pickles_make(name: str, tmp_path: Path) -> None:
    model, path = MODELS[name](), tmp_path / "model.zip"
    state = torch.get_rng_state()
    model.save(path)
    assert torch.equal(torch.get_rng_state(), state), "to save a model changes what is learned"
    unpickled = IQL.load(path, device="cpu").to_agent()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "ours.zip", "w") as ours:
        ours.writestr(MEMBER, archive.read(MEMBER))
    state = torch.get_rng_state()
    agent = load_agent(tmp_path / "ours.zip")
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_agent(agent, unpickled)
    if all(isinstance(space, Box) and space.dtype == "float32" for space in agent.spaces.observations.values()):
        observations = random_observations(agent, 50)[0]
        assert torch.equal(agent.act(observations), unpickled.act(observations))


@pytest.mark.parametrize("name", ["architecture", "images", "small images", "dict", "discrete actions", "multi-binary"])
def test_actions_are_those_of_the_models_predict(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save(tmp_path / "model.zip")
    agent = load_agent(tmp_path / "model.zip")
    observations = [model.observation_space.sample() for _ in range(20)]
    for observation in observations:
        np.testing.assert_array_equal(agent.act(observation), model.predict(observation, deterministic=True)[0])


def test_a_model_of_double_precision_keeps_it(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = IQL("MlpPolicy", "Pendulum-v1", policy_kwargs=NETWORKS, **SMALL)
        model.save(tmp_path / "model.zip")
        expected = model.to_agent().act(np.ones((5, 3)))
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(load_agent(tmp_path / "model.zip").act(np.ones((5, 3))), expected)


def test_a_training_goes_on_from_it_as_from_the_pickles(tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["continuous"])
    model = IQL("MlpPolicy", dataset=dataset, policy_kwargs={"net_arch": {"pi": [4], "qf": [5]}}, compile="no", **SMALL)
    model.learn_offline(5).save(tmp_path / "model.zip")
    agents = [load_agent(tmp_path / "model.zip"), IQL.load(tmp_path / "model.zip", device="cpu").to_agent()]
    for agent in agents:
        agent.fit(dataset, 5)
    assert_same_agent(*agents)
    assert agents[0].learner.step_count == 10


def test_an_automatic_temperature_is_saved_and_goes_on(tmp_path: Path) -> None:
    """Of the model; a policy alone has no hyper-parameters."""
    dataset, path = make_dataset(SPACES["continuous"]), tmp_path / "model.zip"
    options: dict[str, Any] = {"batch_size": 8, "policy_kwargs": {"net_arch": [4]}, "seed": 0}
    models = [IQL("MlpPolicy", None, dataset=dataset, temperature="auto", **options) for _ in range(2)]
    for model in models:
        model.learn_offline(3)
    models[1].save(path)
    models[1] = IQL.load(path)
    models[1].load_dataset(dataset)
    for model in models:
        model.learn_offline(2)
    first, second = (model.policy.loss.automatic_temperature.log_value for model in models)
    assert first != 0.0
    assert torch.equal(first, second)
    models[0].policy.save(tmp_path / "policy.zip")
    alone = type(models[0].policy).load(tmp_path / "policy.zip")
    actions = [policy.predict(np.zeros(3, np.float32), deterministic=True)[0] for policy in (alone, models[0])]
    assert np.array_equal(*actions)
    models[0].temperature = 2.0
    models[0].learn_offline(1)
    assert models[0].policy.loss.automatic_temperature is None


def test_a_model_is_saved_to_what_the_framework_saves_to(tmp_path: Path) -> None:
    model = IQL("MlpPolicy", "Pendulum-v1", policy_kwargs=NETWORKS, **SMALL)
    model.save(str(tmp_path / "new" / "model"))
    with (tmp_path / "file.zip").open("wb") as file:
        file.write(b"before")
        model.save(file)
        file.write(b"")
        assert not file.closed
    for path in (tmp_path / "new" / "model.zip", tmp_path / "file.zip"):
        assert_same_agent(load_agent(path), model.to_agent())


# Pickles alone


def lambda_activation() -> torch.nn.Module:
    return torch.nn.Tanh()


OWN: dict[str, Callable[[], IQL]] = {
    "extractor": lambda: model_of(
        "MlpPolicy", "Pendulum-v1", policy_kwargs={**NETWORKS, "features_extractor_class": Widened}
    ),
    "policy": lambda: model_of(SmallPolicy, "Pendulum-v1", policy_kwargs={}),
    "activation": lambda: model_of(
        "MlpPolicy", "Pendulum-v1", policy_kwargs={**NETWORKS, "activation_fn": lambda_activation}
    ),
}


def stripped(path: Path) -> Path:
    """A zip as older releases wrote it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != MEMBER}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def commands(path: Path, folder: Path) -> dict[str, list[str]]:
    return {
        "evaluate": ["evaluate", str(path), "--env", "Pendulum-v1", "--episodes", "1"],
        "export": ["export", str(path), "--format", "torch", "--output", str(folder / "new.pt2")],
        "convert": ["convert", str(path), str(folder / "new.safetensors"), "--to", "tensor"],
    }


@pytest.mark.parametrize("command", ["evaluate", "export", "convert"])
def test_a_zip_with_pickles_alone_is_refused_until_it_is_trusted(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.zip"
    IQL("MlpPolicy", "Pendulum-v1", policy_kwargs=NETWORKS, **SMALL).save(path)
    arguments = commands(stripped(path), tmp_path)[command]
    loaded: list[Any] = []
    load = IQL.load
    monkeypatch.setattr(IQL, "load", lambda *given, **options: loaded.append(given) or load(*given, **options))
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert "nothing but pickles, which can run any code" in error
    assert "give --trust-pickle" in error
    assert not loaded
    assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]
    assert main([*arguments, "--trust-pickle"]) == 0
    assert len(loaded) == 1


@pytest.mark.parametrize("name", OWN)
def test_networks_of_classes_of_ones_own_are_described_by_pickles_alone(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.zip"
    OWN[name]().save(path)
    arguments = [*commands(path, tmp_path)["evaluate"], "--json"]
    assert main(arguments) == 2
    assert "networks are of classes of your own" in json.loads(capfd.readouterr().out)["error"]
    assert main([*arguments, "--trust-pickle"]) == 0
    with zipfile.ZipFile(path) as archive:
        assert MEMBER not in archive.namelist()


def test_a_model_that_is_no_agent_is_saved_all_the_same(tmp_path: Path) -> None:
    model = IQL("MlpPolicy", "Pendulum-v1", policy_kwargs=NETWORKS, **SMALL)
    model.extra["note"] = object
    model.save(tmp_path / "model.zip")
    assert IQL.load(tmp_path / "model.zip").extra == {"note": object}
    with pytest.raises(CheckpointError, match="nothing but pickles"):
        load_agent(tmp_path / "model.zip")


def test_a_model_from_behind_a_vecnormalize_is_not_evaluated_on_raw_observations(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its zip does not have the statistics: whoever trusts it, or not, is told."""
    path = tmp_path / "model.zip"
    model = behind_vecnormalize()
    model.learn(20)
    model.save(path)
    for command in commands(path, tmp_path).values():
        for more in ([], ["--trust-pickle"]):
            assert main([*command, *more]) == 2
            assert "VecNormalize" in capfd.readouterr().err
    with pytest.raises(ValueError, match="VecNormalize"):
        IQL.load(path).to_agent()
    # Weights that came from such a model are behind the new one's VecNormalize, too.
    other = IQL("MlpPolicy", model.get_env(), policy_kwargs=NETWORKS, **SMALL)
    other.set_parameters(path)
    other.save(tmp_path / "other.zip")
    with pytest.raises(CheckpointError, match="VecNormalize"):
        load_agent(tmp_path / "other.zip")
    assert IQL.load(path, model.get_env()).predict(model.observation_space.sample())[0].shape == (1,)


# Damage and claims


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Document and tensors of a small model's member."""
    path = tmp_path_factory.mktemp("zip") / "model.zip"
    IQL("MlpPolicy", "Pendulum-v1", policy_kwargs=NETWORKS, **SMALL).save(path)
    with zipfile.ZipFile(path) as archive:
        return checkpoint.unpacked(archive.read(MEMBER), "model")


def write(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(MEMBER, content)
    return path


def claim(document: dict[str, Any], *keys: str, value: Any) -> dict[str, Any]:
    """A copy of a document with one value changed."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    entry = copy
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    return copy


HUGE = {"box": [10**6, 10**6], "dtype": "float32", "low": None, "high": None}
NET_ARCH = ("policy", "arguments", "net_arch")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (NET_ARCH, [10**6, 10**6], "networks of more weights than the"),
        (NET_ARCH, [1] * 10**5, "100000 layers"),
        (NET_ARCH, "wide", "hidden_sizes must be a tuple of integers"),
        (("policy", "arguments", "critic_hidden_sizes"), [1] * 10**5, "100000 layers"),
        (("policy", "arguments", "n_critics"), 10**9, "n_critics and hidden_sizes must make at most"),
        (("spaces", "observation"), HUGE, "observations of 1000000000000 entries"),
        (("spaces", "observation"), {"discrete": 10**12, "start": 0}, "does not hold"),
        (("policy", "class"), "os.system", "KeyError"),
        (("policy", "arguments", "activation_fn"), {"class": "system"}, "KeyError: 'system'"),
        (("policy", "arguments", "wings"), 2, "unexpected keyword argument 'wings'"),
        (("policy",), None, "does not hold a whole agent"),
        (("learner",), {}, "does not hold a whole agent"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_file_claims_and_does_not_hold_is_refused_at_once(
    keys: tuple[str, ...], value: Any, message: str, member: Any, tmp_path: Path
) -> None:
    document, tensors = member
    path = write(tmp_path / "model.zip", checkpoint.packed(claim(document, *keys, value=value), tensors))
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        load_agent(path)
    assert time.monotonic() - begin < 5.0


def test_a_damaged_zip_is_refused(member: Any, tmp_path: Path) -> None:
    content = bytearray(checkpoint.packed(*member))
    for place in (0, 9, len(content) // 2, len(content) - 1):
        changed = content.copy()
        changed[place] ^= 1
        with pytest.raises(CheckpointError, match=r"no checkpoint, or damaged|checksum"):
            load_agent(write(tmp_path / "model.zip", bytes(changed)))
    # Zeros by the gigabyte take a few bytes.
    path = write(tmp_path / "bomb.zip", bytes(10**6), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        load_agent(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="no zip of Stable-Baselines3, or damaged"):
        load_agent(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_agent(tmp_path / "nowhere.zip")
