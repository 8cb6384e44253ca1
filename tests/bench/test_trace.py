from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from server.bench.trace import DEVICE_KINDS, HOST_KINDS, Span, gaps, read_spans, totals

STREAM = ("0", "7")


def span(name: str, start: float, end: float, track: tuple[str, str] = STREAM) -> Span:
    return Span(name, start, end - start, track)


def test_kernels_by_name_the_longest_first() -> None:
    found = totals([span("a", 0, 10), span("b", 10, 40), span("a", 50, 60)])
    assert [(t.name, t.calls, t.total_ms) for t in found] == [("b", 1, 0.03), ("a", 2, 0.02)]
    assert [t.share for t in found] == pytest.approx([0.6, 0.4])


def test_an_operator_without_what_it_calls() -> None:
    other = ("0", "8")
    spans = [span("outer", 0, 100), span("inner", 10, 40), span("leaf", 20, 30), span("inner", 50, 60)]
    found = {t.name: t.total_ms * 1e3 for t in totals([*spans, span("elsewhere", 20, 30, other)])}
    assert found == pytest.approx({"outer": 60, "inner": 30, "leaf": 10, "elsewhere": 10})


def test_kernels_that_overlap_are_not_inside_each_other() -> None:
    found = {t.name: t.total_ms * 1e3 for t in totals([span("a", 0, 10), span("b", 8, 20)])}
    assert found == pytest.approx({"a": 10, "b": 12})


def test_gaps_are_where_nothing_runs_on_any_stream() -> None:
    spans = [span("a", 0, 10), span("b", 2, 4, ("0", "9")), span("c", 15, 20), span("d", 18, 30), span("e", 33, 34)]
    found = gaps(spans)
    assert (found.count, found.total_us, found.longest_us, found.busy_us) == (2, 8.0, 5.0, 26.0)
    assert gaps([]).count == 0


@pytest.mark.parametrize("packed", [False, True])
def test_reading_a_trace(tmp_path: Path, packed: bool) -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "late", "ts": 20.0, "dur": 5.0, "pid": 0, "tid": 7},
        {"ph": "X", "cat": "gpu_memcpy", "name": "early", "ts": 10, "dur": 1, "pid": 0, "tid": 7},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 2, "pid": 1, "tid": 1},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "step", "ts": 1, "dur": 50, "pid": 0, "tid": 7},
        {"ph": "i", "name": "mark", "ts": 1},
        {"ph": "M", "name": "process_name", "pid": 1},
    ]
    text = json.dumps({"traceEvents": events}).encode()
    file = tmp_path / ("t.json.gz" if packed else "t.json")
    file.write_bytes(gzip.compress(text) if packed else text)
    assert [s.name for s in read_spans(file, DEVICE_KINDS)] == ["early", "late"]
    assert [s.name for s in read_spans(file, HOST_KINDS)] == ["aten::mm"]
