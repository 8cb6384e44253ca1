"""The end of a step: append what was emitted to every slot, and write the host's report.

It is part of the verification kernels: the program that finishes a row commits it, so a step needs no launch more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_REPORTED = 3
"""Integers of a row's report besides its tokens: emitted, drafted, broken."""
Commit = tuple[Tensor, Tensor, Tensor, int, Tensor]
"""slots [R], history [S, L], num_tokens [S], S, report [R * (W + 3)]: int64; the report is written."""
_REPORTED = tl.constexpr(NUM_REPORTED)


@triton.jit
def commit_row(
    row, j, token, emitted, drafted, broken, slots, history, history_stride, history_len, num_tokens, last_slot,
    report, W,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Appends a row's first `emitted` of `token` [WP] to its slot and reports it. Whoever needs the slot's old
    `num_tokens` has read it."""
    slot = tl.load(slots + row).to(tl.int64)
    known = tl.load(num_tokens + slot)
    tl.debug_barrier()  # every warp has read it before one thread writes
    at = known + j
    is_real = slot < last_slot
    is_new = (j < W) & (j < emitted) & (at < history_len) & is_real
    tl.store(history + slot * history_stride + at, token, mask=is_new)
    tl.store(num_tokens + slot, tl.minimum(known + emitted, history_len), mask=is_real)
    line = report + row * (W + _REPORTED)
    tl.store(line + j, token, mask=j < W)
    tl.store(line + W, emitted)
    tl.store(line + W + 1, drafted)
    tl.store(line + W + 2, broken.to(tl.int64))


def check_commit(commit: Commit, num_rows: int, width: int) -> tuple[Tensor, Tensor, int, int, Tensor, int, Tensor]:
    """What `commit_row` takes from slots on. ValueError: the report has another size or history is not contiguous."""
    slots, history, num_tokens, num_slots, report = commit
    if report.numel() != num_rows * (width + NUM_REPORTED) or not report.is_contiguous():
        raise ValueError(f"report: {tuple(report.shape)} is not valid; use [{num_rows * (width + NUM_REPORTED)}]")
    if history.stride(1) != 1:
        raise ValueError(f"history: strides {history.stride()} are not valid; use contiguous rows")
    return slots, history, history.stride(0), history.shape[1], num_tokens, num_slots - 1, report


def commit_reference(
    tokens: Tensor,
    num_accepted: Tensor,
    num_drafted: Tensor,
    broken: Tensor,
    slots: Tensor,
    history: Tensor,
    num_tokens: Tensor,
    num_slots: int,
    report: Tensor,
) -> None:
    """What a verification with a `commit` does besides its verdict, row by row, on the host.

    Appends each row's `num_accepted` + 1 of `tokens` [R, W] to its slot and reports (tokens, emitted, drafted, broken);
    `num_accepted`, `num_drafted`, `slots` [R] int64, `broken` [R] bool; in place: `history` [S, L], `num_tokens` [S],
    `report` [R * (W + 3)], all int64. Slot `num_slots` - 1 is nobody's and stays as it is. Tokens past L are dropped
    and `num_tokens` stops at L.
    """
    numbers = torch.stack([num_accepted + 1, num_drafted, broken.to(torch.int64)], 1)
    report.copy_(torch.cat([tokens, numbers], 1).reshape(report.shape))
    for row, slot in enumerate(slots.tolist()):
        if slot < num_slots - 1:
            start = int(num_tokens[slot])
            end = min(start + int(num_accepted[row]) + 1, history.shape[1])
            history[slot, start:end] = tokens[row, : end - start]
            num_tokens[slot] = end
