"""Limits a key has a minute, as OpenAI's: refusals that say limit, use and when to come back, and x-ratelimit headers.

The window slides: what counts is the last 60 seconds, by whole seconds. Requests count when they are admitted, prompt
tokens when they are known, completion tokens when they are generated; so tokens may pass the limit by what was already
running, and the next request waits for it. Workers decide on their own: two that decide in the same microsecond may
both take the last place.
"""

from __future__ import annotations

import math
import time

from server.api.access.keys import ApiKey
from server.api.access.ledger import Clock, Ledger
from server.api.errors import ApiError

REQUESTS, TOKENS = "requests", "tokens"
HEADERS = tuple(f"x-ratelimit-{kind}-{what}" for kind in ("limit", "remaining", "reset") for what in (REQUESTS, TOKENS))


class RateLimiter:
    """Admits, books and tells. A key of None (nobody needs one) and a key without limits pass everything."""

    def __init__(self, ledger: Ledger | None = None, clock: Clock = time.monotonic) -> None:
        self.ledger = Ledger(clock=clock) if ledger is None else ledger

    def admit(self, key: ApiKey | None) -> None:
        """Counts one request. Raises ApiError 429 where the key's requests or tokens of the minute are used up.

        A request that is refused here does not count: a client that retries too early does not wait longer for it.
        """
        if key is None:
            return
        if key.limited:
            used_requests, used_tokens = self.ledger.used(key.row)
            limit = key.requests_per_minute
            if limit is not None and used_requests >= limit:
                wait = self.ledger.retry_after_s(key.row, num_requests=used_requests - limit + 1)
                raise _exceeded(key, REQUESTS, limit, used_requests, 1, wait)
            limit = key.tokens_per_minute
            if limit is not None and used_tokens >= limit:
                wait = self.ledger.retry_after_s(key.row, num_tokens=used_tokens - limit + 1)
                raise _exceeded(key, TOKENS, limit, used_tokens, 1, wait)
        self.ledger.add(key.row, 1, 0)

    def reserve(self, key: ApiKey | None, num_prompt_tokens: int) -> None:
        """Books the prompt. Raises ApiError 429 where it does not fit the minute, or never can."""
        if key is None:
            return
        limit = key.tokens_per_minute
        if limit is not None:
            if num_prompt_tokens > limit:
                raise _never(key, limit, num_prompt_tokens)
            used = self.ledger.used(key.row)[1]
            if used + num_prompt_tokens > limit:
                wait = self.ledger.retry_after_s(key.row, num_tokens=used + num_prompt_tokens - limit)
                raise _exceeded(key, TOKENS, limit, used, num_prompt_tokens, wait)
        self.ledger.add(key.row, 0, num_prompt_tokens)

    def charge(self, key: ApiKey | None, num_completion_tokens: int) -> None:
        """Books what was generated, however the request ended."""
        if key is not None and num_completion_tokens:
            self.ledger.add(key.row, 0, num_completion_tokens)

    def headers(self, key: ApiKey | None) -> dict[str, str]:
        """OpenAI's x-ratelimit headers of the limits that the key has."""
        if key is None or not key.limited:
            return {}
        usage = self.ledger.usage(key.row)
        headers: dict[str, str] = {}
        for what, limit, used, empty_in_s in (
            (REQUESTS, key.requests_per_minute, usage.requests, usage.requests_empty_in_s),
            (TOKENS, key.tokens_per_minute, usage.tokens, usage.tokens_empty_in_s),
        ):
            if limit is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(limit)
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{what}"] = duration(empty_in_s)
        return headers


def duration(seconds: float) -> str:
    """As OpenAI's headers have it: `0s`, `1s`, `6m0s`; rounded up to whole seconds."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _exceeded(key: ApiKey, what: str, limit: int, used: int, requested: int, wait_s: float) -> ApiError:
    wait = max(1, math.ceil(wait_s))
    per_minute = "requests per min (RPM)" if what == REQUESTS else "tokens per min (TPM)"
    message = (
        f"Rate limit reached for key {key.name!r} on {per_minute}: Limit {limit}, Used {used}, Requested {requested}. "
        f"Please try again in {duration(wait)}."
    )
    return ApiError(429, message, type=what, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})


def _never(key: ApiKey, limit: int, requested: int) -> ApiError:
    message = (
        f"Request too large for key {key.name!r} on tokens per min (TPM): Limit {limit}, Requested {requested}. "
        "It can never pass; the prompt must be reduced."
    )
    # OpenAI's SDKs retry a 429 on their own; this header of theirs tells them that it would be in vain.
    return ApiError(429, message, type=TOKENS, code="rate_limit_exceeded", headers={"x-should-retry": "false"})
