"""Products of low-bit weights and 8-bit activations on a CPU against their descriptions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from server.quant.cpu import linear
from server.quant.cpu.linear import CpuLinear, round_to_int8
from server.quant.cpu.product import why_not
from server.quant.cpu.vectors import ISA
from server.quant.formats import LinearFormat, QuantizedWeight, quantize_activations, reference_linear

pytestmark = pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")
KINDS = {
    "int4-min": LinearFormat("int4", "int8-group", 32, minimum=True),
    "int4": LinearFormat("int4", "int8-group", 32),
    "int8": LinearFormat("int8", "int8-group", 32),
}


def random_weight(form: LinearFormat, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """Every value that the format can store, scales as float16 holds them."""
    made = torch.Generator().manual_seed(seed)
    if form.weights == "int8":
        values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=made)
    else:
        values = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=made)
    scales = torch.rand(rows, columns // 32, generator=made).half()
    minimums = (-8 * torch.rand(rows, columns // 32, generator=made)).half() if form.minimum else None
    return QuantizedWeight(form, values, scales, minimums)


def random_rows(num_rows: int, columns: int) -> Tensor:
    """Rows with an empty group and one of the largest numbers only."""
    x = torch.randn(num_rows, columns, generator=torch.Generator().manual_seed(1))
    x[0, :32] = 0.0
    x[-1, 32:64] = 3e30
    return x


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind: str, threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ALONE", 0 if threads else 1 << 40)
    weight = random_weight(KINDS[kind], 48, 96)
    layer = CpuLinear(weight)
    for num_rows in (1, 2, 3, 7, 8, 13):
        x = random_rows(num_rows, 96)
        expected = reference_linear(x.double(), weight)
        largest = expected.abs().amax(dim=1, keepdim=True)
        assert ((layer(x) - expected).abs() <= 1e-5 * largest).all()


@pytest.mark.parametrize("kind", KINDS)
def test_row_has_the_same_bits_however_many_rows_there_are(kind: str) -> None:
    layer = CpuLinear(random_weight(KINDS[kind], 32, 128))
    x = random_rows(29, 128)
    together = layer(x)
    for first, end in ((0, 1), (0, 2), (3, 7), (5, 13), (1, 28)):
        assert torch.equal(layer(x[first:end]), together[first:end])


def test_outputs_beyond_a_tile_and_bias() -> None:
    weight, bias = round_to_int8(torch.randn(21, 64)), torch.randn(21)
    x = torch.randn(3, 64)
    assert torch.allclose(CpuLinear(weight, bias)(x), reference_linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_takes_no_rows_and_rows_apart() -> None:
    layer = CpuLinear(random_weight(KINDS["int4"], 16, 64))
    assert layer(torch.zeros(0, 64)).shape == (0, 16)
    x = torch.randn(64, 5)
    assert torch.equal(layer(x.t()), layer(x.t().contiguous()))


def test_nan_and_infinity_stay_visible() -> None:
    layer = CpuLinear(random_weight(KINDS["int4-min"], 16, 64))
    x = torch.randn(3, 64)
    x[0, 40], x[1, 3] = float("nan"), float("inf")
    finite = layer(x).isfinite().all(dim=1)
    assert finite.tolist() == [False, False, True]


def test_rounding_to_8_bits_keeps_a_weight() -> None:
    weight = torch.randn(16, 64)
    error = (round_to_int8(weight).dequantize() - weight).abs().unflatten(1, (-1, 32)).amax(-1)
    assert (error <= weight.unflatten(1, (-1, 32)).abs().amax(-1) / 127 * 0.56).all()


def test_says_what_it_cannot_take() -> None:
    assert why_not(random_weight(KINDS["int4"], 16, 64)) is None
    wide = QuantizedWeight(LinearFormat("int8", "int8"), torch.zeros(16, 64, dtype=torch.int8), torch.ones(16))
    assert "groups of 32" in str(why_not(wide))
    odd = random_weight(KINDS["int8"], 16, 64)
    fine = QuantizedWeight(odd.format, odd.values, odd.scales.float() + 1e-6)
    assert "float16" in str(why_not(fine))
    with pytest.raises(ValueError, match="float16"):
        CpuLinear(fine)
    assert "multiple of 16" in str(why_not(random_weight(KINDS["int8"], 20, 64)))


def test_activations_are_rounded_as_described() -> None:
    """Seen through a weight that picks columns out."""
    eye = QuantizedWeight(KINDS["int8"], torch.eye(64, dtype=torch.int8), torch.ones(64, 2).half())
    x = random_rows(4, 64)
    q, scales = quantize_activations(x, "int8-group", 32)
    assert torch.equal(CpuLinear(eye)(x), (q.unflatten(1, (2, 32)) * scales.unsqueeze(-1)).flatten(1))


_OTHER = """
import sys, torch
from tests.quant.cpu.test_product import KINDS, random_rows, random_weight
from server.quant.cpu.linear import CpuLinear
torch.save([CpuLinear(random_weight(form, 32, 96))(random_rows(11, 96)) for form in KINDS.values()], sys.argv[1])
"""


@pytest.mark.parametrize("isa", ["avx-vnni", "avx2"])
def test_lesser_processors_get_the_same_bits(isa: str, tmp_path: object) -> None:
    if ISA == "avx2" or (ISA == "avx-vnni" and isa == ISA):
        pytest.skip("this processor has no better")
    file = f"{tmp_path}/{isa}.pt"
    subprocess.run([sys.executable, "-c", _OTHER, file], env={**os.environ, "OUTPACE_CPU_ISA": isa}, check=True)
    for other, form in zip(torch.load(file), KINDS.values(), strict=True):
        assert torch.equal(other, CpuLinear(random_weight(form, 32, 96))(random_rows(11, 96)))
