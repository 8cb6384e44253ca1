"""One request of each kind against the scripted server, in made-up time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from loadtest.distribution import constant
from loadtest.measure import measure
from loadtest.record import Record
from loadtest.settings import Load
from loadtest.sse import EventParser
from loadtest.tokens import TokenCounter, text_of
from tests.loadtest.virtual import asked, run

ONE = Load(concurrency=1, requests=1)


def only(record: list[Record]) -> Record:
    (found,) = record
    return found


def test_events_are_found_however_the_bytes_are_cut() -> None:
    stream = b': comment\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata: two\ndata: lines\n\ndata: [DONE]\n\n'
    expected = [b'{"a": 1}', b"two\nlines", b"[DONE]"]
    for size in (1, 2, 3, 7, len(stream)):
        parser = EventParser()
        found = [event for at in range(0, len(stream), size) for event in parser.feed(stream[at : at + size])]
        assert found == expected, size
        assert not parser.incomplete
    cut = EventParser()
    assert cut.feed(b"data: half") == []
    assert cut.incomplete


def test_tokens_of_a_chunk_by_every_way_of_counting() -> None:
    choice = {"delta": {"content": "two words"}, "token_ids": [5, 6], "logprobs": {"content": [{}, {}]}}
    for way, expected in (("usage", 2), ("token_ids", 2), ("logprobs", 2), ("chunks", 1)):
        counter = TokenCounter(way)
        assert counter.count({"usage": {"completion_tokens": 2}}, choice) == expected
        assert counter.count({"usage": {"completion_tokens": 9}}, None) == 0  # the last usage is no chunk
    assert text_of({"delta": {"reasoning_content": "hm"}}) == "hm"
    assert text_of({"text": "plain"}) == "plain"
    assert text_of({"delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}) == "f{}"


def test_a_whole_answer() -> None:
    record = only(list(run({"ttft_s": 0.2, "gap_s": 0.1, "tokens": [1, 3]}, ONE, asked(5)).records))
    assert (record.end, record.output_tokens, record.tokens) == ("ok", 5, [1, 3, 1])
    assert record.input_tokens > 0
    assert [at - record.intended for at in record.times] == pytest.approx([0.2, 0.3, 0.4], abs=0.002)


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ({"status": "503 Service Unavailable"}, "http_503"),
        ({"status": "429 Too Many Requests"}, "http_429"),
        ({"breaks": "close"}, "incomplete"),
        ({"breaks": "drop"}, "disconnected"),
        ({"breaks": "error"}, "stream_engine_unavailable"),
        ({"breaks": "nonsense"}, "bad_event"),
        ({"ttft_s": 1000.0}, "timeout"),
    ],
)
def test_every_error_has_a_kind_of_its_own(script: dict[str, object], end: str) -> None:
    seen = run(script, ONE, asked(5))
    assert only(list(seen.records)).end == end
    summary = measure([seen], (), (50.0,))
    assert (summary.completed, summary.failed, summary.errors) == (0, 1, {end: 1})


def test_a_cancelled_request_is_no_error_and_in_no_latency() -> None:
    seen = run({}, Load(concurrency=2, requests=20), asked(10, cancel_share=0.5))
    summary = measure([seen], (), (50.0,))
    assert summary.failed == 0
    assert 3 <= summary.cancelled <= 17
    assert summary.completed + summary.cancelled == 20
    assert len(summary.samples["ttft"]) == summary.completed
    assert all(record.output_tokens < 10 for record in seen.records if record.end == "cancelled")


def test_slow_readers_are_told_apart() -> None:
    seen = run({}, Load(concurrency=1, requests=4), asked(5, slow_share=1.0, slow_bytes_per_s=1000.0))
    summary = measure([seen], (), (50.0,))
    assert (summary.completed, summary.slow) == (4, 4)
    assert len(summary.samples["ttft"]) == 0
    assert all(record.ended - record.sent > 0.5 for record in seen.records)


def test_a_session_keeps_its_history_and_waits_between_its_turns() -> None:
    seen = run({"ttft_s": 0.1, "gap_s": 0.1}, ONE, asked(3, turns=constant(3), think_s=constant(2)))
    records = list(seen.records)
    assert [record.turn for record in records] == [0, 1, 2]
    waits = [later.intended - before.ended for before, later in pairwise(records)]
    assert waits == pytest.approx([2.0, 2.0], abs=0.01)
    lengths = [record.input_tokens for record in records]
    assert lengths == sorted(set(lengths))  # each turn brings what was said before
