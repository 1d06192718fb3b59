import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from iql_plugins.training import optimizers
from iql_plugins.training.learner import adam
from iql_plugins.training.optimizers import take_step


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def _groups(network: nn.Module) -> list[dict[str, object]]:
    first, second = network.children()
    return [
        {"name": "actor", "params": list(first.parameters()), "lr": 0.1},
        {"name": "value", "params": list(second.parameters()), "lr": 0.01},
    ]


def _draw_gradients(optimizer: Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [*parameters, *(value for parameter in parameters for value in optimizer.state[parameter].values())]


@pytest.fixture
def steps_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[Optimizer]:
    """The optimisers whose own step was called."""
    called: list[Optimizer] = []
    step = Adam.step
    monkeypatch.setattr(Adam, "step", lambda self, *given: [called.append(self), step(self, *given)])
    return called


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True, "betas": (0.5, 0.9), "eps": 0.1}])
def test_a_step_by_the_kernel_is_that_of_torch_to_the_last_bit(
    options: dict[str, object], steps_of_torch: list[Optimizer]
) -> None:
    [ours] = adam([group | options for group in _groups(_network())])  # type: ignore[arg-type]
    [theirs] = adam([group | options for group in _groups(_network())])  # type: ignore[arg-type]
    for number in range(4):
        _draw_gradients(ours, number)
        _draw_gradients(theirs, number)
        take_step(ours)
        theirs.step()
        assert all(torch.equal(a, b) for a, b in zip(_tensors(ours), _tensors(theirs), strict=True))
    # Its first, which makes the state.
    assert steps_of_torch.count(ours) == 1


def test_a_parameter_without_a_gradient_stays_as_it_is(steps_of_torch: list[Optimizer]) -> None:
    [optimizer] = adam(_groups(_network()))
    _draw_gradients(optimizer, 0)
    take_step(optimizer)
    frozen, *others = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = copy.deepcopy((frozen, optimizer.state[frozen], others[0]))
    frozen.grad = None
    take_step(optimizer)
    assert torch.equal(frozen, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in optimizer.state[frozen].items())
    assert not torch.equal(others[0], before[2])
    assert steps_of_torch == [optimizer]


def _with_hook(optimizer: Optimizer) -> None:
    optimizer.register_step_post_hook(lambda *_: None)


def _with_schedule(optimizer: Optimizer) -> None:
    torch.optim.lr_scheduler.ConstantLR(optimizer)


def _with_scaler(optimizer: Optimizer) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # type: ignore[attr-defined]


def _without_fusion(optimizer: Optimizer) -> None:
    optimizer.param_groups[1]["fused"] = False


def _with_amsgrad(optimizer: Optimizer) -> None:
    optimizer.param_groups[1]["amsgrad"] = True
    for parameter in optimizer.param_groups[1]["params"]:
        optimizer.state[parameter]["max_exp_avg_sq"] = torch.zeros_like(parameter)


def _with_a_new_parameter(optimizer: Optimizer) -> None:
    optimizer.add_param_group({"name": "new", "params": [nn.Parameter(torch.zeros(2))]})


def _with_two_dtypes(optimizer: Optimizer) -> None:
    double = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer.param_groups[0]["params"].append(double)
    optimizer.state[double] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros_like(double),
        "exp_avg_sq": torch.zeros_like(double),
    }


@pytest.mark.parametrize(
    "change",
    [
        _with_hook,
        _with_schedule,
        _with_scaler,
        _without_fusion,
        _with_amsgrad,
        _with_a_new_parameter,
        _with_two_dtypes,
    ],
)
def test_what_is_more_than_the_plain_update_is_the_step_of_torch(
    change: object, steps_of_torch: list[Optimizer]
) -> None:
    [optimizer] = adam(_groups(_network()))
    _draw_gradients(optimizer, 0)
    take_step(optimizer)
    change(optimizer)  # type: ignore[operator]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    before = [tensor.detach().clone() for tensor in _tensors(optimizer)]
    take_step(optimizer)
    assert steps_of_torch == [optimizer, optimizer]
    assert not any(torch.equal(old, new) for old, new in zip(before, _tensors(optimizer)[: len(before)], strict=False))


def test_another_optimiser_takes_its_own_step(steps_of_torch: list[Optimizer]) -> None:
    optimizer = AdamW(_network().parameters(), fused=True)
    for _ in range(2):
        _draw_gradients(optimizer, 0)
        take_step(optimizer)
    assert steps_of_torch == [optimizer, optimizer]


def test_without_the_kernel_the_step_is_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, steps_of_torch: list[Optimizer]
) -> None:
    monkeypatch.setattr(optimizers._compat, "fused_kernel", lambda optimizer: None)
    [optimizer] = adam(_groups(_network()))
    for number in range(2):
        _draw_gradients(optimizer, number)
        take_step(optimizer)
    assert steps_of_torch == [optimizer, optimizer]


def test_counts_of_steps_are_one_tensor_and_still_those_of_torch() -> None:
    [ours] = adam(_groups(_network()))  # type: ignore[arg-type]
    [theirs] = adam(_groups(_network()))  # type: ignore[arg-type]
    for number in range(6):
        if number == 3:
            # A copy's are its own, whatever memory they had in common.
            state = copy.deepcopy(ours.state_dict())
            copied = copy.deepcopy(ours)
            _draw_gradients(copied, 0)
            take_step(copied)
            ours.load_state_dict(state)
        _draw_gradients(ours, number)
        _draw_gradients(theirs, number)
        # Torch adds to each of them.
        ours.step() if number == 2 else take_step(ours)
        theirs.step()
        assert all(torch.equal(a, b) for a, b in zip(_tensors(ours), _tensors(theirs), strict=True))
    for group in ours.param_groups:
        counts = [ours.state[parameter]["step"] for parameter in group["params"]]
        assert len({count.untyped_storage().data_ptr() for count in counts}) == (1 if counts[0].is_cpu else len(counts))


def test_a_known_update_is_the_one_that_would_be_looked_up(steps_of_torch: list[Optimizer]) -> None:
    first, second = (adam(_groups(_network()))[0] for _ in range(2))  # type: ignore[arg-type]
    known = take_step(first)
    for number in range(4):
        for optimizer in (first, second):
            _draw_gradients(optimizer, number)
            # Of the group it is read at every step.
            optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        known = take_step(first, known)
        take_step(second)
    assert len(known) == 2
    assert all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(second), strict=True))
