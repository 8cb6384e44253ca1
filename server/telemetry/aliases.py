"""The same metrics under the names that dashboards and tools of vLLM and SGLang query.

Values are those of the metric with our own name. An arm is an engine: its number, 0 for the control, is vLLM's label
`engine` and SGLang's `dp_rank`; `model_name` is what clients call its model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.telemetry.families import PREFIX
from server.telemetry.merge import Family, Sample

# Own name (counters without `_total`): other names. Types stay what they are.
VLLM = {
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "request_queue_time_seconds": ("request_queue_time_seconds",),
    "request_prefill_time_seconds": ("request_prefill_time_seconds",),
    "request_decode_time_seconds": ("request_decode_time_seconds",),
    "request_inference_time_seconds": ("request_inference_time_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_generation_tokens",),
    "request_max_tokens": ("request_params_max_tokens", "request_max_num_generation_tokens"),
    "requests_running": ("num_requests_running",),
    "requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage_ratio": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "requests": ("request_success",),
    "prefix_queried_tokens": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_cached_tokens": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
    "preemptions": ("num_preemptions",),
    "sequence_drafts": ("spec_decode_num_drafts",),
    "draft_tokens": ("spec_decode_num_draft_tokens",),
    "accepted_draft_tokens": ("spec_decode_num_accepted_tokens",),
    "accepted_draft_tokens_per_position": ("spec_decode_num_accepted_tokens_per_pos",),
}
SGLANG = {
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "request_queue_time_seconds": ("queue_time_seconds",),
    "requests_running": ("num_running_reqs",),
    "requests_waiting": ("num_queue_reqs",),
    "kv_cache_usage_ratio": ("token_usage",),
    "generation_tokens_per_second": ("gen_throughput",),
    "prefix_hit_ratio": ("cache_hit_rate",),
    "accepted_length_tokens": ("spec_accept_length",),
    "draft_acceptance_ratio": ("spec_accept_rate",),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "prefix_cached_tokens": ("cached_tokens",),
    "requests": ("num_requests",),
}
_SGLANG_LABELS = (("engine_type", "unified"), ("moe_ep_rank", "0"), ("pp_rank", "0"), ("tp_rank", "0"))
_FROM_ZERO = "accepted_draft_tokens_per_position"


def alias_families(families: Sequence[Family], model_names: Mapping[str, str]) -> list[Family]:
    """Families under other names, of the arms that `model_names` names; samples that have no arm have no other name."""
    numbers = {arm: str(number) for number, arm in enumerate(model_names)}
    found = []
    for family in families:
        own = family.name.removeprefix(PREFIX)
        for prefix, names in (("vllm:", VLLM.get(own, ())), ("sglang:", SGLANG.get(own, ()))):
            for name in names:
                samples = _samples(family, prefix, name, model_names, numbers)
                if samples:
                    found.append(Family(prefix + name, family.type, family.documentation, samples))
    return found


def _samples(
    family: Family, prefix: str, name: str, model_names: Mapping[str, str], numbers: Mapping[str, str]
) -> list[Sample]:
    own = family.name.removeprefix(PREFIX)
    is_vllm = prefix == "vllm:"
    summed: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        labels = dict(sample.labels)
        arm = labels.pop("arm", None)
        if arm is None or arm not in model_names or sample.name.endswith("_created"):
            continue
        labels["model_name"] = model_names[arm]
        if is_vllm:
            labels["engine"] = numbers[arm]
        else:
            labels |= dict(_SGLANG_LABELS, dp_rank=numbers[arm])
        _rename(labels, own, is_vllm=is_vllm)
        key = prefix + name + sample.name.removeprefix(family.name), tuple(sorted(labels.items()))
        summed[key] = summed.get(key, 0.0) + sample.value  # of samples that differ in a label we have and they have not
    return [Sample(*key, value) for key, value in summed.items()]


def _rename(labels: dict[str, str], own: str, *, is_vllm: bool) -> None:
    """Labels whose name or values differ."""
    if own == "requests":
        reason = labels.pop("finish_reason")
        if is_vllm:
            labels["finished_reason"] = reason
    elif own == _FROM_ZERO:
        labels["position"] = str(int(labels["position"]) - 1)
