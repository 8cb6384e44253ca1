"""A bounded store of what other requests generated lately, indexed by n-grams, for the suffix drafter to copy from.

SuffixDecoding (arXiv 2411.04975, section 3.1) keeps a global suffix tree beside the request's own. An n-gram index
gives the same candidates and forgets the oldest output in O(its length), which a suffix automaton can not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_NGRAM = 3
_MAX_MATCH = 32
_MAX_CANDIDATES = 8


class RecentOutputs:
    """The last `max_outputs` outputs, the first `max_tokens` tokens of each; the oldest output is evicted first."""

    def __init__(self, max_outputs: int, max_tokens: int = 4096) -> None:
        self._max_outputs = max_outputs
        self._max_tokens = max_tokens
        self._outputs: dict[int, list[int]] = {}
        self._next_id = 0
        self._index: dict[tuple[int, ...], deque[tuple[int, int]]] = {}

    def __len__(self) -> int:
        """Number of outputs held."""
        return len(self._outputs)

    @property
    def num_keys(self) -> int:
        """Number of distinct n-grams in the index."""
        return len(self._index)

    def add(self, token_ids: Sequence[int]) -> None:
        """Remember an output, and forget the oldest one if there are too many. Too short outputs are not kept."""
        tokens = list(token_ids[: self._max_tokens])
        if self._max_outputs == 0 or len(tokens) <= _NGRAM:
            return
        output_id = self._next_id
        self._next_id += 1
        self._outputs[output_id] = tokens
        for end in range(_NGRAM, len(tokens)):
            entry = self._index.setdefault(tuple(tokens[end - _NGRAM : end]), deque(maxlen=_MAX_CANDIDATES))
            entry.append((output_id, end))
        if len(self._outputs) > self._max_outputs:
            self._evict(next(iter(self._outputs)))

    def _evict(self, output_id: int) -> None:
        tokens = self._outputs.pop(output_id)
        for end in range(_NGRAM, len(tokens)):
            key = tuple(tokens[end - _NGRAM : end])
            entry = self._index.get(key)
            # Entries are in order of arrival, so those of the oldest output come first (or were pushed out already).
            while entry and entry[0][0] == output_id:
                entry.popleft()
            if entry is not None and not entry:
                del self._index[key]

    def follow(self, context: Sequence[int], num_tokens: int) -> tuple[list[int], int]:
        """At most `num_tokens` tokens that followed the end of `context` before, and how many tokens matched (or 0).

        The longest match wins (up to 32 tokens), then the most frequent next token, then the most recent output.
        """
        entry = self._index.get(tuple(context[-_NGRAM:]))
        if not entry:
            return [], 0
        votes: dict[int, int] = {}
        lengths: list[int] = []
        for output_id, end in entry:
            tokens = self._outputs[output_id]
            lengths.append(_match_length(tokens, end, context))
        longest = max(lengths)
        winners = [place for place, length in zip(entry, lengths, strict=True) if length == longest]
        for output_id, end in winners:
            token = self._outputs[output_id][end]
            votes[token] = votes.get(token, 0) + 1
        most = max(votes.values())
        output_id, end = next(place for place in reversed(winners) if votes[self._outputs[place[0]][place[1]]] == most)
        return self._outputs[output_id][end : end + num_tokens], longest


def _match_length(tokens: Sequence[int], end: int, context: Sequence[int]) -> int:
    """How many tokens before `end` equal the end of `context`; the first n-gram is known to."""
    length, bound = _NGRAM, min(_MAX_MATCH, end, len(context))
    while length < bound and tokens[end - length - 1] == context[-length - 1]:
        length += 1
    return length
