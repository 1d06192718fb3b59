"""Plugins are called: a reader made here serves every adapter, and training maps batches by the hook's function."""

import collections
import dataclasses
import importlib
import json
import pickle
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import SPACES, make_agent, make_dataset
from strangers import good

import iql_plugins
from iql_plugins import plugins
from iql_plugins.config import IQLConfig
from iql_plugins.data import Dataset, DatasetError, Options, UnknownSourceError
from iql_plugins.data.inspection import inspect
from iql_plugins.keys import flat_name
from iql_plugins.plugins import Host, NotRecognizedError
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent

#: Four actions, of which the dataset has three.
CARTPOLE = Spaces(SPACES["discrete"].observation, Discrete(4))


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> object:
    """What the plugin alone knows; beside it are the adapters that are installed."""

    class Tape:
        """A stranger's data."""

    pendulum = iql_plugins.read_dataset("pendulum-v1-sac")

    def read(source: object, options: Options) -> Dataset | None:
        if source == "tape://pendulum":
            return Dataset(pendulum.tensors[:600], "the tape", pendulum.spaces, "Pendulum-v1")
        if isinstance(source, Tape):
            tensors = make_dataset(CARTPOLE, 40).cpu()
            tensors["action"].clamp_(max=2)
            return Dataset(tensors, "the tape", CARTPOLE)
        return None

    entries: list[Any] = [*entry_points(group=plugins.PROJECT), good("tape", iql_read_dataset=read)]
    host = Host(find=lambda: entries)
    monkeypatch.setattr(plugins, "host", lambda: host)
    return Tape()


def test_inspect_and_load_dataset_ask_it(source: object) -> None:
    report = inspect("tape://pendulum")
    assert (report.name, report.transitions) == ("the tape", 600)
    read = iql_plugins.read_dataset(source)
    assert read.spaces == CARTPOLE
    assert read.tensors["action"].max() == 2
    assert len(iql_plugins.load_dataset(source)) == 40


@pytest.mark.slow
def test_the_command_line_trains_and_evaluates_in_the_environment_that_it_names(
    source: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    from iql_plugins.cli import main

    options = ["--n-steps", "4", "--episodes", "1", "--baseline", "none", "--compile", "no", "--json"]
    assert main(["train", "--dataset", "tape://pendulum", *options, "--run-dir", str(tmp_path / "run")]) == 0
    assert json.loads(capfd.readouterr().out)["env"] == "Pendulum-v1"
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["env"] == "Pendulum-v1"
    assert settings["dataset_sha256"] == iql_plugins.read_dataset("tape://pendulum").sha256


def test_stable_baselines3_trains_on_it_in_the_spaces_that_it_names(source: object) -> None:
    pytest.importorskip("stable_baselines3")
    import gymnasium

    from iql_sb3 import IQL

    model = IQL("MlpPolicy", None, dataset=source, batch_size=8)
    assert model.action_space == gymnasium.spaces.Discrete(4)
    model.learn_offline(2)


def test_d3rlpy_trains_on_it_with_as_many_actions_as_the_environment_has(source: object) -> None:
    pytest.importorskip("d3rlpy")
    from d3rlpy_helpers import QUIET

    from iql_d3rlpy import DiscreteIQLConfig, to_replay_buffer

    buffer = to_replay_buffer(source)
    assert buffer.dataset_info.action_size == 4
    assert to_replay_buffer(source, action_size=5).dataset_info.action_size == 5
    DiscreteIQLConfig(batch_size=8).create().fit(buffer, n_steps=2, n_steps_per_epoch=2, **QUIET)


# Dictionaries of arrays, which is what D4RL's own loader returns


def columns(rows: int = 6) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(rows, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(rows, 2)).astype(np.float32),
        "next_observations": random.normal(size=(rows, 3)).astype(np.float32),
        "rewards": random.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) == rows - 1,
    }


def test_a_dictionary_of_arrays_is_a_dataset(tmp_path: Path) -> None:
    arrays = columns()
    np.savez(tmp_path / "d.npz", **arrays)
    data = iql_plugins.load_dataset(arrays)
    assert (data == iql_plugins.load_dataset(tmp_path / "d.npz")).all()
    arrays["rewards"][:] = 0.0
    assert data["next", "reward"].all(), "the dataset is a copy"


def test_its_observations_may_be_a_dictionary_in_turn() -> None:
    arrays = columns()
    for key in ("observations", "next_observations"):
        arrays[key] = {"left": arrays[key][:, :1], "right": arrays[key][:, 1:]}
    data = iql_plugins.load_dataset(arrays)
    assert data["next", "observation", "right"].shape == (6, 2)


def test_its_metadata_may_be_anything() -> None:
    metadata = {"metadata/algorithm": np.bytes_(b"SAC"), "metadata": {"iteration": np.int64(3)}, "infos/qpos": [0.0]}
    assert len(iql_plugins.load_dataset(columns() | metadata)) == 6


def test_what_has_none_of_our_columns_is_left_to_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[str, Any] = {"my_states": np.zeros(3), "my_version": 1}
    np.savez(tmp_path / "d.npz", my_states=states["my_states"])
    for unknown in (states, tmp_path / "d.npz"):
        with pytest.raises(UnknownSourceError, match="'my_states' is not a column that is read"):
            iql_plugins.load_dataset(unknown)
    mine = Dataset(make_dataset(SPACES["continuous"], 4).cpu(), "mine")
    host = Host(find=lambda: [good(iql_read_dataset=lambda source: mine)])  # type: ignore[list-item]
    monkeypatch.setattr(plugins, "host", lambda: host)
    for known in (states, tmp_path / "d.npz"):
        assert iql_plugins.read_dataset(known) is mine


def test_what_is_wrong_with_it_is_named() -> None:
    with pytest.raises(DatasetError, match="the dict of arrays: 'reward_s' is not a column that is read; did you mean"):
        iql_plugins.load_dataset({**columns(), "reward_s": np.zeros(6)})
    with pytest.raises(DatasetError, match="the dict of arrays: 'actions' has 5 rows, 'rewards' has 6"):
        iql_plugins.load_dataset({**columns(), "actions": np.zeros((5, 2), np.float32)})
    with pytest.raises(DatasetError, match=r"the dict of arrays must have arrays, got list under 'rewards'"):
        iql_plugins.load_dataset({**columns(), "rewards": [0.0] * 6})
    with pytest.raises(DatasetError, match="the dict of arrays: 'actions' must be numbers"):
        iql_plugins.load_dataset({**columns(), "actions": np.array([["x"]] * 6)})


def test_stable_baselines3_trains_on_a_dictionary_of_arrays() -> None:
    pytest.importorskip("stable_baselines3")
    import gymnasium

    from iql_sb3 import IQL

    spaces = gymnasium.spaces.Box(-np.inf, np.inf, (3,)), gymnasium.spaces.Box(-1.0, 1.0, (2,))
    model = IQL("MlpPolicy", None, observation_space=spaces[0], action_space=spaces[1], batch_size=4)
    model.load_dataset(columns())
    model.learn_offline(1)
    assert torch.stack([p.detach().isfinite().all() for p in model.policy.parameters()]).all()


# Pickles hold what other readers know


def test_what_is_wrong_with_what_a_pickle_holds_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "d.pkl"
    for held, message in (
        (columns() | {"reward_s": np.zeros(6)}, "'reward_s' is not a column that is read"),
        ("pendulum-v1-sac", "holds no replay buffer, but a str"),
        (Path("d.npz"), f"holds no replay buffer, but a {type(Path()).__name__}"),
        (3, "holds no replay buffer: a builtins.int is no dataset"),
    ):
        path.write_bytes(pickle.dumps(held))
        with pytest.raises(DatasetError, match=f"^{re.escape(str(path))}:? {message}"):
            iql_plugins.load_dataset(path, trust_pickle=True)
    path.write_bytes(pickle.dumps(columns()))
    assert (iql_plugins.load_dataset(path, trust_pickle=True) == iql_plugins.load_dataset(columns())).all()


# Batches: what maps a batch for the hook maps it for training


def counted(monkeypatch: pytest.MonkeyPatch, adapter: str, user: str) -> list[object]:
    """The batches that the module of an adapter which trains has mapped by the hook's function."""
    names = ("plugin", "batches", user)
    plugin, batches, module = (importlib.import_module(f"iql_{adapter}.{name}") for name in names)
    function = batches.map_batch
    assert module.map_batch is function
    seen: list[object] = []

    def counting(batch: object, *rest: Any) -> Any:
        seen.append(batch)
        return function(batch, *rest)

    with monkeypatch.context() as hook:
        hook.setattr(batches, "map_batch", counting)
        plugin.iql_map_batch(None)
    assert seen.pop() is None
    monkeypatch.setattr(module, "map_batch", counting)
    return seen


def test_training_maps_batches_by_the_function_of_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    from iql_tensor import IQL

    seen, spaces = counted(monkeypatch, "tensor", "algorithm"), SPACES["continuous"]
    iql = IQL.build(spaces, hidden_sizes=(4,), compile="no")
    iql.update(make_dataset(spaces, 4))
    assert len(seen) == 1
    batch = {flat_name(key): tensor for key, tensor in make_dataset(spaces, 4).items(True, True)}
    iql.update({**batch, "action": batch["action"].cpu().numpy()})
    with pytest.raises(TypeError, match="action must be a tensor, got list"):
        iql.update({**batch, "action": [0.0] * 4})
    with pytest.raises(TypeError, match="must be a TensorDict, or keyword tensors, got int: 3"):
        iql.update(3)  # type: ignore[arg-type]


def test_torchrls_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchrl")
    from iql_torchrl.training import IQL

    seen, spaces = counted(monkeypatch, "torchrl", "training"), SPACES["continuous"]
    IQL.from_agent(make_agent("continuous")).fit(make_dataset(spaces, 40).cpu(), 3)
    assert len(seen) == 3


def test_d3rlpys_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("d3rlpy")
    from d3rlpy_helpers import QUIET, config, dataset

    seen = counted(monkeypatch, "d3rlpy", "impl")
    algorithm = config("continuous").create()
    algorithm.fit(dataset("continuous"), n_steps=3, n_steps_per_epoch=3, **QUIET)
    assert len(seen) == 3
    with pytest.raises(TypeError, match="the batch must be a TorchMiniBatch of d3rlpy, got dict"):
        algorithm.impl.inner_update({}, 1)


@pytest.mark.parametrize("names", [["1", "2"], [str(number) for number in range(11)]])
def test_d3rlpys_observations_go_where_they_belong_whatever_their_names_are(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """d3rlpy's tuples are ``"0"``, ``"1"``, ...; an agent's names may be numbers, too, which sort as texts."""
    pytest.importorskip("d3rlpy")
    from d3rlpy.torch_utility import TorchMiniBatch

    import iql_d3rlpy

    spaces = Spaces({name: Box((1,)) for name in names}, Box((1,), low=(-1.0,), high=(1.0,)))
    dataset = make_dataset(spaces, 20).cpu()
    for name in names:
        for key in (("observation", name), ("next", "observation", name)):
            dataset[key] = torch.full((20, 1), float(name), device="cpu")
    config = IQLConfig(batch_size=4, hidden_sizes=(4,), compile="no")
    algorithm = iql_d3rlpy.from_agent(Agent(spaces, config, seed=0))
    seen: list[Any] = []
    monkeypatch.setattr(algorithm.impl.agent.learner, "step", lambda batch: seen.append(batch) or ...)
    algorithm.impl.agent.learner.last_losses = torch.zeros(4)
    buffer = iql_d3rlpy.to_replay_buffer(dataset)
    algorithm.impl.update(TorchMiniBatch.from_batch(buffer.sample_transition_batch(4), 0.99, False, "cpu"), 1)
    # d3rlpy has zeros behind a terminal state.
    goes_on = 1.0 - seen[0]["next_terminated"].float()
    for name in names:
        assert (seen[0][f"observation_{name}"] == float(name)).all()
        assert (seen[0][f"next_observation_{name}"] == float(name) * goes_on).all()


def test_d3rlpys_discrete_actions_are_indices_also_where_a_batch_does_not_tell() -> None:
    pytest.importorskip("d3rlpy")
    from d3rlpy.torch_utility import TorchMiniBatch
    from d3rlpy_helpers import DISCRETE, config, dataset, fitted

    data = dataset(DISCRETE)
    algorithm = fitted(config(DISCRETE).create("cpu:0"), data)
    batch = TorchMiniBatch.from_batch(data.sample_transition_batch(4), 0.99, False, "cpu:0")
    losses = algorithm.impl.inner_update(dataclasses.replace(batch, numpy_batch=None), 1)
    assert np.isfinite(losses["q_loss"])


def test_foreign_named_tuples_are_not_stable_baselines3s() -> None:
    fields = ("observations", "actions", "next_observations", "dones", "rewards")
    arrays = collections.namedtuple("arrays", fields)(*[np.zeros((4, 1))] * 5)
    with pytest.raises(NotRecognizedError):
        iql_plugins.map_batch(arrays)


def test_stable_baselines3s_training_does_whatever_class_the_samples_have(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_baselines3")
    import gymnasium
    from sb3_helpers import NETWORKS, SMALL, RandomEnv
    from stable_baselines3.common.buffers import ReplayBuffer

    from iql_sb3 import IQL

    fields = ("observations", "actions", "next_observations", "dones", "rewards")
    own = collections.namedtuple("own", [*fields, "weights"])

    class Prioritized(ReplayBuffer):
        def sample(self, *arguments: Any, **options: Any) -> Any:
            return own(*super().sample(*arguments, **options)[: len(fields)], weights=None)

    class Unnamed(ReplayBuffer):
        def sample(self, *arguments: Any, **options: Any) -> Any:
            return {}

    def model(kind: type[ReplayBuffer]) -> IQL:
        env = RandomEnv(gymnasium.spaces.Box(-1.0, 1.0, (3,)))
        return IQL("MlpPolicy", env, replay_buffer_class=kind, policy_kwargs=NETWORKS, **SMALL)

    seen = counted(monkeypatch, "sb3", "datasets")
    model(Prioritized).learn(14)
    assert {type(samples) for samples in seen} == {own}
    with pytest.raises(TypeError, match="the Unnamed must sample a named tuple with the fields of ReplayBufferSamples"):
        model(Unnamed).learn(14)
