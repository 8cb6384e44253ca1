"""4-bit weights with 8-bit activations."""

from __future__ import annotations

import pytest

from server.quant import integer
from server.quant.formats import LinearFormat
from tests.quant.layers import check


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_groups(activations: str, group: int) -> None:
    for layer in check(LinearFormat("int4", activations, group, smooth=True)):  # type: ignore[arg-type]
        assert layer.path.endswith("-dequantised")


@pytest.mark.skipif(not integer.available(), reason="no exact products of 8-bit numbers here")
def test_without_groups() -> None:
    for layer in check(LinearFormat("int4", "int8")):
        assert layer.path == "onednn-int8"
