"""The gated half of a decoder layer's MLP for a few tokens: norm, gate and up projections, SiLU(gate) * up.

A program's rows of gate and of up alternate in one tile of weights, so that a gate and its up meet in one thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div
from server.kernels.skinny_product import ahead, product, w_rows
from server.kernels.skinny_scaled import Scaled, inverse_rms, load_squares
from server.kernels.skinny_tiles import Kind, TileConfig, block_m, check_tokens, configs_for, constants


@triton.jit(do_not_specialize=["M"])
def _norm_gate_up_kernel(
    x_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    eps: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w, tail = ahead(w_ptr, first, N, K, 2 * BLOCK_N, BLOCK_K, TAIL, SPLIT, True, PREFETCH, THREADS, PDL)
    m = tl.arange(0, BLOCK_M)
    present = m < M
    if PDL:
        tl.extra.cuda.gdc_wait()
    squares = load_squares(squares_ptr, m.to(tl.int64), present, PARTS, BLOCK_M)
    acc = product(
        x_ptr, m.to(tl.int64), present, w, tail, first,
        N, K, BLOCK_M, 2 * BLOCK_N, BLOCK_K, TAIL, SPLIT, True, PRECISION,
    )  # fmt: skip
    acc *= inverse_rms(squares, eps, K, PRESCALE)
    if BIAS:
        acc += tl.load(bias_ptr + w_rows(tl.arange(0, 2 * BLOCK_N), first, N, True)).to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
    mixed = gate / (1.0 + tl.exp(-gate)) * up
    at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, mixed.to(out_ptr.dtype.element_ty), mask=present[:, None] & (n < N)[None, :])


def norm_gate_up(
    x: Scaled,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    config: TileConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """silu(g) * u -> [M, I] where (g, u) [M, I] each are rms_norm(x) Wᵀ + bias.

    x [M, K] as skinny_scaled.py has it, M <= 64; W [2 I, K], gate's rows first; bias [2 I]. One dtype, contiguous.
    Raises ValueError if M is too large.
    """
    values = x.values
    num_tokens, k = values.shape
    check_tokens(num_tokens)
    columns = weight.shape[0] // 2
    if out is None:
        out = torch.empty(num_tokens, columns, dtype=values.dtype, device=values.device)
    config = config or configs_for(Kind.GATE_UP, num_tokens, columns, k, values.element_size())[0]
    _norm_gate_up_kernel[(ceil_div(columns, config.block_n),)](
        values,
        x.squares,
        eps,
        weight,
        values if bias is None else bias,
        out,
        num_tokens,
        N=columns,
        BIAS=bias is not None,
        PARTS=x.squares.shape[1],
        BLOCK_M=block_m(num_tokens),
        **constants(config, values, k, pdl),
    )
    return out


def norm_gate_up_reference(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in torch for x [M, K] and norm [K], computed in float32."""
    normed = F.rms_norm(x.float(), (x.shape[1],), norm.float(), eps)
    gate, up = F.linear(normed, weight.float(), None if bias is None else bias.float()).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)
