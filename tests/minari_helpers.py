"""Local datasets of Minari. Who imports this is skipped without it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

BOX = spaces.Box(-np.inf, np.inf, (2,), np.float64)
TORQUE = spaces.Box(-2.0, 2.0, (1,), np.float32)


def episode(length: int, end: str, *, discrete: bool = False, nested: bool = False, start: float = 0.0) -> Any:
    """An episode that terminates (T), is truncated (c), both (b) or neither (-); observations count steps."""
    place = np.arange(start, start + length + 1).repeat(2).reshape(-1, 2)
    flag = np.arange(length) == length - 1
    return EpisodeBuffer(
        observations={"place": place, "goal": np.arange(length + 1) % 5} if nested else place,
        actions=np.arange(length) % 3 if discrete else np.full((length, 1), 0.5, np.float32),
        rewards=np.arange(length, dtype=np.float64),
        terminations=flag & (end in "Tb"),
        truncations=flag & (end in "cb"),
    )


def make(name: str, episodes: list[Any], observation_space: Any = BOX, action_space: Any = TORQUE) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            name, episodes, observation_space=observation_space, action_space=action_space
        )


def walk(folder: Path, name: str = "walk-v0") -> Path:
    """The data of a dataset of two episodes, five steps in all, among those in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        make(name, [episode(3, "T"), episode(2, "c")])
    return folder / name / "data"
