from __future__ import annotations

import pytest

from server.api.access.keys import ApiKey
from server.api.access.ledger import Ledger
from server.api.access.limits import HEADERS, RateLimiter, duration
from server.api.errors import ApiError
from tests.api.access.test_ledger import Clock

KEY = ApiKey("alice", "", row=1, requests_per_minute=2, tokens_per_minute=100)
FREE = ApiKey("bob", "", row=2)


@pytest.fixture
def clock() -> Clock:
    return Clock(1000)


@pytest.fixture
def limiter(clock: Clock) -> RateLimiter:
    return RateLimiter(Ledger(clock=clock))


def test_requests_of_a_minute(limiter: RateLimiter, clock: Clock) -> None:
    limiter.admit(KEY)
    clock.now = 1010.2
    limiter.admit(KEY)
    clock.now = 1030.5
    for _ in range(3):  # refusals do not count
        with pytest.raises(ApiError):
            limiter.admit(KEY)
    with pytest.raises(ApiError) as caught:
        limiter.admit(KEY)
    error = caught.value
    assert (error.status, error.type, error.code, error.param) == (429, "requests", "rate_limit_exceeded", None)
    assert error.headers == {"Retry-After": "30"}
    assert error.message == (
        "Rate limit reached for key 'alice' on requests per min (RPM): Limit 2, Used 2, Requested 1. "
        "Please try again in 30s."
    )
    clock.now += 30
    limiter.admit(KEY)
    with pytest.raises(ApiError):
        limiter.admit(KEY)


def test_tokens_of_a_minute(limiter: RateLimiter, clock: Clock) -> None:
    limiter.admit(KEY)
    limiter.reserve(KEY, 60)
    with pytest.raises(ApiError) as caught:
        limiter.reserve(KEY, 41)
    assert (caught.value.type, caught.value.code) == ("tokens", "rate_limit_exceeded")
    assert (
        "on tokens per min (TPM): Limit 100, Used 60, Requested 41. Please try again in 1m0s." in caught.value.message
    )
    assert caught.value.headers == {"Retry-After": "60"}
    clock.now += 10
    limiter.reserve(KEY, 40)
    with pytest.raises(ApiError) as caught:
        limiter.admit(KEY)
    assert (caught.value.type, caught.value.headers) == ("tokens", {"Retry-After": "50"})
    clock.now += 50
    limiter.admit(KEY)


def test_what_was_running_may_pass_the_limit_and_the_next_waits(limiter: RateLimiter, clock: Clock) -> None:
    limiter.admit(KEY)
    limiter.reserve(KEY, 1)
    limiter.charge(KEY, 500)
    assert limiter.ledger.used(KEY.row) == (1, 501)
    with pytest.raises(ApiError, match="Used 501"):
        limiter.admit(KEY)
    clock.now += 60
    limiter.admit(KEY)


def test_a_prompt_beyond_the_limit_can_never_pass(limiter: RateLimiter) -> None:
    with pytest.raises(ApiError) as caught:
        limiter.reserve(KEY, 101)
    assert (caught.value.status, caught.value.type, caught.value.code) == (429, "tokens", "rate_limit_exceeded")
    assert "Limit 100, Requested 101. It can never pass" in caught.value.message
    assert caught.value.headers == {"x-should-retry": "false"}
    assert limiter.ledger.used(KEY.row) == (0, 0)
    limiter.reserve(KEY, 100)


@pytest.mark.parametrize("key", [None, FREE])
def test_without_limits_everything_passes(limiter: RateLimiter, key: ApiKey | None) -> None:
    for _ in range(100):
        limiter.admit(key)
        limiter.reserve(key, 10**6)
        limiter.charge(key, 10**6)
    assert limiter.headers(key) == {}
    assert limiter.ledger.used(FREE.row) == ((100, 200 * 10**6) if key else (0, 0))


def test_headers_tell_what_is_left(limiter: RateLimiter, clock: Clock) -> None:
    assert limiter.headers(KEY) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "0s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "0s",
    }
    assert set(limiter.headers(KEY)) == set(HEADERS)
    limiter.admit(KEY)
    clock.now += 20.5
    limiter.charge(KEY, 150)
    headers = limiter.headers(KEY)
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert headers["x-ratelimit-reset-requests"] == "40s"
    assert headers["x-ratelimit-reset-tokens"] == "1m0s"
    only_requests = ApiKey("alice", "", row=1, requests_per_minute=2)
    assert {name.rsplit("-", 1)[1] for name in limiter.headers(only_requests)} == {"requests"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.01, "1s"), (1, "1s"), (59.5, "1m0s"), (60, "1m0s"), (360, "6m0s"), (61, "1m1s")]
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
