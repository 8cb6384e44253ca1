"""A step under way on the device, and its result once it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from server.core import TokenLogprobs
from server.engine.gpu.ops import NUM_REPORTED
from server.engine.gpu.step import TOP_LOGPROBS
from server.engine.prompt_logprobs import Scored, add_scores
from server.engine.result import StepResult
from server.engine.sequence import Sequence


class StepTimer:
    """When the device began and ended a step; on a CPU there is nothing to tell."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []

    def start(self) -> None:
        if self._events:
            self._events[0].record()

    def end(self) -> None:
        if self._events:
            self._events[1].record()

    def wait(self) -> float:
        """Waits for the end; milliseconds between the two."""
        if not self._events:
            return 0.0
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1]))


@dataclass(slots=True)
class DownloadedLogprobs:
    """Log-probabilities of R * width positions on their way to the host."""

    chosen: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def of_row(self, row: int, width: int, tokens: list[int], num_top: int) -> list[TokenLogprobs]:
        """Those of the tokens that `row` emitted."""
        first = row * width
        span = slice(first, first + len(tokens))
        chosen = self.chosen[span].tolist()
        ids = self.top_ids.view(-1, TOP_LOGPROBS)[span, :num_top].tolist()
        values = self.top_logprobs.view(-1, TOP_LOGPROBS)[span, :num_top].tolist()
        return [TokenLogprobs(*entry) for entry in zip(tokens, chosen, ids, values, strict=True)]


@dataclass(slots=True)
class PromptScores:
    """Prompt positions to score once the step is done: `logits` [T, V] are theirs."""

    scored: list[Scored]
    logits: Tensor


@dataclass(slots=True)
class Launched:
    """Implements LaunchedStep.

    `report` holds the tier's rows, the first `len(emitting)` of them real: row i of it belongs to row `emitting[i]` of
    the plan's `num_rows`. `width` is 1 + k. Where `origin_of` can read them, the report ends with the rows'
    `Drafts.origins`. `chained`: the drafter's network runs on all rows.
    """

    timer: StepTimer
    sequences: list[Sequence]
    num_tokens_run: int
    emitting: list[int]
    report: Tensor | None
    width: int
    logprobs: DownloadedLogprobs | None = None
    scores: PromptScores | None = None
    origin_of: Callable[[int], tuple[str, int]] | None = None
    chain_tokens: int = 0
    caught_up: bool = False
    chained: bool = False
    followed: bool = False

    def read(self) -> StepResult:
        """Waits for the step and unpacks what it emitted."""
        elapsed_ms = self.timer.wait()
        result = StepResult.silent(len(self.sequences), self.num_tokens_run)
        result.verify_ms, result.chain_tokens = elapsed_ms, self.chain_tokens
        result.caught_up, result.chained = self.caught_up, [self.chained] * len(self.sequences)
        result.followed = self.followed
        if self.report is not None:
            self._unpack(result, self.report)
        if self.scores is not None:
            add_scores(result, self.scores.scored, self.sequences, self.scores.logits.float())
        return result

    def _unpack(self, result: StepResult, report: Tensor) -> None:
        line = self.width + NUM_REPORTED
        if self.origin_of is not None:
            num_rows = report.shape[0] // (line + 1)
            report, origins = report.split([num_rows * line, num_rows])
            self._explain(result, origins.tolist())
        lines: list[list[int]] = report.view(-1, line).tolist()
        drafted, accepted = [0] * len(self.sequences), [0] * len(self.sequences)
        for i, row in enumerate(self.emitting):
            reported = lines[i]
            num_emitted, num_drafted, broken = reported[self.width :]
            tokens = reported[:num_emitted]
            result.emitted[row], result.broken[row] = tokens, bool(broken)
            drafted[row], accepted[row] = num_drafted, num_emitted - 1
            num_top = self.sequences[row].request.sampling.logprobs
            if self.logprobs is not None and num_top is not None:
                result.logprobs[row] = self.logprobs.of_row(i, self.width, tokens, num_top)
        result.num_drafted, result.num_accepted = drafted, accepted

    def _explain(self, result: StepResult, origins: list[int]) -> None:
        """How the drafts of each row were made."""
        assert self.origin_of is not None
        result.classes, result.num_copied = [""] * len(self.sequences), [0] * len(self.sequences)
        for i, row in enumerate(self.emitting):
            result.classes[row], result.num_copied[row] = self.origin_of(origins[i])
