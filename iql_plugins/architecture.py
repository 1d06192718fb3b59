"""What networks may be, by the names in a configuration. Whoever reads one imports torch alone."""

from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn

__all__ = ["ACTIVATIONS", "ActivationName", "Initialization", "Role"]

ActivationName = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "mish", "tanh"]
Initialization = Literal["orthogonal", "torch"]
Role = Literal["actor", "critic", "value"]
#: What comes behind a hidden layer, by the name in a configuration.
ACTIVATIONS: Mapping[ActivationName, type[nn.Module]] = dict(
    zip(
        get_args(ActivationName),
        (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
        strict=True,
    )
)
