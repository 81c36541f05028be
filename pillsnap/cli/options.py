"""Options that several commands share, and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pillsnap.errors import UserError
from pillsnap.storage import check_uri, is_uri, plain

if TYPE_CHECKING:
    from pillsnap.config import Resolved, Settings
    from pillsnap.runs.directory import Run

DATA_ROOT_ENV = "PILLSNAP_DATA_ROOT"
_ONE_OF_THREE = "none: give one of --stage, --preset, --config"


def _preset_names() -> list[str]:
    from pillsnap.config import preset_names

    return preset_names()


# Typer reads `show_default` as the text of a default that is not a constant.
Stage = Annotated[
    int | None,
    typer.Option(min=1, max=4, help="Scale step: takes the preset stage1 to stage4.", show_default=_ONE_OF_THREE),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Name of a preset.", autocompletion=_preset_names, show_default=_ONE_OF_THREE),
]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file of settings; it may extend a preset or a file.", show_default=_ONE_OF_THREE),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as KEY=VALUE; repeatable. `pillsnap config show` lists them.",
                 show_default="none"),
]  # fmt: skip
DataRoot = Annotated[
    str | None,
    typer.Option(envvar=DATA_ROOT_ENV, help="Folder or URI that the manifest's paths are relative to.",
                 show_default="the environment variable; required if it is not set"),
]  # fmt: skip
RunDir = Annotated[
    str | None, typer.Option("--run", help="Run directory or URI.", show_default="artifacts/NAME of the settings")
]
NamedRun = Annotated[str, typer.Option("--run", help="Run directory, or its URI such as s3://bucket/runs/stage3.")]
Manifest = Annotated[
    str | None, typer.Option(help="Manifest, a path or a URI.", show_default="the one in the run directory")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the results as JSON.", show_default="none")]
Allow = Annotated[
    Path | None,
    typer.Option(help="Text file of the codes that are possible, one per line; # starts a comment.",
                 show_default="all"),
]  # fmt: skip
AttributeFile = Annotated[
    Path | None,
    typer.Option("--attributes", help="CSV table of shapes, colours and imprints by code, for what the labels lack.",
                 show_default="none"),
]  # fmt: skip
Storage = Annotated[
    str | None,
    typer.Option(help="Folder or URI for run directories, such as s3://bucket/runs.", show_default="train.storage"),
]
Task = Annotated[str | None, typer.Option(help="detection, classification or both.", show_default="train.task")]
Epochs = Annotated[int | None, typer.Option(help="Epochs per trained task.", show_default="each task's epochs")]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Samples per optimizer step over all workers.", show_default="each task's batch_size"),
]
NumWorkers = Annotated[
    str | None, typer.Option(help="auto (one per GPU), a number, or MIN:MAX.", show_default="train.num_workers")
]


def chosen_settings(
    stage: int | None,
    preset: str | None,
    config: Path | None,
    overrides: dict[str, Any],
    assignments: list[str] | None,
) -> Settings:
    """Settings of the stage, preset or file, with options and --set on top. Raises UserError."""
    if (stage, preset, config).count(None) == 3:
        raise UserError("Give one of --stage 1 to 4, --preset and --config.")
    return resolved_settings(stage, preset, config, overrides, assignments).settings


def resolved_settings(
    stage: int | None,
    preset: str | None,
    config: Path | None,
    overrides: dict[str, Any],
    assignments: list[str] | None,
) -> Resolved:
    """As chosen_settings, with the sources; without a stage, preset and file: the defaults."""
    from pillsnap.config import resolve_settings

    if (stage, preset, config).count(None) < 2:
        raise UserError("Give only one of --stage 1 to 4, --preset and --config.")
    preset = preset if stage is None else f"stage{stage}"
    return resolve_settings(preset=preset, config=config, overrides=overrides, assignments=tuple(assignments or ()))


def training_overrides(
    task: str | None, epochs: int | None, batch_size: int | None, num_workers: str | None, storage: str | None
) -> dict[str, Any]:
    """Values of the options that stand for a setting, by its key."""
    from pillsnap.config import TASKS

    overrides: dict[str, Any] = {"train.task": task, "train.num_workers": num_workers, "train.storage": storage}
    for name in TASKS if task in (None, "both") else (task,):
        overrides |= {f"{name}.epochs": epochs, f"{name}.batch_size": batch_size}
    return overrides


def checked_data_root(given: str | None) -> str:
    """The data root as an absolute path or URI. Raises UserError when there is none."""
    if not given:
        raise UserError(f"Where are the photos? Give --data-root, or set {DATA_ROOT_ENV}.")
    given = plain(given)
    if is_uri(given):
        check_uri(given)
        return given.rstrip("/")
    if not Path(given).is_dir():  # raises PermissionError where the folder above must not be searched
        raise UserError(f"The data root {given} is not a folder: give --data-root, or set {DATA_ROOT_ENV}.")
    return str(Path(given).absolute())


def local_data_root(given: str | None) -> Path:
    """The data root as a local folder: manifests cannot be built or imported from remote storage."""
    root = checked_data_root(given)
    if is_uri(root):
        raise UserError(f"A manifest is built and imported from a local folder, not from {root}: mount it.")
    return Path(root)


def named_run(given: str) -> str:
    """A run directory as an absolute path or URI."""
    given = plain(given)
    return given.rstrip("/") if is_uri(given) else str(Path(given).absolute())


def uri_of(where: str) -> str:
    """`where` if it is a URI, else an empty string."""
    return where if is_uri(where) else ""


def opened_run(where: str) -> Run:
    """The run at a path or URI; a remote run is mirrored to this machine first."""
    from pillsnap.runs.directory import load_run
    from pillsnap.runs.mirror import local_run

    return load_run(local_run(where), uri=uri_of(where))


def default_manifest(settings: Settings, run_dir: str | None, directory: Path) -> Path:
    """The manifest in a run's local folder `directory`; for a run stored elsewhere, else the one built here."""
    from pillsnap.config import run_directory

    if (directory / "manifest.parquet").exists() or (run_dir is not None and is_uri(run_dir)):
        return directory
    return run_directory(settings, None if run_dir is None else Path(run_dir))
