"""Folders as labelling tools export them: CVAT's as documented, the others' as they are known to be laid out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.manifest.formats.conftest import Load, save_photo, save_text

Write = Callable[[Path], dict[str, Any]]
NAMES = ["pill a", "pill b"]
BOX, ROW = [40.0, 90.0, 20.0, 20.0], "1 0.5 0.5 0.2 0.1\n"
HASH = "0123456789abcdef0123456789abcdef"
VOC_BOX = "<bndbox><xmin>40</xmin><ymin>90</ymin><xmax>60</xmax><ymax>110</ymax></bndbox>"
HALF = {"val_fraction": 0.5}
"""For exports without splits."""
LEFT = {
    "cvat_yolo_1_1": ["train.txt", "valid.txt"],
    "cvat_voc": ["labelmap.txt"],
    "roboflow_darknet": ["train/_darknet.labels", "valid/_darknet.labels"],
    "fiftyone_yolov4": ["images.txt"],
}
"""Lists that state what the folders or labels state as well: reported, not read."""


def yolo_pairs(root: Path, photo: str, label: str, *parts: str, stem: str = "{}1") -> None:
    for part in parts:
        save_photo(root / photo.format(part) / f"{stem.format(part)}.jpg")
        save_text(root / label.format(part) / f"{stem.format(part)}.txt", ROW)


def coco_text(file_names: list[str], first_category: int = 1, extra: tuple[str, ...] = ()) -> str:
    images = [{"id": i, "file_name": name, "width": 100, "height": 200} for i, name in enumerate(file_names)]
    names = [*extra, *NAMES]
    categories = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(names, first_category)]
    category = first_category + len(names) - 1
    notes = [
        {"id": i, "image_id": i, "category_id": category, "bbox": BOX, "area": 400, "segmentation": [], "iscrowd": 0}
        for i in range(len(images))
    ]
    document = {"info": {}, "licenses": [], "images": images, "annotations": notes, "categories": categories}
    return json.dumps(document)


def voc_text(name: str, folder: str = "") -> str:
    return (
        f"<annotation><folder>{folder}</folder><filename>{name}</filename><path>{name}</path><source><database>x"
        "</database></source><size><width>100</width><height>200</height><depth>3</depth></size><segmented>0"
        f"</segmented><object><name>pill b</name><pose>Unspecified</pose><truncated>0</truncated>{VOC_BOX}</object>"
        "</annotation>"
    )


def cvat_text(names: list[str], subsets: list[str]) -> str:
    labels = "".join(f"<label><name>{name}</name><color>#ff0000</color></label>" for name in NAMES)
    images = "".join(
        f'<image id="{i}" name="{name}" subset="{subset}" task_id="3" width="100" height="200">'
        '<box label="pill b" source="manual" occluded="0" xtl="40.00" ytl="90.00" xbr="60.00" ybr="110.00" '
        'z_order="0"></box></image>'
        for i, (name, subset) in enumerate(zip(names, subsets, strict=True))
    )
    meta = f"<meta><project><labels>{labels}</labels></project></meta>"
    return f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{meta}{images}</annotations>'


def cvat_ultralytics(root: Path) -> dict[str, Any]:
    yolo_pairs(root, "images/{}", "labels/{}", "train", "val")
    for part in ("train", "val"):
        save_text(root / f"{part}.txt", f"images/{part}/{part}1.jpg\n")
    save_text(root / "data.yaml", "names:\n  0: pill a\n  1: pill b\npath: .\ntrain: train.txt\nval: val.txt\n")
    return {}


def cvat_ultralytics_project(root: Path) -> dict[str, Any]:
    """Keys are the subsets of the project."""
    yolo_pairs(root, "images/{}", "labels/{}", "Train", "Validation")
    for part in ("Train", "Validation"):
        save_text(root / f"{part}.txt", f"images/{part}/{part}1.jpg\n")
    lists = "Train: Train.txt\nValidation: Validation.txt\n"
    save_text(root / "data.yaml", f"{lists}names:\n  0: pill a\n  1: pill b\npath: .\n")
    return {}


def cvat_yolo_1_1(root: Path) -> dict[str, Any]:
    for part in ("train", "valid"):
        yolo_pairs(root, "obj_{}_data", "obj_{}_data", part)
        save_text(root / f"{part}.txt", f"data/obj_{part}_data/{part}1.jpg\n")
    save_text(root / "obj.names", "pill a\npill b\n")
    save_text(
        root / "obj.data", "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n"
    )
    return {"names": root / "obj.names"}


def cvat_images(root: Path) -> dict[str, Any]:
    for part in ("Train", "Validation"):
        save_photo(root / f"images/{part}/{part}1.jpg")
    save_text(root / "annotations.xml", cvat_text(["Train1.jpg", "Validation1.jpg"], ["Train", "Validation"]))
    return {}


def cvat_coco(root: Path) -> dict[str, Any]:
    for part in ("Train", "Validation"):
        save_photo(root / f"images/{part}/{part}1.jpg")
        save_text(root / f"annotations/instances_{part}.json", coco_text([f"{part}1.jpg"]))
    return {}


def cvat_coco_task(root: Path) -> dict[str, Any]:
    for part in ("a", "b"):
        save_photo(root / f"images/default/{part}.jpg")
    save_text(root / "annotations/instances_default.json", coco_text(["a.jpg", "b.jpg"]))
    return HALF


def cvat_voc(root: Path) -> dict[str, Any]:
    for part in ("a", "b"):
        save_photo(root / f"JPEGImages/{part}.jpg")
        save_text(root / f"Annotations/{part}.xml", voc_text(f"{part}.jpg"))
    save_text(root / "ImageSets/Main/default.txt", "a\nb\n")
    save_text(root / "labelmap.txt", "# label:color_rgb:parts:actions\npill a:128,0,0::\npill b:0,128,0::\n")
    return HALF


def label_studio_yolo(root: Path) -> dict[str, Any]:
    yolo_pairs(root, "images", "labels", "0a1b2c3d-a", "4e5f6a7b-b")
    save_text(root / "classes.txt", "pill a\npill b\n")
    save_text(root / "notes.json", '{"categories": [{"id": 0, "name": "pill a"}], "info": {"year": 2026}}')
    return HALF | {"names": root / "classes.txt"}


def label_studio_coco(root: Path) -> dict[str, Any]:
    names = ["images/0a1b2c3d-a.jpg", "images/4e5f6a7b-b.jpg"]
    for name in names:
        save_photo(root / name)
    save_text(root / "result.json", coco_text(names, 0))
    return HALF


def label_studio_voc(root: Path) -> dict[str, Any]:
    for name in ("0a1b2c3d-a", "4e5f6a7b-b"):
        save_photo(root / f"images/{name}.jpg")
        save_text(root / f"Annotations/{name}.xml", voc_text(name))  # the file name has no ending
    return HALF


def roboflow_yolo(root: Path) -> dict[str, Any]:
    yolo_pairs(root, "{}/images", "{}/labels", "train", "valid", stem=f"{{}}_jpg.rf.{HASH}")
    save_text(root / "README.dataset.txt", "x")
    save_text(root / "README.roboflow.txt", "x")
    splits = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    about = "roboflow:\n  workspace: w\n  project: p\n  version: 1\n  license: MIT\n"
    save_text(root / "data.yaml", f"{splits}\nnc: 2\nnames: ['pill a', 'pill b']\n\n{about}")
    return {}


def roboflow_coco(root: Path) -> dict[str, Any]:
    for part in ("train", "valid"):
        name = f"{part}_jpg.rf.{HASH}.jpg"
        save_photo(root / part / name)
        save_text(root / part / "_annotations.coco.json", coco_text([name], 0, ("pills",)))
    save_text(root / "README.roboflow.txt", "x")
    return {}


def roboflow_voc(root: Path) -> dict[str, Any]:
    for part in ("train", "valid"):
        stem = f"{part}_jpg.rf.{HASH}"
        save_photo(root / part / f"{stem}.jpg")
        save_text(root / part / f"{stem}.xml", voc_text(f"{stem}.jpg"))
    return {}


def roboflow_csv(root: Path) -> dict[str, Any]:
    for part in ("train", "valid"):
        name = f"{part}_jpg.rf.{HASH}.jpg"
        save_photo(root / part / name)
        header = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        save_text(root / part / "_annotations.csv", f"{header}{name},100,200,pill b,40,90,60,110\n")
    return {}


def roboflow_darknet(root: Path) -> dict[str, Any]:
    yolo_pairs(root, "{}", "{}", "train", "valid", stem=f"{{}}_jpg.rf.{HASH}")
    for part in ("train", "valid"):
        save_text(root / part / "_darknet.labels", "pill a\npill b\n")
    return {"names": root / "train/_darknet.labels"}


def fiftyone_yolov5(root: Path) -> dict[str, Any]:
    yolo_pairs(root, "images/{}", "labels/{}", "train", "validation")
    splits = "path: /home/somebody/export\ntrain: ./images/train/\nvalidation: ./images/validation/\n"
    save_text(root / "dataset.yaml", f"names:\n  0: pill a\n  1: pill b\n{splits}")
    return {}


def fiftyone_yolov4(root: Path) -> dict[str, Any]:
    yolo_pairs(root, "data", "data", "a", "b")
    save_text(root / "obj.names", "pill a\npill b\n")
    save_text(root / "images.txt", "data/a1.jpg\ndata/b1.jpg\n")
    return HALF | {"names": root / "obj.names"}


def fiftyone_coco(root: Path) -> dict[str, Any]:
    for part in ("a", "b"):
        save_photo(root / f"data/{part}.jpg")
    save_text(root / "labels.json", coco_text(["a.jpg", "b.jpg"], 0))
    return HALF


def fiftyone_voc(root: Path) -> dict[str, Any]:
    for part in ("a", "b"):
        save_photo(root / f"data/{part}.jpg")
        save_text(root / f"labels/{part}.xml", voc_text(f"{part}.jpg"))
    return HALF


def fiftyone_cvat(root: Path) -> dict[str, Any]:
    for part in ("a", "b"):
        save_photo(root / f"data/{part}.jpg")
    save_text(root / "labels.xml", cvat_text(["a.jpg", "b.jpg"], ["", ""]))
    return HALF


def ultralytics_hub(root: Path) -> dict[str, Any]:
    yolo_pairs(root, "images/{}", "labels/{}", "train", "val")
    splits = "path: pills8 # dataset root dir (optional)\ntrain: images/train # 4 images\nval: images/val\ntest:\n"
    save_text(
        root / "pills8.yaml", f"# comment\n{splits}\nnames:\n  0: pill a\n  1: pill b\n\ndownload: https://x/y.zip\n"
    )
    save_text(root / "labels/train.cache", "x")
    save_text(root / "LICENSE", "x")
    return {}


EXPORTS = [
    cvat_ultralytics, cvat_ultralytics_project, cvat_yolo_1_1, cvat_images, cvat_coco, cvat_coco_task, cvat_voc,
    label_studio_yolo, label_studio_coco, label_studio_voc, roboflow_yolo, roboflow_coco, roboflow_voc, roboflow_csv,
    roboflow_darknet, fiftyone_yolov5, fiftyone_yolov4, fiftyone_coco, fiftyone_voc, fiftyone_cvat, ultralytics_hub,
]  # fmt: skip


@pytest.mark.parametrize("write", EXPORTS)
def test_export_is_read(write: Write, tmp_path: Path, load: Load) -> None:
    options = write(tmp_path / "set")
    found = load(form="auto", **options)
    assert sorted(found.splits.values()) == ["train", "val"]
    if "val_fraction" not in options:
        for path, split in found.splits.items():
            assert path.rpartition("/")[2].lower().startswith(split)
    for row in found.rows.values():
        assert (row["codes"], row["boxes"]) == (["pill b"], [pytest.approx(BOX, abs=1e-5)])
    assert found.problems.get("other_file", []) == LEFT.get(write.__name__, [])
    assert not set(found.problems) - {"classes_without_photo", "listed_split_missing", "other_file"}
