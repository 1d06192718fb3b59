"""Where the episodes of a dataset end, how long they are, and what they return."""

import hashlib

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_plugins.data import summary
from iql_plugins.data.dataset import DONE, REWARD
from iql_plugins.data.summary import CHUNK

__all__ = ["episode_ends", "episode_lengths", "episode_numbers", "episode_returns", "held_out", "return_range"]


def episode_ends(dataset: TensorDictBase) -> Tensor:
    """The last row of each episode: where ``("next", "done")`` is True, and the last of all.

    Args:
        dataset: batch size ``[N]``, in time order, episode after episode.

    Returns:
        ``[E]`` int64, ascending, on the CPU.
    """
    done: Tensor = dataset.get(DONE).reshape(-1).cpu().clone()
    done[-1:] = True
    return done.nonzero().squeeze(-1)


def episode_lengths(dataset: TensorDictBase) -> Tensor:
    """Transitions of each episode.

    Args:
        dataset: see :func:`episode_ends`.

    Returns:
        ``[E]`` int64, on the CPU.
    """
    last = episode_ends(dataset)
    return last.diff(prepend=last.new_full((1,), -1))


def episode_numbers(dataset: TensorDictBase) -> Tensor:
    """The number of each transition's episode, from 0.

    Args:
        dataset: see :func:`episode_ends`.

    Returns:
        ``[N]`` int64, on the CPU.
    """
    length = episode_lengths(dataset)
    return torch.arange(len(length), device="cpu").repeat_interleave(length)


def episode_returns(dataset: TensorDictBase) -> Tensor:
    """The sum of the rewards of each episode, undiscounted.

    With rewards 1, 2, 3 and an episode's end after the second, these are 3 and 3.

    Args:
        dataset: see :func:`episode_ends`.

    Returns:
        ``[E]`` float64, on the CPU.
    """
    rewards, ends = dataset.get(REWARD).reshape(-1), episode_ends(dataset)
    sums = torch.zeros(len(ends), dtype=torch.float64, device="cpu")
    # A piece at a time: numbers of episodes are larger than rewards.
    for start in range(0, len(rewards), CHUNK):
        piece = rewards[start : start + CHUNK].cpu().double()
        rows = torch.arange(start, start + len(piece), device="cpu")
        sums.index_add_(0, torch.searchsorted(ends, rows), piece)
    return sums


def return_range(dataset: TensorDictBase) -> tuple[float, float]:
    """The smallest and the largest of :func:`episode_returns`: those stored with a dataset, or else of a pass over it.

    Args:
        dataset: see :func:`episode_ends`.
    """
    known = summary.of(dataset)
    if known is not None:
        return known.returns[1:]
    low, high = episode_returns(dataset).aminmax()
    return float(low), float(high)


def held_out(dataset: TensorDictBase, share: float, seed: int = 0) -> Tensor:
    """Which transitions are of the episodes that a training leaves aside.

    Of the same data these are the same ones for a share and a seed, everywhere and in every release.

    Args:
        dataset: see :func:`episode_ends`.
        share: of the episodes, in (0, 1), rounded; at least one, and not all.
        seed: of their choice.

    Returns:
        ``[N]`` bool, on the CPU.

    Raises:
        ValueError: for a dataset of a single episode.
    """
    numbers = episode_numbers(dataset)
    count = int(numbers[-1]) + 1
    if count < 2:
        raise ValueError("holding out episodes needs at least two of them, the dataset is a single one")

    def place(episode: int) -> bytes:
        # A generator's draws may be other ones in its library's next release.
        return hashlib.sha256(f"{seed} {episode}".encode()).digest()

    aside = sorted(range(count), key=place)[: min(max(round(share * count), 1), count - 1)]
    return torch.isin(numbers, torch.tensor(aside, device="cpu"))
