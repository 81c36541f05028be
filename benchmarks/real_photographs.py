"""Detection on real photographs: PillSnap against ultralytics' own trainer at equal model, size, epochs and data.

    python -m benchmarks.real_photographs --data DIR [--epochs 60] [--only peer|ours] [--quick] [--json FILE]

DIR is a YOLO-format folder with images/{train,val,test} and labels/. Both train yolo11n at 320 px with batch 16 from
random weights on `train`, with all pills as one class, and are evaluated on `val` and `test` together. PillSnap then
trains its classifier and evaluates both models chained. The control is ultralytics, in the same table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = (
    "acetaminophen,advil,advil-gel,allerclear,altoid,duphaston,flatugel 6,lactrase,mefenamic-acid,midol,pancrelipase,"
    "pepto-bismol,slactone,spironolactone,tylenol,tylenol-er,vitamin"
)
GROUP_BY = r"^(.*)\.rf\."
IMAGE_SIZE_PX, BATCH_SIZE, SEED = 320, 16, 0

_PEER = """
import json, sys
import torch
from ultralytics import YOLO
data, epochs, size, batch, seed, out = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
result = YOLO("yolo11n.yaml").train(
    data=data, imgsz=size, epochs=epochs, batch=batch, single_cls=True, pretrained=False, device="cpu", workers=1,
    seed=seed, project=out, name="peer", exist_ok=True, plots=False, amp=False, verbose=False,
)
print("RESULT " + json.dumps(result.results_dict))
"""


def run_peer(data: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """ultralytics' trainer with its defaults, on a copy of the photos, since it writes caches next to them."""
    import shutil

    copy = folder / "peer-data"
    shutil.copytree(data, copy)
    for path in (copy, *copy.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    (copy / "data.yaml").write_text(
        f"path: {copy}\ntrain: images/train\nval: [images/val, images/test]\nnames: [{NAMES}]\n", encoding="utf-8"
    )
    environment = os.environ | {
        "YOLO_OFFLINE": "1",
        "YOLO_AUTOINSTALL": "False",
        "YOLO_CONFIG_DIR": str(folder / "yolo"),
    }
    arguments = [str(copy / "data.yaml"), *map(str, (epochs, IMAGE_SIZE_PX, BATCH_SIZE, SEED)), str(folder)]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _PEER, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    figures = json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")))
    return {
        "map50": figures["metrics/mAP50(B)"],
        "map50_95": figures["metrics/mAP50-95(B)"],
        "seconds": time.monotonic() - started,
    }


def run_ours(data: Path, epochs: int, classification_epochs: int, run: Path) -> dict[str, Any]:
    """Import, train both models and evaluate them, by user commands."""
    pillsnap = [sys.executable, "-m", "pillsnap.cli"]
    names = run.with_name(f"{run.name}-data.yaml")
    names.parent.mkdir(parents=True, exist_ok=True)
    names.write_text(
        f"path: {data}\ntrain: images/train\nval: [images/val, images/test]\nnames: [{NAMES}]\n", encoding="utf-8"
    )
    command = [*pillsnap, "manifest", "import", "--format", "yolo", str(data), "--group-by", GROUP_BY]
    command += ["--names", str(names)]
    subprocess.run([*command, "--out", str(run)], check=True)
    settings = {
        "name": "pushin_pill",
        "detection.image_size_px": IMAGE_SIZE_PX,
        "detection.epochs": epochs,
        "detection.batch_size": BATCH_SIZE,
        "detection.warmup_epochs": min(3, epochs),
        "detection.mosaic_off_epochs": min(10, epochs),
        "detection.flip_vertical": 0.0,
        "train.ema_warmup_steps": 1,
        "classification.epochs": classification_epochs,
        "classification.warmup_epochs": min(2, classification_epochs),
    }
    assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    started = time.monotonic()
    subprocess.run(
        [*pillsnap, "train", "--preset", "demo", "--run", str(run), "--data-root", str(data), *assignments], check=True
    )
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {
        "seconds": time.monotonic() - started,
        **{k: metrics[k] for k in ("detection", "classification", "pipeline")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PILLSNAP_REAL_PHOTOGRAPHS"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--classification-epochs", type=int, default=30)
    parser.add_argument("--only", choices=("peer", "ours"))
    parser.add_argument("--quick", action="store_true", help="one epoch each: shows that it runs, not how well")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.data:
        print("skipped: pass a folder of real photographs with --data or PILLSNAP_REAL_PHOTOGRAPHS")
        return
    epochs = 1 if options.quick else options.epochs
    classification_epochs = 1 if options.quick else options.classification_epochs
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pillsnap-bench-") as folder:
        if options.only != "ours":
            results["peer"] = run_peer(options.data.absolute(), epochs, Path(folder))
        if options.only != "peer":
            results["ours"] = run_ours(options.data.absolute(), epochs, classification_epochs, Path(folder) / "run")
    _print_table(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


def _print_table(results: dict[str, Any]) -> None:
    print(f"{'':24}{'mAP@0.5':>10}{'mAP@0.5:0.95':>14}{'seconds':>10}")
    rows = {"ultralytics' trainer": results.get("peer"), "PillSnap": results.get("ours")}
    for name, row in rows.items():
        if row:
            figures = row.get("detection", row)
            print(f"{name:24}{figures['map50']:>10.4f}{figures['map50_95']:>14.4f}{row['seconds']:>10.0f}")
    if len(results) == 2:
        ours, peer = results["ours"]["detection"], results["peer"]
        print(f"{'ratio':24}{ours['map50'] / peer['map50']:>10.3f}{ours['map50_95'] / peer['map50_95']:>14.3f}")
    if "ours" in results:
        named, chained = results["ours"]["classification"], results["ours"]["pipeline"]
        print(f"classification of labelled crops: top-1 {named['top1']:.4f}, top-5 {named['top5']:.4f}")
        print(f"end to end: {chained['pill_accuracy']:.4f} of pills correct, {chained['photo_accuracy']:.4f} of photos")


if __name__ == "__main__":
    main()
