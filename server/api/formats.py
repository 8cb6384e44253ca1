"""OpenAI's answer objects: chat and text completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.api.generation import Delta, Tally, TextLogprobs
from server.api.interfaces import TextLayerLike
from server.core import FinishReason

# JSON has no minus infinity; this is what OpenAI sends for it.
MIN_LOGPROB = -9999.0

Json = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """Everything one choice said, once it is whole."""

    text: str = ""
    logprobs: list[TextLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Format(Protocol):
    """How one endpoint words its answers."""

    def opening(self, index: int) -> Json | None:
        """The chunk before a choice's first, if this endpoint has one."""

    def chunk(self, delta: Delta) -> list[Json]: ...

    def usage_chunk(self, usage: Json) -> Json: ...

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json: ...


def usage_of(num_prompt: int, tallies: Sequence[Tally], num_cached: int) -> Json:
    """`num_prompt` counts each prompt once, as OpenAI does. Predictions are the server's own drafts."""
    num_completion = sum(tally.num_completion for tally in tallies)
    num_accepted = sum(tally.num_accepted for tally in tallies)
    num_drafted = sum(tally.num_drafted for tally in tallies)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": num_accepted,
            "rejected_prediction_tokens": num_drafted - num_accepted,
        },
    }


def token_string(token: bytes) -> str:
    """A token as text; bytes that are no whole characters are written `bytes:\\xNN`, as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


class ChatFormat:
    """`/v1/chat/completions`."""

    def __init__(self, head: Json, text: TextLayerLike, *, logprobs: bool, usage_in_chunks: bool) -> None:
        self._head = head
        self._text = text
        self._logprobs = logprobs
        self._tail: Json = {"usage": None} if usage_in_chunks else {}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **self._tail}

    def opening(self, index: int) -> Json:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, delta: Delta) -> list[Json]:
        """The text first, the finish reason in a chunk of its own, as OpenAI sends them."""
        chunks = []
        if delta.text or delta.logprobs:
            logprobs = self._content_logprobs(delta.logprobs)
            choice = {"index": delta.index, "delta": {"content": delta.text}, "logprobs": logprobs}
            chunks.append(self._chunk([{**choice, "finish_reason": None}]))
        if delta.finish_reason is not None:
            choice = {"index": delta.index, "delta": {}, "logprobs": None}
            chunks.append(self._chunk([{**choice, "finish_reason": delta.finish_reason.value}]))
        return chunks

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._chunk([]), "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._content_logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
        }

    def _content_logprobs(self, entries: Sequence[TextLogprobs]) -> Json | None:
        if not self._logprobs:
            return None
        content = []
        for entry in entries:
            token = entry.token
            top = zip(token.top_ids, token.top_logprobs, strict=True)
            alternatives = [self._entry(token_id, logprob) for token_id, logprob in top]
            content.append({**self._entry(token.token_id, token.logprob), "top_logprobs": alternatives})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        token = self._text.token_bytes(token_id)
        return {"token": token_string(token), "logprob": _finite(logprob), "bytes": list(token)}


class CompletionFormat:
    """`/v1/completions`."""

    def __init__(self, head: Json, text: TextLayerLike, *, logprobs: bool, usage_in_chunks: bool) -> None:
        self._head = {**head, "object": "text_completion"}
        self._text = text
        self._logprobs = logprobs
        self._tail: Json = {"usage": None} if usage_in_chunks else {}

    def opening(self, index: int) -> None:
        return None

    def chunk(self, delta: Delta) -> list[Json]:
        """Text and finish reason together, as OpenAI sends them here."""
        choice = self._choice(delta.index, delta.text, delta.logprobs, delta.finish_reason)
        return [{**self._head, "choices": [choice], **self._tail}]

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._head, "choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        worded = [self._choice(i, c.text, c.logprobs, c.finish_reason) for i, c in enumerate(choices)]
        return {**self._head, "choices": worded, "usage": usage}

    def _choice(self, index: int, text: str, entries: Sequence[TextLogprobs], finish: FinishReason | None) -> Json:
        logprobs = self._token_lists(entries) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish.value if finish else None}

    def _token_lists(self, entries: Sequence[TextLogprobs]) -> Json:
        return {
            "tokens": [self._string(entry.token.token_id) for entry in entries],
            "token_logprobs": [_finite(entry.token.logprob) for entry in entries],
            "top_logprobs": [self._alternatives(entry) for entry in entries],
            "text_offset": [entry.text_offset for entry in entries],
        }

    def _alternatives(self, entry: TextLogprobs) -> Json:
        """The chosen token is always among them, so one more than asked where it is not of the most likely."""
        token = entry.token
        pairs = zip([*token.top_ids, token.token_id], [*token.top_logprobs, token.logprob], strict=True)
        return {self._string(token_id): _finite(logprob) for token_id, logprob in pairs}

    def _string(self, token_id: int) -> str:
        return token_string(self._text.token_bytes(token_id))
