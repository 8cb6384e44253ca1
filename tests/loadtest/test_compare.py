from __future__ import annotations

import numpy as np
import pytest

from loadtest.compare import ratios, turns, twin
from loadtest.measure import Seen, measure
from loadtest.record import Record
from loadtest.settings import Load, Settings, Target


def seen(factor: float, seed: int, count: int = 200) -> Seen:
    """Latencies of requests that differ much from each other, times a factor and a little noise."""
    random = np.random.default_rng(5)
    noise = np.random.default_rng(seed)
    records = []
    for number in range(count):
        ttft, tpot = random.lognormal(-2, 1), random.lognormal(-4, 0.5)
        ttft, tpot = (value * factor * noise.normal(1, 0.05) for value in (ttft, tpot))
        times = [number + ttft + tpot * n for n in range(5)]
        records.append(Record(number, number, times[-1], times, [1] * 5, output_tokens=5, session=number))
    return Seen(records)


def test_sides_take_turns_and_swap_places() -> None:
    assert turns(3) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)]


def test_a_ratio_is_found_with_an_interval_that_holds_it() -> None:
    a, b = [seen(1.0, 1), seen(1.0, 2)], [seen(0.5, 3), seen(0.5, 4)]
    runs_a, runs_b = ([measure([one], (), (50.0,)) for one in side] for side in (a, b))
    found = {ratio.name: ratio for ratio in ratios(a, b, runs_a, runs_b)}
    ttft = found["mean Time to first token, ms"]
    assert ttft.interval is not None
    assert 0.49 < ttft.interval.low < ttft.ratio < ttft.interval.high < 0.51
    tpot = found["p95 Time per output token, ms"]
    assert tpot.interval is not None
    assert tpot.interval.low < 0.5 < tpot.interval.high
    throughput = found["output tokens/s"]
    assert throughput.ratio == pytest.approx(1.0, abs=0.05)  # an open loop gets what it asks for
    assert throughput.interval is not None
    assert throughput.interval.low <= throughput.ratio <= throughput.interval.high


def test_requests_are_paired_and_those_without_a_partner_left_out() -> None:
    """Latencies differ by a hundredfold between requests: unpaired, the interval would be wide."""
    a, b = seen(1.0, 1), seen(1.2, 2)
    b.records[0].end = "timeout"
    (ttft, *_) = [r for r in ratios([a], [b], *([measure([s], (), (50.0,))] for s in (a, b))) if "first" in r.name]
    assert ttft.interval is not None
    assert ttft.interval.high - ttft.interval.low < 0.08
    assert ttft.ratio == pytest.approx(1.2, rel=0.03)


def test_one_run_a_side_gives_no_interval_of_rates() -> None:
    a, b = seen(1.0, 1), seen(1.0, 2)
    (rate, *_) = ratios([a], [b], [measure([a], (), (50.0,))], [measure([b], (), (50.0,))])
    assert rate.interval is None


def test_a_twin_differs_in_one_field() -> None:
    settings = Settings(Target("http://localhost:1"), Load(concurrency=1, requests=1))
    off, on = twin(settings)
    assert off.asked.fields == {"speculative": {"enabled": False}}
    assert on.asked.fields == {"speculative": {"enabled": True}}
    assert off.load == on.load
