"""Request bodies. Strict: an unknown field, a wrong type or a value out of range is a 400 that names the field."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
import orjson
from msgspec import Meta, Struct

from server.api.errors import ApiError, invalid, unsupported

MAX_CHOICES = 128
MAX_LOGPROBS = 20
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Probability = Annotated[float, Meta(ge=0, le=1)]
NonZeroProbability = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None


class Speculative(Struct, kw_only=True, forbid_unknown_fields=True):
    enabled: bool | None = None
    max_draft_tokens: Count | None = None


class ResponseFormat(Struct, kw_only=True):
    type: str


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    """From `refusal` on: what OpenAI's client sends back empty with an assistant's turn."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None


class Common(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that chat and text completions share. None means the default, as JSON's null does for OpenAI."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: NonZeroProbability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Positive | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculative: Speculative | None = None
    # Accepted as they are: none of these can change the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Common, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """`prompt` is a string, a list of strings, a list of token ids or a list of such lists."""

    prompt: Any
    logprobs: Logprobs | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Positive | None = None


# OpenAI's fields that this server does not serve yet: named so that the message can say so.
NOT_YET = frozenset(
    {
        "audio",
        "function_call",
        "functions",
        "prediction",
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    }
)

_NESTED: tuple[tuple[re.Pattern[str], type[Struct]], ...] = (
    (re.compile(r"messages\[\d+\]"), Message),
    (re.compile(r"stream_options"), StreamOptions),
    (re.compile(r"speculative"), Speculative),
)

T = TypeVar("T", bound=Struct)


def parse_body(raw: bytes, schema: type[T]) -> T:
    """JSON text to `schema`. Raises ApiError 400 naming the field, the value and what would be valid."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise invalid("The request body must be a JSON object.", code="invalid_json")
    for name in body:
        if name in NOT_YET and body[name] is not None and name not in schema.__struct_fields__:
            raise unsupported(f"{name!r} is not supported yet.", name)
    cleaned = {name: value for name, value in body.items() if value is not None or name not in NOT_YET}
    try:
        return msgspec.convert(cleaned, schema)
    except msgspec.ValidationError as error:
        raise _explain(str(error), cleaned, schema) from None


def _explain(message: str, body: dict[str, Any], schema: type[Struct]) -> ApiError:
    reason, _, path = message.partition(" - at `$")
    # A dictionary's value: msgspec does not say which key it belongs to.
    path = path.rstrip("`").lstrip(".").removesuffix("[...]")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL)
    if unknown:
        return _explain_unknown(unknown[1], path, schema)
    missing = re.fullmatch(r"Object missing required field `(.*)`", reason)
    if missing:
        param = f"{path}.{missing[1]}" if path else missing[1]
        return invalid(f"Missing required parameter: {param!r}.", param, "missing_required_parameter")
    is_type = ", got " in reason
    got = "" if is_type else f", got {_value_at(body, path)}"
    code = "invalid_type" if is_type else "invalid_value"
    return invalid(f"Invalid value for {path!r}: {reason[:1].lower()}{reason[1:]}{got}.", path, code)


def _explain_unknown(name: str, path: str, schema: type[Struct]) -> ApiError:
    owner: type[Struct] = next((struct for pattern, struct in _NESTED if pattern.fullmatch(path)), schema)
    valid = ", ".join(sorted(owner.__struct_fields__))
    param = f"{path}.{name}" if path else name
    return invalid(f"Unknown parameter: {param!r}. Valid here: {valid}.", param, "unknown_parameter")


def _value_at(body: Any, path: str) -> str:
    """The value that `path` (as msgspec writes it) leads to, shortened; a dictionary's values are shown whole."""
    value = body
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[key]
        except (KeyError, IndexError, TypeError):
            break
    text = orjson.dumps(value).decode()
    return text if len(text) <= 100 else text[:97] + "..."
