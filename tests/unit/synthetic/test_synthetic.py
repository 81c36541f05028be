"""Synthetic photographs: bytes, boxes, labels, names, counts and errors."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pillsnap.errors import UserError
from pillsnap.synthetic import GeneratedTree, generate
from pillsnap.synthetic.catalog import CLASSES_PER_GROUP, MAX_CLASSES, Pill, build_catalog
from pillsnap.synthetic.labels import label_json
from pillsnap.synthetic.layout import VIEWS_PER_CLASS, place_pills, plan_photos
from pillsnap.synthetic.render import Placement, render_photo

FRAME = (244, 320)
STEM = re.compile(r"K-\d{6}(-\d{6}){0,3}_0_2_(?P<direction>[01])_(?P<light>[012])_(60|70|75|90)_(?P<lon>\d{3})_200")


def photos(root: Path) -> list[Path]:
    return sorted(path for path in (root / "train/images").rglob("*.png") if not path.name.endswith("index.png"))


def labels(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted((root / "train/labels").rglob("*.json"))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> GeneratedTree:
    root = tmp_path_factory.mktemp("synthetic")
    return generate(root, num_classes=5, num_singles=32, num_combinations=8, seed=3, frame=FRAME, num_workers=1)


def test_counts_equal_the_arguments(tree: GeneratedTree) -> None:
    singles = [path for path in photos(tree.root) if "/single/" in path.as_posix()]
    combinations = [path for path in photos(tree.root) if "/combination/" in path.as_posix()]
    assert (len(singles), len(combinations), tree.num_photos) == (32, 8, 40)
    per_class = Counter(path.parent.name for path in singles)
    assert sorted(per_class) == tree.codes
    assert sorted(per_class.values()) == [6, 6, 6, 7, 7]
    assert len(labels(tree.root)) == tree.num_pills == 32 + sum(path.name.count("-") for path in combinations)
    assert sorted(Counter(path.parent.name for path in combinations).values()) == [2, 3, 3]
    assert json.loads((tree.root / "synthetic.json").read_text())["complete"] is True


def test_folders_and_names_follow_ai_hub(tree: GeneratedTree) -> None:
    image = re.compile(r"train/images/(single/TS_\d+_single|combination/TS_\d+_combo)/K-[\d-]+/[^/]+\.png")
    folders = set()
    for path in photos(tree.root):
        assert STEM.fullmatch(path.stem), path.name
        assert image.fullmatch(path.relative_to(tree.root).as_posix())
        assert path.stem.startswith(path.parent.name + "_")
        folders.add(path.parent.parent.name)
    assert folders == {f"TS_{n}_single" for n in (1, 2, 3, 4)} | {"TS_1_combo", "TS_2_combo"}
    for path, label in labels(tree.root):
        code = label["images"][0]["dl_mapping_code"]
        parts = path.relative_to(tree.root / "train/labels").parts
        folder = parts[1].replace("TL_", "TS_")
        name = path.stem.split("_")[0]
        expected = (name + "_json",) if parts[0] == "single" else (name + "_json", code)
        assert parts[2:-1] == expected
        assert (tree.root / "train/images" / parts[0] / folder / name / f"{path.stem}.png").is_file()
    assert len(list(tree.root.rglob("*index.png"))) == 1


def test_labels_agree_with_file_name_and_image(tree: GeneratedTree) -> None:
    for path, label in labels(tree.root):
        image, annotation = label["images"][0], label["annotations"][0]
        view = STEM.fullmatch(path.stem)
        assert view is not None
        assert image["file_name"] == path.stem + ".png"
        assert (image["width"], image["height"]) == FRAME
        assert image["dl_mapping_code"] == image["drug_N"]
        assert image["dl_mapping_code"].removeprefix("K-") in path.stem
        assert image["drug_dir"] == ("앞면", "뒷면")[int(view["direction"])]
        assert image["light_color"] == ("전구색", "주광색", "주백색")[int(view["light"])]
        assert f"_{image['camera_la']}_{image['camera_lo']:03d}_200" in path.stem
        assert re.fullmatch(r"((\d{9}|A\d{8})(,|$)){0,3}", image["di_edi_code"])
        assert re.search("[가-힣]", unicodedata.normalize("NFC", image["dl_name"]))
        assert annotation["category_id"] == label["categories"][0]["id"] == 1
        assert annotation["segmentation"] == []
        x, y, w, h = annotation["bbox"]
        assert all(type(value) is int for value in annotation["bbox"])
        assert annotation["area"] == w * h > 400
        assert x >= 0 <= y
        assert x + w <= FRAME[0]
        assert y + h <= FRAME[1]


def test_label_types_vary_as_in_ai_hub() -> None:
    catalog = build_catalog(1, 40, "easy")
    plans = plan_photos(catalog, 200, 0, 1)
    images = [label_json(p, p.pills[0], (0, 0, 9, 9), FRAME, ".png", 1)["images"][0] for p in plans]
    assert {type(image["item_seq"]) for image in images} == {int, str}
    for field in ("leng_long", "leng_short", "thick"):
        assert {type(image[field]) for image in images} == {float, str}
    assert {image["di_edi_code"].count(",") for image in images} == {0, 1, 2}
    assert "" in {image["di_edi_code"] for image in images}
    assert {unicodedata.is_normalized("NFC", image["dl_name"]) for image in images} == {True, False}


def test_combination_boxes_do_not_overlap(tree: GeneratedTree) -> None:
    boxes: dict[str, list[list[int]]] = {}
    for path, label in labels(tree.root):
        boxes.setdefault(path.stem, []).append(label["annotations"][0]["bbox"])
    for stem, found in boxes.items():
        assert len(found) == stem.split("_")[0].count("-")
        for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(found, 2):
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_boxes_are_tight_around_visible_pills(tmp_path: Path) -> None:
    generate(tmp_path / "t", num_classes=12, num_singles=60, num_combinations=6, seed=5, frame=FRAME, num_workers=1)
    worst, measured = 0, 0
    for path, label in labels(tmp_path / "t"):
        image = label["images"][0]
        if (
            image["color_class1"] not in ("빨강", "파랑", "초록", "보라", "청록", "노랑", "주황")
            or image["color_class2"]
        ):
            continue
        picture = next((tmp_path / "t").rglob(path.stem + ".png"))
        pixels = cv2.GaussianBlur(cv2.imread(str(picture)), (3, 3), 0).astype(np.float32)
        # Shadows and paper are grey up to the colour of the light; the pill is not.
        pixels /= np.median(pixels, axis=(0, 1))
        coloured = (pixels.max(-1) - pixels.min(-1)) / pixels.max(-1) > 0.2
        x, y, w, h = label["annotations"][0]["bbox"]
        margin = 6
        left, top = max(x - margin, 0), max(y - margin, 0)
        window = coloured[top : y + h + margin, left : x + w + margin].astype(np.uint8)
        seen_x, seen_y, seen_w, seen_h = cv2.boundingRect(window)
        seen = np.array([left + seen_x, top + seen_y, left + seen_x + seen_w, top + seen_y + seen_h])
        worst = max(worst, int(np.abs(seen - (x, y, x + w, y + h)).max()))
        measured += 1
    assert measured >= 25
    assert worst <= 2


def test_bytes_do_not_depend_on_workers_or_order(tmp_path: Path, tree: GeneratedTree) -> None:
    reported: list[tuple[int, int]] = []
    generate(
        tmp_path / "two",
        num_classes=5,
        num_singles=32,
        num_combinations=8,
        seed=3,
        frame=FRAME,
        num_workers=2,
        progress=lambda done, total: reported.append((done, total)),
    )
    assert digests(tmp_path / "two") == digests(tree.root)
    assert reported[-1] == (40, 40)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)


def test_same_arguments_write_the_same_tree_again_and_others_are_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"num_classes": 2, "num_singles": 2, "num_combinations": 1, "frame": FRAME}
    generate(tmp_path / "a", **arguments)
    before = digests(tmp_path / "a")
    generate(tmp_path / "a", **arguments)
    assert digests(tmp_path / "a") == before
    with pytest.raises(UserError, match="other arguments"):
        generate(tmp_path / "a", **arguments, seed=1)
    generate(tmp_path / "b", **arguments, seed=1)
    assert not {*before.values()} & {*digests(tmp_path / "b").values()}


def test_jpeg_tree(tmp_path: Path) -> None:
    tree = generate(
        tmp_path, num_classes=2, num_singles=4, num_combinations=1, frame=(320, 244), image_format="jpg", num_workers=1
    )
    found = sorted(tmp_path.rglob("*.jpg"))
    assert len(found) == tree.num_photos == 5
    assert cv2.imread(str(found[0])).shape == (244, 320, 3)


def test_full_size_photos_have_realistic_file_sizes(tmp_path: Path) -> None:
    generate(tmp_path, num_classes=4, num_singles=2, num_combinations=1, num_workers=1)
    sizes = [path.stat().st_size for path in photos(tmp_path)]
    assert len(sizes) == 3
    assert 0.7e6 <= min(sizes) <= max(sizes) <= 1.8e6
    sides = [max(label["annotations"][0]["bbox"][2:]) for _, label in labels(tmp_path)]
    assert 130 <= min(sides) <= max(sides) <= 380


def test_views_of_a_class_are_different_and_evenly_spread() -> None:
    catalog = build_catalog(0, 2, "easy")
    plans = [plan for plan in plan_photos(catalog, 2 * VIEWS_PER_CLASS, 0, 0) if plan.pills[0] is catalog[0]]
    assert len({plan.stem for plan in plans}) == len(plans) == 864
    assert len({plan.longitude for plan in plans}) == 36
    first = plans[:48]
    assert set(Counter((plan.direction, plan.light, plan.latitude) for plan in first).values()) == {2}


def test_photos_of_a_combination_share_one_arrangement() -> None:
    catalog = build_catalog(0, 6, "easy")
    first, second, third, other = plan_photos(catalog, 0, 4, 0)
    assert [plan.latitude for plan in (first, second, third)] == [70, 75, 90]
    assert place_pills(first, FRAME, 0) == place_pills(third, FRAME, 0)
    assert first.pills != other.pills


def test_latitude_foreshortens_and_light_tints() -> None:
    pill = next(pill for pill in build_catalog(0, 12, "easy") if pill.look.shape == "원형")

    def draw(latitude: int, light: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        place = Placement(pill, (122.0, 160.0), 30.0)
        photo = render_photo([place], direction=0, light=light, latitude=latitude, frame=FRAME, seed=0, stem="K-000001")
        return photo.pixels, photo.boxes[0]

    (_, flat), (_, low) = draw(90, 2), draw(60, 2)
    assert flat[2] == low[2]
    assert abs(flat[2] - flat[3]) <= 1
    px_per_mm = FRAME[0] / 48.8
    assert flat[2] == pytest.approx(pill.look.long_mm * px_per_mm, abs=3)
    assert low[3] < flat[3] * 0.98
    blue, red = ([float(draw(90, light)[0][..., channel].mean()) for light in (0, 1, 2)] for channel in (0, 2))
    warmth = [r / b for r, b in zip(red, blue, strict=True)]
    assert warmth[0] > warmth[2] + 0.05 > warmth[1] + 0.1


def imprint_difference(pill: Pill, direction: int, other: Pill, other_direction: int) -> float:
    pictures = []
    for one, side in ((pill, direction), (other, other_direction)):
        place = Placement(one, (122.0, 160.0), 0.0)
        photo = render_photo([place], direction=side, light=1, latitude=90, frame=FRAME, seed=0, stem="K-000001")
        pictures.append(photo.pixels[130:190, 92:152].astype(np.float32))
    return float(np.abs(pictures[0] - pictures[1]).mean())


def test_shared_classes_differ_only_in_the_imprint() -> None:
    groups = Counter((pill.look.shape, pill.look.colour, pill.look.long_mm) for pill in build_catalog(2, 24, "shared"))
    assert set(groups.values()) == {CLASSES_PER_GROUP}
    one, other = [
        pill for pill in build_catalog(2, 24, "shared") if pill.look == build_catalog(2, 1, "shared")[0].look
    ][:2]
    assert len({*one.prints, *other.prints}) == 4
    assert imprint_difference(one, 0, one, 0) == 0
    assert imprint_difference(one, 0, other, 0) > 2
    assert imprint_difference(one, 0, one, 1) > 2


def test_backs_tell_apart_classes_of_blank_fronts() -> None:
    shared, pills = build_catalog(2, 24, "shared"), build_catalog(2, 24, "back")
    assert [pill.look for pill in pills] == [pill.look for pill in shared]
    assert [pill.prints for pill in pills] == [("", pill.prints[1]) for pill in shared]
    assert not any(front for pill in pills for front in pill.scored)
    one, other = [pill for pill in pills if pill.look == pills[0].look][:2]
    assert imprint_difference(one, 0, other, 0) < 1 < 2 < imprint_difference(one, 1, other, 1)


def test_easy_classes_differ_in_shape_or_colour() -> None:
    looks = {(pill.look.shape, pill.look.colour) for pill in build_catalog(2, 60, "easy")}
    assert len(looks) == 60


@pytest.mark.parametrize("likeness", ["easy", "shared"])
def test_a_larger_catalog_contains_the_smaller(likeness: str) -> None:
    small, large = build_catalog(9, 7, likeness), build_catalog(9, 300, likeness)
    assert {pill.code: pill for pill in large}.items() >= {pill.code: pill for pill in small}.items()
    assert len({pill.code for pill in large}) == 300
    assert [pill.code for pill in large] == sorted(pill.code for pill in large)
    assert len({(p.look.shape, p.look.colour, p.look.second_colour, side) for p in large for side in p.prints}) == 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": MAX_CLASSES + 1}, "num_classes is"),
        ({"num_singles": 2 * 864 + 1}, "0 to 1728 single views"),
        ({"num_singles": -1}, "num_singles is -1"),
        ({"num_combinations": 4}, "0 to 3 photos"),
        ({"num_combinations": -1}, "num_combinations is -1"),
        ({"num_singles": 0, "num_combinations": 0}, "at least one photo"),
        ({"frame": (50, 320)}, "frame is"),
        ({"frame": (244, 9000)}, "frame is"),
        ({"image_format": "gif"}, "image_format 'gif'"),
        ({"likeness": "same"}, "likeness 'same'"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"num_classes": 2, "num_singles": 2, "num_combinations": 1, "frame": FRAME}
    with pytest.raises(UserError, match=re.escape(message)):
        generate(tmp_path / "out", **(arguments | change))
    assert not (tmp_path / "out").exists()


def test_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        generate(tmp_path, num_classes=1, num_singles=1, num_combinations=0, frame=FRAME)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="cannot write"):
        generate(tmp_path / "mine.txt" / "x", num_classes=1, num_singles=1, num_combinations=0, frame=FRAME)
