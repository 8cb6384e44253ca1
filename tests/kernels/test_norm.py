from __future__ import annotations

import pytest
import torch

from server.kernels.norm import add_rms_norm_, add_rms_norm_reference_, rms_norm, rms_norm_reference
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU

EPS = 1e-5
SHAPES = [(1, 576), (5, 64), (3, 100), (2, 1)] + (
    [(1, 4096), (64, 4096), (333, 576), (2049, 2048), (7, 8192)] if ON_GPU else []
)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=device, dtype=dtype) * 3
    weight = torch.randn(shape[1], device=device, dtype=dtype)
    out = torch.full_like(x, float("nan"))
    assert rms_norm(x, weight, EPS, out) is out
    assert_close(out, rms_norm_reference(x, weight, EPS), dtype)
    assert torch.equal(rms_norm(x, weight, EPS), out)


@pytest.mark.parametrize("shape", SHAPES)
def test_adds_then_norms(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
    x, delta = torch.randn(2, *shape, device=device, dtype=dtype)
    weight = torch.randn(shape[1], device=device, dtype=dtype)
    expected_sum = x.clone()
    expected = add_rms_norm_reference_(expected_sum, delta, weight, EPS)
    found = add_rms_norm_(x, delta, weight, EPS)
    assert torch.equal(x, expected_sum)
    assert_close(found, expected, dtype)


def test_more_dimensions_strided_rows_and_in_place(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 40, device=device, dtype=dtype)
    weight = torch.randn(40, device=device, dtype=dtype)
    expected = rms_norm_reference(x, weight, EPS)
    found = rms_norm(x, weight, EPS)
    assert found.shape == x.shape
    assert_close(found, expected, dtype)
    wide = torch.full((6, 50), float("nan"), device=device, dtype=dtype)
    wide[:, :40] = x.view(6, 40)
    assert torch.equal(rms_norm(wide[:, :40], weight, EPS), found.view(6, 40))
    assert rms_norm(x, weight, EPS, out=x) is x
    assert torch.equal(x, found)


def test_no_rows(device: torch.device) -> None:
    assert rms_norm(torch.empty(0, 8, device=device), torch.ones(8, device=device), EPS).shape == (0, 8)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 200])
def test_a_row_does_not_depend_on_the_batch(rows: int, device: torch.device, dtype: torch.dtype) -> None:
    width = 4096 if ON_GPU else 96
    x = torch.randn(200, width, device=device, dtype=dtype)
    weight = torch.randn(width, device=device, dtype=dtype)
    whole = rms_norm(x, weight, EPS)
    assert torch.equal(rms_norm(x[200 - rows :], weight, EPS), whole[200 - rows :])


def test_a_row_of_nan_stays_alone(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(4, 100, device=device, dtype=dtype)
    x[2] = float("nan")
    found = rms_norm(x, torch.ones(100, device=device, dtype=dtype), EPS)
    assert bool(found[[0, 1, 3]].isfinite().all()) and bool(found[2].isnan().all())
