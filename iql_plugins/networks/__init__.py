"""The paper's networks, and what they are made of."""

from iql_plugins.networks.builders import (
    ACTIVATIONS,
    LOG_STD_RANGE,
    MLP,
    GaussianHead,
    OrthogonalLinear,
    categorical_actor,
    critic,
    default_value_function,
    discrete_critic,
    gaussian_actor,
    networks_for,
    value_function,
)

__all__ = [
    "ACTIVATIONS",
    "LOG_STD_RANGE",
    "MLP",
    "GaussianHead",
    "OrthogonalLinear",
    "categorical_actor",
    "critic",
    "default_value_function",
    "discrete_critic",
    "gaussian_actor",
    "networks_for",
    "value_function",
]
