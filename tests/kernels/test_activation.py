from __future__ import annotations

import pytest
import torch

from server.kernels.activation import silu_mul, silu_mul_reference
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU

SHAPES = [(1, 1536), (3, 17), (5, 1), (0, 8)] + ([(64, 14336), (1, 14336), (3000, 1536), (130, 8192)] if ON_GPU else [])


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
    rows, width = shape
    gate_up = torch.randn(rows, 2 * width, device=device, dtype=dtype) * 4
    out = torch.full((rows, width), float("nan"), device=device, dtype=dtype)
    assert silu_mul(gate_up, out) is out
    assert_close(out, silu_mul_reference(gate_up), dtype)
    assert torch.equal(silu_mul(gate_up), out)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
def test_gates_of_any_size(device: torch.device, dtype: torch.dtype) -> None:
    gate = torch.tensor([[-6e4, -200.0, -0.0, 0.0, 200.0, 1e4]], device=device, dtype=dtype)
    found = silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    assert torch.equal(found, torch.where(gate > 0, gate, torch.zeros_like(gate)))
