"""Report data on what a run used: worker and GPU hours, energy, and money where a price is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress, pairwise
from typing import Any

from pillsnap.config import TASKS
from pillsnap.evaluate.report.curves import Events, of_kind
from pillsnap.evaluate.targets import duration, percent

# Readings come every 15 s; the run was interrupted between readings that are further apart than this.
_MAX_GAP_S = 120.0


def cost(events: Events) -> dict[str, Any] | None:
    """Time, worker-hours, GPU-hours, energy and price of each task, over all starts of the run."""
    runs = of_kind(events, "run")
    settings = (runs[-1].get("config") or {}).get("evaluation") or {} if runs else {}
    price, currency = settings.get("price_per_hour"), settings.get("currency", "USD")
    used = {task.capitalize(): found for task in TASKS if (found := _used(events, task))}
    if not used:
        return None
    totals = {
        name: sum(each[name] for each in used.values()) for name in ("seconds", "worker_hours", "gpu_hours", "kwh")
    }
    if len(used) > 1:
        used["Both"] = totals
    headings = ("", "Time", "Worker-hours", "GPU-hours", "GPU energy", f"Cost, {currency}")
    known = (True, True, True, totals["gpu_hours"] > 0, totals["gpu_hours"] > 0, price is not None)
    return {
        "headings": list(compress(headings, known)),
        "rows": [list(compress(_row(name, each, price), known)) for name, each in used.items()],
        "price": price,
        "currency": currency,
        "has_unknown_energy": bool(totals["gpu_hours"] and not totals["kwh"]),
        "hardware": _hardware(events),
    }


def energy_kwh(events: Events, start_time: float, end_time: float) -> float:
    """Energy of all GPUs of the run's nodes between two unix times, by the trapezoid rule over their power readings."""
    by_gpu: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for event in of_kind(events, "system"):
        if start_time <= event["time"] <= end_time:
            for gpu in event["gpus"]:
                if gpu.get("power_w") is not None:
                    by_gpu.setdefault((event["node"], gpu["index"]), []).append((event["time"], gpu["power_w"]))
    joules = 0.0
    for readings in by_gpu.values():
        for (before, first_w), (after, second_w) in pairwise(readings):
            if after - before <= _MAX_GAP_S:
                joules += (after - before) * (first_w + second_w) / 2
    return joules / 3.6e6


def _used(events: Events, task: str) -> dict[str, float] | None:
    own = of_kind(events, "task", task)
    finished = [event for event in own if event["status"] == "finished" and event.get("duration_s")]
    if not finished:
        return None
    seconds = finished[-1]["duration_s"]
    runs = of_kind(events, "run")
    workers = runs[-1].get("num_workers") if runs else None
    hours = seconds / 3600 * (workers if isinstance(workers, int) else 1)
    has_gpu = any(event.get("gpu_memory_bytes") is not None for event in of_kind(events, "step", task))
    return {
        "seconds": seconds,
        "worker_hours": hours,
        "gpu_hours": hours if has_gpu else 0.0,
        "kwh": energy_kwh(events, own[0]["time"], finished[-1]["time"]),
    }


def _row(name: str, used: Mapping[str, float], price: float | None) -> Sequence[str]:
    return (
        name,
        duration(used["seconds"]),
        f"{used['worker_hours']:.2f}",
        f"{used['gpu_hours']:.2f}" if used["gpu_hours"] else "none",
        f"{used['kwh']:.3f} kWh" if used["kwh"] else "–",
        f"{used['seconds'] / 3600 * (price or 0.0):.2f}",
    )


def _hardware(events: Events) -> list[Sequence[str]]:
    """Name, mean utilisation and highest memory use of each GPU and of each node's processors."""
    found: dict[str, list[tuple[float | None, int | None, int | None]]] = {}
    for event in of_kind(events, "system"):
        node = event["node"]
        memory = event.get("host_memory_used_bytes"), event.get("host_memory_total_bytes")
        found.setdefault(f"{node}: processors", []).append((event.get("cpu_fraction"), *memory))
        for gpu in event["gpus"]:
            reading = (gpu.get("utilization"), gpu.get("memory_used_bytes"), gpu.get("memory_total_bytes"))
            found.setdefault(f"{node}: GPU {gpu['index']} {gpu.get('name') or ''}", []).append(reading)
    rows: list[Sequence[str]] = []
    for name, readings in sorted(found.items()):
        shares = [share for share, _, _ in readings if share is not None]
        most = max((used for _, used, _ in readings if used is not None), default=None)
        total = readings[-1][2]
        memory_text = "–" if most is None or not total else f"{most / 2**30:.1f} of {total / 2**30:.1f} GiB"
        rows.append((name, percent(sum(shares) / len(shares), 0) if shares else "–", memory_text))
    return rows
