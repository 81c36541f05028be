"""Other people's formats: the same two pills from each, recognised untold; the rest is counted or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pillsnap.errors import UserError
from tests.unit.manifest.formats.conftest import ROW, Load, save_photo, save_text

SPLITS = ("train", "val")
PILLS = [("red", [10.0, 20.0, 30.0, 40.0]), ("0123", [50.5, 60.25, 8.0, 4.0])]
SIZE = {"width": 100, "height": 200}


def coco(root: Path, photo: Callable[[str], str]) -> None:
    for split in SPLITS:
        image = {"id": 7, "file_name": photo(split).rpartition("/")[2], **SIZE}
        notes = [{"id": i, "image_id": 7, "category_id": i, "bbox": box} for i, (_, box) in enumerate(PILLS)]
        kinds = [{"id": i, "name": name} for i, (name, _) in enumerate(PILLS)]
        text = json.dumps({"images": [image], "annotations": notes, "categories": kinds})
        save_text(root / f"annotations/instances_{split}2017.json", text)


def voc(root: Path, photo: Callable[[str], str]) -> None:
    for split in SPLITS:
        items = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax>"
            f"<ymax>{y + h}</ymax></bndbox></object>"
            for name, (x, y, w, h) in PILLS
        )
        name = photo(split).rpartition("/")[2]
        text = f"<annotation><filename>{name}</filename><size><width>100</width><height>200</height></size>{items}"
        save_text(root / f"Annotations/{Path(name).stem}.xml", text + "</annotation>")


def cvat(root: Path, photo: Callable[[str], str]) -> None:
    images = "".join(
        f'<image id="0" name="{photo(split)}" subset="{split.title()}" width="100" height="200">'
        + "".join(
            f'<box label="{name}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>' for name, (x, y, w, h) in PILLS
        )
        + "</image>"
        for split in SPLITS
    )
    save_text(root / "annotations.xml", f"<?xml version='1.0'?><annotations>{images}</annotations>")


def label_studio(root: Path, photo: Callable[[str], str]) -> None:
    def result(name: str, box: list[float]) -> dict[str, Any]:
        x, y, w, h = box
        value = {"x": x, "y": y / 2, "width": w, "height": h / 2, "rotation": 0, "rectanglelabels": [name]}
        return {"type": "rectanglelabels", "original_width": 100, "original_height": 200, "value": value}

    tasks = [
        {
            "id": 1,
            "data": {"image": "/data/upload/3/0a1b2c3d-" + photo(split).rpartition("/")[2]},
            "annotations": [{"result": [result(*pill) for pill in PILLS]}, {"was_cancelled": True, "result": []}],
        }
        for split in SPLITS
    ]
    save_text(root / "export.json", json.dumps(tasks))


def csv_boxes(root: Path, photo: Callable[[str], str]) -> None:
    rows = [
        f"{photo(split)},100,200,{name},{x},{y},{x + w},{y + h}" for split in SPLITS for name, (x, y, w, h) in PILLS
    ]
    save_text(root / "labels.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("write", [coco, voc, cvat, label_studio, csv_boxes])
@pytest.mark.parametrize("layout", ["images/{0}/{0}1.jpg", "{0}/{0}1.png"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_format_is_recognised_and_exact(
    tmp_path: Path, load: Load, write: Callable[..., None], layout: str, elsewhere: bool
) -> None:
    photos = tmp_path / "photos" if elsewhere else tmp_path / "set"
    for split in SPLITS:
        save_photo(photos / layout.format(split))
    write(tmp_path / "set", layout.format)
    found = load(form="auto", photos=photos if elsewhere else None)
    form = write.__name__.replace("_", "-")
    assert found.report["notes"][0].startswith(f"format: {form} (")
    assert found.splits == {layout.format(split): split for split in SPLITS}
    for row in found.rows.values():
        assert list(zip(row["codes"], row["boxes"], strict=True)) == PILLS
    assert found.problems == {}
    with pytest.raises(UserError, match="classes that --names has not: 0123"):
        load(form="auto", names=["red", "blue"], photos=photos if elsewhere else None)


def test_several_formats_and_none_are_said(tmp_path: Path, load: Load) -> None:
    root, layout = tmp_path / "set", "images/{0}/{0}1.jpg"
    for split in SPLITS:
        save_photo(root / layout.format(split))
    with pytest.raises(UserError, match="What are the classes called"):
        load(form="auto")
    coco(root, layout.format)
    cvat(root, layout.format)
    with pytest.raises(UserError, match="as cvat and as coco: say which by --format"):
        load(form="auto")
    assert len(load(form="coco").rows) == 2
    save_text(root / "labels/train/train1.txt", ROW)
    with pytest.raises(UserError, match="and as yolo"):
        load(form="auto")
    with pytest.raises(UserError, match="no Pascal VOC file"):
        load(form="voc")


def test_image_folder(tmp_path: Path, load: Load) -> None:
    for split in SPLITS:
        for name in ("red", "blue"):
            save_photo(tmp_path / f"set/{split}/{name}/{split}.jpg")
    found = load(form="auto")
    assert found.rows["train/red/train.jpg"]["codes"] == ["red"]
    assert found.rows["train/red/train.jpg"]["boxes"] == [[0, 0, 100, 200]]
    assert "for classification alone" in found.report["notes"][1]


def test_what_does_not_fit_is_counted(tmp_path: Path, load: Load) -> None:
    root, layout = tmp_path / "set", "images/{0}/{0}1.jpg"
    for split in SPLITS:
        save_photo(root / layout.format(split))
    save_photo(root / "images/train/other.jpg", (60, 50))
    save_photo(root / "images/train/unlabelled.jpg")
    coco(root, layout.format)
    path = root / "annotations/instances_train2017.json"
    document = json.loads(path.read_text())
    document["images"] += [{"id": 8, "file_name": "other.jpg", **SIZE}, {"id": 9, "file_name": "gone.jpg"}]
    document["annotations"] += [
        {"id": 5, "image_id": 7, "category_id": 0, "bbox": [1, 1, 0, 5]},
        {"id": 6, "image_id": 7, "category_id": 0, "bbox": [1, 1, 4, 5], "iscrowd": 1},
        {"id": 7, "image_id": 99, "category_id": 0, "bbox": [1, 1, 4, 5]},
        document["annotations"][0] | {"id": 8},
    ]
    path.write_text(json.dumps(document))
    found = load(form="auto")
    assert {kind: len(listed) for kind, listed in found.problems.items()} == {
        "annotation_without_image": 1, "crowd": 1, "label_without_photo": 1, "no_label_file": 1, "other_size": 1,
        "pill_without_box": 1, "repeated_row": 1,
    }  # fmt: skip
    assert found.rows["images/train/train1.jpg"]["boxes"] == [box for _, box in PILLS] + [None]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xml", "<!DOCTYPE x [<!ENTITY a 'b'>]><annotation>&a;</annotation>", "document type"),
        ("a.xml", "<annotation><object><name>x</name></object>", "not XML"),
        ("a.xml", "<annotation><object><name>x</name><bndbox><xmin>a</xmin></bndbox></object></annotation>", "'a' is"),
        ("b.csv", "filename,class,xmin,ymin,xmax,ymax\na.jpg,x,0.1,0.1,0.2,0.2\n", "seem to be normalised"),
        ("b.csv", "filename,class,xmin,ymin,xmax,ymax\na.jpg,x,1,1,2\n", "row 2: 5 cells, but the header has 6"),
    ],
)  # fmt: skip
def test_malformed_files_are_one_line(tmp_path: Path, load: Load, name: str, text: str, message: str) -> None:
    save_photo(tmp_path / "set/train/a.jpg")
    save_text(tmp_path / "set" / name, text)
    with pytest.raises(UserError, match=message) as error:
        load(form="voc" if name == "a.xml" else "csv-boxes")
    assert "\n" not in str(error.value)
