"""Observations of every kind as one vector: numbers flattened, integers one-hot, images through convolutions."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iql_plugins.spaces import Box, Discrete, Space

__all__ = ["Encoded", "Evaluations", "NatureCNN", "ObservationEncoder"]

NATURE_FEATURES = 512
#: The smallest image that the convolutions reduce to at least one pixel.
SMALLEST_IMAGE = 36


class NatureCNN(nn.Module):
    """The convolutions of Mnih et al. 2015 ("Human-level control through deep reinforcement learning").

    Args:
        shape: of one image, channels first or last: the smallest dimension is that of the channels.

    Raises:
        ValueError: for an image of fewer than 36 pixels a side.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.channels_last = shape[-1] < min(shape[:-1])
        channels, height, width = (shape[-1], *shape[:-1]) if self.channels_last else shape
        if min(height, width) < SMALLEST_IMAGE:
            raise ValueError(
                f"images must have at least {SMALLEST_IMAGE} pixels a side for the default network, got shape "
                f"{tuple(shape)}: pass networks of your own"
            )
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, channels, height, width)).shape[-1]
        self.linear = nn.Sequential(nn.Linear(flat, NATURE_FEATURES), nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        """``[*B, 512]`` features of ``[*B, *shape]`` pixels from 0 to 255."""
        pixels = image.reshape(-1, *image.shape[-3:])
        if self.channels_last:
            pixels = pixels.movedim(-1, 1)
        elif pixels.device.type == "cpu":
            # In memory, too, channels are last: oneDNN's backward pass takes two thirds of the time then.
            pixels = pixels.movedim(1, -1).contiguous().movedim(-1, 1)
        weight: Tensor = self.convolutions[0].weight  # type: ignore[assignment]
        features: Tensor = self.linear(self.convolutions(pixels.to(weight.dtype) / 255.0))
        return features.reshape(*image.shape[:-3], -1)


class ObservationEncoder(nn.Module):
    """Concatenates observations of any spaces.

    Args:
        spaces: one for each input, in order.

    Attributes:
        size: number of features.
    """

    def __init__(self, spaces: Sequence[Space]) -> None:
        super().__init__()
        self.spaces = tuple(spaces)
        self.images = nn.ModuleDict(
            {str(i): NatureCNN(s.shape) for i, s in enumerate(self.spaces) if isinstance(s, Box) and s.is_image}
        )
        self.size = sum(map(_size, self.spaces))

    def forward(self, *observations: Tensor) -> Tensor:
        """``[*B, size]`` from one observation for each space."""
        parts = []
        for index, (space, observation) in enumerate(zip(self.spaces, observations, strict=True)):
            if isinstance(space, Discrete):
                parts.append(_one_hot(observation, space))
            elif space.is_image:
                parts.append(self.images[str(index)](observation))
            else:
                batch_shape = observation.shape[: observation.ndim - len(space.shape)]
                parts.append(observation.reshape(*batch_shape, space.size).to(torch.get_default_dtype()))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Evaluations:
    """An encoder that several networks have, or copies of it with the very parameters, evaluated once.

    Observations are told apart by identity: these are of one batch, and are gone with it.

    Args:
        encoder: that of the network which trains it; the others' features have no gradient.
        trained: whether its gradient will be asked for, whoever asks for features first.
    """

    def __init__(self, encoder: ObservationEncoder, trained: bool) -> None:
        self.encoder = encoder
        self.trained = trained
        self._known: list[tuple[Sequence[Tensor], bool, Tensor]] = []

    def __call__(self, encoder: ObservationEncoder, observations: Sequence[Tensor]) -> Tensor:
        """``[*B, size]`` features.

        Args:
            encoder: of the network that asks.
            observations: as the encoder takes them.
        """
        trains = encoder is self.encoder
        gradient = torch.is_grad_enabled() and (trains or self.trained)
        found = [
            features
            for known, with_gradient, features in self._known
            if with_gradient >= gradient and all(map(operator.is_, known, observations))
        ]
        if found:
            features = found[0]
        else:
            with torch.set_grad_enabled(gradient):
                features = self.encoder(*observations)
            self._known.append((observations, gradient, features))
        return features if trains else features.detach()


class Encoded(nn.Module):
    """A perceptron over encoded observations and, after them, further inputs.

    Args:
        encoder: of the first inputs.
        body: takes the features and the other inputs.

    Attributes:
        evaluations: what is known of the encoder's features; None but for the time of a loss whose networks share it.
    """

    evaluations: Evaluations | None = None

    def __init__(self, encoder: ObservationEncoder, body: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.body = body

    def forward(self, *inputs: Tensor) -> Tensor:
        """``[*B, out_features]`` of the perceptron."""
        count = len(self.encoder.spaces)
        observations, evaluations = inputs[:count], self.evaluations
        features = self.encoder(*observations) if evaluations is None else evaluations(self.encoder, observations)
        output: Tensor = self.body(features, *inputs[count:])
        return output


def is_plain(spaces: Sequence[Space]) -> bool:
    """Whether concatenating the observations is all that there is to do."""
    return all(isinstance(s, Box) and len(s.shape) == 1 and s.dtype != "uint8" for s in spaces)


def _size(space: Space) -> int:
    if isinstance(space, Discrete):
        return space.n
    return NATURE_FEATURES if space.is_image else space.size


def _one_hot(observation: Tensor, space: Discrete) -> Tensor:
    index = observation.squeeze(-1) if observation.ndim and observation.shape[-1] == 1 else observation
    choices = torch.arange(space.start, space.start + space.n, device=observation.device)
    return (index.unsqueeze(-1) == choices).to(torch.get_default_dtype())
