"""GGUF blocks in the layout of our kernels: bit for bit what gguf's own dequantisation gives."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from server.models.gguf import GGML_TYPES, dequantize
from server.models.gguf_convert import RawBlocks
from server.models.gguf_native import layout, pack
from server.models.gguf_weights import quantized_weight
from server.quant.formats import QuantizedWeight

KEPT = {
    "Q4_0": "int4-g32",
    "Q4_1": "int4-g32-min",
    "Q5_0": "int8-g32",
    "Q5_1": "int8-g32-min",
    "Q8_0": "int8-g32",
    "Q2_K": "int4-g16-min",
    "Q3_K": "int4-g16",
    "Q4_K": "int4-g32-min",
    "Q5_K": "int8-g32-min",
    "Q6_K": "int8-g16",
    "IQ4_NL": "int8-g32",
    "IQ4_XS": "int8-g32",
}
QUANTISERS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
# Where each type has its float16 factors, in bytes from the beginning of a block.
FACTORS = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip
# Zeros of both signs, the smallest subnormal, subnormals, the largest, ordinary ones of both signs.
EXTREMES = [0.0, -0.0, 6e-8, -6e-8, 3e-6, 65504.0, -65504.0, 1.0, -0.0371, 0.25]
Bytes = NDArray[np.uint8]


def type_id(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name]


def raw_blocks(name: str, data: Bytes, order: NDArray[np.int64] | None = None) -> RawBlocks:
    values, num_bytes = GGML_QUANT_SIZES[type_id(name)]
    return RawBlocks(data, name, (len(data), data.shape[1] // num_bytes * values), order)


def weight_of(raw: RawBlocks) -> QuantizedWeight:
    weight = quantized_weight(raw)
    assert weight is not None
    return weight


def assert_exact(name: str, data: Bytes) -> None:
    """Every bit, the sign of zero included."""
    mine = weight_of(raw_blocks(name, data)).dequantize().numpy()
    reference = dequantize(data, type_id(name))
    assert mine.shape == reference.shape
    np.testing.assert_array_equal(mine.view(np.uint32), reference.view(np.uint32))


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> Bytes:
    """Every byte drawn, factors finite: all codes, sub-scales and high bits occur."""
    rng = np.random.default_rng(seed)
    _, num_bytes = GGML_QUANT_SIZES[type_id(name)]
    data = rng.integers(0, 256, (rows * blocks, num_bytes), dtype=np.uint8)
    for at in FACTORS[name]:
        factors = rng.standard_normal(len(data)).astype(np.float16)
        data[:, at : at + 2] = factors[:, None].view(np.uint8)
    return data.reshape(rows, -1)


def test_every_type_has_a_format_or_is_known_to_have_none() -> None:
    assert {name for name, _, _ in GGML_TYPES.values() if layout(name) is not None} == KEPT.keys()
    for name, wanted in KEPT.items():
        assert weight_of(raw_blocks(name, random_blocks(name, 1, 1))).format.name == wanted
    assert quantized_weight(RawBlocks(np.zeros((1, 66), np.uint8), "IQ2_XXS", (1, 256), None)) is None
    assert quantized_weight(RawBlocks(np.zeros((1, 128), np.uint8), "F32", (1, 32), None)) is None


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (33, 2)])
def test_random_blocks_are_kept_exactly(name: str, rows: int, blocks: int) -> None:
    assert_exact(name, random_blocks(name, rows, blocks, seed=rows))


@pytest.mark.parametrize("name", KEPT)
def test_extreme_factors_of_either_sign(name: str) -> None:
    for main in EXTREMES:
        for other in EXTREMES:
            data = random_blocks(name, 3, 2)
            blocks = data.reshape(-1, GGML_QUANT_SIZES[type_id(name)][1])
            for at, factor in zip(FACTORS[name], (main, other), strict=False):
                blocks[:, at : at + 2] = np.array([factor], np.float16).view(np.uint8)
            assert_exact(name, data)


@pytest.mark.parametrize("name", KEPT)
def test_constant_bytes(name: str) -> None:
    _, num_bytes = GGML_QUANT_SIZES[type_id(name)]
    assert_exact(name, np.zeros((5, num_bytes), np.uint8))
    assert_exact(name, np.full((5, num_bytes), 0x7B, np.uint8))  # 0x7B7B is a large finite float16


@pytest.mark.parametrize("name", KEPT)
def test_scales_that_are_not_finite(name: str) -> None:
    data = random_blocks(name, 2, 2)
    blocks = data.reshape(-1, GGML_QUANT_SIZES[type_id(name)][1])
    for at in FACTORS[name]:
        blocks[:, at : at + 2] = np.array([np.inf], np.float16).view(np.uint8)
    mine = weight_of(raw_blocks(name, data)).dequantize().numpy()
    np.testing.assert_array_equal(mine, dequantize(data, type_id(name)))


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_what_gguf_quantises(name: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    weights = rng.standard_normal((rows, 96)).astype(np.float32)
    weights[0, :32] = 0
    weights[-1, 32:] *= 1e4
    weights[-1, 64:] *= 1e-7
    data = quantize(weights, type_id(name))
    assert_exact(name, data)
    with np.errstate(invalid="ignore"):
        assert np.abs(weight_of(raw_blocks(name, data)).dequantize().numpy()[0, :32]).max() == 0


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q6_K"])
def test_rows_in_another_order(name: str) -> None:
    data = random_blocks(name, 9, 2)
    order = np.random.default_rng(3).permutation(9)
    mine = weight_of(raw_blocks(name, data, order)).dequantize().numpy()
    np.testing.assert_array_equal(mine, dequantize(data[order], type_id(name)))


def test_the_low_nibble_is_the_even_column() -> None:
    """Value i of a Q4_0 block is code i: the first sixteen in the file's low nibbles, the others in the high ones."""
    codes = np.arange(32) % 16
    data = np.zeros((1, 18), np.uint8)
    data[0, :2] = np.array([1.0], np.float16).view(np.uint8)
    data[0, 2:] = codes[:16] | (codes[16:] << 4)
    packed = pack(data, "Q4_0")
    assert [int(byte) & 15 for byte in packed.values[0]] == codes[0::2].tolist()
    assert [int(byte) >> 4 for byte in packed.values[0]] == codes[1::2].tolist()
    assert packed.scales.dtype == np.float16 and packed.minimums is None


def test_rows_of_part_of_a_block() -> None:
    with pytest.raises(ValueError, match=r"19 bytes are no whole number of Q4_0 blocks \(18 bytes\)"):
        pack(np.zeros((2, 19), np.uint8), "Q4_0")


def test_read_only_blocks_give_tensors_of_their_own() -> None:
    data = random_blocks("Q8_0", 2, 1)
    data.flags.writeable = False
    weight = weight_of(raw_blocks("Q8_0", data))
    weight.values.zero_()
    assert data[:, 2:].any()
