"""What is asked of the layer of any format on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant.build import linear_of
from server.quant.formats import LinearFormat, QuantizedWeight, reference_linear
from server.quant.layer import LinearLayer
from tests.quant.rounding import rounded

SHAPES = [(1, 64), (37, 128), (96, 576)]


def weight_of(form: LinearFormat, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    made = torch.Generator().manual_seed(seed)
    return rounded(torch.randn(rows, columns, generator=made) / columns**0.5, form)


def inputs(rows: int, columns: int) -> Tensor:
    """Rows of very different size, one of them zero."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-3, 3, rows)[:, None]
    x[rows // 2] = 0.0
    return x


def check(form: LinearFormat, dtype: torch.dtype = torch.float32, tolerance: float = 2e-6) -> list[LinearLayer]:
    """Against the oracle: odd shapes, bias, non-contiguous and empty input, one row as many rows bit for bit."""
    layers = []
    for rows, columns in SHAPES:
        weight = weight_of(form, rows, columns)
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(2))
        for b in (None, bias.to(dtype)):
            layer = linear_of(weight, b, dtype=dtype)
            assert (layer.in_features, layer.out_features, layer.format) == (columns, rows, form.name)
            x = inputs(23, columns).to(dtype)
            found, wanted = layer(x), reference_linear(x.float(), weight, b)
            assert found.dtype == dtype and found.shape == wanted.shape
            scale = 2 * x.float().abs() @ weight.effective().abs().t()  # what a sum's rounding is relative to
            scale += 1e-3 if b is None else b.float().abs() + 1e-3
            assert float(((found - wanted) / scale).abs().max()) < tolerance, layer.path
            wide = torch.full((23, 2 * columns), torch.nan, dtype=dtype)
            wide[:, ::2] = x
            assert torch.equal(layer(wide[:, ::2]), found)
            assert layer(x[:0]).shape == (0, rows)
            if dtype == torch.float32:
                alone = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
                assert torch.equal(alone, found), f"{layer.path}: one row is not many rows"
                assert torch.equal(torch.cat([layer(x[:5]), layer(x[5:])]), found)
        plain = linear_of(weight, dtype=dtype).plain_weight().float()
        assert torch.allclose(plain, weight.effective(), rtol=1e-6 if dtype == torch.float32 else 0.01)
        layers.append(linear_of(weight, dtype=dtype))
    return layers
