"""Measured steps: scaled to another card, chosen by model, size and batch, and refused where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.planner.cards import CARDS, card_of, speed_ratios
from pillsnap.planner.steps_file import MeasuredStep, read_steps, step_for

SETTINGS = load_settings("demo").detection
STEP: dict[str, Any] = {
    "device": "NVIDIA H100 80GB HBM3", "source": "made up", "task": "detection", "model": SETTINGS.model,
    "image_size_px": SETTINGS.image_size_px, "batch_size": SETTINGS.batch_size, "compiled": True,
    "images_per_s": SETTINGS.batch_size / 0.05, "validation_images_per_s": 800.0, "first_step_s": 90.0,
}  # fmt: skip
SLOW, FAST = 113 / 989, 960 / 3350


def step_ms(batch_size: int = STEP["batch_size"], card: str = "RTX 5080", **changes: Any) -> list[float]:
    """Milliseconds of a step on `card`, by the slower and the faster ratio; it takes 50 ms on an H100."""
    rates = MeasuredStep(**STEP | changes).on(card, batch_size)
    return [1000 * batch_size / one.train_images_per_s for one in rates]


def test_a_card_is_found_in_the_name_of_a_device() -> None:
    assert card_of("NVIDIA H100 80GB HBM3") == "H100" and card_of("NVIDIA GeForce RTX 5080") == "RTX 5080"
    assert card_of("rtx 5080") == "RTX 5080"
    with pytest.raises(UserError, match=r"GTX 970.*H100, H200, A100, RTX 5080"):
        card_of("GTX 970")
    assert speed_ratios("RTX 5080", "H100") == pytest.approx((SLOW, FAST))
    assert speed_ratios("H100", "RTX 5080") == pytest.approx((1 / FAST, 1 / SLOW))
    assert speed_ratios("H200", "H200") == (1, 1)


def test_without_a_profile_the_whole_step_is_scaled() -> None:
    assert step_ms() == pytest.approx([50 / SLOW, 50 / FAST])


def test_only_the_time_in_which_the_gpu_works_is_scaled() -> None:
    assert step_ms(busy_ms=20) == pytest.approx([20 / SLOW, 20 / FAST])
    assert step_ms(busy_ms=2) == pytest.approx([50, 50])  # the host takes 50 ms whatever the GPU
    assert step_ms(busy_ms=10) == pytest.approx([10 / SLOW, 50])
    assert step_ms(busy_ms=49) == pytest.approx([49 / SLOW, 49 / FAST])


def test_known_arithmetic_and_traffic_give_a_roofline() -> None:
    size = STEP["batch_size"]
    # 1.13 TFLOP a step: 25 ms at 40 % of 113 TFLOPS, 10 ms at all of it; the traffic alone takes 20 ms / FAST.
    little = {"busy_ms": 20, "forward_gflop": 1130 / 3 / size}
    assert step_ms(**little) == pytest.approx([20 / FAST, 20 / FAST])
    much = {"busy_ms": 40, "forward_gflop": 11300 / 3 / size}
    assert step_ms(**much) == pytest.approx([250, 40 / FAST])


def test_a_faster_card_does_not_hurry_the_host() -> None:
    assert step_ms(card="H100", device="RTX 5080", busy_ms=20) == pytest.approx([50, 50])
    assert step_ms(card="H100", device="RTX 5080", busy_ms=50) == pytest.approx([50 * FAST, 50 * SLOW])


def test_validation_works_the_gpu_for_half_a_step() -> None:
    def val_ms(**changes: Any) -> list[float]:
        rates = MeasuredStep(**STEP | {"validation_images_per_s": size / 0.02} | changes).on("RTX 5080", size)
        return [1000 * size / one.val_images_per_s for one in rates]

    size = STEP["batch_size"]
    assert val_ms() == pytest.approx([20 / SLOW, 20 / FAST])
    assert val_ms(busy_ms=30) == pytest.approx([15 / SLOW, 15 / FAST])
    assert val_ms(busy_ms=4) == pytest.approx([20, 20])  # the host takes 20 ms whatever the GPU
    assert val_ms(busy_ms=48) == pytest.approx([20 / SLOW, 20 / FAST])


def test_the_gpu_works_for_images_and_the_host_for_steps() -> None:
    half = STEP["batch_size"] // 2
    assert step_ms(half, busy_ms=40) == pytest.approx([20 / SLOW, 20 / FAST])
    assert step_ms(half, busy_ms=8) == pytest.approx([50, 50])


def test_another_batch_is_taken_only_where_the_gpus_part_is_known() -> None:
    exact, other = MeasuredStep(**STEP), MeasuredStep(**STEP | {"batch_size": 4 * STEP["batch_size"], "busy_ms": 20})
    wanted = SETTINGS.model_copy(update={"batch_size": 4 * STEP["batch_size"]})
    assert step_for([exact, other], "detection", SETTINGS, "RTX 5080", compiled=True) is other
    with pytest.raises(UserError, match="There is no measured step"):
        step_for([exact], "detection", wanted, "RTX 5080", compiled=True)
    profiled = MeasuredStep(**STEP | {"busy_ms": 10})
    assert step_for([other, profiled], "detection", SETTINGS, "RTX 5080", compiled=True) is profiled


@pytest.mark.parametrize("change", [{"model": "yolo11x"}, {"image_size_px": 1280}, {"batch_size": 2}])
def test_a_step_that_was_not_measured_is_refused(change: dict[str, Any]) -> None:
    steps = [MeasuredStep(**STEP)]
    with pytest.raises(UserError, match=f"of {SETTINGS.model}|of yolo11x") as caught:
        step_for(steps, "detection", SETTINGS.model_copy(update=change), "RTX 5080", compiled=True)
    assert "--steps" in str(caught.value) and f"there are: {SETTINGS.model} " in str(caught.value)
    with pytest.raises(UserError):
        step_for(steps, "detection", SETTINGS, "RTX 5080", compiled=False)


def test_the_nearest_card_is_taken() -> None:
    steps = [MeasuredStep(**STEP | {"device": device}) for device in ("H200", "A100", "H100")]
    assert step_for(steps, "detection", SETTINGS, "RTX 5080", compiled=True).device == "A100"
    assert step_for(steps, "detection", SETTINGS, "H100", compiled=True).device == "H100"


def test_shipped_steps_are_of_known_cards_and_have_their_source() -> None:
    steps = read_steps(None)
    assert {step.task for step in steps} == {"detection", "classification"}
    assert all(card_of(step.device) in CARDS and Path(step.source).is_file() for step in steps)


@pytest.mark.parametrize(
    "content, named", [(None, "There is no file"), ("{", "Invalid JSON"), ('[{"device": "H100"}]', r"0\.source"),
                       (json.dumps([STEP | {"images_per_s": 0}]), r"0\.images_per_s: Input should be greater")],
)  # fmt: skip
def test_a_file_without_steps_is_refused_in_one_line(content: str | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=named) as caught:
        read_steps(path)
    assert "\n" not in str(caught.value) and "--steps" in str(caught.value)


def test_a_lease_gives_steps() -> None:
    from benchmarks.lease.steps_file import measured_steps

    report = {
        "machine": {"device": "H100"},
        "detection-yolo11m": {
            "figures": {"compiled_images_per_s": 250.0, "validation_images_per_s": 600.0, "compiled_busy_ms": 40.0,
                        "compiled_first_step_s": 147.0, "compiled_launches": 900.0},
        },
        "classification-64": {
            "figures": {"eager_images_per_s": 250.0, "validation_images_per_s": 600.0, "eager_first_step_s": 20.0,
                        "chosen": ["resnet18", 160, 64]},
        },
        "loader": {"figures": {}},
    }  # fmt: skip
    step, other = (MeasuredStep(**one) for one in measured_steps(report, "here"))
    assert (step.model, step.image_size_px, step.batch_size, step.busy_ms) == ("yolo11m", 640, 16, 40.0)
    assert step.compiled and step.images_per_s == 250
    assert (other.model, other.image_size_px, other.batch_size, other.compiled) == ("resnet18", 160, 64, False)
