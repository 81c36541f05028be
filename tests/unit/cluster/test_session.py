"""How many train workers there are, on what, and which wishes are refused in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pillsnap.cluster import session
from pillsnap.cluster.interruption import stoppable
from pillsnap.cluster.session import RayLost, Workers, count_workers, ray_session
from pillsnap.config import load_settings
from pillsnap.errors import UserError


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Resources that Ray says it has, on three nodes."""
    import ray

    has = {"CPU": 32.0, "GPU": 4.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: has)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * 3 + [{"Alive": False}])
    return has


def counted(**overrides: Any) -> Workers:
    return count_workers(load_settings("demo", {key.replace("__", "."): value for key, value in overrides.items()}))


def test_a_worker_a_gpu_unless_asked_otherwise(cluster: dict[str, float]) -> None:
    assert counted() == Workers(4, 4, True)
    assert counted(train__num_workers="2") == Workers(2, 2, True)
    assert counted(train__num_workers="1:8") == Workers(1, 8, True)
    assert counted(train__device="cpu") == Workers(1, 1, False)
    assert counted(train__device="gpu") == Workers(4, 4, True)
    cluster["GPU"] = 0
    assert counted() == Workers(1, 1, False)
    assert counted(train__num_workers="8") == Workers(8, 8, False)


def test_gpus_that_are_not_there_are_one_line(cluster: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"^8 workers were asked for, but Ray has 4 GPUs on its 3 nodes: set --num"):
        counted(train__num_workers="8")
    cluster["GPU"] = 0
    with pytest.raises(UserError, match=r"^train\.device=gpu, but Ray has no GPU on its 3 nodes: look at `ray status`"):
        counted(train__device="gpu")


def test_a_cluster_without_room_for_decoding_is_one_line(cluster: dict[str, float]) -> None:
    cluster |= {"CPU": 4.0, "GPU": 0.0}
    with pytest.raises(UserError, match=r"^8 workers with 0\.5 CPUs each leave 0\.00 of 4 CPUs"):
        counted(train__num_workers="8")


def test_ray_datas_own_progress_bars_are_off() -> None:
    """Ray Data reads the environment at its import, which has to come after what the session sets."""
    script = (
        "from pillsnap.cluster.session import ray_session\n"
        "with ray_session():\n"
        "    from ray.data import DataContext\n"
        "    print(DataContext.get_current().enable_progress_bars)\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "RAY_DATA_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", script], env=kept, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False"], done.stderr[-2000:]


def test_a_cluster_that_does_not_answer_ends_within_the_limit() -> None:
    """A server that accepts connections and never answers, in a process whose limits are shortened."""
    script = (
        "from pillsnap.cluster import interruption, session\n"
        "interruption.GRACE_S, session._JOIN_S = 1.0, 3.0\n"
        "with session.ray_session():\n"
        "    print('joined')\n"
    )
    with socket.create_server(("0.0.0.0", 0), backlog=50) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert f"No cluster of Ray answered at RAY_ADDRESS={address} within 3 s: check" in done.stderr.splitlines()[-1]
    assert time.monotonic() - started_s < 60


@pytest.mark.parametrize(
    "error", [ConnectionError("ray client connection timeout"), ValueError("Invalid address format: foo")]
)
def test_an_address_that_cannot_be_joined_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**options: Any) -> None:
        raise error

    monkeypatch.setenv("RAY_ADDRESS", "foo")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError) as caught, ray_session():
        pass
    assert str(caught.value) == (
        f"No cluster of Ray can be joined at RAY_ADDRESS=foo ({error}): check the address, `ray status` and the "
        "network, or unset RAY_ADDRESS to start Ray on this machine."
    )


@pytest.mark.parametrize("starting", [True, False])
def test_the_end_of_raylet_and_gcs_is_noticed_at_once(starting: bool, tmp_path: Path) -> None:
    """Also while Ray starts, which waits 30 s for them."""
    (tmp_path / "raylet").symlink_to(sys.executable)
    part = subprocess.Popen([tmp_path / "raylet", "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
    assert part.stdout is not None and part.stdout.readline()
    threading.Timer(1.2, part.kill).start()
    started_s = time.monotonic()
    watch = stoppable(look=session._lost_part()) if starting else session._watched()
    with (
        pytest.raises(
            RayLost,
            match=rf"^Ray's head process has ended \(raylet, process {part.pid}\): .*Give the same command again",
        ),
        watch,
    ):
        time.sleep(60)
    assert time.monotonic() - started_s < 5
    part.communicate()


def test_a_part_that_stops_by_itself_was_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/r")
    (tmp_path / "gcs_server").symlink_to(sys.executable)
    for code, ending in (("import os; os.abort()", "SIGABRT"), ("raise SystemExit(3)", "exit code 3")):
        part = subprocess.Popen([tmp_path / "gcs_server", "-c", f"import sys; sys.stdin.read(); {code}"], stdin=-1)
        look = session._lost_part()
        while (lost := look()) is None:
            assert part.stdin is not None
            if not part.stdin.closed:
                part.stdin.close()
            time.sleep(0.05)
        told = f"it stopped by itself ({ending}), and says why in /r/ray/session_latest/logs/gcs_server.err"
        assert told in str(lost)
        part.wait()


def test_no_process_outlives_its_session() -> None:
    """Not even one that Ray takes for ended, while it never gets through its exit."""
    script = (
        "import atexit, os, time\n"
        "import psutil, ray\n"
        "from pillsnap.cluster.session import ray_session\n"
        "class Stubborn:\n"
        "    def pid(self):\n"
        "        atexit.register(time.sleep, 300)\n"
        "        return os.getpid()\n"
        "    def leave(self):\n"
        "        ray.actor.exit_actor()\n"
        "with ray_session():\n"
        "    actor = ray.remote(num_cpus=0)(Stubborn).remote()\n"
        "    pid = ray.get(actor.pid.remote())\n"
        "    actor.leave.remote()\n"
        "    time.sleep(1)\n"
        "    process = psutil.Process(pid)\n"
        "    print(process.is_running())\n"
        "print(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)\n"  # process 1 may reap late
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr[-2000:]
