from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from server.chat.answer import Answer, Piece, receive


def chunk(text: str | None = None, **more: Any) -> dict[str, Any]:
    finish = more.pop("finish_reason", None)
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}


def usage(tokens: int, accepted: int = 0, rejected: int = 0) -> dict[str, Any]:
    details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
    return {"choices": [], "usage": {"completion_tokens": tokens, "completion_tokens_details": details}}


def run(*chunks: dict[str, Any]) -> tuple[Answer, list[Piece]]:
    """On a clock that advances by one second a look."""
    ticks: Iterator[int] = count()
    answer = Answer()
    return answer, list(receive(iter(chunks), answer, clock=lambda: float(next(ticks))))


def test_speed_counts_from_the_first_text_on() -> None:
    answer, pieces = run(chunk(""), chunk("a"), chunk("bc"), chunk(finish_reason="stop"), usage(5, 3, 1))
    assert pieces == [Piece("a"), Piece("bc")]
    assert (answer.text, answer.first_s, answer.last_s, answer.finish_reason) == ("abc", 1.0, 2.0, "stop")
    assert answer.tokens_per_s == 4.0
    assert answer.summary() == "5 tokens, 4.0 tokens/s, first after 1.00 s, 3 of 4 drafts accepted"


def test_what_is_not_known_is_left_out() -> None:
    assert run(chunk("a", finish_reason="length"))[0].summary() == "first after 1.00 s, cut off at the longest length"
    assert run(usage(1))[0].summary() == "1 token, 0 of 0 drafts accepted"
    assert run({"choices": None})[0].summary() == ""


@pytest.mark.parametrize(
    "annotations", [None, [], [{"text": "a", "accepted": True}], [{"text": "abc", "accepted": True}, {}]]
)
def test_annotations_that_do_not_cover_the_text_are_not_believed(annotations: Any) -> None:
    assert run(chunk("abc", draft_annotations=annotations))[1] == [Piece("abc")]


def test_annotations() -> None:
    annotations = [{"text": "ab", "accepted": True}, {"text": "c", "accepted": False}]
    assert run(chunk("abc", draft_annotations=annotations))[1] == [Piece("ab", True), Piece("c")]
