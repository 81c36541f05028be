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

NUM_CLIENTS = 100
PING, PONG = 9, b"\x8a\x80\0\0\0\0"
"""A ping's opcode; a client's answer to one without content."""


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
    os.nice(19)  # they stand for other machines
    host, _, port = url.removeprefix("ws://").removesuffix("/ws").partition(":")
    readers = [reader(host, int(port)) for _ in range(NUM_CLIENTS // 2)]
    await asyncio.gather(*readers, *(deaf(host, int(port)) for _ in range(NUM_CLIENTS // 2)))


async def reader(host: str, port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            _, protocol = await asyncio.get_running_loop().create_connection(
                lambda: _Reader(_handshake(host, port)), host, port
            )
            await protocol.lost.wait()
        await asyncio.sleep(1)


class _Reader(asyncio.Protocol):
    """Takes WebSocket frames (RFC 6455) and answers pings: a client that costs this machine as little as can be."""

    def __init__(self, handshake: bytes) -> None:
        self.lost = asyncio.Event()
        self._handshake, self._answered, self._rest, self._skip = handshake, False, b"", 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._handshake)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    def data_received(self, data: bytes) -> None:
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
                self._transport.write(PONG)
            begin += 2 + length_bytes + size
        if not self._answered:
            begin = 0
        self._rest, self._skip = data[begin:], max(0, begin - len(data))


def _handshake(host: str, port: int) -> bytes:
    return (
        f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


async def deaf(host: str, port: int) -> None:
    """Never reads; notices only that the other side has cut the connection."""
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
