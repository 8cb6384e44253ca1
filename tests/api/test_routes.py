from __future__ import annotations

import pytest

from server.engine.messages import EngineStats
from tests.api.conftest import Live, Serve
from tests.api.fakes import ByteText


async def test_health_and_ready(live: Live) -> None:
    assert await live.get("/health") == (200, {"status": "ok"})
    assert await live.get("/ready") == (200, {"status": "ready"})


async def test_before_the_engine_is_up(serve: Serve) -> None:
    live = await serve(ready=False)
    live.state.control.progress = "The model is being loaded."
    assert await live.get("/ready") == (503, {"status": "starting", "reason": "The model is being loaded."})
    assert (await live.get("/health"))[0] == 200
    assert (await live.get("/v1/models"))[1]["data"][0]["max_model_len"] is None
    assert (await live.get("/server_info"))[1]["engine"] is None
    status, answer = await live.chat()
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert "The model is being loaded." in answer["error"]["message"]
    assert (await live.chat(temperature=9))[0] == 400, "a wrong request is wrong at any time"
    await live.engine.wait_ready()
    assert (await live.get("/ready"))[0] == 503, "the text layer is still missing"
    live.state.control.text = ByteText()
    assert (await live.get("/ready"))[0] == 200


async def test_ready_says_why_not(serve: Serve) -> None:
    live = await serve(ready=False)
    live.engine.die("no such file")
    assert await live.get("/ready") == (503, {"status": "failed", "reason": "no such file"})
    live = await serve()
    live.engine.die("the engine process died")
    assert await live.get("/ready") == (503, {"status": "restarting", "reason": "the engine process died"})
    live.state.draining = True
    assert (await live.get("/ready"))[1]["status"] == "draining"
    status, answer = await live.chat()
    assert (status, answer["error"]["code"]) == (503, "shutting_down")


async def test_models(live: Live) -> None:
    models = [model async for model in live.client.models.list()]
    assert [(model.id, model.object, model.owned_by) for model in models] == [("fake", "model", "outpace")]
    assert (await live.client.models.retrieve("fake")).id == "fake"


async def test_a_model_name_with_a_slash_can_be_retrieved(live: Live) -> None:
    live.state.control.model_name = "org/model"
    assert (await live.client.models.retrieve("org/model")).id == "org/model"
    assert (await live.get("/v1/models/org/model"))[1]["id"] == "org/model"


async def test_version_info_and_index(live: Live) -> None:
    assert await live.get("/version") == (200, {"version": "1.2.3"})
    info = (await live.get("/server_info"))[1]
    assert info["config"]["engine"]["model"] == "fake-dir"
    assert info["engine"]["drafter"] == "suffix"
    assert info["stats"]["num_steps"] == 0
    assert info["internal_states"] == [{"avg_spec_accept_length": None}], "nothing was drafted yet"
    assert "/v1/chat/completions" in (await live.get("/"))[1]


async def test_server_info_has_what_sglangs_benchmark_reads(live: Live) -> None:
    """Ten verify steps of sequences had drafts: six drafted two, four one; of those sixteen drafts eight were right."""
    live.engine.stats = EngineStats(drafted_per_position=[10, 6], accepted_per_position=[6, 2])
    info = (await live.get("/server_info"))[1]
    assert info["internal_states"][0]["avg_spec_accept_length"] == pytest.approx(1.8)


async def test_server_info_says_whether_speculation_is_paused_and_why(live: Live) -> None:
    nothing = {"paused": False, "since": None, "reason": None, "predicted_speedup": None, "realised_speedup": None}
    assert (await live.get("/server_info"))[1]["speculation"] == nothing
    live.engine.stats = EngineStats(
        speculation_paused=True,
        speculation_paused_since=1234.7,
        speculation_pause_reason="too dear",
        predicted_speedup=1.0,
        realised_speedup=0.99,
    )
    assert (await live.get("/server_info"))[1]["speculation"] == {
        "paused": True,
        "since": 1234,
        "reason": "too dear",
        "predicted_speedup": 1.0,
        "realised_speedup": 0.99,
    }


async def test_the_fingerprint_depends_on_model_and_version(live: Live) -> None:
    arm = live.state.control
    before = arm.fingerprint("1.2.3")
    assert before == arm.fingerprint("1.2.3")
    assert arm.fingerprint("1.2.4") != before
    arm.model_name = "another"
    assert arm.fingerprint("1.2.3") != before


async def test_metrics_are_scraped_in_prometheus_format(live: Live) -> None:
    await live.chat()
    await live.get("/v1/nothing")
    async with live.http.get(live.url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    assert 'outpace_requests_total{arm="control",finish_reason="stop"} 1.0' in text
    assert 'outpace_prompt_tokens_total{arm="control"} 9.0' in text
    assert 'outpace_generation_tokens_total{arm="control"} 12.0' in text
    assert 'outpace_time_to_first_token_seconds_count{arm="control"} 1.0' in text
    assert 'outpace_inter_token_latency_seconds_count{arm="control"} 7.0' in text, "seven tokens in the second step"
    assert 'outpace_step_gap_seconds_count{arm="control"} 1.0' in text
    assert 'outpace_engine_ready{arm="control"} 1.0' in text
    assert 'outpace_http_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'outpace_http_requests_total{route="unknown",status="404"} 1.0' in text
