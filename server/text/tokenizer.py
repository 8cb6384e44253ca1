"""Text to token ids and back, on the `tokenizers` library alone."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from server.text.errors import TooManyTokens
from server.text.pieces import PieceEncoder, divides_at_special_tokens
from server.text.token_bounds import token_bound
from server.text.token_bytes import ByteDecoding, byte_decoding
from server.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

# One text at a time gains nothing from the library's threads, and with them it warns of every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BATCH_CHARS = 4096
"""From here on a text is encoded as a batch of one: the library's `encode` holds the GIL, its batches do not."""

# Unicode noncharacters: legal in strings, never in text, left alone by normalizers. The random part of a spelling
# is what keeps a client from writing it.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class Tokenizer:
    """A model's tokenizer: encodes, decodes, and knows which bytes each token stands for.

    Thread-safe. Decoding never "cleans up" spaces before punctuation as transformers does for some models.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.backend = files.backend
        self.special_tokens = files.special_tokens
        self.eos_token_ids = files.eos_token_ids
        self.chat_template = files.chat_template
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        content = orjson.loads(self.backend.to_str())
        self.bytes_decoding: ByteDecoding | None = byte_decoding(content["decoder"])
        self._bytes: dict[int, bytes] = {}
        self._nonce = secrets.token_hex(8)
        self._mark = f"{_OPEN}{self._nonce}{_CLOSE}"
        self._special_texts = {t.content: token_id for token_id, t in added.items() if t.special and t.content}
        longest_first = sorted(self._special_texts, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.bound = token_bound(content, [self.token_bytes(i) for i in range(self.vocab_size)])
        """How few tokens a text may have; None where that is not known."""
        self._pieces: PieceEncoder | None = None
        if divides_at_special_tokens(content):
            self._pieces = PieceEncoder(self._special_pattern, self._special_texts, self._encode_plain)
        # Here and not at the first text that needs them: that would stall every client of an event loop.
        self._respelled = self._respell(content)
        self._respelled_ids = self._original_ids()
        self._around = self._find_around()

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory. Raises `TokenizerError`."""
        return cls(read_tokenizer_files(Path(path)))

    def encode(
        self, text: str, *, add_special_tokens: bool, allow_special: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` adds what the model wants around a text (a beginning-of-sequence token, for instance).
        With `allow_special` the spelling of a special token in the text becomes that token, as everywhere in the
        Hugging Face world; without it, it is text like any other.
        Raises `TooManyTokens`, before it encodes, where the text is surely more than `max_tokens`.
        """
        self._check_length(text, max_tokens)
        if allow_special or not self._has_special(text):
            if self._pieces is not None and not add_special_tokens:
                return self._pieces.encode(text)
            return _ids(self.backend, text, add_special_tokens=add_special_tokens)
        prefix, suffix = self._around if add_special_tokens else ([], [])
        return [*prefix, *self._encode_respelled(text), *suffix]

    def _encode_plain(self, piece: str) -> list[int]:
        return _ids(self.backend, piece, add_special_tokens=False)

    def _has_special(self, text: str) -> bool:
        if len(text) <= BATCH_CHARS:
            return self._special_pattern.search(text) is not None
        # One search a token: a single one over megabytes would hold the GIL for a third of a second.
        return any(special in text for special in self._special_texts)

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        if max_tokens is not None and self.bound is not None and len(text) > max_tokens:
            at_least = self.bound.at_least(text)
            if at_least > max_tokens:
                raise TooManyTokens(at_least)

    def guard(self, text: str) -> str:
        """`text` with every spelling of a special token marked, so that `encode_guarded` takes it for text."""
        while self._has_special(text):  # again: marking one may leave another that overlapped it
            text = self._special_pattern.sub(lambda match: match[0][0] + self._mark + match[0][1:], text)
        return text

    def encode_guarded(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text built from guarded and trusted parts: only the trusted parts yield special tokens.

        Raises `TooManyTokens` as `encode` does.
        """
        if self._mark not in text:
            return self.encode(text, add_special_tokens=False, max_tokens=max_tokens)
        self._check_length(self.unguard(text), max_tokens)
        respelled = self._special_pattern.sub(lambda match: self._spelling(match[0]), text)
        return self._encode_respelled(self.unguard(respelled))

    def unguard(self, text: str) -> str:
        """Undo `guard`."""
        return text.replace(self._mark, "")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary give nothing, bytes that are no UTF-8 give U+FFFD.

        Equal to the `tokenizers` library's own, but for SentencePiece byte tokens that are no UTF-8: here each maximal
        broken sequence is one U+FFFD (as in byte-level BPE), not each byte of the whole run, which cannot be streamed.
        """
        if self.bytes_decoding is None:
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
            return text
        skipped: frozenset[int] = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join([self.token_bytes(i) for i in ids if i not in skipped])
        if self.bytes_decoding.strips_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token contributes to a text; b"" for an id outside the vocabulary.

        Exact for byte-level BPE and byte fallback; for other tokenizers the bytes of the token decoded on its own.
        """
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """The token on its own as text, U+FFFD where it is a broken piece of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _encode_respelled(self, text: str) -> list[int]:
        ids = _ids(self._respelled, text, add_special_tokens=False)
        return [self._respelled_ids.get(i, i) for i in ids]

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        if self.bytes_decoding is not None:
            return self.bytes_decoding.to_bytes(token)
        text: str = self.backend.decode([token_id], skip_special_tokens=False)
        return text.encode("utf-8", "replace")

    def _spelling(self, special_text: str) -> str:
        return f"{_OPEN}{self._nonce}:{self._special_texts[special_text]}{_CLOSE}"

    def _respell(self, content: dict[str, Any]) -> tokenizers.Tokenizer:
        """The same tokenizer, whose special tokens are spelled so that no client can write them.

        So plain text and trusted special tokens pass through one call, and every rule at their borders (stripping,
        prefix spaces) holds.
        """
        for token in content["added_tokens"]:
            if token["special"] and token["content"]:
                token.update(content=self._spelling(token["content"]), normalized=False)
        return tokenizers.Tokenizer.from_str(orjson.dumps(content).decode())

    def _original_ids(self) -> dict[int, int]:
        """Original id of every added token of `_respelled`, whose ids follow from spelling and order."""
        texts = {self._spelling(text): text for text in self._special_texts}
        added = self._respelled.get_added_tokens_decoder()
        return {i: self.backend.token_to_id(texts.get(token.content, token.content)) for i, token in added.items()}

    def _find_around(self) -> tuple[list[int], list[int]]:
        """What the model wants before and after a text."""
        core = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(whole)) if whole[i : i + len(core)] == core)
        start = next(starts, len(whole))
        return whole[:start], whole[start + len(core) :]


def _ids(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    ids: list[int]
    if len(text) <= BATCH_CHARS:
        ids = backend.encode(text, add_special_tokens=add_special_tokens).ids
    else:
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids = encoding.ids
    return ids
