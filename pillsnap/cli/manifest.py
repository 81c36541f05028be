"""`pillsnap manifest`: build, import and check manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pillsnap.cli.options import (
    Assignments,
    Config,
    DataRoot,
    JsonFile,
    Preset,
    Stage,
    checked_data_root,
    chosen_settings,
    local_data_root,
)
from pillsnap.cli.terminal import console, progress_bar, say
from pillsnap.errors import UserError

manifest_app = typer.Typer(no_args_is_help=True, help="Build, import and check manifests.")


@manifest_app.command("build")
def manifest_build(
    stage: Stage = None,
    preset: Preset = None,
    config: Config = None,
    data_root: DataRoot = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the manifest.", show_default="artifacts/NAME of the settings")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Photos to take.", show_default="sampling.num_photos")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes to take.", show_default="sampling.num_classes")] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(help="Earlier manifest; its validation photos are not taken.", show_default="none"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample and the split.")] = 42,
    assignments: Assignments = None,
) -> None:
    """Sample an AI Hub tree, unpacked or in its ZIP archives, into a manifest."""
    from pillsnap.config import run_directory
    from pillsnap.manifest.build import build_manifest

    overrides = {"sampling.num_photos": samples, "sampling.num_classes": classes}
    settings = chosen_settings(stage, preset, config, overrides, assignments)
    with progress_bar("building the manifest") as progress:
        result = build_manifest(
            local_data_root(data_root),
            run_directory(settings, out),
            seed=seed,
            exclude=exclude,
            progress=progress,
            **settings.sampling.model_dump(),
        )
    for note in result.report["notes"]:
        say(note)
    say(f"manifest: {result.path}")


@manifest_app.command("import")
def manifest_import(
    sources: Annotated[
        list[Path],
        typer.Argument(help="yolo: a folder with images/ and labels/. csv: CSV files, or a folder of them."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the manifest.")],
    source_format: Annotated[str, typer.Option("--format", help="yolo or csv.")] = "yolo",
    names: Annotated[
        str | None,
        typer.Option(
            help="Class names, as a data.yaml, a text file, or a comma-separated list.",
            show_default="the folder's data.yaml",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="yolo: what rows of more than five fields are: boxes, polygons, obb or pose.",
            show_default="what data.yaml says",
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Regular expression for the part of a file name that the photos of one group share.",
            show_default="every photo is its own group",
        ),
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.9,
            help="Share of photos to validate with, by groups, where a set has no validation photos.",
            show_default="none: such a set is refused",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --val-fraction.")] = 42,
    strict: Annotated[
        bool, typer.Option(help="Exit with 2 when over 1 % of the photos, or all of a class or split, are left out.")
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Import labelled photos of other tools into a manifest, and print what was found and what was left out.

    Absolute paths in a CSV file are made relative to --data-root, where the labels are read, too; without --data-root
    boxes and sizes stay unknown.
    """
    from pillsnap.manifest.import_csv import import_csv
    from pillsnap.manifest.import_folder import ImportOptions, import_folder
    from pillsnap.manifest.import_report import report_lines

    out = out.absolute()
    if source_format == "csv":
        if any(option is not None for option in (names, labels, group_by, val_fraction)):
            raise UserError(
                "--names and --group-by, --labels and --val-fraction are for folders: CSV rows name their classes, "
                "groups and splits."
            )
        root = local_data_root(data_root) if data_root else None
        with progress_bar("importing") as progress:
            path = import_csv(
                sources[0] if len(sources) == 1 else sources, out, data_root=root, strict=strict, progress=progress
            )
    elif source_format == "yolo":
        if len(sources) != 1:
            raise UserError(f"--format {source_format} takes one folder, not {len(sources)}.")
        options = ImportOptions(names, labels, group_by, val_fraction, seed, strict)
        with progress_bar("importing") as progress:
            path = import_folder(sources[0], out, options, progress)
    else:
        raise UserError(f"--format {source_format!r} cannot be imported; the formats are yolo and csv.")
    lines, warnings = report_lines(path.parent)
    for line in lines:
        say(line)
    for warning in warnings:
        say(f"warning: {warning}", style="yellow")
    say(f"manifest: {path}")


@manifest_app.command("validate")
def manifest_validate(
    path: Annotated[str, typer.Argument(help="A manifest, or the folder that holds it: a path or a URI.")],
    data_root: DataRoot = None,
    deep: Annotated[bool, typer.Option(help="Decode every photo and find near-duplicates across the split.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Check a manifest and its photos without changing them. Exit code 1 when it is not fit to train on."""
    from pillsnap.manifest.audit.audit import audit
    from pillsnap.storage import local_manifest

    with progress_bar("checking") as progress:
        report = audit(local_manifest(path), checked_data_root(data_root), deep=deep, progress=progress)
    report.print_summary(console)
    if json_file:
        json_file.write_text(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if report.fit else 1)
