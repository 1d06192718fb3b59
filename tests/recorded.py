"""Files that record an environment."""

import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from iql_plugins.config import IQLConfig
from iql_plugins.plugins import host
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent

PENDULUM = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))


def agent_for(env: object) -> Agent:
    agent = Agent(PENDULUM, IQLConfig(n_steps=4, hidden_sizes=(8,), compile="no"), seed=0)
    agent.extra["run"] = {"env": env}
    return agent


def saved(agent: Agent, adapter: str, path: Path) -> Path:
    training = host().load(adapter).training
    assert training is not None
    training.save(training.from_agent(agent), path)
    return path


def minari_dataset(path: Path, specification: dict[str, Any], **metadata: Any) -> Path:
    """A small dataset of Pendulum's, which says that it is of another environment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari = pytest.importorskip("minari")
        from minari.data_collector import EpisodeBuffer

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINARI_DATASETS_PATH", str(path.parent))
            random = np.random.default_rng(0)
            episodes = [
                EpisodeBuffer(
                    observations=random.normal(size=(9, 3)).astype(np.float32),
                    actions=random.uniform(-2, 2, size=(8, 1)).astype(np.float32),
                    rewards=random.normal(size=8),
                    terminations=np.arange(8) == 7,
                    truncations=np.zeros(8, bool),
                )
                for _ in range(8)
            ]
            env = gymnasium.make("Pendulum-v1")
            minari.create_dataset_from_buffers(
                f"{path.name}-v0", episodes, observation_space=env.observation_space, action_space=env.action_space
            )
    path = path.with_name(f"{path.name}-v0")
    file = path / "data" / "metadata.json"
    complete = json.loads(env.spec.to_json()) | specification
    changed = {name: json.dumps(complete | value) for name, value in metadata.items()}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"env_spec": json.dumps(complete)} | changed))
    return path
