"""The examples of TorchRL's documentation page of its IQL losses, with our classes imported instead."""

import doctest
import inspect
from typing import Any

import pytest
import torch
import torchrl.objectives

import iql_plugins

pytestmark = [
    pytest.mark.filterwarnings("ignore:The loss has target critics:UserWarning"),
    pytest.mark.filterwarnings("ignore:action_space was not given:UserWarning"),
]

OUT_KEYS = {"loss_actor", "loss_qvalue", "loss_value", "entropy"}


def run_examples(name: str, *sections: int) -> dict[str, Any]:
    """Runs sections of a class's examples, compares what they print, and returns the names they define."""
    documentation = inspect.getdoc(getattr(torchrl.objectives, name))
    assert documentation is not None
    parts = documentation.split("Examples:\n")[1:]
    assert len(parts) == 3
    namespace: dict[str, Any] = {}
    runner = doctest.DocTestRunner(verbose=False)
    for section in sections:
        source = parts[section].replace("from torchrl.objectives.iql import", "from iql_plugins import")
        test = doctest.DocTestParser().get_doctest(source, namespace, f"{name}, section {section}", None, None)
        runner.run(test, clear_globs=False)
        namespace |= test.globs
    results = runner.summarize(verbose=False)
    assert results.attempted > 0
    assert results.failed == 0
    assert type(namespace["loss"]) is getattr(iql_plugins, name)
    return namespace


def assert_trained(parameters: Any) -> None:
    for parameter in parameters:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert any(parameter.grad.count_nonzero() for parameter in parameters)


@pytest.fixture(params=["IQLLoss", "DiscreteIQLLoss"])
def name(request: pytest.FixtureRequest) -> str:
    """Which of the two losses."""
    return request.param


def test_the_tensordict_example_prints_what_torchrl_prints_and_trains_all_networks(name: str) -> None:
    names = run_examples(name, 0)
    loss, data = names["loss"], names["data"]
    outputs = loss(data)
    assert set(outputs.keys()) == OUT_KEYS
    assert all(tensor.shape == () and tensor.isfinite() for tensor in outputs.values())
    assert data["td_error"].shape == data["_log_prob"].shape == data.batch_size == torch.Size([2])
    (outputs["loss_actor"] + outputs["loss_qvalue"] + outputs["loss_value"]).backward()
    for network in (loss.actor_network, loss.qvalue_network, loss.value_network):
        assert_trained(list(network.parameters()))


def test_the_keyword_example_returns_a_tuple_and_trains_the_actor(name: str) -> None:
    names = run_examples(name, 1)
    assert all(names[key].shape == () and names[key].isfinite() for key in OUT_KEYS)
    loss = names["loss"]
    assert_trained(list(loss.actor_network.parameters()))
    assert all(p.grad is None for net in (loss.qvalue_network, loss.value_network) for p in net.parameters())
    (names["loss_qvalue"] + names["loss_value"]).backward()
    for network in (loss.qvalue_network, loss.value_network):
        assert_trained(list(network.parameters()))


def test_the_example_that_selects_out_keys_returns_those_alone(name: str) -> None:
    names = run_examples(name, 1, 2)
    selected = ["loss_actor", "loss_qvalue"] + (["loss_value"] if name == "DiscreteIQLLoss" else [])
    loss = names["loss"]
    assert loss.out_keys == selected
    assert all(names[key].shape == () and names[key].isfinite() for key in selected)
    assert_trained(list(loss.actor_network.parameters()))
    names["loss_qvalue"].backward()
    assert_trained(list(loss.qvalue_network.parameters()))
