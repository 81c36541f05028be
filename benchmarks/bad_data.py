"""How does training handle bad photos, decompression bombs, foreign CSV manifests and ZIP archives?

    python -m benchmarks.bad_data [--quick] [--json FILE] [--seed-manifests DIR]

Four answers, each through the code that trains: 1,000 photos of which 10 are bad in 10 ways, through the Ray Data
stream (control: the pixels they were made from); the time and memory in which a bomb is refused (control: decoding a
976 x 1280 photo); the samples of a tree as ZIP archives (control: the unpacked tree); and the rows of the CSV files in
DIR (control: the codes spelt out from their file names by a plain loop; without DIR it is left out).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from pillsnap.data.recipes import Batch

_BOMB = """
import sys, time
from pillsnap.photos.reader import PhotoReader

def peak_kb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

reader = PhotoReader(sys.argv[1], 64_000_000)
reader.read("small.png")  # load imports and buffers first
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # reset the peak
before = peak_kb()
start = time.perf_counter()
found = reader.read(sys.argv[2])
seconds = time.perf_counter() - start
print(seconds, 1024 * (peak_kb() - before), getattr(found, "reason", "read"))
"""
_SIDE_PX = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 photos")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seed-manifests", type=Path, help="folder with *train*.csv and *val*.csv of another tool")
    options = parser.parse_args()
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    from pillsnap.ray_compat.minimal_cluster import local_cluster

    figures: dict = {}
    with tempfile.TemporaryDirectory(prefix="pillsnap-bench-bad-data-") as name:
        folder = Path(name)
        if options.seed_manifests:
            figures["seed_manifests"] = measure_csv(options.seed_manifests, folder / "csv")
        else:
            print("CSV manifests: left out, --seed-manifests names no folder")
        figures["bombs"] = measure_bombs(folder)
        with local_cluster(logging_level="error", num_cpus=2):
            import ray.data

            logging.getLogger("ray.data").setLevel(logging.ERROR)
            figures["bad_photos"] = measure_bad_photos(folder / "bad", 200 if options.quick else 1000)
            figures["archives"] = measure_archives(folder, 60 if options.quick else 300)
            ray.shutdown()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_csv(source: Path, out: Path) -> dict:
    """Import foreign CSV files and compare each row's codes with those in its file name."""
    from pillsnap.manifest.import_csv import import_csv
    from pillsnap.manifest.table import read_manifest

    expected = {}
    for path in sorted(source.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                part, name = line["image_path"].split("/")[-3], line["image_path"].rpartition("/")[2]
                expected[part, name] = ["K-" + digits for digits in name.partition("_")[0].split("-")[1:]]
    rows = read_manifest(import_csv(source, out)).to_pylist()
    found = {(row["image_path"].split("/")[-3], row["image_path"].rpartition("/")[2]): row["codes"] for row in rows}
    right = sum(found.get(key) == codes for key, codes in expected.items())
    print(f"CSV manifests: {len(expected):,} rows in the files, {len(rows):,} read, {right:,} with the right codes")
    return {"in_files": len(expected), "read": len(rows), "right_codes": right}


def measure_bombs(folder: Path) -> dict:
    """Seconds and bytes to reject each bomb, in a separate process."""
    from pillsnap.synthetic.faults import png_header

    zeros = zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED)
    with zeros, zeros.open("K.png", "w") as member:
        member.write(png_header(30_000, 30_000))
        for _ in range(512):
            member.write(bytes(1 << 20))
    cv2.imwrite(str(folder / "small.png"), np.zeros((8, 8, 3), np.uint8))
    cv2.imwrite(str(folder / "photo.png"), np.random.default_rng(0).integers(0, 255, (1280, 976, 3), dtype=np.uint8))
    (folder / "bomb.png").write_bytes(png_header(30_000, 30_000) + bytes(20_000))
    (folder / "wide.png").write_bytes(png_header(13_000, 13_000) + bytes(20_000))
    with (folder / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    from pillsnap.photos.archives import locate, read_directory, to_location

    (place,) = locate(str(folder), "bomb.zip", list(read_directory(folder / "bomb.zip")))
    figures = {}
    cases = {"photo.png": "read", "bomb.png": "too_large", "wide.png": "too_large", "huge.png": "too_large",
             to_location(place): "too_large"}  # fmt: skip
    for location, expected in cases.items():
        output = subprocess.run(
            [sys.executable, "-c", _BOMB, str(folder), location], capture_output=True, text=True, check=True
        ).stdout.split()
        seconds, num_bytes, reason = float(output[0]), int(output[1]), output[2]
        assert reason == expected, (location, reason)
        name = location.partition("::")[0]
        figures[name] = {"seconds": seconds, "bytes": num_bytes, "result": reason}
        limit = "control" if reason == "read" else "limits 50 ms, 50 MB"
        print(f"{name}: {reason} in {seconds * 1e3:.1f} ms, {num_bytes / 1e6:.1f} MB more resident ({limit})")
    return figures


def picture(number: int) -> np.ndarray:
    """A smooth picture per number, with few enough colors for a palette."""
    coarse = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (12, 12), interpolation=cv2.INTER_CUBIC)
    return smooth.repeat(_SIDE_PX // 12, 0).repeat(_SIDE_PX // 12, 1)


def measure_bad_photos(root: Path, num_photos: int) -> dict:
    """Ten bad photos among good ones in the training stream: quarantined photos, and pixels of the others."""
    from pillsnap.data.augment import FrameJitter
    from pillsnap.data.recipes import FrameRecipe
    from pillsnap.synthetic.faults import FAULTS

    root.mkdir()
    bad = dict(zip(range(5, num_photos, num_photos // len(FAULTS)), FAULTS.items(), strict=True))
    names, paths = [], []
    for number in range(num_photos):
        name, fault = bad.get(number, (f"good{number}", None))
        names.append(name)
        paths.append(name + (fault.extension if fault else ".png"))
        data = cv2.imencode(".png", picture(number)[..., ::-1])[1].tobytes()
        (root / paths[-1]).write_bytes(fault.spoil(picture(number)) if fault else data)
    boxes = pa.array([[[8, 8, 16, 16]]] * num_photos, pa.list_(pa.list_(pa.float32())))
    samples = pa.table({"sample_id": names, "location": paths, "boxes": boxes})
    quarantined: dict[str, str] = {}
    wrong = []
    seen = 0
    for batch in stream_batches(samples, samples.slice(0, 1), FrameRecipe(_SIDE_PX, FrameJitter(), 4, 0, 1), root, 50):
        if not batch["training"]:
            continue
        quarantined |= dict(json.loads(str(batch["quarantine"])))
        for image, number, valid in zip(batch["image"], batch["index"], batch["valid"], strict=True):
            seen += int(valid)
            fault = bad.get(int(number), ("", None))[1]
            error = np.abs(image.astype(int) - picture(int(number))).mean()
            if valid and error > (fault.tolerance if fault else 0):
                wrong.append(names[int(number)])
    expected = {name: fault.reason for name, fault in FAULTS.items() if fault.reason}
    reasons = {name: reason.partition(":")[0] for name, reason in quarantined.items()}
    print(f"{num_photos:,} photos, {len(bad)} bad in {len(bad)} ways: {seen:,} read, {len(wrong)} with wrong pixels")
    print(f"quarantined: {reasons}; as expected: {reasons == expected}")
    return {"photos": num_photos, "read": seen, "wrong_pixels": wrong, "quarantined": reasons,
            "as_expected": reasons == expected}  # fmt: skip


def stream_batches(train: pa.Table, val: pa.Table, recipe: object, root: Path, batch_size: int) -> Iterator[Batch]:
    """The batches of a training stream of one epoch."""
    from pillsnap.data.plan import StreamPlan
    from pillsnap.data.stream import Stream, batches_of, share_samples
    from pillsnap.photos.reader import PhotoReader

    plan = StreamPlan(3, 1, len(train), len(val), batch_size, 1)
    reader = PhotoReader(str(root), 10**7)
    stream = Stream(plan, recipe, reader, share_samples(train), share_samples(val), 4, 0.5)  # type: ignore[arg-type]
    return batches_of(stream.dataset())


def measure_archives(folder: Path, num_photos: int) -> dict:
    """Every sample of one epoch of both tasks: folder tree compared with stored and deflated archives."""
    from pillsnap.synthetic import generate

    tree = folder / "tree"
    generate(tree, num_classes=6, num_singles=num_photos, num_combinations=num_photos // 5, frame=(244, 320), seed=7)
    expected = stream_hashes(tree, folder / "plain")
    figures: dict = {"samples": len(expected)}
    for name, compression in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        zipped = folder / name
        zipped.mkdir()
        for part in sorted(tree.glob("train/*/*/T?_*")):
            with zipfile.ZipFile(zipped / f"{part.name}.zip", "w", compression) as archive:
                for path in sorted(part.rglob("*")):
                    archive.write(path, path.relative_to(part).as_posix())
        found = stream_hashes(zipped, folder / f"{name}-manifest")
        same = sum(found.get(key) == value for key, value in expected.items())
        figures[name] = same
        print(f"ZIP archives, {name}: {same:,} of {len(expected):,} samples identical to the unpacked tree's")
    return figures


def stream_hashes(root: Path, out: Path) -> dict[str, str]:
    """Hash of each augmented image with its boxes or label, by task, side and sample id."""
    from pillsnap.data.augment import CropJitter, FrameJitter
    from pillsnap.data.recipes import CropRecipe, FrameRecipe
    from pillsnap.data.samples import classification_samples, detection_samples
    from pillsnap.manifest.build import build_manifest
    from pillsnap.manifest.table import read_classes, read_manifest

    table = read_manifest(build_manifest(root, out, num_photos=None, num_classes=None).path)
    codes = [info.code for info in read_classes(out)]
    frames = FrameRecipe(96, FrameJitter(mosaic=1.0, scale=0.4, flip_horizontal=0.5), 8, 1, 4)
    hashes = {}
    for task, samples, recipe in (
        ("detection", detection_samples(table), frames),
        ("classification", classification_samples(table, codes), CropRecipe(64, 0.1, CropJitter(0.1, 0.1, 180))),
    ):
        for batch in stream_batches(samples.train, samples.val, recipe, root, 16):
            part = samples.train if batch["training"] else samples.val
            target = batch["boxes" if task == "detection" else "label"]
            for row in np.flatnonzero(batch["valid"]):
                sample_id = part["sample_id"][int(batch["index"][row])].as_py()
                content = batch["image"][row].tobytes() + target[row].tobytes()
                hashes[f"{task}/{batch['training']}/{sample_id}"] = hashlib.sha256(content).hexdigest()
    return hashes


if __name__ == "__main__":
    main()
