"""Report sections on how the run went: data quality, time, environment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import pyarrow as pa

from pillsnap.evaluate.report.curves import TASKS, Events, of_kind
from pillsnap.evaluate.report.markup import Content, Markup, grid, section, tag
from pillsnap.evaluate.targets import duration, percent

_MAX_LISTED = 50


def data_quality(metrics: Mapping[str, Any], manifest: pa.Table, events: Events, unread: Mapping[str, str]) -> Markup:
    """What the data held, what was left out of judging, and what could not be used."""
    counts = _photo_counts(manifest)
    table = grid(
        ("Split", "Single photos", "Combination photos", "Pills", "Pills without a label box"), counts, (1, 2, 3, 4)
    )
    parts: list[Content] = [table, _left_out(metrics)]
    quarantined = {(event["sample_id"], event["reason"]) for event in of_kind(events, "quarantine")} | set(
        unread.items()
    )
    parts.append(tag("h3", "Photos that could not be used"))
    if quarantined:
        groups: dict[str, list[str]] = {}
        for sample_id, reason in sorted(quarantined):
            groups.setdefault(reason.partition(":")[0], []).append(f"{sample_id} ({reason})")
        ids = len({sample_id for sample_id, _ in quarantined})
        rows = [[reason, f"{len(listed):,}"] for reason, listed in sorted(groups.items())]
        listed = [line for lines in groups.values() for line in lines]
        more = f"and {len(listed) - _MAX_LISTED:,} more in events.jsonl" if len(listed) > _MAX_LISTED else None
        parts += [
            tag("p", f"{ids:,} photos could not be used; each was left out, and replaced or masked in training."),
            grid(("Reason", "Photos"), rows, (1,)),
            tag(
                "details",
                tag("summary", "Which ones"),
                _messages([*listed[:_MAX_LISTED], *([more] if more else [])]),
            ),
        ]
    else:
        parts.append(tag("p", "None: every photo could be read."))
    for kind, title in (("warning", "Warnings"), ("failure", "Failures on the way")):
        found = Counter(_message(event) for event in of_kind(events, kind))
        if found:
            lines = [text if n == 1 else f"{text} ({n} times)" for text, n in found.most_common(_MAX_LISTED)]
            parts += [tag("h3", title), _messages(lines)]
    return section("data", "Data quality", *parts)


def split_sentence(metrics: Mapping[str, Any]) -> str:
    """Which split the figures are from, and what of it training has seen."""
    facts, split = metrics["split_facts"], metrics["split"]
    text = (
        f"All figures are from the {split} split: {facts['num_photos']:,} photos of {facts['num_classes']:,} classes; "
    )
    text += f"training had {facts['num_photos_trained']:,} other photos. "
    held: list[str] = []
    seen: list[str] = []
    for name, singular, what in (
        ("groups", "shared_groups", "photo groups"),
        ("combinations", "shared_combinations", "pill combinations"),
        ("camera_views", "shared_camera_views", "camera views of single pills"),
    ):
        total, shared = facts[f"num_{name}"], facts[singular]
        if total and not shared:
            held.append(f"{total:,} {what}")
        elif total:
            seen.append(f"{shared:,} of its {total:,} {what}")
    if held:
        text += f"None of its {_listed(held)} was trained on. "
    if seen:
        text += f"Training has also seen {_listed(seen)}."
    if facts["num_classes_not_trained"]:
        text += f" Not trained at all: {facts['num_classes_not_trained']:,} of its classes."
    return text.strip()


def time_breakdown(metrics: Mapping[str, Any], events: Events) -> Markup:
    """Where the time went, and how much of it the devices waited for data."""
    rows: list[list[Content]] = []
    stack: list[Content] = []
    total = metrics["total_time_s"]
    parts = [(task, _task_times(events, task)) for task in TASKS]
    in_tasks = sum(times["duration_s"] for _, times in parts if times)
    whole = max(total or 0.0, in_tasks) or 1.0
    for color, (task, times) in zip(("c1", "c2"), parts, strict=True):
        if not times:
            continue
        for name, key, shade in (
            ("training", "training_s", color),
            ("waiting for data", "waiting_s", "wait"),
            ("validation", "validation_s", color),
            ("start, checkpoints and the rest", "rest_s", "c3"),
        ):
            seconds = times[key]
            opacity = ";opacity:.55" if key == "validation_s" else ""
            stack.append(tag("i", class_=shade, style=f"width:{100 * seconds / whole:.2f}%{opacity}"))
            label = [tag("i", class_=f"key {shade}", style=opacity[1:] or None), f"{task.capitalize()}: {name}"]
            rows.append([label, duration(seconds), percent(seconds / whole, 1)])
    if total and total - in_tasks > 0.005 * total:
        rows.append(
            [
                [tag("i", class_="key"), "Between and after the tasks"],
                duration(total - in_tasks),
                percent((total - in_tasks) / whole, 1),
            ]
        )
    rows.append([tag("b", "Total"), tag("b", duration(total)), ""])
    speeds: list[list[Content]] = []
    for task in TASKS:
        epochs = of_kind(events, "epoch", task)
        rates = [event["images_per_s"] for event in epochs if event.get("images_per_s")]
        waits = [event["data_wait_fraction"] for event in epochs if event.get("data_wait_fraction") is not None]
        if rates:
            wait = percent(median(waits), 1) if waits else "–"
            speeds.append([task.capitalize(), f"{len(epochs)}", f"{median(rates):,.0f}", wait])
    runs = of_kind(events, "run")
    workers = runs[-1].get("num_workers") if runs else None
    notes = []
    if len(runs) > 1:
        notes.append(f"The run was started {len(runs)} times.")
    if isinstance(workers, int) and total:
        notes.append(f"{workers} worker{'s' if workers > 1 else ''}: {workers * total / 3600:.2f} worker-hours.")
    headings = ("Task", "Epochs", "Images a second (median epoch)", "Waiting for data (median)")
    return section(
        "time",
        "Time",
        tag("p", " ".join(notes)) if notes else None,
        tag("div", stack, class_="stack") if stack else None,
        grid(("", "Time", "Share"), rows, (1, 2)),
        grid(headings, speeds, (1, 2, 3)) if speeds else None,
    )


def environment(events: Events) -> Markup | None:
    """Versions, manifest hash and settings, as the last start of the run wrote them."""
    runs = of_kind(events, "run")
    if not runs:
        return None
    run = runs[-1]
    facts: list[list[Content]] = [
        ["Run id", tag("code", str(run["run_id"]))],
        ["Manifest (sha256)", tag("code", str(run["manifest_hash"]))],
        ["Workers", str(run["num_workers"])],
        ["First started", moment(runs[0]["time"])],
        ["Last started", moment(run["time"])],
    ]
    versions = [[name, tag("code", text)] for name, text in _flat(run["versions"])]
    settings = [[tag("code", name), tag("code", text)] for name, text in _flat(run["config"])]
    return section(
        "environment",
        "Environment",
        tag("div", grid(("", ""), facts), grid(("", ""), versions), class_="two"),
        tag("details", tag("summary", f"All {len(settings)} settings"), grid(("Setting", "Value"), settings)),
    )


def moment(time_s: float) -> str:
    """Unix seconds as a date and time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time_s))


def _task_times(events: Events, task: str) -> dict[str, float] | None:
    epochs, validations = of_kind(events, "epoch", task), of_kind(events, "validation", task)
    own = [event for event in events if event.get("task") == task and event["kind"] != "quarantine"]
    if not epochs:
        return None
    finished = [
        e["duration_s"] for e in own if e["kind"] == "task" and e["status"] == "finished" and e.get("duration_s")
    ]
    training = sum(event.get("duration_s") or 0.0 for event in epochs)
    waiting = sum((e.get("duration_s") or 0.0) * (e.get("data_wait_fraction") or 0.0) for e in epochs)
    validation = sum(event.get("duration_s") or 0.0 for event in validations)
    whole = max(finished[-1] if finished else own[-1]["time"] - own[0]["time"], training + validation)
    return {
        "duration_s": whole,
        "training_s": training - waiting,
        "waiting_s": waiting,
        "validation_s": validation,
        "rest_s": whole - training - validation,
    }


def _photo_counts(manifest: pa.Table) -> list[list[Content]]:
    rows: list[list[Content]] = []
    columns = (manifest[name].to_pylist() for name in ("split", "image_type", "boxes"))
    photos: Counter[tuple[str, str]] = Counter()
    pills: Counter[tuple[str, bool]] = Counter()
    for split, image_type, boxes in zip(*columns, strict=True):
        photos[split, image_type] += 1
        for box in boxes:
            pills[split, box is None] += 1
    for split in sorted({split for split, _ in photos}):
        single, combination = photos[split, "single"], photos[split, "combination"]
        unlabelled = pills[split, True]
        rows.append(
            [split, f"{single:,}", f"{combination:,}", f"{pills[split, False] + unlabelled:,}", f"{unlabelled:,}"]
        )
    return rows


def _left_out(metrics: Mapping[str, Any]) -> Markup:
    lines = [
        f"{metrics[part]['num_photos_left_out']:,} photos are left out of the {name} figures: a pill in them has no "
        "label box, and finding it would count as a mistake."
        for part, name in (("detection", "detection"), ("pipeline", "end-to-end"))
        if metrics[part] is not None and metrics[part]["num_photos_left_out"]
    ]
    return tag("p", " ".join(lines) or "Every judged photo has a label box for every pill: none was left out.")


def _message(event: Mapping[str, Any]) -> str:
    return " ".join(str(event[key]) for key in ("message", "cause", "advice") if event.get(key))


def _messages(lines: Sequence[str]) -> Markup:
    return tag("ul", [tag("li", line) for line in lines], class_="msg")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
