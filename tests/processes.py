"""Programs that run to their end, and whether processes have ended."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path, folder: Path) -> str:
    """The output of a Python program in a folder of its own."""
    environment = os.environ | {"MPLBACKEND": "agg"}
    finished = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@contextlib.contextmanager
def ranks(program: Path, *arguments: str | Path) -> Iterator[list["subprocess.Popen[str]"]]:
    """Two processes of a program that can form a process group; killed in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": path}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in map(str, range(2)):
            process = subprocess.Popen(
                [sys.executable, program, *arguments],
                env=os.environ | given | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def alive(session: int) -> list[int]:
    """The processes of a session."""
    return _those(3, session)


def children(parent: int) -> list[int]:
    """The processes that one has started, and not waited for."""
    return _those(1, parent)


def _those(field: int, value: int) -> list[int]:
    """The processes of which a field of their state is so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[field]) == value and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def assert_all_end(session: int) -> None:
    until = time.monotonic() + 10.0
    while alive(session) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(session)
