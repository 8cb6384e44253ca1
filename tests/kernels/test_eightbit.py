"""Low-precision products of a few tokens against their dequantised twins: formats, tiles, parts, odd shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from server.kernels.eightbit_linear import (
    gate_up8,
    gate_up8_reference,
    linear8,
    linear8_parts,
    linear8_reference,
)
from server.kernels.eightbit_product import pack_groups
from server.kernels.eightbit_tiles import EightTile, Weight, candidates
from server.kernels.int4_product import WORD
from server.kernels.quantize import Quantized, total_reference
from server.kernels.skinny_tiles import Kind
from server.quant.formats import LinearFormat, reference_linear
from server.quant.low import LowLinear
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU
from tests.kernels.eightbit_cases import (
    FORMATS,
    TILES,
    activations,
    as_weight,
    made,
    poisoned,
    quantized_weight,
    tile_for,
)

FLOAT8_SUMS = 100.0
"""Hopper adds products of float8 numbers in an accumulator of about 14 bits (DeepSeek-V3, arXiv 2412.19437, 3.3.2)."""
SHAPES = [(1, 16, 64), (5, 33, 96), (20, 40, 160)]
if ON_GPU:
    SHAPES += [(1, 4096, 4096), (8, 1536, 576), (64, 4096, 14336), (33, 1000, 992)]


def short_sums(name: str, dtype: torch.dtype) -> bool:
    """Whether sums are shorter than what they are compared in."""
    return ON_GPU and dtype == torch.float32 and FORMATS[name].activations == "fp8"


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(name: str, tile: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
    m, n, k = shape
    case = made(name, m, n, k, device, dtype)
    bias = torch.randn(n).to(device, dtype) if m % 2 else None
    expected = linear8_reference(case.x, case.plain, bias).to(dtype)
    found = linear8(poisoned(case.x), case.weight, dtype, bias, tile=tile_for(tile, k, case.weight.group))
    assert_close(found, expected, dtype, scale=FLOAT8_SUMS if short_sums(name, dtype) else 1.0)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("parts", "k"), [(2, 128), (3, 160), (4, 96)])
def test_parts_add_up(name: str, parts: int, k: int, swap: bool, device: torch.device, dtype: torch.dtype) -> None:
    m, n = 3, 40
    case = made(name, m, n, k, device, dtype)
    tile = EightTile(16, 32, parts=parts, swap=swap, num_stages=2)
    bias = torch.randn(n).to(device, dtype)
    sums = linear8_parts(poisoned(case.x), case.weight, bias, tile=tile)
    assert sums.parts.shape == (parts, m, n)
    torch.testing.assert_close(total_reference(sums), linear8_reference(case.x, case.plain, bias), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_and_up(
    name: str, tile: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> None:
    m, n, k = shape
    case = made(name, m, 2 * n, k, device, dtype)
    bias = torch.randn(2 * n).to(device, dtype) if m % 2 else None
    expected = gate_up8_reference(case.x, case.plain, bias).to(dtype)
    found = gate_up8(poisoned(case.x), case.weight, dtype, bias, tile=tile_for(tile, k, case.weight.group))
    assert_close(found, expected, dtype, scale=FLOAT8_SUMS if short_sums(name, dtype) else 1.0)


@pytest.mark.parametrize("name", ["fp8", "int8", "w4a8-int8", "w4a8-fp8"])
def test_it_is_what_the_format_says(name: str, device: torch.device) -> None:
    stored = quantized_weight(FORMATS[name], 24, 64, device)
    x = torch.randn(3, 64, device=device)
    found = linear8(activations(x, stored.format.activations), as_weight(stored), torch.float32, tile=TILES["plain"])
    torch.testing.assert_close(found, reference_linear(x, stored), rtol=1e-4, atol=1e-4)


def test_groups_are_padded_to_pairs() -> None:
    numbers = torch.randint(-8, 8, (3, 48)).float()
    scales = torch.rand(3, 3)
    packed, spread = pack_groups(numbers, scales, 16, "int8")
    assert packed.shape == (3, 32) and spread.shape == (4, 3)
    assert torch.equal(spread[3], torch.zeros(3)) and torch.equal(spread[:3].t(), scales / 16)
    low = (packed << 4 >> 4).view(3, 2, 16)
    high = (packed >> 4).view(3, 2, 16)
    assert torch.equal(torch.stack([low, high], 2).flatten(1)[:, :48].float(), numbers)


def test_a_tile_that_cannot_be_is_refused(device: torch.device) -> None:
    case = made("int8", 1, 16, 64, device, torch.float32)
    with pytest.raises(ValueError, match="streamed"):
        linear8(case.x, case.weight, torch.float32, tile=EightTile(16, 64, swap=True))
    with pytest.raises(ValueError, match="parts"):
        linear8(case.x, case.weight, torch.float32, tile=EightTile(16, 32, parts=2))
    wide = made("int8", 65, 16, 64, device, torch.float32)
    with pytest.raises(ValueError, match="1 to 64 tokens"):
        linear8(wide.x, wide.weight, torch.float32)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (6144, 4096), (576, 1536), (960, 576), (128256, 4096)])
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 64])
def test_every_shape_has_candidates(kind: Kind, n: int, k: int, num_tokens: int) -> None:
    found = candidates(kind, num_tokens, n, k)
    assert found and len({t.name for t in found}) == len(found)
    assert all(t.parts == 1 for t in found) or kind is Kind.RESIDUAL
    assert all(not t.swap or t.block_k < k for t in found)


def test_smooth_and_grouped_formats_are_named() -> None:
    assert LinearFormat("int8", "int8", smooth=True).name == "int8+int8-smooth"
    assert Weight(torch.zeros(3, 4, dtype=torch.int8), torch.zeros(3), 4).rows == 3


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("k", [576, 1536, 2560, 4096, 8192, 11008, 14336])
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 64])
def test_every_part_of_words_has_a_step(num_tokens: int, k: int, group: int) -> None:
    for kind in Kind:
        found = candidates(kind, num_tokens, 4096, k, 2, group, WORD)
        assert found and len({t.name for t in found}) == len(found)
        assert all(t.parts == 1 for t in found) or kind is Kind.RESIDUAL
        for tile in found:
            share = -(-k // tile.parts)
            share += -share % (WORD * group)
            assert share * (tile.parts - 1) < k


@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("m", [1, 9])
def test_large_groups_with_scales_of_16_bits(
    m: int, group: int, minimum: bool, device: torch.device, dtype: torch.dtype
) -> None:
    n, k = 48, 5 * group if group == 128 else 8 * group
    stored = quantized_weight(LinearFormat("int4", group_size=group, minimum=minimum), n, k, device)
    minimums = None if stored.minimums is None else stored.minimums.half()
    stored = replace(stored, scales=stored.scales.half(), minimums=minimums)
    x = activations(torch.randn(m, k).to(device, dtype), "none")
    expected = linear8_reference(x, stored.dequantize()).to(dtype)
    for tile in candidates(Kind.RESIDUAL, m, n, k, dtype.itemsize, group, WORD):
        assert_close(total_reference(linear8_parts(x, as_weight(stored), tile=tile)).to(dtype), expected, dtype)


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_no_rows(name: str, device: torch.device) -> None:
    layer = LowLinear.of(quantized_weight(FORMATS[name], 32, 64, device))
    for low in (layer, layer.exactly()):
        x = Quantized(torch.empty(0, 64, device=device), None)
        assert low.whole(x, torch.float32, None, False).shape == (0, 32)
        assert low.parts(x, torch.float32, None, False).parts.shape == (1, 0, 32)
        mixed = low.mixed(x, torch.float32, None, False)
        assert isinstance(mixed, torch.Tensor) and mixed.shape == (0, 16)
        assert low(x.values).shape == (0, 32) and low.gated(x.values).shape == (0, 16)
