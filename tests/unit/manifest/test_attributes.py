"""Attributes of labels and tables reach classes.json, and what contradicts is counted and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pillsnap.cli.main import app
from pillsnap.errors import UserError
from pillsnap.manifest.attribute_table import add_attributes, read_attribute_table
from pillsnap.manifest.attributes import Attributes, label_attributes, to_attributes, to_texts
from pillsnap.manifest.build import build_manifest
from pillsnap.manifest.class_facts import class_facts
from pillsnap.manifest.import_csv import import_csv
from pillsnap.manifest.labels import Label
from pillsnap.manifest.table import ClassInfo, read_classes, write_manifest
from pillsnap.synthetic.catalog import build_catalog
from tests.unit.conftest import Tree
from tests.unit.conftest import build_manifest as manifest_of

LOOK = {
    "dl_name_en": "Gana Tab. 5mg", "drug_shape": "원형", "color_class1": "하양", "color_class2": "노랑",
    "print_front": "YH|분할선|LT", "print_back": "", "leng_long": "9.10", "leng_short": 9.1, "thick": 4,
    "item_seq": 200301234, "dl_company": "가온시험제약", "dl_company_en": "-",
}  # fmt: skip
FOUND = {
    "name_en": "Gana Tab. 5mg", "shape": "원형", "colours": ["하양", "노랑"], "imprint_front": "YH|분할선|LT",
    "long_mm": 9.1, "short_mm": 9.1, "thick_mm": 4.0, "item_seq": "200301234", "maker": "가온시험제약",
}  # fmt: skip


def test_types_and_spellings_of_labels_are_one() -> None:
    other = LOOK | {"color_class1": "하양, 노랑", "color_class2": "", "leng_long": 9.1, "item_seq": "200301234",
                    "drug_shape": "\u110b\u116f\u11ab\u1112\u1167\u11bc", "thick": "4.0"}  # fmt: skip
    assert to_attributes(label_attributes(LOOK)) == FOUND
    assert label_attributes(other) == label_attributes(LOOK)
    assert to_attributes(to_texts(FOUND).items()) == FOUND  # type: ignore[arg-type]
    odd = {"thick": "nan", "leng_long": -1, "leng_short": "?", "print_front": "-", "color_class1": [None, "-"],
           "item_seq": None, "dl_company": {}}  # fmt: skip
    assert label_attributes(odd) == ()


def test_labels_of_the_tree_fill_the_class_map(toy_manifest: Path) -> None:
    classes = {info.code: info for info in read_classes(toy_manifest.parent)}
    assert len(classes) == 4
    for pill in build_catalog(7, 4, "easy"):
        attributes, look = classes[pill.code].attributes, pill.look
        assert (attributes["long_mm"], attributes["short_mm"]) == (look.long_mm, look.short_mm)
        assert attributes["colours"] == [colour for colour in (look.colour, look.second_colour) if colour]
        assert attributes["imprint_front"] == pill.prints[0].replace("|", "분할선")
        assert attributes["imprint_back"] == pill.prints[1]
        assert attributes["item_seq"] == str(pill.item_seq)
        assert (attributes["maker"], attributes["maker_en"]) == (pill.company, pill.company_en)
        assert (classes[pill.code].name, attributes["name_en"]) == (pill.name, pill.name_en)
        assert attributes["shape"] == ("장방형" if look.shape == "캡슐" else look.shape)


def test_conflicts_are_counted_and_the_commonest_value_is_kept(tree: Tree, tmp_path: Path) -> None:
    for number, shape in enumerate(("원형", "타원형", "타원형", "")):
        tree.single("K-000001", longitude=20 * number, label={"drug_shape": shape, "drug_dir": "앞면"})
    tree.single("K-000002", longitude=0, direction=1, label={"drug_shape": "원형", "drug_dir": "앞면"})
    tree.single("K-000002", longitude=20, label={"drug_shape": "원형", "drug_dir": "앞면"})
    result = build_manifest(tree.root, tmp_path / "out", num_photos=None, num_classes=None)
    assert [info.attributes for info in read_classes(tmp_path / "out")] == [{"shape": "타원형"}, {"shape": "원형"}]
    line = "K-000001 shape: '원형' 1, '타원형' 2 labels; '타원형' is kept"
    assert result.report["labels"]["conflicting_attributes"] == {"count": 1, "listed": [line]}
    assert f"attributes on which labels disagree: 1, the first {line}" in result.report["notes"]
    side = result.report["labels"]["problems"]["other_side"]
    assert side["count"] == 1 and side["listed"][0].endswith("K-000002_0_2_1_0_75_000_200.json")
    assert result.report["got"]["num_boxes"] == 6  # another side costs no box


def test_equally_common_values_do_not_depend_on_the_order() -> None:
    labels = [Label("", attributes=(("shape", shape),)) for shape in ("타원형", "원형")]
    for order in (labels, labels[::-1]):
        assert class_facts(["K-1"] * 2, order).attributes == {"K-1": {"shape": "원형"}}


def test_an_imported_manifest_keeps_the_facts_of_its_labels(tree: Tree, tmp_path: Path) -> None:
    rows = ["image_path,mapping_code,split"]
    for number in range(4):
        shape = "원형" if number else "타원형"
        photo = tree.single("K-000001", longitude=20 * number, label=LOOK | {"drug_shape": shape})
        rows.append(f"{photo},K-000001,{'val' if number == 3 else 'train'}")
    (tmp_path / "set.csv").write_text("\n".join(rows), encoding="utf-8")
    import_csv(tmp_path / "set.csv", tmp_path / "out", data_root=tree.root)
    (info,) = read_classes(tmp_path / "out")
    assert (info.attributes, info.name, info.edi_codes) == (FOUND, "약 K-000001", ["642200750", "A13100741"])
    report = json.loads((tmp_path / "out/import_report.json").read_text(encoding="utf-8"))
    assert "conflicting_attributes" in json.dumps(report)


def test_manifest_without_attributes_keeps_its_bytes(tmp_path: Path) -> None:
    table = manifest_of([{"sample_id": "a", "codes": ["K-000001"], "boxes": [None]}])
    for name, info in (("a", ClassInfo("K-000001", 0, "약")), ("b", ClassInfo("K-000001", 0, "약", attributes=FOUND))):
        write_manifest(table, tmp_path / name, [info])  # type: ignore[arg-type]
        assert read_classes(tmp_path / name) == [info]
    entry = {"code": "K-000001", "index": 0, "name": "약", "edi_codes": [], "num_train": 0, "num_val": 0}
    text = json.dumps({"schema_version": 1, "classes": [entry]}, ensure_ascii=False, indent=2) + "\n"
    assert (tmp_path / "a/classes.json").read_text(encoding="utf-8") == text
    assert (tmp_path / "a/manifest.parquet").read_bytes() == (tmp_path / "b/manifest.parquet").read_bytes()


@pytest.mark.parametrize(
    "odd", [[], {"colours": "하양"}, {"colours": [5]}, {"long_mm": "9"}, {"weight": 5}, {"shape": {}}]
)
def test_class_map_with_other_attributes_is_refused(tmp_path: Path, odd: object) -> None:
    payload = {"classes": [{"code": "K-1", "index": 0, "attributes": odd}]}
    (tmp_path / "classes.json").write_text(json.dumps(payload), encoding="utf-8")
    with pytest.raises(UserError, match=r"not a class map .attributes of class 'K-1' of an unknown name, type"):
        read_classes(tmp_path)


NEW = Attributes(shape="원형", colours=["하양", "노랑"], long_mm=9.1)


def csv_file(path: Path, text: str, encoding: str = "utf-8") -> Path:
    (path / "drugs.csv").write_text(text, encoding=encoding)
    return path / "drugs.csv"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16"])
def test_a_table_adds_what_is_missing_and_says_the_rest(tmp_path: Path, encoding: str) -> None:
    text = (
        "code,name,shape,colours,long_mm,price,edi_codes\n"
        'K-000001,나,원형,"하양, 노랑",9.10,5,"2,1"\nK-000002,,장방형,,,,\nK-9,,원형,,,,\n\n'
    )
    table = read_attribute_table(csv_file(tmp_path, text, encoding))
    classes = [ClassInfo("K-000001", 0, "약"), ClassInfo("K-000002", 1, attributes={"shape": "타원형"})]
    filled, notes = add_attributes(classes, table)
    assert filled == [replace(classes[0], edi_codes=["1", "2"], attributes=NEW), classes[1]]
    assert notes[0] == "attributes added from drugs.csv: 4 values"
    assert notes[1].startswith("columns not read: price; known are name, edi_codes, name_en, shape, colours, ")
    assert notes[2] == "codes of no class: 1 (K-9)"
    assert notes[3] == "values unlike those known, which are kept: 2, the first K-000001 name '나'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: the columns are none; expected `code` and some of name, "),
        ("shape\n원형", "row 1: the columns are shape; expected `code`"),
        ("code,price\nK-1,5", "row 1: the columns are code, price; expected"),
        ("code,shape,shape\nK-1,a,b", "row 1: the column 'shape' occurs twice"),
        ("code,shape\nK-1,원형,x", "row 2: 3 cells, but the header has 2"),
        ("code,shape\n ,원형", "row 2: no code; fill in the column `code`"),
        ("code,long_mm\nK-1,9 mm", "row 2: long_mm is '9 mm', not a length in mm"),
        ("code,shape\nK-1,원형\nK-1,타원형", "row 3: K-1 has the shape '타원형', but '원형' in a row above; keep one"),
        ("code,shape\n", "the table has no rows"),
    ],
)
def test_a_table_that_is_not_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_attribute_table(csv_file(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_equal_duplicates_are_one_and_no_known_code_is_refused(tmp_path: Path) -> None:
    table = read_attribute_table(csv_file(tmp_path, "code,shape,thick_mm\nK-1,원형,4\nK-1,원형,4.0\n"))
    assert table.rows == {"K-1": {"shape": "원형", "thick_mm": "4"}}
    with pytest.raises(UserError, match="none of 1 codes is a class, such as 'K-1'; the classes are like 'K-000001'"):
        add_attributes([ClassInfo("K-000001", 0)], table)


def test_commands_take_a_table(tree: Tree, tmp_path: Path) -> None:
    for number in range(4):
        tree.single("K-000001", longitude=20 * number)
    table = csv_file(tmp_path, "mapping_code,shape\nK-000001,원형\n")
    words = ["manifest", "build", "--preset", "demo", "--data-root", tree.root, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, words), "--attributes", str(table)])
    assert result.exit_code == 0, result.output
    assert "attributes added from drugs.csv: 1 values" in result.output
    assert read_classes(tmp_path / "out")[0].attributes == {"shape": "원형"}
    result = CliRunner().invoke(app, [*map(str, words), "--attributes", str(tmp_path / "none.csv")])
    assert result.exit_code == 2 and "cannot be read" in " ".join(result.output.split())
    (tmp_path / "set.csv").write_text(
        "image_path,mapping_code,split\na.png,K-000001,train\nb.png,K-000001,val\n", encoding="utf-8"
    )
    words = ["manifest", "import", tmp_path / "set.csv", "--out", tmp_path / "again", "--attributes", table]
    result = CliRunner().invoke(app, [*map(str, words)], env={"PILLSNAP_DATA_ROOT": ""})
    assert result.exit_code == 0, result.output
    assert "attributes added from drugs.csv: 1 values" in result.output
    assert read_classes(tmp_path / "again")[0].attributes == {"shape": "원형"}
