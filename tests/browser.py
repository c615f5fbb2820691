"""Headless Chromium over its debugging pipe, for tests of pages: no driver package, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
"""Its program, or None where there is none."""
WORDS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip


class Tab:
    """One page: what is asked of it, and what it said and asked for by itself."""

    def __init__(self, write: Any, read: Any) -> None:
        self._write, self._read, self._number, self._session = write, read, 0, ""
        self.heard: list[dict[str, Any]] = []

    def ask(self, method: str, **params: Any) -> Any:
        """What Chromium answers to a command of the DevTools protocol. Raises AssertionError when it is an error."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if "id" in answer and answer["id"] == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, page: Path) -> None:
        """Opens a file and waits until it is loaded; what it does from then on is heard."""
        if not self._session:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
        self.heard.clear()
        self.ask("Page.navigate", url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.heard):
            self._next()

    def look(self, width: int, scheme: str = "light", media: str = "", height: int = 800) -> None:
        """Makes the window so wide, in CSS pixels, and the reader's preference `light` or `dark`."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page, as JSON has it."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"] if "value" in answer["result"] else None

    def picture(self, target: Path, whole: bool = True) -> None:
        """Writes a PNG of the page, or of its first screen."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])

    def complaints(self) -> list[str]:
        """What the console and the log of the page say."""
        return [json.dumps(event) for event in self.heard if event["method"] in SPOKEN]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself included."""
        sent = [event for event in self.heard if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "Chromium ended"
            text += byte
        answer: dict[str, Any] = json.loads(text)
        if "method" in answer:
            self.heard.append(answer)
        return answer


SPOKEN = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """A tab of a fresh Chromium with its profile in an empty folder; it ends with the block."""
    assert CHROMIUM
    to_read, we_write = os.pipe()
    we_read, to_write = os.pipe()
    line = 'exec "$0" "$@" 3<&' + str(to_read) + " 4>&" + str(to_write)  # the fixed numbers of its pipe
    words = ["bash", "-c", line, CHROMIUM, *WORDS, f"--user-data-dir={profile}", "about:blank"]
    with (profile / "chromium.log").open("wb") as log:
        process = subprocess.Popen(words, pass_fds=(to_read, to_write), stdout=log, stderr=log)
    os.close(to_read)
    os.close(to_write)
    with os.fdopen(we_write, "wb") as write, os.fdopen(we_read, "rb") as read:
        tab = Tab(write, read)
        try:
            yield tab
        finally:
            process.terminate()
            process.wait(20)
