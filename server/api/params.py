"""Checks of a request body that a type can not express. None of them needs the model."""

from __future__ import annotations

from dataclasses import dataclass

from server.api.errors import ApiError, invalid, unsupported
from server.api.schemas import MAX_CHOICES, MAX_STOP_CHARS, MAX_STOP_STRINGS, ChatRequest, Common, CompletionRequest

COMPLETION_DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one HTTP request. `max_body_bytes` holds before anything is parsed."""

    max_n: int = MAX_CHOICES
    max_choices: int = 256
    max_body_bytes: int = 16 * 2**20


def stop_strings(body: Common) -> list[str]:
    """`stop` as a list. Raises ApiError for empty or long strings and for too many."""
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
    if len(stops) > MAX_STOP_STRINGS:
        message = f"Invalid value for 'stop': {len(stops)} strings; use at most {MAX_STOP_STRINGS}."
        raise invalid(message, "stop", "invalid_value")
    if any(not stop for stop in stops):
        raise invalid("Invalid value for 'stop': stop strings must not be empty.", "stop", "invalid_value")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_CHARS:
        message = f"Invalid value for 'stop': a string of {longest} characters; use at most {MAX_STOP_CHARS}."
        raise invalid(message, "stop", "invalid_value")
    return stops


def num_choices(body: Common, limits: Limits, num_prompts: int = 1, best_of: int | None = None) -> tuple[int, int]:
    """`n` and how many are generated to choose them from.

    Raises ApiError where `best_of` does not fit `n` or a stream, or where all prompts' choices are more than the server
    allows.
    """
    n = body.n or 1
    num_generated = n if best_of is None else best_of
    if num_generated < n:
        message = f"Invalid value for 'best_of': {num_generated} is less than 'n' ({n}); use {n} or more."
        raise invalid(message, "best_of", "invalid_value")
    if num_generated > n and body.stream:
        message = "'best_of' above 'n' can not be streamed: the best are known at the end. Leave out one of the two."
        raise invalid(message, "best_of", "invalid_value")
    if num_generated > limits.max_n:
        name = "n" if n == num_generated else "best_of"
        message = f"Invalid value for {name!r}: this server allows at most {limits.max_n}, got {num_generated}."
        raise invalid(message, name, "invalid_value")
    if num_prompts * num_generated > limits.max_choices:
        name = "n" if n == num_generated else "best_of"
        message = f"{num_prompts} prompts with {name}={num_generated}; this server allows {limits.max_choices} in all."
        raise invalid(message, "prompt", "invalid_value")
    return n, num_generated


def include_usage(body: Common) -> bool:
    """Whether the stream ends with a usage chunk. Raises ApiError for stream options without a stream."""
    if body.stream_options is not None and not body.stream:
        message = "'stream_options' is only allowed when 'stream' is true."
        raise invalid(message, "stream_options", "invalid_value")
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def continuous_usage(body: Common) -> bool:
    """Whether every chunk of the stream has the usage so far."""
    return body.stream_options is not None and bool(body.stream_options.continuous_usage_stats)


def chat_max_tokens(body: ChatRequest) -> int | None:
    """Either spelling. Raises ApiError where both are given and differ."""
    both = body.max_tokens is not None and body.max_completion_tokens is not None
    if both and body.max_tokens != body.max_completion_tokens:
        message = "'max_tokens' and 'max_completion_tokens' differ; give one of them."
        raise invalid(message, "max_tokens", "invalid_value")
    return body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens


def chat_logprobs(body: ChatRequest) -> int | None:
    """The number of alternatives, None for no log-probabilities. Raises ApiError for one field without the other."""
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs", "invalid_value")
    return (body.top_logprobs or 0) if body.logprobs else None


def refuse_unsupported_chat(body: ChatRequest) -> None:
    """Fields whose empty or default value is fine and any other would change an answer that we cannot change yet."""
    if body.response_format is not None and body.response_format.type != "text":
        raise unsupported(f"response_format {body.response_format.type!r} is not supported yet.", "response_format")
    if body.response_format is not None and body.response_format.json_schema is not None:
        raise _unknown_with_text()
    if body.tools:
        raise unsupported("'tools' is not supported yet.", "tools")
    if body.modalities not in (None, ["text"]):
        raise unsupported("'modalities' other than ['text'] are not supported.", "modalities")
    for name, neutral in _NEUTRAL.items():
        if getattr(body, name) not in (None, *neutral):
            allowed = " or ".join(map(repr, neutral))
            raise unsupported(f"{name!r} other than {allowed} is not supported yet.", name)


def _unknown_with_text() -> ApiError:
    param = "response_format.json_schema"
    return invalid(f"Unknown parameter: {param!r} with type 'text'. Valid here: type.", param, "unknown_parameter")


_NEUTRAL = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}


def refuse_unsupported_completion(body: CompletionRequest) -> None:
    """The same for text completions."""
    if body.suffix:
        raise unsupported("'suffix' is not supported yet.", "suffix")


def too_many_min_tokens(min_tokens: int, max_tokens: int) -> ApiError:
    """More tokens are demanded than may be generated."""
    message = (
        f"Invalid value for 'min_tokens': {min_tokens} is more than the {max_tokens} tokens that may be generated."
    )
    return invalid(message, "min_tokens", "invalid_value")
