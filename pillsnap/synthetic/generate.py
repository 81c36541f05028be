"""Writes a tree of synthetic pill photographs in the AI Hub layout."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from pillsnap.errors import UserError
from pillsnap.synthetic.catalog import build_catalog
from pillsnap.synthetic.labels import label_json
from pillsnap.synthetic.layout import PhotoPlan, place_pills, plan_photos
from pillsnap.synthetic.render import render_photo

IMAGE_FORMATS = ("png", "jpg")
RECORD_NAME = "synthetic.json"
_MIN_SIDE_PX, _MAX_SIDE_PX = 96, 4096
_CHUNK = 12


@dataclass(frozen=True)
class GeneratedTree:
    """The written tree: `codes` are the sorted K-codes, `num_pills` the labelled pills of all photos."""

    root: Path
    num_photos: int
    num_pills: int
    codes: list[str]
    seconds: float


def generate(
    out: Path,
    *,
    num_classes: int,
    num_singles: int,
    num_combinations: int,
    seed: int = 42,
    frame: tuple[int, int] = (976, 1280),
    image_format: str = "png",
    likeness: str = "easy",
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GeneratedTree:
    """Render `num_singles` photos of one pill and `num_combinations` photos of two to four under `out`.

    `frame` is (width, height) in px; with `likeness` "easy" classes differ in colour or shape,
    with "shared" only in the imprint, with "back" only in that of the back. A photograph depends on the arguments and
    its own file name alone, so the bytes are the same for any `num_workers` (default: every core).
    `progress(done, total)` is called as photos are written.
    `out/synthetic.json` records the arguments and, once all is written, `"complete": true`; running again with the same
    arguments writes the same tree again.

    Raises:
        UserError: an argument is out of range, or `out` holds something else.
    """
    started = time.perf_counter()
    if num_singles == num_combinations == 0:
        raise UserError("num_singles and num_combinations are both 0: ask for at least one photo")
    _check_output(frame, image_format, seed, num_workers)
    catalog = build_catalog(seed, num_classes, likeness)
    plans = plan_photos(catalog, num_singles, num_combinations, seed)
    out = Path(out)
    record = {
        "format": 1,
        "num_classes": num_classes,
        "num_singles": num_singles,
        "num_combinations": num_combinations,
        "seed": seed,
        "frame": list(frame),
        "image_format": image_format,
        "likeness": likeness,
    }
    _claim(out, record)
    draw = partial(_draw_chunk, out=out, frame=frame, suffix=f".{image_format}", seed=seed)
    chunks = [plans[i : i + _CHUNK] for i in range(0, len(plans), _CHUNK)]
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(chunks))
    done = 0
    try:
        for count in map(draw, chunks) if workers == 1 else _in_processes(draw, chunks, workers):
            done += count
            if progress is not None:
                progress(done, len(plans))
        _write_stray_index(out, plans, image_format)
        _write_record(out, record | {"complete": True})
    except BrokenProcessPool as error:
        raise UserError(
            f"a rendering process died after {done} photos, perhaps out of memory: use fewer num_workers"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; free some space or give another folder") from error
    return GeneratedTree(
        root=out,
        num_photos=len(plans),
        num_pills=sum(len(plan.pills) for plan in plans),
        codes=[pill.code for pill in catalog],
        seconds=time.perf_counter() - started,
    )


def _check_output(frame: tuple[int, int], image_format: str, seed: int, num_workers: int | None) -> None:
    if seed < 0:
        raise UserError(f"seed is {seed}: use 0 or more")
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"image_format {image_format!r} is unknown: use one of {', '.join(IMAGE_FORMATS)}")
    if len(frame) != 2 or not all(_MIN_SIDE_PX <= side <= _MAX_SIDE_PX for side in frame):
        raise UserError(f"frame is {frame}: use (width, height) of {_MIN_SIDE_PX} to {_MAX_SIDE_PX} px each")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers is {num_workers}: use 1 or more, or None for every core")


def _claim(out: Path, record: dict) -> None:
    """Mark `out` as a tree of these arguments. Raises UserError unless it is new, empty or such a tree."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            found = _read_record(out)
            if found is None or {key: found.get(key) for key in record} != record:
                raise UserError(f"{out} holds other files or photos made with other arguments: give a new folder")
        _write_record(out, record | {"complete": False})
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; give another folder") from error


def _read_record(out: Path) -> dict | None:
    try:
        record = json.loads((out / RECORD_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) else None


def _write_record(out: Path, record: dict) -> None:
    temporary = out / f".{RECORD_NAME}.partial"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(out / RECORD_NAME)


def _in_processes(draw: Callable[[list[PhotoPlan]], int], chunks: list[list[PhotoPlan]], workers: int) -> Iterator[int]:
    # spawn: a fork would copy locks held by threads of the caller.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for future in as_completed([pool.submit(draw, chunk) for chunk in chunks]):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    cv2.setNumThreads(1)
    # Only the parent handles Ctrl-C: it finishes the current chunks and stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns when the parent is killed, too
    os._exit(1)


def _draw_chunk(plans: list[PhotoPlan], *, out: Path, frame: tuple[int, int], suffix: str, seed: int) -> int:
    for plan in plans:
        photo = render_photo(
            place_pills(plan, frame, seed),
            direction=plan.direction,
            light=plan.light,
            latitude=plan.latitude,
            frame=frame,
            seed=seed,
            stem=plan.stem,
        )
        folder = out / plan.image_dir
        folder.mkdir(parents=True, exist_ok=True)
        (folder / (plan.stem + suffix)).write_bytes(_encode(photo.pixels, suffix))
        for pill, box, label_dir in zip(plan.pills, photo.boxes, plan.label_dirs, strict=True):
            label = label_json(plan, pill, box, frame, suffix, seed)
            (out / label_dir).mkdir(parents=True, exist_ok=True)
            text = json.dumps(label, ensure_ascii=False)
            (out / label_dir / f"{plan.stem}.json").write_text(text, encoding="utf-8")
    return len(plans)


def _encode(pixels: np.ndarray, suffix: str) -> bytes:
    if suffix == ".jpg":
        flags = [cv2.IMWRITE_JPEG_QUALITY, 95]
    else:
        # For noise, one row filter and Huffman coding only is twice as fast as the default, and smaller.
        flags = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
        if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # OpenCV before 4.12 always tries every filter
            flags += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG]
    encoded, data = cv2.imencode(suffix, pixels, flags)
    assert encoded, suffix
    return data.tobytes()


def _write_stray_index(out: Path, plans: list[PhotoPlan], image_format: str) -> None:
    """Write a contact sheet as AI Hub has in some combination folders; readers must skip it."""
    plan = next((plan for plan in plans if len(plan.pills) > 1), None)
    if plan is None:
        return
    folder = out / plan.image_dir
    data = np.frombuffer((folder / f"{plan.stem}.{image_format}").read_bytes(), np.uint8)
    photo = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert photo is not None, plan.stem
    small = cv2.resize(photo, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    (folder / f"{folder.name}_index.png").write_bytes(_encode(small, ".png"))
