"""Label Studio JSON: tasks with results in percent of the photo; exported also with predictions as pre-annotations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pillsnap.errors import UserError
from pillsnap.files import write_json
from pillsnap.manifest.formats.coco import read_json
from pillsnap.manifest.formats.folder import Folder
from pillsnap.manifest.formats.photo import Box, LabelledPhoto, ReadFolder
from pillsnap.manifest.formats.records import Record, attach, number, pixel_box, whole
from pillsnap.observe.work_progress import Progress, unseen

_LOCAL_FILES = "/data/local-files/?d="
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
_RECTANGLE = "rectanglelabels"


def is_label_studio(document: Any) -> bool:
    """Whether a parsed JSON file is a list of Label Studio's tasks, in its JSON or JSON-MIN form."""
    return (
        isinstance(document, list)
        and bool(document)
        and isinstance(document[0], dict)
        and (isinstance(document[0].get("data"), dict) or ("image" in document[0] and "id" in document[0]))
    )


def read_label_studio(photos: Folder, labels: Folder, progress: Progress = unseen) -> ReadFolder:
    """Labelled photos of all Label Studio files of `labels`. Tasks that nobody labelled, or several people, are
    reported.
    """
    records: list[Record] = []
    for path in labels.paths():
        document: Any = read_json(labels, path) if path.lower().endswith(".json") else None
        if is_label_studio(document):
            labels.use(path)
            for position, task in enumerate(document, start=1):
                record = _record(task, f"{path}: task {task.get('id', position)}", photos)
                records += [record] if record is not None else []
    if not records:
        raise UserError(f"{labels.root}: no labelled task of Label Studio: export as JSON or JSON-MIN")
    names = sorted({name for record in records for name, _ in record.pills})
    return attach(photos, records, names, "label-studio", progress)


def _record(task: dict, where: str, photos: Folder) -> Record | None:
    data = task.get("data", task)
    image = next((value for value in (data.get("image"), *data.values()) if _is_path(value)), "")
    if not image:
        raise UserError(f"{where}: names no photo")
    done = [one for one in task.get("annotations", ()) if not one.get("was_cancelled")]
    chosen = [one for one in done if one.get("ground_truth")] or done
    if "annotations" in task and not chosen:
        photos.problems.add("task_not_labelled", f"{where}: {image}")
        return None
    if len(chosen) > 1:
        photos.problems.add("task_labelled_twice", f"{where}: {image}")
        return None
    path = unquote(image.partition("?d=")[2] or image.partition("?")[0])
    name = path.rpartition("/")[2]
    record = Record([path.lstrip("/"), name, _UPLOAD_PREFIX.sub("", name)], where)
    listed = next((value for value in task.values() if isinstance(value, list)), [])
    results = chosen[0].get("result", []) if chosen else listed
    for result in results:
        _add(record, result, result.get("value", result), where, photos)
    return record


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "." in value.rpartition("/")[2]


def _add(record: Record, result: dict, value: dict, where: str, photos: Folder) -> None:
    names = value.get(_RECTANGLE)
    if not names:
        photos.problems.add("shape_not_read", f"{where}: {result.get('type', 'result without a label')}")
        return
    width, height = whole(result.get("original_width")), whole(result.get("original_height"))
    if not width or not height:
        raise UserError(f"{where}: a result has no original_width and original_height")
    record.width, record.height = width, height
    x, y, w, h = (number(value.get(key), where) for key in ("x", "y", "width", "height"))
    box = _turned(x * width / 100, y * height / 100, w * width / 100, h * height / 100, value.get("rotation"), where)
    record.pills += [(str(name).strip(), box) for name in names]


def _turned(x: float, y: float, w: float, h: float, rotation: object, where: str) -> Box | None:
    """The bounding box of a rectangle turned about its upper left corner."""
    degrees = number(rotation or 0, where)
    if not degrees:
        return pixel_box(x, y, w, h, where)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    xs = [x + a * cos - b * sin for a, b in ((0, 0), (w, 0), (w, h), (0, h))]
    ys = [y + a * sin + b * cos for a, b in ((0, 0), (w, 0), (w, h), (0, h))]
    return pixel_box(min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys), where)


def write_label_studio(
    photos: Sequence[LabelledPhoto],
    out: Path,
    predictions: Mapping[str, list[tuple[str, Box, float]]] | None = None,
) -> None:
    """Write tasks.json, for local storage at the data root, and labels.json, the names of the classes."""
    tasks, names = [], set()
    for photo in photos:
        task: dict[str, Any] = {"data": {"image": _LOCAL_FILES + photo.path, "split": photo.split}}
        boxed = [(name, box, None) for name, box in zip(photo.names, photo.boxes, strict=True) if box is not None]
        found = (predictions or {}).get(photo.path, [])
        names |= {name for name, *_ in [*boxed, *found]}
        if boxed:
            task["annotations"] = [{"result": [_result(photo, *pill) for pill in boxed]}]
        if predictions is not None:
            score = min((score for *_, score in found), default=0.0)
            results = [_result(photo, *pill) for pill in found]
            task["predictions"] = [{"model_version": "pillsnap", "score": score, "result": results}]
        tasks.append(task)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "tasks.json", tasks)
    write_json(out / "labels.json", sorted(names))


def _result(photo: LabelledPhoto, name: str, box: Box, score: float | None) -> dict[str, Any]:
    x, y, w, h = box
    value = {
        "x": 100 * x / photo.width, "y": 100 * y / photo.height, "width": 100 * w / photo.width,
        "height": 100 * h / photo.height, "rotation": 0, _RECTANGLE: [name],
    }  # fmt: skip
    result = {
        "type": _RECTANGLE, "from_name": "label", "to_name": "image", "original_width": photo.width,
        "original_height": photo.height, "value": value,
    }  # fmt: skip
    return result if score is None else result | {"score": score}
