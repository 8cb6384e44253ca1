"""Copies of requests before scripted engines: which are made, what they ask, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from server.api import replays
from server.api.access.keys import digest_of
from server.api.replays import exact, same_model
from server.config import EngineConfig, ShadowConfig
from server.core import FinishReason, Request, StepOutput, TokenLogprobs
from tests.api.conftest import Live, Serve
from tests.api.fakes import INFO, FakeEngine, Script, endless, failing, steps

AUDIT = {"audit_share": 1.0}
SHADOW = {"shadow": ShadowConfig("other", share=1.0)}
CLOSE = replace(INFO, dtype="bfloat16", device="cuda:0")


async def settled(live: Live) -> dict[str, Any]:
    """What is told once no copy is under way."""
    assert live.state.replays is not None
    async with asyncio.timeout(10):
        while live.state.replays.num_under_way or live.state.num_in_flight:  # noqa: ASYNC110 - a test polls
            await asyncio.sleep(0.005)
    status, told = await live.get("/v1/shadow")
    assert status == 200
    assert isinstance(told, dict)
    return told


def pair_of(told: dict[str, Any]) -> dict[str, Any]:
    (pair,) = told["pairs"]
    assert isinstance(pair, dict)
    return pair


@pytest.mark.parametrize("stream", [False, True])
async def test_an_audit_asks_the_same_without_drafts_and_leaves_no_trace_elsewhere(serve: Serve, stream: bool) -> None:
    live = await serve(server=AUDIT)
    body = {"prompt": "Hi", "stream": stream, "max_tokens": 30, "user": "me", "speculative": {"max_draft_tokens": 3}}
    async with live.http.post(live.url + "/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        await response.read()
    pair = pair_of(await settled(live))
    assert (pair["kind"], pair["of"], pair["arm"]) == ("audit", "control", "control")
    assert (pair["compared"], pair["diverged"], pair["alarms"], pair["dropped"]) == (1, 0, 0, 0)
    asked, copy = live.engine.requests
    assert copy.background and not asked.background
    assert not copy.speculation.enabled
    assert (copy.prompt_ids, copy.sampling, copy.max_tokens) == (asked.prompt_ids, asked.sampling, asked.max_tokens)
    metrics = (await live.get("/metrics"))[1]
    assert 'outpace_requests_total{arm="control",finish_reason="stop"} 1.0' in metrics
    assert 'outpace_prompt_tokens_total{arm="control"} 2.0' in metrics
    assert 'outpace_time_to_first_token_seconds_count{arm="control"} 1.0' in metrics
    assert 'outpace_audit_compared_total{arm="control"} 1.0' in metrics
    assert 'outpace_audit_alarms_total{arm="control"} 0.0' in metrics
    assert 'outpace_audit_length_shift_tokens_bucket{arm="control",le="0.0"} 1.0' in metrics
    assert live.state.control.counts.total() == (0, 0), "it holds no place in the users' queue"


def differing(before: Script, after: Script) -> Script:
    """Copies are answered by `after`, and scored with two tokens that are 0.2 nats apart and a third that is far."""

    def script(request: Request) -> Sequence[StepOutput]:
        if request.request_id.startswith("score-"):
            top = TokenLogprobs(ord("w"), -0.5, [ord("w"), ord("W"), ord("x")], [-0.5, -0.7, -6.0])
            return [StepOutput(request.request_id, [ord("w")], [top], FinishReason.LENGTH)]
        return (after if request.background else before)(request)

    return script


@pytest.mark.parametrize(
    ("info", "copy", "verdict"), [(INFO, " World", "alarm"), (CLOSE, " World", "tie"), (CLOSE, " xorld", "alarm")]
)
async def test_an_audit_that_differs_is_told_with_its_evidence(
    serve: Serve, info: Any, copy: str, verdict: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(differing(steps("Hello", " world"), steps("Hello", copy, "!")), info=info)
    live = await serve(engine, server=AUDIT)
    assert (await live.complete(temperature=0))[0] == 200
    told = await settled(live)
    (found,) = told["data"]
    assert (found["verdict"], found["position"]) == (verdict, 6)
    assert (found["token"], found["copy_token"]) == (ord("w"), ord(copy[1]))
    assert found["gap"] == pytest.approx(0.2 if copy[1] == "W" else 5.5)
    assert found["length_shift"] == 1
    assert pair_of(told)["alarms"] == (verdict == "alarm")
    assert ("audit: arm control without drafts answers" in caplog.text) == (verdict == "alarm")
    scoring = engine.requests[-1]
    assert scoring.prompt_ids == [*b"Hi", *b"Hello "], "both answers' common tokens are forced"
    assert scoring.background and scoring.prompt_logprobs == 0, "nothing of it comes from the prefix cache"


async def test_a_sampled_one_is_not_judged_by_log_probabilities(serve: Serve) -> None:
    engine = FakeEngine(differing(steps("Hello"), steps("Hallo")), info=CLOSE)
    live = await serve(engine, server=AUDIT)
    await live.complete(temperature=1)
    assert pair_of(await settled(live))["verdicts"]["unexplained"] == 1


async def test_a_shadow_runs_on_the_other_arm_with_drafts(serve: Serve) -> None:
    other = FakeEngine(differing(steps("Hello"), steps("Hello", " World")))
    live = await serve(
        FakeEngine(differing(steps("Hello", " world"), steps("?"))), others={"other": other}, server=SHADOW
    )
    assert (await live.complete(temperature=0))[0] == 200
    told = await settled(live)
    pair, (found,) = pair_of(told), told["data"]
    assert (pair["kind"], pair["of"], pair["arm"], pair["alarms"]) == ("shadow", "control", "other", 1)
    assert (found["position"], found["kl"], found["length_shift"]) == (6, 0.0, 0)
    copy = other.requests[0]
    assert copy.background and copy.speculation.enabled
    assert [request.background for request in live.engine.requests] == [False, True], "the control only scores"
    text = (await live.get("/metrics"))[1]
    assert 'outpace_shadow_first_divergence_tokens_bucket{arm="other",of="control",le="8.0"} 1.0' in text or (
        'outpace_shadow_first_divergence_tokens_bucket{arm="other",le="8.0",of="control"} 1.0' in text
    )
    assert 'outpace_requests_total{arm="other",finish_reason="stop"} 0.0' in text


async def test_copies_stand_aside_while_another_engine_of_the_device_is_busy(serve: Serve) -> None:
    other = FakeEngine(steps(*"Hello, you there"), step_s=0.02)
    live = await serve(FakeEngine(steps(*"Hello, you there")), others={"other": other}, server=SHADOW)
    control = live.state.control
    await live.complete(temperature=0)
    await other.until(lambda: bool(other.active))
    control.counts.add(1, 10)  # a user's request, of this process or of another
    await other.until(lambda: other.held == other.active != set())
    emitted = other.num_emitted_tokens
    await asyncio.sleep(0.1)
    assert other.num_emitted_tokens <= emitted + 1
    await live.complete(temperature=0)
    await asyncio.sleep(0.1)
    assert len(other.requests) == 1, "the second copy has not begun"
    control.counts.add(-1, -10)
    pair = pair_of(await settled(live))
    assert (pair["compared"], pair["diverged"]) == (2, 0)


async def test_engines_of_other_devices_do_not_matter(serve: Serve) -> None:
    other = FakeEngine(steps("Hello"))
    live = await serve(FakeEngine(steps("Hello")), others={"other": other}, server=SHADOW)
    live.state.control.config = EngineConfig(model="fake-dir", device="cuda:0")
    live.state.arms.every[1].config = EngineConfig(model="fake-dir", device="cuda:1")
    live.state.control.counts.add(1, 10)
    await live.complete(temperature=0)
    assert pair_of(await settled(live))["compared"] == 1


async def test_other_models_may_differ(serve: Serve) -> None:
    other = FakeEngine(differing(steps("Hello"), steps("Garbled")))
    live = await serve(FakeEngine(differing(steps("Hello"), steps("?"))), others={"other": other}, server=SHADOW)
    live.state.arms.every[1].config = EngineConfig(model="another")
    await live.complete(temperature=0)
    told = await settled(live)
    assert (told["data"][0]["verdict"], told["data"][0]["position"]) == ("different", 0)
    assert pair_of(told)["alarms"] == 0


async def test_an_arm_that_got_another_model_meanwhile_is_not_compared(serve: Serve) -> None:
    live = await serve(FakeEngine(differing(steps("Hello"), steps("Other")), step_s=0.02), server=AUDIT)
    await live.complete(temperature=0)
    live.engine.info = replace(INFO, model="optimised")
    pair = pair_of(await settled(live))
    assert (pair["compared"], pair["dropped_by_reason"]["not_ready"]) == (0, 1)


async def test_an_optimised_model_is_another_though_settings_are_alike(serve: Serve) -> None:
    other = FakeEngine(differing(steps("Hello"), steps("Other")), info=replace(INFO, model="optimised"))
    live = await serve(FakeEngine(differing(steps("Hello"), steps("?"))), others={"other": other}, server=SHADOW)
    await live.complete(temperature=0)
    assert (await settled(live))["data"][0]["verdict"] == "different"


async def test_a_divergence_that_cannot_be_scored_is_an_alarm_all_the_same(serve: Serve) -> None:
    def script(request: Request) -> Sequence[StepOutput]:
        scoring = request.request_id.startswith("score-")
        return (endless if scoring else steps("Other" if request.background else "Hello"))(request)

    live = await serve(FakeEngine(script, step_s=0.001), server=AUDIT)
    assert live.state.replays is not None
    live.state.replays._timeout_s = 0.2
    await live.complete(temperature=0)
    told = await settled(live)
    assert (told["data"][0]["verdict"], told["data"][0]["gap"]) == ("alarm", None)


async def test_what_a_stop_string_cut_off_is_compared_as_far_as_it_goes(serve: Serve) -> None:
    live = await serve(FakeEngine(steps("Hello", " world", " and more")), server=AUDIT)
    await live.complete(stop=["wor"], max_tokens=60)
    pair = pair_of(await settled(live))
    assert (pair["compared"], pair["diverged"]) == (1, 0)
    assert live.engine.requests[1].max_tokens == len("Hello world")


async def test_failed_cancelled_and_unreproducible_ones_are_not_copied(serve: Serve) -> None:
    live = await serve(FakeEngine(failing("lost", "He")), server=AUDIT)
    assert (await live.complete())[0] == 500
    live.engine.script = endless
    body = {"prompt": "Hi", "max_tokens": 200, "ignore_eos": True}
    with pytest.raises(TimeoutError):
        await live.post("/v1/completions", body, timeout=aiohttp.ClientTimeout(total=0.1))
    live.engine.script = steps("Hello")
    live.state.control.config = EngineConfig(model="fake-dir", verification="ratio")
    await live.complete(temperature=1)
    await live.complete(speculative={"enabled": False})
    await live.engine.until(lambda: not live.engine.active)
    pair = pair_of(await settled(live))
    assert (pair["compared"], pair["dropped"]) == (0, 0)
    await live.complete(temperature=0)
    assert pair_of(await settled(live))["compared"] == 1, "greedy ones are the same whatever is drafted"


async def test_what_there_is_no_room_or_time_for_is_dropped_and_counted(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "MAX_COPIES", 2)
    live = await serve(FakeEngine(differing(steps("Hi"), endless)), server=AUDIT)
    assert live.state.replays is not None
    live.state.replays._timeout_s = 0.3
    for _ in range(5):
        await live.complete()
    assert live.state.replays.num_under_way == 2
    pair = pair_of(await settled(live))
    assert (pair["compared"], pair["dropped_by_reason"]["busy"], pair["dropped_by_reason"]["timeout"]) == (0, 3, 2)
    await live.engine.until(lambda: not live.engine.active)
    live.engine.script = differing(steps("Hi"), failing("full"))
    await live.complete()
    assert pair_of(await settled(live))["dropped_by_reason"]["failed"] == 1


async def test_a_share(serve: Serve) -> None:
    live = await serve(server={"audit_share": 0.25})
    for _ in range(80):
        await live.complete()
    pair = pair_of(await settled(live))
    assert 5 <= pair["compared"] + pair["dropped"] <= 40


async def test_closing_ends_copies(serve: Serve) -> None:
    live = await serve(FakeEngine(differing(steps("Hi"), endless), step_s=0.01), server=AUDIT)
    await live.complete()
    assert live.state.replays is not None and live.state.replays.num_under_way == 1
    await live.state.replays.close()
    await live.engine.until(lambda: not live.engine.active)
    await live.complete()
    assert live.state.replays.num_under_way == 0


async def test_without_settings_nothing_is_copied(live: Live) -> None:
    await live.complete()
    assert live.state.replays is None
    assert (await live.get("/v1/shadow"))[1] == {"object": "list", "pairs": [], "data": []}
    assert "outpace_audit" not in (await live.get("/metrics"))[1]


async def test_it_needs_the_admin_key(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    admin, user = "sk-outpace-admin", "sk-outpace-user"
    keys.write_text(f'[admin]\nsha256 = "{digest_of(admin)}"\n[[key]]\nname = "user"\nsha256 = "{digest_of(user)}"\n')
    live = await serve(server={**AUDIT, "api_keys": str(keys)})
    found = []
    for key in (None, user, admin):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with live.http.get(live.url + "/v1/shadow", headers=headers) as response:
            found.append(response.status)
    assert found == [401, 403, 200]


def test_what_must_be_alike() -> None:
    assert exact(INFO) and not exact(CLOSE) and exact(replace(CLOSE, deterministic=True))
    one = EngineConfig()
    assert same_model(one, replace(one, drafter="none", max_num_seqs=2, verification="ratio"))
    assert not same_model(one, replace(one, dtype="float32"))
