"""The steps of leases' figures, in the format that `pillsnap plan --steps` reads and the package ships.

    python -m benchmarks.lease.steps_file benchmarks/log/gpu-h100.json ... --out pillsnap/planner/steps.json

Model, size and batch are those of each part's lines: the presets may have changed since.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHOSEN = re.compile(r"^(\S+) (\d+) px batch (\d+) ")


def measured_steps(report: dict[str, Any], source: str) -> Iterator[dict[str, Any]]:
    """One entry for each timed step of our own, compiled or not."""
    for part, result in report.items():
        figures = result.get("figures", {}) if isinstance(result, dict) else {}
        for kind in ("compiled", "eager"):
            if f"{kind}_images_per_s" not in figures:
                continue
            chosen = next(match for line in result["lines"] if (match := _CHOSEN.match(line)))
            yield {
                "device": report["machine"]["device"],
                "source": source,
                "task": part.split("-")[0],
                "model": chosen[1],
                "image_size_px": int(chosen[2]),
                "batch_size": int(chosen[3]),
                "compiled": kind == "compiled",
                "images_per_s": figures[f"{kind}_images_per_s"],
                "validation_images_per_s": figures["validation_images_per_s"],
                "first_step_s": figures[f"{kind}_first_step_s"],
                "peak_memory_bytes": figures.get(f"{kind}_peak_bytes"),
                "busy_ms": figures.get(f"{kind}_busy_ms"),
                "launches": figures.get(f"{kind}_launches"),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    steps = [step for path in options.reports for step in measured_steps(json.loads(path.read_text()), str(path))]
    options.out.write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
