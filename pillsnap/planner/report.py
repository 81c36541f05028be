"""What `pillsnap plan` found, as lines of text."""

from __future__ import annotations

from typing import Any

_GIB = 2**30


def plan_lines(figures: dict[str, Any]) -> list[str]:
    """The plan as a table and sentences, from the figures of `planner.make_plan`."""
    source = "the manifest" if figures["from_manifest"] else "the settings, photos generated"
    lines = [f"measured on {figures['device']}; counts from {source}", "", _HEADER]
    lines += [_row(task) for task in figures["tasks"]]
    total_min = figures["total_s"] / 60
    lines.append(f"judgement {figures['judgement_s'] / 60:.1f} min; in all {total_min:.0f} min")
    for task in figures["tasks"]:
        spare = task["loader_images_per_s"] / task["model_images_per_s"]
        if task["limit"] == "loader":
            lines.append(f"{task['task']} waits for the loader: it makes {spare:.0%} of what the model takes")
        else:
            lines.append(f"{task['task']} is limited by its model: the loader could make {spare:.1f} times as much")
    if figures["alternatives"]:
        lines += ["", "other models and sizes:", _HEADER, *map(_row, figures["alternatives"])]
    budget_s = figures["budget_s"]
    if budget_s is None:
        return [*lines, "", "there is no time budget: name one with --budget MINUTES"]
    lines += ["", f"budget {budget_s / 60:.0f} min: " + ("it fits" if figures["fits"] else "it does not fit")]
    epochs = " and ".join(f"{count} epochs of {task}" for task, count in figures["epochs_within_budget"].items())
    lines.append(f"with these models the budget holds {epochs}")
    largest = figures["largest_within_budget"]
    if largest:
        chosen = ", ".join(f"{task['model']} at {task['image_size_px']} px ({task['task']})" for task in largest)
        total_s = sum(task["seconds"] for task in largest)
        lines.append(
            f"largest of the measured that fit, at their epochs: {chosen}, {total_s / 60:.0f} min and judgement"
        )
    else:
        lines.append("none of the measured models fits at its epochs: take fewer epochs, photos, or a faster machine")
    return lines


_HEADER = (
    f"{'task':16}{'model':24}{'px':>5}{'model img/s':>13}{'loader img/s':>14}{'limit':>8}{'epochs':>8}{'minutes':>9}"
    f"{'GPU GiB':>9}"
)


def _row(task: dict[str, Any]) -> str:
    peak = task["peak_memory_bytes"]
    return (
        f"{task['task']:16}{task['model']:24}{task['image_size_px']:>5}{task['model_images_per_s']:>13.1f}"
        f"{task['loader_images_per_s']:>14.1f}{task['limit']:>8}{task['epochs']:>8}{task['seconds'] / 60:>9.1f}"
        f"{'-' if peak is None else format(peak / _GIB, '.1f'):>9}"
    )
