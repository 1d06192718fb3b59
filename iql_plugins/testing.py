"""What every adapter must keep to, ours or a stranger's: one function for its tests, :func:`check_adapter`."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from iql_plugins.config import IQLConfig
from iql_plugins.data.dataset import Options, UnknownSourceError, check_dataset
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.hookspecs import Adapter, Training
from iql_plugins.plugins import Host, NotRecognizedError, host
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent
from iql_plugins.training.gradients import OUTPUTS

__all__ = ["AdapterContractError", "check_adapter"]

FRAMEWORKS = ("d3rlpy", "stable_baselines3", "torchrl")
#: How far an adapter's losses may be from those of :meth:`iql_plugins.training.agent.Agent.fit` on the same batches.
TOLERANCE = 1e-4
#: How far the weights of agents that are trained together may be from those of each alone.
TOGETHER = 1e-5
STEPS, ROWS, EPISODE = 6, 60, 10
SPACES = {
    "continuous": Spaces(Box((3,)), Box((2,), low=(-1.0, 0.0), high=(2.0, 5.0))),
    "discrete": Spaces(Box((3,)), Discrete(4)),
}
_CONFIG = IQLConfig(
    n_steps=50,
    batch_size=16,
    hidden_sizes=(16,),
    actor_dropout=0.1,
    normalize_observations=True,
    reward_scale=2.0,
    reward_shift=-0.5,
    compile="no",
)


class AdapterContractError(AssertionError):
    """An adapter that does not keep to the contract; the message says what was expected, and what came."""


def check_adapter(adapter: str | Adapter, *, batch: object = None) -> None:
    """Checks all that the host, the command line and other adapters rely on.

    1. The description is complete, and its framework is installed.
    2. By name: the hooks answer None to what is not theirs, and loading the adapter imports neither another adapter
       nor another framework.
    3. A batch of the framework is mapped to the layout of :mod:`iql_plugins.keys`.
    4. Training, for continuous and for discrete actions: the algorithm holds the very parts of its agent; ``fit``
       takes the steps that it is asked for, reports each of them, leaves the dataset as it is, depends on the agent's
       generator and on no other random state, and has the losses of :meth:`iql_plugins.training.agent.Agent.fit` on
       the same batches; ``fit_together``, if there is one, ends where ``fit`` would have for each agent; the native
       file and the common checkpoint give back the weights, the step and a policy that acts the same.

    Args:
        adapter: its name, as it is installed, or the description alone.
        batch: a batch of the adapter's framework; None leaves out the third point. Needs a name.

    Raises:
        AdapterContractError: at the first thing that is not as it must be.
    """
    if isinstance(adapter, str):
        with _expected(f"adapter {adapter!r} loads"):
            description = host().load(adapter)
        _check_description(description)
        _check_hooks(adapter)
        _check_imports(adapter, description)
        if batch is not None:
            with _expected("iql_map_batch takes a batch of the adapter's framework"):
                mapped = Host(strict=True, allow=[adapter]).map_batch(batch)
            _check_layout(mapped)
    else:
        description = adapter
        _check_description(description)
        _require(batch is None, "a batch is mapped by an installed plugin", "pass the adapter's name with batch=")
    if description.training is not None:
        for kind, spaces in SPACES.items():
            with _named(f"{description.name}, {kind} actions"):
                _check_training(description.training, spaces)


def _check_description(adapter: Any) -> None:
    _require(isinstance(adapter, Adapter), "iql_adapter() returns an Adapter", type(adapter).__name__)
    _require(isinstance(adapter.name, str) and adapter.name.isidentifier(), "the name is one word", adapter.name)
    framework = adapter.framework
    installed = framework is None or find_spec(framework) is not None
    _require(installed, "the framework is the import name of an installed package, or None", framework)
    _require(
        all(isinstance(name, str) and isinstance(kind, type) for name, kind in adapter.algorithms.items()),
        "algorithms are classes by name",
        adapter.algorithms,
    )
    training = adapter.training
    _require(bool(adapter.algorithms) or training is None, "an adapter that trains has algorithms", adapter.algorithms)
    if training is None:
        return
    _require(isinstance(training, Training), "training is a Training, or None", type(training).__name__)
    for name in ("from_agent", "to_agent", "fit", "save", "load"):
        _require(callable(getattr(training, name)), f"training.{name} can be called", getattr(training, name))
    _require(training.suffix.startswith("."), "training.suffix starts with a dot", training.suffix)


def _check_hooks(name: str) -> None:
    alone = Host(strict=True, allow=[name])
    hooks: dict[str, Callable[[object], object]] = {
        "iql_map_batch": alone.map_batch,
        "iql_read_dataset": lambda source: alone.read_dataset(source, Options()),
    }
    for hook, call in hooks.items():
        for stranger in (object(), 3, "no such thing", Path("no such thing")):
            expected = f"{hook} returns None for what is not the adapter's, such as {stranger!r}"
            with _expected(expected):
                try:
                    answer = call(stranger)
                except (NotRecognizedError, UnknownSourceError):
                    continue
            raise AdapterContractError(f"expected: {expected}; got {answer!r}")


def _check_imports(name: str, adapter: Adapter) -> None:
    code = (
        "import json, sys; from iql_plugins.plugins import Host;"
        f"Host(allow=[{name!r}]).load({name!r}); print(json.dumps(sorted(sys.modules)))"
    )
    with _expected(f"adapter {name!r} loads in a fresh interpreter"):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr.strip().splitlines()[-1])
    imported = {module.split(".")[0] for module in json.loads(run.stdout.splitlines()[-1])}
    others = {info.value.split(".")[0] for other, info in host().available().items() if other != name}
    own = host().available()[name].value.split(".")[0]
    strangers = imported & ((others - {own}) | (set(FRAMEWORKS) - {adapter.framework}))
    _require(not strangers, "an adapter imports neither another adapter nor another framework", sorted(strangers))


def _check_layout(batch: Any) -> None:
    _require(isinstance(batch, TensorDictBase), "a mapped batch is a TensorDict", type(batch).__name__)
    assert isinstance(batch, TensorDictBase)
    with _expected("a mapped batch has the layout of iql_plugins.keys"):
        check_dataset(batch, "the mapped batch", finite=False)


def _check_training(training: Training, spaces: Spaces) -> None:
    dataset = _walk(spaces)
    _check_holds(training, spaces, dataset)
    _check_steps(training, spaces, dataset)
    for terminated in (True, False):
        _check_losses(training, spaces, dataset, terminated)
    _check_random_state(training, spaces, dataset)
    _check_together(training, spaces, dataset)
    _check_files(training, spaces, dataset)


def _check_holds(training: Training, spaces: Spaces, dataset: TensorDict) -> None:
    agent = _agent(spaces, dataset)
    before = _weights(agent)
    with _expected("from_agent takes an agent, and to_agent gives it back"):
        back = training.to_agent(training.from_agent(agent))
    _require(isinstance(back, Agent), "to_agent returns an Agent", type(back).__name__)
    for part in ("loss", "learner", "normalizers", "generator"):
        same = getattr(back, part) is getattr(agent, part)
        _require(same, f"to_agent's {part} is the very object of the agent that from_agent took", "another one")
    for part in ("spaces", "config"):
        came = getattr(back, part)
        _require(came == getattr(agent, part), f"to_agent's {part} equals that of the agent from_agent took", came)
    _require_equal(before, _weights(agent), "from_agent leaves the weights as they are")


def _check_steps(training: Training, spaces: Spaces, dataset: TensorDict) -> None:
    agent = _agent(spaces, dataset)
    copy = dataset.clone()
    with _expected("from_agent takes an agent"):
        algorithm = training.from_agent(agent)
    seen: list[tuple[int, int]] = []

    def callback(step: int) -> None:
        seen.append((step, training.to_agent(algorithm).learner.step_count))

    for first in (0, STEPS):
        seen.clear()
        with _expected("fit trains on a dataset by the key layout"):
            training.fit(algorithm, dataset, STEPS, callback)
        steps = [(step, step) for step in range(first + 1, first + STEPS + 1)]
        _require(
            seen == steps,
            f"fit takes {STEPS} further gradient steps and calls back with the number of all steps after each, which "
            "is then the learner's step_count",
            seen,
        )
    _require(bool((dataset == copy).all()), "fit leaves the dataset as it is", "one that was changed")


def _check_losses(training: Training, spaces: Spaces, dataset: TensorDict, terminated: bool) -> None:
    # Every batch of equal transitions is the same, whoever draws it, and however.
    agent, reference = _agent(spaces, dataset), _agent(spaces, dataset)
    rows = dataset[torch.zeros(ROWS, dtype=torch.int64)].clone()
    rows["next", "done"].fill_(True)
    rows["next", "terminated"].fill_(terminated)
    reference.fit(rows, STEPS)
    expected = reference.learner.metrics()
    end = "terminal state" if terminated else "time limit, from where it bootstraps"
    with _expected(f"fit trains on episodes that end in a {end}"):
        training.fit(training.from_agent(agent), rows, STEPS, lambda step: None)
    metrics = agent.learner.metrics()
    for name in OUTPUTS[:3]:
        difference = abs(metrics[name] - expected[name])
        _require(
            difference <= TOLERANCE * (1.0 + abs(expected[name])),
            f"{name} is {expected[name]:.6g}, that of Agent.fit on the same batches, whose episodes end in a {end}: in "
            "the units of agent.normalizers, batches of agent.config.batch_size, one learner.step() for each",
            f"{metrics[name]:.6g}",
        )


def _check_random_state(training: Training, spaces: Spaces, dataset: TensorDict) -> None:
    agents = [_agent(spaces, dataset) for _ in range(3)]
    agents[2].generator.manual_seed(1)
    drawn = agents[0].generator.get_state()
    for seed, agent in enumerate(agents):
        with torch.random.fork_rng(), _expected("fit trains on a dataset by the key layout"):
            torch.manual_seed(seed)
            training.fit(training.from_agent(agent), dataset, STEPS, lambda step: None)
    what = "fit draws its batches from agent.generator"
    weights = [_weights(agent) for agent in agents]
    _require_equal(weights[0], weights[1], f"{what}, and depends on no other random state")
    _require(not torch.equal(drawn, agents[0].generator.get_state()), what, "its state has not changed")
    same = all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())
    _require(not same, what, "the same training from another state of the generator")


def _check_together(training: Training, spaces: Spaces, dataset: TensorDict) -> None:
    if training.fit_together is None:
        return
    # Dropout draws for each agent on its own.
    config = _CONFIG.replace(actor_dropout=0.0)
    together, alone = ([_agent(spaces, dataset, config, seed) for seed in range(2)] for _ in range(2))
    seen: list[int] = []
    with _expected("fit_together trains algorithms whose agents differ in their seeds alone"):
        training.fit_together([training.from_agent(agent) for agent in together], dataset, STEPS, seen.append)
    steps = list(range(1, STEPS + 1))
    _require(seen == steps, "fit_together calls back once a step, with the number of steps of each agent", seen)
    for agent, other in zip(together, alone, strict=True):
        training.fit(training.from_agent(other), dataset, STEPS, lambda step: None)
        expected = _weights(other)
        difference = max(float((tensor - expected[name]).abs().max()) for name, tensor in _weights(agent).items())
        _require(
            difference <= TOGETHER,
            f"fit_together ends where fit would have for each agent, to {TOGETHER}",
            f"weights that differ by {difference:.3g}",
        )


def _check_files(training: Training, spaces: Spaces, dataset: TensorDict) -> None:
    agent = _agent(spaces, dataset)
    with _expected("fit trains on a dataset by the key layout"):
        algorithm = training.from_agent(agent)
        training.fit(algorithm, dataset, STEPS, lambda step: None)
    observation = dataset["observation"]
    actions = agent.act(observation)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"native{training.suffix}"
        with _expected("save writes the native file, and load reads it"):
            training.save(algorithm, path)
            _require(path.is_file(), "save writes the file that it is told", sorted(map(str, Path(folder).iterdir())))
            read = {"native file": training.to_agent(training.load(path))}
        if training.load_agent is not None:
            with _expected("load_agent reads what save writes"):
                read["native file's agent"] = training.load_agent(path)
        common = Path(folder) / "common.safetensors"
        with _expected("the agent in an algorithm can be saved as a common checkpoint"):
            training.to_agent(algorithm).save(common)
            read["common checkpoint"] = Agent.load(common)
    for name, other in read.items():
        _require_equal(
            {"actions": actions}, {"actions": other.act(observation)}, f"the policy of the {name} acts alike"
        )
        _require_equal(_weights(agent), _weights(other), f"the {name} has all weights, those of targets as well")
        steps = other.learner.step_count
        _require(steps == STEPS, f"the {name} knows that {STEPS} steps were taken", steps)


def _agent(spaces: Spaces, dataset: TensorDict, config: IQLConfig = _CONFIG, seed: int = 0) -> Agent:
    return Agent(spaces, config, normalizers=Normalizers.fit(dataset, spaces, config), seed=seed)


def _weights(agent: Agent) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in agent.loss.state_dict().items()}


def _walk(spaces: Spaces) -> TensorDict:
    """Episodes of ``EPISODE`` transitions that end in terminal states and at time limits by turns."""
    generator = torch.Generator("cpu").manual_seed(0)
    episodes = ROWS // EPISODE
    observation = torch.randn(episodes, EPISODE + 1, 3, generator=generator, device="cpu").cumsum(1)
    action = spaces.action
    if isinstance(action, Discrete):
        actions = torch.randint(action.n, (ROWS, 1), generator=generator, device="cpu")
    else:
        low, high = torch.tensor(action.low, device="cpu"), torch.tensor(action.high, device="cpu")
        actions = low + (high - low) * torch.rand(ROWS, action.size, generator=generator, device="cpu")
    last = (torch.arange(ROWS, device="cpu") % EPISODE == EPISODE - 1).unsqueeze(-1)
    odd = (torch.arange(ROWS, device="cpu") // EPISODE % 2 == 1).unsqueeze(-1)
    return TensorDict(
        {
            "observation": observation[:, :-1].reshape(ROWS, 3),
            "action": actions,
            "next": {
                "observation": observation[:, 1:].reshape(ROWS, 3),
                "reward": torch.randn(ROWS, 1, generator=generator, device="cpu"),
                "done": last,
                "terminated": last & odd,
            },
        },
        batch_size=[ROWS],
    )


def _require(fulfilled: bool, expected: str, came: object) -> None:
    if not fulfilled:
        raise AdapterContractError(f"expected: {expected}; got {came}")


def _require_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor], expected: str) -> None:
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            difference = float((tensor - second[name]).abs().max())
            raise AdapterContractError(f"expected: {expected}; {name} differs by up to {difference:.3g}")


@contextmanager
def _expected(what: str) -> Iterator[None]:
    """Turns whatever an adapter raises into the contract's error."""
    try:
        yield
    except AdapterContractError:
        raise
    except Exception as error:
        raise AdapterContractError(f"expected: {what}; it raised {type(error).__name__}: {error}") from error


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Says where a contract's error was met."""
    try:
        yield
    except AdapterContractError as error:
        raise AdapterContractError(f"{what}: {error}") from error.__cause__
