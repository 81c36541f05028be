"""The pages against the code: commands, options, settings, files and versions that they name exist; the site builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import pillsnap
from docs.reference import PAGE, commands, reference_page
from pillsnap.cli import app
from pillsnap.config import setting_fields
from pillsnap.observe.event_kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
KOREAN = sorted(path.name for path in (ROOT / "docs" / "ko").glob("*.md"))
FOR_USERS = [
    "README.md",
    "README.ko.md",
    "docs/index.md",
    *(f"docs/{name}" for name in KOREAN),
    *(f"docs/ko/{name}" for name in KOREAN),
]
FOR_DEVELOPERS = [
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/README.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "docs").glob("*.md")
        if path.name not in (*KOREAN, "index.md", "reference.md")
    ),
]
PAGES = [*FOR_USERS, *FOR_DEVELOPERS]
OF_OTHER_PROGRAMS = {"--address", "--working-dir", "--runtime-env", "--generate"}
SETTINGS = {field.key for field in setting_fields()}


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _fences(text: str) -> list[str]:
    """Lines of all code fences, without comments and translations of them."""
    fences = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    return [re.sub(r"\s+#.*", "", line) for fence in fences for line in fence.replace("\\\n", " ").splitlines()]


def _inline(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def _check_command(words: list[str], whole: bool) -> None:
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if not whole and not words:
        return  # mentioned by its name alone
    assert not hasattr(command, "commands") or words[:1] in (["--help"], ["--version"]), "there is no such command"
    if not hasattr(command, "commands"):
        command.make_context("pillsnap", words, resilient_parsing="--help" in words).close()


@pytest.mark.parametrize("name", PAGES)
def test_commands_parse(name: str) -> None:
    text = _text(name)
    for line in _fences(text):
        if line.startswith("pillsnap "):
            _check_command(shlex.split(line)[1:], whole=True)
    for code in _inline(text):
        if code.startswith("pillsnap ") and "…" not in code:
            _check_command(shlex.split(code)[1:], whole=False)


def test_the_readme_shows_the_main_commands() -> None:
    shown = {line.split()[1] for line in _fences(_text("README.md")) if line.startswith("pillsnap ")}
    assert {"demo", "manifest", "plan", "preflight", "train", "evaluate", "predict", "export"} <= shown


@pytest.mark.parametrize("name", FOR_USERS)
def test_options_exist(name: str) -> None:
    known = {"--help", "--version", *OF_OTHER_PROGRAMS}
    for _, command in commands():
        known |= {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", _text(name))) <= known


@pytest.mark.parametrize("name", PAGES)
def test_settings_exist(name: str) -> None:
    text = _text(name)
    groups = {key.partition(".")[0] for key in SETTINGS if "." in key}
    named = set(re.findall(r"--set ([a-z_]+\.[a-z0-9_]+)", text))
    for code in _inline(text):
        found = re.fullmatch(r"([a-z_]+)\.([a-z0-9_]+)(=.*)?", code)
        if found and found[1] in groups and found[2] not in ("yaml", "log", "py", "calibration"):
            named.add(f"{found[1]}.{found[2]}")
    assert named <= SETTINGS


@pytest.mark.parametrize("name", PAGES)
def test_files_and_links_exist(name: str) -> None:
    text = _text(name)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?://|mailto:", target):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"
    folders = [ROOT, *(ROOT / part for part in ("pillsnap", "pillsnap/ray_compat", "jobs", "tests/reliability"))]
    for path in _inline(text):
        if re.fullmatch(r"[a-z_]+(/[a-z_0-9]+)*\.py", path) and path != "pipeline.py":
            assert any((folder / path).is_file() for folder in folders), f"{name} names {path}"


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_and_benchmarks_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text("Makefile"), re.M))
    text = _text(name)
    for code in [*_fences(text), *_inline(text)]:
        if found := re.match(r"make ([a-z-]+)", code):
            assert found[1] in targets
        if found := re.match(r"python -m (benchmarks\.[a-z_]+)", code):
            assert (ROOT / f"{found[1].replace('.', '/')}.py").is_file()


@pytest.mark.parametrize(
    ("english", "korean"),
    [("README.md", "README.ko.md"), *((f"docs/{name}", f"docs/ko/{name}") for name in KOREAN)],
)
def test_both_languages_show_the_same_code(english: str, korean: str) -> None:
    """Fences are equal up to comments; headings and table rows are as many."""
    assert _fences(_text(english)) == _fences(_text(korean))
    for pattern in (r"^#+ ", r"^\| ", r"^- "):
        assert len(re.findall(pattern, _text(english), re.M)) == len(re.findall(pattern, _text(korean), re.M)), pattern


def test_the_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run `make docs` and commit docs/reference.md"


def test_the_reference_has_every_setting_event_and_command() -> None:
    page = reference_page()
    for field in setting_fields():
        assert f"\n| `{field.key}` | " in page
        assert field.description, f"{field.key} has no description"
    for kind, model in KINDS.items():
        section = page.split(f"\n### Event {kind}\n")[1].split("\n### ")[0]
        assert re.findall(r"^\| `(\w+)`", section, re.M) == list(model.model_fields)
        assert all(field.description for field in model.model_fields.values()), kind
    assert len(list(commands())) >= 16
    for name, command in commands():
        section = page.split(f"\n### {name.removeprefix('pillsnap ')}\n")[1].split("\n### ")[0]
        for option in (option for parameter in command.params for option in parameter.opts if option[:2] == "--"):
            assert f"`{option}`" in section, f"{name} {option}"


def test_the_site_builds_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 17
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", html) == []


def test_one_version_everywhere() -> None:
    version = pillsnap.__version__
    assert tomllib.loads(_text("pyproject.toml"))["project"]["version"] == version
    assert re.findall(r"^version: (\S+)", _text("CITATION.cff"), re.M) == [version]
    assert re.findall(r"^## \[?(\d[\d.]+)\]?", _text("CHANGELOG.md"), re.M)[0] == version
    for name in ("Dockerfile", "deploy/aws.yaml", "deploy/rayjob.yaml", "docs/cluster.md"):
        assert set(re.findall(r"pillsnap:(\d[\d.]*\d)", _text(name))) == {version}


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*_*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_files_for_github_fit_their_schemas(schema: str, pattern: str) -> None:
    files = [str(path) for path in ROOT.glob(pattern)]
    assert files
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    result = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_workflows_pin_actions_and_only_read() -> None:
    text = _text(".github/workflows/ci.yml")
    actions = re.findall(r"uses: (\S+)", text)
    assert len(actions) >= 6
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in actions)
    assert "\npermissions:\n  contents: read\n" in text and text.count("permissions:") == 1
    assert text.count("persist-credentials: false") == text.count("uses: actions/checkout@")
