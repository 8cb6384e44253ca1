"""The page in a real browser: it shows what the server does, streams a chat, and works by keyboard and on a phone."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import expect

from server.api.access.keys import digest_of
from server.api.page import STATIC
from server.api.replays import Wanted
from server.config import ShadowConfig
from server.core import Request, StepOutput
from server.engine.messages import EngineStats
from server.routing.experiment import Action
from tests.api.conftest import Live, Serve, live, serve
from tests.api.fakes import FakeEngine, steps
from tests.browser import needs_chromium, opened

__all__ = ["live", "serve"]  # fixtures

FOCUSED = "() => document.activeElement.id || document.activeElement.textContent"
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    kv_blocks_used=25,
    kv_blocks_total=100,
    num_steps=10,
    num_emitted=30,
    drafted_per_position=[10, 8, 4],
    accepted_per_position=[8, 4, 1],
    realised_speedup=1.5,
)


def said(text: str) -> FakeEngine:
    """Says `text`, byte for byte the same with and without drafts, two of each three bytes drafted where it may."""

    def script(request: Request) -> list[StepOutput]:
        size = 3 if request.speculation.enabled else 1
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        return list(steps(*parts)(request))

    engine = FakeEngine(script)
    engine.stats = STATS
    return engine


async def test_who_is_no_browser_gets_plain_text(live: Live) -> None:
    async with live.http.get(live.url) as response:
        assert response.content_type == "text/plain"
    async with live.http.get(live.url, headers={"Accept": "text/html,*/*;q=0.8"}) as response:
        assert response.content_type == "text/html"
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]


async def test_only_its_own_files_are_served(live: Live) -> None:
    for path in ("style.css", "main.js", "vendor/uPlot.min.css"):
        assert (await live.get(f"/page/{path}"))[0] == 200
    for path in ("", "nothing.js", "../__init__.py", "%2e%2e/__init__.py", "..%2f__init__.py"):
        assert (await live.get(f"/page/{path}"))[0] == 404


def test_nothing_comes_from_elsewhere() -> None:
    for path in STATIC.glob("*.*"):
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path


@needs_chromium
async def test_what_the_server_does(serve: Serve) -> None:
    live = await serve(said("Hello"))
    async with opened(live.url) as window:
        page = window.page
        await expect(page.locator("#status")).to_have_attribute("data-state", "ready")
        names, values = page.locator("#tiles dt"), page.locator("#tiles dd")
        tiles = dict(zip(await names.all_inner_texts(), await values.all_inner_texts(), strict=True))
        assert (tiles["Running"], tiles["Waiting"], tiles["KV cache"]) == ("3", "2", "25.0 %")
        assert tiles["Speed-up by drafts"] == "1.50 ×"
        assert await page.locator(".bar-box").all_inner_texts() == ["80 %", "50 %", "25 %"]
        live.engine.stats = replace(STATS, num_steps=20, drafted_per_position=[20, 16], accepted_per_position=[16, 9])
        await expect(page.locator("#chart-throughput canvas")).to_be_visible()
        chart = page.locator("#chart-k")
        await expect(chart).to_have_attribute("aria-label", re.compile(r"control \d\.\d\d"), timeout=9000)
        live.engine.ready = False
        await expect(page.locator("#status-text")).to_contain_text("not ready")
        assert (window.errors, window.strange) == ([], [])


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
async def test_a_chat_shows_what_was_drafted(serve: Serve, width: int, scheme: str) -> None:
    live = await serve(said("Hello world"))
    async with opened(live.url, width=width, scheme=scheme) as window:
        page = window.page
        assert await page.locator("html").get_attribute("data-theme") == scheme
        await page.locator("#prompt").fill("Hi")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#verdict")).to_contain_text("the same text")
        assert await page.locator("#with").inner_text() == "Hello world"
        assert await page.locator("#with mark").all_inner_texts() == ["He", "lo", "wo", "l"]
        assert await page.locator("#without mark").count() == 0
        assert await page.locator("#without").inner_text() == "Hello world"
        bodies = [request.speculation.enabled for request in live.engine.requests]
        assert bodies == [True, False]
        first = page.locator("#latency-table tr", has_text="Time to first token").first
        await expect(first).to_contain_text("control", timeout=9000)
        await expect(page.locator("#chart-itl canvas")).to_be_visible()
        too_wide = await page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert too_wide <= 0
        assert (window.errors, window.strange) == ([], [])


@needs_chromium
async def test_what_is_wrong_is_said(serve: Serve) -> None:
    live = await serve(said("Hello"))
    async with opened(live.url) as window:
        page = window.page
        await page.locator("#max-tokens").fill("4096")
        await page.locator("#send").click()
        await expect(page.locator("#verdict")).to_contain_text("context")
        await expect(page.locator("#send")).to_be_enabled()


@needs_chromium
async def test_everything_is_reached_by_keyboard(serve: Serve) -> None:
    live = await serve(said("Hello"))
    async with opened(live.url) as window:
        await expect(window.page.locator("#status")).to_have_attribute("data-state", "ready")
        reached = []
        for _ in range(14):
            await window.page.keyboard.press("Tab")
            reached.append(await window.page.evaluate(FOCUSED))
        for name in ("theme", "prompt", "temperature", "max-tokens", "model", "compare", "send"):
            assert name in reached, reached


COUNTS = {"num_candidate": 9, "num_baseline": 8}
TOLD: dict[str, Any] = {
    "name": "spring",
    "status": "running",
    "reason": "no harm shown",
    "stage": 1,
    "stages": [{"share": 5}, {"share": 50}, {"share": 100}],
    "weights": {"control": 0.0, "baseline": 50.0, "candidate": 50.0},
    "primary": "tokens_per_s",
    "findings": [
        {"metric": "ttft", "claim": "worse", "estimate": 0.2, "lower": 0.1, "upper": math.inf, **COUNTS},
        {"metric": "tokens_per_s", "claim": "undecided", "estimate": 0.01, "lower": -0.1, "upper": 0.2, **COUNTS},
    ],
}


class Scripted:
    """An experiment that notes what operators ask for."""

    def __init__(self) -> None:
        self.actions: list[tuple[str, str]] = []

    async def told(self) -> list[dict[str, Any]]:
        return [TOLD]

    async def decisions(self) -> list[dict[str, Any]]:
        return []

    async def asked(self, action: Action, actor: str) -> str | None:
        self.actions.append((action, actor))
        return "it is too late" if action == "pause" else None


@needs_chromium
async def test_an_experiment_and_its_buttons(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'[admin]\nsha256 = "{digest_of("master")}"\n[[key]]\nname = "me"\nsha256 = "{digest_of("mine")}"\n'
    )
    live = await serve(said("Hello"), server={"api_keys": str(keys)})
    experiment = live.state.experiment = Scripted()
    async with opened(live.url, width=400) as window:
        page = window.page
        await page.locator("#key").fill("mine")
        await page.get_by_role("button", name="Use it").click()
        await expect(page.locator("#experiment-title")).to_have_text("Experiment spring: running")
        await expect(page.locator("#experiment-state")).to_contain_text("Stage 2 of 3: control 0 %, baseline 50 %")
        await expect(page.locator("[data-claim=worse]")).to_contain_text("+20.0 %+10.0 % … –worse9 / 8")
        await expect(page.locator("#chart-experiment canvas")).to_be_visible()
        assert await page.locator("#resume").is_disabled()
        await page.get_by_role("button", name="Roll back").click()
        await expect(page.locator("#experiment-answer")).to_contain_text("API key")
        await page.locator("#admin-key").fill("master")
        await page.get_by_role("button", name="Roll back").click()
        await expect(page.locator("#experiment-answer")).to_have_text("Done.")
        await page.get_by_role("button", name="Pause").click()
        await expect(page.locator("#experiment-answer")).to_contain_text("it is too late")
        assert experiment.actions == [("roll_back", "admin"), ("pause", "admin")]
        assert await page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0


@needs_chromium
async def test_answers_beside_their_copies(serve: Serve) -> None:
    other, server = said("Hallo"), {"shadow": ShadowConfig("other", share=1.0), "audit_share": 1.0}
    live = await serve(said("Hello"), others={"other": other}, server=server)
    for _ in range(3):
        await live.complete(temperature=0)
    assert live.state.replays is not None
    live.state.replays._drop(Wanted.of_now("shadow", live.state.control, live.state.arms.every[1]), "busy")
    async with opened(live.url, width=400) as window:
        page = window.page
        row = page.locator("#shadow-table tr")
        await expect(row.nth(1)).to_have_text("control again without drafts3000")
        await expect(row.nth(2)).to_have_text("control beside other3331")
        await expect(page.locator("[data-alarm=true]")).to_have_count(1)
        assert await page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
    plain = await serve(said("Hello"))
    async with opened(plain.url) as window:
        await expect(window.page.locator("#tiles")).to_contain_text("Running")
        await expect(window.page.locator("#latency-title")).to_be_hidden()
        await expect(window.page.locator("#shadow")).to_be_hidden()
