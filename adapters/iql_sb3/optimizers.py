"""The one optimiser of all networks, a network at a time."""

from collections import defaultdict
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

__all__ = ["NetworkOptimizer"]


class NetworkOptimizer(Optimizer):
    """What of an optimiser trains one network: its very group, and the state of its parameters.

    Whatever is written into ``param_groups[0]`` is written into the optimiser's group.

    Args:
        optimizer: of all networks.
        network: the name of its group.
    """

    def __init__(self, optimizer: Optimizer, network: str) -> None:
        self._whole, self._network = optimizer, network
        # The base class's constructor makes groups, where here is a view of them: this makes all the rest.
        self.__setstate__({"defaults": optimizer.defaults})

    def __reduce__(self) -> Any:
        return type(self), (self._whole, self._network)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The network's group, if it is trained."""
        return [group for group in self._whole.param_groups if group["name"] == self._network]

    @property
    def state(self) -> "_State":  # type: ignore[override]
        """The state of its parameters; what is written there counts."""
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        return _State(self._whole.state, own)

    def step(self, closure: Any = None) -> Any:
        """As the optimiser's, of this network alone."""
        with self._alone() as optimizer:
            return optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Likewise."""
        with self._alone() as optimizer:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Likewise."""
        with self._alone() as optimizer:
            return optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Likewise."""
        with self._alone() as optimizer:
            optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the learner trains the networks' parameters, and no others.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"the optimiser of the {self._network} trains the network's own parameters and takes no further group: "
            "make an optimiser of your own for others"
        )

    @contextmanager
    def _alone(self) -> Iterator[Optimizer]:
        """The optimiser, which has nothing but this network meanwhile."""
        whole = self._whole
        groups, state = whole.param_groups, whole.state
        places = [place for place, group in enumerate(groups) if group["name"] == self._network]
        whole.param_groups, whole.state = self.param_groups, defaultdict(dict, self.state)
        try:
            yield whole
        finally:
            # A state that was loaded has groups of its own, which another library's do not name.
            for place, group in zip(places, whole.param_groups, strict=True):
                group["name"] = self._network
                groups[place] = group
                for parameter in group["params"]:
                    state.pop(parameter, None)
            state.update(whole.state)
            whole.param_groups, whole.state = groups, state


class _State(MutableMapping[Any, Any]):
    """The entries of an optimiser's state that some parameters have.

    Args:
        whole: the optimiser's.
        own: the parameters.
    """

    def __init__(self, whole: MutableMapping[Any, Any], own: Sequence[Any]) -> None:
        self._whole, self._own = whole, own

    def __getitem__(self, parameter: Any) -> Any:
        return self._whole[parameter]

    def __setitem__(self, parameter: Any, value: Any) -> None:
        self._whole[parameter] = value

    def __delitem__(self, parameter: Any) -> None:
        del self._whole[parameter]

    def __iter__(self) -> Iterator[Any]:
        return iter([parameter for parameter in self._own if parameter in self._whole])

    def __len__(self) -> int:
        return sum(1 for _ in self)
