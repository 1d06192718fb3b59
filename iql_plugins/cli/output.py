"""What a command prints: one JSON document, or tables for people."""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from iql_plugins.cli.errors import UserError, imported
from iql_plugins.documents import finite_json

__all__ = ["Result", "announced", "captured_stdout", "json_text", "note", "show", "table"]


#: Seconds after which people are told what they are waiting for.
PATIENCE = 1.0


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        document: JSON values, for ``--json``.
        parts: what people read instead: lines, and tables of :func:`table`.
        status: the exit status of a command that was done: 1 where it was asked to tell by it, else 0.
    """

    document: Mapping[str, Any]
    parts: Sequence[Any] = field(default_factory=tuple)
    status: int = 0


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table; all but the first column are aligned to the right."""
    result = imported("rich.table").Table(box=imported("rich.box").SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        result.add_row(*row)
    return result


def show(result: Result) -> None:
    """Prints a result for people on stdout."""
    console = imported("rich.console").Console(
        file=sys.stdout, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty()
    )
    for part in result.parts:
        if isinstance(part, str) and not sys.stdout.isatty():
            # As it is, for whatever reads it; rich makes spaces of a tab.
            sys.stdout.write(f"{part}\n")
        else:
            console.print(part)
    sys.stdout.flush()


def new_file(option: str, given: str, suffix: str | None) -> Path:
    """The path of a file that is to be written.

    Args:
        option: that it was given by, for errors.
        given: the path.
        suffix: that it must have; None for any.

    Raises:
        UserError: for another suffix, a folder in its place, or one that it would be in and that is not there.
    """
    path = Path(given)
    if suffix is not None and path.suffix != suffix:
        raise UserError(f"{option} must be a {suffix} file, got {given!r}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option}: there is no folder {str(path.parent)!r} to write {path.name!r} to: make it first")
    if path.is_dir():
        raise UserError(f"{option} must be a file, got {given!r}, which is a folder: give the file to write")
    return path


def note(text: str) -> None:
    """Tells people something on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def announced(text: str) -> Iterator[None]:
    """Tells people what they are waiting for, if what is inside takes long."""
    timer = threading.Timer(PATIENCE, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def json_text(document: Mapping[str, Any], indent: int | None = 2) -> str:
    """A JSON document, without ``indent`` in one line; numbers that are not finite are null."""
    return json.dumps(finite_json(document), indent=indent, allow_nan=False)


@contextlib.contextmanager
def captured_stdout(*, restore: bool) -> Iterator[Callable[[str], None]]:
    """Sends to stderr whatever anyone writes to stdout, C libraries and child processes included.

    Args:
        restore: whether to undo it at the end; not for a process that ends then, because libraries print at exit, too.

    Yields:
        What writes to stdout all the same.
    """
    stdout = sys.stdout
    stdout.flush()
    descriptor = _descriptor(stdout)
    real: TextIO = stdout
    saved = None
    if descriptor is not None:
        saved = os.dup(descriptor)
        real = os.fdopen(saved, "w", encoding="utf-8", closefd=False)
        os.dup2(2, descriptor)
    sys.stdout = sys.stderr

    def write(text: str) -> None:
        real.write(text)
        real.flush()

    try:
        yield write
    finally:
        if restore:
            # What somebody wrote into the stream's buffer is no result, either.
            stdout.flush()
            sys.stdout = stdout
            if descriptor is not None and saved is not None:
                os.dup2(saved, descriptor)
                os.close(saved)


def _descriptor(stream: TextIO) -> int | None:
    """1 for the process's stdout; None for a stream that stands in for it."""
    try:
        return stream.fileno() if stream.fileno() == 1 else None
    except (OSError, AttributeError, ValueError):
        return None
