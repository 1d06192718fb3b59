"""`examples/train_offline_then_serve.py`: from one adapter to another, and to where there is no torch."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gymnasium
import numpy as np
import pytest

from iql_plugins.training.agent import Agent

for package in ("onnxruntime", "onnxscript", "stable_baselines3", "torchrl"):
    pytest.importorskip(package)

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_offline_then_serve.py"


@pytest.fixture(autouse=True)
def device() -> None:
    """The CPU alone: where it is served, there may be no other."""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_offline_then_serve", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_without(blocked: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The example in a process that cannot import some packages; prints which modules it had in the end."""
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.argv[0] = {str(EXAMPLE)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print('modules', *(name for name, module in sys.modules.items() if module is not None))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_an_agent_is_trained_fine_tuned_exported_and_served_without_torch(example: ModuleType, tmp_path: Path) -> None:
    checkpoint, policy = tmp_path / "agent.safetensors", tmp_path / "policy.onnx"
    example.train_offline("torchrl", 20, 0, checkpoint)
    offline = Agent.load(checkpoint)
    example.fine_tune(checkpoint, 130, 0)
    agent = Agent.load(checkpoint)
    assert (offline.learner.step_count, agent.learner.step_count) == (20, 50)  # it starts to train after 100 steps
    example.export(checkpoint, policy)
    observation = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    action = example.served(policy)(observation)
    np.testing.assert_allclose(action, agent.act(observation), rtol=0.0, atol=4e-5)
    assert not np.allclose(action, offline.act(observation), atol=1e-3)
    finished = run_without(
        ["torch", "tensordict", "iql_plugins", "iql_sb3", "stable_baselines3", "gymnasium"], "--serve", policy
    )
    assert finished.returncode == 0, finished.stderr
    served = re.match(r"served +(-[\d.]+)\nmodules (.*)", finished.stdout)
    assert served is not None
    assert float(served[1]) == pytest.approx(example.mean_return(agent.act), abs=0.1)
    modules = {name.split(".")[0] for name in served[2].split()}
    assert {"numpy", "onnxruntime"} <= modules
    assert not modules & {"torch", "tensordict", "iql_plugins", "safetensors", "onnx"}


def test_the_pendulum_of_the_example_is_gymnasiums(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "EPISODES", 1)
    torques = np.random.default_rng(1).uniform(-2.5, 2.5, size=example.EPISODE_LENGTH)
    seen = []

    def act(observation: np.ndarray) -> np.ndarray:
        seen.append(observation[0])
        return np.array([[torques[len(seen) - 1]]])

    mean_return = example.mean_return(act)
    env = gymnasium.make(example.ENV).unwrapped
    env.reset()
    cosine, sine, speed = map(float, seen[0])
    env.state = np.array([np.arctan2(sine, cosine), speed])
    total = 0.0
    for torque, observation in zip(torques, seen[1:], strict=False):
        expected, reward, *_ = env.step(np.array([torque]))
        np.testing.assert_allclose(observation, expected, atol=1e-4)
        total += float(reward)
    total += float(env.step(torques[-1:])[1])
    assert mean_return == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_the_example_learns_more_than_the_data_contain(tmp_path: Path) -> None:
    options = ["--offline-steps", "3000", "--online-steps", "1000", "--folder", tmp_path]
    finished = run_without([], *options)
    assert finished.returncode == 0, finished.stderr
    returns = dict(re.findall(r"^(offline|fine-tuned) +(-[\d.]+)$", finished.stdout, re.MULTILINE))
    assert float(returns["offline"]) > -325.8
    assert float(returns["fine-tuned"]) > -325.8
