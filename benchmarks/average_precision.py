"""Average precision of a detector's real predictions: PillSnap's metrics, and pycocotools' of the same boxes.

    python -m benchmarks.average_precision [--run DIR | --data DIR] [--epochs 12] [--quick] [--json FILE]

Evaluates the predictions of a run (`--run`), or of a detector that it first trains for a few epochs: on a YOLO-format
folder (`--data`), or without either on generated photos. yolo11n at 320 px from random weights. The control is
pycocotools, in the same table; COCO's metrics have to agree within 0.002. ultralytics' metric uses the same matching
with another quadrature, which gives at most 0.995.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.real_photographs import GROUP_BY, NAMES

LIMIT = 0.002


def pycocotools_precision(
    annotations: list[dict[str, Any]], results: list[dict[str, Any]], num_photos: int
) -> tuple[float, float]:
    """COCO's mAP@0.5:0.95 and mAP@0.5, by pycocotools. `annotations` have image_id and bbox, `results` category_id 1
    and a score as well.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": number} for number in range(num_photos)],
            "categories": [{"id": 1}],
            "annotations": [
                {"id": i, "category_id": 1, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry}
                for i, entry in enumerate(annotations, start=1)
            ],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def compare(run: Path, split: str = "val") -> dict[str, Any]:
    """PillSnap's metrics of an evaluated run's detections, and pycocotools'."""
    import pyarrow.parquet as pq

    from pillsnap.manifest.table import read_manifest
    from pillsnap.metrics.boxes import read_boxes, read_photos
    from pillsnap.metrics.detection import detection_metrics

    manifest = read_manifest(run / "manifest.parquet")
    detections = pq.read_table(run / "predictions" / "detections.parquet")
    metrics, found = detection_metrics(manifest, detections, split), read_boxes(detections)
    photos = [photo for photo in read_photos(manifest, split) if photo.complete and photo.sample_id in found]
    annotations = [
        {"image_id": number, "bbox": box} for number, photo in enumerate(photos) for box in photo.boxes.tolist()
    ]
    results = [
        {"image_id": number, "category_id": 1, "bbox": box, "score": score}
        for number, boxes in enumerate(found[photo.sample_id] for photo in photos)
        for box, score in zip(boxes.xywh.tolist(), boxes.scores.tolist(), strict=True)
    ]
    map50_95, map50 = pycocotools_precision(annotations, results, len(photos))
    names = ("map50", "map50_95", "map50_coco", "map50_95_coco", "num_photos", "num_boxes")
    return {name: metrics[name] for name in names} | {
        "pycocotools_map50": map50,
        "pycocotools_map50_95": map50_95,
        "num_detections": len(results),
    }


def train(run: Path, data: Path | None, epochs: int) -> None:
    """Train and evaluate a run of the detection task by the commands of a user; missed targets are ignored."""
    pillsnap = [sys.executable, "-m", "pillsnap.cli"]
    if data is None:
        data = run / "photos"
        counts = ("--classes", 6, "--singles", 24, "--combinations", 24, "--frame", "244x320")
        subprocess.run([*pillsnap, "synth", "--out", str(data), *map(str, counts)], check=True)
        command = [*pillsnap, "manifest", "build", "--preset", "demo", "--data-root", str(data)]
    else:
        command = [*pillsnap, "manifest", "import", "--format", "yolo", str(data), "--names", NAMES]
        command += ["--group-by", GROUP_BY]
    subprocess.run([*command, "--out", str(run)], check=True)
    settings = {
        "train.task": "detection", "detection.image_size_px": 320, "detection.epochs": epochs,
        "detection.warmup_epochs": min(1, epochs), "detection.mosaic_off_epochs": min(4, epochs),
        "train.ema_warmup_steps": 1, "wandb.mode": "disabled",
    }  # fmt: skip
    assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [*pillsnap, "train", "--preset", "demo", "--run", str(run), "--data-root", str(data), *assignments]
    )
    if not (run / "predictions" / "detections.parquet").exists():
        raise SystemExit(f"pillsnap train ended with {done.returncode} and no predictions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="an evaluated run")
    parser.add_argument("--data", type=Path, default=os.environ.get("PILLSNAP_REAL_PHOTOGRAPHS"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="two epochs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pillsnap-bench-") as folder:
        run = options.run or Path(folder) / "run"
        if not options.run:
            data = Path(options.data).absolute() if options.data else None
            train(run, data, 2 if options.quick else options.epochs)
        metrics = compare(run)
    print(f"{metrics['num_photos']} photos, {metrics['num_boxes']} boxes, {metrics['num_detections']} detections")
    print(f"{'':14}{'ultralytics':>16}{'COCO':>12}{'pycocotools':>13}{'difference':>12}")
    differences = []
    for name in ("map50", "map50_95"):
        ours, theirs = metrics[f"{name}_coco"], metrics[f"pycocotools_{name}"]
        differences.append(abs(ours - theirs))
        print(f"{name:14}{metrics[name]:>16.5f}{ours:>12.5f}{theirs:>13.5f}{ours - theirs:>12.1e}")
    print(f"largest difference {max(differences):.1e}, limit {LIMIT}")
    if options.json:
        options.json.write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    raise SystemExit(0 if max(differences) <= LIMIT else 1)


if __name__ == "__main__":
    main()
