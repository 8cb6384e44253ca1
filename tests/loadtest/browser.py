"""Headless Chromium over its DevTools protocol: opens a file at phone width and says what it finds."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_WAIT_S = 60.0
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_NOISE = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


class Page:
    """One tab. `complaints` are messages of its console, `asked` the addresses that it wanted."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._events: list[str] = []
        self.complaints: list[dict[str, Any]] = []
        self.asked: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            told = await self._next()
            if told.get("id") == number:
                assert "error" not in told, told
                result: dict[str, Any] = told["result"]
                return result

    async def wait_for(self, event: str) -> None:
        """Until the event was told once since the page was opened."""
        while event not in self._events:
            await self._next()

    async def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def _next(self) -> dict[str, Any]:
        told: dict[str, Any] = await self._socket.receive_json(timeout=_WAIT_S)
        method = told.get("method", "")
        self._events.append(method)
        if method in _NOISE:
            self.complaints.append(told["params"])
        if method == "Network.requestWillBeSent":
            self.asked.append(told["params"]["request"]["url"])
        return told


async def look(file: Path, expressions: dict[str, str], width: int) -> tuple[Page, dict[str, Any]]:
    """Opens `file` in a window `width` pixels wide; the values of JavaScript expressions there."""
    assert EXECUTABLE is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = (*_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank")
        process = await asyncio.create_subprocess_exec(
            EXECUTABLE, *arguments, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            port = await asyncio.wait_for(_port(Path(folder)), _WAIT_S)
            async with aiohttp.ClientSession() as http:
                async with http.get(f"http://127.0.0.1:{port}/json") as answer:
                    tabs = await answer.json()
                address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with http.ws_connect(address, max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log", "Network"):
                        await page.call(f"{domain}.enable")
                    size = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": True}
                    await page.call("Emulation.setDeviceMetricsOverride", **size)
                    await page.call("Page.navigate", url=file.as_uri())
                    await page.wait_for("Page.loadEventFired")
                    return page, {name: await page.evaluate(of) for name, of in expressions.items()}
        finally:
            process.terminate()
            await process.wait()


async def _port(folder: Path) -> int:
    """Chromium writes it down once it listens."""
    file = folder / "DevToolsActivePort"
    while True:
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        await asyncio.sleep(0.05)
