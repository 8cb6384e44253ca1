"""From a checked request body to what the engine takes: values that need the model's limits are checked here."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.api import params
from server.api.errors import invalid
from server.api.options import Options
from server.api.schemas import Common
from server.core import Request, SamplingParams
from server.engine.limits import MAX_BIASES
from server.engine.messages import EngineInfo

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,11}")


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
    """OpenAI's defaults where the body says nothing; `top_k` -1 and 0 both mean off; `top_p` 0 is `top_k` 1."""
    top_k = 1 if body.top_p == 0 else body.top_k or 0
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=0 if top_k == -1 else min(top_k, vocab_size),
        top_p=body.top_p or 1.0,
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
    if len(bias) > MAX_BIASES:
        message = f"'logit_bias' has {len(bias)} tokens; at most {MAX_BIASES} are allowed."
        raise invalid(message, "logit_bias", "invalid_value")
    for key, value in bias.items():
        if not _TOKEN_ID.fullmatch(key):  # "07" is refused as well: it could be there beside "7"
            raise invalid(f"Invalid key {key!r} in 'logit_bias': expected a token id.", "logit_bias", "invalid_value")
        check_token_ids([int(key)], vocab_size, "logit_bias")
        parsed[int(key)] = value
    return parsed


def random_seed() -> int:
    """63 random bits, so that an unseeded request can be replayed."""
    return secrets.randbits(63)


def engine_requests(
    request_id: str,
    body: Common,
    options: Options,
    info: EngineInfo,
    prompts: Sequence[list[int]],
    *,
    param: str,
    prediction_ids: Sequence[int] = (),
    tenant: str = "",
    priority: int = 0,
) -> list[Request]:
    """`options.best_of` requests a prompt, in the order of the choices' indices.

    Prompts without a seed get one each; a given seed is every prompt's: each gets the answer it would get alone.
    `priority` is what the caller may have. Raises ApiError 400 where a prompt and its answer do not fit.
    """
    check_token_ids(body.stop_token_ids or [], info.vocab_size, "stop_token_ids")
    wanted = 1 if options.discard else options.max_tokens
    # A whole answer takes the prompt's log-probabilities from the first choice; in a stream none waits for another.
    again: dict[str, Any] = {} if options.stream else {"prompt_logprobs": None}
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        budget = output_budget(info, len(prompt), wanted, param)
        if options.min_tokens > budget:
            raise params.too_many_min_tokens(options.min_tokens, budget)
        seed = random_seed() if body.seed is None else body.seed
        first = Request(
            request_id=f"{request_id}-{index * options.best_of}",
            prompt_ids=prompt,
            sampling=sampling_params(body, info.vocab_size, seed, options.engine_logprobs),
            speculation=options.speculation,
            max_tokens=budget,
            stop_token_ids=list(body.stop_token_ids or []),
            ignore_eos=bool(body.ignore_eos),
            min_tokens=options.min_tokens,
            prompt_logprobs=options.logprobs if options.echo else None,
            prediction_ids=list(prediction_ids),
            tenant=tenant,
            priority=priority,
        )
        requests.append(first)
        requests += [
            replace(first, request_id=f"{request_id}-{index * options.best_of + choice}", choice=choice, **again)
            for choice in range(1, options.best_of)
        ]
    return requests
