"""Token ids to text as they arrive, never breaking a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from server.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes: what is still broken after this many tokens stays broken.
_MAX_PENDING_TOKENS = 8


class Detokenizer:
    """Incremental decoding of one sequence.

    The concatenation of all pieces and of `flush()` equals `tokenizer.decode` of all ids. Cost per token is constant.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        decoding = tokenizer.bytes_decoding
        self._decoder: _ByteDecoder | _WindowDecoder = (
            _WindowDecoder(tokenizer) if decoding is None else _ByteDecoder(tokenizer, decoding.strips_space)
        )

    def feed(self, ids: Sequence[int]) -> list[str]:
        """The text that each token completed, one piece a token, possibly empty."""
        skipped, push = self._skipped, self._decoder.push
        return ["" if token_id in skipped else push(token_id) for token_id in ids]

    def flush(self) -> str:
        """What the sequence's end leaves: replacement characters for an incomplete character, else nothing."""
        return self._decoder.flush()


class _ByteDecoder:
    """Tokens that stand for bytes: an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, strips_space: bool) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = strips_space

    def push(self, token_id: int) -> str:
        data = self._token_bytes(token_id)
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Any other tokenizer: decode the last tokens with and without the new one, the difference is its text.

    `_ids[:_read]` are tokens whose text is out already; they stay as context for those after them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._read = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._pending()
        unsure = not text or text.endswith(_REPLACEMENT)
        if unsure and len(self._ids) - self._read < _MAX_PENDING_TOKENS:
            return ""
        if text:
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
        else:  # nothing but ids without text: the context stays what it was
            del self._ids[self._read :]
        return text

    def flush(self) -> str:
        text = self._pending()
        self._read = len(self._ids)
        return text

    def _pending(self) -> str:
        # Special tokens that are to be skipped never get here, those that do are to be shown.
        known = self._tokenizer.decode(self._ids[: self._read], skip_special_tokens=False)
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)[len(known) :]
