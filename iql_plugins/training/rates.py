"""Learning rates: what is set, what schedules make of it, and what users write into an optimiser's groups."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from iql_plugins import _compat

__all__ = ["Rate", "Rates"]


class Rate(NamedTuple):
    r"""A learning rate: what was set last, and the factor of its schedule then; None before the first step with it.

    .. math:: \text{value} \cdot \frac{\text{factor now}}{\text{factor}}

    No rate is in proportion to a factor below a thousandth: what was set at the end of a schedule stays.

    >>> Rate(0.5).at(0.5), Rate(0.5, 0.25).at(0.5), Rate(0.5, 1e-4).at(0.5), Rate(0.5, None).at(0.25)
    (0.25, 1.0, 0.5, 0.5)
    """

    value: float
    factor: float | None = 1.0

    def at(self, factor: float) -> float:
        """The rate where the schedule has come to ``factor``."""
        if self.factor is None or self.factor < _SMALLEST_FACTOR:
            return self.value
        return self.value * (factor / self.factor)


_SMALLEST_FACTOR = 1e-3


class _Seen(NamedTuple):
    """A group's ``"lr"``: who writes a number puts another object there, who writes into a tensor counts it up."""

    rate: Any
    version: int | None
    value: float


class Rates:
    """The rates of networks, each in a group of an optimiser, where users see them and may write others.

    Nothing is read from the device, but for what was written there.

    Args:
        optimizers: their groups have names.
        rates: by name, those that the groups were made with; networks that are not trained have one, too.
        factor: the factor of the schedule in the next step, of a network's name and its group (empty for none).
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        rates: Mapping[str, float],
        factor: Callable[[str, Mapping[str, Any]], float],
    ) -> None:
        # By position: an optimiser that loads a state has other groups.
        self._places = {
            group["name"]: (optimizer, index)
            for optimizer in optimizers
            for index, group in enumerate(optimizer.param_groups)
        }
        #: The networks that have a group.
        self.trained = list(self._places)
        self._factor_of = factor
        self._rates = {name: Rate(rate) for name, rate in rates.items()}
        made = {name: self.group(name)["lr"] for name in self.trained}
        # A graph may have captured them: as long as nobody puts another rate in their place, they are filled.
        self._tensors = {name: rate for name, rate in made.items() if isinstance(rate, Tensor)}
        self._seen: dict[str, _Seen] = {}
        for name, rate in made.items():
            self._note(name, rates[name])
            # A tensor rounds it.
            given = torch.tensor(rates[name], dtype=rate.dtype).item() if isinstance(rate, Tensor) else rates[name]
            if float(rate) != given:
                self._rates[name] = Rate(float(rate))

    def group(self, name: str) -> dict[str, Any]:
        """The group of a network; an empty one if it is not trained."""
        if name not in self._places:
            return {}
        optimizer, index = self._places[name]
        return optimizer.param_groups[index]

    def next(self, name: str) -> float:
        """The rate of a network in the next step.

        Raises:
            ValueError: if something else was written into its group.
        """
        return self._read(name).at(self._factor(name))

    def base(self, name: str) -> float:
        """The rate of a network before its schedule.

        Raises:
            ValueError: as :meth:`next`.
        """
        return self._read(name).at(1.0)

    def set(self, name: str, rate: float) -> None:
        """Sets the rate of a network before its schedule.

        Raises:
            ValueError: for a rate out of range.
        """
        self._rates[name] = Rate(_checked(rate))
        if name in self._places:
            # Whatever was written there is no more.
            self._note(name, math.nan)
            self._write(name, rate * self._factor(name))

    def show(self, name: str, rate: float | None = None) -> None:
        """Puts the rate of a step into a network's group; what was written there is set.

        Args:
            name: of the network.
            rate: of a step that something else takes, which what was written does not count for; None for the next one
                of this training, which it does.

        Raises:
            ValueError: as :meth:`next`.
        """
        if rate is None:
            self.settle(name)
            rate = self._rates[name].at(self._factor(name))
        else:
            self._read(name)
        self._write(name, rate)

    def settle(self, name: str) -> None:
        """Takes what was written into a network's group for the rate at the factor of the next step, for good.

        Raises:
            ValueError: as :meth:`next`.
        """
        self._rates[name] = self._read(name)

    def now(self) -> dict[str, Rate]:
        """What was set, and the factors then: that of the next step for what no step has met.

        Raises:
            ValueError: as :meth:`next`.
        """
        return {name: self._read(name) for name in self._rates}

    def state_dict(self) -> dict[str, Rate]:
        """What was set; what the groups have is in the optimisers' state."""
        self.now()
        return dict(self._rates)

    def load_state_dict(self, state: Mapping[str, Rate]) -> None:
        """Restores :meth:`state_dict`, once the optimisers have loaded their state; else what is in a group is set."""
        self._rates |= state
        for name in self.trained:
            rate = float(self.group(name)["lr"])
            self._note(name, rate)
            if name not in state:
                self._rates[name] = Rate(rate, self._factor(name))

    def _factor(self, name: str) -> float:
        return self._factor_of(name, self.group(name))

    def _read(self, name: str) -> Rate:
        """The rate that was set last, in the group or by :meth:`set`."""
        if name in self._places:
            rate, seen = self.group(name)["lr"], self._seen[name]
            if rate is not seen.rate or _written(rate, seen):
                value = float(rate)
                self._rates[name] = Rate(_checked(value, f"in the {name}'s group "), None)
                self._note(name, value)
        last = self._rates[name]
        # Until a step has met it the schedule may move on, or start again: whoever looks does not change the result.
        return last._replace(factor=self._factor(name)) if last.factor is None else last

    def _write(self, name: str, value: float) -> None:
        group, own = self.group(name), self._tensors.get(name)
        if own is not None and group["lr"] is not own:
            # What a user put there is his, and so may be what was there before.
            group["lr"] = self._tensors[name] = torch.full_like(own, value)
        elif value == self._seen[name].value:
            return
        elif own is None:
            group["lr"] = value
        else:
            own.fill_(value)
        self._note(name, value)

    def _note(self, name: str, value: float) -> None:
        rate = self.group(name)["lr"]
        self._seen[name] = _Seen(rate, _version(rate), value)


def _checked(rate: float, where: str = "") -> float:
    if not 0.0 <= rate < math.inf:
        raise ValueError(f"the learning rate {where}must be a finite number >= 0, got {rate}")
    return rate


def _written(rate: Any, seen: _Seen) -> bool:
    """Whether somebody wrote into the tensor of a rate. Where writes are not counted, its value tells."""
    version = _version(rate)
    given = torch.tensor(seen.value, dtype=rate.dtype).item() if version is None else None
    return version != seen.version or (version is None and float(rate) != given)


def _version(rate: Any) -> int | None:
    return _compat.writes(rate) if isinstance(rate, Tensor) else 0
