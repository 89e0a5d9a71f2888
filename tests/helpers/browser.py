"""A headless Chromium that opens pages, driven through the Chrome DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import websocket

from tests.helpers.waiting import wait_until

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new", "--remote-debugging-port=0", "--no-first-run", "--disable-gpu",
    "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking",
    "--disable-component-update", "--hide-scrollbars", "--mute-audio",
)  # fmt: skip
ANSWER_S = 60
"""Longest wait for one answer of the browser on a busy machine."""


class Page:
    """One page of the browser."""

    def __init__(self, connection: websocket.WebSocket) -> None:
        self._connection = connection
        self._calls = 0
        self._call("Page.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        self._connection.send(json.dumps(message))
        while True:
            answer = json.loads(self._connection.recv())
            if answer.get("id") == self._calls:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def send_headers(self, headers: Mapping[str, str]) -> None:
        """Add headers to all requests of the page from now on."""
        self._call("Network.enable")
        self._call("Network.setExtraHTTPHeaders", headers=dict(headers))

    def size(self, width: int, height: int) -> None:
        """Set the visible part of the page, in pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, address: str) -> None:
        """Open an address in place of what is there."""
        # Pages that differ only in what follows # would otherwise be kept.
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)

    def ask(self, script: str) -> Any:
        """The value of an expression in JavaScript."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    @property
    def text(self) -> str:
        """What a reader sees of the page, without pictures and with ordinary spaces."""
        return self.ask("document.body ? document.body.innerText : ''").replace("\u00a0", " ")

    def count(self, selector: str) -> int:
        """How many visible elements a CSS selector finds."""
        return self.ask(
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            ".filter(one => one.getClientRects().length > 0).length"
        )

    def wait_for_text(self, *texts: str, limit_s: float = 60) -> None:
        """Wait until all these texts are to be seen."""

        def told() -> str:
            missing = [text for text in texts if text not in self.text]
            return f"{missing} cannot be seen in {self.text}"

        wait_until(
            lambda: all(text in self.text for text in texts), limit_s, every_s=0.1, told=told
        )

    def wait_for(self, selector: str, at_least: int = 1, limit_s: float = 60) -> None:
        """Wait until a CSS selector finds enough visible elements."""
        wait_until(
            lambda: self.count(selector) >= at_least,
            limit_s,
            every_s=0.1,
            told=lambda: f"{self.count(selector)} of {selector} in {self.text}",
        )

    def click(self, script: str) -> None:
        """Click the element that an expression in JavaScript gives."""
        self.ask(f"{script}.scrollIntoView({{block: 'center'}})")
        box = self.ask(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
            f"({script}.getBoundingClientRect())"
        )
        place = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        self._call("Input.dispatchMouseEvent", type="mousePressed", **place)
        self._call("Input.dispatchMouseEvent", type="mouseReleased", **place)

    def wait_until_still(self, limit_s: float = 60) -> None:
        """Wait until the visible part looks the same for a second."""
        seen: list[bytes] = []

        def is_still() -> bool:
            seen.append(self.picture())
            return len(seen) > 1 and seen[-1] == seen[-2]

        wait_until(is_still, limit_s, every_s=1.0)

    def picture(self, box: tuple[float, float, float, float] | None = None) -> bytes:
        """A PNG of the visible part, or of x, y, width and height within it."""
        parameters: dict[str, Any] = {}
        if box is not None:
            x, y, width, height = box
            parameters["clip"] = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        return base64.b64decode(self._call("Page.captureScreenshot", **parameters)["data"])


@contextmanager
def page(folder: Path, *loopback: str) -> Iterator[Page]:
    """A page of a new browser.

    Args:
        folder: where the browser keeps its files.
        loopback: names of hosts that it takes for loopback.
    """
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("chromium is not here; install the Debian package chromium to run this test")
    # Chromium has no sandbox for root.
    options = [*OPTIONS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    if loopback:
        rules = ",".join(f"MAP {name} 127.0.0.1" for name in loopback)
        options.append(f"--host-resolver-rules={rules}")
    log, told = folder / "chromium.log", folder / "profile" / "DevToolsActivePort"
    browser = subprocess.Popen(
        [program, *options, f"--user-data-dir={folder / 'profile'}", "about:blank"],
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(
            lambda: told.exists() and "\n" in told.read_text(), told=lambda: log.read_text()[-3000:]
        )
        port = int(told.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            found = next(one for one in json.load(answer) if one["type"] == "page")
        connection = websocket.create_connection(
            found["webSocketDebuggerUrl"], timeout=ANSWER_S, suppress_origin=True
        )
        with closing(connection):
            yield Page(connection)
    finally:
        browser.terminate()
        browser.wait(30)
