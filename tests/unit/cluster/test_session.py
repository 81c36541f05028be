"""How many train workers there are, on what, and which wishes are refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from pillsnap.cluster.session import Workers, count_workers
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
        "    print(psutil.pid_exists(pid))\n"
        "print(psutil.pid_exists(pid))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr[-2000:]
