"""The paper's networks and distributions."""

import math
import re
from typing import Any, get_args

import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from tensordict.nn import InteractionType, set_interaction_type
from torch import nn

from iql_plugins.networks import (
    ACTIVATIONS,
    MLP,
    OrthogonalLinear,
    categorical_actor,
    critic,
    discrete_critic,
    gaussian_actor,
    value_function,
)
from iql_plugins.networks.builders import ActivationName, Dropout, LayerNorm, check_loaded, uninitialized
from iql_plugins.networks.distributions import Categorical, TanhMeanNormal, TanhNormal


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Locations, scales and actions of two policies."""
    loc, scale = torch.tensor([[0.3, -1.2], [2.0, 0.0]]), torch.tensor([[0.5, 1.5], [0.1, 1.0]])
    return loc, scale, torch.tensor([[0.1, -0.7], [0.95, 0.2]])


def test_the_density_of_the_papers_policy_is_a_gaussian_around_the_tanh() -> None:
    loc, scale, actions = example()
    log_prob = TanhMeanNormal(loc, scale).log_prob(actions)
    mean, deviation, value = (tensor.numpy(force=True) for tensor in (loc.tanh(), scale, actions))
    expected = stats.norm(mean, deviation).logpdf(value).sum(-1)
    torch.testing.assert_close(log_prob, torch.tensor(expected).float())


def test_the_density_of_the_squashed_policy_equals_torchs_inside_the_bounds() -> None:
    loc, scale, actions = example()
    base = torch.distributions.Normal(loc, scale)
    squashed = torch.distributions.TransformedDistribution(base, [torch.distributions.TanhTransform()])
    expected = torch.distributions.Independent(squashed, 1).log_prob(actions)
    torch.testing.assert_close(TanhNormal(loc, scale).log_prob(actions), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distribution", [TanhMeanNormal, TanhNormal])
def test_a_density_integrates_to_one_over_bounds_of_any_range(distribution: type) -> None:
    # The unsquashed policy has mass outside the bounds, too.
    policy = distribution(torch.tensor([0.2]), torch.tensor([0.1]), low=-3.0, high=5.0)
    grid = torch.linspace(-3, 5, 200_001).unsqueeze(-1)
    assert torch.trapezoid(policy.log_prob(grid).exp(), grid.squeeze(-1)).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("distribution", [TanhMeanNormal, TanhNormal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("action", [-1.0, 1.0, -1.0000001, 1.05, 3.4])
def test_densities_and_gradients_are_finite_at_and_outside_the_bounds(
    distribution: type, dtype: torch.dtype, action: float
) -> None:
    loc = torch.full((2, 3), 0.5, dtype=dtype, requires_grad=True)
    scale = torch.full((2, 3), 0.1, dtype=dtype, requires_grad=True)
    log_prob = distribution(loc, scale).log_prob(torch.full((2, 3), action, dtype=dtype))
    log_prob.sum().backward()
    assert log_prob.shape == (2,)
    assert log_prob.isfinite().all()
    for tensor in (loc, scale):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("distribution", [TanhMeanNormal, TanhNormal])
def test_samples_follow_the_density(distribution: type) -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
    policy = distribution(torch.tensor([0.4, -0.3]), torch.tensor([0.3, 0.2]), low=low, high=high)
    samples = policy.sample(torch.Size([20_000]))
    assert samples.shape == (20_000, 2)
    if distribution is TanhNormal:
        assert ((samples >= low) & (samples <= high)).all()
    for i in range(2):
        marginal = distribution(policy.loc[i : i + 1], policy.scale[i : i + 1], low=low[i], high=high[i])
        grid = torch.linspace(samples[:, i].min().item(), samples[:, i].max().item(), 5001)
        cdf = torch.cumulative_trapezoid(marginal.log_prob(grid.unsqueeze(-1)).exp(), grid)
        fit = stats.kstest(samples[:, i].numpy(force=True), lambda x, g=grid, c=cdf: _interpolate(x, g, c))
        assert fit.pvalue > 1e-3


def _interpolate(x, grid: torch.Tensor, cdf: torch.Tensor):
    import numpy as np

    return np.interp(x, grid[1:].numpy(force=True), cdf.numpy(force=True))


@pytest.mark.parametrize("distribution", [TanhMeanNormal, TanhNormal])
def test_the_deterministic_action_is_the_scaled_tanh(distribution: type) -> None:
    policy = distribution(torch.tensor([1.0]), torch.tensor([0.3]), low=-2.0, high=4.0)
    assert policy.deterministic_sample.item() == pytest.approx(1.0 + 3.0 * math.tanh(1.0))
    assert torch.equal(policy.mode, policy.deterministic_sample)


def test_the_entropy_of_the_papers_policy() -> None:
    policy = TanhMeanNormal(torch.zeros(2), torch.tensor([0.5, 2.0]), high=3.0, low=-3.0)
    expected = sum(stats.norm(0, 3 * s).entropy() for s in (0.5, 2.0))
    assert policy.entropy().item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_a_categorical_takes_rows_and_columns(shape: tuple[int, ...]) -> None:
    policy = Categorical(logits=torch.randn(5, 4))
    action = torch.tensor([0, 1, 2, 3, 0])
    expected = policy.logits.log_softmax(-1)[torch.arange(5), action]
    torch.testing.assert_close(policy.log_prob(action.reshape(shape)), expected)


def test_a_categorical_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match=r"action must have shape \(5,\) or \(5, 1\), got \(3,\)"):
        Categorical(logits=torch.randn(5, 4)).log_prob(torch.zeros(3, dtype=torch.int64))


def test_an_actor_acts_deterministically_unless_told_otherwise() -> None:
    batch = TensorDict({"observation": torch.randn(6, 5)}, 6)
    for actor, shape in ((gaussian_actor(5, 3), (6, 3)), (categorical_actor(5, 4), (6,))):
        first, second = (actor(batch.clone())["action"] for _ in "12")
        assert first.shape == shape
        assert torch.equal(first, second)
        with set_interaction_type(InteractionType.RANDOM):
            assert not torch.equal(*(actor(batch.clone())["action"] for _ in "12"))


def test_the_log_standard_deviation_is_clipped_and_independent_of_the_state() -> None:
    actor = gaussian_actor(5, 3)
    with torch.no_grad():
        actor[0].module.log_std.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    scale = actor.get_dist(TensorDict({"observation": torch.randn(6, 5)}, 6)).scale
    torch.testing.assert_close(scale, torch.tensor([-5.0, 0.0, 2.0]).exp().expand(6, 3))


def test_weights_are_orthogonal_with_gain_root_two_and_biases_zero() -> None:
    for layer in MLP(4, 3, (8, 8)).modules():
        if isinstance(layer, OrthogonalLinear):
            weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), rtol=1e-5, atol=1e-5)
            assert not layer.bias.any()


def test_torchs_own_initialisation_is_that_of_its_linear_layers() -> None:
    torch.manual_seed(3)
    network = MLP(4, 3, (8, 8), initialization="torch")
    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="initialization must be one of 'orthogonal', 'torch', got 'xavier'"):
        MLP(4, 3, initialization="xavier")  # type: ignore[arg-type]


def test_dropout_is_torchs_on_a_cpu() -> None:
    ours, theirs, x = MLP(4, 1, dropout=0.3).layers[2], nn.Dropout(0.3), torch.randn(6, 5, device="cpu")
    outputs = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    assert (outputs[0] == 0).any()
    assert ours.eval()(x) is x
    assert not MLP(4, 1, dropout=1.0).layers[2](x).any()


def test_normalisation_comes_before_each_activation_and_dropout_behind_it() -> None:
    network = MLP(4, 1, (8, 6), dropout=0.1, activation=nn.ELU, layer_norm=True)
    hidden = [OrthogonalLinear, LayerNorm, nn.ELU, Dropout]
    assert [type(layer) for layer in network.layers] == [*hidden, *hidden, OrthogonalLinear]
    x = torch.randn(5, 4)
    features = network.eval().layers[:2](x)
    torch.testing.assert_close(features.mean(-1), torch.zeros(5), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(features.var(-1, correction=0), torch.ones(5), atol=1e-3, rtol=0.0)


def test_every_activation_has_a_name() -> None:
    assert set(ACTIVATIONS) == set(get_args(ActivationName))
    x = torch.linspace(-3, 3, 50)
    for name, kind in ACTIVATIONS.items():
        torch.testing.assert_close(kind()(x), getattr(nn.functional, name)(x))


@pytest.mark.parametrize(
    ("options", "missed"),
    [
        ({}, "module.layers.2.weight, module.layers.2.bias"),
        ({"initialization": "torch"}, "module.layers.2.weight, module.layers.2.bias"),
        ({"layer_norm": True}, "module.layers.1.weight, module.layers.1.bias"),
    ],
    ids=str,
)
def test_weights_that_are_loaded_are_not_drawn_and_are_missed(options: dict[str, Any], missed: str) -> None:
    state = torch.get_rng_state()
    with uninitialized():
        network = critic(3, 2, hidden_sizes=(8,), **options)
    assert torch.equal(torch.get_rng_state(), state)
    saved = critic(3, 2, hidden_sizes=(8,), **options).state_dict()
    absent = missed.split(", ")
    network.load_state_dict({name: saved[name] for name in saved if name not in absent}, strict=False)
    with pytest.raises(RuntimeError, match=f"^{re.escape(missed)} were not loaded"):
        check_loaded(network)
    network.load_state_dict(saved)
    check_loaded(network)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("actor", [gaussian_actor(3, 2), categorical_actor(3, 4)], ids=["gaussian", "categorical"])
def test_a_module_that_holds_an_actor_can_be_traced(actor: nn.Module) -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor = actor

        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            action: torch.Tensor = self.actor(TensorDict({"observation": observation}))["action"]
            return action

    traced = torch.jit.trace(Policy().eval(), torch.zeros(1, 3))
    observation = torch.randn(5, 3)
    torch.testing.assert_close(traced(observation), Policy()(observation))


def test_the_networks_are_the_papers() -> None:
    for network, sizes in (
        (gaussian_actor(17, 6), [3, 17 * 256 + 256 + 256 * 256 + 256 + 256 * 6 + 6 + 6]),
        (critic(17, 6), [3, 23 * 256 + 256 + 256 * 256 + 256 + 256 + 1]),
        (value_function(17), [3, 17 * 256 + 256 + 256 * 256 + 256 + 256 + 1]),
        (discrete_critic(17, 6), [3, 17 * 256 + 256 + 256 * 256 + 256 + 256 * 6 + 6]),
    ):
        linear = [m for m in network.modules() if isinstance(m, OrthogonalLinear)]
        assert [len(linear), sum(p.numel() for p in network.parameters())] == sizes


def test_tensor_bounds_move_with_the_policy() -> None:
    actor = gaussian_actor(5, 2, low=torch.tensor([-1.0, 0.0]), high=torch.tensor([1.0, 4.0])).to("meta")
    assert actor(observation=torch.zeros(3, 5, device="meta"))[-1].is_meta
    double = gaussian_actor(5, 2, low=torch.tensor([-1.0, 0.0]), high=torch.tensor([1.0, 4.0])).double()
    assert double(observation=torch.zeros(3, 5).double())[-1].dtype == torch.float64
