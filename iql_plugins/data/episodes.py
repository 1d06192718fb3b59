"""Where the episodes of a dataset end, how long they are, and what they return."""

import hashlib
from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_plugins.data import summary
from iql_plugins.data.dataset import DONE, REWARD
from iql_plugins.data.summary import CHUNK

__all__ = [
    "EpisodeRows",
    "episode_ends",
    "episode_lengths",
    "episode_numbers",
    "episode_returns",
    "held_out",
    "held_out_rows",
    "return_range",
]


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


def return_range(dataset: TensorDictBase, kept: "EpisodeRows | None" = None) -> tuple[float, float]:
    """The smallest and the largest of :func:`episode_returns`: those stored with a dataset, or else of a pass over it.

    Args:
        dataset: see :func:`episode_ends`.
        kept: the episodes that count; None for all.
    """
    known = summary.of(dataset)
    if known is not None and kept is None:
        return known.returns[1:]
    returns = episode_returns(dataset)
    low, high = (returns if kept is None else returns[kept.chosen]).aminmax()
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
    return torch.isin(episode_numbers(dataset), _aside(len(episode_ends(dataset)), share, seed))


def held_out_rows(dataset: TensorDictBase, share: float, seed: int = 0) -> "tuple[EpisodeRows, EpisodeRows]":
    """As :func:`held_out`: the rows that are trained on, and those left aside, in memory that grows with the episodes.

    Args:
        dataset: see :func:`episode_ends`.
        share: see :func:`held_out`.
        seed: likewise.

    Raises:
        ValueError: likewise.
    """
    ends = episode_ends(dataset)
    chosen = torch.isin(torch.arange(len(ends), device="cpu"), _aside(len(ends), share, seed))
    return EpisodeRows(ends, ~chosen), EpisodeRows(ends, chosen)


class EpisodeRows:
    """The rows of some of a dataset's episodes, one after another: which row of the dataset is at which position.

    With episodes of rows 0 to 1, 2 to 4 and 5 to 5, of which the first and the last are chosen, these are 0, 1 and 5.

    Args:
        ends: of all episodes, see :func:`episode_ends`.
        chosen: ``[E]`` bool, which of them; at least one.

    Attributes:
        chosen: likewise.
    """

    def __init__(self, ends: Tensor, chosen: Tensor) -> None:
        self.chosen = chosen
        lengths = ends.diff(prepend=ends.new_full((1,), -1))[chosen]
        self._stops = lengths.cumsum(0)
        self._shifts = ends[chosen] + 1 - self._stops

    def __len__(self) -> int:
        return int(self._stops[-1])

    def pieces(self) -> Iterator[Tensor]:
        """All of the rows, as many at a time as are looked at together."""
        for start in range(0, len(self), CHUNK):
            yield self[torch.arange(start, min(start + CHUNK, len(self)), device="cpu")]

    def __getitem__(self, position: Tensor) -> Tensor:
        """``[B]`` int64 rows of the dataset at positions ``[B]`` below the length."""
        own = position.to(self._stops.device)
        rows = own + self._shifts[torch.searchsorted(self._stops, own, right=True)]
        return rows.to(position.device)


def _aside(count: int, share: float, seed: int) -> Tensor:
    """The numbers of the episodes that are held out."""
    if count < 2:
        raise ValueError("holding out episodes needs at least two of them, the dataset is a single one")

    def place(episode: int) -> bytes:
        # A generator's draws may be other ones in its library's next release.
        return hashlib.sha256(f"{seed} {episode}".encode()).digest()

    aside = sorted(range(count), key=place)[: min(max(round(share * count), 1), count - 1)]
    return torch.tensor(aside, device="cpu")
