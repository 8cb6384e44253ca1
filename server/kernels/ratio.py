"""Verification by rejection sampling: the rule `ratio` of `server.spec.verify`.

Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"; Chen et al. 2023, "Accelerating
large language model decoding with speculative sampling". Two launches after the filters'. The first sums
exp(logit / temperature) of what the filters left, block by block, and the last program of a row accepts: draft d stands
if u * q(d) < p(d). The second draws from max(p - q, 0) at the one position where that ends, or from p if nothing was
rejected there. Sums are by block whatever the batch is, so a row's probabilities depend on nothing but the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime
from server.kernels.argmax import BLOCK, WARPS, best_of, chunks, counters, is_last, token_of
from server.kernels.commit import Commit, commit_row
from server.kernels.noise import ACCEPT, RESIDUAL, exp, gumbel_of, log, noise_bits, uniform_of
from server.kernels.slots import is_greedy, key_of, temperature_of
from server.kernels.threshold import filter_threshold_by_slot
from server.kernels.verify import check_shapes, commit_arguments, forced_arguments, num_matching, outputs

_ACCEPT, _RESIDUAL = tl.constexpr(ACCEPT), tl.constexpr(RESIDUAL)
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _kept(logits, columns, V, temperature, threshold):  # type: ignore[no-untyped-def]
    """Logits, and their quotients by the temperature with -inf where they were filtered out."""
    raw = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    x = tl.minimum(tl.div_rn(tl.where(raw == raw, raw, -float("inf")), temperature), 3.0e38)
    return raw, tl.where(x >= threshold, x, -float("inf"))


@triton.jit
def _accept_row(
    row, logits, stride, V, drafts, drafts_stride, num_valid, probs, probs_row, probs_draft, tokens, num_accepted,
    broken, forced, forced_stride, forced_value, slots, floats, ints, known, thresholds, highs, sums, pieces, tops,
    peaks, totals, W, num_blocks,
    FILTERED: tl.constexpr, WITH_Q: tl.constexpr, FORCED: tl.constexpr, WP: tl.constexpr, CP: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    j = tl.arange(0, WP)
    c = tl.arange(0, CP)
    at = (row * W + j)[:, None] * CP + c[None, :]
    there = (j < W)[:, None] & (c < num_blocks)[None, :]
    best = token_of(tl.max(tl.load(pieces + at, mask=there, other=-(2**63), cache_modifier=".cg"), 1))
    top = tl.max(tl.load(tops + at, mask=there, other=-float("inf"), cache_modifier=".cg"), 1)
    high = tl.load(highs + at, mask=there, other=_LOWEST, cache_modifier=".cg")
    peak = tl.max(high, 1)
    total = tl.sum(tl.load(sums + at, mask=there, other=0.0, cache_modifier=".cg") * exp(high - peak[:, None]), 1)
    total = tl.maximum(total, 1e-30)  # the most probable token's is 1; less is a broken position's, or no position's
    tl.store(peaks + row * W + j, peak, mask=j < W)
    tl.store(totals + row * W + j, total, mask=j < W)

    draft = tl.load(drafts + row * drafts_stride + j, mask=j < W - 1, other=0)
    x = tl.load(logits + (row * W + j) * stride + draft, mask=j < W - 1, other=-float("inf")).to(tl.float32)
    slot = tl.load(slots + row)
    x = tl.div_rn(tl.where(x == x, x, -float("inf")), temperature_of(floats, slot))
    p = tl.div_rn(exp(x - peak), total)
    if FILTERED:
        p = tl.where(x >= tl.load(thresholds + row * W + j, mask=j < W, other=0.0), p, 0.0)
    if is_greedy(ints, slot):
        p = (draft == best).to(tl.float32)
    q = tl.full((WP,), 1.0, tl.float32)
    if WITH_Q:
        q = tl.load(probs + row * probs_row + j * probs_draft + draft, mask=j < W - 1, other=1.0)
    u = uniform_of(key_of(ints, slot, tl.load(known + slot) + j, _ACCEPT))
    valid = tl.minimum(tl.load(num_valid + row), W - 1)
    accepts = u * q.to(tl.float64) < p.to(tl.float64)
    count = num_matching(accepts, valid, forced, forced_stride, forced_value, row, j, FORCED)
    tl.store(tokens + row * W + j, draft, mask=j < W)
    tl.store(num_accepted + row, count)
    unusable = (tl.abs(top) == float("inf")) & (j <= count) & (j < W)
    tl.store(broken + row, tl.max(unusable.to(tl.int32), 0) != 0)


@triton.jit
def _accept_kernel(
    logits, stride, V, drafts, drafts_stride, num_valid, probs, probs_row, probs_draft, tokens, num_accepted, broken,
    forced, forced_stride, forced_value, slots, floats, ints, known, thresholds, highs, sums, pieces, tops, peaks,
    totals, counters, W, num_blocks, per_chunk, num_chunks,
    FILTERED: tl.constexpr, WITH_Q: tl.constexpr, FORCED: tl.constexpr, WP: tl.constexpr, CP: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    row = position // W
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heat, threshold = temperature_of(floats, tl.load(slots + row)), -float("inf")
    if FILTERED:
        threshold = tl.load(thresholds + position)
    first = tl.program_id(1) * per_chunk
    for block in range(first, tl.minimum(first + per_chunk, num_blocks)):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        raw, x = _kept(logits + position * stride, columns, V, heat, threshold)
        high = tl.maximum(tl.max(x, 0), _LOWEST)
        at = position * CP + block
        tl.store(highs + at, high)
        tl.store(sums + at, tl.sum(exp(x - high), 0))
        tl.store(tops + at, tl.max(tl.where(raw == raw, raw, float("inf")), 0))
        tl.store(pieces + at, best_of(tl.where(raw == raw, raw, -float("inf")), tl.minimum(columns, V - 1)))
    if is_last(counters + row, W * num_chunks):
        _accept_row(
            row, logits, stride, V, drafts, drafts_stride, num_valid, probs, probs_row, probs_draft, tokens,
            num_accepted, broken, forced, forced_stride, forced_value, slots, floats, ints, known, thresholds, highs,
            sums, pieces, tops, peaks, totals, W, num_blocks, FILTERED, WITH_Q, FORCED, WP, CP,
        )  # fmt: skip


@triton.jit
def _residual_kernel(
    logits, stride, V, drafts, drafts_stride, num_valid, probs, probs_row, probs_draft, tokens, num_accepted, broken,
    slots, floats, ints, known, thresholds, pieces, peaks, totals, residuals, counters, W, num_blocks, per_chunk,
    num_chunks, committed, history, history_stride, history_len, num_tokens, last_slot, report,
    FILTERED: tl.constexpr, WITH_Q: tl.constexpr, COMMIT: tl.constexpr, WP: tl.constexpr, CP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(num_accepted + row)
    position = row * W + count
    drafted = tl.load(num_valid + row)
    rejected = count < tl.minimum(drafted, W - 1)
    draft = tl.load(drafts + row * drafts_stride + count, mask=rejected, other=-1)
    slot = tl.load(slots + row)
    heat, threshold = temperature_of(floats, slot), -float("inf")
    if FILTERED:
        threshold = tl.load(thresholds + position)
    peak, total = tl.load(peaks + position), tl.load(totals + position)
    c = tl.arange(0, CP)
    takes_best = is_greedy(ints, slot)
    best = tl.max(tl.load(pieces + position * CP + c, mask=c < num_blocks, other=-(2**63)), 0)
    key = key_of(ints, slot, tl.load(known + slot) + count, _RESIDUAL)
    of_residual, of_target = tl.full((), -(2**63), tl.int64), tl.full((), -(2**63), tl.int64)
    first = tl.program_id(1) * per_chunk
    for block in range(first, tl.minimum(first + per_chunk, num_blocks)):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = columns < V
        _, x = _kept(logits + position * stride, columns, V, heat, threshold)
        p = tl.div_rn(exp(x - peak), total)
        if takes_best:
            p = (columns == token_of(best)).to(tl.float32)
        q = (columns == draft).to(tl.float32)
        if WITH_Q:
            at = probs + row * probs_row + count * probs_draft + columns
            q = tl.load(at, mask=inside & (draft >= 0), other=0.0)
        left = tl.maximum(p - q, 0.0)
        noise = gumbel_of(noise_bits(key, columns))
        # Weights of zero get a score below every other's: log(1.2e-38) - 2.9 is above it.
        score = tl.where(inside & (left > 0.0), log(tl.maximum(left, 1.2e-38)) + noise, -1000.0)
        of_residual = tl.maximum(of_residual, best_of(score, tl.minimum(columns, V - 1)))
        score = tl.where(inside & (p > 0.0), log(tl.maximum(p, 1.2e-38)) + noise, -1000.0)
        of_target = tl.maximum(of_target, best_of(score, tl.minimum(columns, V - 1)))
    chunk = row * 2 * CP + tl.program_id(1)
    tl.store(residuals + chunk, of_residual)
    tl.store(residuals + chunk + CP, of_target)
    if is_last(counters + row, num_chunks):
        at = residuals + row * 2 * CP + c
        piece = tl.max(tl.load(at, mask=c < num_chunks, other=-(2**63), cache_modifier=".cg"), 0)
        instead = tl.max(tl.load(at + CP, mask=c < num_chunks, other=-(2**63), cache_modifier=".cg"), 0)
        # Rounding can leave nothing where p and q all but agree, and then p is the answer.
        nothing = best_of(tl.full((CP,), -1000.0, tl.float32), tl.zeros((CP,), tl.int32))
        drawn = token_of(tl.where(piece <= nothing, instead, piece))
        tl.store(tokens + row * W + count, drawn)
        if COMMIT:  # every program of the row has read `known` before it arrived
            j = tl.arange(0, WP)
            token = tl.where(j == count, drawn, tl.load(tokens + row * W + j, mask=(j < W) & (j != count), other=0))
            commit_row(
                row, j, token, count + 1, drafted, tl.load(broken + row) != 0, committed, history, history_stride,
                history_len, num_tokens, last_slot, report, W,
            )  # fmt: skip


def ratio_verify_by_slot(
    logits: Tensor,
    drafts: Tensor,
    num_valid: Tensor,
    probs: Tensor | None,
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
    """Tokens [R, W], accepted [R], broken [R] under the rule `ratio`; arguments as `sampled_verify_by_slot`'s.

    `probs` [R, W - 1, V] float32 is what each draft was drawn from; None means point masses.
    """
    num_rows, width = check_shapes(logits, drafts)
    num_positions, vocab_size = logits.shape
    device = logits.device
    rows = (slots, floats, ints, num_tokens)
    thresholds = floats
    if any_filter:
        thresholds = filter_threshold_by_slot(logits, width, slots, floats, ints, pdl=pdl)
    num_blocks = runtime.ceil_div(vocab_size, BLOCK)
    num_chunks, per_chunk, bound = chunks(num_positions, vocab_size, device)
    tokens, num_accepted, broken = outputs(num_rows, width, device)
    highs, sums, tops = torch.empty(3, num_positions * bound, dtype=torch.float32, device=device).unbind(0)
    pieces = torch.empty(num_positions * bound, dtype=torch.int64, device=device)
    peaks, totals = torch.empty(2, num_positions, dtype=torch.float32, device=device).unbind(0)
    count = counters(num_rows, device)
    q = floats if probs is None else probs
    strides = (0, 0) if probs is None else (probs.stride(0), probs.stride(1))
    steps = (logits, logits.stride(0), vocab_size, drafts, drafts.stride(0), num_valid, q, *strides)
    forced, forced_stride, forced_value, kind = forced_arguments(forced_accepted, num_valid)
    how = {"FILTERED": any_filter, "WITH_Q": probs is not None, "WP": runtime.next_power_of_2(width), "CP": bound}
    _accept_kernel[(num_positions, num_chunks)](
        *steps, tokens, num_accepted, broken, forced, forced_stride, forced_value, *rows, thresholds, highs, sums,
        pieces, tops, peaks, totals, count, width, num_blocks, per_chunk, num_chunks,
        FORCED=kind, BLOCK=BLOCK, PDL=pdl, num_warps=WARPS, **how, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    residuals = torch.empty(num_rows * 2 * bound, dtype=torch.int64, device=device)
    num_chunks, per_chunk, _ = chunks(num_rows, vocab_size, device)
    _residual_kernel[(num_rows, num_chunks)](
        *steps, tokens, num_accepted, broken, *rows, thresholds, pieces, peaks, totals, residuals, count, width,
        num_blocks, per_chunk, num_chunks, *commit_arguments(commit, num_rows, width, num_valid),
        COMMIT=commit is not None, BLOCK=BLOCK, num_warps=WARPS, **how,
    )  # fmt: skip
    return tokens, num_accepted, broken
