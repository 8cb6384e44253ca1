"""Alignment of a continuation that the host predicted a step ago with what was really emitted since: one kernel.

The semantics of `draft_models.suffix.align`, and the number of drafts that count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime

_HEADER = 2


@triton.jit
def _align_kernel(
    uploads, stride, history, history_stride, history_length, slots, num_tokens, drafts, num_valid, width, k,
    WP: tl.constexpr, KP: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + row)
    uploads += row * stride
    seen = tl.load(uploads)
    unseen = tl.load(num_tokens + slot) - seen
    w = tl.arange(0, WP)
    places = tl.minimum(seen + w, history_length - 1)
    due = (w < width) & (w < unseen)
    predicted = tl.load(uploads + 2 + w, mask=due, other=0)
    emitted = tl.load(history + slot * history_stride + places, mask=due, other=0)
    on_track = tl.max((predicted != emitted).to(tl.int32), 0) == 0
    j = tl.arange(0, KP)
    source = unseen + j
    draft = tl.load(uploads + 2 + source, mask=(j < k) & (source >= 0) & (source < width), other=-1)
    # A prediction that is missing ends the drafts, whatever comes behind it.
    run = tl.min(tl.where((draft >= 0) & (j < k), KP, j), 0).to(tl.int64)
    count = tl.where(on_track, tl.minimum(tl.minimum(run, k), tl.maximum(tl.load(uploads + 1), 0)), 0)
    tl.store(drafts + row * k + j, tl.maximum(draft, 0), mask=j < k)
    tl.store(num_valid + row, count)


def align_drafts(
    uploads: Tensor, history: Tensor, slots: Tensor, num_tokens: Tensor, k: int, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Drafts [R, k] int64, valid ids everywhere, and how many of them count, [R] int64.

    `uploads` [R, 2 + W] int64 is (number of tokens the host had seen, most drafts, W predicted tokens, -1 past their
    end); `history` [S, L] int64 and `num_tokens` [S] int64 are by slot, `slots` [R] int64. A row that went another way
    than predicted has none that count.
    """
    num_rows, width = uploads.shape[0], uploads.shape[1] - _HEADER
    drafts = torch.empty(num_rows, k, dtype=torch.int64, device=uploads.device)
    num_valid = torch.empty(num_rows, dtype=torch.int64, device=uploads.device)
    _align_kernel[(num_rows,)](
        uploads, uploads.stride(0), history, history.stride(0), history.shape[1], slots, num_tokens, drafts, num_valid,
        width, k, WP=runtime.next_power_of_2(width), KP=runtime.next_power_of_2(k + 1), PDL=pdl, num_warps=1,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return drafts, num_valid


def align_reference(
    uploads: Tensor, history: Tensor, slots: Tensor, num_tokens: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """What `align_drafts` computes, with torch."""
    seen, limits, predicted = uploads[:, 0], uploads[:, 1], uploads[:, _HEADER:]
    width = predicted.shape[1]
    unseen = (num_tokens.index_select(0, slots) - seen)[:, None]
    steps = torch.arange(width, device=uploads.device)
    places = (seen[:, None] + steps).clamp_(max=history.shape[1] - 1)
    on_track = ((history[slots[:, None], places] == predicted) | (steps >= unseen)).all(1, keepdim=True)
    source = unseen + torch.arange(k, device=uploads.device)
    drafts = predicted.gather(1, source.clamp(max=width - 1))
    valid = (on_track & (source < width) & (drafts >= 0)).to(torch.int64).cumprod(1).sum(1)
    return drafts.clamp_(min=0), torch.minimum(valid, limits)
