"""Report data on how the run went: data quality, time, environment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import pyarrow as pa

from pillsnap.config import TASKS
from pillsnap.evaluate.report.curves import Events, of_kind

_MAX_LISTED = 50


def data_quality(manifest: pa.Table, events: Events, unread: Mapping[str, str]) -> dict[str, Any]:
    """Photos by split, photos that could not be used (id and reason), and messages of the run."""
    bad = {(event["sample_id"], event["reason"]) for event in of_kind(events, "quarantine")} | set(unread.items())
    # By kind of reason ("truncated: ..." and the like), then by photo.
    listed = sorted(bad, key=lambda item: (item[1].partition(":")[0], item))
    messages = []
    for kind, title in (("warning", "Warnings"), ("failure", "Failures during the run")):
        found = Counter(
            " ".join(str(event[key]) for key in ("message", "cause", "advice") if event.get(key))
            for event in of_kind(events, kind)
        )
        if found:
            lines = [text if n == 1 else f"{text} ({n} times)" for text, n in found.most_common(_MAX_LISTED)]
            messages.append((title, lines))
    return {
        "splits": _photo_counts(manifest),
        "num_bad": len({sample_id for sample_id, _ in bad}),
        "reasons": sorted(Counter(reason.partition(":")[0] for _, reason in bad).items()),
        "bad": [f"{sample_id} ({reason})" for sample_id, reason in listed[:_MAX_LISTED]],
        "num_not_listed": max(len(listed) - _MAX_LISTED, 0),
        "messages": messages,
    }


def split_sentence(metrics: Mapping[str, Any]) -> str:
    """Which split the metrics are from, what it decided before, and how much of it was also trained on."""
    facts, split = metrics["split_facts"], metrics["split"]
    text = (
        f"All metrics are of the {split} split: {facts['num_photos']:,} photos of {facts['num_classes']:,} classes; "
        f"training used {facts['num_photos_trained']:,} other photos. "
    )
    if facts["chose_models"]:
        text += (
            "The same photos chose each model's epoch and fitted the temperature, so accuracy is slightly too high. "
        )
    else:
        text += "They had no part in choosing the models' epochs and fitting the temperature: the run's own split did. "
    unseen: list[str] = []
    seen: list[str] = []
    for name, what in (
        ("groups", "photo groups"),
        ("combinations", "pill combinations"),
        ("camera_views", "camera views of single pills"),
    ):
        total, shared = facts[f"num_{name}"], facts[f"shared_{name}"]
        if total and not shared:
            unseen.append(f"{total:,} {what}")
        elif total:
            seen.append(f"{shared:,} of its {total:,} {what}")
    if unseen:
        text += f"None of its {_joined(unseen)} was trained on. "
    if seen:
        text += f"Training also used {_joined(seen)}. "
    if facts["num_classes_not_trained"]:
        text += f"Not trained at all: {facts['num_classes_not_trained']:,} of its classes."
    return text.strip()


def time_breakdown(metrics: Mapping[str, Any], events: Events) -> dict[str, Any]:
    """`parts` of the total time (name, seconds, share, colour, whether paler), speeds per task, starts, workers."""
    total = metrics["total_time_s"]
    by_task = {task: times for task in TASKS if (times := _task_times(events, task))}
    in_tasks = sum(sum(times.values()) for times in by_task.values())
    whole = max(total or 0.0, in_tasks) or 1.0
    parts: list[tuple[str, float, float, str | None, bool]] = []
    for task, times in by_task.items():
        color = "blue" if task == "detection" else "orange"
        shades = (color, "ink", color, "grey")
        for (name, seconds), shade in zip(times.items(), shades, strict=True):
            is_pale = name == "validation"
            parts.append((f"{task.capitalize()}: {name}", seconds, seconds / whole, shade, is_pale))
    rest = (total or 0.0) - in_tasks
    if total and rest > 0.005 * total:
        parts.append(("Between and after the tasks", rest, rest / whole, None, False))
    speeds = []
    for task in TASKS:
        epochs = of_kind(events, "epoch", task)
        rates = [event["images_per_s"] for event in epochs if event.get("images_per_s")]
        waits = [event["data_wait_fraction"] for event in epochs if event.get("data_wait_fraction") is not None]
        if rates:
            speeds.append((task.capitalize(), len(epochs), median(rates), median(waits) if waits else None))
    runs = of_kind(events, "run")
    workers = runs[-1].get("num_workers") if runs else None
    return {
        "total_s": total,
        "parts": parts,
        "speeds": speeds,
        "num_starts": len(runs),
        "num_workers": workers if isinstance(workers, int) else None,
    }


def environment(events: Events) -> dict[str, Any] | None:
    """Versions, manifest hash and settings, as recorded by the last start of the run."""
    runs = of_kind(events, "run")
    if not runs:
        return None
    run = runs[-1]
    return {
        "run": run,
        "first_start": runs[0]["time"],
        "versions": _flat(run["versions"]),
        "settings": _flat(run["config"]),
    }


def moment(time_s: float) -> str:
    """Unix seconds as a date and time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time_s))


def _task_times(events: Events, task: str) -> dict[str, float] | None:
    """Seconds by activity, in the order of the report."""
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
        "training": training - waiting,
        "waiting for data": waiting,
        "validation": validation,
        "start, checkpoints and the rest": whole - training - validation,
    }


def _photo_counts(manifest: pa.Table) -> list[tuple[str, int, int, int, int]]:
    """Split, single photos, combination photos, pills, pills without a label box."""
    columns = (manifest[name].to_pylist() for name in ("split", "image_type", "boxes"))
    photos: Counter[tuple[str, str]] = Counter()
    pills: Counter[str] = Counter()
    unlabelled: Counter[str] = Counter()
    for split, image_type, boxes in zip(*columns, strict=True):
        photos[split, image_type] += 1
        pills[split] += len(boxes)
        unlabelled[split] += sum(box is None for box in boxes)
    return [
        (split, photos[split, "single"], photos[split, "combination"], pills[split], unlabelled[split])
        for split in sorted(pills)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
