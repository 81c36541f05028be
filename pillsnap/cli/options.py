"""What the subcommands share: options, the checks on them, and the progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from pillsnap.errors import UserError
from pillsnap.storage import check_uri, is_uri, plain

DATA_ROOT_ENV = "PILLSNAP_DATA_ROOT"

console = Console()

Stage = Annotated[
    int | None, typer.Option(min=1, max=4, help="Scale step, 1 to 4: takes the preset stage1 ... stage4.")
]
Preset = Annotated[Optional[str], typer.Option(help="A preset by name, instead of --stage.")]  # noqa: UP045
DataRoot = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(envvar=DATA_ROOT_ENV, help="Folder (or URI) that the manifest's paths start from."),
]
RunDir = Annotated[Optional[str], typer.Option("--run", help="Run directory or URI [default: artifacts/<preset>].")]  # noqa: UP045
NamedRun = Annotated[str, typer.Option("--run", help="Run directory, or its URI such as s3://bucket/runs/stage3.")]
Manifest = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Manifest, a path or a URI [default: the one in the run directory]."),
]
Assignments = Annotated[Optional[list[str]], typer.Option("--set", help="Any setting: --set classification.lr=1e-4")]  # noqa: UP045
Seed = Annotated[int, typer.Option(min=0)]


def chosen_settings(
    stage: int | None, preset: str | None, overrides: dict[str, Any], assignments: list[str] | None
) -> Any:
    """Settings of the stage or preset, with flags and --set on top. Raises UserError."""
    from pillsnap.config import load_settings

    if (stage is None) == (preset is None):
        raise UserError("Name either --stage 1 to 4 or --preset.")
    return load_settings(preset or f"stage{stage}", overrides, tuple(assignments or ()))


def checked_data_root(given: str | None) -> str:
    """The data root as an absolute path or URI. Raises UserError when there is none."""
    if not given:
        raise UserError(f"Where are the photos? Give --data-root, or set {DATA_ROOT_ENV}.")
    given = plain(given)
    if is_uri(given):
        check_uri(given)
        return given.rstrip("/")
    if not os.path.isdir(given):
        raise UserError(f"The data root {given} is not a folder: give --data-root, or set {DATA_ROOT_ENV}.")
    return str(Path(given).absolute())


def local_data_root(given: str | None) -> Path:
    """The data root as a folder of this machine: labels and archives are not looked for in remote storage."""
    root = checked_data_root(given)
    if is_uri(root):
        raise UserError(f"A manifest is built and imported from a folder of this machine, not from {root}: mount it.")
    return Path(root)


def named_run(given: str) -> str:
    """A run that exists: its folder as an absolute path, or its URI."""
    given = plain(given)
    return given.rstrip("/") if is_uri(given) else str(Path(given).absolute())


def uri_of(where: str) -> str:
    """The place of a run when it is remote, else empty."""
    return where if is_uri(where) else ""


def default_manifest(settings: Any, run_dir: str | None, directory: Path) -> Path:
    """The manifest in a run's folder `directory`, or else, of a run that is kept elsewhere, the one built here."""
    from pillsnap.config import run_directory

    if (directory / "manifest.parquet").exists() or (run_dir is not None and is_uri(run_dir)):
        return directory
    return run_directory(settings, None if run_dir is None else Path(run_dir))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A bar on the terminal, moved by calls of (done, total) or (part, done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(what, total=None)

        def update(*step: Any) -> None:
            *part, done, total = step
            bars.update(bar, completed=done, total=total or None, description=f"{what}: {part[0]}" if part else what)

        yield update
