"""d3rlpy's optimiser factories as the learner takes them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from d3rlpy.optimizers import AdamFactory
from torch import nn
from torch.optim import Optimizer

from iql_plugins.learner import Groups, adam

__all__ = ["FactoryOptimizer", "clip_grad_norm", "makers", "reset"]


class FactoryOptimizer:
    """An optimiser that a d3rlpy factory makes for one network, with the factory's clipping and schedule.

    Args:
        factory: d3rlpy's.
        group: ``{"name": ..., "params": ..., "lr": ...}`` of the network.

    Raises:
        ValueError: for a factory that splits the parameters into groups.
    """

    def __init__(self, factory: Any, group: dict[str, Any]) -> None:
        parameters = nn.ParameterList(group["params"])
        self.wrapper = factory.create([("", parameters)], lr=group["lr"], compiled=False)
        self.optim: Optimizer = self.wrapper.optim
        if len(self.optim.param_groups) != 1:
            raise ValueError(
                f"{type(factory).__name__} splits the parameters of the {group['name']} into "
                f"{len(self.optim.param_groups)} groups: pass a factory that keeps them in one"
            )
        self.optim.param_groups[0]["name"] = group["name"]
        self._rate: Any = self.optim.param_groups[0]["lr"]
        self._scheduled = factory.lr_scheduler_factory is not None

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
        if self._scheduled:
            # The learner sets the rate of a network that it has a schedule for, or none.
            self.param_groups[0]["lr"] = self._rate
        self.wrapper.step()
        self._rate = self.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """As that of ``torch.optim.Optimizer``, and the schedule's state."""
        state = self.wrapper.state_dict()
        return {**state["optim"], "lr_scheduler": state["lr_scheduler"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        optim = {name: value for name, value in state.items() if name in ("state", "param_groups")}
        scheduler = state.get("lr_scheduler")
        self.wrapper.load_state_dict({"optim": optim} | ({"lr_scheduler": scheduler} if scheduler else {}))
        self._rate = self.param_groups[0]["lr"]


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
