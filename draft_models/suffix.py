"""Suffix drafter: continues the longest repeated suffix of a request's own tokens, its prediction, or recent outputs.

A host-side drafter after SuffixDecoding (arXiv 2411.04975) and SAM-Decoding (arXiv 2411.10666). On the CPU the host
knows every token when a step begins and drafts directly. On a GPU the host is one step late, so it uploads a
continuation long enough for the tokens it has not seen yet, and the device aligns that with what was really emitted.
A step that emits a token nobody drafted, as most do, leaves the uploaded way. There the device looks up itself where
the last tokens occurred before, and where they never did it takes the rest of the continuation all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from draft_models.ngram import find
from draft_models.recent_outputs import RecentOutputs
from draft_models.suffix_automaton import SuffixAutomaton
from server.kernels.paged import PagedRows
from server.spec.device import CachedDrafts, DeviceStep
from server.spec.types import Carry, Drafts, Verdict

if TYPE_CHECKING:
    from server.sampling.state import SamplingBatch

_NO_MATCH = "none"


def _bucket(match_length: int) -> str:
    for low, high in ((1, 1), (2, 2), (3, 4), (5, 8)):
        if match_length <= high:
            return str(low) if low == high else f"{low}-{high}"
    return "9+"


# Acceptance depends on how much context matched, on where (what the model said itself, what it was told, what it told
# others, what the client expects it to say), and for short contexts on whether one continuation outweighs all others
# ("?": none does). On SmolLM2-135M the first draft after one matching token is accepted 17 % of the time with "?" and
# 38 % without; after two, 35 % in the prompt's words and 58 % in the model's own. Of a match in a prediction,
# what lies in the output counts: where the answer starts, nothing. What a GPU looks up itself ("lookup"), its own words
# or the prompt's, is the latest occurrence, not the most frequent one. Names are made once: a class is looked up per
# row and step.
_BUCKETS = [_NO_MATCH] + [_bucket(length) for length in range(1, 10)]
_SOURCES = ("output", "prompt", "shared", "predicted", "lookup")
_CLASSES = {source: [f"{source}:{bucket}" for bucket in _BUCKETS] for source in _SOURCES}
_CLASSES["predicted"][0] = "predicted:start"
_UNSURE = {source: [f"{name}?" for name in names] for source, names in _CLASSES.items()}


class Match(NamedTuple):
    """A continuation of what is known, after a match of `length` tokens (0: there is none) in `source` of _SOURCES.

    Of a match in a prediction `length` counts what lies in the output. `is_unsure`: no majority follows the match.
    """

    tokens: list[int]
    length: int
    source: int
    is_unsure: bool

    @property
    def name(self) -> str:
        """Its acceptance class."""
        return CLASS_NAMES[self.family + min(self.length, 9)] if self.tokens else _NO_MATCH

    @property
    def family(self) -> int:
        """Where in CLASS_NAMES the classes of matches like this one begin; a match of n tokens has the n-th."""
        return 10 * (2 * self.source + self.is_unsure)


def _class_names() -> tuple[str, ...]:
    names: list[str] = []
    for source in _SOURCES:
        unsure = [
            name if length > 2 else other
            for length, (name, other) in enumerate(zip(_CLASSES[source], _UNSURE[source], strict=True))
        ]
        names += [*_CLASSES[source], *unsure]
    return tuple(names)


CLASS_NAMES = _class_names()
"""Every acceptance class: by source, by whether it is unsure, by length of the match from 0 to 9 or more."""
_MISS = Match([], 0, 0, False)

LOOKUP_FAMILY = Match([], 0, _SOURCES.index("lookup"), False).family
"""Of the classes of what a GPU looks up, see `Match.family`."""
_LONGEST_LOOKUP = 9
"""Tokens: longer matches have no classes of their own."""
_LEAST_IN_PREDICTION = 4
"""Tokens that a lookup must match where the text has left a prediction, which is not looked up in: most find back. With
one token in ten of SmolLM2-135M's answers replaced in the prediction, 3.45 are emitted a step; with 1, 3.16."""

_PREDICTION_CONTEXT = 16
_NO_TOKEN = -1


class _Sequence:
    """What the host knows of one slot: its tokens and the automaton over them.

    With a prediction the automaton's text is

        | end of the prompt | prediction | no token | prompt | output |
                                                    ^ offset

    so that where the answer begins, the end of the prompt is a match that the prediction follows, and whatever the
    output repeats of the prediction later finds back into it. "No token" occurs once: nothing matches across it.
    """

    __slots__ = ("_automaton", "_prediction", "offset", "prompt_len", "tokens")

    def __init__(self, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int]) -> None:
        self.tokens = list(token_ids)
        self.prompt_len = prompt_len
        self.offset = 0
        self._prediction = prediction
        self._automaton: SuffixAutomaton | None = None

    @property
    def automaton(self) -> SuffixAutomaton:
        """Made when it is first asked for, about 2 µs a token: on a GPU between a prompt's last chunk and its first
        verify step. Those of all rows that are new then are made one after another; where that takes longer than the
        chunk still runs, the device waits for the host.
        """
        if self._automaton is None:
            made = self._automaton = SuffixAutomaton()
            if self._prediction:
                made.extend(self.tokens[max(0, self.prompt_len - _PREDICTION_CONTEXT) : self.prompt_len])
                made.extend(self._prediction)
                made.extend((_NO_TOKEN,))
            self.offset = len(made)
            made.extend(self.tokens)
        return self._automaton

    def extend(self, token_ids: Sequence[int]) -> None:
        self.automaton.extend(token_ids)
        self.tokens.extend(token_ids)

    def follow(self, num_tokens: int) -> tuple[list[int], int, str, bool]:
        """Continuation of the text: tokens, length of the match, where it lies, and whether a majority follows it."""
        tokens, length, position, is_majority = self.automaton.follow(num_tokens)
        place = position - self.offset
        if self.offset and _NO_TOKEN in tokens:  # the prediction ends here
            tokens = tokens[: tokens.index(_NO_TOKEN)]
        source = "output" if place >= self.prompt_len else "prompt" if place >= 0 else "predicted"
        return tokens, length, source, is_majority


class SuffixDrafter:
    """Drafter over suffix automata. `recent_outputs` finished outputs of other requests are drafted from too (0: none).

    Drafts start at a match of `min_match` tokens. Short matches are kept: they carry their own class, so that the
    draft-length policy learns whether they pay.
    """

    name = "suffix"
    feature_layers: tuple[int, ...] = ()
    has_distribution = False

    def __init__(self, recent_outputs: int = 0, min_match: int = 1) -> None:
        self._sequences: dict[int, _Sequence] = {}
        self._recent = RecentOutputs(recent_outputs) if recent_outputs else None
        self._min_match = min_match

    def admit(self, slot: int, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int] = ()) -> None:
        """All known tokens and the prediction will be indexed, about 2 µs each, when they are first needed."""
        self._sequences[slot] = _Sequence(token_ids, prompt_len, prediction)

    def reuse(self, slot: int, first: int, end: int) -> None:
        """Nothing: it keeps no keys and values."""

    def observe(self, slot: int, token_ids: Sequence[int]) -> None:
        """Append emitted tokens: amortised O(1) each."""
        self._sequences[slot].extend(token_ids)

    def release(self, slot: int, complete: bool = False) -> None:
        """Forget the slot.

        A complete output, and never a prompt or a prediction, stays in the shared store where that is switched on.
        """
        sequence = self._sequences.pop(slot, None)
        if complete and sequence is not None and self._recent is not None:
            self._recent.add(sequence.tokens[sequence.prompt_len :])

    def prefill(
        self, carry: Carry, token_ids: Tensor, positions: Tensor, rows: Tensor, features: Tensor | None
    ) -> None:
        """Nothing to do: `admit` told the prompt."""

    def commit(self, carry: Carry, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """Nothing to do: `observe` tells what was emitted."""

    def pause(self) -> None:
        """Nothing to do: keeping the automata current costs microseconds."""

    def continuation(self, slot: int, num_tokens: int) -> list[int]:
        """At most `num_tokens` tokens that the slot's known tokens probably continue with; [] without a match."""
        return self.match(slot, num_tokens).tokens

    def match(self, slot: int, num_tokens: int) -> Match:
        """The continuation to draft from, of at most `num_tokens` tokens.

        The longer match of own tokens and recent outputs wins, own on a tie.
        """
        sequence = self._sequences[slot]
        tokens, length, source, is_majority = sequence.follow(num_tokens)
        if self._recent is not None:
            shared, shared_length = self._recent.follow(sequence.tokens, num_tokens)
            if shared_length > length:
                tokens, length, source, is_majority = shared, shared_length, "shared", True
        if not tokens or length < self._min_match:
            return _MISS
        is_unsure = not is_majority and length <= 2
        if source == "predicted":
            length = min(length, len(sequence.tokens) - sequence.prompt_len)
        return Match(tokens, length, _SOURCES.index(source), is_unsure)

    def num_known(self, slot: int) -> int:
        """How many tokens of the slot the host has seen."""
        return len(self._sequences[slot].tokens)

    def propose(self, carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        """Drafts for every row, as wide as the longest one; on the CPU, where the host knows every token."""
        if k <= 0 or not any(carry.limits):
            return Drafts.none(len(carry.slots), carry.state.history.device)
        rows: list[list[int]] = []
        classes: list[str] = []
        for slot, limit in zip(carry.slots, carry.limits, strict=True):
            found = self.match(slot, min(k, limit)) if limit > 0 else _MISS
            rows.append(found.tokens)
            classes.append(found.name)
        num_valid = [len(tokens) for tokens in rows]
        width = max(num_valid)
        padded = [tokens + [0] * (width - len(tokens)) for tokens in rows]
        return Drafts(
            tokens=torch.tensor(padded, dtype=torch.int64),
            num_valid=torch.tensor(num_valid, dtype=torch.int64),
            num_valid_host=num_valid,
            classes=classes,
        )

    # -- inside graphs -------------------------------------------------------------------------------------

    def admit_slots(self, slots: Tensor, num_tokens: Tensor, cached: CachedDrafts | None = None) -> None:
        """Nothing to do."""

    def upload_width(self, k: int) -> int:
        """How many tokens the host knew, the row's limit, how many a lookup must match, and a continuation.

        The host may miss up to one step, k + 1 tokens: it predicts twice that, and the device aligns it.
        """
        return 3 + 2 * (k + 1)

    def upload(self, slots: Sequence[int], limits: Sequence[int], k: int) -> list[list[int]]:
        """See DeviceDrafter.upload; a continuation that ends early is padded with -1."""
        width = 2 * (k + 1)
        rows = []
        for slot, limit in zip(slots, limits, strict=True):
            match = self.match(slot, width) if limit > 0 else _MISS
            least = _LEAST_IN_PREDICTION if _SOURCES[match.source] == "predicted" else 1
            row = [self.num_known(slot), min(limit, k), least, *match.tokens]
            rows.append(row + [-1] * (width - len(match.tokens)))
        return rows

    def draft(self, step: DeviceStep, k: int) -> Drafts:
        """See DeviceDrafter.draft."""
        assert step.uploads is not None
        from server.kernels.align import align_drafts, align_reference  # a kernel module: imported where one runs

        fit = align_drafts if step.slots.is_cuda else align_reference
        state = step.state
        return Drafts(*fit(step.uploads, state.history, step.slots, state.num_tokens, self.lookup(step, k)))

    def lookup(self, step: DeviceStep, k: int) -> tuple[Tensor, Tensor]:
        """Where the last tokens occurred before: what followed, [R, k] int64, and how many tokens match, [R] int64."""
        return find(step, k, self._min_match, max(self._min_match, _LONGEST_LOOKUP))

    def after_verify(self, step: DeviceStep, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """Nothing to do: `observe` tells what was emitted."""

    def prefill_chunk(self, step: DeviceStep, token_ids: Tensor, rows: PagedRows, features: Tensor | None) -> None:
        """Nothing to do: `admit` told the prompt."""

    def resume(self, slots: Sequence[int], known: Sequence[Sequence[int]], seen: Sequence[int]) -> None:
        """Nothing to do."""
