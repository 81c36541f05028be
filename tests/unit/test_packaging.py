"""The dependency pins, what the wheel carries, and what a job ships."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==(\S+) \\$", LOCK, re.M)
}
REQUIREMENTS = [
    Requirement(text)
    for text in PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
]
MALWARE = {"ultralytics": ["8.3.41", "8.3.42", "8.3.45", "8.3.46"]}


def test_every_locked_package_has_an_exact_version_and_a_hash() -> None:
    entries = re.split(r"^(?=\S)", LOCK, flags=re.M)
    packages = [entry for entry in entries if entry.strip() and not entry.startswith("#")]
    assert len(packages) == len(PINS) >= 100
    for entry in packages:
        assert re.match(r"^[A-Za-z0-9_.-]+==\S+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+$", entry), entry[:80]


def test_the_lock_names_no_index_and_no_machine() -> None:
    assert not re.search(r"://|--(index|extra-index|find-links|trusted)|(^|\s)/\w", LOCK)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_the_lock_satisfies_each_declared_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])
    assert any(part.operator in (">=", "==") for part in requirement.specifier), "a range needs a lower bound"


def test_versions_known_to_be_bad_can_neither_be_resolved_nor_are_locked() -> None:
    ranges = {canonicalize_name(requirement.name): requirement.specifier for requirement in REQUIREMENTS}
    for name, versions in {**MALWARE, "torch": ["2.13.0", "2.10.0"]}.items():
        for version in versions:
            assert not ranges[name].contains(version)
    assert PINS["torch"] != Version("2.13.0")


def test_cv2_is_the_headless_build_alone() -> None:
    assert "opencv-python-headless" in PINS
    assert "opencv-python" not in PINS, "its cv2 folder would overwrite the headless one and ask for libGL"


def test_the_lock_is_closed_but_for_opencv_python() -> None:
    """Every requirement of every installed locked package is locked too: --no-deps must lose nothing."""
    from importlib.metadata import PackageNotFoundError, requires

    environment = {"extra": "", "python_version": "3.11", "python_full_version": "3.11.9"}
    missing = set()
    for name in PINS:
        try:
            texts = requires(name) or []
        except PackageNotFoundError:
            continue  # the development environment may be another; CI installs the lock itself
        for text in texts:
            requirement = Requirement(text)
            wanted = requirement.marker is None or Marker(str(requirement.marker)).evaluate(environment)
            if wanted and canonicalize_name(requirement.name) not in PINS:
                missing.add((name, requirement.name))
    assert missing == {("ultralytics", "opencv-python")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "pillsnap", source / "pillsnap", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    (source / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = (source / "dist").glob("pillsnap-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies come from this environment, whose editable pillsnap the new one does not see."""
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    python = tmp_path / "venv" / "bin" / "python"
    target = ["--python", str(python), "--no-deps", "--offline", "--no-index"]
    subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--quiet", *target, str(wheel)], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.strip()

    assert Path(run(str(python), "-c", "import pillsnap; print(pillsnap.__file__)")).is_relative_to(site)
    pillsnap = str(tmp_path / "venv" / "bin" / "pillsnap")
    assert PROJECT["project"]["version"] in run(pillsnap, "--version")
    run(
        pillsnap,
        "synth",
        "--out",
        "photos",
        "--classes",
        "2",
        "--singles",
        "4",
        "--combinations",
        "1",
        "--frame",
        "122x160",
    )
    run(pillsnap, "manifest", "build", "--preset", "demo", "--data-root", "photos", "--out", "built")
    assert (tmp_path / "built" / "manifest.parquet").exists()


def test_the_wheel_carries_every_file_of_the_package(wheel_names: list[str]) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pillsnap").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"pillsnap/presets/{name}.yaml" for name in ("demo", "stage1", "stage2", "stage3", "stage4")} <= files
    assert files - set(wheel_names) == set()


def test_the_wheel_carries_the_licence_and_nothing_beside_the_package(wheel_names: list[str]) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
    assert {name.split("/")[0] for name in wheel_names if ".dist-info" not in name} == {"pillsnap"}


def test_the_command_is_declared_and_starts() -> None:
    assert PROJECT["project"]["scripts"] == {"pillsnap": "pillsnap.cli.__main__:main"}
    code = "import sys; from pillsnap.cli.__main__ import main; sys.argv[1:] = ['--help']; main()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert result.returncode == 0, result.stderr
    for command in ("demo", "manifest", "train", "evaluate"):
        assert command in result.stdout


def test_a_job_ships_the_code_and_nothing_else(tmp_path: Path) -> None:
    """Packs a tree with Ray's own packer: .rayignore must spare pillsnap/data and drop the photos in data."""
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "tree"
    for name in (
        "pillsnap/data/stream.py",
        "pillsnap/presets/demo.yaml",
        "jobs/train_stage3.py",
        "data/photo.png",
        "artifacts/stage3/events.jsonl",
        ".venv/bin/python",
        "tests/test_x.py",
        "wandb/run.log",
        ".git/HEAD",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    shutil.copy(ROOT / ".rayignore", tree / ".rayignore")
    create_package(str(tree), tmp_path / "package.zip", include_gitignore=False)
    shipped = {name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")}
    assert shipped - {".rayignore"} == {"pillsnap/data/stream.py", "pillsnap/presets/demo.yaml", "jobs/train_stage3.py"}


def test_continuous_integration_runs_lint_docs_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert [line for line in text.splitlines() if line.startswith("make ")] == ["make lint", "make docs", "make test"]


def test_make_help_lists_the_targets_that_the_readme_promises() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    listed = set(re.findall(r"^  (\S+)", result.stdout, re.M))
    assert {"install", "demo", "test", "test-reliability", "lint", "docs", "build", "bench", "clean"} <= listed


def test_a_machine_without_a_fitting_python_is_told_what_to_do(tmp_path: Path) -> None:
    """Runs the Makefile where PATH holds the shell's tools and no Python."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("make", "bash", "awk", "touch"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    result = subprocess.run(
        [str(tools / "make"), "install"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 2
    assert "no Python 3.11 or 3.12" in result.stderr
