"""Updates of the target critics."""

import abc
from itertools import chain
from operator import is_
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


class _Pairs:
    """Targets and their sources, looked up once: walking the modules takes longer than to move the targets.

    Args:
        loss: whose they are.
    """

    def __init__(self, loss: IQLLoss) -> None:
        parameters, self.buffers = loss.target_pairs()
        self.targets, self.sources = [target for target, _ in parameters], [source for _, source in parameters]
        networks = loss.get_stateful_net("qvalue_network", False), loss.get_stateful_net("target_qvalue_network", False)
        modules = [module for network in networks for module in network.modules()]
        self._registries = [loss._modules]
        self._registries += [own for m in modules for own in (m._modules, m._parameters, m._buffers)]
        self._found = self._content()
        known = set(map(id, self._found))
        sources = *self.sources, *(source for _, source in self.buffers)
        self.are_registered = all(id(source) in known for source in sources)

    def are_those_of(self, loss: IQLLoss) -> bool:
        """Whether nothing has been replaced, added or taken away."""
        content = self._content()
        return (
            self._registries[0] is loss._modules
            and len(content) == len(self._found)
            and all(map(is_, content, self._found))
        )

    def _content(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._registries)))


@final
class SoftUpdate(TargetUpdater):
    r"""Polyak averaging at every step: :math:`\hat\theta \leftarrow \epsilon\,\hat\theta + (1 - \epsilon)\,\theta`.

    Exactly one of ``eps`` and ``tau`` is given. The paper's ``tau`` is 0.005. Buffers of the critics
    (running statistics) are copied.

    Args:
        loss_module: the loss whose targets are updated.
        eps: share of the old target that stays, in [0.5, 1]; below, ``tau`` was meant.
        tau: 1 - eps, in [0, 1].

    Attributes:
        undisturbed: whether the tensors are those of the last step, and need not be looked up.

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
        self.undisturbed = False
        self._pairs: _Pairs | None = None

    @property
    def eps(self) -> float:
        """Share of the old target that stays: 1 - tau."""
        return 1.0 - self.tau

    @torch.no_grad()
    def step(self) -> None:
        """Moves all targets by the share ``tau``."""
        pairs = self._pairs
        if pairs is None or not (self.undisturbed or pairs.are_those_of(self.loss_module)):
            pairs = _Pairs(self.loss_module)
        # What is put together of parameters is another tensor each time.
        self._pairs = pairs if pairs.are_registered else None
        if pairs.targets:
            _compat.lerp_all(pairs.targets, pairs.sources, self.tau)
        for target, source in pairs.buffers:
            target.copy_(source)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"undisturbed": False, "_pairs": None}


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
