"""Headless Chromium for tests of the web monitor, controlled over the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class Page:
    """A tab: evaluates JavaScript, waits for conditions, takes screenshots."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.ids = itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.ids)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = await self.socket.receive_json(timeout=60)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    async def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        phone = width < 500
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.call("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait_for(self, expression: str, timeout_s: float = 30) -> float:
        """Wait until the JavaScript expression is true; returns the seconds waited."""
        begin_s = time.monotonic()
        while not await self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() - begin_s < timeout_s, f"never true: {expression}"
        return time.monotonic() - begin_s

    async def screenshot(self, path: Path) -> None:
        """Save a screenshot of the whole page."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """DevTools address of a running Chromium; skips without Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium")
    profile = tmp_path_factory.mktemp("chromium")
    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    port_file = profile / "DevToolsActivePort"
    end_s = time.monotonic() + 180  # a few seconds on an idle machine
    while not (port_file.exists() and port_file.read_text().count("\n")):
        assert process.poll() is None and time.monotonic() < end_s, "Chromium did not start"
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
    process.kill()
    process.wait()


@pytest.fixture
def open_page(chromium: str) -> Callable[[], AbstractAsyncContextManager[Page]]:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Page]:
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{chromium}/json/new?about:blank") as answer:
                tab = await answer.json()
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
            async with session.get(f"{chromium}/json/close/{tab['id']}") as answer:
                await answer.read()

    return opened


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Folder for screenshots to review: artifacts/screenshots."""
    folder = Path(__file__).resolve().parents[3] / "artifacts" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
