"""The result of `pillsnap plan` as text."""

from __future__ import annotations

from typing import Any

_GIB = 2**30


def report_lines(figures: dict[str, Any]) -> list[str]:
    """Tables and sentences from the result of `estimate`."""
    source = "the manifest" if figures["from_manifest"] else "the settings, photos are generated"
    lines = [f"planned for {figures['device']}; counts from {source}", "", _HEADER]
    lines += [_row(task) for task in figures["tasks"]]
    lines += ["", *_minutes(figures), ""]
    for task in figures["tasks"]:
        spare = task["loader_images_per_s"] / task["model_images_per_s"]
        if task["limit"] == "loader":
            lines.append(f"{task['task']} is limited by the loader, which reaches {spare:.0%} of the model's rate")
        else:
            lines.append(f"{task['task']} is limited by the model; the loader is {spare:.1f} times as fast")
    lines += ["", "assumptions:", *(f"- {text}" for text in figures["assumptions"])]
    if figures["alternatives"]:
        lines += ["", "other models and sizes:", _HEADER, *map(_row, figures["alternatives"])]
    budget_s = figures["budget_s"]
    if budget_s is None:
        return [*lines, "", "no time budget: set one with --budget MINUTES"]
    lines += ["", f"budget {budget_s / 60:.0f} min: " + ("it fits" if figures["fits"] else "it does not fit")]
    epochs = " and ".join(f"{count} epochs of {task}" for task, count in figures["epochs_within_budget"].items())
    lines.append(f"with these models, the budget allows {epochs}")
    largest = figures["largest_within_budget"]
    if largest:
        chosen = ", ".join(f"{task['model']} at {task['image_size_px']} px ({task['task']})" for task in largest)
        total_s = sum(task["seconds"] for task in largest)
        lines.append(
            f"largest measured models that fit with their epochs: {chosen}, {total_s / 60:.0f} min plus evaluation"
        )
    else:
        lines.append("none of the measured models fits with its epochs: reduce epochs or photos, or change machines")
    return lines


_HEADER = (
    f"{'task':16}{'model':24}{'px':>5}{'model img/s':>13}{'loader img/s':>14}{'limit':>8}{'epochs':>8}{'samples':>11}"
    f"{'minutes':>9}{'GPU GiB':>9}"
)


def _row(task: dict[str, Any]) -> str:
    peak = task["peak_memory_bytes"]
    return (
        f"{task['task']:16}{task['model']:24}{task['image_size_px']:>5}{task['model_images_per_s']:>13.1f}"
        f"{task['loader_images_per_s']:>14.1f}{task['limit']:>8}{task['epochs']:>8}{task['num_train_seen']:>11,}"
        f"{task['seconds'] / 60:>9.1f}{'-' if peak is None else format(peak / _GIB, '.1f'):>9}"
    )


def _minutes(figures: dict[str, Any]) -> list[str]:
    """Where each minute goes: one row per task, one column per part."""
    tasks = figures["tasks"]
    parts = list(tasks[0]["parts_s"])
    rows = [("minutes", *parts, "total")]
    for task in tasks:
        seconds = (*task["parts_s"].values(), task["seconds"])
        rows.append((task["task"], *(f"{value / 60:.1f}" for value in seconds)))
    rows.append(("evaluation", *[""] * len(parts), f"{figures['judgement_s'] / 60:.1f}"))
    rows.append(("all", *[""] * len(parts), f"{figures['total_s'] / 60:.1f}"))
    lines = [f"{name:16}" + "".join(f"{text:>12}" for text in texts) for name, *texts in rows]
    if figures["fastest_total_s"] < figures["total_s"]:
        lines.append(f"by the faster of the published ratios {figures['fastest_total_s'] / 60:.1f} min")
    return lines
