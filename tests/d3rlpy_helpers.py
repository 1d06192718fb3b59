"""Small datasets and algorithms that the tests of the d3rlpy adapter share."""

from typing import Any

import numpy as np
import torch
from d3rlpy.dataset import MDPDataset
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy.models import PixelEncoderFactory, VectorEncoderFactory

from iql_d3rlpy import DiscreteIQLConfig, IQLConfig

VECTOR, PIXEL, ACTION, ACTIONS, STEPS = (5,), (4, 36, 36), 2, 3, 60
SMALL = VectorEncoderFactory(hidden_units=[8])
CONTINUOUS, DISCRETE = "continuous", "discrete"
QUIET: dict[str, Any] = {"logger_adapter": NoopAdapterFactory(), "show_progress": False}


def dataset(kind: str, shape: tuple[int, ...] = VECTOR, **options: Any) -> MDPDataset:
    """Three episodes, one of which terminates, in units that scalers have something to do with."""
    rng = np.random.default_rng(0)
    observations = (
        rng.integers(0, 256, (STEPS, *shape)).astype(np.uint8)
        if len(shape) == 3
        else rng.normal(3.0, 2.0, (STEPS, *shape)).astype(np.float32)
    )
    actions = (
        rng.integers(0, ACTIONS, (STEPS, 1))
        if kind == DISCRETE
        else rng.uniform(-1.0, 0.5, (STEPS, ACTION)).astype(np.float32)
    )
    terminals, timeouts = np.zeros(STEPS), np.zeros(STEPS)
    terminals[19], timeouts[[39, 59]] = 1.0, 1.0
    rewards = rng.normal(1.0, 2.0, STEPS).astype(np.float32)
    return MDPDataset(observations, actions, rewards, terminals, timeouts, **options)


def config(kind: str, **changes: Any) -> Any:
    """A small configuration."""
    defaults = {f"{name}_encoder_factory": SMALL for name in ("actor", "critic", "value")}
    return (DiscreteIQLConfig if kind == DISCRETE else IQLConfig)(**({"batch_size": 16} | defaults | changes))


def pixel_config(kind: str, **changes: Any) -> Any:
    """A small configuration for images."""
    factory = PixelEncoderFactory(filters=[[4, 8, 4]], feature_size=8)
    factories = {f"{name}_encoder_factory": factory for name in ("actor", "critic", "value")}
    return config(kind, **(factories | changes))


def observations(shape: tuple[int, ...] = VECTOR, count: int = 7) -> np.ndarray[Any, Any]:
    """``[count, *shape]`` from the same distribution as the dataset's."""
    rng = np.random.default_rng(1)
    if len(shape) == 3:
        return rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    return rng.normal(3.0, 2.0, (count, *shape)).astype(np.float32)


def fitted(algorithm: Any, data: MDPDataset, steps: int = 4, **options: Any) -> Any:
    """The algorithm after a few steps."""
    algorithm.fit(data, n_steps=steps, n_steps_per_epoch=steps, **QUIET, **options)
    return algorithm


def weights(algorithm: Any) -> dict[str, torch.Tensor]:
    """Copies of all networks' tensors."""
    return {name: tensor.clone() for name, tensor in algorithm.impl.agent.loss.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def assert_trains_on(first: Any, second: Any, data: MDPDataset) -> None:
    """Both take the same further steps."""
    for algorithm in (first, second):
        np.random.seed(5)
        fitted(algorithm, data)
    assert_same_weights(weights(first), weights(second))
