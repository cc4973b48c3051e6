"""A visit to the page in a browser: what it asks for, says, sends and plots. Runs in .venv-compat."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


class Visit:
    """A page, with all that it asked for, said, and sent over sockets."""

    def __init__(self, browser: Browser, url: str, *, width: int = 1280, bypass_csp: bool = False, **more: str) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            bypass_csp=bypass_csp,
            accept_downloads=True,
            reduced_motion="reduce",  # or what is pointed at would still be moving
            **more,
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.said: list[str] = []
        self.hosts: set[str] = set()
        self.sent: list[dict] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("websocket", self._watch)
        self.page.goto(url)
        self.page.wait_for_selector("#start:enabled")

    def _watch(self, socket) -> None:
        self.hosts.add(urlsplit(socket.url).netloc)
        socket.on("framesent", lambda payload: self.sent.append(json.loads(payload)))

    def choose(self, model: str) -> None:
        self.page.select_option("#try-model", model)
        self.page.wait_for_selector("#start:enabled")

    def source(self, name: str) -> None:
        self.page.locator(f'[name="source"][value="{name}"]').check(force=True)

    def fast(self) -> None:
        self.page.locator("#rate").fill("61")

    def run(self) -> None:
        """Start, and wait for the end."""
        self.page.click("#start")
        self.ended()

    def ended(self) -> None:
        self.page.wait_for_selector("#stop:disabled")
        self.page.wait_for_selector("#start:enabled")

    @property
    def error(self) -> str:
        return self.page.inner_text("#try-error")

    def plotted(self, chart: str = "#output-chart") -> dict[str, list[float]]:
        """Values of the lines that are drawn, read off their paths."""
        root = self.page.locator(f"{chart} svg")
        low, high = (float(root.get_attribute(f"data-{name}")) for name in ("low", "high"))
        height = float(root.get_attribute("viewBox").split()[3])
        top, bottom = 10.0, height - 24.0
        lines = {}
        for line in root.locator("path.line").all():
            points = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", line.get_attribute("d") or "")
            lines[line.get_attribute("data-name")] = [
                low + (bottom - float(y)) / (bottom - top) * (high - low) for _, y in points
            ]
        return lines

    def downloaded(self) -> str:
        with self.page.expect_download() as download:
            self.page.click("#download")
        return Path(download.value.path()).read_text()

    def rows_sent(self, width: int) -> list[list[float]]:
        """Rows of float32 that went over the socket."""
        rows = []
        for message in self.sent:
            for tensor in message.get("frame", {}).get("tensors", ()):
                data = base64.b64decode(tensor["data"])
                numbers = struct.unpack(f"<{len(data) // 4}f", data)
                rows += [list(numbers[at : at + width]) for at in range(0, len(numbers), width)]
        return rows

    def result(self, *, width: int = 12, **more: object) -> dict:
        return {
            "plotted": self.plotted(),
            "csv": self.downloaded(),
            "sent": self.rows_sent(width),
            "leading": self.page.inner_text("#leading"),
            "steps": self.page.inner_text("#fact-steps"),
            "error": self.error,
            **more,
        }
