"""Alignment of a continuation that the host predicted a step ago with what was really emitted since.

Where that left the predicted way, what a lookup over the whole history found (`server.kernels.ngram`) takes its place:
one kernel. A second one also decides, for a hybrid drafter, by the length that the match has by now whether a row
copies at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime

_HEADER = 3
MATCH = 5
"""Integers of a match behind a row's predicted tokens: its length, its family, and the lengths worth copying; then the
family of what is looked up instead, and its lengths worth copying."""
COUNT_BITS = 8
"""Of an origin: how many tokens were copied; the bits above name the kind of match."""
LONGEST = 9
"""Longer matches count as this long."""


@triton.jit
def _aligned(
    uploads, history, history_stride, history_length, slot, num_tokens, j, width, k, WP: tl.constexpr, KP: tl.constexpr
):  # type: ignore[no-untyped-def] # fmt: skip
    """Of a row's prediction: how many tokens the host had not seen, whether those were the predicted ones, what the
    prediction has behind them [KP] (-1: missing), how many tokens that is, and the most that may count."""
    seen = tl.load(uploads)
    unseen = tl.load(num_tokens + slot) - seen
    w = tl.arange(0, WP)
    places = tl.minimum(seen + w, history_length - 1)
    due = (w < width) & (w < unseen)
    predicted = tl.load(uploads + 3 + w, mask=due, other=0)
    emitted = tl.load(history + slot * history_stride + places, mask=due, other=0)
    on_track = tl.max((predicted != emitted).to(tl.int32), 0) == 0
    source = unseen + j
    draft = tl.load(uploads + 3 + source, mask=(j < k) & (source >= 0) & (source < width), other=-1)
    # A prediction that is missing ends the drafts, whatever comes behind it.
    run = tl.min(tl.where((draft >= 0) & (j < k), KP, j), 0).to(tl.int64)
    most = tl.minimum(tl.maximum(tl.load(uploads + 1), 0), k)
    return unseen, on_track, draft, tl.minimum(run, k), most


@triton.jit
def _align_kernel(
    uploads, stride, history, history_stride, history_length, slots, num_tokens, looked_up, matched, drafts, num_valid,
    width, k, WP: tl.constexpr, KP: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot, j = tl.load(slots + row), tl.arange(0, KP)
    _, on_track, draft, run, most = _aligned(
        uploads + row * stride, history, history_stride, history_length, slot, num_tokens, j, width, k, WP, KP
    )
    found = tl.load(matched + row)
    better = (on_track == 0) & (found >= tl.load(uploads + row * stride + 2))
    takes = (better | (run == 0)) & (found > 0)
    draft = tl.where(takes, tl.load(looked_up + row * k + j, mask=j < k, other=0), draft)
    run = tl.where(takes, k, run)
    tl.store(drafts + row * k + j, tl.maximum(draft, 0), mask=j < k)
    tl.store(num_valid + row, tl.minimum(run, most))


@triton.jit
def _copy_kernel(
    uploads, stride, history, history_stride, history_length, slots, num_tokens, looked_up, matched, drafts, copied,
    counts, origins, width, k, WP: tl.constexpr, KP: tl.constexpr, LONGEST: tl.constexpr, COUNT_BITS: tl.constexpr,
    PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot, j = tl.load(slots + row), tl.arange(0, KP)
    line = uploads + row * stride
    unseen, on_track, draft, run, most = _aligned(
        line, history, history_stride, history_length, slot, num_tokens, j, width, k, WP, KP
    )
    match = line + 3 + width
    falls = (on_track == 0) | (run == 0)
    found = tl.load(matched + row)
    draft = tl.where(falls, tl.load(looked_up + row * k + j, mask=j < k, other=0), draft)
    run = tl.where(falls, tl.where(found > 0, k, 0), run)
    place = tl.minimum(tl.maximum(tl.where(falls, found, tl.load(match) + unseen), 0), LONGEST)
    kind = match + 1 + 2 * falls.to(tl.int32)
    count = tl.minimum(run, most) * ((tl.load(kind + 1) >> place) & 1)
    tl.store(drafts + row * k + j, tl.maximum(draft, 0), mask=j < k)
    tl.store(copied + row * k + j, (j < count).to(tl.int8), mask=j < k)
    tl.store(counts + row, count)
    tl.store(origins + row, ((tl.load(kind) + place) << COUNT_BITS) + count)


Lookup = tuple[Tensor, Tensor]
"""What `server.kernels.ngram.ngram_draft` found: tokens [R, k] int64 and the matched n [R] int64, 0 without a match."""


def align_drafts(
    uploads: Tensor, history: Tensor, slots: Tensor, num_tokens: Tensor, lookup: Lookup, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Drafts [R, k] int64, valid ids everywhere, and how many of them count, [R] int64.

    `uploads` [R, 3 + W] int64 is (number of tokens the host had seen, most drafts, tokens that a lookup must match, W
    predicted tokens, -1 past their end); `history` [S, L] int64 and `num_tokens` [S] int64 are by slot, `slots` [R]
    int64. A row that went another way than predicted drafts what `lookup` found, and without such a match the rest of
    the prediction behind as many tokens as were emitted: a token that the text never had before often only stands in
    another's place. A prediction that ends leaves any match.
    """
    (looked_up, matched), num_rows, width = lookup, uploads.shape[0], uploads.shape[1] - _HEADER
    k = looked_up.shape[1]
    drafts = torch.empty(num_rows, k, dtype=torch.int64, device=uploads.device)
    num_valid = torch.empty(num_rows, dtype=torch.int64, device=uploads.device)
    _align_kernel[(num_rows,)](
        uploads, uploads.stride(0), history, history.stride(0), history.shape[1], slots, num_tokens, looked_up, matched,
        drafts, num_valid, width, k, WP=runtime.next_power_of_2(width), KP=runtime.next_power_of_2(k + 1), PDL=pdl,
        num_warps=1, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return drafts, num_valid


def copy_drafts(
    uploads: Tensor, history: Tensor, slots: Tensor, num_tokens: Tensor, lookup: Lookup, *, pdl: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drafts of rows that copy only where their match is worth it.

    `uploads` [R, 3 + W + MATCH] int64 end with the length of the match behind the tokens that the host had seen, the
    number of its family's first kind, and a mask whose bit n says that a match of n tokens is copied. What was emitted
    since makes the match longer; it counts as LONGEST at most. A row that went another way, or as far as the prediction
    goes, has the match of `lookup` instead: its family and mask come last. Returns drafts [R, k] int64, which of them
    are copied [R, k] bool, how many [R] int64, and origins [R] int64: (first kind + length) << COUNT_BITS | how many.
    """
    (looked_up, matched), num_rows, device = lookup, uploads.shape[0], uploads.device
    width, k = uploads.shape[1] - _HEADER - MATCH, looked_up.shape[1]
    drafts = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    copied = torch.empty(num_rows, k, dtype=torch.bool, device=device)
    counts, origins = torch.empty(2, num_rows, dtype=torch.int64, device=device).unbind(0)
    _copy_kernel[(num_rows,)](
        uploads, uploads.stride(0), history, history.stride(0), history.shape[1], slots, num_tokens, looked_up, matched,
        drafts, copied.view(torch.int8), counts, origins, width, k, WP=runtime.next_power_of_2(width),
        KP=runtime.next_power_of_2(k + 1), LONGEST=LONGEST, COUNT_BITS=COUNT_BITS, PDL=pdl, num_warps=1,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return drafts, copied, counts, origins


def _follow_reference(
    uploads: Tensor, history: Tensor, slots: Tensor, num_tokens: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of predictions: what lies behind the tokens emitted since, how many tokens that is, and whether they fit."""
    seen, predicted = uploads[:, 0], uploads[:, _HEADER:]
    width = predicted.shape[1]
    unseen = (num_tokens.index_select(0, slots) - seen)[:, None]
    steps = torch.arange(width, device=uploads.device)
    places = (seen[:, None] + steps).clamp_(max=history.shape[1] - 1)
    on_track = ((history[slots[:, None], places] == predicted) | (steps >= unseen)).all(1)
    source = unseen + torch.arange(k, device=uploads.device)
    drafts = predicted.gather(1, source.clamp(max=width - 1))
    run = ((source < width) & (drafts >= 0)).to(torch.int64).cumprod(1).sum(1)
    return drafts.clamp_(min=0), run, on_track


def align_reference(
    uploads: Tensor, history: Tensor, slots: Tensor, num_tokens: Tensor, lookup: Lookup
) -> tuple[Tensor, Tensor]:
    """What `align_drafts` computes, with torch."""
    (looked_up, matched), k = lookup, lookup[0].shape[1]
    drafts, run, on_track = _follow_reference(uploads, history, slots, num_tokens, k)
    better = ~on_track & (matched >= uploads[:, 2])
    takes = (better | (run == 0)) & (matched > 0)
    return torch.where(takes[:, None], looked_up, drafts), torch.minimum(torch.where(takes, k, run), uploads[:, 1])


def copy_reference(
    uploads: Tensor, history: Tensor, slots: Tensor, num_tokens: Tensor, lookup: Lookup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `copy_drafts` computes, with torch."""
    (looked_up, matched), k = lookup, lookup[0].shape[1]
    lines = uploads[:, :-MATCH]
    length, family, worth, found_family, found_worth = uploads[:, -MATCH:].unbind(1)
    drafts, run, on_track = _follow_reference(lines, history, slots, num_tokens, k)
    falls = ~on_track | (run == 0)
    run = torch.where(falls, torch.where(matched > 0, k, 0), run)
    length = length + num_tokens.index_select(0, slots) - lines[:, 0]
    place = torch.where(falls, matched, length).clamp_(0, LONGEST)
    counts = torch.minimum(run, lines[:, 1]) * ((torch.where(falls, found_worth, worth) >> place) & 1)
    copied = torch.arange(k, device=uploads.device) < counts[:, None]
    origins = ((torch.where(falls, found_family, family) + place) << COUNT_BITS) + counts
    return torch.where(falls[:, None], looked_up, drafts), copied, counts, origins
