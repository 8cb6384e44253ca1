"""Rotary embedding against transformers' tables and against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.models.config import RopeConfig, UnsupportedModelError, rope_from
from server.models.rope import interleave_rows, inverse_frequencies, rotate_, rotation_table
from tests.models.parity import spelled_for_installed

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096, "attention_factor": 0.8},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096, "truncate": False},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_equal_transformers(scaling: dict[str, Any], theta: float) -> None:
    original = int(scaling.get("original_max_position_embeddings", 4096))
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=int(original * scaling["factor"]),
        **spelled_for_installed({"rope_parameters": {**scaling, "rope_theta": theta}}),
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    actual, actual_factor = inverse_frequencies(RopeConfig(theta, scaling), 64, config.max_position_embeddings)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert actual_factor == pytest.approx(factor)


def test_default_frequencies_are_the_papers() -> None:
    freqs, factor = inverse_frequencies(RopeConfig(100.0, {}), 4, 16)
    torch.testing.assert_close(freqs, torch.tensor([1.0, 0.1]))
    assert factor == 1.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "unheard-of"])
def test_other_types_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{kind}'.*supported: default, linear, llama3, yarn"):
        inverse_frequencies(RopeConfig(10000.0, {"rope_type": kind, "factor": 2.0}), 64, 128)


def test_yarn_with_mscale_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mscale"):
        inverse_frequencies(RopeConfig(10000.0, {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}), 64, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_of_interleaved_pairs_is_rotate_half(dtype: torch.dtype) -> None:
    rope, dim, positions = RopeConfig(100.0, {}), 8, torch.tensor([0, 3, 9])
    freqs, _ = inverse_frequencies(rope, dim, 16)
    x = torch.randn(3, 2, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = (positions.unsqueeze(1) * freqs).repeat(1, 2).unsqueeze(1)
    half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
    expected = x.float() * angles.cos() + half.float() * angles.sin()
    pairs = interleave_rows(x.reshape(6, dim).flatten(), dim).view(3, 2, dim).clone()
    rotate_(pairs, rotation_table(rope, dim, 16, torch.device("cpu"))[positions].unsqueeze(1))
    back = torch.cat([pairs[..., 0::2], pairs[..., 1::2]], dim=-1)
    torch.testing.assert_close(back.float(), expected, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_interleave_keeps_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, generator=generator)
    assert torch.equal(interleave_rows(torch.arange(6), 6), torch.tensor([0, 3, 1, 4, 2, 5]))
    torch.testing.assert_close(interleave_rows(q, 6) @ interleave_rows(k, 6), q @ k)


def test_both_spellings_are_read() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    new = rope_from({"rope_parameters": {**scaling, "rope_theta": 500.0}})
    old = rope_from({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0})
    assert new.theta == old.theta == 500.0
    assert new.scaling["factor"] == old.scaling["factor"] == 2.0
    assert new.scaling["rope_type"] == old.scaling["rope_type"] == "linear"
    assert rope_from({}) == RopeConfig(10000.0, {})
