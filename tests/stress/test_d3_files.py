"""``.d3`` files in which one bit is another one: an error, or the very algorithm that was saved."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import d3rlpy
import numpy as np
import pytest
from d3rlpy.preprocessing import StandardObservationScaler
from d3rlpy_helpers import CONTINUOUS, DISCRETE, config, dataset, fitted, observations

import iql_d3rlpy
from iql_plugins.checkpoint import CheckpointError, checksum

LOADERS = {"ours": (iql_d3rlpy.load, CheckpointError), "d3rlpy's": (d3rlpy.load_learnable, Exception)}


@pytest.mark.parametrize(("loader", "kind"), [("ours", CONTINUOUS), ("ours", DISCRETE), ("d3rlpy's", CONTINUOUS)])
@pytest.mark.slow
def test_a_flipped_bit_is_an_error_or_changes_nothing(loader: str, kind: str, tmp_path: Path, stress: int) -> None:
    load, error = LOADERS[loader]
    algorithm = fitted(config(kind, observation_scaler=StandardObservationScaler()).create(), dataset(kind))
    path = tmp_path / "algorithm.d3"
    algorithm.save(path)
    content, expected = path.read_bytes(), state(load(path))
    draw, refused = random.Random(0), 0
    for _ in range(300 * stress):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        loaded = attempt(load, error, path)
        refused += loaded is None
        assert loaded is None or state(loaded) == expected
    assert refused > 100 * stress


def attempt(load: Callable[[Path], Any], error: type[Exception], path: Path) -> Any:
    try:
        return load(path)
    except error:
        return None


def state(algorithm: Any) -> tuple[str, str, bytes]:
    """All that an algorithm acts by and goes on with."""
    modules = algorithm.impl.modules
    networks = {"loss": modules.loss.state_dict(), "training": modules.training.state_dict()}
    return algorithm.config.serialize(), checksum(networks), np.asarray(algorithm.predict(observations())).tobytes()
