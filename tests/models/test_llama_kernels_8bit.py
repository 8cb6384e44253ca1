"""Layers in low precision by kernels against the formats' reference, layer by layer, for few tokens and many."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported

# isort: split

from server.kernels.eightbit_tiles import candidates
from server.kernels.runtime import INTERPRETED
from server.kernels.skinny_qkv import Heads, norm_qkv_rope_reference
from server.kernels.skinny_tiles import MAX_TOKENS, Kind
from server.models.llama_kernels_8bit import LowLayer, LowStep, LowWay, kernel_key
from server.models.llama_tuning_8bit import tuned_low_plan
from server.models.norm import RMSNorm
from server.quant.cuda import supported
from server.quant.formats import FP8, LinearFormat, QuantizedWeight, reference_linear
from server.quant.low import Low, LowLinear
from server.quant.low_any import DenseLinear

if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("kernels were imported without the interpreter", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, INNER, VOCAB, EPS = 64, 96, 48, 1e-5
HEADS = Heads(2, 1, 32)
FORMATS = {
    "fp8": LinearFormat("fp8", "fp8"),
    "int8": LinearFormat("int8", "int8"),
    "smooth": LinearFormat("int8", "int8", smooth=True),
    "weight-only": LinearFormat("int8"),
    "w4a8": LinearFormat("int4", "int8", group_size=32),
    "dense": None,
}


def stored(format: LinearFormat, n: int, k: int) -> QuantizedWeight:
    shape = (n,) if format.group_size is None else (n, k // format.group_size)
    width = {"fp8": 1.0, "int8": 73.0, "int4": 5.0}[format.weights]
    scales = (torch.rand(shape) + 0.5) / k**0.5 / width
    values = {
        "fp8": torch.randn(n, k).to(FP8),
        "int8": torch.randint(-127, 128, (n, k)).to(torch.int8),
        "int4": torch.randint(0, 256, (n, k // 2)).to(torch.uint8),
    }[format.weights]
    smooth = torch.rand(k) + 0.5 if format.smooth else None
    return QuantizedWeight(format, values, scales, input_scales=smooth).to(DEVICE)


class Pair:
    """A layer by kernels and what it has to compute."""

    def __init__(self, format: LinearFormat | None, n: int, k: int) -> None:
        self.weight = None if format is None else stored(format, n, k)
        dense = torch.randn(n, k, device=DEVICE) / k**0.5
        self.dense = dense
        self.low: Low = DenseLinear(dense) if self.weight is None else LowLinear.of(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense) if self.weight is None else reference_linear(x, self.weight)


def norm() -> RMSNorm:
    return RMSNorm(1 + 0.3 * torch.rand(HIDDEN, device=DEVICE), EPS)


def plain_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(x, (HIDDEN,), norm.weight, norm.eps)


MIXED = ("fp8", "dense", "int8", "weight-only")
CASES = [(m, formats) for formats in [*[(name,) * 4 for name in FORMATS], MIXED] for m in (1, 5)]
CASES += [(66, formats) for formats in (("fp8",) * 4, ("w4a8",) * 4, MIXED)]


@pytest.mark.parametrize(("num_tokens", "formats"), CASES, ids=str)
def test_layers(num_tokens: int, formats: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    queries = HEADS.num_heads * HEADS.head_dim
    shapes = [(HEADS.columns, HIDDEN), (HIDDEN, queries), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
    pairs = [[Pair(FORMATS[f], *shape) for f, shape in zip(formats, shapes, strict=True)] for _ in range(2)]
    head, last = Pair(FORMATS[formats[0]], VOCAB, HIDDEN), norm()
    layers = [
        LowLayer(norm(), qkv.low, None, None, out.low, norm(), up.low, down.low, None, True)
        for qkv, out, up, down in pairs
    ]
    positions, places = torch.arange(num_tokens, device=DEVICE), torch.arange(num_tokens, device=DEVICE) + 1
    angles = torch.rand(80, HEADS.head_dim // 2, device=DEVICE) * 6
    rotations = torch.stack([angles.cos(), angles.sin()], dim=-1)
    pools = [torch.zeros(num_tokens + 1, 2, HEADS.head_dim, device=DEVICE) for _ in layers]
    expected_pools = [pool.clone() for pool in pools]
    x = torch.randn(num_tokens, HIDDEN, device=DEVICE)
    expected = x.clone()
    for layer, pair, pool in zip(layers, pairs, expected_pools, strict=True):
        qkv = pair[0](plain_norm(expected, layer.input_norm))
        same = torch.eye(HEADS.columns, device=DEVICE)
        # The reference's norm is of no effect on rows of one length.
        q = _rotated(qkv, same, pool, positions, places, rotations)
        expected = expected + pair[1](q)
        gate, up = pair[2](plain_norm(expected, layer.post_norm)).chunk(2, dim=-1)
        expected = expected + pair[3](F.silu(gate) * up)
    way = LowWay(HEADS, rotations, torch.float32, pdl=False)
    step = LowStep(positions, places, lambda q, pool, window: q.flatten(1))
    seen: list[int] = []
    ready = way.layers(x, layers, pools, step, last, head.low, lambda i, x: seen.append(i))
    assert seen == [0, 1]
    close(x, expected)
    for found, pool in zip(pools, expected_pools, strict=True):
        close(found, pool)
    wanted = head(plain_norm(expected, last))
    close(way.logits(x, ready, last, head.low, None, step.plan), wanted)
    rows = torch.tensor([num_tokens - 1, 0], device=DEVICE)
    close(way.logits(x, ready, last, head.low, rows, step.plan), wanted[rows])


def _rotated(qkv: Tensor, same: Tensor, pool: Tensor, positions: Tensor, places: Tensor, rotations: Tensor) -> Tensor:
    """Rotation and pool of finished rows, by the bf16 kernel's reference: its norm taken back."""
    rms = (qkv.square().mean(-1, keepdim=True) + EPS).sqrt()
    ones = torch.ones(qkv.shape[1], device=DEVICE)
    scaled = pool.clone()
    q = norm_qkv_rope_reference(qkv, ones, EPS, same, None, scaled, positions, places, rotations, HEADS)
    pool[places] = scaled[places] * rms[:, :, None]
    return q * rms


def close(found: Tensor, expected: Tensor) -> None:
    """A last bit in one layer may be a step of an activation in the next."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) < 1e-2


def test_what_is_supported() -> None:
    assert all(supported(form) for form in FORMATS.values() if form is not None)
    refused = [
        LinearFormat("int4", group_size=48),
        LinearFormat("int8", "int8-group", group_size=32),
        LinearFormat("int4", "int8", group_size=32, minimum=True),
        LinearFormat("fp8", "int8"),
    ]
    for form in refused:
        assert not supported(form)
        if not form.minimum:
            with pytest.raises(ValueError, match="no kernel"):
                LowLinear.of(stored(form, 16, 96))


def test_a_layer_by_itself() -> None:
    weight = stored(FORMATS["smooth"] or LinearFormat("int8"), 24, 64)
    linear, x = LowLinear.of(weight), torch.randn(3, 64, device=DEVICE)
    assert (linear.in_features, linear.out_features, linear.path) == (64, 24, "triton-int8+int8-smooth")
    torch.testing.assert_close(linear(x), reference_linear(x, weight), rtol=1e-4, atol=1e-4)
    gate, up = reference_linear(x, weight).chunk(2, dim=-1)
    torch.testing.assert_close(linear.gated(x), F.silu(gate) * up, rtol=1e-4, atol=1e-4)
    many = torch.randn(MAX_TOKENS + 2, 64, device=DEVICE)
    gate, up = reference_linear(many, weight).chunk(2, dim=-1)
    torch.testing.assert_close(linear.gated(many), F.silu(gate) * up, rtol=1e-4, atol=1e-4)
    assert linear.gated(x[:0]).shape == (0, 12)
    assert linear(x[:0]).shape == (0, 24)


def test_tiles_are_chosen_one_layer_after_the_other() -> None:
    pairs = [
        Pair(FORMATS["int8"], *shape)
        for shape in [(HEADS.columns, HIDDEN), (HIDDEN, 64), (2 * INNER, HIDDEN), (HIDDEN, INNER), (VOCAB, HIDDEN)]
    ]
    qkv, out, up, down, head = (pair.low for pair in pairs)
    layer = LowLayer(norm(), qkv, None, None, out, norm(), up, down, None, True)
    rotations = torch.zeros(8, HEADS.head_dim // 2, 2, device=DEVICE)
    way, asked = LowWay(HEADS, rotations, torch.float32, pdl=False), []

    def choose(question: str, options: Sequence[tuple[str, Callable[[], object]]]) -> str:
        asked.append(question.split("/")[1])
        options[-1][1]()
        return options[-1][0]

    plan = tuned_low_plan(way, [layer], norm(), head, 2, choose)
    assert asked == ["qkv", "out", "gate_up", "down", "head"]
    assert plan.of("qkv", qkv) == candidates(Kind.QKV, 2, HEADS.columns, HIDDEN)[-1]
    assert {key for _, key in plan.choices} == {kernel_key(pair.low) for pair in pairs} and plan.of("head", head)
