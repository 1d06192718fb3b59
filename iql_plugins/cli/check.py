"""A plugin imported in a process of its own, which it may end, block or write to stdout of: ``adapters --check``."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from iql_plugins.plugins import Host

__all__ = ["Check", "check"]


@dataclass(frozen=True)
class Check:
    """What came of an import.

    Attributes:
        outcome: ``"fine"``; ``"error"``, the host refuses the plugin; ``"exited"``, the process ended before the import
            did; ``"hung"``, it had not ended when the time was over; ``"stdout"``, fine but for what it wrote there.
        message: the same in a sentence.
    """

    outcome: Literal["fine", "error", "exited", "hung", "stdout"]
    message: str

    @property
    def error(self) -> str | None:
        """Why the host refuses the plugin; None if it does not."""
        return self.message if self.outcome == "error" else None


def check(name: str, timeout: float) -> Check:
    """Imports the plugin of that name in a new interpreter with this one's path.

    Args:
        name: of its entry point.
        timeout: seconds that the process may take to start, to import the plugin and to end.
    """
    with TemporaryDirectory() as folder:
        report, written = Path(folder, "report"), Path(folder, "stdout")
        # Files, not pipes: a pipe stays open for as long as anything that the plugin has started.
        with written.open("wb") as stdout:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, name, report],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return Check("hung", f"hung: it was not imported after {timeout:g} seconds")
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
            # What it has started, too.
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        error = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
        if error is not None:
            return Check("error", error)
        if status or not report.exists():
            return Check("exited", f"ended its process: {_reason(status)}")
        with written.open(encoding="utf-8", errors="replace") as lines:
            first = lines.readline(LONGEST_LINE).rstrip("\n")
        return Check("stdout", f"wrote to stdout: {first!r}") if written.stat().st_size else Check("fine", "fine")


#: Characters of a line that are shown.
LONGEST_LINE = 200


def _reason(status: int) -> str:
    return f"exited with status {status}" if status >= 0 else signal.Signals(-status).name


def _report(name: str, path: str) -> None:
    """What the new interpreter does."""
    [info] = Host(strict=False, allow=[name]).check().values()
    # Renamed when it is whole.
    written = Path(f"{path}.new")
    written.write_text(json.dumps(info.error), encoding="utf-8")
    written.rename(path)


if __name__ == "__main__":
    _report(*sys.argv[1:])
