"""The names and labels that dashboards and tools of vLLM and SGLang query: what is listed here must not change."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.messages import EngineStats
from server.telemetry.aliases import SGLANG, VLLM
from server.telemetry.families import PREFIX
from server.telemetry.metrics import Metrics
from tests.api.fakes import INFO
from tests.telemetry.test_arm_metrics import choice
from tests.telemetry.test_metrics import Clock, Engine

VLLM_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_max_tokens",
    "request_max_num_generation_tokens",
)
VLLM_VALUES = {
    "num_requests_running": 1,
    "num_requests_waiting": 2,
    "kv_cache_usage_perc": 0.25,
    "gpu_cache_usage_perc": 0.25,
    "prompt_tokens_total": 18,
    "generation_tokens_total": 12,
    "request_success_total{finished_reason=stop}": 2,
    "request_success_total{finished_reason=length}": 0,
    "prefix_cache_queries_total": 40,
    "prefix_cache_hits_total": 10,
    "gpu_prefix_cache_queries_total": 40,
    "gpu_prefix_cache_hits_total": 10,
    "num_preemptions_total": 1,
    "spec_decode_num_drafts_total": 4,
    "spec_decode_num_draft_tokens_total": 7,
    "spec_decode_num_accepted_tokens_total": 5,
    "spec_decode_num_accepted_tokens_per_pos_total{position=0}": 3,
    "spec_decode_num_accepted_tokens_per_pos_total{position=1}": 2,
}
SGLANG_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "queue_time_seconds",
)
SGLANG_VALUES = {
    "num_running_reqs": 1,
    "num_queue_reqs": 2,
    "token_usage": 0.25,
    "gen_throughput": 9 / (2 * 0.86),
    "cache_hit_rate": 0.25,
    "spec_accept_length": 1 + 5 / 4,
    "spec_accept_rate": 5 / 7,
    "prompt_tokens_total": 18,
    "generation_tokens_total": 12,
    "cached_tokens_total": 10,
    "num_requests_total": 2,
}
STATS = EngineStats(
    num_running=1,
    num_waiting=2,
    kv_blocks_used=5,
    kv_blocks_total=20,
    num_steps=9,
    num_emitted=9,
    num_prefill_tokens=30,
    num_cached_tokens=10,
    num_preemptions=1,
    drafted_per_position=[4, 3],
    accepted_per_position=[3, 2],
)


def server(*arms: str) -> Metrics:
    clock = Clock()
    metrics = Metrics("1", clock)
    for arm in arms:
        metrics.watch_engine(arm, Engine())
        metrics.on_stats(arm, STATS)
        for _ in range(2):
            choice(metrics, clock, arm)
    return metrics


def test_vllm() -> None:
    assert_exposed("vllm:", {"model_name": INFO.model, "engine": "0"}, VLLM_HISTOGRAMS, VLLM_VALUES)


def test_sglang() -> None:
    labels = {"model_name": INFO.model, "engine_type": "unified", "dp_rank": "0"}
    labels |= dict.fromkeys(("tp_rank", "pp_rank", "moe_ep_rank"), "0")
    assert_exposed("sglang:", labels, SGLANG_HISTOGRAMS, SGLANG_VALUES)


def assert_exposed(
    prefix: str, expected: dict[str, str], histograms: tuple[str, ...], expected_values: dict[str, float]
) -> None:
    values, types = {}, {}
    for family in text_string_to_metric_families(server("control").render().decode()):
        if family.name.startswith(prefix):
            types[family.name.removeprefix(prefix)] = family.type
            for sample in family.samples:
                assert expected.items() <= sample.labels.items(), sample
                more = {k: v for k, v in sample.labels.items() if k not in expected}
                shown = "{" + ",".join(f"{k}={v}" for k, v in more.items()) + "}" if more else ""
                values[sample.name.removeprefix(prefix) + shown] = sample.value
    for name in histograms:
        assert types[name] == "histogram"
        assert values[f"{name}_bucket{{le=+Inf}}"] == values[f"{name}_count"] > 0, name
        assert f"{name}_sum" in values
    for name, value in expected_values.items():
        assert values[name] == pytest.approx(value), name
        plain = name.split("{")[0]
        assert types[plain.removesuffix("_total")] == ("counter" if plain.endswith("_total") else "gauge")
    listed = {*histograms, *(name.split("{")[0].removesuffix("_total") for name in expected_values)}
    assert set(types) == listed, "a name that this list does not know"


def test_arms_are_engines() -> None:
    text = server("control", "canary").render().decode()
    for number in (0, 1):
        assert f'vllm:num_requests_running{{engine="{number}",model_name="fake"}} 1.0' in text
        start = f'sglang:num_running_reqs{{dp_rank="{number}"'
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        assert line.endswith(" 1.0")


def test_every_alias_is_of_a_metric_that_exists() -> None:
    own = {f.name for f in text_string_to_metric_families(server("control").render().decode())}
    assert {PREFIX + name for name in (*VLLM, *SGLANG)} <= own


def test_an_engine_that_never_served_has_no_aliases() -> None:
    metrics = Metrics("1")
    metrics.watch_engine("control", Engine(info=None, ready=False))
    metrics.of()
    assert b"vllm:" not in metrics.render()
