"""The gated half of a decoder layer's MLP for a few tokens: norm, gate and up projections, SiLU(gate) * up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div
from server.kernels.skinny_product import ahead, product
from server.kernels.skinny_tiles import Kind, TileConfig, block_m, check_tokens, configs_for, constants


@triton.jit(do_not_specialize=["M"])
def _norm_gate_up_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    eps: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w, pair, norm = ahead(
        w_ptr, norm_ptr, first, N, K, BLOCK_N, BLOCK_K, SPLIT, True, True, PRESCALE, PREFETCH, THREADS, PDL
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, BLOCK_M)
    present = m < M
    gate, up = product(
        x_ptr, m.to(tl.int64), present, w, pair, norm, eps,
        K, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, True, True, PRESCALE, PRECISION,
    )  # fmt: skip
    if BIAS:
        gate += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mixed = gate / (1.0 + tl.exp(-gate)) * up
    at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, mixed.to(out_ptr.dtype.element_ty), mask=present[:, None] & (n < N)[None, :])


def norm_gate_up(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    config: TileConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """silu(g) * u -> [M, I] where (g, u) [M, I] each are rms_norm(x) Wᵀ + bias.

    x [M, K], M <= 64; `norm` [K]; W [2 I, K], gate's rows first; bias [2 I]. One dtype, contiguous. Raises ValueError
    if M is too large.
    """
    num_tokens, k = x.shape
    check_tokens(num_tokens)
    columns = weight.shape[0] // 2
    if out is None:
        out = torch.empty(num_tokens, columns, dtype=x.dtype, device=x.device)
    config = config or configs_for(Kind.GATE_UP, num_tokens, columns, k, x.element_size())[0]
    _norm_gate_up_kernel[(ceil_div(columns, config.block_n),)](
        x,
        norm,
        eps,
        weight,
        x if bias is None else bias,
        out,
        num_tokens,
        N=columns,
        BIAS=bias is not None,
        BLOCK_M=block_m(num_tokens),
        **constants(config, x, k, pdl),
    )
    return out


def norm_gate_up_reference(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in torch, computed in float32."""
    normed = F.rms_norm(x.float(), (x.shape[1],), norm.float(), eps)
    gate, up = F.linear(normed, weight.float(), None if bias is None else bias.float()).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)
