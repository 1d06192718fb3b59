"""An exported policy acts like the agent, needs nothing of the package, and leaves the agent alone."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import NETWORKS, OBJECTIVES

from iql_plugins import export
from iql_plugins.config import IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.export import ExportError, PolicyModule, export_policy, random_observations
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent

SPACES = {
    "continuous": Spaces(Box((3,)), Box((2,), low=(-2.0, 0.0), high=(2.0, 1.0))),
    "discrete": Spaces(Box((3,)), Discrete(4, start=1)),
    "integers": Spaces(Discrete(16), Discrete(4)),
    "dict": Spaces({"position": Box((3,)), "goal": Discrete(4)}, Box((2,), low=(-2.0, 0.0), high=(2.0, 1.0))),
    "image": Spaces(Box((36, 36, 3), "uint8"), Discrete(4)),
    "channels first": Spaces(Box((3, 36, 36), "uint8"), Discrete(4)),
}


def make_agent(kind: str, **options: Any) -> Agent:
    spaces = SPACES[kind]
    moments = {
        key: (torch.full(space.shape, 5.0), torch.full(space.shape, 3.0))
        for key, space in spaces.observations.items()
        if isinstance(space, Box) and space.dtype != "uint8"
    }
    config = IQLConfig(n_steps=10, hidden_sizes=(16, 16), actor_dropout=0.5, compile="no", **options)
    return Agent(spaces, config, normalizers=Normalizers(spaces, observation_moments=moments), seed=0)


def observed(agent: Agent, count: int) -> tuple[list[torch.Tensor], Any]:
    """Observations as an exported policy takes them, and as the agent does."""
    observations = random_observations(agent, count, seed=3)
    if isinstance(agent.spaces.observation, dict):
        return observations, {key[1]: value for key, value in zip(agent.spaces.observations, observations, strict=True)}
    return observations, observations[0]


@pytest.mark.parametrize("kind", SPACES)
def test_the_policy_module_acts_like_the_agent(kind: str) -> None:
    agent = make_agent(kind)
    observations, given = observed(agent, 7)
    torch.testing.assert_close(PolicyModule(agent)(*observations), agent.act(given).cpu())


@pytest.mark.parametrize(
    ("kind", "options"),
    [*[(kind, {}) for kind in SPACES], *[(kind, NETWORKS["all"]) for kind in ("continuous", "discrete")]],
    ids=str,
)
def test_an_onnx_file_acts_like_the_agent_whatever_the_batch_size(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    agent = make_agent(kind, **options)
    assert export_policy(agent, tmp_path / "policy.onnx", "onnx") <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["policy.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    names = [node.name for node in session.get_inputs()]
    assert names == (["observation_goal", "observation_position"] if kind == "dict" else ["observation"])
    for count in (1, 7):
        observations, given = observed(agent, count)
        arrays = {name: value.numpy() for name, value in zip(names, observations, strict=True)}
        np.testing.assert_allclose(session.run(["action"], arrays)[0], agent.act(given).cpu().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "written", "options"),
    [
        *[
            (kind, written, {})
            for kind in ("continuous", "dict", "image", "channels first")
            for written in ("torch", "torchscript")
        ],
        *[(kind, "torchscript", options) for kind in ("continuous", "discrete") for options in OBJECTIVES.values()],
        *[("continuous", "torchscript", options) for options in NETWORKS.values()],
        *[(kind, written, NETWORKS["all"]) for kind in ("continuous", "image") for written in ("torch", "torchscript")],
    ],
    ids=str,
)
def test_a_file_of_torch_acts_like_the_agent_whatever_the_batch_size(
    kind: str, written: Any, options: dict[str, str], tmp_path: Path
) -> None:
    agent = make_agent(kind, **options)
    export_policy(agent, tmp_path / "policy", written)
    # torch deprecates TorchScript; whoever asks for it knows.
    warnings.simplefilter("ignore")
    load = torch.jit.load if written == "torchscript" else lambda path: torch.export.load(path).module()
    module = load(tmp_path / "policy")
    for count in (1, 7):
        observations, given = observed(agent, count)
        torch.testing.assert_close(module(*observations), agent.act(given).cpu())


def test_the_normalisers_are_inside(tmp_path: Path) -> None:
    agent = make_agent("continuous")
    export_policy(agent, tmp_path / "policy.pt2", "torch")
    observation = torch.full((1, 3), 5.0)  # the mean: the networks see zeros
    action = torch.export.load(tmp_path / "policy.pt2").module()(observation)
    unit = PolicyModule(agent).actor(observation=torch.zeros(1, 3))[-1]
    torch.testing.assert_close(action, torch.tensor([0.0, 0.5]) + torch.tensor([2.0, 0.5]) * unit)


@pytest.mark.parametrize("broken", [False, True])
def test_the_agent_trains_on_as_it_did(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent("continuous")
    actor = agent.loss.actor_network
    before = [(p.requires_grad, p.data_ptr()) for p in actor.parameters()]
    assert actor.training
    if broken:
        monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ExportError, match="ZeroDivisionError"):
            export_policy(agent, tmp_path / "policy.pt2", "torch")
        assert not list(tmp_path.iterdir())
    else:
        export_policy(agent, tmp_path / "policy.pt2", "torch")
    assert [(p.requires_grad, p.data_ptr()) for p in actor.parameters()] == before
    assert all(module.training for module in actor.modules())


def test_a_policy_that_acts_differently_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("continuous", "discrete"):
        agent = make_agent(kind)
        path = tmp_path / f"{kind}.pt2"
        path.write_bytes(b"the one before")
        acting = {"continuous": lambda action: action + 0.01, "discrete": lambda action: 5 - action}[kind]
        written = export._FORMATS["torch"][0], lambda _, agent=agent, acting=acting: _differently(agent, acting)
        monkeypatch.setitem(export._FORMATS, "torch", written)  # type: ignore[arg-type]
        with pytest.raises(ExportError, match=r"differ by|takes other actions"):
            export_policy(agent, path, "torch")
        assert path.read_bytes() == b"the one before"


def _differently(agent: Agent, change: Any) -> Any:
    return lambda observation: change(agent.act(observation))


def test_mistakes_are_named(tmp_path: Path) -> None:
    agent = make_agent("continuous")
    with pytest.raises(ValueError, match="format must be one of"):
        export_policy(agent, tmp_path / "policy", "tflite")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_policy(agent, tmp_path / "nowhere" / "policy.pt2", "torch")
    with pytest.raises(ValueError, match="takes observation_goal, observation_position, got 1"):
        PolicyModule(make_agent("dict"))(torch.zeros(1, 3))


def test_random_observations_are_finite_where_bounds_are_those_of_float32() -> None:
    spaces = Spaces(Box((2,), low=(-3.4e38, -1.0), high=(3.4e38, 1.0)), Discrete(2))
    (observations,) = random_observations(Agent(spaces, IQLConfig(n_steps=10), seed=0), 100)
    assert observations.isfinite().all()
    assert observations[:, 1].abs().max() <= 1.0
