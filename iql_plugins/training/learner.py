r"""One gradient step, the same for every adapter."""

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from iql_plugins import _compat
from iql_plugins.config import IQLConfig
from iql_plugins.data.episodes import EpisodeRows
from iql_plugins.keys import flat_name
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.losses.objectives import value_objective
from iql_plugins.losses.targets import SoftUpdate
from iql_plugins.networks import calls
from iql_plugins.training.cuda_graph import CapturedStep
from iql_plugins.training.distributed import Processes
from iql_plugins.training.gradients import OUTPUTS, LossGradients, compiler_available
from iql_plugins.training.health import HealthWarning, Looks, health_warnings
from iql_plugins.training.optimizers import Update, take_step
from iql_plugins.training.rates import Rate, Rates

__all__ = [
    "DivergenceError",
    "Groups",
    "Learner",
    "adam",
    "cosine_decay",
    "drawing_from",
    "resolve_compile",
    "schedule_factor",
]

NETWORKS = ("actor", "critic", "value")
#: Compilation takes some five seconds (ten on a slow machine), and saves one to two milliseconds a step.
LONG_ENOUGH_TO_COMPILE = 10_000
#: Gradient steps after which a training of which nobody reads the metrics looks whether all is finite.
STEPS_BETWEEN_CHECKS = 1000

#: Parameter groups for an optimiser, ``{"name": "actor", "params": [...], "lr": ...}``, one for each network.
Groups = Sequence[dict[str, Any]]


class DivergenceError(ArithmeticError, ValueError):
    """A training whose losses or weights are no longer finite; one line that says which, and since when.

    It is a ``ValueError``, as what torch's distributions raise for NaN is: searches of hyper-parameters (RL Zoo3's)
    prune trials that end so, and go on.
    """


def cosine_decay(step: int, horizon: int) -> float:
    r"""Factor of the actor's learning rate, held at its end where other schedules climb again.

    .. math:: \tfrac12 \big(1 + \cos(\pi \min(t / T, 1))\big)

    >>> [round(cosine_decay(step, 100), 3) for step in (0, 50, 100, 150)]
    [1.0, 0.5, 0.0, 0.0]

    Args:
        step: t, steps already taken.
        horizon: T >= 1.
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(step / horizon, 1.0)))


def schedule_factor(network: str, group: Mapping[str, Any], step: int, horizon: int | None) -> float:
    """What multiplies the rate of a network after so many steps.

    Args:
        network: ``"actor"``, ``"critic"`` or ``"value"``.
        group: the optimiser's; ``"schedule"`` is the factor of a framework's schedule.
        step: steps already taken.
        horizon: of the actor's cosine; None for none.
    """
    factor: float = group.get("schedule", 1.0)
    return factor if network != "actor" or horizon is None else factor * cosine_decay(step, horizon)


def resolve_compile(choice: Literal["auto", "yes", "no"], n_steps: int, device: torch.device) -> Literal["yes", "no"]:
    """What ``"auto"`` comes to: compiled if there is a compiler and the training is long enough for it."""
    if choice != "auto":
        return choice
    return "yes" if n_steps >= LONG_ENOUGH_TO_COMPILE and compiler_available(device) else "no"


def adam(groups: Groups) -> list[Optimizer]:
    """One Adam over all groups: fused where the device has it, with the authors' (and torch's) constants."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    device = tensors[0].device
    if device.type == "cuda":
        # A number would be a constant of a captured graph.
        groups = [group | {"lr": torch.tensor(group["lr"], dtype=torch.float32, device=device)} for group in groups]
    return [Adam(list(groups), fused=device.type in ("cpu", "cuda"))]


class Learner:
    r"""Trains a loss: losses, one backward pass, optimisers, schedule, Polyak update; nothing is read on the host.

    Every thousandth step is the exception: it looks whether losses and weights are finite (:meth:`check`).

    A rate is what was set times its schedule's factor: the actor's cosine, and that of a framework's schedule, which
    :meth:`set_schedule` tells. :meth:`set_learning_rate` sets what the factor multiplies. Who writes ``"lr"`` into an
    optimiser's group sets the rate of the next step, wherever the schedule is by then, and from there it follows the
    schedule in proportion; a rate that is first used where the schedule is below a thousandth stays. So 0 stops a
    network, and any other rate lets it go on. All of this is saved. What else is written into a group
    (``weight_decay``, ``betas``, ``eps``) counts from the next step, too.

    Args:
        loss: what is trained. Its optimiser state belongs to the learner.
        actor_learning_rate: of the policy.
        critic_learning_rate: of the critics.
        value_learning_rate: of V.
        actor_schedule_steps: horizon of the actor's cosine decay, held at its end; None keeps the rate.
        polyak: share of the critics in each update of their targets.
        max_grad_norm: the largest norm of each network's gradient; None for no clipping.
        compile: whether to compile losses and gradients, see :class:`~iql_plugins.training.gradients.LossGradients`.
        mode: of the compilation; ``"reduce-overhead"`` captures losses and gradients as a CUDA graph.
        capture: whether the whole step becomes one CUDA graph, optimisers and targets included, after a few ordinary
            steps. It is captured again when settings, rates or tensors are replaced, or batches have another shape,
            up to 8 times; further ones, and those of processes that train together, are ordinary steps. Networks must
            read nothing on the host, nor hide state from torch. ``parameter.grad`` is empty after a step.
        seed: of what the networks draw while they train (dropout), which depends on it and the step alone: a resumed
            training repeats it, and torch's random state stays as it is. None draws one from torch's random state.
        make_optimizers: from parameter groups named ``"actor"``, ``"critic"`` and ``"value"`` to the optimisers that
            train them; each group must be in one of them, by its name.

    Attributes:
        step_count: gradient steps taken.
        last_losses: ``[4]`` losses and entropy of the last step, on the device; None before the first.
        processes: that train together, see :func:`~iql_plugins.training.distributed.synchronize`; None for this one
            alone.
        kept: rows of the dataset that :meth:`draw` draws alone; None for all.
        stacked: whether its parameters are views of tensors that several trainings have in common, for as long as
            something else takes its steps.

    Raises:
        ValueError: unless each group is in one optimiser, under its name.
        ValueError: for ``capture`` without a GPU, with optimisers that need the host, or with a ``mode`` that captures;
            and for a ``mode`` of what is not compiled.
        RuntimeError: if ``compile`` is asked for where there is no compiler.

    >>> from iql_plugins.networks import critic, gaussian_actor, value_function
    >>> learner = Learner(IQLLoss(gaussian_actor(3, 1), critic(3, 1), value_function(3)))
    >>> learner.step(dict(
    ...     observation=torch.randn(5, 3), action=torch.rand(5, 1), next_observation=torch.randn(5, 3),
    ...     next_reward=torch.randn(5, 1), next_done=torch.zeros(5, 1, dtype=torch.bool),
    ...     next_terminated=torch.zeros(5, 1, dtype=torch.bool),
    ... ))
    >>> sorted(learner.metrics())[:3]
    ['critic_disagreement', 'effective_sample_size', 'entropy']
    """

    def __init__(
        self,
        loss: IQLLoss,
        *,
        actor_learning_rate: float = 3e-4,
        critic_learning_rate: float = 3e-4,
        value_learning_rate: float = 3e-4,
        actor_schedule_steps: int | None = None,
        polyak: float = 0.005,
        max_grad_norm: float | None = None,
        compile: bool = False,
        mode: str | None = None,
        capture: bool = False,
        seed: int | None = None,
        make_optimizers: Callable[[Groups], Sequence[Optimizer]] = adam,
    ) -> None:
        self.loss = loss
        self.seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        self.actor_schedule_steps = actor_schedule_steps
        self.max_grad_norm = max_grad_norm
        self.target_updater = SoftUpdate(loss, tau=polyak)
        rates = {"actor": actor_learning_rate, "critic": critic_learning_rate, "value": value_learning_rate}
        groups = [
            {"name": name, "params": parameters, "lr": rates[name]} for name, parameters in _trained(loss).items()
        ]
        self.optimizers = list(make_optimizers(groups))
        names = sorted(_trained(loss))
        made = sorted(str(group.get("name")) for optimizer in self.optimizers for group in optimizer.param_groups)
        if made != names:
            raise ValueError(
                f"make_optimizers must keep every group once and under its name: it was given {names}, "
                f"its optimisers have {made}"
            )
        self.step_count = 0
        self._rates = Rates(self.optimizers, rates, self._factor)
        if mode is not None and not compile:
            raise ValueError(f"mode={mode!r} is one of compiled code: pass compile=True, too, or no mode")
        self._gradients = LossGradients(loss, compile=compile, mode=mode)
        mode_captures = mode is not None and "triton.cudagraphs" in _compat.mode_options()[mode]
        if capture and mode_captures:
            raise ValueError(f"mode={mode!r} captures a graph of its own: use it or capture=True, not both")
        #: Gradients in a graph's memory are the next step's to overwrite.
        self._drops_gradients = capture or mode_captures
        device = next(loss.parameters()).device
        self._captured = CapturedStep(self._compute, self.optimizers, device) if capture else None
        self.last_losses: Tensor | None = None
        self.processes: Processes | None = None
        self.kept: EpisodeRows | None = None
        self._sums: Tensor | None = None
        self._count = 0
        self._last_batch: Mapping[str, Tensor] = {}
        self._looks = Looks()
        self.stacked = False
        self._undisturbed = False
        self._updates: list[Sequence[Update]] = []

    @classmethod
    def from_config(
        cls,
        loss: IQLLoss,
        config: IQLConfig,
        *,
        mode: str | None = None,
        capture: bool = False,
        seed: int | None = None,
        make_optimizers: Callable[[Groups], Sequence[Optimizer]] = adam,
    ) -> "Learner":
        """The learner of a configuration; ``"auto"`` compilation is resolved for the loss's device."""
        device = next(loss.parameters()).device
        return cls(
            loss,
            actor_learning_rate=config.actor_learning_rate,
            critic_learning_rate=config.critic_learning_rate,
            value_learning_rate=config.value_learning_rate,
            actor_schedule_steps=config.n_steps if config.actor_schedule == "cosine" else None,
            polyak=config.polyak,
            max_grad_norm=config.max_grad_norm,
            compile=resolve_compile(config.compile, config.n_steps, device) == "yes",
            mode=mode,
            capture=capture,
            seed=seed,
            make_optimizers=make_optimizers,
        )

    @property
    def compiled(self) -> bool:
        """Whether losses and gradients are compiled."""
        return self._gradients.compile

    @property
    def warm_up_seconds(self) -> float:
        """Spent on compiling so far."""
        return self._gradients.warm_up_seconds

    @warm_up_seconds.setter
    def warm_up_seconds(self, seconds: float) -> None:
        self._gradients.warm_up_seconds = seconds

    def rates(self) -> dict[str, Rate]:
        """What was set last for each network, and the factor of its schedule then.

        Raises:
            ValueError: if something else than a rate was written into an optimiser's group.
        """
        return self._rates.now()

    def settle_rates(self) -> None:
        """Takes what was written into optimisers' groups as a step does: from here on it follows the schedule.

        Raises:
            ValueError: as :meth:`rates`.
        """
        for network in self._rates.trained:
            self._rates.settle(network)

    def base_rates(self) -> dict[str, float]:
        """The rate of each network that is trained, before its schedule."""
        return {network: self._rates.base(network) for network in self._rates.trained}

    def learning_rate(self, network: str) -> float:
        """The rate of ``"actor"``, ``"critic"`` or ``"value"`` in the next step, its schedule included.

        Raises:
            ValueError: if something else was written into its optimiser's group.
        """
        return self._rates.next(network)

    def set_learning_rate(self, network: str, rate: float) -> None:
        """Sets the rate of a network before its schedule.

        Raises:
            ValueError: for a network that is none of actor, critic and value, or a rate out of range.
        """
        if network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
        self._rates.set(network, rate)

    def set_schedule(self, network: str, factor: float) -> None:
        """Tells what a framework's schedule multiplies the rate of a network by, from the next step on."""
        if network in self._rates.trained:
            self._rates.group(network)["schedule"] = factor

    def show_learning_rate(self, network: str, rate: float) -> None:
        """Puts the rate of a step into the group of a network that is trained; what a user wrote there is set.

        Raises:
            ValueError: if that is no rate.
        """
        self._rates.show(network, rate)

    def _factor(self, network: str, group: Mapping[str, Any]) -> float:
        return schedule_factor(network, group, self.step_count, self.actor_schedule_steps)

    def __getstate__(self) -> dict[str, Any]:
        # Somebody may change a copy.
        return vars(self) | {"_undisturbed": False, "_updates": []}

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """For steps between which nobody changes the loss, its settings or the optimisers: they look once, at first.

        What may change is a rate, or a batch's shape. A compiled step of a usual size is a twentieth faster.
        """
        before = self._undisturbed
        self._undisturbed = True
        try:
            yield
        finally:
            self._undisturbed = before
            if not before:
                self._gradients.undisturbed = self.target_updater.undisturbed = False
                self._updates = []

    def step(self, batch: Mapping[str, Tensor] | TensorDictBase) -> None:
        """One gradient step on a batch.

        Args:
            batch: keyword tensors, or a TensorDict, by the key layout, in the networks' units. What else a TensorDict
                has is ignored.

        Raises:
            KeyError, TypeError, ValueError: for a batch that the loss refuses, or if an optimiser's group has no
                learning rate; nothing was trained.
            DivergenceError: see :meth:`check_finite`.
        """
        if isinstance(batch, TensorDictBase):
            batch = batch.select(*self.loss.accepted_keys, strict=False)
            batch = {flat_name(key): tensor for key, tensor in batch.items(True, True)}
        for network in self._rates.trained:
            self._rates.show(network)
        device = next(self.loss.parameters()).device
        together = self.processes
        captured = self._captured if together is None else None
        # Processes that train together do not drop the same units.
        with drawing_from(self.seed + (0 if together is None else together.rank), self.step_count, device):
            if captured is None or captured.device != device:
                losses = self._compute(batch)
            else:
                losses = captured(batch, *self._constants_and_addresses(batch))
        self.count(losses, dict(batch))
        self._gradients.undisturbed = self.target_updater.undisturbed = self._undisturbed
        # A framework's schedule has moved on, and shows the rate of the next step.
        for network in self._rates.trained:
            if "schedule" in self._rates.group(network):
                self._rates.show(network)
        if self.step_count % STEPS_BETWEEN_CHECKS == 0:
            self.check()

    def draw(self, rows: int, size: int, generator: torch.Generator, *, on_disk: bool) -> Tensor:
        """The rows of a batch, uniformly with replacement; of a batch of several processes, this one's part.

        Args:
            rows: of the dataset, of which :attr:`kept` may leave some out.
            size: of the batch, of all processes together.
            generator: on whose device the rows are drawn.
            on_disk: whether the dataset is memory-mapped, see
                :meth:`~iql_plugins.training.distributed.Processes.draw`.

        Returns:
            int64 row numbers, ``[size]``; of several processes as many from each.

        Raises:
            ValueError: unless each process gets as many.
        """
        rows = rows if self.kept is None else len(self.kept)
        if self.processes is None:
            drawn = torch.randint(rows, (size,), generator=generator, device=generator.device)
        else:
            drawn = self.processes.draw(rows, size, generator, on_disk=on_disk)
        return drawn if self.kept is None else self.kept[drawn]

    def _compute(self, batch: Mapping[str, Tensor]) -> Tensor:
        """All of a step that happens on the device; returns its ``[4]`` losses."""
        outputs = self._gradients(batch)
        if self.processes is not None:
            self.processes.average(self.loss)
        if self.max_grad_norm is not None:
            for network in self._rates.trained:
                nn.utils.clip_grad_norm_(self._rates.group(network)["params"], self.max_grad_norm)
        # None are known after a step that fails.
        known, self._updates = self._updates or [()] * len(self.optimizers), []
        taken = []
        for optimizer, updates in zip(self.optimizers, known, strict=True):
            taken.append(take_step(optimizer, updates))
            if self._drops_gradients:
                optimizer.zero_grad()
        if self._undisturbed and self.compiled:
            self._updates = taken
        self.target_updater.step()
        return torch.stack(outputs)

    def _constants_and_addresses(self, batch: Mapping[str, Tensor]) -> tuple[Hashable, Hashable]:
        """What :meth:`_compute` reads on the host, and where all of its tensors are, but for the batch's."""
        state = self._gradients.state()
        constants: list[Hashable] = [self._gradients.signature(state, batch)]
        constants += [self.target_updater.tau, self.max_grad_norm]
        tensors = list(state.values())
        for optimizer in self.optimizers:
            groups = optimizer.param_groups
            # The schedule is in the rate.
            options = [item for group in groups for item in group.items() if item[0] not in ("params", "schedule")]
            constants += [(name, _constant(value)) for name, value in options]
            values = [value for moments in optimizer.state.values() for value in moments.values()]
            values += [value for _, value in options]
            tensors += [value for value in values if isinstance(value, Tensor)]
        return tuple(constants), tuple([tensor.data_ptr() for tensor in tensors])

    def count(self, losses: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Counts a step that was taken, here or by something else for this learner.

        Args:
            losses: ``[4]``, in the order of :attr:`last_losses`.
            batch: what it was taken on; read by :meth:`metrics`, :meth:`check_finite` and :meth:`warnings` alone.
        """
        self.step_count += 1
        self.last_losses = losses
        self._sums = losses if self._sums is None else self._sums + losses
        self._count += 1
        self._last_batch = batch

    def metrics(self) -> dict[str, float]:
        """Means of the losses and the entropy since the last call, and the health of the last batch.

        Reads the device: call it when someone looks, not at every step.

        Returns:
            ``loss_actor``, ``loss_qvalue``, ``loss_value``, ``entropy``, and the fields of
            :class:`~iql_plugins.losses.functional.Health`; empty if no step was taken since the last call.

        Raises:
            DivergenceError: see :meth:`check_finite`.
        """
        values = self._look()
        self._sums, self._count = None, 0
        return values

    def health(self) -> dict[str, float]:
        """What :meth:`metrics` says of the last batch, whoever has asked before; empty before the first step.

        Reads the device.

        Returns:
            The fields of :class:`~iql_plugins.losses.functional.Health`.

        Raises:
            DivergenceError: see :meth:`check_finite`.
        """
        if not self._last_batch:
            return {}
        health = self._of_last_batch()
        told = self._finite(health)
        return {name: told[name] for name in health}

    def check(self) -> None:
        """What is looked at every thousandth step, and at the end of each ``fit``: :meth:`check_finite`, and more.

        All processes that train together have to call it: it also looks whether they hold equal weights.

        Raises:
            DivergenceError: see :meth:`check_finite`.
            UnequalWeightsError: in every process, if weights are not equal.
        """
        self.check_finite()
        if self.processes is not None:
            self.processes.check_equal(self.loss)

    def check_finite(self) -> None:
        """Looks whether the losses since the last call of :meth:`metrics`, and the weights, are finite.

        Reads the device, once.

        Raises:
            DivergenceError: if they are not; says which.
        """
        if not self._look():
            self._finite({})

    def warnings(self) -> list[HealthWarning]:
        """What the metrics so far say against what was learned, each with what to try; empty if they say nothing.

        Of the metrics every thousandth step, at the end of each ``fit``, and whenever :meth:`metrics` is called, since
        the learner was made or loaded. Reads the device.

        Returns:
            See :func:`~iql_plugins.training.health.health_warnings`.

        Raises:
            DivergenceError: see :meth:`check_finite`.
        """
        self._look()
        return health_warnings(self._looks.rows, self.loss)

    def _look(self) -> dict[str, float]:
        """What :meth:`metrics` returns, which begins anew there alone.

        Raises:
            DivergenceError: if they are not finite, or the weights are not.
        """
        if self._sums is None:
            return {}
        values = self._finite(self._of_last_batch())
        self._looks.add(self.step_count, values)
        return values

    @torch.no_grad()
    def _of_last_batch(self) -> dict[str, Tensor]:
        with calls.evaluation_mode(self.loss):
            return self.loss.health(**self._last_batch)._asdict()

    @torch.no_grad()
    def _finite(self, further: Mapping[str, Tensor]) -> dict[str, float]:
        """Means of the losses, and further values, all of them finite, as the weights are."""
        told = {} if self._sums is None else dict(zip(OUTPUTS, self._sums / self._count, strict=True))
        told |= further
        largest = {
            f"the {name}'s weights": nn.utils.get_total_norm(
                [parameter for parameter in self._rates.group(name)["params"] if parameter.numel()], math.inf
            )
            for name in self._rates.trained
        }
        dtype = torch.promote_types(torch.float32, next(self.loss.parameters()).dtype)
        values = torch.stack([value.to(dtype) for value in (told | largest).values()]).tolist()
        read = dict(zip(told | largest, values, strict=True))
        if wrong := [name for name, value in read.items() if not math.isfinite(value)]:
            raise DivergenceError(
                f"{', '.join(wrong)} not finite at step {self.step_count}: lower the learning rates, set "
                f"`max_grad_norm`, try {value_objective(self.loss.value_objective).remedy}, or look at the dataset "
                "with `iql-plugins inspect`"
            )
        return {name: read[name] for name in told}

    def state_dict(self) -> dict[str, Any]:
        """All that continues a training and is not in the loss: optimisers, rates and the step."""
        return {
            "step_count": self.step_count,
            "seed": self.seed,
            "learning_rates": {network: list(rate) for network, rate in self._rates.state_dict().items()},
            "optimizers": [_saved(optimizer) for optimizer in self.optimizers],
            "target_updater": self.target_updater.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; on an error nothing is changed.

        Raises:
            KeyError: for a missing entry.
            ValueError: for a state of other optimisers or parameters.
        """
        states = state["optimizers"]
        if len(states) != len(self.optimizers):
            raise ValueError(f"the state has {len(states)} optimisers, the learner {len(self.optimizers)}")
        fitted = [_fitted(optimizer, saved) for optimizer, saved in zip(self.optimizers, states, strict=True)]
        step_count, seed = int(state["step_count"]), int(state["seed"])
        # A state of an earlier release has that of the actor, and the others in their groups.
        saved_rates = (
            state["learning_rates"] if "learning_rates" in state else {"actor": (state["actor_learning_rate"], 1)}
        )
        rates = {
            network: Rate(float(value), None if factor is None else float(factor))
            for network, (value, factor) in saved_rates.items()
        }
        self.target_updater.load_state_dict(state["target_updater"])
        for optimizer, saved in zip(self.optimizers, fitted, strict=True):
            # Torch would train on the very tensors that were given.
            optimizer.load_state_dict(copy.deepcopy(saved))
        self.step_count, self.seed, self._updates = step_count, seed, []
        self._rates.load_state_dict(rates)
        self._sums, self._count, self._last_batch = None, 0, {}
        self._looks = Looks()


def _trained(loss: IQLLoss) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of each network; one that networks share is the first one's."""
    networks = {"actor": loss.actor_network, "critic": loss.qvalue_network, "value": loss.value_network}
    seen: set[int] = set()
    groups: dict[str, list[nn.Parameter]] = {}
    for name, network in networks.items():
        own = [p for p in network.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        if own:
            groups[name] = own
    return groups


@contextmanager
def drawing_from(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a step meanwhile, the caller's after it. Nothing is read on the host.

    Args:
        seed: of the learner.
        step: whose draws they are.
        device: on which they are drawn.
    """
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    # Of a CPU's seed 32 bits count: the odd factor spreads the seeds over them.
    generator.manual_seed((seed * 0x9E3779B1 + step) % 2**32)
    try:
        yield
    finally:
        generator.set_state(state)


def _constant(value: Any) -> Hashable:
    # A loaded state has lists for tuples. A tensor is read on the device.
    if isinstance(value, Tensor):
        return Tensor
    return tuple(value) if isinstance(value, list) else value


def _saved(optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimiser with its type, and with rates as numbers, which they are not on every device."""
    state = optimizer.state_dict()
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return {"type": type(optimizer).__name__, **state, "param_groups": groups}


#: How an optimiser computes, which depends on the device and not on the training.
_IMPLEMENTATION = ("capturable", "foreach", "fused")


def _fitted(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's saved state as this one loads it; ``ValueError`` if it is that of another."""
    if saved["type"] != type(optimizer).__name__:
        raise ValueError(f"the state is that of {saved['type']}, the optimiser is {type(optimizer).__name__}")
    own, given = optimizer.param_groups, saved["param_groups"]
    sizes, saved_sizes = ({group["name"]: len(group["params"]) for group in groups} for groups in (own, given))
    if list(sizes.items()) != list(saved_sizes.items()):
        raise ValueError(f"the optimiser's groups have {sizes} parameters, the state's {saved_sizes}")
    parameters = [parameter for group in own for parameter in group["params"]]
    indices = [index for group in given for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for name, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"{name} of parameter {index} has shape {tuple(value.shape)}, the parameter has "
                    f"{tuple(parameter.shape)}"
                )
    groups = []
    for mine, theirs in zip(own, given, strict=True):
        group = mine | theirs | {name: mine[name] for name in _IMPLEMENTATION if name in mine}
        rate = float(group["lr"])
        group["lr"] = torch.full_like(mine["lr"], rate) if isinstance(mine["lr"], Tensor) else rate
        groups.append(group)
    return {name: value for name, value in saved.items() if name != "type"} | {"param_groups": groups}
