"""WebSocket clients and a terminal for `benchmarks.watching`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import socket
import subprocess
import threading
import time

NUM_CLIENTS = 100
PING, PONG = 9, b"\x8a\x80\0\0\0\0"
"""Opcode of a ping; frame of an empty pong from a client."""


def start_in_terminal(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a program in a terminal of 140 x 45 whose output is read."""
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
    """Half of the clients read and answer pings, half never read; all reconnect after a disconnect.

    They stand for other machines, so their own cost is kept small: all wake together, once per second.
    """
    os.nice(19)
    host, _, port = url.removeprefix("ws://").removesuffix("/ws").partition(":")
    readers = [Reader(host, int(port)) for _ in range(NUM_CLIENTS // 2)]
    deaf = asyncio.gather(*(run_deaf(host, int(port)) for _ in range(NUM_CLIENTS // 2)))
    while not deaf.done():
        for reader in readers:
            reader.read()
        await asyncio.sleep(1)


class Reader:
    """Reads WebSocket frames (RFC 6455), answers pings, and reconnects."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._connection: socket.socket | None = None

    def read(self) -> None:
        """Read the received data."""
        try:
            if self._connection is None:
                self._connect()
                return
            while data := self._connection.recv(1 << 16):
                self._take(data)
            self._connection = None  # closed by the server
        except BlockingIOError:
            return
        except OSError:
            self._connection = None

    def _connect(self) -> None:
        self._answered, self._rest, self._skip = False, b"", 0
        connection = socket.create_connection(self._address, 5)
        connection.sendall(_handshake(*self._address))
        connection.setblocking(False)
        self._connection = connection

    def _take(self, data: bytes) -> None:
        assert self._connection is not None
        data = self._rest + data
        begin = self._skip
        if not self._answered:
            begin = data.find(b"\r\n\r\n") + 4
            self._answered = begin > 3
        while self._answered and len(data) - begin >= 2:
            size, length_bytes = data[begin + 1] & 127, 0
            if size > 125:
                length_bytes = 2 if size == 126 else 8
                if len(data) - begin < 2 + length_bytes:
                    break
                size = int.from_bytes(data[begin + 2 : begin + 2 + length_bytes], "big")
            if data[begin] & 15 == PING:
                self._connection.sendall(PONG)
            begin += 2 + length_bytes + size
        if not self._answered:
            begin = 0
        self._rest, self._skip = data[begin:], max(0, begin - len(data))


def _handshake(host: str, port: int) -> bytes:
    return (
        f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


async def run_deaf(host: str, port: int) -> None:
    """Connect without reading; reconnect when the connection is closed."""
    while True:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            connection.connect((host, port))
            connection.sendall(_handshake(host, port))
            while connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01":  # established
                await asyncio.sleep(5)
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
