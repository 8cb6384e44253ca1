"""Reading `config.json`: what is taken from where, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from server.models.config import LLAMA_FAMILY, UnsupportedModelError, architecture_of, eos_ids, parse_config

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


def test_defaults() -> None:
    c = parse_config(RAW)
    assert (c.num_kv_heads, c.head_dim, c.max_position_embeddings, c.rms_norm_eps) == (8, 8, 2048, 1e-6)
    assert not (c.attention_bias or c.output_bias or c.mlp_bias or c.qk_norm or c.tie_word_embeddings)
    assert c.sliding_window == (None,) * 4 and c.rope_layers == (True,) * 4 and c.eos_token_ids == ()


def test_biases_of_each_family() -> None:
    def biases(arch: str, bias: bool) -> tuple[bool, bool]:
        c = parse_config(RAW | {"architectures": [arch], "attention_bias": bias})
        return c.attention_bias, c.output_bias

    assert biases("LlamaForCausalLM", True) == (True, True)
    assert biases("Qwen3ForCausalLM", True) == (True, True)
    assert biases("Qwen3ForCausalLM", False) == (False, False)
    assert biases("Qwen2ForCausalLM", False) == (True, False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": 7}, (None,) * 4),  # Llama has none
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 7}, (7,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 4),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 7, "use_sliding_window": False}, (None,) * 4),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (None, None, None, 7),
        ),
        (
            {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"] * 2},
            (None, 7, None, 7),
        ),
    ],
)
def test_sliding_windows(changes: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert parse_config(RAW | changes).sliding_window == expected


def test_smollm3_layers_without_rope() -> None:
    raw = RAW | {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 1, 1, 0]}
    assert parse_config(raw).rope_layers == (True, True, True, False)
    assert parse_config(RAW | {"no_rope_layers": [1, 1, 1, 0]}).rope_layers == (True,) * 4


def test_eos_ids() -> None:
    assert eos_ids({}) == eos_ids({"eos_token_id": None}) == ()
    assert eos_ids({"eos_token_id": 5}) == (5,)
    assert eos_ids({"eos_token_id": [5, 7]}) == (5, 7)


@pytest.mark.parametrize("raw", [{}, {"architectures": []}, {"architectures": None}])
def test_a_file_without_architecture_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="architectures"):
        architecture_of(raw)


def test_refusals_name_what_works() -> None:
    with pytest.raises(UnsupportedModelError, match=r"BertModel.*LlamaForCausalLM") as e:
        parse_config(RAW | {"architectures": ["BertModel"]})
    assert all(name in str(e.value) for name in LLAMA_FAMILY)
    with pytest.raises(UnsupportedModelError, match="hidden_act='gelu'"):
        parse_config(RAW | {"hidden_act": "gelu"})
