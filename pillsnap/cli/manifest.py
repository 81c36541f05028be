"""`pillsnap manifest`: build, import and check manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from pillsnap.cli.options import (
    Assignments,
    DataRoot,
    Preset,
    Seed,
    Stage,
    checked_data_root,
    chosen_settings,
    console,
    local_data_root,
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
    from pillsnap.manifest.build import build_manifest

    overrides = {"sampling.num_photos": samples, "sampling.num_classes": classes}
    settings = chosen_settings(stage, preset, overrides, assignments)
    with progress_bar("building the manifest") as progress:
        result = build_manifest(
            local_data_root(data_root),
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
    sources: Annotated[
        list[Path],
        typer.Argument(help="yolo: a folder with images/ and labels/. csv: CSV files, or a folder of them."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the manifest.")],
    source_format: Annotated[str, typer.Option("--format", help="yolo or csv.")] = "yolo",
    names: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="yolo: class names, as a data.yaml, a text file, or a comma-separated list."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="yolo: regular expression for the part of a file name that photos of a group share."),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Turn a YOLO-format folder, or CSV manifests of other tools, into a manifest.

    CSV paths may be absolute ones of another disk: they are taken from --data-root, which also has the boxes. Without
    it, photos and boxes are not looked for.
    """
    from pillsnap.manifest.import_csv import import_csv
    from pillsnap.manifest.import_yolo import import_yolo

    if source_format == "csv":
        if names is not None or group_by is not None:
            raise UserError("--names and --group-by are for --format yolo: CSV rows name their classes and groups.")
        root = local_data_root(data_root) if data_root else None
        with progress_bar("importing") as progress:
            path = import_csv(
                sources[0] if len(sources) == 1 else sources, out.absolute(), data_root=root, progress=progress
            )
        _print_import_problems(path.parent)
    elif source_format == "yolo":
        if len(sources) != 1:
            raise UserError(f"--format yolo takes one folder, not {len(sources)}.")
        if names is None:
            raise UserError("What are the classes called? Give --names: a data.yaml, a text file, or a list a,b,c.")
        path = import_yolo(sources[0], Path(names) if Path(names).is_file() else names, out.absolute(), group_by)
    else:
        raise UserError(f"--format {source_format!r} cannot be imported; the formats are yolo and csv.")
    console.print(f"manifest: {path}", highlight=False, soft_wrap=True)


def _print_import_problems(folder: Path) -> None:
    from pillsnap.manifest.import_csv import REPORT_NAME

    report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    for kind, entry in report["problems"].items():
        line = f"{kind}: {entry['count']}, the first {entry['listed'][0]} (all in {REPORT_NAME})"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@manifest_app.command("validate")
def manifest_validate(
    path: Annotated[str, typer.Argument(help="A manifest, or the folder that holds it: a path or a URI.")],
    data_root: DataRoot = None,
    deep: Annotated[
        bool, typer.Option(help="Decode every photo and look for near-duplicates across the split.")
    ] = False,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the findings here.")] = None,  # noqa: UP045
) -> None:
    """Check a manifest against its photos, read-only: exit code 1 when it is not fit to train on."""
    from pillsnap.manifest.audit.audit import audit
    from pillsnap.storage import local_manifest

    with progress_bar("checking") as progress:
        report = audit(local_manifest(path), checked_data_root(data_root), deep=deep, progress=progress)
    report.print_summary(console)
    if json_file:
        json_file.write_text(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if report.fit else 1)
