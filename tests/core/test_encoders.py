"""Observations of every kind as one vector."""

import pytest
import torch
from agents import SPACES, draw
from torch import nn

from iql_plugins.networks.encoders import Encoded, NatureCNN, ObservationEncoder, is_plain
from iql_plugins.spaces import Box, Discrete


def test_integers_become_one_hot_counted_from_the_start() -> None:
    encoder = ObservationEncoder([Discrete(3, start=-1)])
    assert encoder(torch.tensor([[-1], [1]])).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_numbers_are_flattened_in_the_order_of_the_spaces() -> None:
    encoder = ObservationEncoder([Box((2, 2)), Discrete(2), Box(())])
    features = encoder(torch.arange(4.0).reshape(1, 2, 2), torch.tensor([[1]]), torch.tensor([7.0]))
    assert features.tolist() == [[0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 7.0]]
    assert encoder.size == 7


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_the_batch_shape_is_kept(batch: tuple[int, ...]) -> None:
    encoder = ObservationEncoder([Box((36, 36, 3), "uint8"), Box((2,)), Discrete(3)])
    inputs = (
        torch.randint(0, 256, (*batch, 36, 36, 3), dtype=torch.uint8),
        torch.randn(*batch, 2),
        torch.randint(3, (*batch, 1)),
    )
    assert encoder(*inputs).shape == (*batch, encoder.size)


def test_images_are_the_same_with_channels_first_and_last() -> None:
    first, last = NatureCNN((3, 40, 36)), NatureCNN((40, 36, 3))
    last.load_state_dict(first.state_dict())
    image = torch.randint(0, 256, (2, 3, 40, 36), dtype=torch.uint8)
    assert torch.equal(first(image), last(image.movedim(1, -1)))


def test_pixels_are_scaled_to_one_and_floats_taken_alike() -> None:
    network = NatureCNN((1, 36, 36))
    image = torch.randint(0, 256, (2, 1, 36, 36), dtype=torch.uint8)
    assert torch.equal(network(image), network(image.float()))
    seen: list[torch.Tensor] = []
    network.convolutions.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.full((1, 1, 36, 36), 255, dtype=torch.uint8))
    assert seen[0].unique().tolist() == [1.0]


def test_an_image_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 36 pixels a side .* got shape \(3, 36, 35\): pass networks"):
        NatureCNN((3, 36, 35))
    assert NatureCNN((3, 36, 36))(torch.zeros(1, 3, 36, 36)).shape == (1, 512)


def test_only_flat_numbers_are_plain() -> None:
    assert is_plain([Box((3,)), Box((2,))])
    for space in (Box((3, 2)), Box((128,), "uint8"), Box((36, 36, 3), "uint8"), Discrete(2)):
        assert not is_plain([Box((3,)), space])


def test_further_inputs_follow_the_features() -> None:
    class Shapes(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return torch.tensor([tensor.shape[-1] for tensor in inputs])

    spaces = list(SPACES["dict"].observations.values())
    encoded = Encoded(ObservationEncoder(spaces), Shapes())
    assert encoded(*map(draw, spaces), torch.zeros(80, 4)).tolist() == [5, 4]


def test_a_missing_observation_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ObservationEncoder([Box((3,)), Discrete(2)])(torch.zeros(1, 3))
