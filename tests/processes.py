"""Whether processes have ended."""

import time
from pathlib import Path


def alive(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def assert_all_end(session: int) -> None:
    until = time.monotonic() + 10.0
    while alive(session) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(session)
