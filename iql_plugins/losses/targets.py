"""Updates of the target critics."""

import abc
from typing import Any, final

import torch

from iql_plugins import _compat
from iql_plugins.losses.iql import IQLLoss

__all__ = ["HardUpdate", "SoftUpdate", "TargetUpdater"]


class TargetUpdater(abc.ABC):
    """Moves a loss's target critics towards its critics when :meth:`step` is called.

    Making an updater leaves the targets as they are, so that a resumed run keeps the loaded ones; they
    equal the critics in a new loss, and after :meth:`IQLLoss.reset_parameters_recursive`.

    Args:
        loss_module: the loss whose targets are updated.

    Raises:
        TypeError: if ``loss_module`` is not an :class:`IQLLoss`.
    """

    def __init__(self, loss_module: IQLLoss) -> None:
        if not isinstance(loss_module, IQLLoss):
            raise TypeError(f"loss_module must be an IQLLoss, got {type(loss_module).__name__}")
        self.loss_module = loss_module
        loss_module.target_updater_attached()

    @abc.abstractmethod
    def step(self) -> None:
        """Call after each optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """What the updater knows and the loss does not."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            KeyError: if an entry is missing or unknown.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise KeyError(
                f"the state of {type(self).__name__} has {sorted(self.state_dict())}, got {sorted(state_dict)}"
            )
        vars(self).update(state_dict)


@final
class SoftUpdate(TargetUpdater):
    r"""Polyak averaging at every step: :math:`\hat\theta \leftarrow \epsilon\,\hat\theta + (1 - \epsilon)\,\theta`.

    Exactly one of ``eps`` and ``tau`` is given. The paper's ``tau`` is 0.005. Buffers of the critics
    (running statistics) are copied.

    Args:
        loss_module: the loss whose targets are updated.
        eps: share of the old target that stays, in [0.5, 1]; below, ``tau`` was meant.
        tau: 1 - eps, in [0, 1].

    Raises:
        TypeError: if ``loss_module`` is not an :class:`IQLLoss`.
        ValueError: if both or none are given, or out of range.
    """

    def __init__(self, loss_module: IQLLoss, *, eps: float | None = None, tau: float | None = None) -> None:
        if tau is None and eps is not None:
            if not 0.5 <= eps <= 1.0:
                raise ValueError(f"eps must be in [0.5, 1], got {eps}; did you mean tau={eps}?")
            tau = 1.0 - eps
        elif tau is None or eps is not None:
            raise ValueError(f"exactly one of eps and tau must be given, got eps={eps} and tau={tau}")
        if not 0.0 <= tau <= 1.0:
            raise ValueError(f"tau must be in [0, 1], got {tau}")
        super().__init__(loss_module)
        self.tau = tau

    @property
    def eps(self) -> float:
        """Share of the old target that stays: 1 - tau."""
        return 1.0 - self.tau

    @torch.no_grad()
    def step(self) -> None:
        """Moves all targets by the share ``tau``."""
        parameters, buffers = self.loss_module.target_pairs()
        targets, sources = [target for target, _ in parameters], [source for _, source in parameters]
        if targets:
            _compat.lerp_all(targets, sources, self.tau)
        for target, source in buffers:
            target.copy_(source)


@final
class HardUpdate(TargetUpdater):
    """Copies the critics into the targets at every ``value_network_update_interval``-th step.

    Args:
        loss_module: the loss whose targets are updated.
        value_network_update_interval: number of :meth:`step` calls from one copy to the next, >= 1.

    Raises:
        TypeError: if ``loss_module`` is not an :class:`IQLLoss`.
        ValueError: if the interval is below 1.
    """

    def __init__(self, loss_module: IQLLoss, *, value_network_update_interval: int = 1000) -> None:
        if value_network_update_interval < 1:
            raise ValueError(f"value_network_update_interval must be >= 1, got {value_network_update_interval}")
        super().__init__(loss_module)
        self.value_network_update_interval = value_network_update_interval
        self.counter = 0

    def step(self) -> None:
        """Counts, and copies when the interval is full."""
        self.counter += 1
        if self.counter >= self.value_network_update_interval:
            self.loss_module.copy_to_targets()
            self.counter = 0

    def state_dict(self) -> dict[str, Any]:
        """The steps since the last copy."""
        return {"counter": self.counter}
