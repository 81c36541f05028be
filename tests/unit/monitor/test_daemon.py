"""The background monitor starts, answers, and ends; the pid file never names somebody else's process."""

from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from pillsnap.errors import UserError
from pillsnap.monitor import daemon


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_start_answers_and_stop_ends_it(tmp_path: Path) -> None:
    port = free_port()
    pid = daemon.start(tmp_path, port, token="let me in")
    try:
        process = psutil.Process(pid)
        assert "let me in" not in " ".join(process.cmdline())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/?token=let%20me%20in") as answer:
            assert b"<title>PillSnap</title>" in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
        with pytest.raises(UserError, match="runs already"):
            daemon.start(tmp_path, port)
        assert "monitor of" in (tmp_path / "monitor.log").read_text()
    finally:
        assert daemon.stop(tmp_path) == pid
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "monitor.pid").exists()
    with pytest.raises(UserError, match="no monitor"):
        daemon.stop(tmp_path)


def test_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1"):
            daemon.start(tmp_path, other.getsockname()[1])
    assert not (tmp_path / "monitor.pid").exists()


def test_pid_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    me = psutil.Process()
    (tmp_path / "monitor.pid").write_text(json.dumps({"pid": os.getpid(), "create_time": me.create_time() - 60}))
    with pytest.raises(UserError, match="no monitor"):
        daemon.stop(tmp_path)
    assert me.is_running()


def test_open_address_without_a_token_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="token"):
        daemon.start(tmp_path, free_port(), host="0.0.0.0")
    assert list(tmp_path.iterdir()) == []
