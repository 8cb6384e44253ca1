from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from server.config import CONTROL
from server.core import FinishReason
from server.engine.messages import EngineInfo, EngineStats
from server.telemetry.metrics import Metrics
from tests.api.fakes import INFO


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def samples(metrics: Metrics) -> dict[str, float]:
    """`name{label=value}` -> value; of the one arm there is."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert not family.name.startswith("outpace_") or sample.labels.get("arm", CONTROL) in ("", CONTROL)
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()) if key != "arm")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_step_of_n_tokens_after_a_gap_counts_as_n_intervals() -> None:
    clock = Clock()
    metrics = Metrics("1", clock)
    timer = metrics.of().choice_timer(arrival=clock.now)
    clock.now += 0.3
    timer.observe_step(1)
    clock.now += 0.4
    timer.observe_step(4)
    clock.now += 0.2
    timer.observe_step(0)
    clock.now += 0.2
    timer.observe_step(1)
    timer.finish(FinishReason.LENGTH, 6)
    found = samples(metrics)
    assert found["outpace_time_to_first_token_seconds_count"] == 1
    assert round(found["outpace_time_to_first_token_seconds_sum"], 9) == 0.3
    assert found["outpace_inter_token_latency_seconds_count"] == 5
    assert round(found["outpace_inter_token_latency_seconds_sum"], 9) == 0.8
    assert found["outpace_inter_token_latency_seconds_bucket{le=0.2}"] == 4
    assert found["outpace_step_gap_seconds_count"] == 2
    assert found["outpace_step_gap_seconds_bucket{le=0.3}"] == 0
    assert round(found["outpace_e2e_request_latency_seconds_sum"], 9) == 1.1
    assert found["outpace_generation_tokens_total"] == 6
    assert found["outpace_requests_total{finish_reason=length}"] == 1


def test_aborted_and_failed_choices_have_no_latency() -> None:
    metrics = Metrics("1")
    metrics.of().choice_timer(0.0).finish(FinishReason.ABORT, 0)
    metrics.of().choice_timer(0.0).finish(FinishReason.ERROR, 0)
    found = samples(metrics)
    assert found["outpace_e2e_request_latency_seconds_count"] == 0
    assert found["outpace_requests_total{finish_reason=abort}"] == 1
    assert found["outpace_requests_total{finish_reason=error}"] == 1


def stats(**fields: object) -> EngineStats:
    return EngineStats(**fields)  # type: ignore[arg-type]


def take(metrics: Metrics, found: EngineStats) -> None:
    metrics.on_stats(CONTROL, found)


def test_engine_counters_survive_a_restart() -> None:
    metrics = Metrics("1")
    metrics.on_stats(
        CONTROL, stats(num_steps=5, num_emitted=9, drafted_per_position=[4, 3], accepted_per_position=[3, 1])
    )
    metrics.on_stats(
        CONTROL, stats(num_steps=7, num_emitted=12, drafted_per_position=[6, 5], accepted_per_position=[4, 2])
    )
    take(metrics, stats(num_steps=1, num_emitted=2, drafted_per_position=[1], accepted_per_position=[1]))
    found = samples(metrics)
    assert found["outpace_engine_steps_total"] == 8
    assert found["outpace_emitted_tokens_total"] == 14
    assert found["outpace_draft_tokens_total"] == 12
    assert found["outpace_draft_tokens_per_position_total{position=1}"] == 7
    assert found["outpace_draft_tokens_per_position_total{position=2}"] == 5
    assert found["outpace_accepted_draft_tokens_total"] == 7
    assert found["outpace_accepted_draft_tokens_per_position_total{position=2}"] == 2


def test_gauges_are_of_the_latest_frame() -> None:
    metrics = Metrics("1")
    assert samples(metrics)["outpace_kv_cache_usage_ratio"] == 0
    metrics.on_stats(
        CONTROL, stats(num_running=3, num_waiting=2, kv_blocks_used=5, kv_blocks_total=20, speculation_paused=True)
    )
    found = samples(metrics)
    assert found["outpace_requests_running"] == 3
    assert found["outpace_requests_waiting"] == 2
    assert found["outpace_kv_cache_usage_ratio"] == 0.25
    assert found["outpace_speculation_paused"] == 1
    take(metrics, stats(kv_blocks_total=20))
    assert samples(metrics)["outpace_requests_running"] == 0


def test_speed_ups_and_what_they_come_from() -> None:
    metrics = Metrics("1")
    found = samples(metrics)
    assert not any("speedup" in name for name in found), "nothing was measured"
    metrics.on_stats(
        CONTROL, stats(num_steps=3, predicted_speedup=1.5, realised_speedup=1.25, verify_s=4.0, verify_plain_s=5.0)
    )
    metrics.on_stats(
        CONTROL, stats(num_steps=1, realised_speedup=0.5, verify_s=1.0, verify_plain_s=0.5, num_speculation_pauses=2)
    )
    found = samples(metrics)
    assert found["outpace_verify_seconds_total"] == 5.0
    assert found["outpace_verify_plain_seconds_total"] == 5.5
    assert found["outpace_speculation_realised_speedup_ratio"] == 0.5
    assert "outpace_speculation_predicted_speedup_ratio" not in found
    assert found["outpace_speculation_pauses_total"] == 2


@dataclass
class Engine:
    ready: bool = True
    info: EngineInfo | None = INFO
    num_restarts: int = 0
    pid: int | None = None


def test_build_info_and_engine_state() -> None:
    metrics, engine = Metrics("1.2.3"), Engine(info=None, ready=False)
    metrics.watch_engine(CONTROL, engine)
    found = samples(metrics)
    assert found["outpace_engine_ready"] == 0
    assert not any("drafter" in name for name in found)
    engine.ready, engine.info, engine.num_restarts = True, INFO, 2
    found = samples(metrics)
    assert found["outpace_engine_ready"] == 1
    assert found["outpace_engine_restarts_total"] == 2
    build = next(name for name in found if name.startswith("outpace_build_info"))
    assert "version=1.2.3" in build and "drafter=suffix" in build


def test_every_name_has_the_prefix_and_help() -> None:
    metrics = Metrics("1")
    metrics.watch_engine(CONTROL, Engine())
    metrics.of()
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert family.name.startswith(("outpace_", "vllm:", "sglang:")), family.name
        assert family.documentation, family.name
    without = Metrics("1", aliases=False)
    without.watch_engine(CONTROL, Engine())
    assert b"vllm:" in metrics.render() and b"sglang:" in metrics.render()
    assert b"vllm:" not in without.render() and b"sglang:" not in without.render()
