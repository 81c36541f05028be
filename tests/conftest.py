"""What every test shares: a quiet offline environment, one small Ray cluster, one tree of toy photographs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Ray, Weights & Biases and ultralytics read these once, at import: set before any test module loads them.
ROOT = Path(__file__).resolve().parents[1]
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    YOLO_OFFLINE="1",
    YOLO_AUTOINSTALL="False",
    YOLO_CONFIG_DIR=tempfile.mkdtemp(prefix="pillsnap-tests-yolo-"),
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),  # for Ray's workers
)

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray cluster of two CPUs for the whole test session."""
    import ray

    if ray.is_initialized():  # a test module's own cluster would be shut down under it
        raise RuntimeError("Ray is already running in this process: use the ray_local fixture, not ray.init")
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=512 * 1024**2,
        include_dashboard=True,  # without it Ray Train's placement-group cleaner warns every few seconds
        dashboard_host="127.0.0.1",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def toy_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AI Hub tree of generated photographs: 4 classes, 24 single and 9 combination photos of 244 x 320 pixels."""
    from pillsnap.data.synthetic import generate

    root = tmp_path_factory.mktemp("toy_tree")
    generate(root, num_classes=4, num_singles=24, num_combinations=9, frame=(244, 320), seed=7)
    return root


@pytest.fixture(scope="session")
def toy_manifest(toy_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of all photos of `toy_tree`, a quarter for validation; its folder also holds classes.json."""
    from pillsnap.data.build import build_manifest

    out = tmp_path_factory.mktemp("toy_manifest")
    return build_manifest(toy_tree, out, num_photos=None, num_classes=None, val_fraction=0.25, seed=42).path
