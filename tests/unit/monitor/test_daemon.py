"""The background monitor starts, serves and stops; a reused process id in the pid file is detected."""

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


def test_start_serves_and_stop_ends(tmp_path: Path) -> None:
    port = free_port()
    pid = daemon.start(tmp_path, port, token="secret token")
    try:
        process = psutil.Process(pid)
        assert "secret token" not in " ".join(process.cmdline())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/?token=secret%20token") as answer:
            assert b"<title>PillSnap</title>" in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
        with pytest.raises(UserError, match="is already running"):
            daemon.start(tmp_path, port)
        assert "monitor of" in (tmp_path / "monitor.log").read_text()
    finally:
        assert daemon.stop(tmp_path) == pid
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "monitor.pid").exists()
    with pytest.raises(UserError, match="no background monitor"):
        daemon.stop(tmp_path)


def test_port_in_use_is_reported(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1"):
            daemon.start(tmp_path, other.getsockname()[1])
    assert not (tmp_path / "monitor.pid").exists()


def test_process_with_a_reused_id_is_not_stopped(tmp_path: Path) -> None:
    me = psutil.Process()
    (tmp_path / "monitor.pid").write_text(json.dumps({"pid": os.getpid(), "create_time": me.create_time() - 60}))
    with pytest.raises(UserError, match="no background monitor"):
        daemon.stop(tmp_path)
    assert me.is_running()


def test_public_address_without_a_token_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="token"):
        daemon.start(tmp_path, free_port(), host="0.0.0.0")
    assert list(tmp_path.iterdir()) == []
