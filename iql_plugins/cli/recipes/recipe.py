"""What a recipe is, and how it goes on after it was killed."""

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from iql_plugins import checkpoint

__all__ = ["Array", "Columns", "Parts", "Recipe", "Rows", "archive", "joined"]

Array = np.ndarray[Any, np.dtype[Any]]
#: Arrays of as many rows, by the names of D4RL: ``observations``, ``observations/NAME``, ``timeouts``, ...
Columns = Mapping[str, Array]


@dataclass(frozen=True)
class Recipe:
    """A dataset that can be made.

    Attributes:
        name: what users call it.
        env: gymnasium's id of the environment that it is from, and that policies are measured in.
        summary: one line for people.
        make: from a seed and :class:`Parts` to the columns.
        packages: what must be installed beside the command line.
        extra: of this package, which brings them.
        shares: recipes that share their parts have the same word here; None shares with none.
    """

    name: str
    env: str
    summary: str
    make: "Callable[[int, Parts], Columns]"
    packages: Sequence[str] = ()
    extra: str = "benchmarks"
    shares: str | None = None


@dataclass
class Parts:
    """The finished parts of a recipe, each a file that is written in one step.

    A part must be a function of its name, the seed, and the parts before it: whoever is killed goes on with the next
    one, and ends with the same bytes.

    Attributes:
        folder: where they are.
        report: is told how many parts of how many are done, and what is under way.
    """

    folder: Path
    report: Callable[[int, int, str], None] = field(default=lambda done, total, what: None)

    def columns(self, names: Sequence[str], make: Callable[[int], Columns], what: str) -> Columns:
        """The rows of parts that do not depend on each other, one part after another.

        Args:
            names: of the parts.
            make: from the number of a part to its rows.
            what: they are, for people.
        """
        for number, name in enumerate(names):
            self.report(number, len(names), what)
            if not self.has(name):
                checkpoint.write_bytes(self.path(name), archive(make(number)))
        self.report(len(names), len(names), what)
        return joined([self.read(name) for name in names])

    def has(self, name: str) -> bool:
        """Whether a part is finished. One that a broken disk has cut or changed is none: it is made again, the same."""
        try:
            self.read(name)
        except (OSError, EOFError, ValueError, BadZipFile, zlib.error):
            return False
        return True

    def path(self, name: str) -> Path:
        """The file of a part."""
        return self.folder / f"{name}.npz"

    def read(self, name: str) -> Columns:
        """The rows of a finished part."""
        with np.load(self.path(name), allow_pickle=False) as content:
            return {key: content[key] for key in content.files}


class Rows:
    """Transitions of an environment, one after another, as columns of float32."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._rows.get("rewards", ()))

    def add(
        self, observation: Any, action: Any, reward: float, next_observation: Any, terminal: bool, timeout: bool
    ) -> None:
        """Adds one.

        Args:
            observation: before it; a mapping for Dict spaces.
            action: as the environment was given it.
            reward: of it.
            next_observation: after it, also where the episode ended.
            terminal: whether it led to a terminal state.
            timeout: whether the episode was cut behind it.
        """
        row = {"actions": action, "rewards": reward, "terminals": terminal, "timeouts": timeout and not terminal}
        for name, value in (("observations", observation), ("next_observations", next_observation)):
            entries = value.items() if isinstance(value, Mapping) else ()
            row |= {f"{name}/{key}": entry for key, entry in entries} or {name: value}
        for name, value in row.items():
            self._rows.setdefault(name, []).append(np.copy(value))

    def columns(self) -> Columns:
        """All of them; discrete actions are int64, ends of episodes are booleans."""
        return {name: _narrowed(np.stack(rows)) for name, rows in self._rows.items()}


def _narrowed(rows: Array) -> Array:
    return rows.astype(np.float32) if rows.dtype.kind == "f" else rows


def joined(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, one part after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def archive(columns: Columns) -> bytes:
    """The bytes of an ``.npz``, which depend on the columns alone."""
    content = io.BytesIO()
    np.savez_compressed(content, **columns)  # type: ignore[arg-type]
    return content.getvalue()
