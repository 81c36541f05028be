"""The surroundings of watched runs for `benchmarks.watching`: viewers over WebSocket, and a terminal that is read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import socket
import subprocess
import threading
import time
from typing import Any

NUM_CLIENTS = 100


def start_in_terminal(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a program on a terminal of 140 x 45 that somebody reads."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "45"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)

    def read() -> None:
        with contextlib.suppress(OSError):
            while os.read(ours, 1 << 16):
                pass

    threading.Thread(target=read, daemon=True).start()
    return process


async def run_clients(url: str) -> None:
    """Half read and answer pings, half open a connection and leave it; all come back when they are cut off."""
    import aiohttp

    os.nice(19)  # they stand for other machines
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        readers = [reader(session, url) for _ in range(NUM_CLIENTS // 2)]
        await asyncio.gather(*readers, *(deaf(url) for _ in range(NUM_CLIENTS // 2)))


async def reader(session: Any, url: str) -> None:
    import aiohttp

    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.ws_connect(url, max_msg_size=0) as connection:
                async for _ in connection:
                    pass
        await asyncio.sleep(1)


async def deaf(url: str) -> None:
    """Never reads; notices only that the other side has cut the connection."""
    host, _, port = url.removeprefix("ws://").removesuffix("/ws").partition(":")
    while True:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            connection.connect((host, int(port)))
            connection.sendall(
                f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            while connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01":  # established
                await asyncio.sleep(1)
        connection.close()
        await asyncio.sleep(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int) -> None:
    end_s = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < end_s, "the web monitor does not listen"
        time.sleep(0.1)
