"""Results as files: JSON in the names of `vllm bench serve` and of AIPerf, CSV of single requests."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from loadtest.asserts import Outcome
from loadtest.measure import Seen, token_intervals, tpot
from loadtest.record import Record
from loadtest.runs import Measured
from loadtest.samples import Sample

AIPERF_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
AIPERF_SCHEMA = "1.2"
"""Of AIPerf's docs/reference/json-export-schema.md, whose fields of that version are written."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """NaN becomes null, since JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


def vllm_result(measured: Measured, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """As `vllm bench serve --save-result --save-detailed`: seconds in the lists, milliseconds in the figures.

    `ttfts` and `latencies` begin when a request was sent, as there, and `queue_times` are what lies before; the
    figures in milliseconds begin when it was meant to be sent. What vLLM has no name for is under `outpace`.
    """
    settings, summary = measured.settings, measured.summary
    records = [record for run in measured.seen for record in run.measured]
    rate = settings.load.rate
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if settings.target.endpoint == "chat" else "openai",
        "endpoint_type": "openai-chat" if settings.target.endpoint == "chat" else "openai",
        "label": None,
        "model_id": measured.server.model,
        "tokenizer_id": None,
        "num_prompts": len(records),
        "request_rate": "inf" if rate is None or math.isinf(rate) else rate,
        "burstiness": settings.load.burstiness,
        "max_concurrency": settings.load.concurrency or settings.load.max_concurrency,
        "request_goodput": None,
        **summary.values(settings.output.percentiles),
        **_lists(records),
    }
    if summary.speculation is not None:
        spec = summary.speculation
        found |= {
            "spec_decode_num_drafts": int(spec.drafts),
            "spec_decode_draft_tokens": int(spec.draft_tokens),
            "spec_decode_accepted_tokens": int(spec.accepted_tokens),
            "spec_decode_per_position_acceptance_rates": spec.per_position,
        }
    found["outpace"] = {
        "token_counts": measured.server.way,
        "seed": settings.seed,
        "errors_by_kind": summary.errors,
        "cached_tokens": summary.cached_tokens,
        "intervals_ms": {
            metric: {name: [interval.low, interval.high] for name, interval in of.items()}
            for metric, of in summary.intervals.items()
        },
        "runs": [run.values(settings.output.percentiles) for run in measured.runs],
        "warnings": summary.warnings,
        "asserts": [{"assert": str(o.assertion), "value": o.value, "holds": o.holds} for o in outcomes],
    }
    return found


def _lists(records: Sequence[Record]) -> dict[str, list[Any]]:
    """What `--save-detailed` adds: a value for each request."""
    return {
        "input_lens": [record.input_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.times[0] - record.sent if record.times else 0.0 for record in records],
        "itls": [token_intervals(record) for record in records],
        "latencies": [record.times[-1] - record.sent if record.times else 0.0 for record in records],
        "start_times": [record.sent for record in records],
        "queue_times": [record.sent - record.intended for record in records],
        "errors": [f"{record.end}: {record.message}" if record.failed else "" for record in records],
    }


def _block(values: Sample, unit: str) -> dict[str, Any]:
    if not len(values):
        return {"unit": unit, "count": 0}
    of = values.values
    return {
        "unit": unit,
        "avg": values.mean,
        "min": float(of.min()),
        "max": float(of.max()),
        **{f"p{percent}": values.percentile(percent) for percent in AIPERF_PERCENTILES},
        "std": float(of.std(ddof=1)) if len(of) > 1 else 0.0,
        "count": len(of),
        "sum": float(of.sum()),
    }


def _of(values: Sequence[float]) -> Sample:
    return Sample(np.asarray(values, np.float64), np.arange(len(values)))


def aiperf_result(measured: Measured) -> dict[str, Any]:
    """As AIPerf's `profile_export_aiperf.json`. There the inter-token latency is one mean a request: our `tpot`."""
    settings, summary = measured.settings, measured.summary
    timed = [record for run in measured.seen for record in run.measured if record.end == "ok" and not record.slow]
    second = [1e3 * (r.times[1] - r.times[0]) for r in timed if len(r.times) > 1]
    speeds = [1 / value for record in timed for value in tpot(record) if value]
    scalars = {
        "request_throughput": (summary.request_throughput, "requests/sec"),
        "output_token_throughput": (summary.output_throughput, "tokens/sec"),
        "total_token_throughput": (summary.total_token_throughput, "tokens/sec"),
        "request_count": (float(summary.completed), "requests"),
        "error_request_count": (float(summary.failed), "requests"),
        "total_output_tokens": (float(summary.output_tokens), "tokens"),
        "benchmark_duration": (summary.duration, "sec"),
    }
    if summary.request_goodput is not None:
        scalars["goodput"] = (summary.request_goodput, "requests/sec")
    return {
        "schema_version": AIPERF_SCHEMA,
        "was_cancelled": False,
        **{name: {"unit": unit, "avg": value} for name, (value, unit) in scalars.items()},
        "time_to_first_token": _block(summary.samples["ttft"], "ms"),
        "time_to_second_token": _block(_of(second), "ms"),
        "inter_token_latency": _block(summary.samples["tpot"], "ms"),
        "inter_chunk_latency": _block(summary.samples["gap"], "ms"),
        "request_latency": _block(summary.samples["e2el"], "ms"),
        "output_token_throughput_per_user": _block(_of(speeds), "tokens/sec/user"),
        "input_sequence_length": _block(_of([r.input_tokens for r in timed]), "tokens"),
        "output_sequence_length": _block(_of([r.output_tokens for r in timed]), "tokens"),
        "error_summary": [{"error_details": {"type": kind}, "count": count} for kind, count in summary.errors.items()],
        "run_info": {"random_seed": settings.seed, "trial": 0},
    }


COLUMNS = (
    *("part", "run", "session", "turn", "end", "intended_s", "sent_s", "first_token_s", "last_token_s", "ended_s"),
    *("input_tokens", "cached_tokens", "output_tokens", "chunks", "slow", "message"),
)


def write_requests(path: Path, parts: Sequence[tuple[str, Sequence[Seen]]]) -> None:
    """CSV: a line for each request behind the warm-up; times are seconds of its run.

    `parts` are loads or sides by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, runs in parts:
            for number, run in enumerate(runs):
                writer.writerows([name, number, *_cells(record)] for record in run.measured)


def _cells(record: Record) -> list[object]:
    first, last = (f"{record.times[i]:.6f}" if record.times else "" for i in (0, -1))
    times = (f"{record.intended:.6f}", f"{record.sent:.6f}", first, last, f"{record.ended:.6f}")
    counts = (record.input_tokens, record.cached_tokens, record.output_tokens, len(record.times))
    return [record.session, record.turn, record.end, *times, *counts, int(record.slow), record.message]
