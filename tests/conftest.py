"""Shared fixtures: an offline environment, a small Ray cluster, toy photographs and an S3 server."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Ray, Weights & Biases and ultralytics read these at import: set before any test module imports them.
ROOT = Path(__file__).resolve().parents[1]
_YOLO_CONFIG = tempfile.mkdtemp(prefix="pillsnap-tests-yolo-")
atexit.register(shutil.rmtree, _YOLO_CONFIG, ignore_errors=True)
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    YOLO_OFFLINE="1",
    YOLO_AUTOINSTALL="False",
    YOLO_CONFIG_DIR=_YOLO_CONFIG,
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),  # for Ray's workers
)
for _name in ("PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONDEVMODE"):  # a command would start pytest again without them
    os.environ.pop(_name, None)

import pytest  # noqa: E402

# No test cuts the power, so nothing is lost without waiting for the disk: a busy one takes seconds for each file.
os.fsync = lambda fd: None  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray cluster of two CPUs for the test session, started like that of a training."""
    import ray

    from pillsnap.ray_compat.minimal_cluster import local_cluster

    if ray.is_initialized():  # shutting down would stop a cluster of the test module
        raise RuntimeError("Ray is already initialized in this process: use the fixture ray_local instead of ray.init")
    with local_cluster(num_cpus=2, object_store_memory=512 * 1024**2):
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def toy_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AI Hub tree of generated photographs: 4 classes, 24 single and 9 combination photos of 244 x 320 pixels."""
    from pillsnap.synthetic import generate

    root = tmp_path_factory.mktemp("toy_tree")
    generate(root, num_classes=4, num_singles=24, num_combinations=9, frame=(244, 320), seed=7)
    return root


@pytest.fixture(scope="session")
def toy_manifest(toy_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of all photos of `toy_tree`, a quarter for validation; classes.json is in the same folder."""
    from pillsnap.manifest.build import build_manifest

    out = tmp_path_factory.mktemp("toy_manifest")
    return build_manifest(toy_tree, out, num_photos=None, num_classes=None, val_fraction=0.25, seed=42).path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of an S3 server in this process, on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


S3_SECRET = "pillsnap-secret-that-nobody-may-see"


@pytest.fixture
def s3_environment(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets the environment for the server; returns the URI of a new bucket."""
    from pyarrow import fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "pillsnap",
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PILLSNAP_CACHE_DIR": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"pills-{uuid.uuid4().hex[:8]}"
    scheme, _, host = s3_server.partition("://")
    fs.S3FileSystem(endpoint_override=host, scheme=scheme, allow_bucket_creation=True).create_dir(bucket)
    return f"s3://{bucket}"


class OtherUser:
    """A folder open to all, and the rights of a user who owns nothing in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def reads(self, *denied: Path) -> Iterator[None]:
        """Run the body without the right to read the files or folders `denied`; root gives up its rights for it."""
        modes = {path: path.stat().st_mode for path in denied}
        for path in denied:
            path.chmod(0)
        if os.getuid() == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            for path, mode in modes.items():
                path.chmod(mode)


@pytest.fixture
def other_user() -> Iterator[OtherUser]:
    """A folder of this user, and what another user can do with it."""
    folder = Path(tempfile.mkdtemp(prefix="pillsnap-tests-"))
    folder.chmod(0o755)
    yield OtherUser(folder)
    shutil.rmtree(folder)
