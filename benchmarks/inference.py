"""Two-stage inference: PillSnap against ultralytics' predict and timm, called photo by photo and crop by crop.

    python -m benchmarks.inference [--run DIR] [--photos DIR] [--rounds 3] [--quick] [--json FILE]

Both sides have the same weights, photos, image sizes and thresholds, read files and return codes; loading the models is
not measured, and rounds alternate. Without --run the weights are random, and each side classifies the three best boxes
of each photo. Without --photos, 976 x 1280 PNG photos are generated. The control is the peer, in the same table, in
single precision (its default). PillSnap is measured with its default precision (bfloat16 where the hardware supports
it) and in single precision.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pillsnap.config import Settings, load_settings

BOXES_PER_PHOTO = 3


def random_run(folder: Path, settings: Settings, codes: list[str], photos: list[np.ndarray]) -> Settings:
    """Write checkpoints of random weights; return settings with a threshold that several boxes per photo pass."""
    from pillsnap.data.augment import letterbox
    from pillsnap.evaluate.two_stage import TwoStage
    from pillsnap.runs.checkpoint import Position, save_checkpoint
    from pillsnap.tasks.registry import make_task

    frames = np.stack([letterbox(photo, settings.detection.image_size_px) for photo in photos])
    unweighted = {name: getattr(settings, name).model_copy(update={"weights": "random"}) for name in settings.tasks}
    settings = settings.model_copy(update=unweighted)
    torch.manual_seed(0)
    for name in settings.tasks:
        model: Any = make_task(name, settings, codes).build()
        if name == "detection":
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.momentum = 1.0
                model.train()(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)
                for scores in model.model[-1].cv3:
                    scores[-1].weight.normal_(0, 0.05)
                    scores[-1].bias.fill_(-6)
        weights = model.state_dict()
        save_checkpoint(
            folder / "checkpoints" / name, Position(1, 0, 1), model=weights, ema=weights, trainer={},
            meta={"metrics": {}}, best=True, keep=1,
        )  # fmt: skip
    found = TwoStage(folder, settings, codes).detect(photos)
    scores = np.sort(np.concatenate([each.scores for each in found]))[::-1]
    # In the widest gap: a score at the threshold could pass in one batch and not in another.
    wanted = min(4 * BOXES_PER_PHOTO * len(photos), len(scores) - 2)
    near = scores[wanted : wanted + 2 + len(photos)]
    widest = int(np.argmin(np.diff(near)))
    threshold = float(near[widest : widest + 2].mean())
    evaluation = settings.evaluation.model_copy(update={"confidence": threshold})
    return settings.model_copy(update={"evaluation": evaluation})


def peer(
    run: Path, settings: Settings, codes: list[str], folder: Path, most: int
) -> Callable[[list[Path]], list[list[str]]]:
    """ultralytics' YOLO(file).predict on one path at a time, and timm with its own transform on one crop at a time."""
    import timm
    from PIL import Image
    from ultralytics import YOLO

    from pillsnap.tasks.best_model import load_best

    files = {name: folder / f"{name}.pt" for name in settings.tasks}
    for name, path in files.items():
        best = load_best(run, name, settings, codes)
        assert best is not None
        best.task.export(best.model, path, best.metrics)
    yolo = YOLO(files["detection"])
    contents = torch.load(files["classification"], weights_only=True)
    model = timm.create_model(contents["model"], num_classes=contents["num_classes"]).eval()
    model.load_state_dict(contents["state_dict"])
    size_px, margin = contents["image_size_px"], contents["crop_margin"]
    transform = timm.data.create_transform(
        input_size=(3, size_px, size_px), mean=contents["mean"], std=contents["std"], crop_pct=1.0
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)

    @torch.inference_mode()
    def name_all(paths: list[Path]) -> list[list[str]]:
        named = []
        for path in paths:
            result = yolo.predict(
                str(path), imgsz=settings.detection.image_size_px, conf=settings.evaluation.confidence,
                iou=settings.evaluation.nms_iou, max_det=most, verbose=False, device=str(device),
            )[0]  # fmt: skip
            photo = Image.open(path).convert("RGB")
            found = []
            for x1, y1, x2, y2 in result.boxes.xyxy.tolist():
                reach = max(x2 - x1, y2 - y1) * (0.5 + margin)
                x, y = (x1 + x2) / 2, (y1 + y2) / 2
                crop = photo.crop((round(x - reach), round(y - reach), round(x + reach), round(y + reach)))
                found.append(codes[int(model(transform(crop)[None].to(device)).argmax())])
            named.append(found)
        return named

    return name_all


def ours(run: Path, settings: Settings, codes: list[str], most: int) -> Callable[[list[Path]], list[list[str]]]:
    """As the actor of `pillsnap predict`; a thread decodes ahead instead of Ray Data tasks."""
    from concurrent.futures import ThreadPoolExecutor

    from pillsnap.evaluate.two_stage import TwoStage
    from pillsnap.photos.reader import PhotoReader

    models = TwoStage(run, settings, codes)
    reader = PhotoReader("/", settings.data.max_pixels)
    size = settings.evaluation.batch_size

    def read(paths: list[Path]) -> list[np.ndarray]:
        return [reader.read(str(path.absolute()).lstrip("/")) for path in paths]  # type: ignore[misc]

    def name_all(paths: list[Path]) -> list[list[str]]:
        named: list[list[str]] = []
        batches = [paths[start : start + size] for start in range(0, len(paths), size)]
        with ThreadPoolExecutor(1) as pool:
            for photos in pool.map(read, batches):
                found = models.detect(photos, settings.evaluation.confidence)
                names = models.classify(photos, [each.boxes[:most] for each in found])
                named += [[codes[i] for i in each.top[:, 0]] for each in names]
        return named

    return name_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a trained run")
    parser.add_argument("--photos", type=Path, help="a folder of photos")
    parser.add_argument("--num-photos", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.num_photos, options.rounds = 8, 1
    os.environ.setdefault("YOLO_OFFLINE", "1")
    from pillsnap.evaluate.predict import list_photos
    from pillsnap.models.detector import MAX_DETECTIONS
    from pillsnap.photos.decode import decode_image
    from pillsnap.runs.directory import load_run

    with tempfile.TemporaryDirectory(prefix="pillsnap-bench-") as temporary:
        folder = Path(temporary)
        photos = list_photos([options.photos or generated(folder / "photos", options.num_photos)])[: options.num_photos]
        if options.run:
            loaded = load_run(options.run.absolute())
            run, settings, codes = loaded.run_dir, loaded.settings, loaded.codes
        else:
            small = {"detection.image_size_px": 320, "classification.image_size_px": 96} if options.quick else {}
            settings = load_settings("demo" if options.quick else "stage3", {"detection.model": "yolo11n", **small})
            run, codes = folder / "run", [f"K-{number:06}" for number in range(1000)]
            settings = random_run(run, settings, codes, [decode_image(path.read_bytes()) for path in photos[:8]])
        most = MAX_DETECTIONS if options.run else BOXES_PER_PHOTO
        single = settings.model_copy(update={"train": settings.train.model_copy(update={"amp": "off"})})
        sides = {
            "one by one": peer(run, settings, codes, folder, most),
            "PillSnap": ours(run, settings, codes, most),
            "PillSnap, single precision": ours(run, single, codes, most),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        named: dict[str, list[list[str]]] = {}
        for side in sides.values():
            side(photos[: settings.evaluation.batch_size])  # warms caches and thread pools
        for _ in range(options.rounds):
            for name, side in sides.items():
                started = time.perf_counter()
                named[name] = side(photos)
                seconds[name].append(time.perf_counter() - started)
    results: dict[str, dict[str, Any]] = {
        name: {"photos_per_s": len(photos) / statistics.median(times), "seconds": times,
               "pills": sum(map(len, named[name]))}
        for name, times in seconds.items()
    }  # fmt: skip
    ratios = {
        name: [theirs / mine for theirs, mine in zip(seconds["one by one"], times, strict=True)]
        for name, times in seconds.items()
    }
    print(f"{settings.detection.model} at {settings.detection.image_size_px} px, {settings.classification.model} at "
          f"{settings.classification.image_size_px} px, {len(photos)} photos, {options.rounds} rounds, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':28}{'photos/s':>10}{'pills':>8}{'ratio':>8}   of each round; wanted 2")
    for name, row in results.items():
        row["ratio"] = statistics.median(ratios[name])
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios[name])
        print(f"{name:28}{row['photos_per_s']:>10.2f}{row['pills']:>8}{row['ratio']:>8.2f}   {each}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


def generated(folder: Path, num_photos: int) -> Path:
    """Combination photos at AI Hub's size."""
    from pillsnap.synthetic import generate

    generate(folder, num_classes=12, num_singles=0, num_combinations=num_photos)
    return folder


if __name__ == "__main__":
    main()
