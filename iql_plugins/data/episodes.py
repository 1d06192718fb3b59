"""Where the episodes of a dataset end, how long they are, and what they return."""

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_plugins.data.dataset import DONE, REWARD

__all__ = ["ends", "lengths", "numbers", "returns"]


def ends(dataset: TensorDictBase) -> Tensor:
    """The last row of each episode: where ``("next", "done")`` is True, and the last of all.

    Args:
        dataset: batch size ``[N]``, in time order, episode after episode.

    Returns:
        ``[E]`` int64, ascending, on the CPU.
    """
    done = dataset.get(DONE).reshape(-1).cpu().clone()
    done[-1:] = True
    return done.nonzero().squeeze(-1)


def lengths(dataset: TensorDictBase) -> Tensor:
    """Transitions of each episode.

    Args:
        dataset: see :func:`ends`.

    Returns:
        ``[E]`` int64, on the CPU.
    """
    last = ends(dataset)
    return last.diff(prepend=last.new_full((1,), -1))


def numbers(dataset: TensorDictBase) -> Tensor:
    """The number of each transition's episode, from 0.

    Args:
        dataset: see :func:`ends`.

    Returns:
        ``[N]`` int64, on the CPU.
    """
    length = lengths(dataset)
    return torch.arange(len(length), device="cpu").repeat_interleave(length)


def returns(dataset: TensorDictBase) -> Tensor:
    """The sum of the rewards of each episode, undiscounted.

    With rewards 1, 2, 3 and an episode's end after the second, these are 3 and 3.

    Args:
        dataset: see :func:`ends`.

    Returns:
        ``[E]`` float64, on the CPU.
    """
    rewards = dataset.get(REWARD).reshape(-1).cpu().double()
    sums = torch.zeros(len(ends(dataset)), dtype=torch.float64, device="cpu")
    return sums.index_add_(0, numbers(dataset), rewards)
