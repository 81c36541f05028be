"""The page in Chromium: shows the log within two seconds, escapes texts, and fits every screen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from pillsnap.monitor.server import make_app
from pillsnap.observe.events import EventLog

OpenPage = Callable[[], AbstractAsyncContextManager[Any]]
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def write_run(log: EventLog, name: str = "night") -> None:
    log.write("run", run_id=name, name=name, stage=3, config={}, manifest_hash="h", num_workers=1, versions={})
    log.write("task", task="detection", status="started", epochs=4, steps_per_epoch=50, num_train=800, num_val=200)
    write_steps(log, 1, 100)


def write_steps(log: EventLog, first: int, last: int, loss: float = 40.0) -> None:
    for step in range(first, last + 1):
        log.write(
            "step",
            task="detection",
            epoch=1 + (step - 1) // 50,
            step=step,
            loss=loss / step,
            lr=2e-4,
            images_per_s=118.4,
            data_wait_fraction=0.031,
            gpu_memory_bytes=3 << 30,
            eta_s=3725.0,
        )
        if step % 50 == 0:
            at = {"task": "detection", "epoch": step // 50, "step": step}
            log.write("validation", **at, metrics={"map50": step / 400, "map50_95": step / 800}, best=True)


def field(name: str) -> str:
    return f"document.querySelector(\"[data-field='{name}']\")?.textContent"


def test_state_is_shown_within_two_seconds_and_across_a_restart(tmp_path: Path, open_page: OpenPage) -> None:
    async def scenario() -> None:
        with EventLog(tmp_path / "night") as log:
            write_run(log)
            async with TestServer(make_app(tmp_path / "night")) as server, open_page() as page:
                await page.open(f"{server.make_url('/')}?lang=en")
                await page.wait_for(f"{field('detection.loss')} === '0.4'")
                text = await page.evaluate("document.querySelector('#detection').innerText")
                for figure in (
                    "epoch 2/4 · step 100/200 · train 800 · val 200",
                    "1:02:05 left",
                    "118 img/s",
                    "3 %",
                    "2.00e-4",
                    "3.0 GiB",
                    "mAP@0.5:0.95\n0.125\nepoch 2",
                ):
                    assert figure in text, (figure, text)
                assert await page.evaluate("document.querySelector('#detection .bar span').style.width") == "50%"
                delays_s = []
                for first, last, loss, shown in ((101, 125, 40.0, "0.32"), (126, 160, 400.0, "2.5")):
                    write_steps(log, first, last, loss)
                    delays_s.append(await page.wait_for(f"{field('detection.loss')} === '{shown}'"))
                log.write("failure", message="worker 0 died", cause="killed", advice="it starts again")
                await page.wait_for("!document.querySelector('#failure').hidden")
                log.write("task", task="detection", status="started", epoch=2, step=100)
                write_steps(log, 101, 110, 220.0)
                delays_s.append(await page.wait_for(f"{field('detection.loss')} === '2'"))
                assert min(delays_s) < 2  # a busy machine may delay the others
                assert await page.evaluate("document.querySelector('#failure').hidden") is True
                position = await page.evaluate("document.querySelector('#detection .position').textContent")
                assert "step 110/200" in position and "1 restart" in position
                log.write(
                    "verdict", met=True, targets={"detection_map50": {"target": 0.3, "value": 0.6124, "met": True}}
                )
                await page.wait_for("document.querySelector('#status').textContent === 'targets met'")
                assert "Detection mAP@0.5\t0.6124\t0.3\tmet" in await page.evaluate(
                    "document.querySelector('#targets').innerText"
                )

    asyncio.run(scenario())


def test_texts_of_a_run_are_not_interpreted_as_html(tmp_path: Path, open_page: OpenPage) -> None:
    async def scenario() -> None:
        with EventLog(tmp_path / "night") as log:
            write_run(log, HOSTILE)
            log.write("warning", message=HOSTILE)
            log.write("quarantine", task="detection", sample_id=HOSTILE, reason=HOSTILE)
            log.write("failure", message=HOSTILE, cause=HOSTILE, advice=HOSTILE)
            log.write("validation", task="detection", epoch=2, step=100, metrics={HOSTILE: 0.5})
            log.write("verdict", met=False, targets={HOSTILE: {"target": 1, "value": 2, "met": False}})
            async with TestServer(make_app(tmp_path / "night")) as server, open_page() as page:
                await page.open(f"{server.make_url('/')}?lang=en")
                await page.wait_for(f"{field('num_warnings')} === '1'")
                await asyncio.sleep(0.3)
                assert await page.evaluate("document.querySelectorAll('body script').length") == 1
                assert await page.evaluate("[...document.images].every(image => image.closest('figure'))")
                assert HOSTILE in await page.evaluate("document.querySelector('#warnings').textContent")
                assert HOSTILE in await page.evaluate("document.querySelector('#detection').textContent")
                assert await page.evaluate("document.title") == f"{HOSTILE} · targets missed"

    asyncio.run(scenario())


def test_run_and_language_can_be_selected(tmp_path: Path, open_page: OpenPage) -> None:
    async def scenario() -> None:
        for name, last in (("one", 150), ("two", 200)):
            with EventLog(tmp_path / name) as log:
                write_run(log, name)
                write_steps(log, 101, last)
        async with TestServer(make_app(tmp_path / "one")) as server, open_page() as page:
            await page.open(f"{server.make_url('/')}?lang=en")
            await page.wait_for("document.querySelector('#detection .position')?.textContent.includes('step 150/200')")
            await page.evaluate(
                "{ const s = document.querySelector('#runs'); s.value = 'two'; s.dispatchEvent(new Event('change')) }"
            )
            await page.wait_for("document.querySelector('#detection .position')?.textContent.includes('step 200/200')")
            await page.evaluate("document.querySelector('#language').click()")
            await page.wait_for("document.querySelector('#detection .name').textContent === '검출'")
            assert await page.evaluate("document.documentElement.lang") == "ko"

    asyncio.run(scenario())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_page_has_no_horizontal_overflow(
    tmp_path: Path, open_page: OpenPage, screenshots: Path, width: int, height: int, scheme: str
) -> None:
    """Keeps a screenshot for review."""

    async def scenario() -> None:
        with EventLog(tmp_path / "night") as log:
            write_run(log, "a-run-with-a-name-that-somebody-made-quite-long-indeed")
            log.write("warning", message="x" * 300)
            gpu = {
                "index": 0,
                "name": "NVIDIA GeForce RTX 5080",
                "utilization": 0.87,
                "temperature_c": 66,
                "power_w": 251.4,
            }
            gpu |= {"memory_used_bytes": 3 << 30, "memory_total_bytes": 16 << 30}
            log.write("system", node="a-node-with-a-long-name.example.org", gpus=[gpu, {**gpu, "index": 1}])
            log.write("quarantine", task="detection", sample_id="K-001900-010224_0_2_0_2_75_120_200" * 4, reason="torn")
        async with TestServer(make_app(tmp_path / "night")) as server, open_page() as page:
            await page.open(f"{server.make_url('/')}?lang=ko", width, height, scheme)
            await page.wait_for(
                "document.querySelector('#detection canvas')?.clientHeight && document.querySelector('.meter')"
            )
            await asyncio.sleep(0.3)
            assert await page.evaluate("document.documentElement.scrollWidth") == width
            ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(245, 246, 248)" if scheme == "light" else "rgb(14, 17, 22)")
            drawn = await page.evaluate(
                "[...document.querySelectorAll('canvas')].filter(c => c.clientHeight)"
                ".every(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v))"
            )
            assert drawn is True
            nodes = await page.evaluate("document.querySelector('#machine').innerText")
            assert "GPU 1 NVIDIA GeForce RTX 5080 · 87 % · 66 °C · 251 W" in nodes
            await page.screenshot(screenshots / f"monitor_{width}_{scheme}.png")

    asyncio.run(scenario())
