"""The `pillsnap` command: one subcommand a verb. Parses and delegates.

Exit codes: 0 fine, 1 a negative answer (targets missed, not fit), 2 wrong usage or input, 130 stopped on request.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console
from typer.core import TyperGroup

from pillsnap.cli.manifest import manifest_app
from pillsnap.cli.models import export, plan, predict
from pillsnap.cli.options import (
    Assignments,
    DataRoot,
    Manifest,
    NamedRun,
    Preset,
    RunDir,
    Seed,
    Stage,
    checked_data_root,
    chosen_settings,
    console,
    default_manifest,
    named_run,
    progress_bar,
    uri_of,
)
from pillsnap.cli.prepare import prepare
from pillsnap.errors import UserError
from pillsnap.storage import join

STOPPED = 130
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class _OneLineErrors(TyperGroup):
    """Turns what a user caused into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _complain(str(error))
        except OSError as error:
            if error.errno not in _DENIED or error.filename is None:
                raise
            _complain(
                f"{error.filename}: {error.strerror}. Look at its owner, its mount and its disk, or name another."
            )
        except KeyboardInterrupt:
            Console(stderr=True).print("pillsnap: interrupted", style="red")
            sys.exit(STOPPED)


def _complain(message: str) -> NoReturn:
    Console(stderr=True).print(f"pillsnap: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Train, judge and run a two-stage pill recogniser.",
)
app.add_typer(manifest_app, name="manifest")
for command in (predict, export, plan, prepare):
    app.command()(command)


@app.command()
def demo(run_dir: RunDir = None) -> None:
    """Everything at toy size on this machine: generate photos, train both models, judge them, write the report."""
    from pillsnap.demo import run_demo

    directory = Path(run_dir or "artifacts/demo").absolute()
    metrics = _unless_stopped(lambda: run_demo(directory, console))
    _show_verdict(str(directory), metrics)
    raise typer.Exit(0 if metrics["met"] else 1)


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="Folder to write the tree into.")],
    classes: Annotated[int, typer.Option(min=1)],
    singles: Annotated[int, typer.Option(min=0, help="Photos of one pill, over all classes.")],
    combinations: Annotated[int, typer.Option(min=0, help="Photos of two to four different pills.")],
    seed: Seed = 42,
    frame: Annotated[str, typer.Option(help="Width x height in pixels.")] = "976x1280",
    image_format: Annotated[str, typer.Option("--format", help="png or jpg.")] = "png",
    likeness: Annotated[
        str, typer.Option(help="easy: shape and colour tell classes apart; shared: only the imprint does.")
    ] = "easy",
) -> None:
    """Generate pill photographs with labels in the AI Hub layout."""
    from pillsnap.synthetic import generate

    width, separator, height = frame.partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise UserError(f"--frame {frame!r} is not of the form WIDTHxHEIGHT, for example 976x1280.")
    with progress_bar("generating photos") as progress:
        tree = generate(
            out,
            num_classes=classes,
            num_singles=singles,
            num_combinations=combinations,
            seed=seed,
            frame=(int(width), int(height)),
            image_format=image_format,
            likeness=likeness,
            progress=progress,
        )
    console.print(f"{tree.num_photos} photos of {len(tree.codes)} classes in {out}", highlight=False)


@app.command()
def train(
    stage: Stage = None,
    preset: Preset = None,
    data_root: DataRoot = None,
    run_dir: RunDir = None,
    manifest: Manifest = None,
    storage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where runs are kept: a folder or a URI such as s3://bucket/runs [default: artifacts]."),
    ] = None,
    task: Annotated[Optional[str], typer.Option(help="detection, classification or both.")] = None,  # noqa: UP045
    epochs: Annotated[Optional[int], typer.Option(help="Epochs of the trained tasks.")] = None,  # noqa: UP045
    batch_size: Annotated[Optional[int], typer.Option(help="Samples a step, over all workers.")] = None,  # noqa: UP045
    num_workers: Annotated[Optional[str], typer.Option(help="auto (one a GPU), a number, or MIN:MAX.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint, also of a finished run.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Begin a new run at this checkpoint of another.")] = None,
    log_level: Annotated[str, typer.Option(help="Level of train.log.")] = "INFO",
    assignments: Assignments = None,
) -> None:
    """Train detection, then classification, then judge the run. The same command continues an unfinished run."""
    from pillsnap.config import TASKS, run_location
    from pillsnap.observe.logs import setup_logging
    from pillsnap.runs.directory import open_run
    from pillsnap.runs.driver_lock import driving

    overrides: dict[str, Any] = {"train.task": task, "train.num_workers": num_workers, "train.storage": storage}
    for name in TASKS if task in (None, "both") else (task,):
        overrides |= {f"{name}.epochs": epochs, f"{name}.batch_size": batch_size}
    settings = chosen_settings(stage, preset, overrides, assignments)
    where = run_location(settings, run_dir)
    root = checked_data_root(data_root)
    with driving(where, _say) as directory:
        chosen = manifest or default_manifest(settings, run_dir, directory)
        options: dict[str, Any] = {"resume": resume, "uri": uri_of(where)}
        # Late imports: torch takes seconds, and mistakes should not wait for it.
        if checkpoint is None:
            run, notes = open_run(directory, settings, chosen, root, **options)
        else:
            from pillsnap.runs.warm_start import adopt_checkpoint, as_config, named_checkpoint

            start = named_checkpoint(checkpoint)
            like = (str(start.path), as_config(start))
            run, notes = open_run(directory, settings, chosen, root, like=like, **options)
            notes.append(adopt_checkpoint(run, start))
        from pillsnap.train.driver import train_and_judge

        setup_logging(directory, log_level)
        for note in notes:
            _say(note)
        metrics = _unless_stopped(lambda: train_and_judge(run, console))
    _show_verdict(where, metrics)


@app.command()
def evaluate(
    run_dir: NamedRun,
    manifest: Annotated[Optional[str], typer.Option(help="Another manifest to judge on.")] = None,  # noqa: UP045
    data_root: DataRoot = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the metrics here as well.")] = None,  # noqa: UP045
    compare: Annotated[Optional[str], typer.Option(help="An earlier run, to show beside this one.")] = None,  # noqa: UP045
) -> None:
    """Judge a trained run against its targets: exit code 0 when they are met, 1 when one is missed."""
    from pillsnap.cluster.session import ray_session
    from pillsnap.evaluate.evaluator import evaluate_run
    from pillsnap.observe.logs import setup_logging
    from pillsnap.runs.directory import load_run
    from pillsnap.runs.driver_lock import driving

    where = named_run(run_dir)
    earlier = _read_metrics(compare) if compare else None
    with driving(where, _say) as directory:
        run = load_run(directory, manifest_path=manifest, data_root=data_root, uri=uri_of(where))
        setup_logging(run.run_dir)
        with ray_session(), console.status("running both models over the validation photos"):
            metrics = evaluate_run(run, compare=earlier)
    if json_file:
        json_file.write_text(json.dumps(metrics, ensure_ascii=False, indent=2), encoding="utf-8")
    _show_verdict(where, metrics)
    raise typer.Exit(0 if metrics["met"] else 1)


@app.command()
def preflight(
    stage: Stage = None,
    preset: Preset = None,
    data_root: DataRoot = None,
    run_dir: RunDir = None,
    manifest: Manifest = None,
    assignments: Assignments = None,
) -> None:
    """Look at GPU, packages, manifest, photos and disk before a run: exit code 1 when something stands in its way."""
    from pillsnap.checklist import all_passed, print_checks
    from pillsnap.config import run_location
    from pillsnap.runs.mirror import local_run
    from pillsnap.storage import local_manifest

    settings = chosen_settings(stage, preset, {}, assignments)
    root = checked_data_root(data_root)
    where = run_location(settings, run_dir)
    directory = local_run(where)
    from pillsnap.cluster.preflight import preflight as look

    chosen = local_manifest(manifest or default_manifest(settings, run_dir, directory))
    checks = look(settings, directory, chosen, root, uri_of(where))
    print_checks(checks, console)
    raise typer.Exit(0 if all_passed(checks) else 1)


@app.command()
def verify(run_dir: NamedRun) -> None:
    """Check a run's models and checkpoints, its targets, what the next stage needs: exit code 1 if something lacks."""
    from pillsnap.checklist import all_passed, print_checks
    from pillsnap.runs.directory import load_run
    from pillsnap.runs.mirror import local_run

    run = load_run(local_run(named_run(run_dir)), uri=uri_of(named_run(run_dir)))
    from pillsnap.evaluate.verify import verify_run

    checks = verify_run(run)
    print_checks(checks, console)
    raise typer.Exit(0 if all_passed(checks) else 1)


@app.command()
def monitor(
    run_dir: NamedRun,
    port: Annotated[Optional[int], typer.Option(min=1, max=65535, help="Serve the page in a browser here.")] = None,  # noqa: UP045
    host: Annotated[
        str, typer.Option(help="Address to serve on; others than this machine need a token.")
    ] = "127.0.0.1",
    token: Annotated[str | None, typer.Option(envvar="PILLSNAP_MONITOR_TOKEN", help="What viewers must know.")] = None,
    daemon: Annotated[
        bool, typer.Option(help="Serve in the background (port 8888 unless --port names another).")
    ] = False,
    stop: Annotated[bool, typer.Option(help="End the one in the background.")] = False,
) -> None:
    """Watch a run: in this terminal, or with --port or --daemon in a browser."""
    from pillsnap.monitor import daemon as background
    from pillsnap.monitor.live_copy import live_copy
    from pillsnap.monitor.server import DEFAULT_PORT, serve
    from pillsnap.monitor.terminal import watch

    where = named_run(run_dir)
    if stop:
        console.print(f"ended process {background.stop(where)}", highlight=False)
    elif daemon:
        pid = background.start(where, port or DEFAULT_PORT, host, token)
        console.print(f"process {pid} serves http://{host}:{port or DEFAULT_PORT}", highlight=False, soft_wrap=True)
    else:
        os.nice(19)  # Ray's workers run at 15: training comes first
        with live_copy(where) as directory:
            if port:
                serve(directory, host, port, token)
            else:
                raise typer.Exit(watch(directory, console))


@app.command()
def logs(
    run_dir: NamedRun,
    follow: Annotated[bool, typer.Option(help="Go on as the log grows, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option(min=0, help="Lines from the end to start with.")] = 50,
) -> None:
    """Show the end of a run's train.log."""
    from pillsnap.monitor.live_copy import live_copy
    from pillsnap.observe.logs import tail_log

    with live_copy(named_run(run_dir)) as directory:
        for line in tail_log(directory, lines, follow):
            typer.echo(line)


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _read_metrics(run_dir: str) -> dict[str, Any]:
    from pillsnap.runs.mirror import local_run

    try:
        return json.loads((local_run(named_run(run_dir)) / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir} has no metrics to compare with ({error}): evaluate it first.") from None


def _unless_stopped(train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a training; a request to stop ends the command in order."""
    from pillsnap.train.driver import RunStopped

    try:
        return train()
    except RunStopped as stopped:
        console.print(
            f"{stopped} Give the same command again to continue.", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(STOPPED) from None


def _show_verdict(where: str, metrics: dict[str, Any]) -> None:
    from pillsnap.evaluate.targets import verdict_lines

    console.print(verdict_lines(metrics))
    for miss in metrics["misses"]:
        console.print(miss, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {join(where, 'report.html')}", highlight=False, soft_wrap=True)
