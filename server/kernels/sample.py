"""Sampling by Gumbel race: argmax(logit / temperature + noise), and the one draft token a drafter draws with it.

The race never sees probabilities, and hardly any noise: -log(-log(1 - v)) <= -log(v), where v is what a token's noise
is made of, so a token whose logit - log(v) is below a score that was found can not win.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime
from server.kernels.argmax import BLOCK, WARPS, best_of, chunks, counters, is_last, token_of
from server.kernels.noise import DRAFT, TARGET, exp, gumbel_of, noise_bits
from server.kernels.slots import is_greedy, key_of, temperature_of


@triton.jit
def _load(logits, ids, V, columns, MAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits (float32) of a block with -inf for NaN, the same with inf for NaN, and token ids (int32)."""
    inside = columns < V
    x = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
    name = columns
    if MAPPED:
        name = tl.load(ids + columns, mask=inside, other=0).to(tl.int32)
    return tl.where(x == x, x, -float("inf")), tl.where(x == x, x, float("inf")), name


@triton.jit
def _scaled(x, temperature, threshold, FILTERED: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.minimum(tl.div_rn(x, temperature), 3.0e38)  # finite, or `low` is not a number
    if FILTERED:
        x = tl.where(x >= threshold, x, -float("inf"))
    return x


@triton.jit
def _bound(x, bits):  # type: ignore[no-untyped-def]
    """What the score of logits `x` with noise of `bits` does not pass, rounding aside."""
    v = tl.abs(bits.to(tl.int32, bitcast=True).to(tl.float32) + 0.25) * 4.656612873077393e-10
    return x - 0.6931472 * tl.log2(v)


@triton.jit
def _slack(score):  # type: ignore[no-untyped-def]
    """A bound below this belongs to a score below `score`."""
    return score - 0.01 - tl.abs(score) * 1e-6


@triton.jit
def _first_names(ids, V, first, lanes, MAPPED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    name = tl.minimum(first * BLOCK + lanes, V - 1)
    if MAPPED:
        name = tl.load(ids + name).to(tl.int32)
    return name


@triton.jit
def _plain_race(logits, ids, V, first, num_blocks, MAPPED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit's piece, without noise."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    top = best
    token = _first_names(ids, V, first, lanes, MAPPED, BLOCK)
    for i in range(num_blocks):
        x, checked, name = _load(logits, ids, V, (first + i) * BLOCK + lanes, MAPPED)
        top = tl.maximum(top, checked)
        wins = (x > best) | ((x == best) & (name < token)) if MAPPED else x > best
        best = tl.where(wins, x, best)
        token = tl.where(wins, name, token)
    return best_of(best, token), tl.max(top, 0)


@triton.jit
def _careful_race(
    logits, ids, V, first, num_blocks, temperature, key, threshold,
    FILTERED: tl.constexpr, MAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """The noisy race's piece, block by block: right whatever the logits are."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    token = _first_names(ids, V, first, lanes, MAPPED, BLOCK)
    high = -float("inf")
    for i in range(num_blocks):
        x, _, name = _load(logits, ids, V, (first + i) * BLOCK + lanes, MAPPED)
        x = _scaled(x, temperature, threshold, FILTERED)
        bits = noise_bits(key, name)
        if tl.max(_bound(x, bits), 0) >= _slack(high):
            score = x + gumbel_of(bits)
            wins = (score > best) | ((score == best) & (name < token))
            best = tl.where(wins, score, best)
            token = tl.where(wins, name, token)
            high = tl.max(best, 0)
    return best_of(best, token)


@triton.jit
def _noisy_race(
    logits, ids, V, first, num_blocks, temperature, key, threshold,
    FILTERED: tl.constexpr, MAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """The noisy race's piece: every lane keeps the token with its largest bound, and only those get their noise.

    The next best bound of each lane shows whether that was enough. It is not when two of the best few tokens share a
    lane: once in some hundred programs.
    """
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    second, top = best, best
    block = tl.zeros((BLOCK,), tl.int32)
    for i in range(num_blocks):
        x, checked, name = _load(logits, ids, V, (first + i) * BLOCK + lanes, MAPPED)
        top = tl.maximum(top, checked)
        bound = _bound(_scaled(x, temperature, threshold, FILTERED), noise_bits(key, name))
        second = tl.maximum(second, tl.minimum(best, bound))
        block = tl.where(bound > best, i, block)
        best = tl.maximum(best, bound)
    columns = (first + block) * BLOCK + lanes
    x, _, name = _load(logits, ids, V, columns, MAPPED)
    name = tl.where(columns < V, name, _first_names(ids, V, first, lanes, MAPPED, BLOCK))
    score = _scaled(x, temperature, threshold, FILTERED) + gumbel_of(noise_bits(key, name))
    piece = best_of(score, name)
    high = tl.max(score, 0)
    if (high > -float("inf")) & (tl.max(second, 0) >= _slack(high)):
        piece = _careful_race(logits, ids, V, first, num_blocks, temperature, key, threshold, FILTERED, MAPPED, BLOCK)
    return piece, tl.max(top, 0)


@triton.jit
def race(
    logits, ids, V, first, num_blocks, temperature, noisy, key, threshold,
    SAMPLED: tl.constexpr, FILTERED: tl.constexpr, MAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Winning piece of blocks `first` … of one position, and their largest logit: inf if there is a NaN.

    Not SAMPLED, or not `noisy`: the plain argmax. FILTERED: quotients below `threshold` do not take part. MAPPED: `ids`
    names columns.
    """
    if SAMPLED:
        if noisy:
            piece, top = _noisy_race(
                logits, ids, V, first, num_blocks, temperature, key, threshold, FILTERED, MAPPED, BLOCK
            )
        else:
            piece, top = _plain_race(logits, ids, V, first, num_blocks, MAPPED, BLOCK)
    else:
        piece, top = _plain_race(logits, ids, V, first, num_blocks, MAPPED, BLOCK)
    return piece, top


@triton.jit
def _draft_kernel(
    logits, stride, ids, C, slots, floats, ints, positions, tokens, pieces, counters,
    num_blocks, num_chunks,
    PURPOSE: tl.constexpr, SAMPLED: tl.constexpr, MAPPED: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heat, noisy, key = 1.0, False, tl.full((), 0, tl.uint64)
    if SAMPLED:
        slot = tl.load(slots + row)
        heat, noisy = temperature_of(floats, slot), is_greedy(ints, slot) == 0
        key = key_of(ints, slot, tl.load(positions + row), PURPOSE)
    piece, _ = race(
        logits + row * stride, ids, C, chunk * num_blocks, num_blocks, heat, noisy, key, 0.0,
        SAMPLED, False, MAPPED, BLOCK,
    )  # fmt: skip
    tl.store(pieces + row * CP + chunk, piece)
    if is_last(counters + row, num_chunks):
        c = tl.arange(0, CP)
        found = tl.load(pieces + row * CP + c, mask=c < num_chunks, other=-(2**63), cache_modifier=".cg")
        tl.store(tokens + row, token_of(tl.max(found, 0)))


@triton.jit
def _draft_probs_kernel(
    logits, stride, ids, C, V, slots, floats, ints, tokens, q,
    MAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Softmax of one row into `q`, in target ids; what no column names is zero already."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    slot = tl.load(slots + row)
    heat, noisy = temperature_of(floats, slot), is_greedy(ints, slot) == 0
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, C, BLOCK):
        columns = start + lanes
        x = tl.load(logits + row * stride + columns, mask=columns < C, other=-float("inf")).to(tl.float32)
        top = tl.maximum(top, x)
    peak = tl.div_rn(tl.max(top, 0), heat)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        columns = start + lanes
        x = tl.load(logits + row * stride + columns, mask=columns < C, other=-float("inf")).to(tl.float32)
        mass += exp(tl.div_rn(x, heat) - peak)
    total = tl.sum(mass, 0)
    token = tl.load(tokens + row)
    for start in range(0, C, BLOCK):
        columns = start + lanes
        inside = columns < C
        x = tl.load(logits + row * stride + columns, mask=inside, other=-float("inf")).to(tl.float32)
        name = columns.to(tl.int64)
        if MAPPED:
            name = tl.load(ids + columns, mask=inside, other=0).to(tl.int64)
        p = tl.div_rn(exp(tl.div_rn(x, heat) - peak), total)
        tl.store(q + row * V + name, tl.where(noisy, p, tl.where(name == token, 1.0, 0.0)), mask=inside)


def draft_sample_by_slot(
    logits: Tensor,
    slots: Tensor,
    floats: Tensor,
    ints: Tensor,
    positions: Tensor,
    vocab_ids: Tensor | None,
    rule: str,
    vocab_size: int | None = None,
    *,
    all_greedy: bool = False,
    pdl: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One draft token a row, [R] int64 in target ids, and q [R, vocab_size] float32 if `rule` is "ratio", else None.

    `logits` [R, C] of a drafter, any float dtype; `slots` [R] int64 index `floats` [S, 6] and `ints` [S, 5]
    (`server.kernels.slots`); `positions` [R] int64. `vocab_ids` [C] int64 are the target's ids of the columns, all
    different (None: column c is token c); `vocab_size` is then the target's. Under "coupled" the noise is the target's
    at that position, under "ratio" the drafter's own. One launch; two under "ratio" (three with `vocab_ids`).
    `all_greedy` (host) says that there is no need of noise; q is then None: a point mass. The reference is
    `server.spec.verify.draft_token`.
    """
    num_rows, num_columns = logits.shape
    num_chunks, num_blocks, bound = chunks(num_rows, num_columns, logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    pieces = torch.empty(num_rows * bound, dtype=torch.int64, device=logits.device)
    ids = logits if vocab_ids is None else vocab_ids
    _draft_kernel[(num_rows, num_chunks)](
        logits, logits.stride(0), ids, num_columns, slots, floats, ints, positions, tokens, pieces,
        counters(num_rows, logits.device), num_blocks, num_chunks,
        PURPOSE=TARGET if rule == "coupled" else DRAFT, SAMPLED=not all_greedy, MAPPED=vocab_ids is not None,
        CP=bound, BLOCK=BLOCK, PDL=pdl, num_warps=WARPS, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    if rule == "coupled" or all_greedy:
        return tokens, None
    size = num_columns if vocab_size is None else vocab_size
    make = torch.empty if vocab_ids is None else torch.zeros
    q = make(num_rows, size, dtype=torch.float32, device=logits.device)
    _draft_probs_kernel[(num_rows,)](
        logits, logits.stride(0), ids, num_columns, size, slots, floats, ints, tokens, q,
        MAPPED=vocab_ids is not None, BLOCK=runtime.next_power_of_2(min(num_columns, 2 * BLOCK)), num_warps=8,
    )  # fmt: skip
    return tokens, q
