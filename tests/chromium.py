"""A headless Chromium, driven through its DevTools pipe: no driver and no socket is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import select
import subprocess
import time
from collections.abc import Iterator
from typing import Any

PATHS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run",
    "--hide-scrollbars", "--disable-background-networking", "--enable-unsafe-swiftshader",
)  # fmt: skip
DRAWN = "document.documentElement?.dataset.drawn ?? document.documentElement?.dataset.failed ?? ''"


def found() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for path in PATHS if pathlib.Path(path).exists()), None)


class Tab:
    """One page. `events` has all that DevTools reported."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._in, self._out, self._left = read_fd, write_fd, b""
        self._count = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of DevTools and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (answer := self._next()).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _next(self, timeout_s: float = 120) -> dict[str, Any]:
        while b"\0" not in self._left:
            if not select.select([self._in], [], [], timeout_s)[0]:
                raise TimeoutError("Chromium does not answer")
            if not (data := os.read(self._in, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(message))

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Sets the size of the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def open(self, path: pathlib.Path, timeout_s: float = 90) -> None:
        """Opens a page of report.py and waits until it is drawn."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + timeout_s
        while not self.value(DRAWN):
            if time.monotonic() > until:
                raise TimeoutError(f"{path} is not drawn")
            time.sleep(0.1)

    def screenshot(self, path: pathlib.Path, *, full: bool = False) -> None:
        """Writes a PNG, `full`: of the entire page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(
            self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"]
        )

    def complaints(self) -> list[str]:
        """Exceptions, and errors and warnings of the console; a graphics driver's warnings are none."""
        out = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                out.append(str(params["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
                out.append(str(params["entry"]))
            elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
                "error",
                "warning",
                "assert",
            ):
                out.append(str(params["args"]))
        return out

    def requests(self) -> list[str]:
        """URLs that the page asked for, its own and those inside it left out."""
        sent = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in sent[1:] if not url.startswith(("data:", "blob:"))]


@contextlib.contextmanager
def tab(profile: pathlib.Path) -> Iterator[Tab]:
    """Starts a browser with a profile in a directory, and ends it."""
    browser = found()
    assert browser is not None
    to_browser, write_fd = os.pipe()
    read_fd, from_browser = os.pipe()

    command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", browser, *FLAGS]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}"], pass_fds=(to_browser, from_browser),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Tab(read_fd, write_fd)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(read_fd)
        os.close(write_fd)
