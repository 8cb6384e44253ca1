from __future__ import annotations

import re
import time
import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_content_part_text_param import ChatCompletionContentPartTextParam
from openai.types.chat.chat_completion_prediction_content_param import ChatCompletionPredictionContentParam
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from server.api.errors import ApiError
from server.api.messages import plain_messages
from server.api.parsing import parse_body
from server.api.schemas import (
    NOT_YET,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    Prediction,
    StreamOptions,
    TokenizeRequest,
)

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
CHAT = b'{"messages":[{"role":"user","content":"Hi"}]%s}'


def _undocumented(names: set[str]) -> set[str]:
    return {name for name in names if not re.search(rf"[`\"]{name}[`\".]", DOCS)}


def _names(typed_dict: Any) -> set[str]:
    return set(typing.get_type_hints(typed_dict))


def _refused(raw: bytes, schema: Any = ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(raw, schema)
    error = caught.value
    assert error.status == 400
    error.response()  # can be written as JSON
    return error


@pytest.mark.parametrize(
    ("params", "schema"),
    [
        (chat_create_params.CompletionCreateParamsBase, ChatRequest),
        (chat_create_params.CompletionCreateParamsStreaming, ChatRequest),
        (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
        (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
    ],
)
def test_every_field_of_openais_client_is_served_or_refused_by_name(params: Any, schema: Any) -> None:
    fields = _names(params)
    assert fields >= {"model", "temperature"}, "the client's types are where they were"
    unheard_of = fields - set(schema.__struct_fields__) - NOT_YET
    assert not unheard_of, f"decide what becomes of {sorted(unheard_of)} and document it"
    assert not _undocumented(fields)


def test_every_field_of_ours_is_documented() -> None:
    ours = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *NOT_YET}
    ours |= {*TokenizeRequest.__struct_fields__, *DetokenizeRequest.__struct_fields__}
    assert not _undocumented(ours)


def test_nested_types_know_what_openais_client_may_send() -> None:
    assert _names(ChatCompletionStreamOptionsParam) <= set(StreamOptions.__struct_fields__)
    assert _names(ChatCompletionPredictionContentParam) <= set(Prediction.__struct_fields__)
    for message in typing.get_args(ChatCompletionMessageParam):
        assert _names(message) <= set(Message.__struct_fields__)
    part = dict.fromkeys(_names(ChatCompletionContentPartTextParam), "text")
    assert plain_messages([Message(role="user", content=[part])]) == [{"role": "user", "content": "text"}]


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_what_is_not_served_yet_is_refused_by_name(name: str) -> None:
    error = _refused(CHAT % b',"%s":{}' % name.encode())
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.message == f"{name!r} is not supported yet."
    parse_body(CHAT % b',"%s":null' % name.encode(), ChatRequest)


@pytest.mark.parametrize(
    "raw",
    [
        b'"\\ud800"',
        b'{"user":"\\ud800"}',
        b'{"user":"\xed\xa0\x80"}',
        b'{"user":"\xff"}',
        b'{"\\udfff":1}',
        b'{"seed":1e400}',
        b'{"temperature":Infinity}',
        b'{"temperature":-NaN}',
        b'{"seed":' + b"1" * 400 + b"}",
        b"{" * 2000,
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"user":"a\nb"}',
        b'{"user":"\x00"}',
        b"\xef\xbb\xbf{}",
        b"",
        b"null",
        b"{} {}",
        b'{"a":1,}',
        b"{'a':1}",
    ],
)
def test_what_is_no_json_object_is_told(raw: bytes) -> None:
    assert _refused(raw).code == "invalid_json"


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b'{"model":"a","model":"b"}', "model"),
        (b'{"temperature":1,"temperatur\\u0065" : 0}', "temperature"),
        (b'{"user":":","seed":1 ,\n"seed"\t:\r2}', "seed"),
        (b'{"logit_bias":{"1":2,"1":3}}', "1"),
        (b'{"messages":[{"role":"user","role":"system","content":""}]}', "role"),
        (b'{"messages":[1,{"role":"user","role":"system","content":""}]}', "role"),
        (b'{"metadata":{"a\\\\":1,"a\\\\":2}}', "a\\"),
        (b'{"user":"{\\"a\\":1}","n":1,"n":1}', "n"),
    ],
)
def test_a_key_given_twice_is_refused(raw: bytes, name: str) -> None:
    error = _refused(raw)
    assert (error.param, error.code) == (name, "invalid_json")
    assert "given twice" in error.message


@pytest.mark.parametrize(
    "text", [b": a", b'{\\"a\\": 1, \\"a\\": 2}', b'\\\\\\": x', b":", b"\\u0000", b"\\ud83d\\ude00"]
)
def test_text_that_looks_like_keys_is_text(text: bytes) -> None:
    body = parse_body(b'{"messages":[{"role":"user","content":"%s"}],"user":"%s"}' % (text, text), ChatRequest)
    assert body.user == body.messages[0].content


def test_nesting_that_only_the_fast_parser_reads_is_told() -> None:
    """Between the nesting that the slow parser, the fast one and its writer can do."""
    for depth in range(100, 1100, 50):
        nested = b"[" * depth + b"]" * depth
        error = _refused(b'{"n":{"a":' + nested + b',"b":":"}}')
        assert error.code in ("invalid_json", "invalid_type")
        assert _refused(b'{"messages":' + nested + b"}").code in ("invalid_json", "invalid_type")
        assert _refused(b'{"logit_bias":{"1":101},"metadata":{"x":' + nested + b"}}").param in ("logit_bias", None)
        _refused(b'{"stop_token_ids":' + b"[1]" + b',"prompt":' + nested + b',"n":0}', CompletionRequest)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (b'"n":true', "n"),
        (b'"seed":false', "seed"),
        (b'"max_tokens":true', "max_tokens"),
        (b'"min_tokens":true', "min_tokens"),
        (b'"priority":true', "priority"),
        (b'"timeout":true', "timeout"),
        (b'"stop_token_ids":[true]', "stop_token_ids[0]"),
        (b'"temperature":false', "temperature"),
        (b'"speculative":{"max_draft_tokens":true}', "speculative.max_draft_tokens"),
        (b'"stream":1', "stream"),
        (b'"ignore_eos":"true"', "ignore_eos"),
    ],
)
def test_a_boolean_is_no_number_and_a_number_no_boolean(fields: bytes, param: str) -> None:
    error = _refused(CHAT % (b"," + fields))
    assert (error.param, error.code) == (param, "invalid_type")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (b'"timeout":0', "timeout"),
        (b'"timeout":-1', "timeout"),
        (b'"timeout":1e300', "timeout"),
        (b'"priority":2147483648', "priority"),
        (b'"min_tokens":-1', "min_tokens"),
        (b'"stop_token_ids":[-1]', "stop_token_ids[0]"),
        (b'"stop_token_ids":[%s]' % b",".join([b"1"] * 257), "stop_token_ids"),
        (b'"speculative":{"metrics":"all"}', "speculative.metrics"),
        (b'"prediction":{"type":"text","content":""}', "prediction.type"),
        (b'"max_tokens":0', "max_tokens"),
        (b'"n":17', "n"),
    ],
)
def test_a_value_out_of_range_is_named(fields: bytes, param: str) -> None:
    error = _refused(CHAT % (b"," + fields))
    assert (error.param, error.code) == (param, "invalid_value")


@pytest.mark.parametrize(
    ("field", "param", "valid"),
    [
        (b'"stream_options":{"x":1}', "stream_options.x", "continuous_usage_stats, include_obfuscation, include_usage"),
        (b'"speculative":{"k":1}', "speculative.k", "annotate, enabled, max_draft_tokens, metrics"),
        (b'"prediction":{"type":"content","content":"","x":1}', "prediction.x", "content, type"),
        (b'"%s":1' % (b"x" * 5000), "x" * 97 + "...", "frequency_penalty, function_call, "),
    ],
)
def test_an_unknown_field_is_named_with_the_valid_ones(field: bytes, param: str, valid: str) -> None:
    error = _refused(CHAT % (b"," + field))
    assert (error.param, error.code) == (param, "unknown_parameter")
    assert f"Unknown parameter: {param!r}. Valid here: {valid}" in error.message


def test_a_large_body_is_read_in_bounded_time() -> None:
    start = time.perf_counter()
    parse_body(b'{"prompt":[' + b"1," * 1_000_000 + b"1]}", CompletionRequest)
    text = b'{\\"key\\": \\"value\\"}, ' * 50_000
    parse_body(b'{"prompt":"%s"}' % text, CompletionRequest)
    _refused(b'{"messages":[' + b"1," * 500_000 + b"1]}")
    assert time.perf_counter() - start < 5


def test_null_means_the_default() -> None:
    optional = [name for name in ChatRequest.__struct_fields__ if name != "messages"]
    body = parse_body(CHAT % b"".join(b',"%s":null' % name.encode() for name in optional), ChatRequest)
    assert all(getattr(body, name) is None for name in optional)
