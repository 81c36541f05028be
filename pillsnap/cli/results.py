"""`pillsnap evaluate`, `predict`, `export` and `verify`: what is done with a trained run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pillsnap.cli.options import DATA_ROOT_ENV, Allow, AttributeFile, JsonFile, NamedRun, named_run, opened_run, uri_of
from pillsnap.cli.terminal import console, progress_bar, require_output, say
from pillsnap.errors import UserError
from pillsnap.files import MISSING
from pillsnap.storage import join


def evaluate(
    run_dir: NamedRun,
    manifest: Annotated[
        str | None, typer.Option(help="Another manifest to evaluate on.", show_default="the run's manifest")
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(envvar=DATA_ROOT_ENV, help="Folder or URI of the photos.", show_default="the run's")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the manifest to evaluate: val or test.")] = "val",
    json_file: JsonFile = None,
    compare: Annotated[
        str | None, typer.Option(help="Earlier run to compare with in the report.", show_default="none")
    ] = None,
    allow: Allow = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="CSV table of code and count: adds the accuracy weighted by how often a drug is dispensed.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Evaluate a trained run on its validation photos, or on another split or manifest.

    The results of another split or manifest are in a folder of their own in the run. Exit code 0 when all targets
    are met, 1 when one is missed. With --allow, metrics.json also has the metrics of answers restricted to the
    listed codes.
    """
    from pillsnap.cluster.session import ray_session
    from pillsnap.evaluate.dispensed import read_counts
    from pillsnap.evaluate.evaluator import evaluate_run
    from pillsnap.metrics.evidence import read_allowed
    from pillsnap.observe.logs import setup_logging
    from pillsnap.runs.directory import load_run, only_driver
    from pillsnap.runs.driver_lock import driving

    where = named_run(run_dir)
    earlier = _read_metrics(compare) if compare else None
    with driving(where, say) as directory:
        run = load_run(directory, manifest_path=manifest, data_root=data_root, uri=uri_of(where))
        allowed = read_allowed(allow, run.with_enrolled().codes) if allow else None
        counts = read_counts(weights, run.codes) if weights else None
        with only_driver(directory):
            setup_logging(run.run_dir)
            with ray_session(), progress_bar("evaluating") as progress:
                metrics = evaluate_run(
                    run, compare=earlier, split=split, allowed=allowed, counts=counts, progress=progress
                )
    if json_file:
        json_file.write_text(json.dumps(metrics, ensure_ascii=False, indent=2), encoding="utf-8")
    show_result(where, metrics)
    raise typer.Exit(0 if metrics["met"] else 1)


def predict(
    paths: Annotated[list[str], typer.Argument(help="Photos, folders of photos, or one manifest (.parquet).")],
    run_dir: NamedRun,
    mode: Annotated[
        str, typer.Option(help="single: the best pill per photo; combination or auto: every pill.")
    ] = "auto",
    split: Annotated[
        str | None, typer.Option(help="Split of the manifest: train, val or test.", show_default="all photos")
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(help="Folder that a manifest's paths are relative to.", show_default="the run's")
    ] = None,
    allow: Allow = None,
    hint: Annotated[
        list[str] | None,
        typer.Option(
            help="shape=round, colour=white or imprint=YH, in Korean, too; repeatable. A wrong one lowers an "
            "answer and never hides it.",
            show_default="none",
        ),
    ] = None,
    attributes: AttributeFile = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            help="Name pills by front and back. name: photos named alike but for the side, such as 12_front.jpg and "
            "12_back.jpg, or by AI Hub's rule; order: front and back in turn.",
            show_default="none",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the result.", show_default="the terminal")
    ] = None,
) -> None:
    """Find and name the pills in photos: JSON with box, code, EDI codes, name, confidence, five best codes and answer.

    The answer is `code`, `unsure` or `unknown`. With --allow or --hint each pill also says what the photo alone
    names, and how much the list or the hints changed. With --pairs both photos of a pill also have the joint
    answer. Exit code 1 when a photo could not be read.
    """
    from pillsnap.cluster.session import ray_session
    from pillsnap.evaluate.predict import evidence_for, list_photos, predict_manifest_photos, predict_photos
    from pillsnap.manifest.attribute_table import add_attributes, read_attribute_table
    from pillsnap.runs.best_checkpoints import require_models

    if mode not in ("auto", "single", "combination"):
        raise UserError(f"--mode {mode!r} is none of auto, single, combination.")
    if pairs not in (None, "name", "order"):
        raise UserError(f"--pairs {pairs!r} is none of name, order.")
    single = mode == "single"
    is_manifest = len(paths) == 1 and paths[0].endswith(".parquet")
    photos = [] if is_manifest else list_photos([Path(path) for path in paths])
    run = opened_run(named_run(run_dir)).with_enrolled()
    if attributes:
        classes, notes = add_attributes(run.classes, read_attribute_table(attributes))
        run = replace(run, classes=classes)
        for note in notes:
            typer.echo(note, err=True)
    evidence = evidence_for(run, allow, hint or ())
    for problem in require_models(run.where, run.settings.tasks):
        typer.echo(problem, err=True)  # stdout has the JSON
    with ray_session():
        if is_manifest:
            results = predict_manifest_photos(
                run, paths[0], data_root, split, single=single, evidence=evidence, pairs=pairs
            )
        else:
            results = predict_photos(run, photos, single=single, evidence=evidence, pairs=pairs)
    text = json.dumps(results, ensure_ascii=False, indent=2)
    if json_file:
        json_file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    else:
        typer.echo(text)
        require_output()
    raise typer.Exit(1 if any(result["error"] for result in results) else 0)


def export(
    run_dir: NamedRun,
    file_format: Annotated[str, typer.Option("--format", help="Only onnx.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Folder for the files.", show_default="RUN/onnx")] = None,
) -> None:
    """Write both models as ONNX, checked against torch, with a pipeline.py that needs no PillSnap."""
    if file_format != "onnx":
        raise UserError(f"--format {file_format!r} is unknown: the only format is onnx.")
    from pillsnap.export.onnx import export_run
    from pillsnap.runs.mirror import publish_files

    run = opened_run(named_run(run_dir)).with_enrolled()
    folder = out or run.run_dir / "onnx"
    with console.status("exporting both models"):
        differences = export_run(run, folder)
    shown = str(folder)
    if run.uri and out is None:
        publish_files(run.uri, run.run_dir, folder)
        shown = join(run.uri, "onnx")
    for name, difference in differences.items():
        say(f"{join(shown, name)}.onnx: differs from torch by at most {difference:.1e}")
    say(f"To run them: python {join(shown, 'pipeline.py')} PHOTO")


def verify(run_dir: NamedRun) -> None:
    """Check a run's models, checkpoints and targets, and what the next stage needs. Exit code 1 when a check fails."""
    from pillsnap.checklist import all_passed, print_checks

    run = opened_run(named_run(run_dir))
    from pillsnap.evaluate.verify import verify_run

    checks = verify_run(run)
    print_checks(checks, console)
    raise typer.Exit(0 if all_passed(checks) else 1)


def show_result(where: str, metrics: dict[str, Any]) -> None:
    """Print the metrics of a run at `where` beside their targets, every miss, and where the report is."""
    from pillsnap.evaluate.targets import percent, results_table

    console.print(results_table(metrics))
    if answers := (metrics.get("classification") or {}).get("answers"):
        say(
            f"crops that are answered with a code: {percent(answers['coverage'])}, of which "
            f"{percent(answers['wrong'])} are wrong (limit {percent(answers['max_wrong'])})"
            + (f": {answers['reason']}" if answers["reason"] else "")
        )
    if weighted := (metrics.get("classification") or {}).get("weighted"):
        say(
            f"weighted by how often a drug is dispensed: top-1 {percent(weighted['top1'])}, over "
            f"{percent(weighted['covered'])} of the counts"
        )
    if found := metrics.get("enrolled"):
        trained, new = found["trained"], found["enrolled"]
        of_new = f"; top-1 of the enrolled drugs {percent(new['top1'])}" if new else ""
        say(
            f"with {found['num_codes']:,} enrolled drugs: top-1 of the trained drugs {percent(trained['top1'])}, "
            f"{percent(trained['alone'])} without{of_new}"
        )
    if found := metrics.get("restricted", {}).get("classification", {}).get("restricted"):
        before = metrics["restricted"]["classification"]["unrestricted"]
        say(
            f"pills of the {metrics['restricted']['num_codes']:,} possible codes: {found['num_samples']:,}, top-1 "
            f"{percent(found['top1'])} restricted to these codes, {percent(before['top1'])} without"
        )
    for miss in metrics["misses"]:
        say(miss, style="red")
    say(f"report: {join(where, '/'.join(filter(None, [metrics['folder'], 'report.html'])))}")


def _read_metrics(run_dir: str) -> dict[str, Any]:
    from pillsnap.runs.mirror import local_run

    try:
        return json.loads((local_run(named_run(run_dir)) / "metrics.json").read_text(encoding="utf-8"))
    except (*MISSING, ValueError) as error:
        raise UserError(f"{run_dir} has no metrics to compare with ({error}): evaluate it first.") from None
