"""Which target tokens a head can draft: the ones the target writes most."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from optimize.distill.shards import Document
from server.text.tokenizer import Tokenizer

DEFAULT_SIZE = 32_768
_BASICS = string.digits + string.ascii_letters + string.punctuation + string.whitespace


def basics(tokenizer: Tokenizer, ends: Iterable[int], vocab_size: int) -> list[int]:
    """Tokens that are always in: ends of a turn, and single characters of ASCII with or without a space before."""
    ids = set(ends)
    for character in _BASICS:
        for text in (character, " " + character):
            found = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
            ids |= set(found) if len(found) == 1 else set()
    return sorted(i for i in ids if 0 <= i < vocab_size)


def counts(documents: Iterable[Document], vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How often the target wrote each token, [V]."""
    total = np.zeros(vocab_size, np.int64)
    for document in documents:
        total += np.bincount(document.written, minlength=vocab_size)
    return total


def draft_vocabulary(
    frequency: np.ndarray[tuple[int], np.dtype[np.int64]], size: int | None, always: Sequence[int]
) -> Tensor:
    """The target's ids of the draft vocabulary, ascending, [C] int64.

    `size` None: all of them up to DEFAULT_SIZE. At equal frequency lower ids come first: merges of byte-pair encodings
    are numbered by how common they are.
    """
    vocab_size = len(frequency)
    if size is None:
        size = DEFAULT_SIZE
    if size >= vocab_size:
        return torch.arange(vocab_size)
    ranked = frequency.copy()
    ranked[list(always)] += int(frequency.max()) + 1
    chosen = np.argsort(-ranked, kind="stable")[:size]
    return torch.from_numpy(np.sort(chosen))


def coverage(frequency: np.ndarray[tuple[int], np.dtype[np.int64]], target_ids: Tensor) -> float:
    """Share of what the target wrote that the draft vocabulary can name."""
    total = int(frequency.sum())
    return float(frequency[target_ids.numpy()].sum() / total) if total else 1.0
