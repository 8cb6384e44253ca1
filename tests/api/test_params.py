from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from server.api.engine_requests import engine_requests
from server.api.errors import ApiError
from server.api.messages import plain_messages
from server.api.options import Defaults, Options, chat_options, completion_options
from server.api.params import Limits
from server.api.parsing import parse_body
from server.api.schemas import ChatRequest, CompletionRequest
from server.core import Request, SpeculationParams
from tests.api.fakes import INFO


def _chat_body(**fields: Any) -> ChatRequest:
    return parse_body(orjson.dumps({"messages": [{"role": "user", "content": "Hi"}], **fields}), ChatRequest)


def _chat(headers: dict[str, str] | None = None, defaults: Defaults | None = None, **fields: Any) -> Options:
    return chat_options(_chat_body(**fields), headers or {}, defaults or Defaults(), Limits())


def _completion_body(**fields: Any) -> CompletionRequest:
    return parse_body(orjson.dumps({"prompt": "Hi", **fields}), CompletionRequest)


def _completion(num_prompts: int = 1, **fields: Any) -> Options:
    return completion_options(_completion_body(**fields), {}, Defaults(), Limits(), num_prompts)


def _requests(body: CompletionRequest, num_prompts: int = 1, **more: Any) -> list[Request]:
    options = completion_options(body, {}, Defaults(), Limits(), num_prompts)
    return engine_requests("r", body, options, INFO, [[1, 2]] * num_prompts, param="prompt", **more)


def _error(call: Any, *args: Any, **kwargs: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*args, **kwargs)
    assert caught.value.status == 400
    return caught.value


def test_defaults() -> None:
    options = _chat()
    assert options == Options(
        n=1,
        best_of=1,
        max_tokens=None,
        min_tokens=0,
        logprobs=None,
        stop=[],
        echo=False,
        stream=False,
        include_usage=False,
        continuous_usage=False,
        return_token_ids=False,
        skip_special_tokens=True,
        speculation=SpeculationParams(),
        spec_metrics="none",
        annotate=False,
        timeout_s=None,
        priority=None,
    )
    assert _completion().max_tokens == 16


def test_the_servers_defaults_hold_until_the_request_says() -> None:
    defaults = Defaults(timeout_s=30.0, spec_metrics="summary", speculation=False)
    options = _chat(defaults=defaults)
    assert (options.timeout_s, options.spec_metrics, options.speculation.enabled) == (30.0, "summary", False)
    options = _chat(defaults=defaults, timeout=2.5, speculative={"metrics": "none", "enabled": True})
    assert (options.timeout_s, options.spec_metrics, options.speculation.enabled) == (2.5, "none", True)


@pytest.mark.parametrize(
    ("header", "wish", "expected"),
    [
        ("off", None, SpeculationParams(enabled=False)),
        ("On", None, SpeculationParams()),
        ("3", None, SpeculationParams(max_draft_tokens=3)),
        ("0", None, SpeculationParams(max_draft_tokens=0)),
        ("off", {"enabled": True}, SpeculationParams()),
        ("3", {"max_draft_tokens": 5}, SpeculationParams(max_draft_tokens=5)),
        ("3", {"enabled": False}, SpeculationParams(enabled=False, max_draft_tokens=3)),
        ("off", {"metrics": "summary"}, SpeculationParams(enabled=False)),
        (None, {"enabled": False, "max_draft_tokens": 2}, SpeculationParams(enabled=False, max_draft_tokens=2)),
    ],
)
def test_speculation_from_header_and_body(header: str | None, wish: Any, expected: SpeculationParams) -> None:
    headers = {} if header is None else {"X-Speculation": header}
    assert _chat(headers, speculative=wish).speculation == expected


def test_a_header_can_switch_on_what_the_key_has_off() -> None:
    assert _chat({"X-Speculation": "on"}, Defaults(speculation=False)).speculation.enabled


@pytest.mark.parametrize("value", ["", "yes", "-1", "1.5", "²", "9" * 20, "off,on"])
def test_a_wrong_speculation_header_is_named(value: str) -> None:
    error = _error(_chat, {"X-Speculation": value})
    assert (error.param, error.code) == ("X-Speculation", "invalid_value")
    assert "use on, off or" in error.message


@pytest.mark.parametrize(("value", "seconds"), [("2", 2.0), (" 0.5 ", 0.5), ("1000000000", 1e9)])
def test_a_timeout_header(value: str, seconds: float) -> None:
    assert _chat({"X-Request-Timeout": value}, Defaults(timeout_s=9.0)).timeout_s == seconds
    assert _chat({"X-Request-Timeout": value}, timeout=7).timeout_s == 7


@pytest.mark.parametrize("value", ["", "0", "0.0", "-1", "nan", "inf", "1e3", "2 s", "1000000001", "٣"])
def test_a_wrong_timeout_header_is_named_even_where_the_body_wins(value: str) -> None:
    error = _error(_chat, {"X-Request-Timeout": value}, timeout=7)
    assert (error.param, error.code) == ("X-Request-Timeout", "invalid_value")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": ["x", ""]}, "stop"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_fields_of_a_completion_that_do_not_go_together(fields: dict[str, Any], param: str) -> None:
    assert _error(_completion, **fields).param == param


def test_best_of_counts_against_the_limit_of_choices() -> None:
    error = _error(_completion, 17, best_of=16)
    assert error.message == "17 prompts with best_of=16; this server allows 256 in all."
    assert _completion(16, best_of=16).best_of == 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [{}]}, "tools"),
    ],
)
def test_values_that_would_change_the_answer_are_refused(fields: dict[str, Any], param: str) -> None:
    error = _error(_chat, **fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"verbosity": "medium"},
        {"function_call": "auto"},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"service_tier": "flex", "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "explicit"}},
        {"user": "u", "store": True, "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
    ],
)
def test_what_cannot_change_the_answer_is_accepted(fields: dict[str, Any]) -> None:
    assert replace(_chat(**fields), stream=False) == _chat()


def test_requests_carry_every_field() -> None:
    body = _completion_body(
        max_tokens=9, min_tokens=4, seed=5, n=2, stop_token_ids=[7], ignore_eos=True, echo=True, logprobs=3
    )
    requests = _requests(body, 2, prediction_ids=[8], tenant="t", priority=-3)
    assert [(r.request_id, r.choice) for r in requests] == [("r-0", 0), ("r-1", 1), ("r-2", 0), ("r-3", 1)]
    first = requests[0]
    assert (first.max_tokens, first.min_tokens, first.stop_token_ids, first.ignore_eos) == (9, 4, [7], True)
    assert (first.tenant, first.priority, first.prediction_ids) == ("t", -3, [8])
    assert first.sampling.logprobs == 3
    assert [r.prompt_logprobs for r in requests] == [3, None, 3, None], "the choices of a prompt share them"


def test_every_choice_of_a_stream_asks_for_the_prompts_logprobs() -> None:
    requests = _requests(_completion_body(echo=True, logprobs=0, n=2, stream=True))
    assert [r.prompt_logprobs for r in requests] == [0, 0], "none waits for another"


def test_echo_alone_asks_for_no_prompt_logprobs() -> None:
    assert _requests(_completion_body(echo=True))[0].prompt_logprobs is None
    assert _requests(_completion_body(logprobs=2))[0].prompt_logprobs is None


def test_no_tokens_are_one_that_is_discarded() -> None:
    body = _completion_body(max_tokens=0, echo=True)
    assert completion_options(body, {}, Defaults(), Limits(), 1).discard
    assert _requests(body)[0].max_tokens == 1


def test_the_best_are_found_by_their_logprobs() -> None:
    body = _completion_body(best_of=3, n=2)
    requests = _requests(body)
    assert [request.sampling.logprobs for request in requests] == [0, 0, 0]
    assert _requests(_completion_body(best_of=2, n=2))[0].sampling.logprobs is None


def test_more_tokens_demanded_than_fit() -> None:
    body = _chat_body(min_tokens=255)
    error = _error(engine_requests, "r", body, _chat(min_tokens=255), INFO, [[1, 2]], param="messages")
    assert error.param == "min_tokens"
    assert "254 tokens" in error.message


@pytest.mark.parametrize("key", ["01", "1 ", "+1", "1_0", "٣", "9" * 13])
def test_a_bias_key_is_written_one_way_only(key: str) -> None:
    assert _error(_requests, _completion_body(logit_bias={key: 1})).param == "logit_bias"


def test_top_p_0_is_the_most_likely_token() -> None:
    (request,) = _requests(_completion_body(top_p=0, top_k=5))
    assert (request.sampling.top_k, request.sampling.top_p) == (1, 1.0)
    (request,) = _requests(_completion_body(top_p=0.5, top_k=5))
    assert (request.sampling.top_k, request.sampling.top_p) == (5, 0.5)


@pytest.mark.parametrize("value", [True, False, None])
def test_usage_in_each_chunk(value: bool | None) -> None:
    options = _chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": value})
    assert options.include_usage and options.continuous_usage is bool(value)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "unknown_parameter"),
        (
            {"response_format": {"type": "text", "json_schema": {}}},
            "response_format.json_schema",
            "unknown_parameter",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "unsupported_parameter"),
    ],
)
def test_what_would_change_the_answer_is_not_ignored(fields: dict[str, Any], param: str, code: str) -> None:
    error = _error(_chat, **fields)
    assert (error.param, error.code) == (param, code)


def test_annotations_of_a_message_must_be_empty() -> None:
    message = {"role": "assistant", "content": "Hi"}
    assert plain_messages(_chat_body(messages=[{**message, "annotations": []}]).messages) == [message]
    error = _error(plain_messages, _chat_body(messages=[{**message, "annotations": [{"type": "x"}]}]).messages)
    assert (error.param, error.code) == ("messages[0].annotations", "unsupported_parameter")
