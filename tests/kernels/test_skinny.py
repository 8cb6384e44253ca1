"""Linear layers for a few tokens against float32 references: odd shapes, poisoned rows, every kind of tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.kernels.skinny import (
    linear_residual_,
    linear_residual_reference,
    linear_residual_scaled_,
    norm_linear,
    norm_linear_reference,
)
from server.kernels.skinny_mlp import norm_gate_up, norm_gate_up_reference
from server.kernels.skinny_scaled import (
    Scaled,
    empty_scaled,
    least_columns,
    prescale,
    scaled_reference,
    square_columns,
)
from server.kernels.skinny_tiles import Kind, TileConfig, block_m, configs_for
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU

EPS = 1e-5
NAN = float("nan")
TILES = {
    "narrow": TileConfig(8, 128, split=8, num_stages=1),
    "whole": TileConfig(16, 128, num_stages=1),
    "whole-split": TileConfig(16, 128, split=4, num_stages=1),
    "streamed": TileConfig(32, 32, num_stages=3, prefetch=64),
    "streamed-split": TileConfig(16, 64, split=4, num_stages=3, prefetch=64),
}
CASES = [(tile, (5, 33, 72)) for tile in TILES] + [("whole", (20, 16, 70)), ("streamed", (1, 40, 128))]
if ON_GPU:
    SHAPES = [(1, 40, 72), (5, 33, 128), (16, 48, 96), (20, 16, 70), (1, 1536, 576), (3, 960, 576), (17, 576, 1536)]
    SHAPES += [(8, 2048, 2048), (64, 1024, 4096), (40, 1000, 1000)]
    CASES = [(tile, shape) for tile in TILES for shape in SHAPES]


def tile_for(name: str, k: int) -> TileConfig | None:
    """The tile if it is made for such a K, else what would be chosen."""
    return TILES[name] if k <= 128 or name.startswith("stream") else None


def spread(x: Tensor, norm: Tensor) -> Scaled:
    """What goes with x, its sums of squares in parts of any size."""
    made = scaled_reference(x, norm)
    shares = torch.rand_like(made.squares)
    made.squares.copy_(made.squares[:, :1] * shares / shares.sum(1, keepdim=True))
    return made


def numbers(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(device, dtype)


def weights(device: torch.device, dtype: torch.dtype, n: int, k: int) -> Tensor:
    return torch.randn(n, k).div(k**0.5).to(device, dtype)


@pytest.mark.parametrize(("tile", "shape"), CASES, ids=str)
def test_linear_adds_to_the_residual(
    tile: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> None:
    m, n, k = shape
    x, weight, residual = numbers(device, dtype, m, k), weights(device, dtype, n, k), numbers(device, dtype, m, n)
    bias = numbers(device, dtype, n) if m % 2 else None
    expected = linear_residual_reference(residual, x, weight, bias)
    found = linear_residual_(residual, x, weight, bias, config=tile_for(tile, k))
    assert found is residual
    assert_close(found, expected, dtype)


@pytest.mark.parametrize(("tile", "shape"), CASES, ids=str)
def test_what_the_next_norm_needs_is_written_too(
    tile: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> None:
    m, n, k = shape
    x, weight, residual = numbers(device, dtype, m, k), weights(device, dtype, n, k), numbers(device, dtype, m, n)
    norm, sums = numbers(device, dtype, n), linear_residual_reference(residual, x, weight)
    scaled = empty_scaled(residual)
    scaled.values.fill_(NAN)
    scaled.squares.fill_(NAN)
    linear_residual_scaled_(residual, x, weight, None, norm, scaled, config=tile_for(tile, k))
    assert_close(residual, sums, dtype)
    expected = scaled_reference(residual, norm)
    assert torch.equal(scaled.values, expected.values)
    torch.testing.assert_close(scaled.squares.sum(1), expected.squares.sum(1), rtol=1e-5, atol=0.0)


def test_more_programs_than_columns_of_squares_are_refused(device: torch.device) -> None:
    residual, x = torch.zeros(1, 4096, device=device), torch.zeros(1, 16, device=device)
    weight = torch.zeros(4096, 16, device=device)
    with pytest.raises(ValueError, match="8 columns where 4096 need 16"):
        linear_residual_scaled_(residual, x, weight, None, x, empty_scaled(residual), config=TileConfig(8, 16))


def test_columns_of_squares() -> None:
    assert [least_columns(h) for h in (40, 576, 2048, 4096, 8192)] == [8, 8, 8, 16, 32]
    assert [square_columns(h) for h in (8, 40, 576, 2048, 4096, 8192)] == [1, 8, 128, 256, 256, 256]


@pytest.mark.parametrize(("tile", "shape"), CASES, ids=str)
def test_norm_and_linear_of_gathered_rows(
    tile: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> None:
    m, n, k = shape
    x, weight, norm = 3 * numbers(device, dtype, m + 3, k), weights(device, dtype, n, k), numbers(device, dtype, k)
    rows = torch.randperm(m + 3)[:m].to(device)
    unread = torch.ones(m + 3, dtype=torch.bool, device=device)
    unread[rows] = False
    expected = norm_linear_reference(x, norm, EPS, weight, None, rows)
    scaled = spread(x, norm)
    scaled.values[unread], scaled.squares[unread] = NAN, NAN
    out = torch.full((m, n), NAN, dtype=dtype, device=device)
    found = norm_linear(scaled, EPS, weight, rows=rows, out=out, config=tile_for(tile, k))
    assert found is out
    assert_close(found, expected, dtype, scale=1.5)


@pytest.mark.parametrize(("tile", "shape"), CASES, ids=str)
def test_gate_and_up(tile: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
    m, n, k = shape
    x, norm, weight = numbers(device, dtype, m, k), numbers(device, dtype, k), weights(device, dtype, 2 * n, k)
    bias = numbers(device, dtype, 2 * n) if m % 2 else None
    out = torch.full((m, n), NAN, dtype=dtype, device=device)
    found = norm_gate_up(spread(x, norm), EPS, weight, bias, out=out, config=tile_for(tile, k))
    assert_close(found, norm_gate_up_reference(x, norm, EPS, weight, bias), dtype, scale=1.5)


def test_linear_makes_its_output(device: torch.device, dtype: torch.dtype) -> None:
    x, weight, bias = numbers(device, dtype, 3, 40), weights(device, dtype, 24, 40), numbers(device, dtype, 24)
    norm = numbers(device, dtype, 40)
    found = norm_linear(spread(x, norm), EPS, weight, bias)
    assert_close(found, norm_linear_reference(x, norm, EPS, weight, bias), dtype, scale=1.5)


def test_columns_beyond_the_last_are_not_written(device: torch.device, dtype: torch.dtype) -> None:
    """33 columns in tiles of 16: the third tile's other columns are the next row's memory."""
    x, norm, weight = numbers(device, dtype, 2, 32), numbers(device, dtype, 32), weights(device, dtype, 33, 32)
    guarded = torch.full((4, 33), 7.0, dtype=dtype, device=device)
    norm_linear(spread(x, norm), EPS, weight, out=guarded[:2], config=TileConfig(16, 32, num_stages=1))
    assert_close(guarded[:2], norm_linear_reference(x, norm, EPS, weight), dtype, scale=1.5)
    assert bool((guarded[2:] == 7.0).all())


def test_large_activations_do_not_overflow_float16(device: torch.device) -> None:
    """x * norm passes 65504 before it is divided by the rms."""
    x = torch.randn(2, 64).to(device, torch.float16) * 100
    x[:, 5] = 30000.0
    norm, weight = torch.full((64,), 4.0, dtype=torch.float16, device=device), weights(device, torch.float16, 16, 64)
    expected = norm_linear_reference(x, norm, EPS, weight)
    assert_close(norm_linear(scaled_reference(x, norm), EPS, weight), expected, torch.float16, scale=1.5)
    assert [prescale(d) for d in (torch.float16, torch.bfloat16, torch.float32)] == [1 / 16, 1.0, 1.0]


@pytest.mark.parametrize("num_tokens", [0, 65])
def test_too_many_tokens_are_refused(num_tokens: int, device: torch.device) -> None:
    x = torch.zeros(num_tokens, 32, dtype=torch.float16, device=device)
    weight = torch.zeros(32, 32, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match=f"1 to 64 tokens, not {num_tokens}"):
        norm_linear(empty_scaled(x), 0.0, weight)
    with pytest.raises(ValueError, match=f"1 to 64 tokens, not {num_tokens}"):
        norm_gate_up(empty_scaled(x), 0.0, weight)
    with pytest.raises(ValueError, match=f"1 to 64 tokens, not {num_tokens}"):
        linear_residual_(x, x, weight)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("n", "k"), [(576, 576), (960, 576), (576, 1536), (49152, 576), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("element_size", [2, 4])
def test_candidates_are_few_and_fit(kind: Kind, n: int, k: int, num_tokens: int, element_size: int) -> None:
    found = configs_for(kind, num_tokens, n, k, element_size)
    assert 1 <= len(found) <= 3
    assert len(set(found)) == len(found)
    for config in found:
        assert config.shared_bytes(kind, num_tokens, k, element_size) <= 227 << 10
        assert config.block_k % config.split == 0 and config.block_k // config.split >= 16


def test_height_of_a_tile() -> None:
    assert [block_m(m) for m in (1, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]
