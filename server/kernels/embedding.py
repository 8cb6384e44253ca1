"""Token embeddings: one row of the table a token, alone, with what the first layer's norm needs, or normed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.norm import rms_norm_reference
from server.kernels.runtime import ceil_div, next_power_of_2, pdl_options
from server.kernels.skinny_scaled import Scaled, empty_scaled, prescale, scaled_reference

_BLOCK = 1024


@triton.jit
def _embed_kernel(
    token_ids_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    values = tl.load(table_ptr + token * WIDTH + offsets, mask=inside)
    tl.store(out_ptr + row * WIDTH + offsets, values, mask=inside)


@triton.jit
def _embed_scaled_kernel(
    token_ids_ptr: tl.tensor,
    table_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scaled_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PRESCALE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < WIDTH
    norm = tl.load(norm_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * PRESCALE
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    values = tl.load(table_ptr + token * WIDTH + offsets, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + offsets, values, mask=inside)
    tl.store(scaled_ptr + row * WIDTH + offsets, (wide * norm).to(scaled_ptr.dtype.element_ty), mask=inside)
    part = tl.arange(0, PARTS)
    tl.store(squares_ptr + row * PARTS + part, tl.where(part == 0, tl.sum(wide * wide, axis=0), 0.0))


@triton.jit
def _embed_norm_kernel(
    ids_ptr: tl.tensor,
    table_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    x_ptr: tl.tensor,
    x_norm_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if half == 0:
        token = tl.load(ids_ptr + row).to(tl.int64)
        x = tl.load(table_ptr + token * WIDTH + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + row * x_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(x_norm_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps) * weight
    out = out_ptr + (2 * row + half) * WIDTH + offsets
    tl.store(out, normed.to(out_ptr.dtype.element_ty), mask=inside)


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows [N, H] of table [V, H] (contiguous) named by token_ids [N] int64, every one a valid id."""
    num_tokens, width = token_ids.shape[0], table.shape[1]
    out = torch.empty((num_tokens, width), dtype=table.dtype, device=table.device)
    if num_tokens == 0:
        return out
    block = min(next_power_of_2(width), _BLOCK)
    _embed_kernel[(num_tokens, ceil_div(width, block))](
        token_ids, table, out, WIDTH=width, BLOCK=block, num_warps=4, **pdl_options(table.device)
    )
    return out


def embed_scaled(token_ids: Tensor, table: Tensor, norm: Tensor) -> tuple[Tensor, Scaled]:
    """`embed`, and the same for the norm [H] that follows (skinny_scaled.py), in one launch; N >= 1."""
    num_tokens, width = token_ids.shape[0], table.shape[1]
    out = torch.empty((num_tokens, width), dtype=table.dtype, device=table.device)
    room = empty_scaled(out)
    block = next_power_of_2(width)
    _embed_scaled_kernel[(num_tokens,)](
        token_ids,
        table,
        norm,
        out,
        room.values,
        room.squares,
        WIDTH=width,
        BLOCK=block,
        PARTS=room.squares.shape[1],
        PRESCALE=prescale(table.dtype),
        num_warps=8 if block >= 4096 else 4,
        **pdl_options(table.device),
    )
    return out, room


def embed_norm(ids: Tensor, table: Tensor, norm: Tensor, x: Tensor, x_norm: Tensor, eps: float) -> Tensor:
    """[N, 2 H]: the RMSNorm of rows `ids` [N] int64 of table [V, H], then that of x [N, H], in one launch.

    `norm` and `x_norm` [H]; table is contiguous, rows of x may lie apart.
    """
    num_tokens, width = x.shape
    out = x.new_empty(num_tokens, 2 * width)
    block = next_power_of_2(width)
    _embed_norm_kernel[(num_tokens, 2)](
        ids, table, norm, x, x_norm, out, x.stride(0), eps,
        WIDTH=width, BLOCK=block, num_warps=min(max(block // 256, 1), 8), **pdl_options(x.device),
    )  # fmt: skip
    return out


def embed_reference(token_ids: Tensor, table: Tensor) -> Tensor:
    """`embed` in torch operations."""
    return table[token_ids]


def embed_scaled_reference(token_ids: Tensor, table: Tensor, norm: Tensor) -> tuple[Tensor, Scaled]:
    """`embed_scaled` in torch operations."""
    x = table[token_ids]
    return x, scaled_reference(x, norm)


def embed_norm_reference(ids: Tensor, table: Tensor, norm: Tensor, x: Tensor, x_norm: Tensor, eps: float) -> Tensor:
    """`embed_norm` in torch operations."""
    return torch.cat([rms_norm_reference(table[ids], norm, eps), rms_norm_reference(x, x_norm, eps)], dim=-1)
