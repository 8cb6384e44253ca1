"""Request bodies. What is wrong with one is told by `server.api.parsing`.

The OpenAPI document is made of these types: constraints and descriptions are written here and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from server.engine.limits import MAX_BIASES

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_MESSAGES = 10_000
MAX_METADATA = 16
MAX_TIMEOUT_S = 1e9
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

EXACT = "x-exact"
"""In a type's extra schema: what the type can not say and the checks that follow do; replaces what is made of it."""

_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ]
}
_TEXT_PART = {
    "type": "object",
    "properties": {
        "type": {"const": "text"},
        "text": {"type": "string"},
        "prompt_cache_breakpoint": {"description": "Accepted: it cannot change the answer."},
    },
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]}
_STOP = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
            "maxItems": MAX_STOP_STRINGS,
        },
        {"type": "null"},
    ]
}

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Positive = Annotated[int, Meta(ge=1, le=INT64_MAX)]
Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
TextContent = Annotated[str | list[dict[str, Any]] | None, Meta(extra_json_schema={EXACT: _CONTENT})]
ROLES = ("system", "developer", "user", "assistant")

_EMPTY = Meta(extra_json_schema={"maxLength": 0, "maxItems": 0, "maxProperties": 0})
_NO_EFFECT = Meta(description="Accepted: it cannot change the answer.")
_WHO = Meta(description="Whose request it is: where several arms share the traffic, one person's come from one arm.")


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: Annotated[bool | None, Meta(description="Ends the stream with a chunk that has the usage.")] = None
    include_obfuscation: Annotated[bool | None, Meta(description="Accepted: nothing is ever padded.")] = None
    continuous_usage_stats: Annotated[bool | None, Meta(description="Every chunk has the usage so far.")] = None


class Speculative(Struct, kw_only=True, forbid_unknown_fields=True):
    """How this request drafts and what its answer says about it. Never changes the text."""

    enabled: Annotated[bool | None, Meta(description="False: no drafts for this request.")] = None
    max_draft_tokens: Annotated[Count | None, Meta(description="Upper bound of the server's choice.")] = None
    metrics: Annotated[
        Literal["none", "summary", "detailed"] | None,
        Meta(description="How much of `metrics.speculative_decoding` the answer carries."),
    ] = None
    annotate: Annotated[bool | None, Meta(description="Choices say which of their text was drafted.")] = None


class ResponseFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """`json_schema` is known so that the type it belongs to is what is refused."""

    type: Annotated[str, Meta(extra_json_schema={"const": "text"})]
    json_schema: Annotated[Any, Meta(extra_json_schema={"enum": [None]})] = None


class Prediction(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer is expected to be: drafts to start from. Never changes the text."""

    type: Literal["content"]
    content: Annotated[
        str | list[dict[str, Any]],
        Meta(extra_json_schema={EXACT: _CONTENT}),
    ]


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    """From `refusal` on: what OpenAI's client sends back empty with an assistant's turn."""

    role: Annotated[str, Meta(description="`developer` is `system`.", extra_json_schema={"enum": list(ROLES)})]
    content: TextContent = None
    name: Annotated[str | None, Meta(description="Handed to the chat template, which may use it.")] = None
    refusal: Annotated[str | None, _EMPTY] = None
    annotations: Annotated[list[Any] | None, _EMPTY] = None
    audio: Annotated[dict[str, Any] | None, _EMPTY] = None
    tool_calls: Annotated[list[Any] | None, _EMPTY] = None
    function_call: Annotated[dict[str, Any] | None, _EMPTY] = None
    tool_call_id: Annotated[str | None, _EMPTY] = None


class Common(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that chat and text completions share. None means the default, as JSON's null does for OpenAI."""

    model: Annotated[str | None, Meta(description="The served model's name.")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 is greedy; 1 if not given.")
    ] = None
    top_p: Annotated[Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="0: the most likely token alone.")] = (
        None
    )
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None, Meta(description="0 and -1: off.")] = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[
        dict[str, Bias] | None,
        Meta(
            description="Token id to what its logit gains.",
            extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,11})$"}, "maxProperties": MAX_BIASES},
        ),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)] | None, Meta(description="The same seed gives the same text.")
    ] = None
    n: Annotated[Choices | None, Meta(description="Choices a prompt.")] = None
    max_tokens: Annotated[Count | None, Meta(description="Most tokens of a choice.")] = None
    min_tokens: Annotated[Count | None, Meta(description="Nothing ends the choice before; at most max_tokens.")] = None
    stop: Annotated[
        str | list[str] | None, Meta(description="Ends the text before it.", extra_json_schema={EXACT: _STOP})
    ] = None
    stop_token_ids: Annotated[Annotated[list[Count], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None, Meta()] = None
    ignore_eos: Annotated[bool | None, Meta(description="Goes on after the end-of-sequence token.")] = None
    skip_special_tokens: Annotated[bool | None, Meta(description="False: special tokens show in the text.")] = None
    return_token_ids: Annotated[bool | None, Meta(description="The answer carries the tokens beside the text.")] = None
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, Meta(description="Only with `stream`.")] = None
    speculative: Speculative | None = None
    priority: Annotated[
        Annotated[int, Meta(ge=INT32_MIN, le=INT32_MAX)] | None,
        Meta(description="Lower is served first; 0 if not given."),
    ] = None
    timeout: Annotated[
        Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_S)] | None,
        Meta(description="Seconds from the request's arrival to its end; then it fails with 408."),
    ] = None
    user: Annotated[str | None, _WHO] = None
    metadata: Annotated[Annotated[dict[str, Any], Meta(max_length=MAX_METADATA)] | None, _NO_EFFECT] = None
    store: Annotated[bool | None, _NO_EFFECT] = None
    service_tier: Annotated[str | None, _NO_EFFECT] = None
    safety_identifier: Annotated[str | None, _WHO] = None
    prompt_cache_key: Annotated[str | None, _NO_EFFECT] = None
    prompt_cache_retention: Annotated[str | None, _NO_EFFECT] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, _NO_EFFECT] = None


class ChatRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """One conversation."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[Positive | None, Meta(description="What `max_completion_tokens` is.")] = None
    max_completion_tokens: Annotated[Positive | None, Meta(description="What fits, if not given.")] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Logprobs | None, Meta(description="Only with `logprobs`.")] = None
    prediction: Prediction | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[str] | None, Meta(extra_json_schema={"enum": [["text"], None]})] = None
    tools: Annotated[list[Any] | None, Meta(extra_json_schema={"maxItems": 0})] = None
    tool_choice: Annotated[Any, Meta(extra_json_schema={"enum": ["none", "auto", None]})] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="Accepted: there are no tools.")] = None
    function_call: Annotated[Any, Meta(extra_json_schema={"enum": ["none", "auto", None]})] = None
    reasoning_effort: Annotated[Any, Meta(extra_json_schema={"enum": ["none", None]})] = None
    verbosity: Annotated[Any, Meta(extra_json_schema={"enum": ["medium", None]})] = None


class CompletionRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """One or more prompts."""

    prompt: Annotated[Any, Meta(description="Text or token ids, one or several.", extra_json_schema={EXACT: _PROMPT})]
    max_tokens: Annotated[Count | None, Meta(description="16 if not given; 0: the echo alone.")] = None
    logprobs: Annotated[Logprobs | None, Meta(description="How many alternatives a token.")] = None
    echo: Annotated[bool | None, Meta(description="The prompt comes before the answer.")] = None
    best_of: Annotated[
        Choices | None, Meta(description="Generates so many and returns the `n` most likely; not with `stream`.")
    ] = None
    suffix: Annotated[str | None, Meta(extra_json_schema={"enum": ["", None]})] = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A text (`prompt`) or a conversation (`messages`): exactly one of them."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="Only with `prompt`. What the model's tokenizer puts around a text; true.")
    ] = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="Only with `messages`. Ready for the assistant's turn; true if not given.")
    ] = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids, special ones included."""

    model: str | None = None
    tokens: list[Count]


# OpenAI's fields that this server does not serve yet: named so that the message can say so.
NOT_YET = frozenset({"audio", "functions", "moderation", "web_search_options"})
