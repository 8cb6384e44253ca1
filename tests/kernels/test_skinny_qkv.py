"""Norm, qkv projection, rotary embedding and the write to the pool in one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from server.kernels.skinny_qkv import Heads, norm_qkv_rope, norm_qkv_rope_reference
from server.kernels.skinny_scaled import scaled_reference
from server.kernels.skinny_tiles import TileConfig
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU

EPS = 1e-5
NAN = float("nan")
ODD = (20, 40, Heads(2, 2, 24))  # a head_dim that no tile divides
SHAPES = [(1, 72, Heads(3, 1, 16)), (5, 64, Heads(4, 2, 8)), ODD]
SHAPES += [(5, 576, Heads(9, 3, 64)), (40, 4096, Heads(32, 8, 128)), (16, 3072, Heads(32, 32, 96))]
TILES = {
    "narrow": TileConfig(8, 128, split=8, num_stages=1),
    "whole": TileConfig(16, 128, split=4, num_stages=1),
    "streamed": TileConfig(16, 32, split=2, num_stages=3, prefetch=32),
    "wide": TileConfig(32, 64, num_stages=2),
}
CASES = [("narrow", ODD, True), ("whole", SHAPES[0], True), ("streamed", SHAPES[0], False), ("wide", SHAPES[1], True)]
if ON_GPU:
    CASES = [(tile, shape, rotate) for tile in TILES for shape in SHAPES for rotate in (True, False)]


def inputs(m: int, k: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    places = torch.randperm(3 * m + 4)[:m]
    angles = torch.rand(50, heads.head_dim // 2) * 7
    rotations = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return {
        "x": (2 * torch.randn(m, k)).to(device, dtype),
        "norm": torch.randn(k).to(device, dtype),
        "weight": (torch.randn(heads.columns, k) / k**0.5).to(device, dtype),
        "bias": torch.randn(heads.columns).to(device, dtype),
        "positions": torch.randint(0, 60, (m,)).to(device),  # some beyond the table
        "slot_mapping": places.to(device),
        "rotations": rotations.to(device),
    }


def run(given: dict[str, Any], **options: Any) -> Tensor:
    """norm_qkv_rope of what the reference takes."""
    rest = {name: value for name, value in given.items() if name not in ("x", "norm")}
    return norm_qkv_rope(scaled_reference(given["x"], given["norm"]), **rest, **options)


def pools(m: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = torch.randn(3 * m + 4, 2 * heads.num_kv_heads, heads.head_dim).to(device, dtype)
    return made, made.clone()


@pytest.mark.parametrize(("tile", "shape", "rotate"), CASES, ids=str)
def test_queries_and_pool(
    tile: str, shape: tuple[int, int, Heads], rotate: bool, device: torch.device, dtype: torch.dtype
) -> None:
    m, k, heads = shape
    given = inputs(m, k, heads, device, dtype)
    bias = given.pop("bias") if rotate else None
    given.pop("bias", None)
    pool, expected_pool = pools(m, heads, device, dtype)
    expected = norm_qkv_rope_reference(**given, bias=bias, eps=EPS, pool=expected_pool, heads=heads, rotate=rotate)
    out = torch.full((m, heads.num_heads * heads.head_dim), NAN, dtype=dtype, device=device)
    config = TILES[tile] if k <= 128 or tile in ("streamed", "wide") else None
    found = run(given, bias=bias, eps=EPS, pool=pool, heads=heads, rotate=rotate, out=out, config=config)
    assert found is out
    assert_close(found, expected, dtype, scale=1.5)
    written = given["slot_mapping"]
    assert_close(pool[written], expected_pool[written], dtype, scale=1.5)
    kept = torch.ones(len(pool), dtype=torch.bool, device=device)
    kept[written] = False
    assert torch.equal(pool[kept], expected_pool[kept])


@pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter rounds to float8 wrongly where the exponent goes up")
def test_pool_in_float8_rounds(device: torch.device) -> None:
    heads, dtype = Heads(2, 1, 16), torch.float16
    given = inputs(3, 64, heads, device, dtype)
    wide, expected_pool = pools(3, heads, device, torch.float16)
    pool = wide.to(torch.float8_e4m3fn)
    norm_qkv_rope_reference(**given, eps=EPS, pool=expected_pool, heads=heads)
    run(given, eps=EPS, pool=pool, heads=heads)
    written = given["slot_mapping"]
    found, expected = pool[written].float(), expected_pool[written].float()
    assert bool(((found - expected).abs() <= expected.abs() / 15.9 + 2**-8).all())  # 3 bits of mantissa


def test_pool_in_float8_saturates(device: torch.device) -> None:
    heads = Heads(1, 1, 16)
    given = inputs(3, 32, heads, device, torch.float16)
    given["weight"].zero_()
    given["bias"][16:] = torch.tensor([0.0, 1.0, -64.0, 448.0, 600.0, -3000.0, 0.5, 12.0] * 4).to(device)
    pool = torch.zeros(13, 2, 16, device=device).to(torch.float8_e4m3fn)
    expected = torch.zeros(13, 2, 16, device=device).to(torch.float8_e4m3fn)
    run(given, eps=EPS, pool=pool, heads=heads, rotate=False)
    norm_qkv_rope_reference(**given, eps=EPS, pool=expected, heads=heads, rotate=False)
    assert torch.equal(pool.float(), expected.float())
    assert float(pool.float().abs().max()) == 448.0


def test_too_many_tokens_are_refused(device: torch.device) -> None:
    heads = Heads(1, 1, 16)
    given = inputs(65, 32, heads, device, torch.float16)
    pool, _ = pools(65, heads, device, torch.float16)
    with pytest.raises(ValueError, match="1 to 64 tokens, not 65"):
        run(given, eps=EPS, pool=pool, heads=heads)
