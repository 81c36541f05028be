"""`pillsnap manifest`: build, import and check manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from click.core import ParameterSource

from pillsnap.cli.options import (
    Assignments,
    AttributeFile,
    Config,
    DataRoot,
    JsonFile,
    Preset,
    Stage,
    checked_data_root,
    chosen_settings,
    local_data_root,
    named_run,
    opened_run,
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
    attributes: AttributeFile = None,
    assignments: Assignments = None,
) -> None:
    """Sample an AI Hub tree, unpacked or in its ZIP archives, into a manifest."""
    from pillsnap.config import run_directory
    from pillsnap.manifest.attribute_table import add_to_manifest, read_attribute_table
    from pillsnap.manifest.build import build_manifest

    attribute_table = read_attribute_table(attributes) if attributes else None
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
    notes = result.report["notes"]
    if attribute_table:
        notes += add_to_manifest(result.path.parent, attribute_table)
    for note in notes:
        say(note)
    say(f"manifest: {result.path}")


@manifest_app.command("import")
def manifest_import(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(help="A folder of labels and photos. csv: CSV manifests, or a folder of them."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the manifest.")],
    source_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, yolo, coco, voc, cvat, label-studio, csv-boxes or imagefolder; csv: manifests of other tools.",
        ),
    ] = "auto",
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
    attributes: AttributeFile = None,
    data_root: DataRoot = None,
) -> None:
    """Import labelled photos of other tools into a manifest, and print what was found and what was left out.

    --data-root names the folder of the photos where the labels are in another one. Absolute paths in a CSV manifest are
    made relative to it, and the labels are read under it; without --data-root boxes and sizes stay unknown.
    """
    from pillsnap.manifest.attribute_table import add_to_manifest, read_attribute_table
    from pillsnap.manifest.formats.recognise import FORMATS
    from pillsnap.manifest.import_csv import import_csv
    from pillsnap.manifest.import_folder import ImportOptions, import_folder
    from pillsnap.manifest.import_report import report_lines

    out = out.absolute()
    attribute_table = read_attribute_table(attributes) if attributes else None
    if source_format == "auto" and all(source.suffix.lower() == ".csv" for source in sources):
        source_format = "csv"
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
    elif source_format in ("auto", *FORMATS):
        if len(sources) != 1:
            raise UserError(f"--format {source_format} takes one folder, not {len(sources)}.")
        # The environment variable names the photos of AI Hub, not those of this folder.
        is_given = context.get_parameter_source("data_root") is ParameterSource.COMMANDLINE
        photos = local_data_root(data_root) if is_given else None
        options = ImportOptions(names, labels, group_by, val_fraction, seed, source_format, photos, strict)
        with progress_bar("importing") as progress:
            path = import_folder(sources[0], out, options, progress)
    else:
        raise UserError(
            f"--format {source_format!r} cannot be imported; the formats are auto, {', '.join(FORMATS)} and csv."
        )
    lines, warnings = report_lines(path.parent)
    if attribute_table:
        lines += add_to_manifest(path.parent, attribute_table)
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


@manifest_app.command("export")
def manifest_export(
    path: Annotated[Path, typer.Argument(help="A manifest, or the folder that holds it.")],
    out: Annotated[Path, typer.Option(help="New folder for the labels.")],
    file_format: Annotated[str, typer.Option("--format", help="coco, yolo, voc or label-studio.")],
    run_dir: Annotated[
        str | None,
        typer.Option("--run", help="coco, label-studio: run whose predictions are added.", show_default="none"),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Write the labels of a manifest in the format of another tool, with predictions as pre-annotations.

    Paths are relative to the data root: `manifest import OUT --data-root ROOT` reads them back without a difference.
    """
    from pillsnap.manifest.export import FORMATS, export_manifest

    if file_format not in FORMATS:
        raise UserError(f"--format {file_format!r} is none of {', '.join(FORMATS)}.")
    predictions = None if run_dir is None else _predictions(run_dir, path, data_root)
    root = local_data_root(data_root) if data_root else None
    for reason, count in export_manifest(path, file_format, out, root, predictions).items():
        say(f"photos {reason}: {count:,}")
    say(f"labels: {out}")


def _predictions(
    run_dir: str, manifest: Path, data_root: str | None
) -> dict[str, list[tuple[str, tuple[float, float, float, float], float]]]:
    """(code, box, score) of the pills that a run finds, by image path; photos that cannot be read are named."""
    from pillsnap.cluster.session import ray_session
    from pillsnap.evaluate.predict import predict_manifest_photos

    run = opened_run(named_run(run_dir))
    with ray_session():
        results = predict_manifest_photos(run, str(manifest), data_root, None)
    for result in results:
        if result["error"]:
            say(f"{result['path']}: {result['error']}")
    return {
        result["path"]: [(pill["code"], tuple(pill["box"]), pill["confidence"]) for pill in result["pills"]]
        for result in results
    }
