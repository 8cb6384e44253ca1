"""Hybrid drafting inside a GPU's graphs: each row copies what the host foresaw, then its chain goes on.

    upload       host: known tokens, limit, continuation | length and family of the match, lengths worth copying |
                 the same family and lengths of what the device looks up itself
    draft        what is left of the continuation and its length, or what was looked up, then the learned chain for all
                 rows: where a row still copies, the chain is fed the copied token in place of its own
    origins      which class of match was copied and how many tokens, back to the host with the step's report

The host is a step behind when it looks for a match. What was emitted since either followed the foreseen way, and the
match is that much longer, or left it, and the device looks up the latest place where the last tokens occurred before:
so the length that decides is known on the device only, and the host sends what it would decide for every length. That
these decisions are a step old can cost speed, never tokens.

On an H100 it has run as it was before the device looked anything up (`benchmarks/results/h100_emitted.json`); the
look-up has run in torch and under Triton's interpreter only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from draft_models.eagle3_chain import DeviceOnly, Sampler
from draft_models.hybrid import LEARNED, Arbiter, ByLength
from draft_models.protocol import DeviceDrafter
from draft_models.suffix import CLASS_NAMES, LOOKUP_FAMILY, Match, SuffixDrafter
from server.kernels.paged import PagedRows
from server.spec.device import CachedDrafts, DeviceStep
from server.spec.types import Drafts, Verdict

_EXTRA, _COUNT_BITS = 5, 8
"""MATCH and COUNT_BITS of `server.kernels.align`, which is imported where kernels run."""
_ANY_LENGTH = -1


class ChainDrafter(DeviceDrafter, Protocol):
    """A learned drafter whose chain draws every draft with `sampler` and is fed what it returns."""

    sampler: Sampler


class CopyingSampler:
    """Draws with `inner`, except where a row copies: there the copied token comes, from a point mass.

    It is called once for each draft of a chain, in order. What depends on `begin` is a host's constant in a graph.
    """

    def __init__(self, inner: Sampler) -> None:
        self.inner = inner
        self._copies: tuple[Tensor, Tensor] | None = None
        self._next = 0

    def begin(self, tokens: Tensor, copied: Tensor) -> None:
        """The next chain's rows copy `tokens` [R, k] int64 where `copied` [R, k] is true."""
        self._copies, self._next = (tokens, copied), 0

    def end(self) -> None:
        """No row copies any more."""
        self._copies = None

    def __call__(
        self, logits: Tensor, step: DeviceStep, positions: Tensor, vocab_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See Sampler."""
        tokens, q = self.inner(logits, step, positions, vocab_ids)
        if self._copies is None:
            return tokens, q
        wanted, copied = (part[:, self._next] for part in self._copies)
        self._next += 1
        if q is not None:
            mass = torch.where(copied, 1.0, q.gather(1, wanted[:, None])[:, 0])
            q = q.masked_fill(copied[:, None], 0.0).scatter_(1, wanted[:, None], mass[:, None])
        return torch.where(copied, wanted, tokens), q


class HybridDeviceDrafter(DeviceOnly):
    """Implements draft_models.protocol.DeviceDrafter; everything but copying is `learned`'s.

    `chain` says whether the next step's drafts come from `draft` or, while the chain does not pay, from `draft_copies`.
    `max_draft_tokens` bounds k.
    """

    name = "hybrid"
    has_distribution = True

    def __init__(self, suffix: SuffixDrafter, learned: ChainDrafter, max_draft_tokens: int) -> None:
        self.suffix, self.learned = suffix, learned
        self.feature_layers = learned.feature_layers
        self.arbiter: Arbiter = ByLength(max_draft_tokens)
        self.chain = True
        self._sampler = learned.sampler = CopyingSampler(learned.sampler)
        self._width = 2 * (max_draft_tokens + 1)
        self._matches: dict[int, Match | None] = {}

    @property
    def pools(self) -> list[Tensor]:
        """The learned drafter's keys and values."""
        found: list[Tensor] = getattr(self.learned, "pools", [])
        return found

    def bind(self, block_tables: Tensor) -> None:
        """For a learned drafter that wants the runner's block tables."""
        bind = getattr(self.learned, "bind", None)
        if bind is not None:
            bind(block_tables)

    # -- host events ---------------------------------------------------------------------------------------

    def admit(self, slot: int, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int] = ()) -> None:
        """See Drafter."""
        self.suffix.admit(slot, token_ids, prompt_len, prediction)
        self.learned.admit(slot, token_ids, prompt_len, prediction)

    def reuse(self, slot: int, first: int, end: int) -> None:
        """See Drafter."""
        self.learned.reuse(slot, first, end)

    def observe(self, slot: int, token_ids: Sequence[int]) -> None:
        """See Drafter."""
        self._matches[slot] = None
        self.suffix.observe(slot, token_ids)
        self.learned.observe(slot, token_ids)

    def release(self, slot: int, complete: bool = False) -> None:
        """See Drafter."""
        self._matches.pop(slot, None)
        self.suffix.release(slot, complete)
        self.learned.release(slot, complete)

    def pause(self) -> None:
        """See Drafter."""
        self.learned.pause()

    def foreseen(self) -> list[Match]:
        """What sequences that emit tokens could copy, as far as the host knows; none where nothing matches."""
        return [match for slot in list(self._matches) if (match := self._match(slot)).tokens]

    def _match(self, slot: int) -> Match:
        """Looked up once until more is known: the choice of k asks for it as well as the upload."""
        found = self._matches.get(slot)
        if found is None:
            found = self._matches[slot] = self.suffix.match(slot, self._width)
        return found

    def upload_width(self, k: int) -> int:
        """The suffix drafter's, the match's length, its family and the lengths that are worth copying, and the last two
        of what is looked up."""
        return self.suffix.upload_width(k) + _EXTRA

    def upload(self, slots: Sequence[int], limits: Sequence[int], k: int) -> list[list[int]]:
        """See DeviceDrafter."""
        width = 2 * (k + 1)
        lookup = self.arbiter.lengths_of(LOOKUP_FAMILY, k) if self.chain else _ANY_LENGTH
        rows = []
        for slot, limit in zip(slots, limits, strict=True):
            match = self._match(slot)
            tokens = match.tokens[:width]
            worth = 0 if not tokens else self.arbiter.lengths(match, k) if self.chain else _ANY_LENGTH
            row = [self.suffix.num_known(slot), min(limit, k), 1, *tokens] + [-1] * (width - len(tokens))
            rows.append([*row, match.length, match.family, worth, LOOKUP_FAMILY, lookup])
        return rows

    @staticmethod
    def origin_of(origin: int) -> tuple[str, int]:
        """Reads one of `Drafts.origins`: the class of what was copied, and how many tokens; LEARNED if none were."""
        count = origin & ((1 << _COUNT_BITS) - 1)
        return (CLASS_NAMES[origin >> _COUNT_BITS], count) if count else (LEARNED, 0)

    # -- inside graphs -------------------------------------------------------------------------------------

    def draft(self, step: DeviceStep, k: int) -> Drafts:
        """See DeviceDrafter: as far as a row copies, then its chain."""
        tokens, copied, _, origins = self._copies(step, k)
        self._sampler.begin(tokens, copied)
        drafts = self.learned.draft(replace(step, uploads=None), k)
        self._sampler.end()
        drafts.origins = origins
        return drafts

    def draft_copies(self, step: DeviceStep, k: int) -> Drafts:
        """The same drafts as far as they are copied, and no others; the chain does not run."""
        tokens, _, counts, origins = self._copies(step, k)
        return Drafts(tokens, counts, origins=origins)

    def _copies(self, step: DeviceStep, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens [R, k], which of them are copied [R, k], how many [R] and `Drafts.origins` [R]."""
        assert step.uploads is not None
        from server.kernels.align import copy_drafts, copy_reference  # a kernel module: imported where one runs

        copy = copy_drafts if step.slots.is_cuda else copy_reference
        lookup = self.suffix.lookup(step, k)
        return copy(step.uploads, step.state.history, step.slots, step.state.num_tokens, lookup)

    def admit_slots(self, slots: Tensor, num_tokens: Tensor, cached: CachedDrafts | None = None) -> None:
        """See DeviceDrafter; keys and values are the learned drafter's."""
        self.learned.admit_slots(slots, num_tokens, cached)

    def after_verify(self, step: DeviceStep, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """See DeviceDrafter; runs after steps without a chain too, so a pause of the chain loses no features."""
        self.learned.after_verify(step, drafts, verdict, features)

    def prefill_chunk(self, step: DeviceStep, token_ids: Tensor, rows: PagedRows, features: Tensor | None) -> None:
        """See DeviceDrafter."""
        self.learned.prefill_chunk(step, token_ids, rows, features)

    def resume(self, slots: Sequence[int], known: Sequence[Sequence[int]], seen: Sequence[int]) -> None:
        """See DeviceDrafter; after steps without a chain too."""
        self.learned.resume(slots, known, seen)
