"""From a checked request body to what the engine takes: values that need the model's limits are checked here."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from server.api.errors import invalid, unsupported
from server.api.schemas import ChatRequest, Common, CompletionRequest
from server.core import Request, SamplingParams, SpeculationParams
from server.engine.messages import EngineInfo

MAX_STOP_STRINGS = 16
COMPLETION_DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one HTTP request. `max_body_bytes` holds before anything is parsed."""

    max_n: int = 16
    max_choices: int = 256
    max_body_bytes: int = 16 * 2**20


def context_length(info: EngineInfo) -> tuple[int, str]:
    """The most tokens one sequence may have, and what sets that bound."""
    if info.kv_cache_tokens < info.max_model_len:
        return info.kv_cache_tokens, "this server's KV cache holds"
    return info.max_model_len, "this model's maximum context length is"


def output_budget(info: EngineInfo, num_prompt: int, max_tokens: int | None, param: str) -> int:
    """How many tokens may be generated; None takes what fits. Raises ApiError with the numbers if it does not fit."""
    limit, what = context_length(info)
    wanted = 1 if max_tokens is None else max_tokens
    if num_prompt + wanted <= limit:
        return limit - num_prompt if max_tokens is None else max_tokens
    raise invalid(
        f"{what[0].upper()}{what[1:]} {limit} tokens. However, you requested {num_prompt + wanted} tokens "
        f"({num_prompt} in the {param}, {wanted} in the completion). Please reduce the length of the {param} or "
        "the completion.",
        param,
        "context_length_exceeded",
    )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises ApiError naming the first id that the model does not have."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise invalid(
                f"Invalid value for {param!r}: token id {token_id} is out of range; use 0 to {vocab_size - 1}.",
                param,
                "invalid_value",
            )


def sampling_params(body: Common, vocab_size: int, seed: int, logprobs: int | None) -> SamplingParams:
    """OpenAI's defaults where the body says nothing; `top_k` -1 and 0 both mean off."""
    top_k = body.top_k or 0
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=0 if top_k == -1 else min(top_k, vocab_size),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        seed=seed,
        logprobs=logprobs,
    )


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    parsed: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit()) or len(key) > 12:
            raise invalid(f"Invalid key {key!r} in 'logit_bias': expected a token id.", "logit_bias", "invalid_value")
        check_token_ids([int(key)], vocab_size, "logit_bias")
        parsed[int(key)] = value
    return parsed


def speculation_params(body: Common) -> SpeculationParams:
    """The body's own bound and off switch."""
    wish = body.speculative
    if wish is None:
        return SpeculationParams()
    return SpeculationParams(enabled=wish.enabled is not False, max_draft_tokens=wish.max_draft_tokens)


def stop_strings(body: Common) -> list[str]:
    """`stop` as a list. Raises ApiError for empty strings and for too many."""
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
    if len(stops) > MAX_STOP_STRINGS:
        message = f"Invalid value for 'stop': {len(stops)} strings; use at most {MAX_STOP_STRINGS}."
        raise invalid(message, "stop", "invalid_value")
    if any(not stop for stop in stops):
        raise invalid("Invalid value for 'stop': stop strings must not be empty.", "stop", "invalid_value")
    return stops


def num_choices(body: Common, limits: Limits, num_prompts: int = 1) -> int:
    """`n`. Raises ApiError where it, or all prompts' choices together, are more than the server allows."""
    n = body.n or 1
    if n > limits.max_n:
        message = f"Invalid value for 'n': this server allows at most {limits.max_n} choices, got {n}."
        raise invalid(message, "n", "invalid_value")
    if num_prompts * n > limits.max_choices:
        message = f"{num_prompts} prompts with n={n}; this server allows {limits.max_choices} completions in all."
        raise invalid(message, "prompt", "invalid_value")
    return n


def include_usage(body: Common) -> bool:
    """Whether the stream ends with a usage chunk. Raises ApiError for stream options without a stream."""
    if body.stream_options is not None and not body.stream:
        message = "'stream_options' is only allowed when 'stream' is true."
        raise invalid(message, "stream_options", "invalid_value")
    return body.stream_options is not None and bool(body.stream_options.include_usage)


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
    if body.tools:
        raise unsupported("'tools' is not supported yet.", "tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise unsupported("'tool_choice' is not supported yet.", "tool_choice")
    if body.modalities not in (None, ["text"]):
        raise unsupported("'modalities' other than ['text'] are not supported.", "modalities")


def refuse_unsupported_completion(body: CompletionRequest) -> None:
    """The same for text completions."""
    if body.echo:
        raise unsupported("'echo' is not supported yet.", "echo")
    if body.suffix:
        raise unsupported("'suffix' is not supported yet.", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise unsupported("'best_of' other than 'n' is not supported yet.", "best_of")


def random_seed() -> int:
    """63 random bits, so that an unseeded request can be replayed."""
    return secrets.randbits(63)


def engine_requests(
    request_id: str,
    body: Common,
    info: EngineInfo,
    prompts: Sequence[list[int]],
    *,
    n: int,
    max_tokens: int | None,
    logprobs: int | None,
    param: str,
) -> list[Request]:
    """`n` requests a prompt, in the order of the choices' indices.

    Prompts without a seed get one each; a given seed is every prompt's: each gets the answer it would get alone.
    """
    check_token_ids(body.stop_token_ids or [], info.vocab_size, "stop_token_ids")
    speculation = speculation_params(body)
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        budget = output_budget(info, len(prompt), max_tokens, param)
        seed = random_seed() if body.seed is None else body.seed
        sampling = sampling_params(body, info.vocab_size, seed, logprobs)
        requests += [
            Request(
                request_id=f"{request_id}-{index * n + choice}",
                prompt_ids=prompt,
                sampling=sampling,
                speculation=speculation,
                choice=choice,
                max_tokens=budget,
                stop_token_ids=list(body.stop_token_ids or []),
                ignore_eos=bool(body.ignore_eos),
            )
            for choice in range(n)
        ]
    return requests
