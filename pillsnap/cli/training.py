"""`pillsnap demo`, `preflight` and `train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pillsnap.cli.options import (
    Assignments,
    BatchSize,
    Config,
    DataRoot,
    Epochs,
    Manifest,
    NumWorkers,
    Preset,
    RunDir,
    Stage,
    Storage,
    Task,
    checked_data_root,
    chosen_settings,
    default_manifest,
    named_run,
    training_overrides,
    uri_of,
)
from pillsnap.cli.results import show_result
from pillsnap.cli.terminal import STOPPED, console, say
from pillsnap.errors import UserError
from pillsnap.processes import without_garbage_collection


def demo(
    run_dir: Annotated[Path, typer.Option("--run", help="Run directory.")] = Path("artifacts/demo"),
) -> None:
    """Generate synthetic photos, train both models, evaluate them and write the report: a few minutes on two CPU cores.

    The same command continues an unfinished demo. Exit code 1 when a target is missed.
    """
    from pillsnap.demo import run_demo

    metrics = _unless_stopped(lambda: run_demo(run_dir.absolute(), console))
    show_result(str(run_dir.absolute()), metrics)
    raise typer.Exit(0 if metrics["met"] else 1)


def preflight(
    stage: Stage = None,
    preset: Preset = None,
    config: Config = None,
    data_root: DataRoot = None,
    run_dir: RunDir = None,
    manifest: Manifest = None,
    assignments: Assignments = None,
) -> None:
    """Check GPUs, packages, manifest, photos, models and disk before a run.

    Exit code 2 when `train` would refuse the manifest, photos, models or settings, 1 when another check fails.
    """
    from pillsnap.checklist import all_passed, print_checks
    from pillsnap.config import run_location
    from pillsnap.runs.mirror import local_run
    from pillsnap.storage import local_manifest

    settings = chosen_settings(stage, preset, config, {}, assignments)
    root = checked_data_root(data_root)
    where = run_location(settings, run_dir)
    directory = local_run(where)
    from pillsnap.cluster.preflight import INPUT_CHECKS
    from pillsnap.cluster.preflight import preflight as run_checks

    chosen = local_manifest(manifest or default_manifest(settings, run_dir, directory))
    checks = run_checks(settings, directory, chosen, root, uri_of(where))
    inputs = [check for check in checks if check.name in INPUT_CHECKS]
    if next(check.ok for check in checks if check.name == "manifest") is not False:
        from pillsnap.manifest.table import read_classes, read_manifest
        from pillsnap.train.readiness import readiness_checks

        codes = [entry.code for entry in read_classes(chosen if chosen.is_dir() else chosen.parent)]
        ready = readiness_checks(settings, read_manifest(chosen), codes, root)
        inputs, checks = inputs + ready, checks + ready
        if settings.data.store != "off":
            from pillsnap.data.fill_store import store_folder
            from pillsnap.tasks.stores import store_check

            folder = store_folder(settings.data.store_dir, where)
            checks.append(store_check(settings, directory, chosen, folder, root))
    print_checks(checks, console)
    raise typer.Exit(2 if not all_passed(inputs) else 0 if all_passed(checks) else 1)


def train(
    stage: Stage = None,
    preset: Preset = None,
    config: Config = None,
    data_root: DataRoot = None,
    run_dir: RunDir = None,
    manifest: Manifest = None,
    storage: Storage = None,
    task: Task = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the run's last checkpoint, even if the run is finished.")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="Start a new run from this checkpoint of another run.", show_default="none")
    ] = None,
    from_run: Annotated[
        str | None,
        typer.Option(help="Start a new run from the best models of this one; classes may differ.", show_default="none"),
    ] = None,
    log_level: Annotated[str, typer.Option(help="Level of train.log.")] = "INFO",
    assignments: Assignments = None,
) -> None:
    """Train the detector, then the classifier, then evaluate. The same command continues an unfinished run.

    Exit code 0 when all targets are met, 1 when one is missed.
    """
    from pillsnap.config import run_location
    from pillsnap.observe.logs import setup_logging
    from pillsnap.runs.directory import open_run
    from pillsnap.runs.driver_lock import driving

    if checkpoint is not None and from_run is not None:
        raise UserError("Give one of --checkpoint and --from-run.")
    overrides = training_overrides(task, epochs, batch_size, num_workers, storage)
    settings = chosen_settings(stage, preset, config, overrides, assignments)
    where = run_location(settings, run_dir)
    root = checked_data_root(data_root)
    with driving(where, say) as directory:
        chosen = manifest or default_manifest(settings, run_dir, directory)
        options: dict[str, Any] = {"resume": resume, "uri": uri_of(where)}
        # Late imports: torch takes seconds to load, and wrong input is reported before that.
        if from_run is not None:
            from pillsnap.train.from_run import best_checkpoints, start_from

            best = best_checkpoints(named_run(from_run), where, settings)
            run, notes = open_run(directory, settings, chosen, root, **options)
            notes += start_from(run, named_run(from_run), best)
        elif checkpoint is None:
            run, notes = open_run(directory, settings, chosen, root, **options)
        else:
            from pillsnap.runs.warm_start import adopt_checkpoint, as_config, named_checkpoint

            start = named_checkpoint(checkpoint)
            like = (str(start.path), as_config(start))
            run, notes = open_run(directory, settings, chosen, root, like=like, **options)
            notes.append(adopt_checkpoint(run, start))
        with without_garbage_collection():
            from pillsnap.train.driver import train_and_evaluate
            from pillsnap.train.readiness import readiness_checks, require_ready

            setup_logging(directory, log_level)
            begun = frozenset(name for name in run.settings.tasks if (run.checkpoint_dir(name) / "last.json").exists())
            notes += require_ready(readiness_checks(run.settings, run.manifest, run.codes, run.data_root, begun))
        for note in notes:
            say(note)
        metrics = _unless_stopped(lambda: train_and_evaluate(run, console))
    show_result(where, metrics)
    raise typer.Exit(0 if metrics["met"] else 1)


def _unless_stopped(train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a training; exit code 130 when a stop was requested."""
    from pillsnap.train.driver import RunStopped

    try:
        return train()
    except RunStopped as stopped:
        say(f"{stopped} Give the same command again to continue.")
        raise typer.Exit(STOPPED) from None
