"""Agents that differ in their seeds alone, trained together: one step for all of them, over stacked parameters.

Small kernels cost the same for one training as for many: where they rule the time of a step (narrow networks, a GPU),
a population takes much less than its agents one after another.
"""

import reprlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from iql_plugins import _compat
from iql_plugins.training.agent import Agent
from iql_plugins.training.gradients import Graph, compiled, slots, traced
from iql_plugins.training.learner import STEPS_BETWEEN_CHECKS, drawing_from, schedule_factor
from iql_plugins.training.optimizers import take_step

__all__ = ["fit_together", "widest_together"]


def widest_together(*, compiled: bool) -> int:
    """The width of hidden layers on a CPU up to which seeds are faster together than one by one.

    Measured on two cores: a step of four takes half to three quarters of the time that four steps take, and no less
    where layers are wider. Compiled steps that oneDNN multiplies in are fast by themselves, from 128 on faster.

    Args:
        compiled: whether losses and gradients are.
    """
    return 64 if compiled and _compat.onednn_is_faster() else 128


def fit_together(
    agents: Sequence[Agent], dataset: TensorDictBase, n_steps: int, callback: Callable[[int], None] | None = None
) -> None:
    """Trains agents on a dataset, each as :meth:`~iql_plugins.training.agent.Agent.fit` would: on its own batches.

    Meanwhile the agents' parameters and the state of their optimisers are views of stacked tensors: they can act, be
    saved and tell their metrics at any time, and weights can be loaded into their losses. What is set on a loss or a
    learner meanwhile counts from the next call.

    Args:
        agents: alike in all but their seeds: spaces, hyper-parameters, normalisers, networks, steps taken, and one
            Adam each, as :func:`~iql_plugins.training.learner.adam` makes it. Networks draw no random numbers but
            dropout's masks, which are each agent's own where what is dropped is contiguous in memory.
        dataset: transitions by the key layout, batch size ``[N]``.
        n_steps: gradient steps of each agent.
        callback: called with the number of steps that each agent has taken, after each of them.

    Raises:
        ValueError: unless the agents are alike and can be stacked, or for a dataset that does not fit; says what
            differs. Nothing was trained.
        RuntimeError: if the callback trains an agent, loads a learner's state, or moves a loss.
        DivergenceError: if losses or weights of an agent are no longer finite.
    """
    if len(agents) == 1:
        agents[0].fit(dataset, n_steps, callback)
        return
    _check_alike(agents)
    size, device = agents[0].config.batch_size, agents[0].device
    source = agents[0].transitions(dataset)

    def batch(index: Tensor) -> dict[str, Tensor]:
        return {name: rows.unflatten(0, (len(agents), size)) for name, rows in source.batch(index).items()}

    with _stacked(agents) as population:
        population.prepare(batch(torch.zeros(len(agents) * size, dtype=torch.int64, device=device)))
        for _ in range(n_steps):
            drawn = [agent.learner.draw(len(source), size, agent.generator, on_disk=source.on_disk) for agent in agents]
            population.step(batch(torch.cat(drawn)))
            if callback is not None:
                callback(agents[0].learner.step_count)
    for agent in agents:
        agent.learner.check_finite()


class _Population:
    """The tensors of several agents, stacked: agent ``i`` has the ``i``-th entries of the first dimension."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        self.agents = agents
        self.learners = [agent.learner for agent in agents]
        self._places = {
            registry: [slots(agent.loss, registry) for agent in agents] for registry in ("_parameters", "_buffers")
        }
        parameters, buffers = torch.func.stack_module_state([agent.loss for agent in agents])
        self._tensors: dict[str, Tensor] = parameters | buffers
        #: By the identity of an agent's tensor: the stacked one.
        self._stack_of = {
            id(registers[key]): self._tensors[name]
            for places in self._places.values()
            for place in places
            for name, (registers, key) in place.items()
        }
        self._optimizer = self._stacked_optimizer()
        self._targets, self._copied = self._target_pairs()
        # Last: nothing above changes an agent.
        self._each(lambda index, tensor, stack: stack.detach()[index])
        self._bound = False
        first = self.learners[0]
        self._actor_rate, self._horizon = first.rates()["actor"], first.actor_schedule_steps
        self._max_grad_norm, self._tau = first.max_grad_norm, first.target_updater.tau
        self._step_count = first.step_count
        self._stepped = False
        for learner in self.learners:
            learner.stacked = True

    def prepare(self, batch: dict[str, Tensor]) -> None:
        """Traces the step for batches like this one, ``[N, B, ...]`` keyword tensors.

        Raises:
            ValueError: if the loss cannot be evaluated over stacked parameters.
        """
        begin = time.perf_counter()
        first = self.agents[0]
        make = compiled if first.learner.compiled else traced
        try:
            with torch.enable_grad():
                self._graph: Graph = make(first.loss, self._tensors, batch, stacked=True)
        except (RuntimeError, ValueError) as error:
            # Subclasses (out of memory, a compiler that fails) are about something else.
            if type(error) not in (RuntimeError, ValueError):
                raise
            raise ValueError(f"the networks cannot be stacked: {error}: train the agents one by one") from error
        seconds = time.perf_counter() - begin
        for learner in self.learners:
            learner.warm_up_seconds += seconds / len(self.learners)

    def step(self, batch: dict[str, Tensor]) -> None:
        """One gradient step of every agent, on a batch like the one of :meth:`prepare`."""
        self._check_steps()
        if not self._stepped:
            self._stepped = True
            for learner in self.learners:
                learner.settle_rates()
        for tensor in self._tensors.values():
            tensor.grad = None
        gradients, outputs = self._graph(self._tensors, batch, self._masks())
        for name, gradient in gradients.items():
            self._tensors[name].grad = gradient
        for group in self._optimizer.param_groups:
            if self._max_grad_norm is not None:
                _clip(group["params"], self._max_grad_norm)
            if group["name"] == "actor":
                factor = schedule_factor("actor", group, self._step_count, self._horizon)
                rate = self._actor_rate.at(factor)
                _set_rate(group, rate)
                for learner in self.learners:
                    learner.show_learning_rate("actor", rate)
        take_step(self._optimizer)
        if not self._bound:
            self._bind_optimizers()
        if self._targets:
            targets, sources = zip(*self._targets, strict=True)
            _compat.lerp_all(targets, sources, self._tau)
        for target, source in self._copied:
            target.copy_(source)
        losses = torch.stack(outputs, -1)
        self._step_count += 1
        for index, (learner, own) in enumerate(zip(self.learners, losses.unbind(), strict=True)):
            learner.count(own, _Share(batch, index))
        if self._step_count % STEPS_BETWEEN_CHECKS == 0:
            for learner in self.learners:
                learner.check_finite()

    def _masks(self) -> list[Tensor]:
        """Dropout's: each agent's are those that it would draw alone."""
        draws = self._graph.draws
        masks = [draw.empty() for draw in draws]
        if masks:
            for index, learner in enumerate(self.learners):
                with drawing_from(learner.seed, self._step_count, masks[0].device):
                    for draw, mask in zip(draws, masks, strict=True):
                        draw.fill(mask[index])
        return masks

    def check(self) -> None:
        """Raises :class:`RuntimeError` if an agent is not what was trained."""
        self._check_steps()
        for index, learner in enumerate(self.learners):
            optimizer = learner.optimizers[0]
            own: list[tuple[Tensor | None, Tensor]] = [
                (registers[key], self._tensors[name])
                for places in self._places.values()
                for name, (registers, key) in places[index].items()
            ]
            if self._bound:
                for parameter in _parameters(optimizer):
                    state = self._optimizer.state.get(self._stack_of[id(parameter)], {})
                    moments = optimizer.state.get(parameter, {})
                    own += [(moments.get(name), value) for name, value in state.items() if value.ndim]
            for tensor, stack in own:
                if tensor is None or tensor.data_ptr() != stack[index].data_ptr():
                    raise RuntimeError(_interfered(index))

    def _check_steps(self) -> None:
        for index, learner in enumerate(self.learners):
            if learner.step_count != self._step_count:
                raise RuntimeError(_interfered(index))

    def release(self) -> None:
        """Gives each agent tensors of its own again."""
        for learner in self.learners:
            learner.stacked = False
            for optimizer in learner.optimizers:
                for state in optimizer.state.values():
                    state.update({name: _copy(value) for name, value in state.items()})
        self._each(lambda index, tensor, stack: tensor.detach().clone())

    def _each(self, replaced: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        for places in self._places.values():
            for index, place in enumerate(places):
                for name, (registers, key) in place.items():
                    registers[key].data = replaced(index, registers[key], self._tensors[name])

    def _stacked_optimizer(self) -> Optimizer:
        optimizers = [learner.optimizers[0] for learner in self.learners]
        groups = []
        for group in optimizers[0].param_groups:
            options = {name: _copy(value) for name, value in group.items() if name != "params"}
            groups.append(options | {"params": [self._stack_of[id(parameter)] for parameter in group["params"]]})
            _set_rate(groups[-1], self.learners[0].learning_rate(group["name"]))
        stacked = Adam(groups)
        for parameters in zip(*map(_parameters, optimizers), strict=True):
            states = [
                optimizer.state.get(parameter, {}) for optimizer, parameter in zip(optimizers, parameters, strict=True)
            ]
            if states[0]:
                stacked.state[self._stack_of[id(parameters[0])]] = {
                    name: torch.stack([state[name] for state in states]) if value.ndim else value.clone()
                    for name, value in states[0].items()
                }
        return stacked

    def _bind_optimizers(self) -> None:
        """Each optimiser has the state of its own agent, and in common what all have: the count of steps."""
        for index, learner in enumerate(self.learners):
            for parameter in _parameters(learner.optimizers[0]):
                if state := self._optimizer.state.get(self._stack_of[id(parameter)]):
                    learner.optimizers[0].state[parameter] = {
                        name: value[index] if value.ndim else value for name, value in state.items()
                    }
        self._bound = True

    def _target_pairs(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        by_address = {
            registers[key].data_ptr(): self._stack_of[id(registers[key])]
            for places in self._places.values()
            for registers, key in places[0].values()
        }
        stacked: list[list[tuple[Tensor, Tensor]]] = []
        for pairs in self.agents[0].loss.target_pairs():
            stacked.append([])
            for pair in pairs:
                stacks = [by_address.get(tensor.data_ptr()) for tensor in pair]
                target, source = (None if stack is None else stack.detach() for stack in stacks)
                if target is None or source is None or source.shape != target.shape:
                    raise ValueError("agents whose critics share parameters cannot be stacked: train them one by one")
                stacked[-1].append((target, source))
        return stacked[0], stacked[1]


class _Share(Mapping[str, Tensor]):
    """An agent's batch: the ``index``-th entries, which are looked up for those who read it."""

    def __init__(self, batch: Mapping[str, Tensor], index: int) -> None:
        self._batch, self._index = batch, index

    def __getitem__(self, name: str) -> Tensor:
        return self._batch[name][self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch)

    def __len__(self) -> int:
        return len(self._batch)


@contextmanager
def _stacked(agents: Sequence[Agent]) -> Iterator[_Population]:
    population = _Population(agents)
    try:
        yield population
        population.check()
    finally:
        population.release()


def _check_alike(agents: Sequence[Agent]) -> None:
    """Raises :class:`ValueError` unless one step can do for all."""
    if not agents:
        raise ValueError("there is no agent to train")
    if len({id(agent.loss) for agent in agents}) != len(agents):
        raise ValueError("every agent must be there once, and have a loss of its own")
    tensors = [{id(tensor) for tensor in (*agent.loss.parameters(), *agent.loss.buffers())} for agent in agents]
    if len(set[int]().union(*tensors)) != sum(map(len, tensors)):
        raise ValueError("agents that are trained together must not share parameters or buffers with each other")
    for agent in agents:
        learner = agent.learner
        if learner.stacked:
            raise ValueError("an agent is being trained together with others already: wait until that is through")
        if len(learner.optimizers) != 1 or type(learner.optimizers[0]) is not Adam:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in learner.optimizers)
            raise ValueError(f"agents that are trained together must have one Adam each, got {kinds}")
        if learner.processes is not None:
            raise ValueError("agents that are trained together cannot be trained by several processes, too")
        if agent.loss.check_finite:
            raise ValueError(
                "check_finite reads every batch on the host, a graph does not: train the agents one by one"
            )
    first, *others = map(_common, agents)
    for index, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise ValueError(
                    f"agents that are trained together must differ in their seeds alone: {name} of agent {index} "
                    f"is not that of the first: {reprlib.repr(other[name])}, {reprlib.repr(value)}"
                )


def _common(agent: Agent) -> dict[str, Any]:
    """What all agents of a population must have in common."""
    document, tensors = agent.state()
    learner = agent.learner
    optimizer = learner.optimizers[0]
    return {
        "spaces": document["spaces"],
        "config": document["config"],
        "normalizers": document["normalizers"],
        "device": agent.device,
        "the number of steps": learner.step_count,
        "compilation": learner.compiled,
        "the actor's schedule": learner.actor_schedule_steps,
        "learning rates": learner.rates(),
        "the settings of the loss": agent.options(),
        "the loss": (repr(agent.loss), [module.training for module in agent.loss.modules()]),
        "the tensors": [
            (name, tensor.shape, tensor.dtype)
            for name, tensor in tensors.items()
            if name.startswith(("loss.", "normalizers."))
        ],
        "statistics": [tensor.tolist() for name, tensor in tensors.items() if name.startswith("normalizers.")],
        "frozen parameters": [name for name, parameter in agent.loss.named_parameters() if not parameter.requires_grad],
        "the optimiser": [
            {name: float(value) if name == "lr" else value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ],
        "the optimiser's steps": [
            float(state["step"]) if (state := optimizer.state.get(parameter)) else None
            for parameter in _parameters(optimizer)
        ],
    }


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _interfered(index: int) -> str:
    return (
        f"agent {index} was trained, moved, or given another state while it was trained together with others: "
        "a callback may read agents, and load weights into their losses; stop, change them, and train them again"
    )


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _clip(parameters: Sequence[nn.Parameter], largest: float) -> None:
    """Scales the gradients of each agent down to a norm, as :func:`torch.nn.utils.clip_grad_norm_` does for one."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    scale = (largest / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
