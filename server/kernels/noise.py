"""Counter-based noise inside kernels, bit-identical in its integer part to `server.sampling.rng`, which explains it.

log and log1p are CUDA's own (libdevice), as torch's are; under the interpreter numpy's, a few ulps from torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from server.kernels import runtime

TARGET, DRAFT, ACCEPT, RESIDUAL = range(4)
"""Purposes, as in `server.sampling.rng`."""

MAX_GUMBEL = tl.constexpr(22.9)
"""No noise is larger: -log(2**-33) = 22.874."""
_INTERPRETED = tl.constexpr(runtime.INTERPRETED)


@triton.jit
def log(x):  # type: ignore[no-untyped-def]
    """Log of float32, rounded as torch rounds it on a GPU."""
    return tl.log(x) if _INTERPRETED else libdevice.log(x)


@triton.jit
def exp(x):  # type: ignore[no-untyped-def]
    """Exp of float32, rounded as torch rounds it on a GPU (`tl.exp` is the fast approximation)."""
    return tl.exp(x) if _INTERPRETED else libdevice.exp(x)


@triton.jit
def log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x) of float32."""
    return tl.log(1.0 + x.to(tl.float64)).to(tl.float32) if _INTERPRETED else libdevice.log1p(x)


@triton.jit
def _mix64(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32_a(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _mix32_b(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, choice, position, PURPOSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint64 key of the noise of a position; `seed`, `choice`, `position` are int64."""
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    key = _mix64(seed.to(tl.uint64, bitcast=True) + golden)
    key ^= (choice * 4 + PURPOSE).to(tl.uint64, bitcast=True)
    key = _mix64(key + golden)
    key ^= position.to(tl.uint64, bitcast=True)
    return _mix64(key + golden)


@triton.jit
def noise_bits(key, ids):  # type: ignore[no-untyped-def]
    """uint32 per vocabulary id (int32), of uint64 `key`; the two broadcast."""
    x = _mix32_a(ids.to(tl.uint32, bitcast=True) + 0x9E3779B9)
    x = _mix32_a(x ^ key.to(tl.uint32))
    return _mix32_b(x ^ (key >> 32).to(tl.uint32))


@triton.jit
def gumbel_of(bits):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise, float32, of uint32 `bits`: -log(-log1p(-v)), v = |bits + 1/4| / 2**31 for signed bits."""
    v = tl.abs(bits.to(tl.int32, bitcast=True).to(tl.float32) + 0.25) * -4.656612873077393e-10
    v = tl.maximum(v, -0.999999940395355224609375)
    return -log(-log1p(v))


@triton.jit
def uniform_of(key):  # type: ignore[no-untyped-def]
    """Uniform float64, strictly between 0 and 1, of a uint64 key."""
    return ((key >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def _noise_kernel(seeds, choices, positions, bits, noise, uniforms, V, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    t = tl.program_id(0).to(tl.int64)
    key = noise_key(tl.load(seeds + t), tl.load(choices + t), tl.load(positions + t), PURPOSE)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    raw = noise_bits(key, ids)
    tl.store(bits + t * V + ids, raw.to(tl.int32, bitcast=True), mask=ids < V)
    tl.store(noise + t * V + ids, gumbel_of(raw), mask=ids < V)
    if tl.program_id(1) == 0:
        tl.store(uniforms + t, uniform_of(key))


def noise(seeds: Tensor, choices: Tensor, positions: Tensor, purpose: int, vocab_size: int) -> tuple[Tensor, ...]:
    """Hash bits [T, V] int32, Gumbel noise [T, V] float32 and uniforms [T] float64 of T positions (int64 each).

    Nothing serves from this: it shows what the kernels draw.
    """
    shape = (seeds.shape[0], vocab_size)
    bits = torch.empty(shape, dtype=torch.int32, device=seeds.device)
    gumbel = torch.empty(shape, dtype=torch.float32, device=seeds.device)
    uniforms = torch.empty(shape[:1], dtype=torch.float64, device=seeds.device)
    block = min(1024, runtime.next_power_of_2(vocab_size))
    grid = (shape[0], runtime.ceil_div(vocab_size, block))
    _noise_kernel[grid](seeds, choices, positions, bits, gumbel, uniforms, vocab_size, PURPOSE=purpose, BLOCK=block)
    return bits, gumbel, uniforms
