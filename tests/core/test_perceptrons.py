"""Eager perceptrons as one function of autograd, by oneDNN: what torch computes, and only where nobody looks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from requirements import needs_onednn
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from iql_plugins import _compat
from iql_plugins.config import IQLConfig
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.networks import MLP, perceptrons
from iql_plugins.networks.builders import LayerNorm
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent
from iql_plugins.training.learner import Learner

pytestmark = needs_onednn

ROWS, FEATURES, WIDTH, OUTPUTS = 192, 24, 128, 3


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many perceptrons were computed by oneDNN at each call, on a machine where that is faster."""
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: True)
    found: list[int] = []
    by_onednn = perceptrons._Perceptrons.apply

    def counted(inputs: Tensor, *tensors: Tensor | None) -> Any:
        weight = tensors[0]
        assert weight is not None
        found.append(len(weight) if weight.ndim == 3 else 1)
        return by_onednn(inputs, *tensors)

    monkeypatch.setattr(perceptrons._Perceptrons, "apply", counted)
    return found


def perceptron(sizes: tuple[int, ...] = (WIDTH, WIDTH)) -> MLP:
    torch.manual_seed(0)
    return MLP(FEATURES, OUTPUTS, sizes)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS,)), FEATURES, generator=torch.Generator().manual_seed(1))


def gradients(output: Tensor, of: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad(output, of, weight, **options)


def assert_all_close(found: Any, expected: Any) -> None:
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(WIDTH, WIDTH), (4096,), (WIDTH, 512, WIDTH)])
@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS // 2)])
def test_outputs_and_gradients_are_torchs(sizes: tuple[int, ...], shape: tuple[int, ...], calls: list[int]) -> None:
    network, x = perceptron(sizes), inputs(*shape).requires_grad_()
    of = [x, *network.parameters()]
    output, expected = network(x), network.layers(x)
    assert calls == [1]
    assert_all_close([output], [expected])
    assert_all_close(gradients(output, of), gradients(expected, of))


def test_layers_may_have_no_biases(calls: list[int]) -> None:
    network, x = perceptron(), inputs()
    for layer in network.layers:
        if isinstance(layer, nn.Linear):
            layer.bias = None
    of = list(network.parameters())
    assert_all_close(gradients(network(x), of), gradients(network.layers(x), of))
    assert calls == [1]


@pytest.mark.parametrize("trained", ["inputs", "layers.4.weight", "layers.2.bias", "layers.0.weight"])
def test_only_what_is_trained_gets_a_gradient(trained: str, calls: list[int]) -> None:
    network, x = perceptron().requires_grad_(requires_grad=False), inputs()
    tensor = x if trained == "inputs" else network.get_parameter(trained)
    tensor.requires_grad_()
    assert_all_close(gradients(network(x), [tensor]), gradients(network.layers(x), [tensor]))
    assert calls == [1]
    network(x).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is not None] == (
        [] if trained == "inputs" else [trained]
    )


def test_gradients_have_the_layout_of_weights() -> None:
    network = perceptron()
    network(inputs()).square().sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


def test_gradients_have_gradients(calls: list[int]) -> None:
    network, x = perceptron(), inputs().requires_grad_()
    of = [x, *network.parameters()]
    second = []
    for output in (network(x), network.layers(x)):
        first = gradients(output, of, create_graph=True)
        penalty = torch.stack([each.square().sum() for each in first]).sum()
        second.append(torch.autograd.grad(penalty, of[:-1]))
    assert calls == [1]
    for found, expected in zip(*second, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())


def test_a_gradient_of_a_gradient_counts_once_where_weights_come_of_the_inputs(calls: list[int]) -> None:
    network, x = perceptron(), inputs().requires_grad_()
    scaled = {name: tensor * x.mean() for name, tensor in network.named_parameters()}
    by_layers = {name.removeprefix("layers."): tensor for name, tensor in scaled.items()}
    outputs = functional_call(network, scaled, (x,)), functional_call(network.layers, by_layers, (x,))
    assert calls == [1]
    for create_graph in (False, True):
        found, expected = (gradients(output, [x], retain_graph=True, create_graph=create_graph) for output in outputs)
        assert_all_close(found, expected)


def test_second_derivatives_pass_torchs_check(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    # In float64, which oneDNN does not compute: the same function by torch's products.
    monkeypatch.setattr(perceptrons, "_is_ordinary", lambda tensor: True)
    monkeypatch.setattr(perceptrons, "LEAST", 1)
    network, x = MLP(3, 2, (4, 4)).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    tensors = [x, *(parameter.detach().requires_grad_() for parameter in network.parameters())]

    def output(x: Tensor, *leaves: Tensor) -> Any:
        names = [name for name, _ in network.named_parameters()]
        return functional_call(network, dict(zip(names, leaves, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, tensors)
    assert gradgradcheck(output, tensors)
    assert calls


@pytest.mark.parametrize("where", ["inputs", "weight", "bias"])
def test_what_is_not_a_number_is_none_behind_the_relu(where: str, calls: list[int]) -> None:
    network, x = perceptron(), inputs()
    with torch.no_grad():
        {"inputs": x, "weight": network.layers[0].weight, "bias": network.layers[2].bias}[where][0] = torch.nan
        output = network(x)
    assert calls == [1]
    assert output[0].isnan().all()


def test_weights_that_change_before_the_backward_pass_are_an_error_as_torchs_is() -> None:
    network = perceptron()
    output = network(inputs()).sum()
    with torch.no_grad():
        network.layers[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_pass_can_be_computed_twice_to_save_memory(calls: list[int]) -> None:
    network, x = perceptron(), inputs().requires_grad_()
    of = [x, *network.parameters()]
    found = gradients(checkpoint(network, x, use_reentrant=False), of)
    assert calls == [1, 1]
    assert_all_close(found, gradients(network.layers(x), of))


def changed(change: Callable[[MLP], object]) -> MLP:
    network = perceptron()
    change(network)
    return network


OTHERS: dict[str, Callable[[], MLP]] = {
    "another activation": lambda: changed(lambda network: network.layers.__setitem__(1, nn.GELU())),
    "LayerNorm": lambda: changed(lambda network: network.layers.insert(1, LayerNorm(WIDTH))),
    "dropout": lambda: MLP(FEATURES, OUTPUTS, (WIDTH, WIDTH), dropout=0.5).eval(),
    "a hook": lambda: changed(lambda network: network.layers[2].register_forward_hook(lambda m, x, y: 2 * y)),
    "a hook of a ReLU": lambda: changed(lambda network: network.layers[1].register_forward_pre_hook(lambda m, x: None)),
    "a forward of its own": lambda: changed(lambda network: setattr(network.layers[3], "forward", torch.tanh)),
    "float64": lambda: perceptron().double(),
    "a part of float64": lambda: changed(lambda network: network.layers[0].double()),
    "few units": lambda: perceptron((16, 16)),
    "no ReLU at the end": lambda: changed(lambda network: network.layers.append(nn.ReLU())),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_large_perceptron_is_computed_layer_by_layer(name: str, calls: list[int]) -> None:
    network = OTHERS[name]()
    x = inputs().double() if name == "float64" else inputs()
    if name == "a part of float64":
        with pytest.raises(RuntimeError, match="dtype"):
            network(x)
    else:
        assert torch.equal(network(x), network.layers(x))
    assert calls == []


def test_inputs_of_another_size_are_the_error_that_torch_has(calls: list[int]) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        perceptron()(torch.zeros(ROWS, FEATURES + 1))
    assert calls == []


def flops(network: MLP, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops()


def of_any_size(network: MLP, x: Tensor) -> Any:
    graph = make_fx(network, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    return graph(x[:5])


def forward_mode(network: MLP, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(network(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def autocast(network: MLP, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return network(x)


def by_function_mode(network: MLP, x: Tensor) -> Any:
    class Doubling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return 2 * result if func is nn.functional.linear else result

    with Doubling():
        return network(x)


LOOKERS: dict[str, Callable[[MLP, Tensor], Any]] = {
    "a compiler": lambda network, x: torch.compile(network, backend="eager", fullgraph=True)(x),
    "a graph": lambda network, x: make_fx(network)(x)(x),
    "a graph of any sizes": of_any_size,
    "torch.export": lambda network, x: torch.export.export(network, (x,)).module()(x),
    "torch.jit.trace": lambda network, x: torch.jit.trace(network, x, check_trace=False)(x),
    "vmap": lambda network, x: vmap(lambda row: network(row.expand(ROWS, -1)))(x[:2]),
    "grad": lambda network, x: grad(lambda given: network(given).sum())(x),
    "forward mode": forward_mode,
    "autocast": autocast,
    "a count of operations": flops,
    "a mode of functions": by_function_mode,
    "no data": lambda network, x: copy.deepcopy(network).to("meta")(x.to("meta")).shape,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LOOKERS)
def test_who_looks_at_each_call_sees_the_layers(name: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = perceptron(), inputs()
    network(x)
    assert calls == [1]
    found = LOOKERS[name](network, x)
    assert calls == [1]
    monkeypatch.setattr(_compat, "onednn_is_faster", lambda: False)
    torch.testing.assert_close(found, LOOKERS[name](network, x))


def agent(**changes: Any) -> Agent:
    spaces = Spaces(Box((FEATURES,)), Box((OUTPUTS,), "float32", (-1.0,) * OUTPUTS, (1.0,) * OUTPUTS))
    config = IQLConfig(hidden_sizes=(WIDTH, WIDTH), batch_size=ROWS, compile="no").replace(**changes)
    return Agent(spaces, config, seed=0)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    flags = torch.zeros(ROWS, 1, dtype=torch.bool)
    return {
        "observation": torch.randn(ROWS, FEATURES),
        "action": torch.rand(ROWS, OUTPUTS) * 2 - 1,
        "next_observation": torch.randn(ROWS, FEATURES),
        "next_reward": torch.randn(ROWS, 1),
        "next_done": flags,
        "next_terminated": flags,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # V, four critics, the policy, V(s'): two targets and two critics together.
        ({}, [1, 1, 2, 2, 1]),
        ({"n_critics": 1}, [1, 1, 1, 1, 1]),
        ({"n_critics": 5}, [1, 1, 5, 5, 1]),
        # The critics of the policy's action, too.
        ({"policy_extraction": "ddpg_bc"}, [1, 1, 2, 2, 2, 1]),
    ],
)
def test_a_step_is_that_of_torchs_layers(
    changes: dict[str, Any], expected: list[int], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    states, given = [], batch()
    for by_onednn in (True, False):
        monkeypatch.setattr(_compat, "onednn_is_faster", lambda faster=by_onednn: faster)
        learner = agent(**changes).learner
        learner.step(given)
        states.append([*learner.loss.state_dict().values(), learner.last_losses])
        gradients = [parameter.grad for parameter in learner.loss.parameters() if parameter.requires_grad]
        states[-1] += [gradient for gradient in gradients if gradient is not None]
    assert sorted(calls) == sorted(expected)
    # Adam makes a whole step of a gradient near 0, whichever its sign.
    for found, expected_one in zip(*states, strict=True):
        torch.testing.assert_close(found, expected_one, rtol=1e-3, atol=7e-4)


def test_critics_with_hooks_or_a_shared_layer_are_computed_as_before(calls: list[int]) -> None:
    learner = agent().learner
    learner.loss.qvalue_network.register_forward_hook(lambda *given: None)
    learner.step(batch())
    # Each critic by itself, as a module.
    assert sorted(calls) == [1, 1, 1, 1, 1, 2]


def test_a_copy_of_the_loss_is_as_fast(calls: list[int]) -> None:
    loss: IQLLoss = copy.deepcopy(agent().loss)
    Learner(loss, seed=0).step(batch())
    assert sum(calls) == 7
