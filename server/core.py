"""The four central nouns: what a request is, how it samples, what a step runs, what it emits.

These cross the process boundary as msgpack frames (msgspec encodes dataclasses as they are), so they
hold plain Python values only and this module never imports torch. What is made for every row of every step is a
msgspec struct, read-only like the others: a frozen dataclass of nine fields takes 1.1 µs to make, a struct 0.1, and the
collector need not track it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled. Every field has the meaning of OpenAI's field of the same name.

    `temperature == 0` is greedy. `top_k == 0`, `top_p == 1`, `min_p == 0` and penalties at their neutral
    value switch the filter off. `seed` is a 64-bit integer and always set: an unseeded request is given
    one on arrival, so that it can be replayed. `logprobs` is the number of alternatives to report
    (0: the chosen token only; None: nothing).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """A request's own wish: `max_draft_tokens` bounds the server's choice, `enabled=False` turns drafting off."""

    enabled: bool = True
    max_draft_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. A client's `n` choices are `n` requests that differ in `choice`.

    Until `min_tokens` tokens are out neither end-of-sequence nor a stop token is sampled. `prompt_logprobs` asks for
    the log-probabilities of the prompt's own tokens, with that many alternatives. `prediction_ids` is what the client
    expects the answer to be: draft tokens to start from, never more. Waiting requests of one `tenant` are served in
    order, tenants in turn, and the lowest `priority` first. A `background` request is nobody's: it runs only while no
    other one does or waits.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    choice: int = 0
    max_tokens: int = 16
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    prediction_ids: list[int] = field(default_factory=list)
    tenant: str = ""
    priority: int = 0
    background: bool = False


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Phase(StrEnum):
    """A step is one of the two, never a mixture: a prompt chunk can not be taken for a verify batch."""

    PREFILL = "prefill"
    VERIFY = "verify"


class RowPlan(msgspec.Struct, frozen=True, gc=False):
    """One sequence's share of a step: tokens `start .. start + num_tokens` of it pass through the target.

    In a verify step `num_tokens` is 1 (the last committed token) and up to `max_drafts` draft tokens follow
    it. In a prefill step `samples` says whether this chunk ends the prompt and so emits a token. `start` is what the
    host knows: while an earlier step is under way, a verify row really starts up to that step's emitted tokens later.
    """

    slot: int
    start: int
    num_tokens: int
    samples: bool
    max_drafts: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler wants the runner to do next.

    `follows`: the drafter sees this step, drafts or not: prompt chunks, and features of the tokens that were verified.
    False while drafting is paused: nothing of the drafter runs.
    """

    phase: Phase
    rows: list[RowPlan]
    num_draft_tokens: int = 0
    follows: bool = True


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Raw log-probabilities (natural log, before penalties and temperature) at one emitted position."""

    token_id: int
    logprob: float
    top_ids: list[int] = msgspec.field(default_factory=list)
    top_logprobs: list[float] = msgspec.field(default_factory=list)


class StepOutput(msgspec.Struct, frozen=True, gc=False):
    """What one step did for one request: the tokens it emitted, in order.

    `num_drafted` and `num_accepted` count draft tokens only, never the bonus token. `num_cached` is the
    number of prompt tokens served by the prefix cache, set on the first output only, as is `prompt_logprobs`: one
    entry for each prompt token from the second on. A request that ends in FinishReason.ERROR carries the reason in
    `error`.
    """

    request_id: str
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    num_cached: int | None = None
    error: str | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
