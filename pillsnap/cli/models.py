"""`pillsnap predict`, `export`, `plan`: what is done with models beside training and judging them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from pillsnap.cli.options import (
    Assignments,
    DataRoot,
    NamedRun,
    Preset,
    RunDir,
    Stage,
    chosen_settings,
    console,
    named_run,
    uri_of,
)
from pillsnap.errors import UserError
from pillsnap.storage import join, local_manifest


def predict(
    paths: Annotated[list[str], typer.Argument(help="Photos, folders of photos, or one manifest (.parquet).")],
    run_dir: NamedRun,
    mode: Annotated[
        str, typer.Option(help="single: the best pill of a photo; combination or auto: every pill.")
    ] = "auto",
    split: Annotated[Optional[str], typer.Option(help="Only this split of a manifest.")] = None,  # noqa: UP045
    data_root: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Folder that a manifest's paths start from [default: the run's]."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here instead of the terminal.")
    ] = None,
) -> None:
    """Find and name the pills of photos: JSON with box, code, EDI codes, name, confidence and the five best codes."""
    from pillsnap.cluster.session import ray_session
    from pillsnap.evaluate.predict import list_photos, predict_manifest_photos, predict_photos
    from pillsnap.runs.directory import load_run
    from pillsnap.runs.mirror import local_run

    if mode not in ("auto", "single", "combination"):
        raise UserError(f"--mode {mode!r} is none of auto, single, combination.")
    single = mode == "single"
    whole = len(paths) == 1 and paths[0].endswith(".parquet")
    photos = [] if whole else list_photos([Path(path) for path in paths])
    run = load_run(local_run(named_run(run_dir)), uri=uri_of(named_run(run_dir)))
    with ray_session():
        if whole:
            results = predict_manifest_photos(run, paths[0], data_root, split, single=single)
        else:
            results = predict_photos(run, photos, single=single)
    text = json.dumps(results, ensure_ascii=False, indent=2)
    if json_file:
        json_file.write_text(text + "\n", encoding="utf-8")
    else:
        typer.echo(text)
    raise typer.Exit(1 if any(result["error"] for result in results) else 0)


def export(
    run_dir: NamedRun,
    file_format: Annotated[str, typer.Option("--format", help="onnx is the one there is.")] = "onnx",
    out: Annotated[Optional[Path], typer.Option(help="Folder for the files [default: RUN/onnx].")] = None,  # noqa: UP045
) -> None:
    """Write both models as ONNX, checked against torch, with a pipeline.py that needs only onnxruntime and OpenCV."""
    if file_format != "onnx":
        raise UserError(f"--format {file_format!r} is unknown: onnx is the one there is.")
    from pillsnap.export.onnx import export_run
    from pillsnap.runs.directory import load_run
    from pillsnap.runs.mirror import local_run, publish_files

    where = named_run(run_dir)
    run = load_run(local_run(where), uri=uri_of(where))
    folder = out or run.run_dir / "onnx"
    with console.status("exporting both models"):
        differences = export_run(run, folder)
    shown = str(folder)
    if run.uri and out is None:
        publish_files(run.uri, run.run_dir, folder)
        shown = join(run.uri, "onnx")
    for name, difference in differences.items():
        console.print(f"{join(shown, name)}.onnx: differs from torch by at most {difference:.1e}", soft_wrap=True)
    console.print(f"python {join(shown, 'pipeline.py')} PHOTO names pills with them", highlight=False, soft_wrap=True)


def plan(
    stage: Stage = None,
    preset: Preset = None,
    data_root: DataRoot = None,
    run_dir: RunDir = None,
    manifest: Annotated[Optional[str], typer.Option(help="Manifest [default: the run directory's, if any].")] = None,  # noqa: UP045
    budget_minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--budget", min=0.1, help="Minutes it may take [default: the preset's target]."),
    ] = None,
    alternatives: Annotated[bool, typer.Option(help="Measure other models and sizes, too.")] = True,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each measurement takes, about.")] = 5.0,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the figures here as well.")] = None,  # noqa: UP045
    assignments: Assignments = None,
) -> None:
    """Measure a few steps of both tasks and of the loader here: how long a stage will take, what limits it, what fits
    its time budget. Exit code 1 when the stage as it is set does not fit.
    """
    from pillsnap.config import run_location
    from pillsnap.runs.mirror import local_run

    budget = {"targets.total_time_s": budget_minutes * 60 if budget_minutes else None}
    settings = chosen_settings(stage, preset, budget, assignments)
    where = local_manifest(manifest) if manifest else local_run(run_location(settings, run_dir))
    found = where.is_file() or (where / "manifest.parquet").is_file()
    if manifest and not found:
        raise UserError(f"There is no manifest {manifest}: build it, or leave --manifest out to plan without one.")
    if found and not data_root:
        raise UserError("The manifest's photos are read to measure the loader: give --data-root.")
    from pillsnap.cluster.session import ray_session
    from pillsnap.planner.estimate import make_plan, read_run
    from pillsnap.planner.report import plan_lines

    run = read_run(settings, where, str(data_root)) if found else None
    with ray_session():
        figures = make_plan(
            settings, run, seconds=seconds, alternatives=alternatives,
            say=lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True),
        )  # fmt: skip
    for line in plan_lines(figures):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    raise typer.Exit(1 if figures["fits"] is False else 0)
