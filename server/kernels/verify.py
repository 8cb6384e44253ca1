"""Verification by matching: the target's token at every position of a step, and how many drafts agree with it.

The kernel of `server.spec.verify` for greedy rows and for the rule `coupled`: one launch that reads nothing but logits
and makes no probability. The programs of a row share out its positions and vocabulary; the last to arrive puts the
pieces together, compares them with the drafts and, if asked, commits what the row emits: then a greedy step ends with
this launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime
from server.kernels.argmax import BLOCK, WARPS, argmax_reference, chunks, counters, is_last, token_of
from server.kernels.commit import Commit, check_commit, commit_row
from server.kernels.noise import TARGET
from server.kernels.sample import race
from server.kernels.slots import is_greedy, key_of, temperature_of
from server.kernels.threshold import filter_threshold_by_slot

NOT_FORCED, FORCED_BY_ROW, FORCED_EVERYWHERE = range(3)
_TARGET = tl.constexpr(TARGET)
_BY_ROW = tl.constexpr(FORCED_BY_ROW)
_EVERYWHERE = tl.constexpr(FORCED_EVERYWHERE)


@triton.jit
def num_matching(matches, valid, forced, forced_stride, forced_value, row, j, FORCED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Length of the leading run of `matches` [WP] within `valid`, or the forced number."""
    count = tl.min(tl.where(matches & (j < valid), 0x7FFFFFFF, j), 0).to(tl.int64)
    if FORCED == _BY_ROW:
        count = tl.minimum(tl.load(forced + row * forced_stride).to(tl.int64), valid)
    if FORCED == _EVERYWHERE:
        count = tl.minimum(valid, forced_value)
    return count


@triton.jit
def _finish_row(
    row, W, num_chunks, drafts, drafts_stride, num_valid, tokens, num_accepted, broken, forced, forced_stride,
    forced_value, pieces, tops, committed, history, history_stride, history_len, num_tokens, last_slot, report,
    FORCED: tl.constexpr, COMMIT: tl.constexpr, WP: tl.constexpr, CP: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    j = tl.arange(0, WP)
    c = tl.arange(0, CP)
    at = (row * W + j)[:, None] * CP + c[None, :]
    there = (j < W)[:, None] & (c < num_chunks)[None, :]
    token = token_of(tl.max(tl.load(pieces + at, mask=there, other=-(2**63), cache_modifier=".cg"), 1))
    top = tl.max(tl.load(tops + at, mask=there, other=-float("inf"), cache_modifier=".cg"), 1)
    draft = tl.load(drafts + row * drafts_stride + j, mask=j < W - 1, other=-1)
    drafted = tl.load(num_valid + row)
    valid = tl.minimum(drafted, W - 1)
    count = num_matching(token == draft, valid, forced, forced_stride, forced_value, row, j, FORCED)
    tl.store(tokens + row * W + j, token, mask=j < W)
    tl.store(num_accepted + row, count)
    unusable = (tl.abs(top) == float("inf")) & (j <= count) & (j < W)
    is_broken = tl.max(unusable.to(tl.int32), 0) != 0
    tl.store(broken + row, is_broken)
    if COMMIT:  # every program of the row has read `num_tokens` before it arrived
        commit_row(
            row, j, token, count + 1, drafted, is_broken, committed, history, history_stride, history_len, num_tokens,
            last_slot, report, W,
        )  # fmt: skip


@triton.jit
def _verify_kernel(
    logits, stride, V, drafts, drafts_stride, num_valid, tokens, num_accepted, broken, forced, forced_stride,
    forced_value, slots, floats, ints, known, thresholds, pieces, tops, counters, W, num_blocks, num_chunks,
    committed, history, history_stride, history_len, num_tokens, last_slot, report,
    SAMPLED: tl.constexpr, FILTERED: tl.constexpr, FORCED: tl.constexpr, COMMIT: tl.constexpr, WP: tl.constexpr,
    CP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = position // W
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heat, noisy, key, threshold = 1.0, False, tl.full((), 0, tl.uint64), 0.0
    if SAMPLED:
        slot = tl.load(slots + row)
        heat, noisy = temperature_of(floats, slot), is_greedy(ints, slot) == 0
        key = key_of(ints, slot, tl.load(known + slot) + position % W, _TARGET)
    if FILTERED:
        threshold = tl.load(thresholds + position)
    piece, top = race(
        logits + position * stride, logits, V, chunk * num_blocks, num_blocks, heat, noisy, key, threshold,
        SAMPLED, FILTERED, False, BLOCK,
    )  # fmt: skip
    tl.store(pieces + position * CP + chunk, piece)
    tl.store(tops + position * CP + chunk, top)
    if is_last(counters + row, W * num_chunks):
        _finish_row(
            row, W, num_chunks, drafts, drafts_stride, num_valid, tokens, num_accepted, broken, forced, forced_stride,
            forced_value, pieces, tops, committed, history, history_stride, history_len, num_tokens, last_slot, report,
            FORCED, COMMIT, WP, CP,
        )  # fmt: skip


def forced_arguments(forced: Tensor | int | None, fallback: Tensor) -> tuple[Tensor, int, int, int]:
    """Pointer, stride, value and kind of a benchmark's synthetic acceptance."""
    if forced is None:
        return fallback, 0, 0, NOT_FORCED
    if isinstance(forced, int):
        return fallback, 0, forced, FORCED_EVERYWHERE
    return forced, forced.stride(0) if forced.numel() > 1 else 0, 0, FORCED_BY_ROW


def outputs(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for a verdict: tokens [R, W] int64, accepted [R] int64, broken [R] bool."""
    tokens = torch.empty(num_rows, width, dtype=torch.int64, device=device)
    num_accepted = torch.empty(num_rows, dtype=torch.int64, device=device)
    return tokens, num_accepted, torch.empty(num_rows, dtype=torch.bool, device=device)


def check_shapes(logits: Tensor, drafts: Tensor) -> tuple[int, int]:
    """Rows and width (1 + drafts) of a step. ValueError: the two tensors do not belong together."""
    num_rows, width = drafts.shape[0], drafts.shape[1] + 1
    if logits.shape[0] != num_rows * width or logits.stride(1) != 1:
        raise ValueError(f"logits: {tuple(logits.shape)} is not valid; use [{num_rows * width}, V], contiguous rows")
    return num_rows, width


def commit_arguments(
    commit: Commit | None, num_rows: int, width: int, fallback: Tensor
) -> tuple[Tensor, Tensor, int, int, Tensor, int, Tensor]:
    """What a kernel takes of `commit`; nothing that it looks at if there is none."""
    if commit is None:
        return fallback, fallback, 0, 0, fallback, 0, fallback
    return check_commit(commit, num_rows, width)


def _launch(
    logits: Tensor,
    drafts: Tensor,
    num_valid: Tensor,
    rows: tuple[Tensor, ...],
    thresholds: Tensor | None,
    forced_accepted: Tensor | int | None,
    commit: Commit | None,
    pdl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, width = check_shapes(logits, drafts)
    num_positions, vocab_size = logits.shape
    device = logits.device
    num_chunks, num_blocks, bound = chunks(num_positions, vocab_size, device)
    tokens, num_accepted, broken = outputs(num_rows, width, device)
    pieces = torch.empty(num_positions * bound, dtype=torch.int64, device=device)
    tops = torch.empty(num_positions * bound, dtype=torch.float32, device=device)
    forced, forced_stride, forced_value, kind = forced_arguments(forced_accepted, num_valid)
    slots, floats, ints, known = rows or (num_valid,) * 4
    _verify_kernel[(num_positions, num_chunks)](
        logits, logits.stride(0), vocab_size, drafts, drafts.stride(0), num_valid, tokens, num_accepted, broken,
        forced, forced_stride, forced_value, slots, floats, ints, known,
        num_valid if thresholds is None else thresholds, pieces, tops, counters(num_rows, device), width, num_blocks,
        num_chunks, *commit_arguments(commit, num_rows, width, num_valid),
        SAMPLED=bool(rows), FILTERED=thresholds is not None, FORCED=kind, COMMIT=commit is not None,
        WP=runtime.next_power_of_2(width), CP=bound, BLOCK=BLOCK, PDL=pdl, num_warps=WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return tokens, num_accepted, broken


def greedy_verify(
    logits: Tensor,
    drafts: Tensor,
    num_valid: Tensor,
    forced_accepted: Tensor | int | None = None,
    *,
    commit: Commit | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every position's most probable token and how many drafts agree: tokens [R, W], accepted [R], broken [R].

    `logits` [R * W, V], float32 or 16 bits, rows contiguous; `drafts` [R, W - 1] int64, `num_valid` [R] int64. Tokens
    and counts are int64; the lowest id wins among equals. `broken` (bool) says that an emitted position has no finite
    largest logit: a NaN or inf in it, or nothing above -inf. `forced_accepted` ([R], one element, or an int) is a
    benchmark's synthetic acceptance: that many drafts, at most `num_valid`, count as accepted whatever matched.
    `commit` (slots, history, num_tokens, S, report) is carried out by the same launch, as `commit_reference` does with
    the result, `num_valid` being what was drafted. ValueError: shapes that do not fit.
    """
    return _launch(logits, drafts, num_valid, (), None, forced_accepted, commit, pdl)


def sampled_verify_by_slot(
    logits: Tensor,
    drafts: Tensor,
    num_valid: Tensor,
    slots: Tensor,
    floats: Tensor,
    ints: Tensor,
    num_tokens: Tensor,
    any_filter: bool,
    forced_accepted: Tensor | int | None = None,
    *,
    commit: Commit | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `greedy_verify`, where every row samples as its slot says: the rule `coupled`.

    `slots` [R] int64 index `floats` [S, 6], `ints` [S, 5] (`server.kernels.slots`) and `num_tokens` [S] int64:
    `num_tokens[slot] + j` is the position of offset j. Greedy slots get neither noise nor filter. `any_filter` (host)
    says whether any row may have one; without, nothing is searched.
    """
    thresholds = None
    if any_filter:
        thresholds = filter_threshold_by_slot(logits, drafts.shape[1] + 1, slots, floats, ints, pdl=pdl)
    rows = (slots, floats, ints, num_tokens)
    return _launch(logits, drafts, num_valid, rows, thresholds, forced_accepted, commit, pdl)


def greedy_verify_reference(logits: Tensor, drafts: Tensor, num_valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `greedy_verify` computes, with torch; logits without a NaN give the same tokens."""
    num_rows, width = check_shapes(logits, drafts)
    tokens = argmax_reference(logits.float()).view(num_rows, width).clamp(max=logits.shape[1] - 1)
    steps = torch.arange(width, device=logits.device)
    matches = (tokens[:, :-1] == drafts) & (steps[:-1] < num_valid[:, None])
    num_accepted = matches.to(torch.int64).cumprod(1).sum(1)
    unusable = ~logits.float().amax(1).isfinite().view(num_rows, width)
    return tokens, num_accepted, (unusable & (steps <= num_accepted[:, None])).any(1)
