"""Runs one part of the lease in this process: `python -m benchmarks.lease.part NAME --folder DIR [--quick]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.lease.report import Gate, Report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    name, folder, quick = options.name, options.folder, options.quick
    report, gate = Report(folder / f"{name}.json"), Gate(folder, name)
    # Imported here: each part needs libraries that take seconds to import and that the others do not need.
    if name in ("loader", "gpu-tests", "memory"):
        from benchmarks.lease import checks

        {"loader": checks.loader, "gpu-tests": checks.gpu_tests, "memory": checks.memory}[name](report, quick)
    elif name == "losses":
        from benchmarks.lease.losses import losses

        losses(report, quick)
    elif name == "end-to-end":
        from benchmarks.lease.runs import end_to_end

        end_to_end(report, folder, quick)
    elif name in ("photos", "prepare-classification", "prepare-detection"):
        from benchmarks.lease.runs import photos, prepare

        photos(report, folder, quick) if name == "photos" else prepare(report, name.split("-")[1], folder, quick)
    elif name == "stage3":
        from benchmarks.lease.stage3 import stage3

        stage3(report, folder, quick)
    elif name.startswith("store-"):
        from benchmarks.lease.runs import store

        store(report, name.split("-")[1], name.endswith("-compiled"), folder, quick)
    else:
        from benchmarks.lease.steps import timed_step

        timed_step(report, gate, name, quick)


if __name__ == "__main__":
    main()
