"""What a choice's life becomes in histograms and windows."""

from __future__ import annotations

import orjson
import pytest

from server.core import FinishReason
from server.telemetry.metrics import Metrics
from tests.telemetry.test_metrics import Clock, samples

TIMES = {"started": 0.1, "first": 0.25, "second": 0.45, "third": 0.85}


def choice(metrics: Metrics, clock: Clock, arm: str = "control", reason: FinishReason = FinishReason.STOP) -> None:
    """Arrives, waits 100 ms, prefills for 150, then steps of 4 and 1 tokens after 200 and 400 ms; ends 10 ms later."""
    arrival = clock.now
    timer = metrics.of(arm).choice_timer(arrival, num_prompt_tokens=9, max_tokens=64)
    metrics.of(arm).admitted(9)
    clock.now = arrival + TIMES["started"]
    timer.started()
    for name, num_tokens in (("first", 1), ("second", 4), ("third", 1)):
        clock.now = arrival + TIMES[name]
        timer.observe_step(num_tokens)
    clock.now += 0.01
    timer.finish(reason, 6)


def test_a_choices_phases_add_up() -> None:
    clock = Clock()
    metrics = Metrics("1", clock)
    choice(metrics, clock)
    found = samples(metrics)
    for name, seconds in {
        "request_queue_time": 0.1,
        "request_prefill_time": 0.15,
        "request_decode_time": 0.6,
        "request_inference_time": 0.75,
        "time_to_first_token": 0.25,
        "time_per_output_token": 0.6 / 5,
        "e2e_request_latency": 0.86,
    }.items():
        assert found[f"outpace_{name}_seconds_count"] == 1, name
        assert found[f"outpace_{name}_seconds_sum"] == pytest.approx(seconds), name
    assert found["outpace_inter_token_latency_seconds_count"] == 5
    assert found["outpace_step_gap_seconds_count"] == 2
    assert found["outpace_request_prompt_tokens_sum"] == 9
    assert found["outpace_request_generation_tokens_sum"] == 6
    assert found["outpace_request_max_tokens_sum"] == 64


def test_an_engine_that_does_not_say_when_it_started_has_no_prefill() -> None:
    clock = Clock()
    metrics = Metrics("1", clock)
    timer = metrics.of().choice_timer(clock.now)
    clock.now += 0.5
    timer.observe_step(1)
    timer.finish(FinishReason.LENGTH, 1)
    found = samples(metrics)
    assert found["outpace_request_queue_time_seconds_sum"] == pytest.approx(0.5)
    assert found["outpace_request_prefill_time_seconds_sum"] == 0
    assert found["outpace_time_per_output_token_seconds_count"] == 0, "one token has no interval"


def test_arms_are_counted_apart_and_windows_agree_with_histograms() -> None:
    clock = Clock()
    metrics = Metrics("1", clock)
    for _ in range(3):
        choice(metrics, clock)
    choice(metrics, clock, "canary", FinishReason.ABORT)
    stats = orjson.loads(metrics.stats())
    control, canary = (stats["arms"][arm] for arm in ("control", "canary"))
    for window in ("1m", "10m", "1h"):
        latency = control["latency"][window]
        counts = {name: values["count"] for name, values in latency.items()}
        assert counts == {"ttft": 3, "itl": 15, "step_gap": 6, "tpot": 3, "e2e": 3, "queue": 3}
        assert latency["itl"]["p50_s"] == pytest.approx(0.05, rel=0.01)
        assert latency["itl"]["p95_s"] == pytest.approx(0.4, rel=0.01)
        assert latency["step_gap"]["p50_s"] == pytest.approx(0.2, rel=0.01)
        assert latency["e2e"]["mean_s"] == pytest.approx(0.86)
        assert canary["latency"][window]["itl"]["count"] == 5
        assert canary["latency"][window]["e2e"] == dict.fromkeys(("mean_s", "p50_s", "p95_s", "p99_s")) | {"count": 0}
    assert control["values"]["requests_total"] == {"stop": 3, "length": 0, "abort": 0, "error": 0}
    assert canary["values"]["requests_total"]["abort"] == 1
    assert control["values"]["generation_tokens_total"] == 18
    clock.now += 120
    later = orjson.loads(metrics.stats())["arms"]["control"]["latency"]
    assert later["1m"]["itl"]["count"] == 0 and later["10m"]["itl"]["count"] == 15


def test_values_count_in_the_slot_in_which_they_were_measured() -> None:
    """However late somebody looks."""
    clock = Clock()
    metrics = Metrics("1", clock)
    choice(metrics, clock)
    clock.now += 300
    latency = orjson.loads(metrics.stats())["arms"]["control"]["latency"]
    assert latency["1m"]["ttft"]["count"] == 0
    assert latency["10m"]["ttft"]["count"] == 1


def test_quantile_gauges_are_those_of_the_stats() -> None:
    clock = Clock()
    metrics = Metrics("1", clock)
    for _ in range(4):
        choice(metrics, clock)
    latency = orjson.loads(metrics.stats())["arms"]["control"]["latency"]["10m"]
    found = samples(metrics)
    names = {"itl": "inter_token_latency", "e2e": "e2e_request_latency", "tpot": "time_per_output_token"}
    for metric, name in names.items():
        for share, key in (("0.5", "p50_s"), ("0.95", "p95_s"), ("0.99", "p99_s")):
            value = found[f"outpace_{name}_quantile_seconds{{quantile={share},window=10m}}"]
            assert value == pytest.approx(latency[metric][key])
    assert not any("quantile" in name for name in samples(Metrics("1"))), "nothing was measured"


def test_many_values_are_counted_once_each() -> None:
    """More than a buffer holds, over several slots."""
    clock = Clock()
    metrics = Metrics("1", clock)
    timer = metrics.of().choice_timer(clock.now)
    for _ in range(2001):
        clock.now += 0.01
        timer.observe_step(2)
    found = samples(metrics)
    assert found["outpace_inter_token_latency_seconds_count"] == 4000
    assert found["outpace_inter_token_latency_seconds_sum"] == pytest.approx(20.0)
    assert found["outpace_step_gap_seconds_count"] == 2000
    assert orjson.loads(metrics.stats())["arms"]["control"]["latency"]["1m"]["itl"]["count"] == 4000
