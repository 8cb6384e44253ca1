"""One choice's engine steps as deltas of text.

Tokens are taken one by one however many a step emits, so that a stop string is found at the token that completes it.
What may still turn into a stop string is held back, and so are its log-probabilities.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from server.api.errors import engine_failed, engine_unavailable
from server.api.interfaces import TextLayerLike
from server.core import FinishReason, Request, StepOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextLogprobs:
    """A token of the returned text; `text_offset` is where it starts there, in characters."""

    token: TokenLogprobs
    text_offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The text that one token brought, and whether the token was an accepted draft."""

    text: str
    accepted: bool


@dataclass(slots=True)
class Delta:
    """What one step adds to choice `index`: possibly no text at all, while text is held back.

    `token_ids` are the step's tokens that count, the end-of-sequence token included. `pieces` is filled on request and
    covers exactly `text`. `prompt_logprobs` comes with the first delta, on request.
    """

    index: int
    text: str
    logprobs: list[TextLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    token_ids: Sequence[int] = ()
    pieces: list[Piece] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True)
class Tally:
    """What one choice used. `num_accepted` and `num_drafted` count draft tokens, never the bonus token.

    `steps` are (drafted, accepted) of every verify step, kept on request only.
    """

    num_completion: int = 0
    num_cached: int = 0
    num_accepted: int = 0
    num_drafted: int = 0
    steps: list[tuple[int, int]] | None = None


class ChoiceText:
    """Turns one choice's steps into deltas. With `annotate` they say which text was drafted.

    Until `request.min_tokens` tokens are out, stop strings are not looked for. With `discard` the answer is empty: the
    client asked for no tokens, and the engine can not do with less than one.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        text: TextLayerLike,
        stop: Sequence[str],
        *,
        skip_special_tokens: bool = True,
        annotate: bool = False,
        keep_steps: bool = False,
        discard: bool = False,
        keep_text: bool = False,
    ) -> None:
        self._index = index
        self._end_ids = _end_ids(request, text.eos_token_ids)
        self._detokenizer = text.detokenizer(skip_special_tokens=skip_special_tokens)
        self._matcher = text.stop_matcher(stop) if stop else None
        self._num_unstoppable = request.min_tokens
        self._pending: deque[TextLogprobs] = deque()
        self._num_decoded = 0
        self._num_released = 0
        self._annotations: deque[Piece] | None = deque() if annotate else None
        self._discard = discard
        self.kept: list[str] | None = [] if keep_text else None
        """The text so far in pieces, where somebody wants it."""
        self.tally = Tally(steps=[] if keep_steps else None)

    def step(self, output: StepOutput) -> Delta:
        """Raises ApiError if the engine gave the request up."""
        if output.finish_reason is not None:
            _raise_if_failed(output)
        if output.num_cached is not None:
            self.tally.num_cached = output.num_cached
        if self._discard:
            return Delta(self._index, "", finish_reason=FinishReason.LENGTH, prompt_logprobs=output.prompt_logprobs)
        num_tokens = len(output.token_ids)
        finish = output.finish_reason
        ends_with_stop = finish is FinishReason.STOP and output.token_ids[-1:] != []
        num_text = num_tokens - (1 if ends_with_stop and output.token_ids[-1] in self._end_ids else 0)
        if self._matcher is None and output.logprobs is None and self._annotations is None:
            text, stopped, num_taken = "".join(self._detokenizer.feed(output.token_ids[:num_text])), False, num_text
        else:
            text, stopped, num_taken = self._take(output, num_text)
        if stopped:
            num_tokens, finish = num_taken, FinishReason.STOP
        self._count(output, num_tokens)
        if finish is not None and not stopped:
            tail, stopped = self._finish()
            text += tail
            finish = FinishReason.STOP if stopped else finish
        self._num_released += len(text)
        if self.kept is not None:
            self.kept.append(text)
        return Delta(
            self._index,
            text,
            self._release(final=finish is not None and not stopped) if self._pending else [],
            finish,
            output.token_ids[:num_tokens],
            None if self._annotations is None else self._annotated(len(text)),
            output.prompt_logprobs,
        )

    def _take(self, output: StepOutput, num_text: int) -> tuple[str, bool, int]:
        parts: list[str] = []
        for position in range(num_text):
            if output.logprobs is not None:
                self._pending.append(TextLogprobs(output.logprobs[position], self._num_decoded))
            piece = self._detokenizer.feed(output.token_ids[position : position + 1])[0]
            if self._annotations is not None and piece:
                self._annotations.append(Piece(piece, position < output.num_accepted))
            stoppable = self.tally.num_completion + position + 1 > self._num_unstoppable
            text, stopped = self._match(piece, stoppable)
            parts.append(text)
            if stopped:
                return "".join(parts), True, position + 1
        return "".join(parts), False, num_text

    def _match(self, text: str, stoppable: bool = True) -> tuple[str, bool]:
        self._num_decoded += len(text)
        if self._matcher is None or not text or not stoppable:
            return text, False
        return self._matcher.feed(text), self._matcher.matched is not None

    def _finish(self) -> tuple[str, bool]:
        """What was held back: the detokenizer's last bytes may still complete a stop string."""
        tail = self._detokenizer.flush()
        if self._annotations is not None and tail:
            self._annotations.append(Piece(tail, False))
        text, stopped = self._match(tail)
        if not stopped and self._matcher is not None:
            text += self._matcher.flush()
            stopped = self._matcher.matched is not None
        return text, stopped

    def _release(self, final: bool) -> list[TextLogprobs]:
        released = []
        while self._pending and (final or self._pending[0].text_offset < self._num_released):
            released.append(self._pending.popleft())
        return released

    def _annotated(self, num_chars: int) -> list[Piece]:
        """Takes pieces that make up the next `num_chars` characters; one that is cut stays with its rest."""
        assert self._annotations is not None
        taken: list[Piece] = []
        while num_chars > 0:
            piece = self._annotations.popleft()
            if len(piece.text) > num_chars:
                self._annotations.appendleft(Piece(piece.text[num_chars:], piece.accepted))
                piece = Piece(piece.text[:num_chars], piece.accepted)
            num_chars -= len(piece.text)
            taken.append(piece)
        return taken

    def _count(self, output: StepOutput, num_taken: int) -> None:
        tally = self.tally
        is_verify_step = tally.num_completion > 0  # the first token comes from the prompt's own step
        tally.num_completion += num_taken
        accepted = min(output.num_accepted, num_taken)
        tally.num_drafted += output.num_drafted
        tally.num_accepted += accepted
        if tally.steps is not None and is_verify_step:
            tally.steps.append((output.num_drafted, accepted))


def _end_ids(request: Request, eos_token_ids: Collection[int]) -> frozenset[int]:
    """Tokens that end the text and are no part of it."""
    return frozenset(request.stop_token_ids) | frozenset(() if request.ignore_eos else eos_token_ids)


def _raise_if_failed(output: StepOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise engine_failed(output.error)
    if output.finish_reason is FinishReason.ABORT:
        raise engine_unavailable(output.error or "The engine gave this request up because it is shutting down.")
