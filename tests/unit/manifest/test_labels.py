from __future__ import annotations

import json
from pathlib import Path

import pytest

from pillsnap.manifest.labels import Label, parse_label, read_label, read_labels

CODE = "K-010224"


def document(bbox: object = (1, 2, 3, 4), **image: object) -> dict:
    image = {"width": 976, "height": 1280, "dl_mapping_code": CODE, "dl_name": "약", "di_edi_code": "2,1"} | image
    return {"images": [image], "annotations": [{"bbox": list(bbox) if isinstance(bbox, tuple) else bbox}]}


def encoded(content: object, encoding: str = "utf-8") -> bytes:
    return json.dumps(content, ensure_ascii=False).encode(encoding)


def test_parse_good_label() -> None:
    label = parse_label(encoded(document()), CODE)
    assert label == Label("", (1.0, 2.0, 3.0, 4.0), 976, 1280, "약", ("1", "2"))


def test_a_box_that_repeats_is_one_box() -> None:
    assert parse_label(encoded(document() | {"annotations": [{"bbox": [1, 2, 3, 4]}] * 2}), CODE).box == (1, 2, 3, 4)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16"])
def test_encodings(encoding: str) -> None:
    assert parse_label(encoded(document(), encoding), CODE).name == "약"


def test_hangul_is_normalised_to_nfc() -> None:
    assert parse_label(encoded(document(dl_name="\u1112\u1161\u11ab")), CODE).name == "한"


def test_numbers_may_be_strings() -> None:
    label = parse_label(encoded(document(("1", "2.5", 3, 4), width="976", height=1280.0)), CODE)
    assert (label.box, label.width, label.height) == ((1.0, 2.5, 3.0, 4.0), 976, 1280)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "broken"),
        (b'{"images": [{"width": 976', "broken"),
        (b"[]", "broken"),
        (b"\xff\xff\xff", "broken"),
        (encoded({"images": []}), "broken"),
        (encoded({"images": ["x"], "annotations": []}), "broken"),
        (b"[" * 100_000, "broken"),
        (encoded(document() | {"annotations": []}), "no_box"),
        (encoded(document([])), "no_box"),
        (encoded(document((5, 5, 0, 10))), "empty_box"),
        (encoded(document((5, 5, 10, -1))), "empty_box"),
        (encoded(document(("a", 5, 10, 1))), "broken"),
        (b'{"images": [{}], "annotations": [{"bbox": [1, 2, NaN, 4]}]}', "broken"),
        (encoded(document(dl_mapping_code="K-000001")), "other_code"),
        (encoded(document() | {"annotations": [{"bbox": [1, 2, 3, 4]}, {"bbox": [9, 2, 3, 4]}]}), "two_boxes"),
    ],
)
def test_problems_give_no_box(content: bytes, problem: str) -> None:
    label = parse_label(content, CODE)
    assert (label.problem, label.box) == (problem, None)


def test_drug_number_replaces_a_missing_mapping_code() -> None:
    assert parse_label(encoded(document(dl_mapping_code=None, drug_N="K-000001")), CODE).problem == "other_code"
    assert parse_label(encoded(document(dl_mapping_code=None, drug_N=CODE)), CODE).problem == ""


def test_absurd_sizes_are_unknown() -> None:
    assert parse_label(encoded(document(width=10**12, height=-4)), CODE)[2:4] == (0, 0)
    assert parse_label(b'{"images": [{"width": 1e999}], "annotations": []}', CODE).width == 0


def test_read_labels_keeps_the_order_and_never_raises(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_bytes(encoded(document()))
    (tmp_path / "folder.json").mkdir()
    labels = read_labels(str(tmp_path), [("missing.json", CODE), ("good.json", CODE), ("folder.json", CODE)])
    assert [label.problem for label in labels] == ["missing", "", "not_a_file"]


def test_huge_label_file_is_refused_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert read_label(str(path), CODE).problem == "broken"
