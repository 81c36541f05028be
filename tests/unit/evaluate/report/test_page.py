from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import html5lib
import numpy as np
import pytest

from pillsnap.evaluate.metrics_json import collect_metrics
from pillsnap.evaluate.predictions import Predictions
from pillsnap.evaluate.report.classes import confusion
from pillsnap.evaluate.report.cost import energy_kwh
from pillsnap.evaluate.report.page import write_report
from pillsnap.evaluate.report.run_summary import split_sentence
from pillsnap.manifest.table import ClassInfo
from tests.unit.conftest import MakeTable

EVIL = '<script>alert("x")</script>'
VOID = {"br", "col", "hr", "img", "input", "meta"}
SEED = np.random.default_rng(0)


class Page(HTMLParser):
    """Reads a page, failing on tags that do not nest; keeps text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        assert not any(name.startswith("on") for name in names), f"<{tag}> has an event handler"
        self.count[tag] += 1
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def events(manifest_hash: str = "ab" * 32) -> list[dict[str, Any]]:
    run = {"run_id": "r1", "name": "demo", "config": {"detection": {"lr": 0.001}}, "versions": {"torch": "2.15"}}
    found: list[dict[str, Any]] = [
        {"kind": "run", "time": 1.7e9, "stage": 1, "manifest_hash": manifest_hash, "num_workers": 2, **run}
    ]
    for task, metrics in (
        ("detection", {"map50": 0.9, "map50_95": 0.7}),
        ("classification", {"top1": 0.8, "loss": 1.0}),
    ):
        found.append({"kind": "task", "task": task, "status": "started", "steps_per_epoch": 50, "time": 1.7e9})
        for step in range(1, 201):
            loss = None if step == 7 else 2.0 / step
            found.append(
                {"kind": "step", "task": task, "step": step, "loss": loss, "lr": 1e-3 / step, "time": 1.7e9 + step}
            )
        for epoch in range(1, 5):
            at = {"task": task, "epoch": epoch, "step": 50 * epoch, "time": 1.7e9 + 50 * epoch}
            found.append({"kind": "epoch", "duration_s": 20.0, "data_wait_fraction": 0.25, "images_per_s": 100.0, **at})
            found.append({"kind": "validation", "metrics": metrics, "best": epoch == 3, "duration_s": 5.0, **at})
        finished = {"kind": "task", "task": task, "status": "finished", "duration_s": 120.0, "time": 1.7e9 + 300}
        found.append(finished)
    found.append(
        {"kind": "quarantine", "task": "detection", "sample_id": EVIL, "reason": "truncated: cut", "time": 1.7e9}
    )
    found.append({"kind": "warning", "message": f"Mind {EVIL}", "time": 1.7e9})
    return found


MakeRun = Callable[..., dict[str, Any]]


@pytest.fixture
def run(
    tmp_path: Path, manifest_of: MakeTable, detections_of: MakeTable, crops_of: MakeTable, pipeline_of: MakeTable
) -> MakeRun:
    """An evaluated run of classes with hostile names and photos of noise; returns the arguments of `write_report`."""

    def make(num_classes: int, num_photos: int, wrong: float = 0.3) -> dict[str, Any]:
        data_root = tmp_path / "data"
        data_root.mkdir()
        codes = [f"K-{i:06d}" for i in range(num_classes - 1)] + [EVIL]
        boxes = [[100, 100, 180, 160], [500, 400, 200, 200]]
        rows, found, named, labels, top, kinds = [], [], [], [], [], []
        for number in range(num_photos):
            pair = [(2 * number) % num_classes, (2 * number + 1) % num_classes]
            guess = [(i + 1) % num_classes if SEED.random() < wrong else i for i in pair]
            sample_id = f"{EVIL}{number}"
            rows.append(
                {
                    "sample_id": sample_id,
                    "codes": [codes[i] for i in pair],
                    "boxes": boxes,
                    "image_path": f"{number % 30}.jpg",
                }
            )
            found.append((sample_id, boxes, [0.9, 0.8]))
            named.append((sample_id, boxes, [0.9, 0.8], guess))
            labels += pair
            top += [[g, (g + 1) % num_classes] for g in guess]
            kinds += ["combination"] * 2
        noise = SEED.integers(0, 255, (80, 64, 3), dtype=np.uint8)
        for number in range(min(num_photos, 30)):
            cv2.imwrite(str(data_root / f"{number}.jpg"), cv2.resize(noise, (976, 1280)))
        crops = crops_of(labels, top, image_types=kinds)
        predictions = Predictions(detections_of(found), crops, pipeline_of(named), {})
        manifest = manifest_of(rows)
        targets = {"top1": 0.5, "map50": 0.3, "total_time_s": 100.0}
        run_dir = tmp_path / EVIL.replace("/", "")
        run_dir.mkdir()
        metrics = collect_metrics(
            predictions, manifest, codes, run_name=run_dir.name, stage=1, targets=targets, total_time_s=260.0
        )
        classes = [ClassInfo(code, i, name=EVIL) for i, code in enumerate(codes)]
        return {
            "run_dir": run_dir,
            "metrics": metrics,
            "manifest": manifest,
            "classes": classes,
            "predictions": predictions,
            "events": events(),
            "data_root": data_root,
        }

    return make


def read(path: Path) -> tuple[str, Page, str]:
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    return html, page, " ".join(" ".join(page.text).split())


def test_report_shows_restricted_weighted_and_grouped_accuracy(run: MakeRun) -> None:
    kept = run(6, 9)
    assert "By attribute" not in read(write_report(**kept))[2]
    part = {"top1": 0.8125, "top5": 1.0, "macro_f1": 0.5, "num_samples": 16}
    rows = [{"value": EVIL, "num_classes": 2, "num_samples": 16, "top1": 0.4375, "top5": 1.0}]
    kept["metrics"]["restricted"] = {
        "num_codes": 20, "classification": {"restricted": part, "unrestricted": part | {"top1": 0.6875}}
    }  # fmt: skip
    weighted = {"top1": 0.5625, "top5": None, "num_classes": 2, "covered": 0.4}
    kept["metrics"]["classification"] |= {"weighted": weighted, "by_attribute": {"shape": rows}}
    side = {"top1": 0.25, "top5": 0.875, "ece": 0.1}
    both = {"num_pairs": 12, "top1": 0.9375, "top5": 1.0, "front": side, "back": side | {"top1": 0.5}}
    kept["metrics"]["classification"]["both_sides"] = both
    html, _, text = read(write_report(**kept))
    assert "Both sides of a pill as one answer 93.75 % 100.00 % – 12" in text
    assert "Their fronts alone 25.00 %" in text and "Their backs alone 50.00 %" in text
    assert "Restricted to 20 codes 81.25 %" in text and "The same crops, not restricted 68.75 %" in text
    assert "Weighted by counts, 40 % of which are covered 56.25 % –" in text
    assert "2 16 43.8 % 100.0 %" in text and EVIL not in html


def test_report_contains_the_metrics(run: MakeRun) -> None:
    kept = run(6, 9)
    path = write_report(**kept, compare={**kept["metrics"], "run": "before", "total_time_s": 520.0})
    assert path == kept["run_dir"] / "report.html"
    _, page, text = read(path)
    metrics = kept["metrics"]
    assert "1 of 3 targets missed" in text
    assert "Total time is 4 min 20 s, above the target of 1 min 40 s." in text
    assert f"{100 * metrics['classification']['top1']:.2f} %" in text
    assert "9 photos of 6 classes" in text
    assert "None of its 9 photo groups and 3 pill combinations was trained on." in text
    assert "Compared with before" in text and "−50 %" in text
    assert "best 90.0 %" in text  # mark of the validation curve
    assert "2 workers: 0.14 worker-hours." in text
    assert "detection.lr" in text and "abab" in text
    assert set(page.ids) >= {
        "verdict",
        "comparison",
        "curves",
        "detection",
        "classification",
        "pipeline",
        "photos",
        "classes",
        "data",
        "time",
        "environment",
    }
    assert len(page.ids) == len(set(page.ids))


def test_names_are_escaped_and_only_the_script_of_the_report_runs(run: MakeRun) -> None:
    html, page, text = read(write_report(**run(6, 9)))
    assert page.count["script"] == 1
    assert "alert(" in text
    assert html.lower().count("<script") == 1
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'", html)


def test_nothing_is_loaded_from_outside(run: MakeRun) -> None:
    html, page, _ = read(write_report(**run(6, 9)))
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    assert not re.search(r"url\(|@import|https?:", html.replace("http-equiv", ""))
    assert "default-src 'none'" in html
    assert len([link for link in page.links if link.startswith("data:")]) == page.count["image"] > 0


def test_a_thousand_classes_stay_under_five_megabytes(run: MakeRun) -> None:
    kept = run(1000, 700)
    path = write_report(**kept)
    assert path.stat().st_size < 5_000_000
    _, page, text = read(path)
    assert "1,000 classes" in text
    assert page.count["image"] > 12
    assert "most confused classes: true classes down, predicted across" in text
    assert re.search(r"On paper: the 60 worst classes", text)


def test_run_of_one_task_without_photos_or_events(run: MakeRun) -> None:
    kept = run(6, 9)
    kept["predictions"] = Predictions(kept["predictions"].detections, None, None, {})
    kept["metrics"] |= {"classification": None, "pipeline": None}
    kept |= {"events": [], "data_root": None}
    _, page, text = read(write_report(**kept))
    assert "The classification task was not evaluated in this run." in text
    assert "Photos are not shown" in text
    assert not {"curves", "environment", "classes"} & set(page.ids)


def test_run_without_any_metric(
    run: MakeRun, manifest_of: MakeTable, detections_of: MakeTable, crops_of: MakeTable, pipeline_of: MakeTable
) -> None:
    kept = run(3, 2)
    manifest = manifest_of([{"sample_id": "a", "codes": ["K-1"], "boxes": [None]}])
    predictions = Predictions(detections_of([]), crops_of([], []), pipeline_of([]), {})
    codes = [info.code for info in kept["classes"]]
    metrics = collect_metrics(predictions, manifest, codes, run_name="run", stage=None, targets={}, total_time_s=None)
    kept |= {"metrics": metrics, "manifest": manifest, "predictions": predictions}
    _, _, text = read(write_report(**kept))
    assert "No targets were set" in text
    assert "so the detector cannot be evaluated" in text
    assert "no combination photo" in text


def test_unread_photos_and_quarantine_are_listed(run: MakeRun) -> None:
    kept = run(6, 9)
    kept["predictions"].errors["K-9_cut"] = "corrupt: the PNG cannot be decoded"
    _, _, text = read(write_report(**kept))
    assert "2 photos could not be used" in text
    assert "K-9_cut (corrupt: the PNG cannot be decoded)" in text
    assert f"{EVIL} (truncated: cut)" in text
    assert f"Mind {EVIL}" in text


def test_time_is_divided_by_task_and_activity(run: MakeRun) -> None:
    _, _, text = read(write_report(**run(6, 9)))
    # 4 epochs of 20 s with a quarter of waiting, 4 validations of 5 s, 120 s in all; 260 s for the run.
    assert "Detection: training 1 min 00 s 23.1 %" in text
    assert "Detection: waiting for data 20 s 7.7 %" in text
    assert "Detection: validation 20 s 7.7 %" in text
    assert "Detection: start, checkpoints and the rest 20 s 7.7 %" in text
    assert "Between and after the tasks 20 s 7.7 %" in text


def test_split_sentence_counts_what_was_also_trained_on() -> None:
    facts = {"num_photos": 10, "num_classes": 3, "num_photos_trained": 40, "num_classes_not_trained": 1}
    facts |= {"num_groups": 5, "shared_groups": 2, "num_combinations": 4, "shared_combinations": 0}
    facts |= {"num_camera_views": 0, "shared_camera_views": 0, "chose_models": True}
    assert split_sentence({"split": "val", "split_facts": facts}) == (
        "All metrics are of the val split: 10 photos of 3 classes; training used 40 other photos. The same photos "
        "chose each model's epoch and fitted the temperature, so accuracy is slightly too high. None of its 4 pill "
        "combinations was trained on. Training also used 2 of its 5 photo groups. Not trained at all: 1 of its "
        "classes."
    )
    other = split_sentence({"split": "val", "split_facts": facts | {"chose_models": False}})
    assert "They had no part in choosing the models' epochs and fitting the temperature" in other


def test_the_page_is_valid_html(run: MakeRun) -> None:
    """By html5lib's strict parser, which stops at the first fault of the HTML standard's parsing rules."""
    kept = run(70, 20)
    kept["predictions"].errors[EVIL] = EVIL
    path = write_report(**kept, compare={**kept["metrics"], "run": EVIL})
    document = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(path.read_bytes())
    assert document.find("head/title").text.endswith("targets missed")
    assert len(document.findall(".//section")) >= 11
    with pytest.raises(html5lib.html5parser.ParseError):
        html5lib.HTMLParser(strict=True).parse(path.read_bytes().replace(b"</section>", b"</sectoin>", 1))


def test_hours_energy_and_price_of_a_run(run: MakeRun) -> None:
    kept = run(6, 9)
    gpu = {"index": 0, "name": "H", "utilization": 0.5, "memory_used_bytes": 2**31, "memory_total_bytes": 2**33}
    for task, first in (("detection", 0), ("classification", 600)):
        at = {"task": task, "epoch": 1, "step": 1, "loss": 1.0}
        kept["events"] = [e for e in kept["events"] if e.get("task") != task or e["kind"] in ("epoch", "quarantine")]
        kept["events"].append({"kind": "task", "task": task, "status": "started", "time": 1.7e9 + first})
        kept["events"].append({"kind": "step", "gpu_memory_bytes": 5, "time": 1.7e9 + first, **at})
        for second in range(0, 301, 15):
            reading = {"kind": "system", "node": EVIL, "cpu_fraction": 0.25, "time": 1.7e9 + first + second}
            kept["events"].append({**reading, "gpus": [{**gpu, "power_w": 200.0 + second}]})
        finished = {"status": "finished", "duration_s": 360.0, "time": 1.7e9 + first + 300}
        kept["events"].append({"kind": "task", "task": task, **finished})
    _, _, text = read(write_report(**kept))
    # 300 s at 200 to 500 W are 105,000 J; 2 workers for 360 s.
    assert "Detection 6 min 00 s 0.20 0.20 0.029 kWh" in text
    assert "Both 12 min 00 s 0.40 0.40 0.058 kWh" in text
    assert "set the price of the hardware per hour" in text and "Cost, USD" not in text
    assert f"{EVIL}: GPU 0 H 50 % 2.0 of 8.0 GiB" in text and f"{EVIL}: processors 25 %" in text

    kept["events"][0]["config"] = {"evaluation": {"price_per_hour": 2.5, "currency": "EUR"}}
    _, _, text = read(write_report(**kept))
    assert "Both 12 min 00 s 0.40 0.40 0.058 kWh 0.50" in text and "Cost, EUR" in text


def test_energy_leaves_out_the_time_between_two_starts() -> None:
    readings = [(0, 100.0), (15, 100.0), (3600, 100.0), (3615, 100.0), (3630, None)]
    found = [
        {"kind": "system", "node": "n", "time": time, "gpus": [{"index": 0, "power_w": power}]}
        for time, power in readings
    ]
    assert energy_kwh(found, 0, 1e4) == pytest.approx(3000 / 3.6e6)
    assert energy_kwh(found, 10, 20) == 0.0


def test_control_characters_are_replaced(run: MakeRun) -> None:
    kept = run(6, 9)
    kept["classes"][0] = ClassInfo(kept["classes"][0].code, 0, name="a\x00b\ud800c")
    _, _, text = read(write_report(**kept))
    assert "a\ufffdb\ufffdc" in text


def test_confusion_has_shares_of_each_row(crops_of: MakeTable) -> None:
    table = crops_of([0] * 4 + [1] * 2, [[0], [0], [0], [1], [1], [1]])
    assert confusion(table, ["K-1", "K-2"]) == {
        "codes": ["K-1", "K-2"],
        "rows": [
            [{"count": 3, "total": 4, "opacity": 0.88}, {"count": 1, "total": 4, "opacity": 0.56}],
            [None, {"count": 2, "total": 2, "opacity": 1.0}],
        ],
        "is_part": False,
    }
    assert confusion(crops_of([], []), ["K-1"]) is None


def test_wrong_cells_of_the_confusion_matrix_are_marked(run: MakeRun) -> None:
    html, _, _ = read(write_report(**run(6, 9, wrong=1.0)))
    assert 'class="bad" style="opacity:1.0" title="K-000000 taken for K-000001: 3 of 3"' in html
