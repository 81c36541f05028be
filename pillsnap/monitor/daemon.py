"""The web monitor as a background process with a log and a pid file: `start` and `stop`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

import pillsnap
from pillsnap.errors import UserError
from pillsnap.monitor.access import check_bind
from pillsnap.monitor.live_copy import live_copy
from pillsnap.monitor.server import DEFAULT_PORT, serve
from pillsnap.observe.priority import lower_priority
from pillsnap.storage import is_uri, scratch

PID_FILE = "monitor.pid"
LOG_FILE = "monitor.log"
TOKEN_VARIABLE = "PILLSNAP_MONITOR_TOKEN"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0


def start(
    where: str | Path,
    port: int = DEFAULT_PORT,
    host: str = "127.0.0.1",
    token: str | None = None,
    public_url: str = "",
) -> int:
    """Start the web monitor of a run (a folder or a URI) in the background; returns its process id once it listens.

    UserError when it is running already, cannot start (the reason is in `monitor.log`), or needs a token.
    """
    check_bind(host, token, public_url)
    run_dir = _folder(where)
    if is_uri(where):
        run_dir.mkdir(parents=True, exist_ok=True)
        where = str(where)
    else:
        where = str(run_dir.resolve())
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory: pass a run directory with --run, such as artifacts/demo")
    running = _running(run_dir)
    if running is not None:
        raise UserError(f"the monitor of {run_dir} is already running (process {running.pid}); stop it with --stop")
    environment = {**os.environ, "PYTHONPATH": _python_path()}
    environment.pop(TOKEN_VARIABLE, None)
    if token:
        environment[TOKEN_VARIABLE] = token  # arguments are visible to every user of the machine
    with (run_dir / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pillsnap.monitor.daemon", where, host, str(port), public_url],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    record = {"pid": process.pid, "create_time": psutil.Process(process.pid).create_time(), "host": host, "port": port}
    (run_dir / PID_FILE).write_text(json.dumps(record))
    end_s = time.monotonic() + START_TIMEOUT_S
    while not _listens(process.pid, port):
        if process.poll() is not None or time.monotonic() > end_s:
            process.kill()
            (run_dir / PID_FILE).unlink(missing_ok=True)
            raise UserError(f"the monitor did not start: {_last_line(run_dir / LOG_FILE)}")
        time.sleep(0.1)
    return process.pid


def stop(where: str | Path) -> int:
    """Stop the background monitor of a run; returns its process id. UserError when none is running."""
    run_dir = _folder(where)
    process = _running(run_dir)
    if process is None:
        (run_dir / PID_FILE).unlink(missing_ok=True)
        raise UserError(f"no background monitor of {where} is running")
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)
    (run_dir / PID_FILE).unlink(missing_ok=True)
    return process.pid


def _folder(where: str | Path) -> Path:
    """Folder of the log and the pid file: the run directory, or the local copy of a remote run."""
    return scratch(str(where), "reader") if is_uri(where) else Path(where)


def _running(run_dir: Path) -> psutil.Process | None:
    """The process of the pid file; None when it has ended, even if its id was reused."""
    try:
        record = json.loads((run_dir / PID_FILE).read_text())
        process = psutil.Process(record["pid"])
        is_ours = abs(process.create_time() - record["create_time"]) < 0.01
    except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
        return None
    return process if is_ours and process.status() != psutil.STATUS_ZOMBIE else None


def _listens(pid: int, port: int) -> bool:
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)
    return False


def _python_path() -> str:
    package_root = str(Path(pillsnap.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "monitor.log is empty")


def main() -> None:
    """Entry point of the background process; arguments: run directory or URI, host, port, public URL or ""."""
    where, host, port, public_url = sys.argv[1:5]
    lower_priority()
    try:
        with live_copy(where) as run_dir:
            serve(run_dir, host, int(port), os.environ.pop(TOKEN_VARIABLE, None), public_url)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
