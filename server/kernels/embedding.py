"""Token embeddings: one row of the table a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div, next_power_of_2, pdl_options

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


def embed_reference(token_ids: Tensor, table: Tensor) -> Tensor:
    """`embed` in torch operations."""
    return table[token_ids]
