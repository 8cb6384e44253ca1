"""Log-probabilities of given tokens and of the most probable ones: `server.sampling.logprobs` in one launch.

Every program takes a block of one position's vocabulary: the sum of its exponentials, and its best tokens, the largest
piece (`server.kernels.argmax`) again and again. The last of a position puts sums and pieces together. Nothing of the
vocabulary's size is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime
from server.kernels.argmax import counters, is_last, pack, token_of, unordered
from server.kernels.noise import exp, log

SCORE_BLOCK = 64 if runtime.INTERPRETED else 4096
MAX_TOP = 32
_NONE = tl.constexpr(-(2**63))
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _largest(pieces, num, NP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The `num` largest of int64 `pieces`, all different, in descending order, [NP]."""
    lanes = tl.arange(0, NP)
    found = tl.full((NP,), _NONE, tl.int64)
    for i in range(num):
        best = tl.max(pieces, 0)
        found = tl.where(lanes == i, best, found)
        pieces = tl.where(pieces == best, _NONE, pieces)
    return found


@triton.jit
def _score_kernel(
    logits, stride, V, tokens, chosen, ids, values, highs, sums, pieces, counters, num_top, num_blocks,
    CP: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(logits + position * stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    x = tl.where(tl.abs(x) < float("inf"), x, -float("inf"))
    high = tl.maximum(tl.max(x, 0), _LOWEST)
    at, lanes = position * CP + block, tl.arange(0, NP)
    tl.store(highs + at, high)
    tl.store(sums + at, tl.sum(exp(x - high), 0))
    best = _largest(tl.where(columns < V, pack(x, columns), _NONE), num_top, NP)
    tl.store(pieces + at * NP + lanes, best)
    if is_last(counters + position, num_blocks):
        c = tl.arange(0, CP)
        tops = tl.load(highs + position * CP + c, mask=c < num_blocks, other=_LOWEST, cache_modifier=".cg")
        parts = tl.load(sums + position * CP + c, mask=c < num_blocks, other=0.0, cache_modifier=".cg")
        peak = tl.max(tops, 0)
        total = tl.sum(parts * exp(tops - peak), 0)
        rest = log(tl.maximum(total, 1e-30))  # 1 at least, but for a position with nothing in it
        i = tl.arange(0, CP * NP)
        every = tl.load(pieces + position * CP * NP + i, mask=i < num_blocks * NP, other=_NONE, cache_modifier=".cg")
        found = _largest(every, num_top, NP)
        to = position * num_top + lanes
        tl.store(ids + to, token_of(found), mask=lanes < num_top)
        tl.store(values + to, unordered((found >> 32).to(tl.int32)) - peak - rest, mask=lanes < num_top)
        token = tl.minimum(tl.maximum(tl.load(tokens + position), 0), V - 1)
        tl.store(chosen + position, tl.load(logits + position * stride + token).to(tl.float32) - peak - rest)


def score_tokens(logits: Tensor, tokens: Tensor, num_top: int, *, pdl: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Natural-log probabilities of `tokens` [T] int64 under `logits` [T, V], and the `num_top` best at each position.

    chosen [T] float32; ids [T, n] int64 and values [T, n] float32, most probable first, the lowest id among equals, n =
    min(`num_top`, V). `logits`: float32 or 16 bits, rows contiguous. Where one is NaN or inf the result means nothing,
    but for the ids, which are tokens. ValueError: `num_top` above MAX_TOP, or logits that are strided.
    """
    num_positions, vocab_size = logits.shape
    device = logits.device
    if not 0 <= num_top <= MAX_TOP:
        raise ValueError(f"num_top: {num_top} is not valid; use 0 to {MAX_TOP}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits: strides {logits.stride()} are not valid; use contiguous rows")
    count = min(num_top, vocab_size)
    num_blocks = runtime.ceil_div(vocab_size, SCORE_BLOCK)
    bound = runtime.next_power_of_2(num_blocks)
    padded = runtime.next_power_of_2(max(count, 1))
    highs, sums = torch.empty(2, num_positions * bound, dtype=torch.float32, device=device).unbind(0)
    pieces = torch.empty(num_positions * bound * padded, dtype=torch.int64, device=device)
    chosen = torch.empty(num_positions, dtype=torch.float32, device=device)
    ids = torch.empty(num_positions, count, dtype=torch.int64, device=device)
    values = torch.empty(num_positions, count, dtype=torch.float32, device=device)
    if num_positions:
        _score_kernel[(num_positions, num_blocks)](
            logits, logits.stride(0), vocab_size, tokens, chosen, ids, values, highs, sums, pieces,
            counters(num_positions, device), count, num_blocks, CP=bound, NP=padded, BLOCK=SCORE_BLOCK, PDL=pdl,
            num_warps=8, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return chosen, ids, values


def score_tokens_reference(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `score_tokens` computes, with torch."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return logprobs.gather(1, tokens[:, None]).squeeze(1), ids[:, :num_top], values[:, :num_top]
