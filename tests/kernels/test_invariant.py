from __future__ import annotations

import pytest
import torch

from server.kernels.invariant import LARGE, MEDIUM, SMALL, Tile, linear, linear_reference, tile_for, tiles_agree
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU

ROWS = [1, 2, 16, 17, 64, 65, 200]
SHAPES = [(1, 70, 40), (17, 100, 33), (33, 64, 64), (0, 64, 32)] + (
    [(5, 576, 960), (300, 1536, 576), (1, 4096, 6144), (1000, 4096, 4096), (64, 14336, 4096), (77, 570, 61)]
    if ON_GPU
    else []
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_reference(shape: tuple[int, int, int], biased: bool, device: torch.device, dtype: torch.dtype) -> None:
    m, k, n = shape
    x, weight = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    bias = torch.randn(n, device=device, dtype=dtype) * 10 if biased else None
    found = linear(x, weight, bias)
    assert found.shape == (m, n)
    if m:
        assert_close(found, linear_reference(x, weight, bias), dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [96, 100] + ([4096, 576, 14336] if ON_GPU else []))
def test_a_row_depends_on_nothing_else(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    """Not on the number of rows, its place among them or what the others hold."""
    x, weight = torch.randn(200, width, device=device), torch.randn(800 if ON_GPU else 40, width, device=device)
    x, weight = x.to(dtype), weight.to(dtype)
    whole = linear(x, weight)
    assert torch.equal(linear(x[200 - rows :], weight), whole[200 - rows :])
    assert torch.equal(linear(x[:rows], weight), whole[:rows])
    order = torch.randperm(200, device=device)[:rows]
    assert torch.equal(linear(x[order], weight), whole[order])
    poisoned = x.clone()
    poisoned[1:] = float("nan")
    assert torch.equal(linear(poisoned, weight)[0], whole[0])


@pytest.mark.skipif(not ON_GPU, reason="thousands of rows")
@pytest.mark.parametrize("shape", [(4096, 6144), (576, 960), (4096, 28672), (1536, 576)])
def test_prefill_and_decoding_agree(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
    k, n = shape
    x, weight = torch.randn(2, 8192, k, device=device)[0].to(dtype), torch.randn(n, k, device=device).to(dtype)
    whole = linear(x, weight)
    for rows in (1, 5, 64, 129, 320, 1000):
        assert torch.equal(linear(x[3000 : 3000 + rows], weight), whole[3000 : 3000 + rows])


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has one tile")
def test_tiles_agree_here(device: torch.device, dtype: torch.dtype) -> None:
    assert tiles_agree(device, dtype)


def test_rows_and_weights_may_be_strided(device: torch.device, dtype: torch.dtype) -> None:
    wide = torch.full((5, 64), float("nan"), device=device, dtype=dtype)
    wide[:, :48] = torch.randn(5, 48, device=device)
    assert torch.equal(
        linear(wide[:, :48], wide[:3, :48]), linear(wide[:, :48].contiguous(), wide[:3, :48].contiguous())
    )


@pytest.mark.parametrize(
    ("rows", "columns", "tile"),
    [
        (1, 4096, SMALL),
        (32, 128256, SMALL),
        (64, 28672, MEDIUM),
        (64, 4096, SMALL),
        (320, 4096, MEDIUM),
        (8192, 4096, LARGE),
        (2048, 576, MEDIUM),
        (128, 576, SMALL),
    ],
)
def test_tiles_fill_the_gpu(rows: int, columns: int, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.kernels.invariant.num_sms", lambda device: 132)
    monkeypatch.setattr("server.kernels.invariant.INTERPRETED", False)
    assert tile_for(rows, columns, torch.bfloat16, torch.device("cpu")) is tile
