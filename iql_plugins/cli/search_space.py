"""Where a sweep looks for hyper-parameters: grids and ranges, checked before anything is started."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import Any

from iql_plugins.cli.arguments import Sweep, Train, option, parse
from iql_plugins.cli.errors import UserError, mistakes
from iql_plugins.config import IQLConfig, hyperparameters

__all__ = ["SearchSpace", "parsed", "search_space", "trial_options"]


@dataclass(frozen=True)
class SearchSpace:
    """Where trials are.

    Attributes:
        grids: values by the name of the hyper-parameter, as they are written on a command line.
        ranges: lowest, highest, whether on a logarithmic scale, whether integers.
        values: what the texts of ``grids`` mean.
    """

    grids: Mapping[str, Sequence[str]]
    ranges: Mapping[str, tuple[float, float, bool, bool]]
    values: Mapping[tuple[str, str], Any]

    @property
    def names(self) -> list[str]:
        """Of the hyper-parameters."""
        return [*self.grids, *self.ranges]

    def domains(self, tune: Any, drawn: bool) -> dict[str, Any]:
        """In Ray's terms."""
        space: dict[str, Any] = {
            name: (tune.choice if drawn else tune.grid_search)(list(texts)) for name, texts in self.grids.items()
        }
        for name, (low, high, log, integer) in self.ranges.items():
            if integer:
                space[name] = (tune.lograndint if log else tune.randint)(int(low), int(high) + 1)
            else:
                space[name] = (tune.loguniform if log else tune.uniform)(low, high)
        return space


def parsed(words: Sequence[str]) -> Train:
    """A command of ``train``."""
    arguments = parse(words)
    assert isinstance(arguments, Train)
    return arguments


def search_space(arguments: Sweep, base: Sequence[str]) -> SearchSpace:
    """Where trials are; every value is one that ``train`` takes.

    Raises:
        UserError: names the option.
    """
    if not arguments.grid and not arguments.range:
        raise UserError("which hyper-parameters? Give --grid NAME=VALUE,VALUE or --range NAME=LOW..HIGH with --samples")
    if arguments.samples is None and (arguments.range or arguments.search == "optuna"):
        raise UserError("--range and --search optuna draw trials: give their number by --samples")
    config = parsed(base).hyperparameters
    grids: dict[str, list[str]] = {}
    ranges: dict[str, tuple[float, float, bool, bool]] = {}
    values: dict[tuple[str, str], Any] = {}
    for text in arguments.grid:
        name = _name("--grid", text, base, [*grids])
        found: dict[str, Any] = {}
        for value in (part.strip() for part in text.partition("=")[2].split(",")):
            meant = _valid(f"--grid {name}={value}", name, value, base)
            # 0.7 and 0.70 are one trial.
            if meant not in found.values():
                found[value] = values[name, value] = meant
        grids[name] = list(found)
    for text in arguments.range:
        name = _name("--range", text, base, [*grids, *ranges])
        low, high, log = _bounds(text)
        kind = type(getattr(config, name))
        if kind not in (int, float, type(None)):
            raise UserError(f"--range {text}: {name} is no number; give its values by --grid")
        ends = [int(end) if kind is int and end == int(end) else end for end in (low, high)]
        for end in ends:
            _valid(f"--range {text}", name, str(end), base)
        ranges[name] = (low, high, log, kind is int)
    if arguments.samples is None:
        for point in product(*grids.values()):
            with mistakes(ValueError):
                config.replace(**{name: values[name, text] for name, text in zip(grids, point, strict=True)})
    return SearchSpace(grids, ranges, values)


def _name(given: str, text: str, base: Sequence[str], taken: Sequence[str]) -> str:
    """The hyper-parameter of a ``--grid`` or ``--range``."""
    word, separator, rest = text.partition("=")
    name = word.strip().lstrip("-").replace("-", "_")
    if not separator or not rest.strip(", "):
        shape = "NAME=VALUE,VALUE" if given == "--grid" else "NAME=LOW..HIGH"
        raise UserError(f"{given} must be {shape}, got {text!r}")
    if name not in hyperparameters():
        close = get_close_matches(name, hyperparameters(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"{given} {text}: no hyper-parameter {name!r}; {hint}There are {', '.join(hyperparameters())}")
    if name in taken or any(given.partition("=")[0] in (option(name), option(f"no_{name}")) for given in base):
        raise UserError(f"{given} {text}: {name} is given twice")
    return name


def _bounds(text: str) -> tuple[float, float, bool]:
    """What a ``--range`` says behind its name."""
    number = r"\s*([-+\d.eE]+?)\s*"
    found = re.fullmatch(rf"[^=]+={number}\.\.{number}(:log)?", text)
    try:
        low, high = (float(found[1]), float(found[2])) if found else (math.nan, math.nan)
    except ValueError:
        low = high = math.nan
    log = bool(found and found[3])
    if not low < high or not math.isfinite(high - low) or (log and low <= 0.0):
        raise UserError(
            f"--range must be NAME=LOW..HIGH, or NAME=LOW..HIGH:log with LOW above 0, and LOW below HIGH; got {text!r}"
        )
    return low, high, log


def _valid(said: str, name: str, value: str, base: Sequence[str]) -> Any:
    """What a value on the command line of ``train`` means."""
    if any(word.startswith("--") for word in value.split()):
        raise UserError(f"{said}: a value is no option")
    try:
        return getattr(parsed([*base, *trial_options({name: value})]).hyperparameters, name)
    except UserError as error:
        raise UserError(f"{said}: {error}") from error


def trial_options(point: Mapping[str, Any]) -> list[str]:
    """A trial's own options of ``train``."""
    words: list[str] = []
    for name, value in point.items():
        if isinstance(getattr(IQLConfig(), name), bool) and str(value).lower() in ("true", "false"):
            words.append(option(name if str(value).lower() == "true" else f"no_{name}"))
        else:
            words += [option(name), *str(value).split()]
    return words
