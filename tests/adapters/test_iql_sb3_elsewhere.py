"""What leaves a model of Stable-Baselines3: exported policies, the command line's contract, RL Zoo3, programs."""

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from processes import ROOT, run

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from iql_plugins.config import IQLConfig
from iql_plugins.data import load_dataset
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent
from iql_sb3 import IQL
from iql_sb3.plugin import iql_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")

BOUNDED = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([5.0, 0.1], np.float32))
KINDS: dict[str, tuple[str, Any, Any]] = {
    "continuous": ("MlpPolicy", spaces.Box(-1.0, 1.0, (3,)), BOUNDED),
    "discrete": ("MlpPolicy", spaces.Box(-1.0, 1.0, (3,)), spaces.Discrete(3)),
    "integers": ("MlpPolicy", spaces.Discrete(4), BOUNDED),
    "image": ("CnnPolicy", spaces.Box(0, 255, (3, 36, 36), np.uint8), BOUNDED),
    "dict": ("MultiInputPolicy", spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)}), BOUNDED),
}


def model_of(kind: str, **kwargs: Any) -> IQL:
    policy, observation_space, action_space = KINDS[kind]
    policy_kwargs = {"net_arch": [8]} | ({"features_extractor_kwargs": {"features_dim": 8}} if kind == "image" else {})
    return IQL(
        policy,
        observation_space=observation_space,
        action_space=action_space,
        policy_kwargs=policy_kwargs,
        buffer_size=10,
        seed=0,
        device="cpu",
        **kwargs,
    )


def observations_of(model: IQL, count: int = 6) -> Any:
    samples = [model.observation_space.sample() for _ in range(count)]
    if isinstance(samples[0], dict):
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    return np.stack(samples)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("export_format", ["onnx", "torchscript"])
def test_an_exported_policy_acts_as_predict_does(kind: str, export_format: Any, tmp_path: Path) -> None:
    if export_format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = model_of(kind)
    model.export(tmp_path / "policy", format=export_format)
    observations = observations_of(model)
    arrays = observations if isinstance(observations, dict) else {"": observations}
    if export_format == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "policy", providers=["CPUExecutionProvider"])
        names = {name: f"observation_{name}" if name else "observation" for name in arrays}
        actions = session.run(None, {names[name]: array for name, array in arrays.items()})[0]
    else:
        policy = torch.jit.load(tmp_path / "policy")
        actions = policy(*(torch.from_numpy(arrays[name]) for name in sorted(arrays))).numpy()
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    assert actions.shape == expected.shape


def test_an_export_scales_clips_and_normalises(tmp_path: Path) -> None:
    dataset = load_dataset("pendulum-v1-sac")[:200]
    model = IQL("MlpPolicy", "Pendulum-v1", dataset=dataset, normalize_observations=True, seed=0, device="cpu")
    model.export(tmp_path / "policy.pt", format="torchscript")
    observations = dataset["observation"][:50]
    actions = torch.jit.load(tmp_path / "policy.pt")(observations).numpy()
    expected, _ = model.predict(observations.numpy(), deterministic=True)
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.01
    with pytest.raises(ValueError, match="'onnx', 'torchscript', 'torch'"):
        model.export(tmp_path / "policy.pt", format="keras")
    with pytest.raises(FileNotFoundError, match="no folder"):
        model.export(tmp_path / "nowhere" / "policy.pt", format="torchscript")


def test_an_export_takes_what_predict_takes_behind_vecnormalize(tmp_path: Path) -> None:
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = IQL("MlpPolicy", env, seed=0, device="cpu")
    model.export(tmp_path / "policy.pt", format="torchscript")
    observation = env.reset()
    expected, _ = model.predict(observation, deterministic=True)
    np.testing.assert_allclose(
        torch.jit.load(tmp_path / "policy.pt")(torch.from_numpy(observation)), expected, atol=1e-5
    )


# The command line's contract


def test_the_adapter_trains_saves_and_loads_for_the_command_line(tmp_path: Path) -> None:
    adapter = iql_adapter()
    training = adapter.training
    assert (adapter.name, adapter.framework, dict(adapter.algorithms)) == ("sb3", "stable_baselines3", {"IQL": IQL})
    config = IQLConfig(n_steps=10, batch_size=8, hidden_sizes=(8,), compile="no")
    agent = Agent(Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,))), config, seed=0)
    agent.extra["note"] = 1
    dataset = load_dataset("pendulum-v1-sac")[:500]
    algorithm = training.from_agent(agent)
    seen: list[int] = []

    def callback(step: int) -> None:
        assert training.to_agent(algorithm).learner.step_count == step
        seen.append(step)

    training.fit(algorithm, dataset, 3, callback)
    training.fit(algorithm, dataset, 2, callback)
    assert seen == [1, 2, 3, 4, 5]
    assert training.to_agent(algorithm).learner is agent.learner
    path = tmp_path / f"model{training.suffix}"
    training.save(algorithm, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]
    loaded = training.to_agent(training.load(path))
    assert loaded.config == agent.config
    assert loaded.spaces == agent.spaces
    assert loaded.extra == {"note": 1}
    assert loaded.learner.step_count == 5
    assert torch.equal(loaded.generator.get_state(), agent.generator.get_state())
    for name, tensor in agent.loss.state_dict().items():
        assert torch.equal(loaded.loss.state_dict()[name], tensor), name
    loaded.save(tmp_path / "agent.safetensors")
    assert Agent.load(tmp_path / "agent.safetensors").learner.step_count == 5


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = iql_adapter().training
    model = model_of("continuous")
    path = tmp_path / "model.zip"
    training.save(model, path)
    content = path.read_bytes()

    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(IQL, "get_parameters", broken)
    with pytest.raises(OSError, match="full"):
        training.save(model, path)
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_framework_says_how_to_install_it() -> None:
    program = (
        "import sys; sys.modules['stable_baselines3'] = None\n"
        "try:\n    from iql_sb3 import IQL\n"
        "except ImportError as error:\n    print(error)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'iql-plugins[sb3]'" in finished.stdout


# RL Zoo3


def test_the_zoo_has_hyper_parameters_that_the_algorithm_takes() -> None:
    yaml = pytest.importorskip("yaml")
    from iql_sb3.zoo import HYPERPARAMETERS

    for name, values in yaml.safe_load(HYPERPARAMETERS.read_text()).items():
        arguments = {
            key: value for key, value in values.items() if key not in ("n_timesteps", "policy", "policy_kwargs")
        }
        model = IQL(values["policy"], "Pendulum-v1", buffer_size=10, **arguments)
        assert model.config.actor_schedule == "constant", name
        assert float(values["n_timesteps"]) >= 1000


def test_the_zoo_names_its_scripts() -> None:
    from iql_sb3.zoo import main

    with pytest.raises(SystemExit, match="train,enjoy"):
        main(["plot"])
    with pytest.raises(SystemExit, match="train,enjoy"):
        main([])


@pytest.mark.slow
def test_the_zoo_trains_and_enjoys(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3")
    common = ["-m", "iql_sb3.zoo"]
    options = ["--algo", "iql", "--env", "Pendulum-v1", "-f", "logs"]
    run(*common, "train", *options, "-n", "120", "--seed", "1", "-params", "learning_starts:100", folder=tmp_path)
    assert (tmp_path / "logs" / "iql" / "Pendulum-v1_1" / "Pendulum-v1.zip").exists()
    output = run(*common, "enjoy", *options, "-n", "200", "--no-render", folder=tmp_path)
    assert "Mean reward: -" in output


@pytest.mark.slow
def test_the_zoo_searches_hyper_parameters(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3")
    options = ["--algo", "iql", "--env", "Pendulum-v1", "-f", "logs", "-n", "240", "--seed", "1"]
    search = ["-optimize", "--n-trials", "10", "--n-evaluations", "1", "--no-optim-plots", "--eval-episodes", "1"]
    parameters = ["-params", "learning_starts:100", "train_freq:50", "gradient_steps:1"]
    run("-m", "iql_sb3.zoo", "train", *options, *search, *parameters, folder=tmp_path)
    report = next((tmp_path / "logs" / "iql").glob("report_Pendulum-v1_10-trials-*.csv"))
    with report.open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 10
    assert len({trial["params_temperature"] for trial in trials}) == 10
    assert {trial["state"] for trial in trials} <= {"COMPLETE", "PRUNED"}
    assert any(trial["state"] == "COMPLETE" for trial in trials)


@pytest.mark.slow
def test_a_trial_that_diverges_does_not_end_the_zoos_search(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3")
    program = """
import sys
from iql_plugins.training.learner import DivergenceError
from iql_sb3 import IQL
from iql_sb3.zoo import main
learn = IQL.learn
def diverges(self, *args, **kwargs):
    IQL.learn = learn
    raise DivergenceError("loss_qvalue not finite at step 3")
IQL.learn = diverges
main(sys.argv[1:])
"""
    options = ["--algo", "iql", "--env", "Pendulum-v1", "-f", "logs", "-n", "240", "--seed", "1"]
    search = ["-optimize", "--n-trials", "2", "--n-evaluations", "1", "--no-optim-plots", "--eval-episodes", "1"]
    parameters = ["-params", "learning_starts:100", "train_freq:50", "gradient_steps:1"]
    run("-c", program, "train", *options, *search, *parameters, folder=tmp_path)
    report = next((tmp_path / "logs" / "iql").glob("report_Pendulum-v1_2-trials-*.csv"))
    with report.open() as file:
        assert [trial["state"] for trial in csv.DictReader(file)] == ["PRUNED", "COMPLETE"]


# Programs


def test_the_example_of_fine_tuning_runs(tmp_path: Path) -> None:
    options = ["--offline-steps", "4", "--online-steps", "110", "--episodes", "1"]
    output = run(ROOT / "examples" / "sb3_offline_to_online.py", *options, folder=tmp_path)
    assert re.findall(r"^(untrained|offline|online) +-[\d.]+$", output, re.MULTILINE) == [
        "untrained",
        "offline",
        "online",
    ], output
    assert (tmp_path / "pendulum_iql.zip").exists()
    assert len((ROOT / "examples" / "sb3_offline_to_online.py").read_text().splitlines()) < 60


def test_the_benchmark_against_sac_runs(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--steps", "1", "--modes", "offline"]
    assert "times as long" in run(ROOT / "tests" / "benchmarks" / "bench_sb3.py", *options, folder=tmp_path)
