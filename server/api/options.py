"""What a request asks for beyond its sampling, from body and headers. The body wins over a header, field by field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from server.api import params
from server.api.errors import bad_header
from server.api.params import Limits
from server.api.schemas import MAX_TIMEOUT_S, ChatRequest, Common, CompletionRequest
from server.core import SpeculationParams

TIMEOUT_HEADER = "X-Request-Timeout"
SPECULATION_HEADER = "X-Speculation"

_SECONDS = re.compile(r"[0-9]{1,10}(\.[0-9]{1,9})?")
_COUNT = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds where the request says nothing: the server's settings, and its key's for `speculation`."""

    timeout_s: float | None = None
    spec_metrics: str = "none"
    speculation: bool = True


@dataclass(frozen=True, slots=True)
class Options:
    """One request's options, checked. `best_of` choices a prompt are generated, the best `n` of them returned.

    `logprobs` is the number of alternatives that the client wants (None: no log-probabilities), `max_tokens` None
    whatever fits and 0 nothing: the prompt is echoed alone. `timeout_s` counts from the arrival. `priority` None is the
    caller's default.
    """

    n: int
    best_of: int
    max_tokens: int | None
    min_tokens: int
    logprobs: int | None
    stop: list[str]
    echo: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    skip_special_tokens: bool
    speculation: SpeculationParams
    spec_metrics: str
    annotate: bool
    timeout_s: float | None
    priority: int | None

    @property
    def discard(self) -> bool:
        """Whether what the engine generates is dropped: it can not generate nothing."""
        return self.max_tokens == 0

    @property
    def engine_logprobs(self) -> int | None:
        """What the engine is asked for: choices are compared by their log-probabilities."""
        return 0 if self.logprobs is None and self.best_of > self.n else self.logprobs


def chat_options(body: ChatRequest, headers: Mapping[str, str], defaults: Defaults, limits: Limits) -> Options:
    """Raises ApiError 400 for what is wrong, or not served yet, in body or headers."""
    params.refuse_unsupported_chat(body)
    n, best_of = params.num_choices(body, limits)
    max_tokens, logprobs = params.chat_max_tokens(body), params.chat_logprobs(body)
    return _options(body, headers, defaults, (n, best_of, max_tokens, logprobs, False))


def completion_options(
    body: CompletionRequest, headers: Mapping[str, str], defaults: Defaults, limits: Limits, num_prompts: int
) -> Options:
    """The same for text completions."""
    params.refuse_unsupported_completion(body)
    n, best_of = params.num_choices(body, limits, num_prompts, body.best_of)
    max_tokens = params.COMPLETION_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return _options(body, headers, defaults, (n, best_of, max_tokens, body.logprobs, bool(body.echo)))


def _options(
    body: Common, headers: Mapping[str, str], defaults: Defaults, own: tuple[int, int, int | None, int | None, bool]
) -> Options:
    n, best_of, max_tokens, logprobs, echo = own
    wish = body.speculative
    return Options(
        n=n,
        best_of=best_of,
        max_tokens=max_tokens,
        min_tokens=_min_tokens(body, max_tokens),
        logprobs=logprobs,
        stop=params.stop_strings(body),
        echo=echo,
        stream=bool(body.stream),
        include_usage=params.include_usage(body),
        continuous_usage=params.continuous_usage(body),
        return_token_ids=bool(body.return_token_ids),
        skip_special_tokens=body.skip_special_tokens is not False,
        speculation=speculation_params(body, headers, defaults.speculation),
        spec_metrics=defaults.spec_metrics if wish is None or wish.metrics is None else wish.metrics,
        annotate=wish is not None and bool(wish.annotate),
        timeout_s=timeout_s(body, headers, defaults.timeout_s),
        priority=body.priority,
    )


def _min_tokens(body: Common, max_tokens: int | None) -> int:
    if body.min_tokens is None:
        return 0
    if max_tokens is not None and body.min_tokens > max_tokens:
        raise params.too_many_min_tokens(body.min_tokens, max_tokens)
    return body.min_tokens


def timeout_s(body: Common, headers: Mapping[str, str], default: float | None = None) -> float | None:
    """The request's deadline in seconds from its arrival. Raises ApiError 400 for a header that is no such number."""
    value = headers.get(TIMEOUT_HEADER)
    if value is not None:
        seconds = float(value) if _SECONDS.fullmatch(value.strip()) else 0.0
        if not 0 < seconds <= MAX_TIMEOUT_S:
            raise bad_header(TIMEOUT_HEADER, value, "a number of seconds above 0, such as 2.5")
        default = seconds
    return default if body.timeout is None else body.timeout


def speculation_params(body: Common, headers: Mapping[str, str], default_enabled: bool = True) -> SpeculationParams:
    """Body, then the header `X-Speculation: off|on|N`, then the default. Raises ApiError 400 for a wrong header."""
    enabled, most = default_enabled, None
    value = headers.get(SPECULATION_HEADER)
    if value is not None:
        word = value.strip().lower()
        if word not in ("on", "off") and not _COUNT.fullmatch(word):
            raise bad_header(SPECULATION_HEADER, value, "on, off or the most draft tokens a step")
        enabled = word != "off"
        most = int(word) if enabled and word != "on" else None
    wish = body.speculative
    if wish is not None:
        enabled = enabled if wish.enabled is None else wish.enabled
        most = most if wish.max_draft_tokens is None else wish.max_draft_tokens
    return SpeculationParams(enabled=enabled, max_draft_tokens=most)
