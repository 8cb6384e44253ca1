"""What a step emitted, brought to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from server.core import TokenLogprobs
from server.engine.sequence import Sequence
from server.sampling.logprobs import Logprobs
from server.spec.types import Drafts, Verdict


@dataclass(slots=True)
class StepResult:
    """What a step emitted, on the host, row by row. Rows of a prompt chunk that is not the last emit nothing.

    `num_tokens_run` counts the tokens that went through the target; `verify_ms` is what the step took, a host-side
    drafter's time apart, which is `draft_ms`. `caught_up`: the drafter computed tokens in it that a pause had hidden
    from it, so it took longer than such a step does. `followed`: a step without drafts that the drafter was shown, so
    it took longer too. `chained` marks rows that the drafter's own network ran on: it has keys and values of the prompt
    chunk, or of all that was known before the verify step (None: of no row).
    `broken` marks rows whose logits are not finite: nothing they emitted means anything. `prompt_logprobs` are of the
    next prompt tokens that were to be scored, row by row (None: no row has any). `num_copied` are a hybrid drafter's
    drafts that were copied, each row's first ones (None: all of a row's drafts are of its class); `chain_tokens` is the
    length of the chain that its learned part ran within `verify_ms`.
    """

    emitted: list[list[int]]
    num_drafted: list[int]
    num_accepted: list[int]
    classes: list[str] | None
    logprobs: list[list[TokenLogprobs] | None]
    broken: list[bool]
    num_tokens_run: int
    verify_ms: float = 0.0
    draft_ms: float = 0.0
    caught_up: bool = False
    followed: bool = False
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    num_copied: list[int] | None = None
    chain_tokens: int = 0
    chained: list[bool] | None = None

    @staticmethod
    def silent(num_rows: int, num_tokens_run: int) -> StepResult:
        zeros = [0] * num_rows
        return StepResult(
            [[] for _ in zeros], zeros, zeros, None, [None] * num_rows, [False] * num_rows, num_tokens_run
        )


class LaunchedStep(Protocol):
    """A step that runs, or has run."""

    @property
    def chained(self) -> bool:
        """Whether, while it still runs, the drafter's network runs on all its rows."""

    def read(self) -> StepResult:
        """Waits until it is done."""


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A step that has run."""

    result: StepResult
    chained = False

    def read(self) -> StepResult:
        """At once."""
        return self.result


def to_host(
    verdict: Verdict,
    drafts: Drafts,
    logprobs: Logprobs | None,
    broken: Tensor,
    sequences: list[Sequence],
    num_tokens: int,
) -> StepResult:
    """The one place where a step's result is waited for."""
    counts = verdict.num_emitted.tolist()
    tokens = verdict.tokens.tolist()
    drafted = drafts.num_valid_host if drafts.num_valid_host is not None else drafts.num_valid.tolist()
    return StepResult(
        emitted=[row[:n] for row, n in zip(tokens, counts, strict=True)],
        num_drafted=list(drafted),
        num_accepted=[n - 1 for n in counts],
        classes=drafts.classes,
        logprobs=_logprobs_to_host(logprobs, tokens, counts, sequences),
        broken=broken.tolist(),
        num_tokens_run=num_tokens,
        chained=drafts.chained if drafts.chained is not None else [n > 0 for n in drafted],
    )


def _logprobs_to_host(
    logprobs: Logprobs | None, tokens: list[list[int]], counts: list[int], sequences: list[Sequence]
) -> list[list[TokenLogprobs] | None]:
    if logprobs is None:
        return [None] * len(tokens)
    chosen, ids, values = logprobs.chosen.tolist(), logprobs.top_ids.tolist(), logprobs.top_logprobs.tolist()
    found: list[list[TokenLogprobs] | None] = []
    for r, seq in enumerate(sequences):
        n = seq.request.sampling.logprobs
        found.append(
            None
            if n is None
            else [TokenLogprobs(tokens[r][j], chosen[r][j], ids[r][j][:n], values[r][j][:n]) for j in range(counts[r])]
        )
    return found
