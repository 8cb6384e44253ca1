"""OpenAI's answer objects: chat and text completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.api.choice_text import Delta, Piece, Tally, TextLogprobs
from server.api.echo import Echo
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
    token_ids: list[int] = field(default_factory=list)
    pieces: list[Piece] | None = None

    def take(self, delta: Delta) -> None:
        """Adds one delta, but for its text: joining that is left to the end."""
        self.logprobs.extend(delta.logprobs)
        self.token_ids.extend(delta.token_ids)
        self.finish_reason = delta.finish_reason
        if delta.pieces is not None:
            self.pieces = (self.pieces or []) + delta.pieces


@dataclass(frozen=True, slots=True)
class Wording:
    """What answers hold beside the text. `prompt_ids` are the prompts' tokens, choice `i` belongs to prompt `i // n`.

    `echoes` has one entry a prompt where the prompts are repeated before the answers.
    """

    logprobs: bool = False
    usage_in_chunks: bool = False
    token_ids: bool = False
    n: int = 1
    prompt_ids: Sequence[Sequence[int]] = ()
    echoes: Sequence[Echo] = ()


class Format(Protocol):
    """How one endpoint words its answers."""

    wording: Wording

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

    def __init__(self, head: Json, text: TextLayerLike, wording: Wording) -> None:
        self.wording = wording
        self._head = head
        self._text = text
        self._tail: Json = {"usage": None} if wording.usage_in_chunks else {}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **self._tail}

    def opening(self, index: int) -> Json:
        delta = {"role": "assistant", "content": "", "refusal": None}
        chunk = self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        if self.wording.token_ids and index == 0:
            chunk["prompt_token_ids"] = self.wording.prompt_ids[0]
        return chunk

    def chunk(self, delta: Delta) -> list[Json]:
        """The text first, the finish reason in a chunk of its own, as OpenAI sends them."""
        chunks = []
        if delta.text or delta.logprobs or (self.wording.token_ids and delta.token_ids):
            choice: Json = {"index": delta.index, "delta": {"content": delta.text}}
            choice["logprobs"] = self._content_logprobs(delta.logprobs)
            chunks.append(self._chunk([{**choice, "finish_reason": None, **self._extras(delta)}]))
        if delta.finish_reason is not None:
            choice = {"index": delta.index, "delta": {}, "logprobs": None}
            chunks.append(self._chunk([{**choice, "finish_reason": delta.finish_reason.value}]))
        return chunks

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._chunk([]), "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        body = {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._content_logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
                    **self._extras(choice),
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
        }
        if self.wording.token_ids:
            body["prompt_token_ids"] = self.wording.prompt_ids[0]
        return body

    def _extras(self, said: Delta | Choice) -> Json:
        return _extras(said, self.wording)

    def _content_logprobs(self, entries: Sequence[TextLogprobs]) -> Json | None:
        if not self.wording.logprobs:
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
    """`/v1/completions`. With echoes a choice's first delta is preceded by its prompt."""

    def __init__(self, head: Json, text: TextLayerLike, wording: Wording) -> None:
        self.wording = wording
        self._head = {**head, "object": "text_completion"}
        self._text = text
        self._tail: Json = {"usage": None} if wording.usage_in_chunks else {}
        self._begun: set[int] = set()

    def opening(self, index: int) -> None:
        return None

    def chunk(self, delta: Delta) -> list[Json]:
        """Text and finish reason together, as OpenAI sends them here."""
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        choice = self._choice(delta.index, delta, with_prompt=is_first)
        return [{**self._head, "choices": [choice], **self._tail}]

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._head, "choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        worded = [self._choice(index, choice, with_prompt=True) for index, choice in enumerate(choices)]
        return {**self._head, "choices": worded, "usage": usage}

    def _choice(self, index: int, said: Delta | Choice, *, with_prompt: bool) -> Json:
        wording = self.wording
        echo = wording.echoes[index // wording.n] if wording.echoes else None
        text = echo.text + said.text if echo is not None and with_prompt else said.text
        choice: Json = {"index": index, "text": text}
        choice["logprobs"] = self._token_lists(said.logprobs, echo, with_prompt) if wording.logprobs else None
        choice["finish_reason"] = said.finish_reason.value if said.finish_reason else None
        choice |= _extras(said, wording)
        if wording.token_ids and with_prompt:
            choice["prompt_token_ids"] = wording.prompt_ids[index // wording.n]
        return choice

    def _token_lists(self, entries: Sequence[TextLogprobs], echo: Echo | None, with_prompt: bool) -> Json:
        shift = 0 if echo is None else len(echo.text)
        lists: Json = {
            "tokens": [self._string(entry.token.token_id) for entry in entries],
            "token_logprobs": [_finite(entry.token.logprob) for entry in entries],
            "top_logprobs": [self._alternatives(entry) for entry in entries],
            "text_offset": [entry.text_offset + shift for entry in entries],
        }
        if echo is None or not with_prompt:
            return lists
        of_prompt = self._token_lists(echo.scored, None, with_prompt=False)
        of_prompt["tokens"].insert(0, self._string(echo.first_id))
        for name in ("token_logprobs", "top_logprobs"):  # nothing comes before the first token
            of_prompt[name].insert(0, None)
        of_prompt["text_offset"].insert(0, 0)
        return {name: of_prompt[name] + values for name, values in lists.items()}

    def _alternatives(self, entry: TextLogprobs) -> Json:
        """The chosen token is always among them, so one more than asked where it is not of the most likely."""
        token = entry.token
        pairs = zip([*token.top_ids, token.token_id], [*token.top_logprobs, token.logprob], strict=True)
        return {self._string(token_id): _finite(logprob) for token_id, logprob in pairs}

    def _string(self, token_id: int) -> str:
        return token_string(self._text.token_bytes(token_id))


def _extras(said: Delta | Choice, wording: Wording) -> Json:
    """What only those find who asked for it."""
    extras: Json = {}
    if wording.token_ids:
        extras["token_ids"] = said.token_ids
    if said.pieces is not None:
        extras["draft_annotations"] = [{"text": piece.text, "accepted": piece.accepted} for piece in said.pieces]
    return extras
