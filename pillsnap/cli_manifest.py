"""`pillsnap manifest`: build, import and check manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from pillsnap.cli_options import (
    Assignments,
    DataRoot,
    Preset,
    Seed,
    Stage,
    checked_data_root,
    chosen_settings,
    console,
    progress_bar,
)
from pillsnap.errors import UserError

manifest_app = typer.Typer(no_args_is_help=True, help="Build, import and check manifests: the only truth about data.")


@manifest_app.command("build")
def manifest_build(
    stage: Stage = None,
    preset: Preset = None,
    data_root: DataRoot = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for the manifest [default: artifacts/<preset>].")] = None,  # noqa: UP045
    samples: Annotated[Optional[int], typer.Option(help="Photos to take.")] = None,  # noqa: UP045
    classes: Annotated[Optional[int], typer.Option(help="Classes to take.")] = None,  # noqa: UP045
    exclude: Annotated[Optional[Path], typer.Option(help="Earlier manifest whose validation photos stay out.")] = None,  # noqa: UP045
    seed: Seed = 42,
    assignments: Assignments = None,
) -> None:
    """Sample an AI Hub tree into a manifest."""
    from pillsnap.config import run_directory
    from pillsnap.data.build import build_manifest

    overrides = {"sampling.num_photos": samples, "sampling.num_classes": classes}
    settings = chosen_settings(stage, preset, overrides, assignments)
    with progress_bar("building the manifest") as progress:
        result = build_manifest(
            Path(checked_data_root(data_root)),
            run_directory(settings, out),
            seed=seed,
            exclude=exclude,
            progress=progress,
            **settings.sampling.model_dump(),
        )
    for note in result.report.get("notes", []):
        console.print(note, markup=False, highlight=False)
    console.print(f"manifest: {result.path}", highlight=False, soft_wrap=True)


@manifest_app.command("import")
def manifest_import(
    folder: Annotated[Path, typer.Argument(help="Folder with images/ and labels/ of a YOLO-format set.")],
    names: Annotated[str, typer.Option(help="Class names: a data.yaml, a text file, or a comma-separated list.")],
    out: Annotated[Path, typer.Option(help="Folder for the manifest.")],
    source_format: Annotated[str, typer.Option("--format", help="Only yolo.")] = "yolo",
    group_by: Annotated[
        str | None, typer.Option(help="Regular expression for the part of a file name that photos of a group share.")
    ] = None,
) -> None:
    """Turn a YOLO-format folder of photographs into a manifest."""
    from pillsnap.data.yolo import import_yolo

    if source_format != "yolo":
        raise UserError(f"--format {source_format!r} cannot be imported; the one format is yolo.")
    path = import_yolo(folder, Path(names) if Path(names).is_file() else names, out.absolute(), group_by)
    console.print(f"manifest: {path}", highlight=False, soft_wrap=True)


@manifest_app.command("validate")
def manifest_validate(
    path: Annotated[Path, typer.Argument(help="A manifest, or the folder that holds it.")],
    data_root: DataRoot = None,
    deep: Annotated[
        bool, typer.Option(help="Decode every photo and look for near-duplicates across the split.")
    ] = False,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the findings here.")] = None,  # noqa: UP045
) -> None:
    """Check a manifest against its photos, read-only: exit code 1 when it is not fit to train on."""
    from pillsnap.data.audit import audit

    with progress_bar("checking") as progress:
        report = audit(path, Path(checked_data_root(data_root)), deep=deep, progress=progress)
    report.print_summary(console)
    if json_file:
        json_file.write_text(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if report.fit else 1)
