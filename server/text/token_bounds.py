"""How little a long text can come to: the bound that refuses it before it is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.pieces import divides_at_special_tokens

_ASCII = frozenset(range(0x80))
_CONTINUATION = frozenset(range(0x80, 0xC0))


@dataclass(frozen=True, slots=True)
class TokenBound:
    """A token stands for at most `max_chars` characters of a text, but for those in `dropped`: they may have none."""

    max_chars: int
    dropped: tuple[str, ...]

    def at_least(self, text: str) -> int:
        """How many tokens `text` has at least."""
        num_chars = len(text) - sum(map(text.count, self.dropped))
        return -(-num_chars // self.max_chars)


def token_bound(content: Mapping[str, Any], token_bytes: Sequence[bytes]) -> TokenBound | None:
    """The bound of a tokenizer, special tokens included; None where none is proven.

    It is for byte-level BPE that normalises nothing: there a token stands for its bytes alone. Bytes without a token
    of their own are dropped. Of ASCII they are whole characters; where all of UTF-8's continuation bytes (RFC 3629,
    section 3) have tokens, of any other character something is left. `content` is a `tokenizer.json`, `token_bytes`
    what each id stands for.
    """
    model, decoder = content["model"], content["decoder"]
    plain = model["type"] == "BPE" and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
    # A named unknown token may stand for a run of bytes.
    if not plain or model["unk_token"] is not None or decoder is None or decoder["type"] != "ByteLevel":
        return None
    known = {data[0] for data in token_bytes if len(data) == 1}
    if not divides_at_special_tokens(content) or not _keeps_all(content["pre_tokenizer"]) or _CONTINUATION - known:
        return None
    return TokenBound(max(map(len, token_bytes)), tuple(map(chr, sorted(_ASCII - known))))


def _keeps_all(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether every character reaches the model, as its bytes."""
    steps = _steps(pre_tokenizer)
    removes = any(step["type"] == "Split" and step["behavior"] == "Removed" for step in steps)
    return not removes and any(step["type"] == "ByteLevel" for step in steps)


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
