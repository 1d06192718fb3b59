"""Plugins of strangers and the command line: those that end their process, block, or write to stdout."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import assert_all_end
from strangers import Entry, plugin, write_distribution

from iql_plugins import plugins
from iql_plugins.cli import main, output
from iql_plugins.hookspecs import Command

Check = Callable[..., tuple[int, dict[str, Any]]]

NOISE = """
import ctypes, os, subprocess, sys
def noise(where):
    print(f"print, {where}", flush=True)
    sys.__stdout__.write(f"stream, {where}\\n")
    os.write(1, f"descriptor, {where}\\n".encode())
    subprocess.run(["echo", f"child, {where}"])
    ctypes.CDLL(None).puts(f"C, {where}".encode())
    ctypes.CDLL(None).fflush(None)
"""
#: Everything that a plugin can do wrong with stdout, wherever it is asked.
NOISY = f"""{NOISE}
import atexit
from iql_plugins.hookspecs import hookimpl
noise("import")
atexit.register(noise, "exit")
@hookimpl
def iql_commands():
    noise("commands")
    return []
@hookimpl
def iql_read_dataset(source):
    noise("read")
"""
WAYS = ("print", "stream", "descriptor", "child", "C")


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Check:
    """Checks plugins of this code and no others; the status, and what is said of each."""
    monkeypatch.syspath_prepend(tmp_path)

    def call(codes: dict[str, str], *options: str) -> tuple[int, dict[str, Any]]:
        for name, code in codes.items():
            write_distribution(tmp_path, name, code)
        monkeypatch.setenv(plugins.ALLOW_VARIABLE, ",".join(codes))
        plugins.host.cache_clear()
        capfd.readouterr()
        status = main(["adapters", "--check", "--json", *options])
        return status, {entry["name"]: entry for entry in json.loads(capfd.readouterr().out)["adapters"]}

    return call


def test_a_check_says_what_the_import_of_each_plugin_does(
    check: Check, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert check({"good": ""})[0] == 0
    status, entries = check(
        {
            "asks": "input()",
            "ends": "import os; os._exit(0)",
            "exits": "import os; os._exit(7)",
            "quits": "import sys; sys.exit(3)",
            "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "late": "import atexit, os; atexit.register(os._exit, 4)",
            "noisy": NOISY,
            "raises": "print('before'); raise ValueError('bad')",
            "quiet": "import sys; print('to stderr', file=sys.stderr)",
        }
    )
    assert status == 1
    of = "plugin {0!r} of stranger-{0} 1.0 (stranger_{0}) cannot be imported: "
    expected = {
        "asks": ("error", of.format("asks") + "EOFError: EOF when reading a line"),
        "ends": ("exited", "ended its process: exited with status 0"),
        "exits": ("exited", "ended its process: exited with status 7"),
        "quits": ("error", of.format("quits") + "SystemExit: 3"),
        "crashes": ("exited", "ended its process: SIGSEGV"),
        "late": ("exited", "ended its process: exited with status 4"),
        "noisy": ("stdout", "wrote to stdout: 'print, import'"),
        "raises": ("error", of.format("raises") + "ValueError: bad"),
        "quiet": ("fine", "fine"),
    }
    assert {name: (entry["check"]["outcome"], entry["check"]["message"]) for name, entry in entries.items()} == expected
    for name, entry in entries.items():
        assert entry["error"] == (expected[name][1] if expected[name][0] == "error" else None)
    monkeypatch.setenv(plugins.ALLOW_VARIABLE, "exits,good,noisy")
    plugins.host.cache_clear()
    assert main(["adapters", "--check"]) == 1
    told = capfd.readouterr().out.splitlines()
    assert [line.split()[-1] for line in told if "stranger-" in line] == ["exited", "fine", "stdout"]
    assert told[-2:] == [f"{name}: {expected[name][1]}" for name in ("exits", "noisy")]


def test_a_plugin_that_hangs_is_ended_with_what_it_started(check: Check, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""
import os, pathlib, subprocess, time
subprocess.Popen(["sleep", "1000"])
pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
time.sleep(1000)
"""
    # However slow the machine is, the import has begun in one of these.
    for index, timeout in enumerate((1, 10, 100)):
        status, entries = check({f"hangs{index}": code}, "--timeout", str(timeout))
        assert (status, entries[f"hangs{index}"]["check"]) == (
            1,
            {"outcome": "hung", "message": f"hung: it was not imported after {timeout} seconds"},
        )
        if pid.exists():
            break
    assert_all_end(int(pid.read_text()))


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_check_takes_some_time(timeout: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "--check", "--timeout", timeout]) == 2
    assert "--timeout must be a positive number of seconds, got" in capfd.readouterr().err


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, plugins.ALLOW_VARIABLE: "tensor,noisy"}
    # Streams have their buffers, as they have for users.
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-m", "iql_plugins.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("adapters", "--json"), ["import", "exit"]),
        (("inspect", "noisy://data", "--json"), ["import", "read", "exit"]),
        (("nonsense", "--json"), ["import", "commands", "exit"]),
        # At exit the result has been printed.
        (("adapters",), ["import"]),
    ],
)
def test_what_plugins_write_to_stdout_is_no_result(
    arguments: Sequence[str], asked: Sequence[str], tmp_path: Path
) -> None:
    write_distribution(tmp_path, "noisy", NOISY)
    finished = run(tmp_path, *arguments)
    for where in asked:
        for way in WAYS:
            assert f"{way}, {where}" in finished.stderr.splitlines()
            assert f"{way}, {where}" not in finished.stdout
    if "--json" in arguments:
        assert json.loads(finished.stdout)
        assert finished.stdout.count("\n") == 1
    else:
        assert "stranger-noisy 1.0" in finished.stdout


def test_a_plugins_own_command_may_end_by_itself(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def end(arguments: Sequence[str]) -> None:
        sys.exit(int(arguments[0]))

    strange = Entry("x", lambda: plugin("x", iql_commands=lambda: [Command("end", "", end)]))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [strange])
    for code, document in ((2, {"error": "end ended with exit status 2"}), (0, {})):
        with pytest.raises(SystemExit, match=str(code)):
            main(["end", str(code), "--json"])
        assert json.loads(capfd.readouterr().out) == document


def test_people_are_told_which_plugin_they_wait_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told = threading.Event()

    def note(text: str, note: Callable[[str], None] = output.note) -> None:
        note(text)
        told.set()

    monkeypatch.setattr(output, "note", note)
    monkeypatch.setattr(output, "PATIENCE", 0.01)
    slow = Entry("slow", lambda: told.wait(60.0) and plugin("slow"))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [slow])
    assert main(["adapters", "--json"]) == 0
    captured = capfd.readouterr()
    assert captured.err == "loading plugin 'slow' of iql-slow (slow.plugin)\n"
    assert json.loads(captured.out)["adapters"][0]["error"] is None


def test_nothing_is_said_of_a_plugin_that_is_quick_or_loaded_by_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "PATIENCE", 60.0)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [Entry("quick", lambda: plugin("quick"))])
    before = plugins.host().loading
    assert main(["adapters", "--json"]) == 0
    assert capfd.readouterr().err == ""
    assert plugins.host().loading is before
