"""Writes `dashboards/*.json` from the panels below: `python deploy/grafana/build.py`.

Expressions use the variables `$arm` (a regular expression), `$window` (1m, 10m, 1h) and `$__rate_interval`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("dashboards")
WIDTH, HEIGHT = 8, 8
COLUMNS = 24 // WIDTH
ARM = 'arm=~"$arm"'
SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """`queries` are (expression, legend); `low` is where the axis begins (None: where the data do)."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""
    kind: str = "timeseries"
    low: float | None = 0


def _quantiles(title: str, metric: str, description: str = "") -> Panel:
    return Panel(
        title,
        "s",
        tuple(
            (f'outpace_{metric}_quantile_seconds{{{ARM},window="$window",quantile="{share}"}}', f"{{{{arm}}}} {name}")
            for share, name in (("0.5", "P50"), ("0.95", "P95"), ("0.99", "P99"))
        ),
        description or "Over the window, within 1 % of the true quantile.",
    )


def _rate(title: str, metric: str, unit: str = "short", by: str = "arm", more: str = "") -> Panel:
    expression = f"sum by ({by}) (rate(outpace_{metric}{{{ARM}{more}}}[$__rate_interval]))"
    return Panel(title, unit, ((expression, " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))),))


def _gauge(title: str, metric: str, unit: str = "short", description: str = "") -> Panel:
    return Panel(title, unit, ((f"outpace_{metric}{{{ARM}}}", "{{arm}}"),), description)


def _histogram(title: str, metric: str, share: float) -> Panel:
    rate = f"sum by (arm, le) (rate(outpace_{metric}_bucket{{{ARM}}}[$__rate_interval]))"
    return Panel(
        title, "s", ((f"histogram_quantile({share}, {rate})", "{{arm}}"),), "From the histogram: exact to its bucket."
    )


def _versus(title: str, metric: str) -> Panel:
    """An arm's quantile as a multiple of the control's."""
    own = f'outpace_{metric}_quantile_seconds{{{ARM},arm!="control",window="$window",quantile="0.95"}}'
    control = f'outpace_{metric}_quantile_seconds{{arm="control",window="$window",quantile="0.95"}}'
    return Panel(
        title, "percentunit", ((f"{own} / ignoring(arm) group_left {control}", "{{arm}}"),), "100 %: as the control."
    )


def _experiment(title: str, metric: str, kind: str = "timeseries", by: str = "", description: str = "") -> Panel:
    legend = "{{experiment}}" + (f" {{{{{by}}}}}" if by else "")
    unit = "percentunit" if metric == "weight" else "short"
    return Panel(title, unit, ((f"outpace_experiment_{metric}", legend),), description, kind, None)


def _copies(title: str, count: str, more: str = "", kind: str = "timeseries", description: str = "") -> Panel:
    """Counts of comparisons of answers with their copies: of audits and of shadows."""
    legend = f" {{{{{more}}}}}" if more else ""
    return Panel(
        title,
        "short",
        (
            (f"outpace_audit_{count}_total{{{ARM}}}", f"audit of {{{{arm}}}}{legend}"),
            (f"outpace_shadow_{count}_total{{{ARM}}}", f"{{{{arm}}}} beside {{{{of}}}}{legend}"),
        ),
        description,
        kind,
    )


def _copies_histogram(title: str, metric: str, unit: str, description: str) -> Panel:
    """The median by histogram."""
    return Panel(
        title,
        unit,
        tuple(
            (
                f"histogram_quantile(0.5, sum by ({by}le) (outpace_{kind}_{metric}_bucket{{{ARM}}}))",
                legend,
            )
            for kind, by, legend in (
                ("audit", "arm, ", "audit of {{arm}}"),
                ("shadow", "arm, of, ", "{{arm}} beside {{of}}"),
            )
        ),
        description,
        low=None,
    )


def _effect(title: str, metric: str, description: str) -> Panel:
    """What the candidate changes of a metric, between the bounds of its confidence sequence."""
    return Panel(
        title,
        "percentunit",
        tuple(
            (f'outpace_experiment_{name}{{metric="{metric}"}}', f"{{{{experiment}}}} {legend}")
            for name, legend in (("effect_lower", "at least"), ("effect", "estimate"), ("effect_upper", "at most"))
        ),
        description,
        low=None,
    )


_LATER = (
    "Candidate against baseline; above 0 is worse. The bounds hold at every moment; none are drawn before they exist."
)
_SHARE = "Whose the incidents are, less a half: at 50 % all are the candidate's."

_FAILED = f'sum by (arm) (rate(outpace_requests_total{{{ARM},finish_reason="error"}}[$__rate_interval]))'
_ENDED = f"sum by (arm) (rate(outpace_requests_total{{{ARM}}}[$__rate_interval]))"
_ALL_ENDED = "sum(rate(outpace_requests_total[$__rate_interval]))"
_ERRORS = Panel("Share of choices that failed", "percentunit", ((f"{_FAILED} / {_ENDED}", "{{arm}}"),))
_DRAFTED = f"sum by (arm, position) (rate(outpace_draft_tokens_per_position_total{{{ARM}}}[$__rate_interval]))"
_TAKEN = f"sum by (arm, position) (rate(outpace_accepted_draft_tokens_per_position_total{{{ARM}}}[$__rate_interval]))"
_PLAIN_S = f"sum by (arm) (rate(outpace_verify_plain_seconds_total{{{ARM}}}[$__rate_interval]))"
_VERIFY_S = f"sum by (arm) (rate(outpace_verify_seconds_total{{{ARM}}}[$__rate_interval]))"

_COST_AN_HOUR = f"sum by (arm) (rate(outpace_cost_total{{{ARM}}}[$__rate_interval])) * 3600"

DASHBOARDS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel("Ready", "short", ((f"outpace_engine_ready{{{ARM}}}", "{{arm}}"),), kind="stat"),
        Panel("Running", "short", ((f"sum(outpace_requests_running{{{ARM}}})", "sequences"),), kind="stat"),
        Panel("Tokens a second", "short", ((f"sum(outpace_generation_tokens_per_second{{{ARM}}})", ""),), kind="stat"),
        _quantiles("Time to first token", "time_to_first_token"),
        _quantiles("Inter-token latency", "inter_token_latency", "Per token: a step of n tokens is n intervals."),
        _quantiles("End to end", "e2e_request_latency"),
        _quantiles("Time per output token", "time_per_output_token", "One value a choice."),
        _quantiles("Gap between chunks", "step_gap", "However many tokens a chunk has."),
        _quantiles("Queue time", "request_queue_time"),
        _rate("Choices that ended", "requests_total", "reqps", "arm, finish_reason"),
        _rate("Tokens generated a second", "generation_tokens_total"),
        _rate("Prompt tokens a second", "prompt_tokens_total"),
        _ERRORS,
        Panel(
            "HTTP answers",
            "reqps",
            (("sum by (status) (rate(outpace_http_requests_total[$__rate_interval]))", "{{status}}"),),
        ),
        _histogram("Time to first token, P95 by histogram", "time_to_first_token_seconds", 0.95),
    ),
    "Speculation": (
        _gauge("Accepted length", "accepted_length_tokens", description="Tokens a verify step, bonus token included."),
        _gauge("Acceptance", "draft_acceptance_ratio", "percentunit"),
        _gauge("Paused", "speculation_paused"),
        Panel("Acceptance by position", "percentunit", ((f"{_TAKEN} / {_DRAFTED}", "{{arm}} {{position}}"),)),
        Panel(
            "Draft tokens a draft",
            "short",
            (
                (
                    f"sum by (arm) (rate(outpace_draft_tokens_total{{{ARM}}}[$__rate_interval])) / "
                    f"sum by (arm) (rate(outpace_sequence_drafts_total{{{ARM}}}[$__rate_interval]))",
                    "{{arm}}",
                ),
            ),
            "k over time.",
        ),
        Panel(
            "Speed over plain decoding",
            "percentunit",
            ((f"{_PLAIN_S} / {_VERIFY_S}", "{{arm}}"),),
            "By the cost table.",
        ),
        _gauge("Realised speed-up of the last steps", "speculation_realised_speedup_ratio", "percentunit"),
        _gauge("Promised speed-up", "speculation_predicted_speedup_ratio", "percentunit"),
        _rate("Pauses", "speculation_pauses_total"),
    ),
    "Engine": (
        _gauge("Running", "requests_running"),
        _gauge("Waiting", "requests_waiting"),
        _gauge("KV cache in use", "kv_cache_usage_ratio", "percentunit"),
        _gauge("Prefix cache hits", "prefix_hit_ratio", "percentunit"),
        _rate("Prompt tokens computed", "prefill_tokens_total"),
        _rate("Steps", "engine_steps_total", "ops"),
        _rate("Time in steps", "step_seconds_total", "percentunit"),
        _rate("Preemptions", "preemptions_total", "ops"),
        _rate("Steps without a CUDA graph", "engine_graph_misses_total", "ops"),
        _gauge("Restarts", "engine_restarts_total"),
        Panel("CPU", "short", (("rate(outpace_process_cpu_seconds_total[$__rate_interval])", "{{process}} {{arm}}"),)),
        Panel("Memory", "bytes", (("outpace_process_resident_memory_bytes", "{{process}} {{arm}}"),)),
        Panel("GPU memory", "bytes", (("outpace_gpu_memory_used_bytes", "GPU {{gpu}}"),)),
        Panel("GPU utilisation", "percentunit", (("outpace_gpu_utilisation_ratio", "GPU {{gpu}}"),)),
        Panel("GPU power", "watt", (("outpace_gpu_power_watts", "GPU {{gpu}}"),)),
    ),
    "Cost": (
        _gauge("Cost per million tokens", "cost_per_million_tokens", description="Over ten minutes; --price-per-hour."),
        Panel("Cost an hour", "short", ((_COST_AN_HOUR, "{{arm}}"),)),
        Panel("Cost so far", "short", ((f"outpace_cost_total{{{ARM}}}", "{{arm}}"),)),
        _gauge("Energy per token", "energy_joules_per_token", "joule", "Over ten minutes; GPUs only."),
        _rate("Power by arm", "energy_joules_total", "watt"),
        _rate("Tokens a second", "emitted_tokens_total"),
    ),
    "Shadow": (
        _copies("Alarms", "alarms", kind="stat", description="Divergences that must not be. See /v1/shadow."),
        _copies("Copies compared", "compared"),
        _copies("Divergences", "diverged", description="Of other models, ties by rounding, and alarms."),
        _copies("Comparisons by verdict", "verdicts", "verdict"),
        _copies("Copies dropped", "dropped", "reason", description="No room, no time, or the engine was gone."),
        _copies_histogram(
            "Tokens before the first divergence", "first_divergence_tokens", "short", "Median since the start."
        ),
        _copies_histogram(
            "Length shift, tokens", "length_shift_tokens", "short", "Median since the start: copy less answer."
        ),
        _copies_histogram(
            "Time per token, copy over answer",
            "time_per_output_token_ratio",
            "percentunit",
            "Median since the start. Copies wait for users, which is in it.",
        ),
        _gauge("Copies that wait or run", "requests_background"),
    ),
    "Experiment": (
        _experiment("Stage", "stage", "stat", description="Of outpace_experiment_stages; 0: it has not begun."),
        _experiment("Verdict", "verdict", "stat", description="1: promoted, -1: rolled back, 0: none yet."),
        Panel("Status", "short", (("outpace_experiment_status == 1", "{{experiment}} {{status}}"),), kind="stat"),
        _experiment("Share that arms are to have", "weight", by="arm"),
        _experiment("Requests that count", "requests_total", by="arm"),
        _experiment("What is proven", "claim", by="metric", description="1: better, -1: worse, 0: undecided."),
        _effect(
            "Tokens a second",
            "tokens_per_s",
            "Candidate against baseline; below 0 is worse. The bounds hold at any time.",
        ),
        _effect("Time to first token, P95", "ttft", _LATER),
        _effect("Inter-token latency, P95", "itl", _LATER),
        _effect("Time per output token, P95", "tpot", _LATER),
        _effect("End to end, P95", "e2e", _LATER),
        _effect("Output length", "output_tokens", "Candidate against baseline; either direction is worse."),
        _effect("Errors", "errors", _SHARE),
        _effect("Garbled answers", "garbled", _SHARE),
        _experiment("Guard rails that tripped", "guard_trips_total", by="guard"),
        Panel("Share of the traffic", "percentunit", ((f"{_ENDED} / scalar({_ALL_ENDED})", "{{arm}}"),)),
        _rate("Choices that ended", "requests_total", "reqps"),
        _ERRORS,
        _versus("Time to first token, P95 against the control", "time_to_first_token"),
        _versus("Inter-token latency, P95 against the control", "inter_token_latency"),
        _versus("End to end, P95 against the control", "e2e_request_latency"),
        Panel(
            "Tokens a choice",
            "short",
            (
                (
                    f"sum by (arm) (rate(outpace_request_generation_tokens_sum{{{ARM}}}[$__rate_interval])) / "
                    f"sum by (arm) (rate(outpace_request_generation_tokens_count{{{ARM}}}[$__rate_interval]))",
                    "{{arm}}",
                ),
            ),
            "A garbled arm often answers at another length.",
        ),
        _gauge("Tokens a second", "generation_tokens_per_second"),
        _gauge("Restarts", "engine_restarts_total"),
    ),
}


def dashboard(name: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """As Grafana provisions it."""
    return {
        "uid": f"outpace-{name.lower()}",
        "title": f"Outpace: {name.lower()}",
        "tags": ["outpace"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["outpace"], "title": "Outpace", "asDropdown": True}],
        "templating": {"list": _variables()},
        "panels": [_panel(index, panel) for index, panel in enumerate(panels)],
    }


def _variables() -> list[dict[str, Any]]:
    everything = {"text": "All", "value": "$__all"}
    arms = "label_values(outpace_engine_ready, arm)"
    windows = [{"text": name, "value": name, "selected": name == "10m"} for name in ("1m", "10m", "1h")]
    return [
        {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"},
        {
            "name": "arm",
            "label": "Arm",
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": arms, "refId": "arm"},
            "definition": arms,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": everything,
        },
        {
            "name": "window",
            "label": "Window",
            "type": "custom",
            "query": "1m,10m,1h",
            "options": windows,
            "current": windows[1],
        },
    ]


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(index, COLUMNS)
    return {
        "id": index + 1,
        "title": panel.title,
        "description": panel.description,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend, "datasource": SOURCE}
            for number, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    return {"unit": panel.unit} | ({} if panel.low is None else {"min": panel.low})


def files() -> dict[str, str]:
    """Contents by file name."""
    return {
        f"{name.lower()}.json": json.dumps(dashboard(name, panels), indent=1) + "\n"
        for name, panels in DASHBOARDS.items()
    }


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content)
