"""Bodies that are large in a way that costs time are refused before they cost it."""

from __future__ import annotations

import time

import orjson
import pytest

from server.api.errors import ApiError
from server.api.parsing import _count_keys, parse_body
from server.api.schemas import ChatRequest, CompletionRequest

USER = b'{"role":"user","content":""}'


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"messages":[%s]}' % b",".join([USER] * 500_000), "strings"),
        (b'{"messages":[%s]}' % b",".join([b"{}"] * 500_000), "keys, objects and lists"),
        (b"{%s}" % b",".join(b'"%d":1' % i for i in range(1_400_000)), "strings"),
        (b'{"metadata":{%s,"1":1}}' % b",".join(b'"%d":1' % i for i in range(1_300_000)), "strings"),
        (b'{"messages":[%s]}' % b",".join([b"[]"] * 200_000), "keys, objects and lists"),
        (b'{"prompt":[%s]}' % b",".join([b"1"] * 8_000_000), "values"),
    ],
)
def test_a_body_of_many_small_things_is_refused_at_once(body: bytes, told: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        parse_body(body, ChatRequest)
    assert time.perf_counter() - start < 0.5
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert f" {told}; this server reads at most " in caught.value.message


def test_text_that_looks_like_json_is_text() -> None:
    text = '{"a": [1, 2], "b\\\\": "\\""}, ' * 100_000
    assert parse_body(orjson.dumps({"prompt": text}), CompletionRequest).prompt == text


@pytest.mark.parametrize(
    ("value", "num_keys"),
    [({}, 0), ({"a": 1}, 1), ({'a":': ':"', "\\": ["\\\\", '\\"', {"b": '":"'}]}, 3), ({"a\\": "\\:"}, 1)],
)
def test_keys_are_counted(value: object, num_keys: int) -> None:
    assert _count_keys(orjson.dumps(value, option=orjson.OPT_INDENT_2)) == num_keys


def test_token_ids_in_hundreds_of_thousands_are_read() -> None:
    assert len(parse_body(b'{"prompt":[%s]}' % b",".join([b"49151"] * 500_000), CompletionRequest).prompt) == 500_000


@pytest.mark.parametrize(("count", "param"), [(10_000, None), (10_001, "messages")])
def test_most_messages(count: int, param: str | None) -> None:
    body = b'{"messages":[%s]}' % b",".join([USER] * count)
    if param is None:
        assert len(parse_body(body, ChatRequest).messages) == count
    else:
        with pytest.raises(ApiError) as caught:
            parse_body(body, ChatRequest)
        assert (caught.value.status, caught.value.param) == (400, param)


def test_most_metadata() -> None:
    for count in (16, 17):
        body = orjson.dumps({"prompt": "a", "metadata": {str(i): "" for i in range(count)}})
        if count == 16:
            assert parse_body(body, CompletionRequest).metadata
        else:
            with pytest.raises(ApiError) as caught:
                parse_body(body, CompletionRequest)
            assert caught.value.param == "metadata"
