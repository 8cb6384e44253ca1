"""Every reported percentile against what a scripted server is known to do."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from loadtest.measure import Seen, measure
from loadtest.settings import Load
from tests.loadtest.conftest import Reference
from tests.loadtest.virtual import asked, numbers, run

PERCENTILES = (1.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
TOLERANCE = 0.01
ATTEMPTS = 8
NUM_TOKENS = 8
RATE, NUM_REQUESTS = 20.0, 60
LOAD = Load(rate=RATE, arrivals="constant", requests=NUM_REQUESTS)
SCRIPTS: dict[str, dict[str, Any]] = {
    "constant": {"ttft_s": 0.3, "gap_s": 0.15},
    "bimodal": {"ttft_s": [0.2, 0.2, 0.2, 0.6], "gap_s": [0.12, 0.36]},
    "stall of 1 s": {"ttft_s": 0.26, "gap_s": 0.15, "stall": [1.0, 1.0]},
    "several tokens a chunk": {"ttft_s": 0.25, "gap_s": 0.4, "tokens": [1, 3, 2, 2]},
}


def scripted(script: dict[str, Any]) -> list[list[float]]:
    """When the chunks of each request are sent by the script, seconds from the first request's arrival."""
    sent, waits = [], numbers(script["ttft_s"])
    counts = _tokens(script)
    stall = script.get("stall", [0.0, 0.0])
    for number in range(NUM_REQUESTS):
        due, times, gaps = number / RATE + next(waits), [], numbers(script["gap_s"])
        for _ in counts:
            due = stall[0] + stall[1] if stall[0] <= due < stall[0] + stall[1] else due
            times.append(due)
            due += next(gaps)
        sent.append(times)
    return sent


def _tokens(script: dict[str, Any]) -> list[int]:
    """Tokens of each chunk of an answer."""
    found: list[int] = []
    for count in islice(numbers(script.get("tokens", 1)), NUM_TOKENS):
        if sum(found) < NUM_TOKENS:
            found.append(int(min(count, NUM_TOKENS - sum(found))))
    return found


def truth(sent: list[list[float]], intended: list[float], tokens: list[int]) -> dict[str, float]:
    """The figures of a report in milliseconds, worked out from the server's times."""
    values: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "gap": [], "e2el": []}
    for at, times in zip(intended, sent, strict=True):
        values["ttft"].append(1e3 * (times[0] - at))
        values["e2el"].append(1e3 * (times[-1] - at))
        values["tpot"].append(1e3 * (times[-1] - times[0]) / (sum(tokens) - 1))
        for gap, count in zip(np.diff(times), tokens[1:], strict=True):
            values["gap"].append(1e3 * float(gap))
            values["itl"] += [1e3 * float(gap) / count] * count
    found: dict[str, float] = {}
    for name, of in values.items():
        found |= {f"mean_{name}_ms": float(np.mean(of)), f"median_{name}_ms": float(np.median(of))}
        found |= {f"p{percent:g}_{name}_ms": float(np.percentile(of, percent)) for percent in PERCENTILES}
    return found


def furthest(seen: Seen, expected: dict[str, float]) -> tuple[float, str]:
    """The figure that is furthest from the truth, and by which share of it."""
    summary = measure([seen], (), PERCENTILES)
    assert (summary.completed, summary.failed) == (NUM_REQUESTS, 0), summary.errors
    values = summary.values(PERCENTILES)
    return max((abs(values[name] - value) / max(value, 1e-9), name) for name, value in expected.items())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_percentile_is_within_one_percent_of_the_script(name: str) -> None:
    """In made-up time, in which the machine delays nothing: what is left is the tool's own error."""
    script = SCRIPTS[name]
    seen = run(script, LOAD, asked(NUM_TOKENS))
    intended = [number / RATE for number in range(NUM_REQUESTS)]
    assert np.diff([record.intended for record in seen.records]) == pytest.approx(np.diff(intended))
    share, figure = furthest(seen, truth(scripted(script), intended, _tokens(script)))
    assert share < TOLERANCE, figure


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_percentile_is_within_one_percent_of_the_servers_log(server: Reference, name: str) -> None:
    """In real time, against the server's own log. A busy machine wakes the client late, so there are several
    attempts."""
    found = []
    for _ in range(ATTEMPTS):
        server.script(**SCRIPTS[name])
        seen, start = server.run(LOAD, NUM_TOKENS)
        intended = [start + record.intended for record in seen.records]
        found.append(furthest(seen, truth(server.log(), intended, _tokens(SCRIPTS[name]))))
        if found[-1][0] < TOLERANCE:
            return
    raise AssertionError(f"off by more than {TOLERANCE:.0%} in every attempt: {found}")


def test_a_stall_shows_in_the_p99_of_an_open_loop_and_not_of_a_closed_one() -> None:
    script = {"ttft_s": 0.005, "gap_s": 0.005, "stall": [0.5, 1.0]}
    seen = run(script, Load(rate=50.0, arrivals="constant", requests=150), asked(2))
    opened = measure([seen], (), (99.0,)).samples["ttft"]
    # 50 of 150 requests are meant to be sent within the stall and wait for its end, the longest of them for 1 s.
    assert opened.percentile(99) == pytest.approx(980, abs=20)
    assert opened.percentile(100 - 100 * 25 / 150) == pytest.approx(500, abs=30)
    seen = run(script, Load(concurrency=1, requests=150), asked(2))
    closed = measure([seen], (), (99.0,)).samples["ttft"]
    assert closed.percentile(99) < 10  # one request of 150 met the stall
    assert closed.percentile(100) > 990


def test_latency_begins_when_a_request_was_meant_to_be_sent() -> None:
    """Behind a limit of one at once, requests queue in the client: that counts, and is told apart."""
    load = Load(rate=100.0, arrivals="constant", requests=10, max_concurrency=1)
    summary = measure([run({"ttft_s": 0.1, "gap_s": 0.0}, load, asked(1))], (), (100.0,))
    assert summary.max_concurrent_requests == 1
    # The last is meant to go 0.09 s after the first and goes when nine others of 0.1 s have ended.
    assert summary.samples["client_queue_time"].percentile(100) == pytest.approx(810, rel=0.01)
    assert summary.samples["ttft"].percentile(100) == pytest.approx(910, rel=0.01)


def test_warm_up_is_cut() -> None:
    seen = run({"ttft_s": [0.5, *[0.1] * 30], "gap_s": 0.01}, LOAD, asked(2), warmup_s=0.1)
    assert len(seen.measured) == NUM_REQUESTS - 1  # the first is meant to go at 0.05 s
    summary = measure([seen], (), (90.0,))
    assert summary.samples["ttft"].percentile(90) == pytest.approx(100, rel=0.01)
    assert summary.completed == NUM_REQUESTS - 1
