"""How long do scan, build and validate of an AI Hub tree take, how much memory, and how does that grow?

    python -m benchmarks.manifest [--quick] [--json FILE] [--folder DIR]

Writes a tree of 500,000 photos (50,000 with --quick) under a temporary folder and removes it at the end. Photos
are PNG headers with bytes of their own; the label files of one drug are hard links. Controls, in the same run:
`find`, a bare loop that opens and parses the same labels, and a bare loop that opens the same photos. The
growth model is a line through two smaller trees; its error on the largest tree is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

VIEWS = [
    f"0_2_{side}_{light}_{latitude}_{longitude:03d}_200"
    for side, light, latitude, longitude in product((0, 1), (0, 1, 2), (60, 70, 75, 90), range(0, 360, 20))
]
PHOTOS_PER_CLASS = 400
ALL_PHOTOS = 2_630_000
SIZES = (0.1, 0.4, 1.0)
_MEASURED = """
import json, sys, time
from pathlib import Path

if __name__ == "__main__":
    from pillsnap.manifest import rows
    from pillsnap.manifest.build import build_manifest

    root, out, photos, classes, workers, reader = sys.argv[1:]
    spent = []

    def timed(*args, read=rows.read_all_labels):
        start = time.perf_counter()
        labels = read(*args)
        spent.append(time.perf_counter() - start)
        return labels

    rows.read_all_labels = timed
    start = time.perf_counter()
    options = {"num_photos": int(photos), "num_classes": int(classes), "num_workers": int(workers) or None,
             "label_reader": reader}
    report = build_manifest(Path(root), Path(out), **options).report
    print(json.dumps({"total_s": time.perf_counter() - start, "labels_s": spent[0], "got": report["got"],
                      "label_files": report["labels"]["files"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--folder", type=Path, help="where to make the tree [default: the system's temporary folder]")
    options = parser.parse_args()
    scale = 10 if options.quick else 1
    folder = Path(tempfile.mkdtemp(prefix="pillsnap-bench-manifest-", dir=options.folder))
    try:
        figures = measure(folder, 1220 // scale, 5000 // scale, 1000 // scale, 100_000 // scale)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, num_drugs: int, num_combinations: int, num_classes: int, num_samples: int) -> dict:
    """Print and return all results. The build samples `num_classes` and `num_samples` (stage 3)."""
    root = folder / "tree"
    figures: dict = {"cores": os.cpu_count(), "sizes": []}
    for part in SIZES:  # the small tree grows into the large one
        grow_tree(root, int(num_drugs * part), int(num_combinations * part))
        figures["sizes"].append(measure_scan(root) | measure_growth(root, folder / "growth", num_samples // 5))
    stage = [
        measure_build(root, folder / f"build-{reader}-{workers}", num_samples, num_classes, workers, reader)
        for reader, workers in (("processes", 0), ("processes", 1), ("processes", 3), ("ray", 0))
    ]
    figures["builds"] = stage
    figures["model"] = {
        name: model_growth(name, figures["sizes"], stage[0].get(name))
        for name in ("best_scan_s", "scan_cpu_s", "rest_s", "cpu_s", "peak_bytes")
    }
    hashes = {tree_hash(path) for path in folder.glob("build-*") if path.is_dir()}
    figures["byte_identical"] = len(hashes) == 1
    print(f"byte-identical with 1, 3 and all cores, and with Ray Data: {figures['byte_identical']}")
    figures["validate"] = measure_validate(root, folder / "build-processes-0")
    return figures


def measure_growth(root: Path, out: Path, num_samples: int) -> dict:
    """Best of three builds with the same sample size for every tree, so that only the tree differs."""
    builds = [measure_build(root, out, num_samples, num_samples // 200, 0, "processes", quiet=True) for _ in range(3)]
    return {name: min(build[name] for build in builds) for name in ("rest_s", "cpu_s", "peak_bytes")}


def model_growth(name: str, sizes: list[dict], at_stage_3: float | None) -> dict:
    """Linear model from the two smaller trees, checked on the largest, and extrapolated to the whole data set.

    `at_stage_3`: the value of the stage 3 build from the largest tree, the start of the extrapolation.
    """
    first, second, last = sizes
    slope = (second[name] - first[name]) / (second["photos"] - first["photos"])
    predicted = second[name] + slope * (last["photos"] - second["photos"])
    per_photo = (last[name] - first[name]) / (last["photos"] - first["photos"])
    start = last[name] if at_stage_3 is None else at_stage_3
    whole = start + per_photo * (ALL_PHOTOS - last["photos"])
    scale, unit = (2**30, "GiB") if name == "peak_bytes" else (1, "s")
    print(
        f"growth of {name}: trees of {first['photos']:,} and {second['photos']:,} photos predict "
        f"{predicted / scale:.2f} {unit} for {last['photos']:,}, measured {last[name] / scale:.2f} "
        f"({last[name] / predicted - 1:+.0%}); stage 3 from {ALL_PHOTOS:,}: {whole / scale:.2f} {unit}"
    )
    return {"predicted": predicted, "measured": last[name], "per_photo": per_photo, "all_photos": whole}


def measure_scan(root: Path) -> dict:
    """Median of three, scan and find in turn, after a first round that warms the file system's cache."""
    from pillsnap.manifest.scan import scan

    times: dict[str, list[float]] = {"scan": [], "find": []}
    cpu: dict[str, list[float]] = {"scan": [], "find": []}
    photos = 0
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, output = timed(
            lambda: subprocess.run(f"find '{root}' -name '*.png' | wc -l", shell=True, capture_output=True, check=True)
        )
        times["find"].append(seconds)
        cpu["find"].append(cpu_since(before, resource.RUSAGE_CHILDREN))
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds, found = timed(lambda: scan(root))
        times["scan"].append(seconds)
        cpu["scan"].append(cpu_since(before, resource.RUSAGE_SELF))
        photos = len(found)
        assert photos == int(output.stdout), (photos, output.stdout)
    scan_s, find_s = (sorted(times[name][1:])[1] for name in ("scan", "find"))  # medians
    scan_cpu_s, find_cpu_s = (sorted(cpu[name][1:])[1] for name in ("scan", "find"))
    print(
        f"scan of {photos:,} photos: {scan_s:.2f} s; find: {find_s:.2f} s; ratio {scan_s / find_s:.2f} (limit 2); "
        f"CPU {scan_cpu_s:.2f} s against {find_cpu_s:.2f} s"
    )
    # The growth model takes the best: other work on the machine only adds time.
    return {
        "photos": photos,
        "best_scan_s": min(times["scan"]),
        "scan_s": scan_s,
        "find_s": find_s,
        "ratio": scan_s / find_s,
        "scan_cpu_s": scan_cpu_s,
        "find_cpu_s": find_cpu_s,
    }


def cpu_since(before: resource.struct_rusage, who: int) -> float:
    now = resource.getrusage(who)
    return now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime


def measure_build(
    root: Path, out: Path, num_samples: int, num_classes: int, num_workers: int, reader: str, *, quiet: bool = False
) -> dict:
    """Build in a separate process, to measure its peak memory."""
    script = out.with_suffix(".py")
    script.write_text(_MEASURED)
    arguments = [str(root), str(out), str(num_samples), str(num_classes), str(num_workers), reader]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        peak, cpu_s = watch(process)
        output = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, command
    figures = json.loads(output.splitlines()[-1]) | {"workers": num_workers or os.cpu_count(), "peak_bytes": peak}
    figures |= {"reader": reader, "cpu_s": cpu_s, "rest_s": figures["total_s"] - figures["labels_s"]}
    if not quiet:
        figures["bare_labels_s"] = bare_label_loop(root, out)
        print(
            f"build of {figures['got']['num_photos']:,} photos ({figures['got']['num_combination']:,} combinations, "
            f"{figures['got']['val_fraction']:.1%} val), {figures['got']['num_classes']:,} classes: "
            f"{figures['total_s']:.1f} s, of which {figures['label_files']:,} labels {figures['labels_s']:.1f} s with "
            f"{figures['workers']} {reader} (bare loop {figures['bare_labels_s']:.1f} s), the rest "
            f"{figures['rest_s']:.1f} s (limit 60 s); {cpu_s:.1f} s of CPU; "
            f"peak memory {peak / 2**30:.2f} GiB, all processes (limit 2)"
        )
    return figures


def watch(process: subprocess.Popen) -> tuple[int, float]:
    """Peak resident memory in bytes, and CPU seconds, of a process and its descendants, polled 20 times per second."""
    import psutil

    peak, spent = 0, {}
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            resident = 0
            for member in [parent, *parent.children(recursive=True)]:
                resident += member.memory_info().rss
                times = member.cpu_times()
                spent[member.pid] = times.user + times.system
            peak = max(peak, resident)
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    return peak, sum(spent.values())


def bare_label_loop(root: Path, out: Path) -> float:
    """Seconds to open and parse the labels of all photos of the manifest, in one process."""
    from pillsnap.manifest.aihub import label_paths
    from pillsnap.manifest.table import read_manifest

    paths = []
    for photo in read_manifest(out)["image_path"].to_pylist():
        folder, _, name = photo.rpartition("/")
        paths += label_paths(folder, name.partition("_")[0], name.rpartition(".")[0])

    def loop() -> None:
        for path in paths:
            with open(f"{root}/{path}", "rb") as file:
                json.loads(file.read())

    return timed(loop)[0]


def measure_validate(root: Path, out: Path) -> dict:
    """Audit without decoding, compared with a loop that reads the first 4 KiB of each photo."""
    from pillsnap.manifest.audit.audit import audit
    from pillsnap.manifest.table import read_manifest

    paths = read_manifest(out)["image_path"].to_pylist()

    def loop() -> None:
        for path in paths:
            with open(f"{root}/{path}", "rb") as file:
                file.read(4096)

    bare_s, _ = timed(loop)
    seconds, report = timed(lambda: audit(out, root))
    errors = [found.kind for found in report.findings if found.severity == "error"]
    shared = {"group_overlap", "duplicate_across_split"} & set(errors)
    print(
        f"validate of {len(paths):,} rows: {seconds:.1f} s (limit 60 s); bare loop {bare_s:.1f} s; "
        f"errors: {errors or 'none'}; groups or content hashes on both sides of the split: {sorted(shared) or 'none'}"
    )
    return {"rows": len(paths), "validate_s": seconds, "bare_s": bare_s, "errors": errors}


def grow_tree(root: Path, num_drugs: int, num_combinations: int) -> None:
    """Create or extend the tree: drugs in 81 parts, combinations in 8."""
    for number in range(num_drugs):
        code = f"K-{number * 7:06d}"
        labels = root / f"train/labels/single/TL_{number % 81 + 1}_single/{code}_json"
        if labels.exists():
            continue
        photos = root / f"train/images/single/TS_{number % 81 + 1}_single/{code}"
        write_photos(photos, code, VIEWS[number % 32 :][:PHOTOS_PER_CLASS])
        original = root / f"{code}.json"
        original.write_text(json.dumps(label(code)), encoding="utf-8")
        link_labels(labels, original, [path.stem for path in photos.iterdir()])
    for number in range(num_combinations):
        # About a hundred drugs are in combinations, as in the real set.
        drugs = random.Random(number).sample(range(min(100, num_drugs)), 3 + number % 2)
        codes = [f"K-{drug * 7:06d}" for drug in sorted(drugs)]
        prefix = f"K-{'-'.join(code[2:] for code in codes)}"
        photos = root / f"train/images/combination/TS_{number % 8 + 1}_combo/{prefix}"
        if photos.exists():
            continue
        write_photos(photos, prefix, [f"0_2_0_2_{latitude}_000_200" for latitude in (70, 75, 90)])
        for code in codes:
            folder = root / f"train/labels/combination/TL_{number % 8 + 1}_combo/{prefix}_json/{code}"
            link_labels(folder, root / f"{code}.json", [path.stem for path in photos.iterdir()])


def write_photos(folder: Path, prefix: str, views: list[str]) -> None:
    """PNG headers of 976 x 1280, followed by unique bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 976, 1280, 8, 2, 0, 0, 0) + bytes(4)
    for view in views:
        name = f"{prefix}_{view}.png"
        with open(f"{folder}/{name}", "wb") as file:
            file.write(header + name.encode() + b"\0\0\0\0IEND\xaeB`\x82")


def link_labels(folder: Path, original: Path, stems: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem in stems:
        os.link(original, f"{folder}/{stem}.json")


def label(code: str) -> dict:
    """A label document of realistic size."""
    image = {"file_name": f"{code}.png", "width": 976, "height": 1280, "drug_N": code, "dl_mapping_code": code}
    image |= {"dl_name": f"시험정 {code}", "dl_company": "시험제약", "di_edi_code": "642200750,A13100741"}
    image |= {f"field_{number}": "흰색의 원형 정제" for number in range(25)}
    annotation = {"area": 44100, "iscrowd": 0, "bbox": [390, 540, 210, 210], "category_id": 1, "id": 1, "image_id": 1}
    categories = [{"supercategory": "pill", "id": 1, "name": "Drug"}]
    return {"images": [image], "annotations": [annotation | {"segmentation": []}], "categories": categories}


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
