"""d3rlpy's optimiser factories as the learner takes them."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from d3rlpy.optimizers import AdamFactory
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from iql_plugins.training.learner import Groups, adam

__all__ = ["FactoryOptimizer", "ShownOptimizer", "clip_grad_norm", "makers", "reset"]


class FactoryOptimizer:
    """An optimiser that a d3rlpy factory makes for one network, with the factory's clipping and schedule.

    Args:
        factory: d3rlpy's.
        group: ``{"name": ..., "params": ..., "lr": ...}`` of the network; the schedule's factor goes into it.

    Raises:
        ValueError: for a factory that splits the parameters into groups.
    """

    def __init__(self, factory: Any, group: dict[str, Any]) -> None:
        parameters = nn.ParameterList(group["params"])
        # Without its schedule: that goes through the learner, who lets what a user sets count, too.
        plain = dataclasses.replace(factory, lr_scheduler_factory=None)
        self.wrapper = plain.create([("", parameters)], lr=group["lr"], compiled=False)
        self.optim: Optimizer = self.wrapper.optim
        if len(self.optim.param_groups) != 1:
            raise ValueError(
                f"{type(factory).__name__} splits the parameters of the {group['name']} into "
                f"{len(self.optim.param_groups)} groups: pass a factory that keeps them in one"
            )
        own = self.optim.param_groups[0]
        own["name"] = group["name"]
        self._schedule: LRScheduler | None = None
        if factory.lr_scheduler_factory is not None:
            # In proportion to no rate there is no schedule.
            rate, own["lr"] = own["lr"], own["lr"] or 1.0
            self._schedule = factory.lr_scheduler_factory.create(self.optim)
            own["lr"] = rate
            self._tell_schedule()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As those of ``torch.optim.Optimizer``."""
        return self.optim.param_groups

    @property
    def state(self) -> Any:
        """As that of ``torch.optim.Optimizer``."""
        return self.optim.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optim.state = state

    def step(self) -> None:
        """Clips, updates, and moves the schedule on, as d3rlpy does."""
        self.wrapper.step()
        if self._schedule is not None:
            group = self.param_groups[0]
            # As if nobody else had set a rate.
            rate, group["lr"] = group["lr"], self._schedule.get_last_lr()[0]
            self._schedule.step()
            group["lr"] = rate
            self._tell_schedule()

    def state_dict(self) -> dict[str, Any]:
        """As that of ``torch.optim.Optimizer``, and the schedule's state."""
        return {**self.optim.state_dict(), "lr_scheduler": self._schedule and self._schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.optim.load_state_dict({name: state[name] for name in ("state", "param_groups")})
        if self._schedule is not None and state.get("lr_scheduler"):
            self._schedule.load_state_dict(state["lr_scheduler"])
            self._tell_schedule()

    def _tell_schedule(self) -> None:
        assert self._schedule is not None
        group = self.param_groups[0]
        group["schedule"] = self._schedule.get_last_lr()[0] / group["initial_lr"]


class ShownOptimizer(Optimizer):
    """The learner's optimiser as users see it: what is set in its groups counts.

    d3rlpy copies the state of an optimiser into another one of its class, parameter by parameter, whatever their
    shapes. Ours has several networks in it, and critics that are stacked: being of a class of its own, it is refused.

    Args:
        optimizer: torch's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def __reduce__(self) -> Any:
        return ShownOptimizer, (self._optimizer,)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The learner's own, named ``"actor"``, ``"critic"`` and ``"value"``."""
        return self._optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """Moments by parameter."""
        return self._optimizer.state

    def state_dict(self) -> dict[str, Any]:
        """See ``torch.optim.Optimizer``."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer``."""
        self._optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See ``torch.optim.Optimizer``."""
        self._optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        """See ``torch.optim.Optimizer``."""
        return self._optimizer.step(closure)


def clip_grad_norm(config: Any) -> float | None:
    """The largest norm of each network's gradient, if both factories ask for the same and for no more than Adam."""
    return config.actor_optim_factory.clip_grad_norm if _is_adam(config) else None


def makers(config: Any) -> Callable[[Groups], Sequence[Any]]:
    """From parameter groups to optimisers: the core's one Adam where the factories ask for no more than it does."""
    if _is_adam(config):
        return adam
    factories = {
        "actor": config.actor_optim_factory,
        "critic": config.critic_optim_factory,
        "value": config.critic_optim_factory,
    }
    return lambda groups: [FactoryOptimizer(factories[group["name"]], group) for group in groups]


def reset(optimizer: Any) -> None:
    """Forgets moments and counts of steps."""
    optimizer.state = defaultdict(dict)


def _is_adam(config: Any) -> bool:
    actor, critic = config.actor_optim_factory, config.critic_optim_factory
    return all(
        type(factory) is AdamFactory and factory == AdamFactory(clip_grad_norm=actor.clip_grad_norm)
        for factory in (actor, critic)
    )
