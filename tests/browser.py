"""Chromium without a window, asked through a pipe by its own protocol, of which no package is needed."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: What distributions call it.
NAMES = ("chromium", "chromium-browser", "google-chrome")
#: A browser that is asked something has so long to answer, on a machine that has other things to do as well.
SECONDS = 120.0


def chromium() -> str | None:
    """The program, if it is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """The one page of a browser.

    Args:
        send: the end of a pipe that the browser reads from.
        receive: the end of another one, that it writes to.
    """

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._numbers, self._read = send, receive, itertools.count(1), b""
        self._session: str | None = None
        #: What the browser has told of itself.
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, path: Path, *, width: int, height: int = 800, dark: bool = False, media: str = "screen") -> None:
        """Loads a file at a width in pixels, and waits until it is there."""
        self.events.clear()
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def named(self) -> list[tuple[str, str]]:
        """Role and name of all that assistive technology is told of."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
        ]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the page was opened."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the browser's console says: errors, and what a policy of the page has blocked."""
        entries = [event["params"]["entry"]["text"] for event in self.events if event.get("method") == "Log.entryAdded"]
        return entries + [str(event) for event in self.events if event.get("method") == "Runtime.exceptionThrown"]

    def picture(self, path: Path) -> Path:
        """A picture of the whole page."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def printed(self) -> bytes:
        """The page as a PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def _message(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._receive], [], [], max(until - time.monotonic(), 0.0))
            assert ready, f"the browser has not answered in {SECONDS:g} seconds"
            chunk = os.read(self._receive, 2**16)
            assert chunk, "the browser has ended"
            self._read += chunk
        text, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


def _high(descriptor: int) -> int:
    """The same with another number, of 10 or more."""
    # Windows has none.
    import fcntl

    with os.fdopen(descriptor):
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)


@contextlib.contextmanager
def browser(program: str) -> Iterator[Page]:
    """A browser's page; the browser ends with the context."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        # The browser reads from its descriptor 3 and writes to its 4; ours must be none of these.
        theirs_in, ours_out, ours_in, theirs_out = (_high(end) for pair in (os.pipe(), os.pipe()) for end in pair)
        for end in (ours_out, ours_in):
            stack.callback(os.close, end)
        options = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"]
        # Containers have no namespaces to put pages into, and these are of our own making.
        options.append("--no-sandbox")
        silent = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
        pipes = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        process = os.posix_spawn(program, [program, *options], os.environ, file_actions=[*pipes, silent], setpgroup=0)
        for end in (theirs_in, theirs_out):
            os.close(end)
        try:
            yield Page(ours_out, ours_in)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
