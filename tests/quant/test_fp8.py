"""fp8 weights, activations in fp8 or as they come."""

from __future__ import annotations

import pytest
import torch

from server.quant.formats import LinearFormat
from tests.quant.layers import check


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("activations", ["fp8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_oracle(activations: str, smooth: bool, dtype: torch.dtype) -> None:
    form = LinearFormat("fp8", activations, smooth=smooth)  # type: ignore[arg-type]
    for layer in check(form, dtype, 2e-6 if dtype == torch.float32 else 0.02):
        assert layer.path.endswith("-dequantised")
