"""Linear layers with bfloat16 weights: the product, as exact as bfloat16 is."""

from __future__ import annotations

import pytest
import torch

from server.quant import dense_bf16
from server.quant.dense import packing_available
from server.quant.dense_bf16 import Bf16Linear, bf16_pays


@pytest.mark.skipif(not packing_available(), reason="this torch has no oneDNN prepacked linear")
@pytest.mark.parametrize(("k", "o"), [(576, 960), (1536, 576), (33, 7), (64, 1)])
def test_is_the_product(k: int, o: int) -> None:
    generator = torch.Generator().manual_seed(k + o)
    weight = torch.randn(o, k, generator=generator) / k**0.5
    linear = Bf16Linear(weight)
    assert (linear.in_features, linear.out_features) == (k, o)
    for rows in (1, 2, 5, 40, 300):
        x = torch.randn(rows, k, generator=generator)
        expected = x.bfloat16().double() @ weight.bfloat16().double().T
        assert linear(x).dtype == torch.float32
        torch.testing.assert_close(linear(x).double(), expected, atol=2e-3, rtol=2**-8)


def test_pays_only_where_the_cpu_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_bf16, "packing_available", lambda: True)
    for vectors, tiles in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=vectors: found, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=tiles: found, raising=False)
        assert bf16_pays() == (vectors or tiles)
    monkeypatch.setattr(dense_bf16, "packing_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert not bf16_pays()
