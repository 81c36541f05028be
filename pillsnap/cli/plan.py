"""`pillsnap plan`: how long a stage will take here."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pillsnap.cli.options import (
    Assignments,
    Config,
    DataRoot,
    JsonFile,
    Manifest,
    Preset,
    RunDir,
    Stage,
    chosen_settings,
)
from pillsnap.cli.terminal import say
from pillsnap.errors import UserError
from pillsnap.storage import local_manifest


def plan(
    stage: Stage = None,
    preset: Preset = None,
    config: Config = None,
    data_root: DataRoot = None,
    run_dir: RunDir = None,
    manifest: Manifest = None,
    budget_minutes: Annotated[
        float | None,
        typer.Option("--budget", min=0.1, help="Time budget in minutes.", show_default="targets.total_time_s"),
    ] = None,
    alternatives: Annotated[bool, typer.Option(help="Also measure other models and input sizes.")] = True,
    seconds: Annotated[float, typer.Option(min=0.1, help="Approximate time per measurement, seconds.")] = 5.0,
    card: Annotated[
        str | None,
        typer.Option("--as", help='Plan for this GPU, such as "RTX 5080".', show_default="this machine's"),
    ] = None,
    steps_file: Annotated[
        Path | None,
        typer.Option(
            "--steps",
            help="With --as: file of steps measured on a GPU.",
            show_default="this machine's GPU, else the package's figures",
        ),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(
            min=1, help="Plan for this number of CPU cores; the loader is scaled to it.", show_default="this machine's"
        ),
    ] = None,
    json_file: JsonFile = None,
    assignments: Assignments = None,
) -> None:
    """Measure a few training steps and the loader, and estimate how long the stage takes and what limits it.

    Without a manifest, the counts are those of the settings and the photos are generated. With --as, steps are reckoned
    by published ratios of GPUs. Exit code 1 when the stage exceeds its time budget.
    """
    if steps_file and not card:
        raise UserError("--steps says how fast another GPU was: give --as as well, the GPU to plan for.")
    from pillsnap.config import run_location
    from pillsnap.planner.cards import card_of
    from pillsnap.runs.mirror import local_run

    card = card_of(card) if card else None
    budget = {"targets.total_time_s": budget_minutes * 60 if budget_minutes else None}
    settings = chosen_settings(stage, preset, config, budget, assignments)
    run_at = run_location(settings, run_dir)
    where = local_manifest(manifest) if manifest else local_run(run_at)
    found = where.is_file() or (where / "manifest.parquet").is_file()
    if manifest and not found:
        raise UserError(f"There is no manifest {manifest}: build it, or leave --manifest out to plan without one.")
    if found and not data_root:
        raise UserError("The manifest's photos are read to measure the loader: give --data-root.")
    from pillsnap.cluster.session import ray_session
    from pillsnap.planner.estimate import estimate
    from pillsnap.planner.loader_rates import read_run
    from pillsnap.planner.report import report_lines
    from pillsnap.planner.step_rates import Target

    run = read_run(settings, run_at, where, str(data_root)) if found else None
    with ray_session():
        figures = estimate(
            settings, run, seconds=seconds, alternatives=alternatives,
            say=partial(say, style="dim"), target=Target(card, steps_file) if card else None, cores=cores,
        )  # fmt: skip
    for line in report_lines(figures):
        say(line)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    raise typer.Exit(1 if figures["fits"] is False else 0)
