"""Root-mean-square normalisation (Zhang and Sennrich 2019), alone and with the residual addition before it.

One program a row, one block a row: a row's sum of squares is reduced in an order that the width alone sets, so its bits
do not depend on the batch. Arithmetic is float32; the result is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import next_power_of_2, pdl_options


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < WIDTH
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + offsets, mask=inside, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row * delta_stride + offsets, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_stride + offsets, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    normed = wide * scale * weight
    tl.store(out_ptr + row * out_stride + offsets, normed.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """x, delta, out [N, H], each with its own row stride; `out` may be `x` where there is no `delta`."""
    num_rows, width = x.shape
    if num_rows == 0:
        return
    block = next_power_of_2(width)
    added = x if delta is None else delta
    _rms_norm_kernel[(num_rows,)](
        x,
        added,
        weight,
        out,
        x.stride(0),
        added.stride(0),
        out.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        ADD=delta is not None,
        num_warps=min(max(block // 256, 1), 8),
        **pdl_options(x.device),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis of x [..., H], H contiguous; weight [H].

    `out` has x's shape, is contiguous and may be x itself (then contiguous too).
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    _launch(rows, None, weight, eps, out.view(-1, x.shape[-1]))
    return out


def add_rms_norm_(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds delta [N, H] to x [N, H] in place, rounded to x's dtype, and returns the RMSNorm [N, H] of the sum."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, delta, weight, eps, out)
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch operations."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def add_rms_norm_reference_(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`add_rms_norm_` in torch operations."""
    x.add_(delta)
    return rms_norm_reference(x, weight, eps)
