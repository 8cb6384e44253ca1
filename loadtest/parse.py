"""Words of the command line to settings."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest.asserts import check_metrics, parse_assertion, parse_objective, percentiles_of
from loadtest.distribution import parse_distribution
from loadtest.errors import invalid
from loadtest.measure import METRICS, SCALARS
from loadtest.settings import Asked, Load, Modes, Output, Settings, Target
from loadtest.soak.settings import SoakSettings

_OWN = ("model", "messages", "prompt", "stream", "stream_options", "n")
"""Fields of a body that the load test sets itself, or could not measure."""


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises LoadTestError naming field, value and what would be valid."""
    target = Target(
        options.url, options.endpoint, options.model, _headers(options), options.timeout_s, options.token_counts
    )
    modes = _modes(options, target)
    rate, concurrency = options.rate, options.concurrency
    if options.sweep_concurrency:
        concurrency = round(max(modes.loads))
    elif options.sweep_rates:
        rate = modes.loads[0]
    duration_s = options.duration_s
    if options.soak and concurrency is None:
        concurrency, duration_s = 8, duration_s or 1200.0
    load = Load(
        rate=rate,
        concurrency=concurrency,
        replay=options.replay,
        speed=options.speed,
        arrivals=options.arrivals if options.burstiness == 1 or options.arrivals != "poisson" else "gamma",
        burstiness=options.burstiness,
        ramp_to=options.ramp_to,
        ramp_s=options.ramp_s,
        max_concurrency=options.max_concurrency,
        requests=options.requests,
        duration_s=duration_s,
    )
    return Settings(
        target,
        load,
        _asked(options),
        _output(options),
        warmup_s=options.warmup_s,
        repeats=options.repeat,
        seed=options.seed,
        processes=options.processes,
        modes=modes,
    )


def soak_of(options: argparse.Namespace) -> SoakSettings:
    """The soak's own settings. Raises LoadTestError."""
    return SoakSettings(
        users=options.concurrency or 8,
        duration_s=options.duration_s or 1200.0,
        burst=options.burst,
        burst_every_s=options.burst_every_s,
        server_pid=options.server_pid,
        kill_every_s=options.kill_engine_every_s,
        rss_growth=options.max_rss_growth,
    )


def _modes(options: argparse.Namespace, target: Target) -> Modes:
    loads = [
        *_numbers("sweep_rates", options.sweep_rates),
        *_numbers("sweep_concurrency", options.sweep_concurrency),
    ]
    if options.sweep_rates and options.sweep_concurrency:
        raise invalid("sweep_rates", options.sweep_rates, "either --sweep-rates or --sweep-concurrency")
    tests = tuple(parse_assertion(text) for text in options.find_highest)
    check_metrics(tests, SCALARS, METRICS)
    other = None if options.compare is None else replace(target, url=options.compare, model=None)
    return Modes(tuple(loads), tests, options.precision, other, options.twin)


def _headers(options: argparse.Namespace) -> dict[str, str]:
    headers = {}
    key = options.api_key if options.api_key is not None else os.environ.get("OPENAI_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    for text in options.header:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise invalid("header", text, "NAME=VALUE")
        headers[name.strip()] = value.strip()
    return headers


def _asked(options: argparse.Namespace) -> Asked:
    output = options.output_tokens
    return Asked(
        workload=None if options.workload == "synthetic" else Path(options.workload),
        input_tokens=parse_distribution("input_tokens", options.input_tokens),
        output_tokens=None if output is None else parse_distribution("output_tokens", output),
        prefix_tokens=options.prefix_tokens,
        num_prefixes=options.prefixes,
        turns=parse_distribution("turns", options.turns),
        think_s=parse_distribution("think_s", options.think_s),
        max_turns=options.max_turns,
        temperatures=tuple(_numbers("temperature", options.temperature)),
        ignore_eos=options.ignore_eos,
        fields=_body(options.body),
        cancel_share=options.cancel_share,
        slow_share=options.slow_share,
        slow_bytes_per_s=options.slow_bytes_per_s,
    )


def _output(options: argparse.Namespace) -> Output:
    asserts = tuple(parse_assertion(text) for text in options.asserts)
    check_metrics(asserts, SCALARS, METRICS)
    tests = [parse_assertion(text) for text in options.find_highest]
    percentiles = _numbers("percentiles", options.percentiles)
    if not percentiles or not all(0 < percent <= 100 for percent in percentiles):
        raise invalid("percentiles", options.percentiles, "a list of numbers above 0, at most 100")
    return Output(
        json=options.json,
        aiperf_json=options.aiperf_json,
        csv=options.csv,
        html=options.html,
        objectives=tuple(parse_objective(text) for text in options.goodput),
        asserts=asserts,
        live=options.live,
        percentiles=tuple(sorted({*percentiles, *percentiles_of(asserts), *percentiles_of(tests)})),
    )


def _numbers(field: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise invalid(field, text, "numbers with commas between, as in 0,0.5,1") from None


def _body(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise invalid("body", text, f"a JSON object ({error})") from None
    if not isinstance(fields, dict):
        raise invalid("body", text, "a JSON object")
    for name in _OWN:
        if name in fields:
            raise invalid("body", name, "fields that the load test does not set itself")
    return fields
