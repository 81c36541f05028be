"""How long does an import of labelled photos take, against reading the same files?

    python -m benchmarks.imports [--quick] [--json FILE] [--folder DIR]

Writes a YOLO folder of 100,000 photos (10,000 with --quick) with one label file each under a temporary folder, and
removes it. Photos are small JPEG files of their own. Controls, in the same run: a bare loop that reads the label files,
and one that also reads the start of each photo, whose size an import needs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

LIMIT = 2.0
"""Accepted time of an import over that of reading its label files."""
_HEAD_BYTES = 4096


def write_set(root: Path, num_photos: int) -> None:
    """Photos of 32 x 32 pixels, 5 labels each, nine tenths in `train`."""
    import cv2
    import numpy as np

    photo = cv2.imencode(".jpg", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()
    for split, count in (("train", num_photos * 9 // 10), ("val", num_photos - num_photos * 9 // 10)):
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(count):
            rows = [f"{(number + i) % 50} 0.{5 + i}12345 0.412345 0.0{1 + i}2345 0.112345\n" for i in range(5)]
            (images / f"{number:06d}.jpg").write_bytes(photo + number.to_bytes(4, "big"))
            (labels / f"{number:06d}.txt").write_text("".join(rows))


def read_files(paths: list[str], num_bytes: int = -1) -> None:
    """Read at most `num_bytes` of each file, in this process."""
    for path in paths:
        with open(path, "rb") as file:
            file.read(num_bytes)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    from pillsnap.manifest.import_folder import ImportOptions, import_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    num_photos = 10_000 if options.quick else 100_000
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="pillsnap-imports-"))
    try:
        root = folder / "set"
        write_set(root, num_photos)
        labels = sorted(map(str, root.glob("labels/*/*.txt")))
        photos = sorted(map(str, root.glob("images/*/*.jpg")))
        names = ImportOptions([f"pill {index}" for index in range(50)])
        rounds = []
        for number in range(3):
            rounds.append({
                "labels_s": timed(lambda: read_files(labels)),
                "photo_starts_s": timed(lambda: read_files(photos, _HEAD_BYTES)),
                "import_s": timed(partial(import_folder, root, folder / f"out{number}", names)),
            })  # fmt: skip
        times = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    finally:
        shutil.rmtree(folder)
    ratio = times["import_s"] / times["labels_s"]
    all_s = times["labels_s"] + times["photo_starts_s"]
    both = times["import_s"] / all_s
    print(f"{num_photos:,} photos, median of 3 rounds")
    print(f"  import                              {times['import_s']:6.2f} s")
    print(f"  control: read the label files       {times['labels_s']:6.2f} s   ratio {ratio:.2f} (limit {LIMIT:g})")
    print(
        f"  control: and the start of a photo   {times['labels_s'] + times['photo_starts_s']:6.2f} s   ratio {both:.2f}"
    )
    if options.json:
        options.json.write_text(json.dumps({"num_photos": num_photos, "rounds": rounds, "ratio": ratio}, indent=2))


if __name__ == "__main__":
    main()
