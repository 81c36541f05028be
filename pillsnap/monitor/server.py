"""The web monitor: a static page, and a WebSocket that sends it the state of a run.

    events.jsonl --> RunHub (one per run with viewers) --> Viewer (one per connection) --> browser

Send-only: clients cannot change anything, and nothing is written to the run directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from pillsnap.errors import UserError
from pillsnap.monitor.access import AccessRules, check_bind
from pillsnap.monitor.hub import RunHub, Viewer, list_runs
from pillsnap.observe import telemetry

DEFAULT_PORT = 8888
MAX_VIEWERS = 256
# A connection that accepts no data for this long is closed.
SEND_TIMEOUT_S = 20.0
HEARTBEAT_S = 20.0
CATCH_UP_INTERVAL_S = 1.0
MACHINE_INTERVAL_S = 5.0

STATIC_DIR = Path(__file__).parent / "static"
_STATIC_FILES = {
    "/": "index.html",
    "/app.js": "app.js",
    "/chart.js": "chart.js",
    "/words.js": "words.js",
    "/style.css": "style.css",
}
_PLAIN_HOST = re.compile(r"[\w.:\[\]-]+", re.ASCII)
_log = logging.getLogger(__name__)


def serve(
    run_dir: Path, host: str = "127.0.0.1", port: int = DEFAULT_PORT, token: str | None = None, public_url: str = ""
) -> None:
    """Serve the monitor of `run_dir` and its sibling runs until Ctrl-C or SIGTERM. `public_url` is its address at a
    reverse proxy.

    UserError when there is no such directory, the port is in use, or `host` needs a token.
    """
    app = make_app(run_dir, host, token, public_url)
    shown = public_url or f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    print(f"monitor of {run_dir}: {shown}{'?token=…' if token else ''}  (Ctrl-C to stop)", flush=True)
    try:
        web.run_app(app, host=host, port=port, print=lambda *_: None, access_log=None, shutdown_timeout=2)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another port with --port"
        ) from error


def make_app(run_dir: Path, host: str = "127.0.0.1", token: str | None = None, public_url: str = "") -> web.Application:
    """The application, for `serve` and for tests. UserError as for `serve`."""
    check_bind(host, token, public_url)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory: pass a run directory with --run, such as artifacts/demo")
    monitor = _Monitor(run_dir.resolve(), AccessRules(host, token, public_url))
    app = web.Application(middlewares=[_secure_headers])
    app[MONITOR] = monitor
    for path in _STATIC_FILES:
        app.router.add_get(path, monitor.static)
    app.router.add_get("/ws", monitor.websocket)
    app.router.add_get("/picture", monitor.picture)
    app.cleanup_ctx.append(monitor.running)
    app.on_shutdown.append(monitor.close_viewers)
    return app


class _Monitor:
    def __init__(self, run_dir: Path, rules: AccessRules) -> None:
        self.run_dir = run_dir
        self.rules = rules
        self.hubs: dict[str, RunHub] = {}
        self.followers: dict[str, asyncio.Task[None]] = {}
        self.sockets: set[web.WebSocketResponse] = set()
        self.machine: dict[str, Any] = {}

    async def static(self, request: web.Request) -> web.FileResponse:
        self.rules.check(request, needs_token=request.path == "/")
        return web.FileResponse(STATIC_DIR / _STATIC_FILES[request.path])

    async def picture(self, request: web.Request) -> web.FileResponse:
        self.rules.check(request)
        hub = self.hubs.get(request.query.get("run", ""))
        path = hub.picture_path(request.query.get("task", "")) if hub is not None else None
        if path is None:
            raise web.HTTPNotFound(text="no picture")
        return web.FileResponse(path)

    async def websocket(self, request: web.Request) -> web.WebSocketResponse:
        self.rules.check(request)
        if len(self.sockets) >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text="too many viewers")
        name = request.query.get("run") or self.run_dir.name
        if name != self.run_dir.name and name not in {run["name"] for run in list_runs(self.run_dir.parent)}:
            raise web.HTTPNotFound(text="no such run")
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=1024, compress=False)
        await socket.prepare(request)
        if not isinstance(request.transport, asyncio.WriteTransport):
            return socket  # the client has disconnected
        self.sockets.add(socket)
        hub, viewer = self._hub(name), Viewer(request.transport)
        hub.viewers.add(viewer)
        sender = asyncio.create_task(self._send(request.transport, socket, hub, viewer))
        try:
            async for message in socket:
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    hub.viewers.discard(viewer)  # no data after the close frame
                    await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"this socket is send-only")
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            hub.viewers.discard(viewer)
            self.sockets.discard(socket)
            self._drop_idle(name)
        return socket

    async def _send(
        self, connection: asyncio.WriteTransport, socket: web.WebSocketResponse, hub: RunHub, viewer: Viewer
    ) -> None:
        """Send a snapshot at first and whenever the viewer was behind; the hub sends the updates."""
        await hub.ready.wait()
        await socket.send_json({"type": "hello", "run": hub.run_dir.name, **self._context()})
        while True:
            await viewer.behind.wait()
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    while not viewer.has_caught_up():
                        await asyncio.sleep(CATCH_UP_INTERVAL_S)
                    snapshot = hub.snapshot()
                    viewer.begin(snapshot)
                    await socket.send_str(snapshot)
            except (TimeoutError, ConnectionError):
                # A closing handshake would wait for the unresponsive client.
                connection.abort()
                return

    def _context(self) -> dict[str, Any]:
        return {"now": time.time(), "runs": list_runs(self.run_dir.parent), "machine": self.machine}

    def _hub(self, name: str) -> RunHub:
        if name not in self.hubs:
            hub = RunHub(self.run_dir.parent / name)
            self.hubs[name] = hub
            self.followers[name] = asyncio.create_task(hub.follow())
            self.followers[name].add_done_callback(_log_failure)
        return self.hubs[name]

    def _drop_idle(self, name: str) -> None:
        """Free the state of a run without viewers."""
        if name in self.hubs and not self.hubs[name].viewers:
            del self.hubs[name]
            self.followers.pop(name).cancel()

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """Samples this machine's telemetry while the application runs."""
        task = asyncio.create_task(self._sample_machine())
        yield
        tasks = [task, *self.followers.values()]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample_machine(self) -> None:
        while True:
            self.machine = await asyncio.to_thread(telemetry.sample, self.run_dir)
            for hub in self.hubs.values():
                hub.broadcast({"type": "context", **self._context()})
            await asyncio.sleep(MACHINE_INTERVAL_S)

    async def close_viewers(self, _: web.Application) -> None:
        for socket in list(self.sockets):
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(0.2):
                    await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the monitor was stopped")


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("following a run failed", exc_info=task.exception())


MONITOR = web.AppKey("monitor", _Monitor)


@web.middleware
async def _secure_headers(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        error.headers.update(_headers(request))
        raise
    if not response.prepared:
        response.headers.update(_headers(request))
    return response


def _headers(request: web.Request) -> dict[str, str]:
    host = request.app[MONITOR].rules.public_netloc or request.headers.get("Host", "")
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        f"connect-src 'self' ws://{host} wss://{host}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return {
        "Content-Security-Policy": policy if _PLAIN_HOST.fullmatch(host) else "default-src 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
