from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from server.kernels.rope import rope_write, rope_write_reference
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU


@dataclass
class Case:
    """One call: `heads`, `kv_heads`, `dim` of qkv [tokens, (heads + 2 kv_heads) dim]."""

    qkv: Tensor
    pool: Tensor
    positions: Tensor
    slot_mapping: Tensor
    rotations: Tensor
    shape: tuple[int, int, int]

    def run(self, function: Any, **options: Any) -> tuple[Tensor, Tensor]:
        qkv, pool = self.qkv.clone(), self.pool.clone()
        function(qkv, pool, self.positions, self.slot_mapping, self.rotations, *self.shape, **options)
        return qkv, pool


def make(tokens: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, scale: float = 1) -> Case:
    heads, kv_heads, dim = shape
    num_positions, places = 50, 2 * tokens + 5
    angles = torch.rand(num_positions, dim // 2, device=device) * 7
    return Case(
        qkv=(torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device) * scale).to(dtype),
        pool=torch.full((places, 2 * kv_heads, dim), 9.0, device=device).to(dtype),
        positions=torch.randint(num_positions, (tokens,), device=device),
        slot_mapping=torch.randperm(places, device=device)[:tokens],
        rotations=torch.stack([angles.cos(), angles.sin()], dim=-1),
        shape=shape,
    )


SHAPES = [(9, 3, 64), (2, 1, 96), (3, 1, 16)] + (
    [(32, 8, 128), (8, 4, 256), (32, 8, 64), (40, 8, 96)] if ON_GPU else []
)
TOKENS = [1, 5] + ([320, 4099] if ON_GPU else [])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
def test_equals_reference(
    shape: tuple[int, int, int],
    tokens: int,
    normed: bool,
    rotate: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    case = make(tokens, shape, device, dtype)
    options: dict[str, Any] = {"rotate": rotate}
    if normed:
        q_norm, k_norm = torch.randn(2, shape[2], device=device, dtype=dtype)
        options |= {"q_norm": q_norm, "k_norm": k_norm, "eps": 1e-5}
    qkv, pool = case.run(rope_write, **options)
    expected_qkv, expected_pool = case.run(rope_write_reference, **options)
    assert_close(qkv, expected_qkv, dtype)
    assert_close(pool, expected_pool, dtype)
    if not rotate and not normed:
        assert torch.equal(qkv, case.qkv)
    untouched = torch.ones(len(pool), dtype=torch.bool, device=device)
    untouched[case.slot_mapping] = False
    assert torch.equal(pool[untouched], case.pool[untouched])
    values = (pool[case.slot_mapping, shape[1] :].flatten(1), case.qkv[:, -shape[1] * shape[2] :])
    assert torch.equal(*values)


def test_keys_and_values_stay(device: torch.device, dtype: torch.dtype) -> None:
    case = make(3, (4, 2, 32), device, dtype)
    qkv, _ = case.run(rope_write)
    assert torch.equal(qkv[:, 128:], case.qkv[:, 128:])


def float8_pools(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    case.pool = torch.zeros(case.pool.shape, device=case.pool.device).to(torch.float8_e4m3fn)
    (_, found), (_, expected) = case.run(rope_write, **options), case.run(rope_write_reference, **options)
    return found.float(), expected.float()


def test_pool_in_float8_saturates(device: torch.device, dtype: torch.dtype) -> None:
    case = make(6, (3, 1, 64), device, dtype)
    case.qkv = torch.randint(-15, 16, case.qkv.shape, device=device).to(dtype) * 64  # what float8 holds, and more
    found, expected = float8_pools(case, rotate=False)
    assert float(found.abs().max()) == 448
    assert torch.equal(found, expected)


@pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter rounds to float8 wrongly where the exponent goes up")
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_pool_in_float8_rounds(scale: float, device: torch.device, dtype: torch.dtype) -> None:
    found, expected = float8_pools(make(64, (32, 8, 128), device, dtype, scale))
    # Almost equal numbers may round to neighbours, which are an eighth apart.
    assert bool(((found - expected).abs() <= expected.abs() / 8 + 2**-9).all())
    assert float((found == expected).float().mean()) > 0.99


def test_positions_past_the_table_take_its_last_row(device: torch.device) -> None:
    case = make(2, (2, 1, 32), device, torch.float32)
    case.positions = torch.tensor([49, 50_000], device=device)
    found, expected = case.run(rope_write), case.run(rope_write_reference)
    assert_close(found[0], expected[0], torch.float32)
    assert_close(found[1], expected[1], torch.float32)


def test_a_token_does_not_depend_on_the_batch(device: torch.device, dtype: torch.dtype) -> None:
    case = make(9, (9, 3, 64), device, dtype)
    weights = torch.randn(2, 64, device=device, dtype=dtype)
    options: dict[str, Any] = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-5}
    whole, pool = case.run(rope_write, **options)
    one = Case(case.qkv[7:8], case.pool, case.positions[7:8], case.slot_mapping[7:8], case.rotations, case.shape)
    alone, alone_pool = one.run(rope_write, **options)
    assert torch.equal(alone[0], whole[7])
    place = case.slot_mapping[7]
    assert torch.equal(alone_pool[place], pool[place])


def test_other_tokens_nan_is_not_seen(device: torch.device, dtype: torch.dtype) -> None:
    case = make(4, (3, 1, 64), device, dtype)
    case.qkv[3] = float("nan")
    case.slot_mapping[3] = 0 if 0 not in case.slot_mapping[:3] else case.slot_mapping[3]
    qkv, pool = case.run(rope_write)
    assert bool(qkv[:3].isfinite().all()) and bool(pool[case.slot_mapping[:3]].isfinite().all())
