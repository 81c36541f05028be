"""Software versions of a run."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = (
    "pillsnap", "ray", "torch", "torchvision", "ultralytics", "timm", "numpy", "pandas", "pyarrow",
    "opencv-python-headless", "kornia-rs", "wandb",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that affect results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
