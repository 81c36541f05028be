"""The steps of leases' figures, in the format that `pillsnap plan --steps` reads and the package ships.

    python -m benchmarks.lease.steps_file benchmarks/log/gpu-h100.json ... --out pillsnap/planner/steps.json

Reports of before 2026-11-28 do not say model, size and batch of a step: they are those of the presets of then.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pillsnap.tasks.registry import make_task

_OLDER: dict[str, tuple[str, int, int]] = {
    "detection-yolo11m": ("yolo11m", 640, 16),
    "detection-yolo11s": ("yolo11s", 640, 16),
    "classification-32": ("tf_efficientnetv2_s", 224, 32),
    "classification-128": ("tf_efficientnetv2_s", 224, 128),
}


def measured_steps(report: dict[str, Any], source: str) -> Iterator[dict[str, Any]]:
    """One entry for each timed step of our own, compiled or not."""
    for part, result in report.items():
        figures = result.get("figures", {}) if isinstance(result, dict) else {}
        for kind in ("compiled", "eager"):
            if f"{kind}_images_per_s" not in figures:
                continue
            model, size_px, batch_size = figures.get("chosen") or _OLDER[part]
            yield {
                "device": report["machine"]["device"],
                "source": source,
                "task": part.split("-")[0],
                "model": model,
                "image_size_px": size_px,
                "batch_size": batch_size,
                "compiled": kind == "compiled",
                "images_per_s": figures[f"{kind}_images_per_s"],
                "validation_images_per_s": figures["validation_images_per_s"],
                "first_step_s": figures[f"{kind}_first_step_s"],
                "peak_memory_bytes": figures.get(f"{kind}_peak_bytes"),
                "busy_ms": figures.get(f"{kind}_busy_ms"),
                "launches": figures.get(f"{kind}_launches"),
                "forward_gflop": forward_gflop(part.split("-")[0], model, size_px),
            }


@cache
def forward_gflop(name: str, model: str, size_px: int) -> float:
    """Billions of floating-point operations of one image's forward pass, counted by torch on the meta device."""
    from benchmarks.gpu import settings_for

    settings = settings_for(quick=False)
    chosen = getattr(settings, name).model_copy(update={"model": model, "image_size_px": size_px})
    codes = [f"K-{number:06}" for number in range(1000)]
    built = make_task(name, settings.model_copy(update={name: chosen}), codes, untrained=True).build().to("meta")
    with FlopCounterMode(display=False) as counter:
        built.train()(torch.empty(1, 3, size_px, size_px, device="meta"))
    return round(counter.get_total_flops() / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    steps = [step for path in options.reports for step in measured_steps(json.loads(path.read_text()), str(path))]
    options.out.write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
