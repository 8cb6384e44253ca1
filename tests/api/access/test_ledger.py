from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.access.ledger import Ledger, Usage


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_new_ledger_is_empty() -> None:
    ledger = Ledger(clock=Clock())
    assert ledger.used(0) == (0, 0)
    assert ledger.usage(0) == Usage(0, 0, 0.0, 0.0)
    assert ledger.retry_after_s(0, num_requests=1, num_tokens=1) == 0.0


def test_use_leaves_the_window_after_a_minute() -> None:
    clock = Clock(1000.5)
    ledger = Ledger(clock=clock)
    ledger.add(3, 1, 100)
    clock.now = 1010.25
    ledger.add(3, 2, 10)
    assert ledger.used(3) == (3, 110)
    assert ledger.used(2) == ledger.used(4) == (0, 0)
    assert ledger.usage(3) == Usage(3, 110, 59.75, 59.75)
    clock.now = 1059.99
    assert ledger.used(3) == (3, 110)
    ledger.add(4, 0, 5)
    assert ledger.usage(4).requests_empty_in_s == 0.0
    assert ledger.usage(4).tokens_empty_in_s == pytest.approx(59.01)
    clock.now = 1060.0
    assert ledger.used(3) == (2, 10)
    clock.now = 1070.0
    assert ledger.used(3) == (0, 0)


def test_a_bucket_is_used_again_from_zero() -> None:
    clock = Clock(7)
    ledger = Ledger(clock=clock)
    ledger.add(0, 5, 5)
    clock.now += 60
    ledger.add(0, 1, 2)
    assert ledger.used(0) == (1, 2)


def test_retry_waits_for_exactly_as_many_buckets_as_it_takes() -> None:
    clock = Clock(100)
    ledger = Ledger(clock=clock)
    for second, requests, tokens in ((100, 1, 0), (110, 2, 50), (120, 1, 500)):
        clock.now = second
        ledger.add(0, requests, tokens)
    clock.now = 130.5
    waits = [ledger.retry_after_s(0, num_requests=n) for n in (0, 1, 2, 3, 4, 5)]
    assert waits == [0, 29.5, 39.5, 39.5, 49.5, 49.5]
    assert [ledger.retry_after_s(0, num_tokens=n) for n in (1, 50, 51)] == [39.5, 39.5, 49.5]
    assert ledger.retry_after_s(0, num_requests=1, num_tokens=51) == 49.5


def test_retry_does_not_wait_for_what_has_left_already() -> None:
    clock = Clock(0)
    ledger = Ledger(clock=clock)
    for second in (0, 10):
        clock.now = second
        ledger.add(0, 1, 1)
    clock.now = 60.5
    assert ledger.retry_after_s(0, num_requests=1) == ledger.retry_after_s(0, num_tokens=1) == 9.5


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), st.integers(0, 3), st.integers(0, 50)), max_size=60),
    st.integers(1, 100),
)
def test_it_is_the_sum_of_the_last_sixty_seconds_over_workers(
    events: list[tuple[int, int, int, int]], needed: int
) -> None:
    clock = Clock()
    ledger = Ledger(None, 3, clock=clock)
    events.sort()
    for second, worker, requests, tokens in events:
        clock.now = second + 0.5
        ledger._own = ledger._all[worker]
        ledger.add(9, requests, tokens)

    def model(now: int) -> tuple[int, int]:
        live = [event for event in events if now - 60 < event[0] <= now]
        return sum(event[2] for event in live), sum(event[3] for event in live)

    now = int(clock.now)
    assert ledger.used(9) == model(now)
    wait = ledger.retry_after_s(9, num_tokens=needed)
    if wait:
        before = model(now)[1]
        after = model(int(clock.now + wait))[1]
        just_before = model(int(clock.now + wait - 0.001))[1]
        assert before - after >= min(needed, before)
        assert before - just_before < min(needed, before)


def test_numbers_do_not_wrap() -> None:
    ledger = Ledger(clock=Clock())
    ledger.add(0, 0, 2**32 - 2)
    ledger.add(0, 0, 100)
    assert ledger.used(0) == (0, 2**32 - 1)


def test_workers_share_a_sparse_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    Ledger.create(path, 2)
    assert path.stat().st_blocks * 512 < 2**16 < path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    own = Ledger(path, 2, worker=0)
    own.add(5, 1, 10)
    code = "from server.api.access.ledger import Ledger as L; "
    code += f"other = L({str(path)!r}, 2, 1); other.add(5, 2, 20); print(*other.used(5))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "30"]
    assert own.used(5) == (3, 30)


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "ledger", 2)
    with pytest.raises(ValueError, match="made for other numbers of workers"):
        Ledger(tmp_path / "ledger", 3)
