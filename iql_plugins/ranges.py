"""What values a hyper-parameter may have, each range once: in words, and as a check."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

__all__ = [
    "AUTOMATIC",
    "AUTOMATIC_SHARE",
    "COUNT",
    "COUNTS",
    "EXPECTILE",
    "FINITE",
    "FLAG",
    "HUBER",
    "NON_NEGATIVE",
    "POSITIVE",
    "PROBABILITY",
    "QUANTILE",
    "SHARE",
    "TEMPERATURE",
    "Range",
    "choice",
    "huber_threshold",
    "target_share",
]


@dataclass(frozen=True)
class Range:
    """The values that a hyper-parameter may have.

    >>> PROBABILITY.check("actor_dropout", 1.5)
    Traceback (most recent call last):
    ValueError: actor_dropout must be in [0, 1), got 1.5

    Attributes:
        words: what a value must be.
        holds: whether a value is in it; one that cannot be compared, or be a float, is not.
        hint: what is usual, for whoever is wrong.
    """

    words: str
    holds: Callable[[Any], bool]
    hint: str = ""

    def check(self, name: str, value: object) -> None:
        """Raises ``ValueError`` that names the hyper-parameter unless the value is in the range."""
        try:
            holds = self.holds(value)
        except (TypeError, OverflowError):
            holds = False
        if not holds:
            raise ValueError(f"{name} must be {self.words}, got {value!r}{self.hint}")

    def __or__(self, other: "Range") -> "Range":
        return Range(f"{self.words} or {other.words}", lambda value: other.holds(value) or self.holds(value))


def choice(literal: Any) -> Range:
    """One of a ``Literal``'s."""
    options = get_args(literal)
    return Range(f"one of {', '.join(map(repr, options))}", lambda value: value in options)


#: The effective sample size that ``"auto"`` asks for.
AUTOMATIC_SHARE = 0.7


def target_share(temperature: object) -> float | None:
    """The effective sample size that ``"auto"`` asks for, or ``"auto_0.5"``; None for what is neither.

    >>> target_share("auto"), target_share("auto_0.5"), target_share("auto_2"), target_share(3.0)
    (0.7, 0.5, None, None)
    """
    if not isinstance(temperature, str):
        return None
    try:
        share = AUTOMATIC_SHARE if temperature == "auto" else float(temperature.removeprefix("auto_"))
    except ValueError:
        return None
    return share if temperature.startswith("auto") and QUANTILE.holds(share) else None


def huber_threshold(loss_function: object) -> float | None:
    """The threshold δ of ``"huber_20"``; None for what is none.

    >>> huber_threshold("huber_20"), huber_threshold("huber_0.5"), huber_threshold("huber"), huber_threshold("l2")
    (20.0, 0.5, None, None)
    """
    if not isinstance(loss_function, str) or not loss_function.startswith("huber_"):
        return None
    number = loss_function.removeprefix("huber_")
    # float() takes more than that: spaces, underscores, other alphabets.
    threshold = float(number) if re.fullmatch(r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", number) else 0.0
    # Of a smaller one gradients are lost in Adam's ε.
    return threshold if 1e-6 <= threshold < math.inf else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(words: str, holds: Callable[[Any], bool], hint: str = "") -> Range:
    """A range that True and False are not in, which compare with numbers."""
    return Range(words, lambda value: not isinstance(value, bool | np.bool_) and holds(value), hint)


COUNT = Range("an integer >= 1", _is_count)
COUNTS = Range("a tuple of integers >= 1", lambda v: isinstance(v, list | tuple) and all(map(_is_count, v)))
FLAG = Range("True or False", lambda v: isinstance(v, bool))
FINITE = _number("a finite number", lambda v: math.isfinite(v))
POSITIVE = _number("a finite number > 0", lambda v: 0.0 < v < math.inf)
NON_NEGATIVE = _number("a finite number >= 0", lambda v: 0.0 <= v < math.inf)
SHARE = _number("in [0, 1]", lambda v: 0.0 <= v <= 1.0)
PROBABILITY = _number("in [0, 1)", lambda v: 0.0 <= v < 1.0)
QUANTILE = _number("in (0, 1)", lambda v: 0.0 < v < 1.0)
EXPECTILE = _number("in (0, 1]", lambda v: 0.0 < v <= 1.0, "; the paper uses 0.7 to 0.9")
TEMPERATURE = Range(
    "a finite number >= 0 (it is the inverse temperature beta: 0 is behaviour cloning, 3 and 10 are the paper's)",
    NON_NEGATIVE.holds,
)
HUBER = Range("'huber_20' with a threshold >= 1e-6", lambda v: huber_threshold(v) is not None)
AUTOMATIC = Range(
    "'auto', or 'auto_0.5' with another effective sample size in (0, 1)", lambda v: target_share(v) is not None
)
