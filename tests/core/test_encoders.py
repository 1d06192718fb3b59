"""Observations of every kind as one vector."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agents import SPACES, draw
from conftest import Encoder, gradients, keywords, make_batch, shared_encoder_loss
from torch import nn

from iql_plugins import IQLLoss
from iql_plugins.networks.encoders import Encoded, NatureCNN, ObservationEncoder, is_plain
from iql_plugins.spaces import Box, Discrete
from iql_plugins.training.gradients import LossGradients, traced


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


def test_images_are_the_same_with_channels_first_and_last(device: torch.device) -> None:
    first, last = NatureCNN((3, 40, 36)), NatureCNN((40, 36, 3))
    last.load_state_dict(first.state_dict())
    image = torch.randint(0, 256, (2, 3, 40, 36), dtype=torch.uint8)
    seen: list[torch.Tensor] = []
    for network in (first, last):
        network.convolutions.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert torch.equal(first(image), last(image.movedim(1, -1).contiguous()))
    # A CPU is faster where they are last in memory.
    if device.type == "cpu":
        assert all(pixels.is_contiguous(memory_format=torch.channels_last) for pixels in seen)


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


# Networks that share an encoder


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of encoders, one entry for each: whether it has a gradient."""
    seen: list[bool] = []
    forward = Encoder.forward

    def counted(self: Encoder, *observations: torch.Tensor) -> torch.Tensor:
        features = forward(self, *observations)
        seen.append(features.requires_grad)
        return features

    monkeypatch.setattr(Encoder, "forward", counted)
    return seen


def one_by_one(loss: IQLLoss) -> IQLLoss:
    """A copy of a loss, each of whose networks evaluates the encoder for itself."""
    copied = copy.deepcopy(loss)
    copied._encoder_owners.clear()
    return copied


def assert_the_same(loss: IQLLoss, other: IQLLoss, batch: Any) -> None:
    outputs, expected = loss(batch.copy()), other(batch.copy())
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(loss, outputs), gradients(other, expected))


@pytest.mark.parametrize("options", [{}, {"policy_extraction": "ddpg_bc"}, {"num_qvalue_nets": 1}], ids=str)
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_an_encoder_that_networks_share_is_evaluated_once_for_each_observation(
    kind: str, options: dict[str, Any], randomness: str, evaluations: list[bool]
) -> None:
    loss, batch = shared_encoder_loss(kind, **options), make_batch(kind)
    loss.vmap_randomness = randomness
    with torch.no_grad():
        for target in loss._network("target_qvalue_network").buffers():
            target.mul_(0.9)
    loss(batch.copy())
    # Of s by the encoder and by that of the targets, and of s'; the policy's loss alone trains it.
    assert sorted(evaluations) == [False, False, True]
    other = one_by_one(loss)
    evaluations.clear()
    other(batch.copy())
    assert len(evaluations) > 3
    assert_the_same(loss, other, batch)
    # Nothing is left over: what is written into a batch counts in the next call.
    for tensor in (batch["observation"], batch["next", "observation"]):
        tensor.add_(1.0)
    assert_the_same(loss, other, batch)
    assert not any(isinstance(module, Encoded) and module.evaluations for module in loss.modules())


def test_a_traced_loss_has_each_evaluation_once(kind: str, evaluations: list[bool]) -> None:
    loss = shared_encoder_loss(kind)
    batch, computed = keywords(make_batch(kind)), LossGradients(loss)
    state = computed.state()
    graph = traced(loss, state, batch, stacked=False)
    assert len(evaluations) == 3
    grads, outputs = graph(state, batch, [])
    other = one_by_one(loss)
    expected = other(**batch)
    torch.testing.assert_close(outputs, tuple(expected))
    torch.testing.assert_close(grads, gradients(other, expected))


CALLS: dict[str, Callable[[IQLLoss, Any], object]] = {
    "value_loss": lambda loss, batch: loss.value_loss(batch),
    "qvalue_loss": lambda loss, batch: loss.qvalue_loss(batch),
    "labels": lambda loss, batch: loss.labels(batch),
    "no_grad": torch.no_grad()(lambda loss, batch: loss(batch)),
}


@pytest.mark.parametrize("name", CALLS)
def test_where_nothing_trains_a_shared_encoder_it_has_no_gradient(name: str, evaluations: list[bool]) -> None:
    CALLS[name](shared_encoder_loss("continuous"), make_batch("continuous"))
    assert evaluations
    assert not any(evaluations)
    assert len(evaluations) <= 3


def hooked() -> Encoder:
    encoder = Encoder()
    encoder.layers[0].register_forward_hook(lambda *_: None)
    return encoder


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        (lambda: Encoder(nn.BatchNorm1d(6)), {}),
        (lambda: Encoder(nn.Dropout(0.5)), {}),
        (hooked, {}),
        # Each loss may be asked for its gradient alone.
        (Encoder, {"separate_losses": False}),
    ],
    ids=["statistics", "dropout", "hooks", "all losses"],
)
def test_an_encoder_whose_evaluations_differ_or_are_looked_at_has_all_of_them(
    encoder: Callable[[], Encoder], options: dict[str, Any], evaluations: list[bool]
) -> None:
    loss, batch = shared_encoder_loss("continuous", encoder(), **options), make_batch("continuous")
    counts = []
    for each in (loss, one_by_one(loss)):
        evaluations.clear()
        each(batch.copy())
        counts.append(len(evaluations))
    assert counts == [7, 7]
