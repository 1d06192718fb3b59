"""The kit for adapters' tests: each way to break the contract is found and named."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from agents import make_agent
from tensordict import TensorDict

from iql_plugins import testing
from iql_plugins.hookspecs import Adapter
from iql_plugins.testing import AdapterContractError, check_adapter
from iql_plugins.training.agent import Agent
from iql_tensor import IQL
from iql_tensor.plugin import iql_adapter

ADAPTER = iql_adapter()
assert ADAPTER.training is not None
TRAINING = ADAPTER.training


@pytest.fixture(autouse=True)
def one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of action is enough to see what is found."""
    monkeypatch.setattr(testing, "SPACES", {"continuous": testing.SPACES["continuous"]})


def rows(dataset: TensorDict, agent: Agent, generator: Any) -> TensorDict:
    index = torch.randint(len(dataset), (agent.config.batch_size,), generator=generator)
    return dataset[index]


def fit_with(**changes: Any) -> Callable[..., None]:
    """A loop that is right but for what is changed."""
    options = {
        "generator": lambda agent: agent.generator,
        "batch": lambda agent, batch: agent.normalizers(batch),
        "report": lambda agent: agent.learner.step_count,
        "extra": 0,
    } | changes

    def fit(iql: IQL, dataset: TensorDict, n_steps: int, callback: Callable[[int], None]) -> None:
        agent = iql.agent
        for _ in range(n_steps + options["extra"]):
            batch = rows(dataset, agent, options["generator"](agent))
            agent.learner.step(options["batch"](agent, batch))
            callback(options["report"](agent))

    return fit


def done_is_terminated(agent: Agent, batch: TensorDict) -> TensorDict:
    batch["next", "terminated"] = batch["next", "done"]
    return agent.normalizers(batch)


def another_device(agent: Agent) -> Agent:
    return make_agent("continuous")


def clipped(iql: IQL, dataset: TensorDict, *arguments: Any) -> None:
    dataset["next", "reward"].clamp_(-0.1, 0.1)
    IQL.fit(iql, dataset, *arguments)


def forgetful(path: Any) -> IQL:
    iql = IQL.load(path)
    iql.agent.learner.step_count = 0
    return iql


def noisy(path: Any) -> IQL:
    iql = IQL.load(path)
    with torch.no_grad():
        next(iql.agent.loss.actor_network.parameters()).add_(0.1)
    return iql


def fails(*arguments: Any) -> Any:
    raise RuntimeError("oh")


def one_generator(iqls: Any, dataset: Any, n_steps: int, callback: Any) -> None:
    for iql in iqls:
        iql.agent.generator.set_state(iqls[0].agent.generator.get_state())
    IQL.fit_together(iqls, dataset, n_steps, callback)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another agent": ({"to_agent": another_device}, "to_agent's loss is the very object of the agent"),
    "no agent": ({"to_agent": lambda iql: iql}, "to_agent returns an Agent; got IQL"),
    "one step more": ({"fit": fit_with(extra=1)}, "fit takes 6 further gradient steps"),
    "steps from zero": ({"fit": fit_with(report=lambda a: a.learner.step_count - 1)}, "calls back with the number of"),
    "dataset changed": ({"fit": clipped}, "fit leaves the dataset as it is"),
    "time limits": ({"fit": fit_with(batch=done_is_terminated)}, "loss_qvalue is .* a time limit, from where it boots"),
    "no normalisers": ({"fit": fit_with(batch=lambda agent, batch: batch)}, r"loss_\w+ is .*, that of Agent\.fit"),
    "torch's randomness": ({"fit": fit_with(generator=lambda a: None)}, "draws its batches from agent.generator"),
    "no randomness": (
        {"fit": fit_with(generator=lambda a: torch.Generator(a.device).manual_seed(a.learner.step_count))},
        "its state has not changed",
    ),
    "fit fails": ({"fit": fails}, "fit trains on a dataset by the key layout; it raised RuntimeError: oh"),
    "nothing saved": ({"save": lambda iql, path: None}, "save writes the file that it is told; got"),
    "other weights": (
        {"load": noisy},
        "the native file has all weights, those of targets as well; .* differs by up to 0.1",
    ),
    "another agent in the file": (
        {"load_agent": lambda path: noisy(path).agent},
        "the native file's agent has all weights, those of targets as well; .* differs by up to 0.1",
    ),
    "no agent in the file": ({"load_agent": fails}, "load_agent reads what save writes; it raised RuntimeError: oh"),
    "steps forgotten": ({"load": forgetful}, "the native file knows that 6 steps were taken; got 0"),
    "no suffix": ({"suffix": "zip"}, "training.suffix starts with a dot; got zip"),
    "all agents train on the batches of one": (
        {"fit_together": one_generator},
        "fit_together ends where fit would have for each agent, to 1e-05; got weights that differ by",
    ),
    "one call for each agent": (
        {"fit_together": lambda iqls, *arguments: [iql.fit(*arguments) for iql in iqls]},
        "fit_together calls back once a step, with the number of steps of each agent; got",
    ),
    "together fails": ({"fit_together": fails}, "fit_together trains algorithms .*; it raised RuntimeError: oh"),
    "not callable": ({"load": None}, r"training\.load can be called; got None"),
}


def test_a_loop_of_ones_own_is_right() -> None:
    check_adapter(replace(ADAPTER, training=replace(TRAINING, fit=fit_with())))


def test_training_together_can_be_left_out() -> None:
    check_adapter(replace(ADAPTER, training=replace(TRAINING, fit_together=None)))


@pytest.mark.parametrize("case", BROKEN)
def test_a_training_that_breaks_the_contract_is_told_what_was_expected(case: str) -> None:
    changes, message = BROKEN[case]
    with pytest.raises(AdapterContractError, match=f"expected: .*{message}|{message}"):
        check_adapter(replace(ADAPTER, training=replace(TRAINING, **changes)))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (3, r"iql_adapter\(\) returns an Adapter; got int"),
        (Adapter("two words", None), "the name is one word; got two words"),
        (Adapter("x", "nosuchframework"), "the import name of an installed package, or None; got nosuchframework"),
        (Adapter("x", None, {"IQL": 3}), "algorithms are classes by name"),  # type: ignore[dict-item]
        (Adapter("x", None, {}, TRAINING), "an adapter that trains has algorithms"),
        (Adapter("x", None, {}, "train"), "an adapter that trains has algorithms|training is a Training"),  # type: ignore[arg-type]
    ],
)
def test_a_description_that_is_incomplete_is_refused(adapter: Any, message: str) -> None:
    with pytest.raises(AdapterContractError, match=f"expected: .*({message})"):
        check_adapter(adapter)


def test_an_adapter_that_is_not_installed_is_named() -> None:
    with pytest.raises(AdapterContractError, match=r"adapter 'tensors' loads; .* did you mean 'tensor'"):
        check_adapter("tensors")


def test_an_adapter_without_training_has_a_description_alone() -> None:
    check_adapter(Adapter("x", "torch"))
    with pytest.raises(AdapterContractError, match="pass the adapter's name with batch="):
        check_adapter(Adapter("x", "torch"), batch=3)
