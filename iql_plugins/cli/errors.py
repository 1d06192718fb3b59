"""Mistakes of the user, which end the command with one line and exit status 2."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["UserError", "imported", "mistakes"]


class UserError(Exception):
    """What the user got wrong, in one line that says what to do."""


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds inside are the user's: each becomes a :class:`UserError` of one line."""
    try:
        yield
    except kinds as error:
        # The text of a KeyError is the representation of its argument.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(" ".join(str(text).split())) from error


def imported(module: str, extra: str = "cli") -> Any:
    """A module of an optional dependency.

    Raises:
        UserError: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {module.partition('.')[0]} ({error}): pip install 'iql-plugins[{extra}]'"
        ) from error
