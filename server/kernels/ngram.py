"""Prompt lookup in one kernel: the longest n-gram at a row's end that ended before, and what followed it.

Saxena, "Prompt lookup decoding" (2023); the choices (most recent match, overlapping copy) are explained at
`draft_models.ngram.lookup`, whose results these are. The programs of a row share out its history; the last to arrive
takes the best match, one int32 for (n, end), and copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime
from server.kernels.argmax import counters, is_last

_BLOCK = 16 if runtime.INTERPRETED else 1024
_PROGRAMS_PER_SM = 2


@triton.jit
def _ngram_kernel(
    history, stride, slots, num_tokens, limits, tokens, matched, best, counters, k, num_programs,
    MIN_N: tl.constexpr, MAX_N: tl.constexpr, LIMITED: tl.constexpr, KP: tl.constexpr, PP: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + row)
    length = tl.load(num_tokens + slot).to(tl.int32)
    history += slot * stride
    last = length - 1
    lanes = tl.arange(0, BLOCK)
    found = tl.full((BLOCK,), -1, tl.int64)
    for start in range(program * BLOCK, last, num_programs * BLOCK):
        ends = start + lanes
        n = tl.zeros((BLOCK,), tl.int32)
        running = ends < last
        for offset in tl.static_range(MAX_N):
            # Nothing lies before the first token; a row shorter than the n-gram can not match that far.
            wanted = tl.load(history + tl.maximum(last - offset, 0))
            there = tl.load(history + ends - offset, mask=running & (ends >= offset), other=-1)
            running = running & (ends >= offset) & (there == wanted)
            n += running.to(tl.int32)
        found = tl.maximum(found, tl.where(n >= MIN_N, (n.to(tl.int64) << 32) | ends, -1))
    tl.store(best + row * PP + program, tl.max(found, 0))
    if is_last(counters + row, num_programs):
        p = tl.arange(0, PP)
        piece = tl.max(tl.load(best + row * PP + p, mask=p < num_programs, other=-1, cache_modifier=".cg"), 0)
        end = tl.where(piece < 0, 0, piece & 0xFFFFFFFF).to(tl.int32)
        j = tl.arange(0, KP)
        source = end + 1 + j % tl.maximum(last - end, 1)
        copied = tl.load(history + tl.minimum(source, tl.maximum(last, 0)), mask=j < k, other=0)
        tl.store(tokens + row * k + j, copied, mask=j < k)
        length_found = tl.where(piece < 0, 0, piece >> 32)
        if LIMITED:  # how many drafts count, instead of n
            length_found = tl.where(piece < 0, 0, tl.minimum(tl.load(limits + row), k))
        tl.store(matched + row, length_found)


def ngram_draft(
    history: Tensor,
    slots: Tensor,
    num_tokens: Tensor,
    k: int,
    min_n: int,
    max_n: int,
    limits: Tensor | None = None,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Drafts [R, k] int64 and the matched n [R] int64, 0 where nothing of at least `min_n` tokens matches.

    `history` [S, L] int64 by slot, of which the first `num_tokens` [S] int64 are known (at least 1) and only they are
    read; `slots` [R] int64. Drafts are valid ids everywhere. With `limits` [R] int64 the second result is instead how
    many drafts count: `min(limit, k)` where there is a match, else 0. L is at most 2**31.
    """
    num_rows, device = slots.shape[0], history.device
    # As many programs as a full history could use, within what runs at once: how full it is only the device knows.
    most = runtime.ceil_div(_PROGRAMS_PER_SM * runtime.num_sms(device), max(1, num_rows))
    num_programs = max(1, min(64, most, runtime.ceil_div(history.shape[1], _BLOCK)))
    tokens = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    matched = torch.empty(num_rows, dtype=torch.int64, device=device)
    best = torch.empty(num_rows * 64, dtype=torch.int64, device=device)
    _ngram_kernel[(num_rows, num_programs)](
        history, history.stride(0), slots, num_tokens, num_tokens if limits is None else limits, tokens, matched, best,
        counters(num_rows, device), k, num_programs, MIN_N=min_n, MAX_N=max_n, LIMITED=limits is not None,
        KP=runtime.next_power_of_2(k), PP=64, BLOCK=_BLOCK, PDL=pdl, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return tokens, matched


def ngram_reference(tokens: list[int], k: int, min_n: int, max_n: int) -> tuple[list[int], int]:
    """The same for one row of known `tokens`: drafts ([] without a match) and the matched n."""
    for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                return [tokens[end + j % (len(tokens) - end)] for j in range(k)], n
    return [], 0
