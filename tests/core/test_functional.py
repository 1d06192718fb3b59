"""Hand-computed numbers for every equation, and properties that hold for all inputs."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import tensor

from iql_plugins.losses import functional as F

FLOATS = st.floats(-1e6, 1e6, width=32)


def vectors(*shape: int) -> st.SearchStrategy[torch.Tensor]:
    return hnp.arrays(np.float32, shape or hnp.array_shapes(max_dims=3, max_side=4), elements=FLOATS).map(torch.tensor)


@pytest.mark.parametrize(
    ("diff", "expectile", "expected"),
    [
        (2.0, 0.7, 0.7 * 4),  # V too low by 2
        (-2.0, 0.7, 0.3 * 4),  # V too high by 2
        (2.0, 0.9, 3.6),
        (-2.0, 0.9, 0.4),
        (3.0, 0.5, 4.5),
        (-3.0, 0.5, 4.5),
        (-3.0, 1.0, 0.0),
        (0.0, 0.7, 0.0),
    ],
)
def test_the_expectile_loss_weighs_the_two_sides(diff: float, expectile: float, expected: float) -> None:
    assert F.expectile_loss(tensor([diff]), expectile).item() == pytest.approx(expected)


def test_the_minimiser_of_the_expectile_loss_is_the_expectile() -> None:
    # The 0.75-expectile of {0, 4}: 0.75 * (4 - v) = 0.25 * v, so v = 3.
    candidates = torch.linspace(0, 4, 4001)
    losses = sum(F.expectile_loss(q - candidates, 0.75) for q in (0.0, 4.0))
    assert candidates[losses.argmin()].item() == pytest.approx(3.0, abs=1e-3)


Q = tensor([1.0, 0.0, -2.0, 4.0], dtype=torch.float64)
#: The losses of V per sample, from Q(s, a) and V(s).
VALUE_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "expectile": lambda q, v: F.expectile_loss(q - v, 0.75),
    "quantile": lambda q, v: F.quantile_loss(q - v, 0.75),
    "gumbel": lambda q, v: F.gumbel_loss(q - v, 2.0),
    "sparse": lambda q, v: F.sparse_loss(q - v, v, 0.5),
    "exponential": lambda q, v: F.exponential_loss(q - v, v, 2.0),
}
#: Those that the whole batch divides by e to its largest u / 2: with a mask, and without the division.
SCALED: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "gumbel": (
        lambda q, v, mask: F.gumbel_loss(q - v, 2.0, mask=mask),
        lambda q, v: ((q - v) / 2.0).exp() - (q - v) / 2.0 - 1.0,
    ),
    "exponential": (
        lambda q, v, mask: F.exponential_loss(q - v, v, 2.0, mask=mask),
        lambda q, v: ((q - v) / 2.0).exp() + v / 2.0,
    ),
}


@pytest.mark.parametrize(
    ("name", "q", "v", "expected"),
    [
        ("quantile", [2.0, -2.0, 0.0], 0.0, [1.5, 0.5, 0.0]),
        # z = 2, 1 and 0, m = 2.
        ("gumbel", [4.0, 2.0, 0.0], 0.0, [1 - 3 * math.exp(-2), math.exp(-1) - 2 * math.exp(-2), 0.0]),
        # z = 7, clipped, and -1: m = 7.
        ("gumbel", [100.0, -2.0], 0.0, [1 - 8 * math.exp(-7), math.exp(-8)]),
        # z = -2 and -3: m is -1 at least.
        ("gumbel", [-4.0, -6.0], 0.0, [math.exp(-1) + math.e, math.exp(-2) + 2 * math.e]),
        # t = u + 1: 3, 0 and -1.
        ("sparse", [3.0, 0.0, -1.0], 1.0, [9.0 + 2.0, 2.0, 2.0]),
        # t = 1, 0 and -1, m = 1.
        ("exponential", [3.0, 1.0, -1.0], 1.0, [1 + 0.5 / math.e, 1.5 / math.e, math.exp(-2) + 0.5 / math.e]),
        # t = 5, clipped: m = 5. And t = -2: m is -1 at least.
        ("exponential", [100.0], 2.0, [1 + math.exp(-5)]),
        ("exponential", [-2.0], 2.0, [math.exp(-1) + math.e]),
    ],
)
def test_a_loss_of_v_by_hand(name: str, q: list[float], v: float, expected: list[float]) -> None:
    value = torch.full((len(q),), v, dtype=torch.float64)
    loss = VALUE_LOSSES[name](tensor(q, dtype=torch.float64), value)
    torch.testing.assert_close(loss, tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", SCALED)
def test_a_largest_exponent_is_that_of_the_samples_that_count(name: str) -> None:
    q, v = tensor([1.0, 9.0, math.nan]), torch.zeros(3)
    mask = tensor([True, False, False])
    expected, masked = VALUE_LOSSES[name](q[:1], v[:1]), SCALED[name][0]
    torch.testing.assert_close(masked(q, v, mask)[:1], expected)
    assert not torch.equal(masked(q[:2], v[:2], None)[:1], expected)
    assert masked(q, v, torch.zeros(3, dtype=torch.bool))[:2].isfinite().all()


@pytest.mark.parametrize("name", SCALED)
def test_a_loss_of_v_with_an_exponential_never_overflows(name: str) -> None:
    value = tensor([-1e30, -1e4, 0.0, 1e4, 1e30], requires_grad=True)
    loss = VALUE_LOSSES[name](torch.zeros(5), value)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert value.grad is not None
    assert value.grad.isfinite().all()


def slope(name: str, q: torch.Tensor, v: float) -> float:
    """Of the mean loss of one state, whose V is v."""
    value = tensor(v, dtype=torch.float64, requires_grad=True)
    VALUE_LOSSES[name](q, value.expand_as(q)).mean().backward()
    assert value.grad is not None
    return value.grad.item()


@pytest.mark.parametrize("v", [-1.0, 0.5, 3.0])
@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_the_gradient_of_a_loss_of_v_is_its_slope(name: str, v: float) -> None:
    step = 1e-6
    values = [Q.new_full(Q.shape, v + sign * step) for sign in (1, -1)]
    # What the whole batch is divided by is a constant of the gradient.
    scale = math.exp(-((Q - v) / 2.0).max().clamp(min=-1.0)) if name in SCALED else 1.0
    plain = SCALED[name][1] if name in SCALED else VALUE_LOSSES[name]
    higher, lower = (plain(Q, value).mean().item() for value in values)
    assert slope(name, Q, v) == pytest.approx(scale * (higher - lower) / (2 * step), rel=1e-6, abs=1e-8)


def fixed_point(name: str, q: torch.Tensor) -> float:
    """The V of a state at which the loss has its minimum, by bisection."""
    low, high = q.min().item() - 10.0, q.max().item() + 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(name, q, middle) < 0 else (low, middle)
    return low


def test_v_of_a_bandit_is_what_the_loss_is_named_after() -> None:
    weight = (0.75 - (fixed_point("expectile", Q) > Q).double()).abs()
    assert fixed_point("expectile", Q) == pytest.approx(((weight * Q).sum() / weight.sum()).item())
    # Between the third and the fourth of four, all are quantiles of 0.75; the lowest is found.
    assert fixed_point("quantile", Q) == pytest.approx(1.0)
    assert fixed_point("exponential", Q) == pytest.approx(2.0 * (Q / 2.0).exp().mean().log().item())
    of_sparse = (1.0 + (Q - fixed_point("sparse", Q)) / (2 * 0.5)).clamp(min=0.0).mean()
    assert of_sparse.item() == pytest.approx(1.0)
    assert fixed_point("gumbel", Q) == pytest.approx(2.0 * (Q / 2.0).exp().mean().log().item())


@pytest.mark.parametrize("expectile", [0.0, -0.1, 1.5, math.nan])
def test_an_expectile_out_of_range_is_refused(expectile: float) -> None:
    with pytest.raises(ValueError, match=r"expectile must be in \(0, 1\]"):
        F.expectile_loss(tensor([1.0]), expectile)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u: F.quantile_loss(u, 0.0), r"quantile must be in \(0, 1\), got 0.0"),
        (lambda u: F.quantile_loss(u, 1.0), r"quantile must be in \(0, 1\), got 1.0"),
        (lambda u: F.gumbel_loss(u, 0.0), "temperature must be a finite number > 0"),
        (lambda u: F.gumbel_loss(u, 1.0, -1.0), "largest_exponent must be a finite number > 0"),
        (lambda u: F.exponential_loss(u, u, -1.0), "alpha must be a finite number > 0"),
        (lambda u: F.sparse_loss(u, u, 0.0), "alpha must be a finite number > 0"),
        (lambda u: F.sparse_weight(u, 0.0), "max_weight must be a finite number > 0"),
        (lambda u: F.ddpg_bc_loss(u, u, -0.1), "bc_coefficient must be a finite number >= 0"),
    ],
)
def test_an_option_out_of_range_is_refused(call: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tensor([1.0]))


@pytest.mark.parametrize(
    ("advantage", "temperature", "max_weight", "expected"),
    [
        (0.0, 3.0, 100.0, 1.0),
        (1.0, 3.0, 100.0, math.exp(3)),
        (-1.0, 3.0, 100.0, math.exp(-3)),
        (2.0, 10.0, 100.0, 100.0),
        (2.0, 10.0, 7.0, 7.0),
        (5.0, 0.0, 100.0, 1.0),
        (math.inf, 0.0, 100.0, 1.0),
        (math.inf, 3.0, 100.0, 100.0),
        (-math.inf, 3.0, 100.0, 0.0),
        (-1.0, 3.0, 0.5, math.exp(-3)),
        (0.0, 3.0, 0.5, 0.5),
    ],
)
def test_the_advantage_weight(advantage: float, temperature: float, max_weight: float, expected: float) -> None:
    weight = F.advantage_weight(tensor([advantage]), temperature, max_weight)
    assert weight.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("advantage", "max_weight", "expected"),
    [(-1.0, 100.0, 0.0), (0.5, 100.0, 0.5), (200.0, 100.0, 100.0), (math.inf, 7.0, 7.0)],
)
def test_the_sparse_weight(advantage: float, max_weight: float, expected: float) -> None:
    assert F.sparse_weight(tensor([advantage]), max_weight).item() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_advantage_weight_and_its_gradient_never_overflow(dtype: torch.dtype) -> None:
    advantage = tensor([-6e4, -1.0, 0.0, 1.0, 6e4], dtype=dtype, requires_grad=True)
    weight = F.advantage_weight(advantage, 10.0)
    weight.sum().backward()
    assert weight.dtype == dtype
    assert weight.max() <= 100
    assert advantage.grad is not None
    assert advantage.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("temperature", math.inf), ("max_weight", 0.0), ("max_weight", math.nan)]
)
def test_a_weight_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        F.advantage_weight(tensor([0.0]), **({"temperature": 1.0} | {name: value}))


@pytest.mark.parametrize(
    ("q", "log_prob", "bc_coefficient", "mask", "expected"),
    [
        ([1.0, -3.0], [-0.5, -2.0], 1.0, None, [-0.5 + 0.5, 1.5 + 2.0]),
        ([1.0, -3.0], [-0.5, -2.0], 0.0, None, [-0.5, 1.5]),
        ([1.0, -3.0], [-0.5, -2.0], 2.0, [True, False], [-1.0 + 1.0, 3.0 + 4.0]),
        ([1.0, math.nan], [-0.5, -2.0], 1.0, [True, False], [-1.0 + 0.5, math.nan]),
        ([0.0, 0.0], [-0.5, -2.0], 1.0, None, [0.5, 2.0]),
    ],
)
def test_the_loss_of_ddpg_and_cloning(
    q: list[float], log_prob: list[float], bc_coefficient: float, mask: list[bool] | None, expected: list[float]
) -> None:
    loss = F.ddpg_bc_loss(tensor(q), tensor(log_prob), bc_coefficient, mask=None if mask is None else tensor(mask))
    torch.testing.assert_close(loss, tensor(expected), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_scale_of_the_critics_is_a_constant_of_the_gradient() -> None:
    q, log_prob = Q.clone().requires_grad_(), torch.zeros_like(Q, requires_grad=True)
    F.ddpg_bc_loss(q, log_prob, 0.5).sum().backward()
    torch.testing.assert_close(q.grad, torch.full_like(Q, -1 / (7 / 4 + 1e-6)))
    torch.testing.assert_close(log_prob.grad, torch.full_like(Q, -0.5))
    larger, before = (1000.0 * Q).requires_grad_(), torch.zeros_like(Q)
    F.ddpg_bc_loss(larger, before, 0.5).sum().backward()
    torch.testing.assert_close(larger.grad, q.grad / 1000.0)


def test_an_expectation_over_actions_trains_the_policy_alone() -> None:
    q = tensor([[1.0, 5.0], [-2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    logits = tensor([[0.0, 0.0], [0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    expected = F.expected_q(q, logits.softmax(-1))
    torch.testing.assert_close(expected, tensor([3.0, 1.0], dtype=torch.float64))
    expected.sum().backward()
    assert q.grad is None
    # π(a) (Q(a) - E Q).
    torch.testing.assert_close(logits.grad, tensor([[-1.0, 1.0], [-0.75, 0.75]], dtype=torch.float64))


def test_a_time_limit_bootstraps_and_a_terminal_state_does_not() -> None:
    target = F.td_target(tensor([1.0, 1.0]), tensor([10.0, 10.0]), tensor([False, True]), 0.9)
    assert target.tolist() == [10.0, 1.0]


def test_the_value_of_a_terminal_state_may_be_anything() -> None:
    assert F.td_target(tensor([1.0]), tensor([math.nan]), tensor([True]), 0.9).item() == 1.0


def test_a_discount_per_transition() -> None:
    target = F.td_target(tensor([1.0, 1.0]), tensor([10.0, 10.0]), tensor([False, False]), tensor([0.5, 0.25]))
    assert target.tolist() == [6.0, 3.5]


@pytest.mark.parametrize(
    ("lmbda", "expected"),
    [
        (0.0, [3.0, 6.0, 1.0]),  # r + 0.5 V(s'), none at the terminal end
        (1.0, [2.75, 3.5, 1.0]),  # y1 = 3 + 0.5 * 1; y0 = 1 + 0.5 * y1
        (0.5, [3.1875, 4.75, 1.0]),  # y1 = 3 + 0.5 (0.5 * 6 + 0.5 * 1); y0 = 1 + 0.5 (0.5 * 4 + 0.5 * y1)
    ],
)
def test_the_lambda_return_of_an_episode(lmbda: float, expected: list[float]) -> None:
    target = F.td_lambda_target(
        reward=tensor([1.0, 3.0, 1.0]),
        next_value=tensor([4.0, 6.0, 9.0]),
        done=tensor([False, False, True]),
        terminated=tensor([False, False, True]),
        discount=0.5,
        lmbda=lmbda,
    )
    assert target.tolist() == pytest.approx(expected)


def test_the_lambda_return_stops_at_a_time_limit_and_bootstraps_there() -> None:
    target = F.td_lambda_target(
        reward=tensor([1.0, 100.0]),
        next_value=tensor([4.0, 0.0]),
        done=tensor([True, False]),
        terminated=tensor([False, False]),
        discount=0.5,
        lmbda=1.0,
    )
    assert target[0].item() == 3.0


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100])
def test_the_lambda_return_equals_the_recursion(length: int) -> None:
    reward, next_value, discount = torch.rand(3, 2, length, dtype=torch.float64)
    done = torch.rand(2, length) < 0.3
    terminated = done & (torch.rand(2, length) < 0.5)
    target = F.td_lambda_target(reward, next_value, done, terminated, discount, 0.8)
    following = torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(length)):
        keep = torch.zeros(2) if t == length - 1 else 0.8 * (~done[:, t]).double()
        following = reward[:, t] + discount[:, t] * ~terminated[:, t] * (
            (1 - keep) * next_value[:, t] + keep * following
        )
        torch.testing.assert_close(target[:, t], following, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("l1", [0.5, 3.0]), ("l2", [0.25, 9.0]), ("smooth_l1", [0.125, 2.5]), ("huber_2", [0.125, 4.0])],
)
def test_the_distances(name: F.LossFunction, expected: list[float]) -> None:
    assert F.distance(tensor([0.5, 0.0]), tensor([0.0, 3.0]), name).tolist() == expected


def test_the_critics_losses_are_summed_and_the_priority_is_the_largest() -> None:
    q, target = tensor([[1.0], [2.0]]), tensor([4.0])
    assert F.qvalue_loss(q, target, "l2").item() == 9 + 4
    assert F.td_error(q, target).item() == 9


@pytest.mark.parametrize(
    ("reduction", "weight", "mask", "expected"),
    [
        ("mean", None, None, 2.0),
        ("sum", None, None, 6.0),
        ("mean", [1.0, 1.0, 2.0], None, (1 + 2 + 6) / 4),
        ("sum", [1.0, 1.0, 2.0], None, 9.0),
        ("mean", None, [True, False, True], 2.0),
        ("mean", None, [True, True, False], 1.5),
        ("mean", [1.0, 9.0, 3.0], [True, False, True], (1 + 9) / 4),
        ("sum", [1.0, 9.0, 3.0], [True, False, True], 10.0),
        ("mean", None, [False] * 3, 0.0),
        ("mean", [1.0, 1.0, 1.0], [False] * 3, 0.0),
        ("mean", [0.0, 0.0, 0.0], None, 0.0),
    ],
)
def test_the_reductions(reduction: F.Reduction, weight: list | None, mask: list | None, expected: float) -> None:
    loss = tensor([1.0, 2.0, 3.0])
    reduced = F.reduce_loss(
        loss,
        reduction,
        weight=None if weight is None else tensor(weight),
        mask=None if mask is None else tensor(mask),
    )
    assert reduced.item() == pytest.approx(expected)


def test_no_reduction_keeps_the_shape_and_zeroes_what_is_masked() -> None:
    loss = F.reduce_loss(tensor([1.0, math.nan]), "none", weight=tensor([3.0, math.nan]), mask=tensor([True, False]))
    assert loss.tolist() == [3.0, 0.0]


def test_a_column_is_never_broadcast_against_a_row() -> None:
    row, column = torch.zeros(3), torch.zeros(3, 1)
    flags = torch.zeros(3, dtype=torch.bool)
    q = torch.zeros(2, 3)
    calls = [
        lambda: F.td_target(row, column, flags, 0.9),
        lambda: F.td_target(column, row, flags, 0.9),
        lambda: F.td_target(row, row, flags.unsqueeze(-1), 0.9),
        lambda: F.td_target(row, row, flags, column),
        lambda: F.td_lambda_target(row, row, flags.unsqueeze(-1), flags, 0.9, 0.9),
        lambda: F.distance(row, column, "l2"),
        lambda: F.qvalue_loss(q, column, "l2"),
        lambda: F.td_error(q, column),
        lambda: F.advantage(q, column),
        lambda: F.gumbel_loss(row, 1.0, mask=flags.unsqueeze(-1)),
        lambda: F.sparse_loss(row, column, 1.0),
        lambda: F.exponential_loss(row, column, 1.0),
        lambda: F.exponential_loss(row, row, 1.0, mask=flags.unsqueeze(-1)),
        lambda: F.ddpg_bc_loss(row, column, 1.0),
        lambda: F.ddpg_bc_loss(row, row, 1.0, mask=flags.unsqueeze(-1)),
        lambda: F.expected_q(row, column),
        lambda: F.weighted_log_likelihood(row, column),
        lambda: F.reduce_loss(row, weight=column),
        lambda: F.reduce_loss(row, mask=flags.unsqueeze(-1)),
        lambda: F.iql_losses(q, q, row, row, column, row, flags),
        lambda: F.iql_losses(q, torch.zeros(2, 3, 1), row, row, row, row, flags),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"must have the shape of .* got"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.distance(tensor([0.0]), tensor([0.0]), "huber"), "loss_function must be one of 'l1'"),
        (lambda: F.reduce_loss(tensor([0.0]), "avg"), "reduction must be one of 'mean'"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_choices(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def example(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two samples whose losses are worked out by hand below; the second is terminal."""
    return {
        "q": tensor([[2.0, 0.0], [4.0, 1.0]]),
        "target_q": tensor([[3.0, -1.0], [5.0, 2.0]]),
        "value": tensor([1.0, 1.0]),
        "next_value": tensor([10.0, 10.0]),
        "log_prob": tensor([-0.5, -2.0]),
        "reward": tensor([1.0, 1.0]),
        "terminated": tensor([False, True]),
    } | changes


OPTIONS = {"discount": 0.5, "expectile": 0.7, "temperature": 1.0, "reduction": "none"}


def test_the_whole_algorithm_on_two_samples() -> None:
    losses = F.iql_losses(**example(), **OPTIONS)
    # A = min(3, 5) - 1 = 2 and min(-1, 2) - 1 = -2; y = 1 + 0.5 * 10 = 6 and 1.
    torch.testing.assert_close(losses.loss_value, tensor([0.7 * 4, 0.3 * 4]))
    torch.testing.assert_close(losses.loss_qvalue, tensor([16.0 + 4.0, 1.0 + 0.0]))
    torch.testing.assert_close(losses.loss_actor, tensor([math.exp(2) * 0.5, math.exp(-2) * 2.0]))
    torch.testing.assert_close(losses.td_error, tensor([16.0, 1.0]))
    assert losses.entropy.item() == pytest.approx(1.25)


def test_each_loss_trains_its_own_network_alone() -> None:
    tensors = example()
    for name in ("q", "target_q", "value", "next_value", "log_prob"):
        tensors[name].requires_grad_()
    losses = F.iql_losses(**tensors, **OPTIONS)
    reached = {
        loss: {
            name
            for name, tensor_ in tensors.items()
            if tensor_.requires_grad
            and torch.autograd.grad(getattr(losses, loss).sum(), tensor_, retain_graph=True, allow_unused=True)[0]
            is not None
        }
        for loss in ("loss_actor", "loss_qvalue", "loss_value")
    }
    assert reached == {"loss_actor": {"log_prob"}, "loss_qvalue": {"q"}, "loss_value": {"value"}}
    assert not losses.entropy.requires_grad
    assert not losses.td_error.requires_grad


def test_masked_samples_reach_no_output() -> None:
    bad = {name: t.clone() for name, t in example().items()}
    for name in ("q", "target_q", "value", "next_value", "log_prob", "reward"):
        bad[name][..., 1] = math.nan
    mask = tensor([True, False])
    options = OPTIONS | {"reduction": "mean"}
    masked, alone = (
        F.iql_losses(**bad, mask=mask, **options),
        F.iql_losses(**{k: t[..., :1] for k, t in example().items()}, **options),
    )
    for name in ("loss_actor", "loss_qvalue", "loss_value", "entropy"):
        torch.testing.assert_close(getattr(masked, name), getattr(alone, name))
    assert masked.td_error.tolist() == [16.0, 0.0]


@given(vectors(), st.floats(0.01, 1.0))
def test_the_expectile_loss_is_at_least_zero_and_finite(diff: torch.Tensor, expectile: float) -> None:
    loss = F.expectile_loss(diff, expectile)
    assert loss.shape == diff.shape
    assert (loss >= 0).all()
    assert loss.isfinite().all()


@given(vectors())
def test_expectile_one_half_is_half_the_squared_error(diff: torch.Tensor) -> None:
    torch.testing.assert_close(F.expectile_loss(diff, 0.5), diff.square() / 2)


@given(vectors(), st.floats(0, 100))
def test_the_advantage_weight_is_bounded_and_monotone(advantage: torch.Tensor, temperature: float) -> None:
    ordered = advantage.flatten().sort().values
    weight = F.advantage_weight(ordered, temperature)
    assert weight.isfinite().all()
    assert ((weight >= 0) & (weight <= 100)).all()
    assert (weight.diff() >= 0).all()


@given(vectors(2, 5), vectors(5), vectors(5), vectors(5), st.permutations(range(5)))
def test_a_permutation_of_the_batch_permutes_the_losses(
    q: torch.Tensor, value: torch.Tensor, log_prob: torch.Tensor, reward: torch.Tensor, order: list[int]
) -> None:
    terminated = reward > 0
    losses = F.iql_losses(q, q.flip(0), value, value, log_prob, reward, terminated, reduction="none")
    permuted = F.iql_losses(
        q[:, order],
        q.flip(0)[:, order],
        value[order],
        value[order],
        log_prob[order],
        reward[order],
        terminated[order],
        reduction="none",
    )
    for name in ("loss_actor", "loss_qvalue", "loss_value", "td_error"):
        assert torch.equal(getattr(losses, name)[order], getattr(permuted, name))


def test_health_is_what_a_hand_computes() -> None:
    # Of four samples, one with three times the weight of the others; two critics, of which the lower one counts.
    target_q = torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0 + math.log(3.0), 5.0, 5.0, 5.0]])
    value = torch.tensor([1.0, 0.0, 0.0, 0.0])
    found = F.health(target_q, value, temperature=1.0, max_weight=3.0)
    assert found.share_at_max_weight == 0.25
    assert found.effective_sample_size == pytest.approx(6.0**2 / (4 * 12.0))
    assert found.share_value_above_q == 0.0
    assert found.mean_value == 0.25
    assert found.mean_qvalue == pytest.approx((1.0 + math.log(3.0)) / 4)
    assert found.temperature == 1.0
    # Critics differ by 2 - log 3, 5, 5 and 5; advantages are log 3, 0, 0 and 0.
    disagreement = math.sqrt(((2.0 - math.log(3.0)) ** 2 + 3 * 25.0) / 4)
    assert found.critic_disagreement == pytest.approx(disagreement)
    assert found.signal_to_noise == pytest.approx(math.sqrt(3) / 4 * math.log(3.0) / disagreement)
    alone = F.health(target_q[:1], value)
    assert (alone.critic_disagreement, alone.signal_to_noise) == (0.0, 0.0)
    above = F.health(target_q, value + 0.1, temperature=1.0, mask=torch.tensor([True, True, False, False]))
    assert above.share_value_above_q == 0.5


@pytest.mark.parametrize(
    ("weight", "mask", "expected"),
    [
        ([3.0, 1.0, 1.0, 1.0], None, 6.0**2 / (4 * 12.0)),
        ([0.0, 0.0, 2.0, 9.0], [True, True, True, False], 1 / 3),
        ([1e-30, 1e-30, 0.0, 0.0], None, 0.5),
        # Nothing teaches the policy: no action is above V, in sparse Q-learning.
        ([0.0, 0.0, 0.0, 0.0], None, 0.0),
    ],
)
def test_the_sample_size_of_another_objectives_weights(
    weight: list[float], mask: list[bool] | None, expected: float
) -> None:
    found = F.health(
        torch.zeros(1, 4), torch.zeros(4), weight=tensor(weight), mask=None if mask is None else tensor(mask)
    )
    assert found.effective_sample_size == pytest.approx(expected)


def test_the_disagreement_is_the_root_mean_square_of_all_pairs_differences() -> None:
    q = torch.tensor([[1.0, 0.0, 9.0], [4.0, 2.0, math.nan], [2.0, 2.0, 0.0]])
    mask = tensor([True, True, False])
    # Of 3, 1 and 2; of 2, 2 and 0.
    expected = math.sqrt((9.0 + 1.0 + 4.0 + 4.0 + 4.0 + 0.0) / 6)
    assert F.critic_disagreement(q, mask=mask) == pytest.approx(expected)
    assert F.critic_disagreement(q[::2, :1]) == 1.0


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_what_is_beyond_noise_is_nearer_to_zero_by_as_much(threshold: float) -> None:
    u, noise = 3.0 * torch.randn(50), tensor(1.5)
    expected = [math.copysign(max(abs(each) - threshold * 1.5, 0.0), each) for each in u.tolist()]
    assert F.beyond_noise(u, noise, threshold).tolist() == pytest.approx(expected)
    assert (F.beyond_noise(u, noise, threshold) == 0.0).any() == (threshold > 0.0)


def test_importance_weights_are_of_the_means_and_lower_no_sample_size() -> None:
    weights, importance = tensor([3.0, 1.0, 1.0, 7.0]), tensor([1.0, 2.0, 1.0, 5.0])
    mask = tensor([True, True, True, False])
    moments = F.weight_moments(weights, weight=importance, mask=mask)
    assert moments.tolist() == pytest.approx([6.0 / 4, 12.0 / 4])
    assert F.effective_sample_size(moments) == pytest.approx(0.75)
    assert F.effective_sample_size(F.weight_moments(torch.ones(3), weight=importance[:3])) == 1.0
