"""Class names stay what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.errors import UserError
from pillsnap.manifest.formats.names import codes_of, find_data_yaml, is_names_file, read_data_yaml, read_names

TYPED = ["000114", "0123", "12:30", "yes", "null", "1e3", "0x1F", "2024-01-01", "~", ".inf", "No", "1_000"]


@pytest.mark.parametrize("form", ["list", "flow", "integer keys", "quoted keys", "json"])
def test_nothing_is_taken_for_another_type(tmp_path: Path, form: str) -> None:
    text = {
        "list": "names:\n" + "".join(f"- {name}\n" for name in TYPED),
        "flow": f"names: [{', '.join(TYPED)}]\n",
        "integer keys": "names:\n" + "".join(f"  {index}: {name}\n" for index, name in enumerate(TYPED)),
        "quoted keys": "names:\n" + "".join(f"  '{index}': {name}\n" for index, name in enumerate(TYPED)),
        "json": "names: {" + ", ".join(f'"{index}": "{name}"' for index, name in enumerate(TYPED)) + "}\n",
    }[form]
    (tmp_path / "data.yaml").write_text(text)
    assert read_names(tmp_path / "data.yaml") == TYPED


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=6))
def test_any_names_are_read_as_written_or_refused(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    file = tmp_path_factory.mktemp("names") / "data.yaml"
    file.write_text(yaml.safe_dump({"names": names, "nc": len(names)}, allow_unicode=True), encoding="utf-8")
    try:
        read = read_names(file)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert read == [name.strip() for name in names]
    codes = codes_of(read)
    assert len(set(codes.values())) == len(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: {1: a, 2: b}\n", "not 0 to 1; they begin at 1"),
        ("names: {0: a, 0: b}\n", "'0' occurs twice"),
        ("names: {red: 0}\n", "not 0 to 0"),
        ("names: [a, [b]]\n", "not text"),
        ("names: red\n", "no `names` list"),
        ("nc: 5\nnames: [a, b]\n", "`nc` is 5, but `names` has 2"),
        ("names: ['a|b', a-b]\n", "cannot be told apart"),
        ("train: {a: b}\nnames: [a]\n", "neither a path nor a list"),
    ],
)
def test_other_forms_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_data_yaml(tmp_path / "data.yaml")
    assert "\n" not in str(error.value)


def test_code_is_made_from_the_name() -> None:
    assert codes_of(["NDC|00003-0893", "a b"]) == {"NDC|00003-0893": "NDC-00003-0893", "a b": "a b"}
    assert read_names(["red ", " blue"]) == ["red", "blue"]


@pytest.mark.parametrize("value", ["data.yaml", "d/dataset.yml", "sets/pills", "classes.TXT", "obj.names", "a,b.yaml"])
def test_a_path_that_does_not_exist_is_never_a_class(value: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        is_names_file(value)
    assert not is_names_file("pill")
    assert not is_names_file("amoxicillin/clavulanate,ibuprofen")


def test_an_empty_line_would_shift_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("red\n\nblue\n")
    with pytest.raises(UserError, match="line 2 is empty, so class 1 has no name"):
        read_names(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("red\nblue\n\n\n")
    assert read_names(tmp_path / "classes.txt") == ["red", "blue"]


def test_the_only_data_yaml_of_a_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("a: [1\n")
    assert find_data_yaml(tmp_path) is None
    (tmp_path / "data.yaml").write_text("names: [a]\nkpt_shape: [4, 3]\n")
    found = find_data_yaml(tmp_path)
    assert found is not None
    assert (found.names, found.has_key_points) == (["a"], True)
    (tmp_path / "data2.yml").write_text("names: [a]\n")
    with pytest.raises(UserError, match=r"data.yaml and data2.yml both name classes"):
        find_data_yaml(tmp_path)
