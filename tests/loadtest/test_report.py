"""What is said around the figures: warnings, assertions, progress."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest

from loadtest.asserts import check, check_metrics, parse_assertion, parse_objective
from loadtest.caveats import warnings
from loadtest.distribution import parse_distribution
from loadtest.errors import LoadTestError
from loadtest.generator import Health, Progress
from loadtest.live import Live
from loadtest.measure import METRICS, SCALARS, Seen, is_good, measure
from loadtest.record import Record
from loadtest.samples import intervals, sample


def seen(count: int = 200, late_s: float = 0.0, lag_s: float = 0.0, cpu_share: float = 0.1) -> Seen:
    records = []
    for number in range(count):
        sent = number + late_s
        records.append(Record(number, sent, sent + 1, [sent + 0.5, sent + 1], [1, 3], output_tokens=4, session=number))
    return Seen(records, [Health([lag_s] * 100, cpu_share)])


def kinds(*runs: Seen, way: str = "usage", limited: bool = False) -> set[str]:
    return {warning.partition(":")[0] for warning in warnings(runs, way, limited)}


def test_a_generator_that_is_the_bottleneck_says_so() -> None:
    assert kinds(seen()) == set()
    assert kinds(seen(cpu_share=0.95)) == {"generator-cpu"}
    assert kinds(seen(lag_s=0.05)) == {"generator-lag"}
    assert kinds(seen(late_s=0.05)) == {"late-sending"}
    assert kinds(seen(late_s=0.05), limited=True) == set()  # held back on purpose
    assert kinds(seen(count=20)) == {"few-requests"}
    assert kinds(seen(), way="chunks") == {"chunks-as-tokens"}


def test_a_good_request_keeps_every_limit() -> None:
    one = seen().records[0]  # 500 ms to the first token, then 500 ms for three
    assert is_good(one, [parse_objective("ttft:500"), parse_objective("tpot:167"), parse_objective("gap:500")])
    assert not is_good(one, [parse_objective("ttft:499")])
    assert not is_good(one, [parse_objective("ttft:500"), parse_objective("itl:166")])
    summary = measure([seen()], [parse_objective("ttft:499")], (50.0,))
    assert summary.request_goodput == 0
    with pytest.raises(LoadTestError, match="goodput"):
        parse_objective("speed:3")


def test_assertions_read_any_figure() -> None:
    values = measure([seen()], (), (95.0,)).values((95.0,))
    texts = ("p95_ttft_ms<501", "p95_ttft_ms<500", "error_rate<=0", "completed>=200", "mean_tpot_ms > 1e3")
    assertions = [parse_assertion(text) for text in texts]
    check_metrics(assertions, SCALARS, METRICS)
    assert [outcome.holds for outcome in check(assertions, values)] == [True, False, True, True, False]
    for wrong in ("p95_ttft_ms", "p95_ttft_ms<<3", "<3"):
        with pytest.raises(LoadTestError, match="assert"):
            parse_assertion(wrong)
    with pytest.raises(LoadTestError, match="p101_ttft_ms"):
        check_metrics([parse_assertion("p101_ttft_ms<3")], SCALARS, METRICS)


def test_what_was_not_measured_keeps_no_assertion() -> None:
    values = measure([Seen([Record(0.0, end="timeout")])], (), (95.0,)).values((95.0,))
    assert [outcome.holds for outcome in check([parse_assertion("p95_ttft_ms<1000")], values)] == [False]


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """The mean and the median of an exponential, whose own are known; some room for chance."""
    random, held = np.random.default_rng(1), Counter[str]()
    for number in range(200):
        of = sample(random.exponential(100, 150), range(150))
        found = intervals(of, [50.0], seed=number)
        held["mean"] += found["mean"].low <= 100 <= found["mean"].high
        held["median"] += found["p50"].low <= 100 * np.log(2) <= found["p50"].high
    assert 178 <= held["mean"] <= 199
    assert 178 <= held["median"] <= 199


def test_intervals_are_of_requests_not_of_their_tokens() -> None:
    """Tokens of one request are alike: a thousand of them know no more than their ten requests do."""
    values = np.repeat(np.random.default_rng(2).normal(100, 10, 10), 100)
    of_requests = intervals(sample(values, np.repeat(np.arange(10), 100)), [50.0])["mean"]
    of_tokens = intervals(sample(values, range(1000)), [50.0])["mean"]
    assert of_requests.high - of_requests.low > 5 * (of_tokens.high - of_tokens.low)


def test_progress_of_all_processes_is_one_line() -> None:
    out = io.StringIO()
    live = Live(out, in_place=False)
    live.take(0, Progress(2.0, 10, 8, 80, Counter(timeout=1), [0.1, 0.2], [0.01]))
    live.take(1, Progress(2.0, 10, 8, 80, Counter(), [0.3], []))
    live.end()
    line = out.getvalue()
    assert "sent 20  done 16  open 4  errors 1" in line
    assert "8.0 req/s  80 tok/s" in line
    assert "ttft p50 200 p95 200 ms" in line


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        ("7", 7, 7, 7),
        ("2-6", 2, 6, 4),
        ("normal:100,10", 40, 160, 100),
        ("lognormal:100,0.5", 5, 1500, 113),
        ("exponential:50", 1, 1000, 50),
    ],
)
def test_distributions_of_lengths(text: str, low: int, high: int, mean: float) -> None:
    of = parse_distribution("input_tokens", text)
    drawn = [of.draw_int(np.random.default_rng(seed)) for seed in range(3000)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert np.mean(drawn) == pytest.approx(mean, rel=0.06)


@pytest.mark.parametrize("text", ["", "many", "6-2", "normal:3", "gamma:1,2", "-4", "normal:nan,1"])
def test_what_is_no_distribution_is_told(text: str) -> None:
    with pytest.raises(LoadTestError, match="input_tokens"):
        parse_distribution("input_tokens", text)
