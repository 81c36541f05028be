"""A limit, a signal or a fact ends what the main thread waits for, in native code too, and as process 1."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pillsnap.cluster import interruption
from pillsnap.cluster.interruption import interrupted_by, stoppable
from pillsnap.errors import UserError
from tests.conftest import ROOT

NATIVE = "ctypes.CDLL(None).pthread_mutex_lock(lock)"
"""Waits forever, and does not return for a signal."""
SLOW_END = "exec('try: time.sleep(60)\\nfinally: time.sleep(60)')"
"""Returns for a signal, and takes a minute to clean up."""


def started(body: str, *prefix: str) -> subprocess.Popen[str]:
    """A process that runs `body` within stoppable(0.8 s), after it has printed a line."""
    script = (
        "import ctypes, signal, sys, time\n"
        "from pillsnap.cluster import interruption\n"
        "from pillsnap.errors import UserError\n"
        f"interruption.GRACE_S = {0.3 if body in (NATIVE, SLOW_END) else 30.0}\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job inherits "ignored"
        "lock = ctypes.create_string_buffer(64)\n"
        "ctypes.CDLL(None).pthread_mutex_lock(lock)\n"
        "try:\n"
        "    with interruption.stoppable(float(sys.argv[1]), UserError('too late')):\n"
        "        print('waiting', flush=True)\n"
        f"        {body}\n"
        "except (KeyboardInterrupt, UserError) as error:\n"
        "    print(type(error).__name__)\n"
    )
    limit_s = "0.8" if "--limit" in prefix else "60"
    command = [*(word for word in prefix if word != "--limit"), sys.executable, "-c", script, limit_s]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    if body == NATIVE and "--limit" not in prefix:
        waits_in_native_code(process.pid)
    return process


def waits_in_native_code(pid: int) -> None:
    """Return when the innermost process sleeps: between the printed line and the lock it is still Python that stops."""
    (innermost,) = psutil.Process(pid).children() or [psutil.Process(pid)]
    slept = 0
    while slept < 3:
        time.sleep(0.05)
        slept = slept + 1 if innermost.status() == psutil.STATUS_SLEEPING else 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "body", ["time.sleep(60)", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)); time.sleep(60)"]
)
def test_a_stop_is_obeyed_whatever_handlers_the_body_has(body: str, signum: signal.Signals) -> None:
    process = started(body)
    process.send_signal(signum)
    assert (process.communicate(timeout=10)[0], process.returncode) == ("KeyboardInterrupt\n", 0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_a_process_that_waits_in_native_code(signum: signal.Signals) -> None:
    process = started(NATIVE)
    process.send_signal(signum)
    assert (process.communicate(timeout=10), process.returncode) == (("", "pillsnap: interrupted\n"), 130)


@pytest.mark.parametrize("body", [NATIVE, SLOW_END])
def test_a_limit_ends_a_process_that_does_not_end_for_it(body: str) -> None:
    """Ray ends a driver that still cleans up 9 s after the GCS was killed, with exit code 1 and no line."""
    process = started(body, "--limit")
    assert (process.communicate(timeout=10), process.returncode) == (("", "pillsnap: too late\n"), 2)


def test_a_limit_raises_its_error() -> None:
    started_s = time.monotonic()
    with pytest.raises(UserError, match=r"^too late$"), stoppable(0.2, UserError("too late")):
        time.sleep(60)
    assert time.monotonic() - started_s < 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", ["time.sleep(60)", NATIVE])
def test_a_stop_is_obeyed_as_process_1(body: str, signum: signal.Signals) -> None:
    namespace = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace can be made here")
    process = started(body, *namespace)
    os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()), signum)
    process.communicate(timeout=10)
    assert process.returncode == (0 if body != NATIVE else 130)


def test_a_fact_raises_its_error_at_once_and_once() -> None:
    read, write = os.pipe()
    handler = signal.getsignal(interruption._WAKE)
    threading.Timer(0.1, os.write, (write, b"x")).start()
    started_s = time.monotonic()
    with pytest.raises(UserError, match=r"^a part has ended$"), interrupted_by({read: UserError("a part has ended")}):
        try:
            time.sleep(60)
        finally:
            time.sleep(0.5)  # the way out may take its time
    assert time.monotonic() - started_s < 2
    with interrupted_by({}):
        pass
    assert signal.getsignal(interruption._WAKE) is handler
    os.close(read), os.close(write)
