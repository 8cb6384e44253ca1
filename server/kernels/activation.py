"""SwiGLU's activation (Shazeer 2020): SiLU of the gate times the up projection, from one fused product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div, next_power_of_2, pdl_options

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
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
    at = gate_up_ptr + row * gate_up_stride + offsets
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` [N, I] of gate_up [N, 2I] (gates first); computed in float32, rounded once."""
    num_rows, both = gate_up.shape
    width = both // 2
    if out is None:
        out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    block = min(next_power_of_2(width), _BLOCK)
    _silu_mul_kernel[(num_rows, ceil_div(width, block))](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
        **pdl_options(gate_up.device),
    )
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` in torch operations."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
