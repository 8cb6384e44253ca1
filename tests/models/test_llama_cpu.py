"""A compiled step in low precision against the network whose layers are computed as the format describes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.models.config import ModelConfig, parse_config
from server.models.llama import LlamaModel
from server.models.llama_cpu import LlamaCpuModel, cpu_weights, why_not
from server.quant.cpu.vectors import ISA
from server.quant.formats import LinearFormat, QuantizedWeight, reference_linear
from tests.models.paging import Chunk, in_chunks, make_pools, ragged_batch, scattered_blocks, step

pytestmark = pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
INT4 = LinearFormat("int4", "int8-group", 32, minimum=True)
INT8 = LinearFormat("int8", "int8-group", 32)


class Stored:
    """A small checkpoint of quantised layers, by Hugging Face name."""

    def __init__(self, config: ModelConfig, body: LinearFormat) -> None:
        self.made = torch.Generator().manual_seed(5)
        c, width = config, config.head_dim
        self.tensors: dict[str, Tensor | QuantizedWeight] = {
            "model.embed_tokens.weight": self.weight(INT8, c.vocab_size, c.hidden_size),
            "model.norm.weight": self.norm(c.hidden_size),
        }
        for i in range(c.num_layers):
            p = f"model.layers.{i}."
            for name, rows in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
                self.tensors[f"{p}self_attn.{name}_proj.weight"] = self.weight(body, rows * width, c.hidden_size)
            self.tensors[f"{p}self_attn.o_proj.weight"] = self.weight(body, c.hidden_size, c.num_heads * width)
            for name in ("gate", "up"):
                self.tensors[f"{p}mlp.{name}_proj.weight"] = self.weight(body, c.intermediate_size, c.hidden_size)
            self.tensors[f"{p}mlp.down_proj.weight"] = self.weight(INT8, c.hidden_size, c.intermediate_size)
            for name in ("input", "post_attention"):
                self.tensors[f"{p}{name}_layernorm.weight"] = self.norm(c.hidden_size)

    def norm(self, size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=self.made)

    def weight(self, form: LinearFormat, rows: int, columns: int) -> QuantizedWeight:
        """Values of about 1 / sqrt(columns)."""
        scale = columns**-0.5 / (64 if form.weights == "int8" else 4)
        scales = (scale * (0.5 + torch.rand(rows, columns // 32, generator=self.made))).half()
        if form.weights == "int8":
            values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=self.made)
            return QuantizedWeight(form, values, scales)
        values = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=self.made)
        return QuantizedWeight(form, values, scales, (-7.5 * scales.float()).half())

    def get(self, name: str) -> Tensor | QuantizedWeight:
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def plain(self, name: str) -> Tensor:
        found = self.tensors[name]
        return found if isinstance(found, Tensor) else found.dequantize()


def described(config: ModelConfig, stored: Stored) -> LlamaModel:
    """The network in torch, its layers as `reference_linear` says."""
    model = LlamaModel(config, stored.plain, stored.has, 512)
    weights = cpu_weights(config, stored.get, stored.has)
    assert weights is not None
    for layer, quantised in zip(model.layers, weights.layers, strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            setattr(layer, name, partial(reference_linear, weight=getattr(quantised, name)))
    model.head = partial(reference_linear, weight=weights.head)  # type: ignore[assignment]
    return model


def both(threads: int = 2, body: LinearFormat = INT4, **fields: Any) -> tuple[LlamaCpuModel, LlamaModel]:
    config = parse_config({**BASE, **fields})
    stored = Stored(config, body)
    weights = cpu_weights(config, stored.get, stored.has)
    assert weights is not None
    return LlamaCpuModel(config, weights, 512, threads), described(config, stored)


def prompt(length: int) -> list[int]:
    return torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def assert_alike(ours: Tensor, expected: Tensor) -> None:
    """Exactly until float32 rounding moves the first activation from one 8-bit number to the next, then nearly."""
    error = (ours - expected).abs()
    assert error[0].max() < 1e-4 * expected.abs().max()
    assert error.mean() < 1e-2 * expected.abs().mean()
    assert error.max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 6},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 70},
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0, 1]},
    ],
    ids=["gqa", "mha", "mqa", "window", "some-without-rope"],
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matches_described_network(fields: dict[str, Any], threads: int) -> None:
    ours, reference = both(threads, **fields)
    ids = prompt(150)
    for model_blocks in (scattered_blocks(1, 40)[0], list(range(1, 41))):
        results = [in_chunks(m, make_pools(m, 42), ids, model_blocks, [150]) for m in (ours, reference)]
        assert_alike(*results)


@pytest.mark.parametrize("window", [None, 70])
def test_token_has_the_same_bits_in_any_chunks_and_company(window: int | None) -> None:
    model, _ = both(architectures=["MistralForCausalLM"], sliding_window=window)
    ids, blocks = prompt(200), scattered_blocks(1, 50)[0]
    whole = in_chunks(model, make_pools(model, 160), ids, blocks, [200])
    for sizes in ([1] * 200, [64, 6, 1, 1, 5, 123], [199, 1], [3, 129, 68]):
        assert torch.equal(in_chunks(model, make_pools(model, 160), ids, blocks, sizes), whole)
    rows = scattered_blocks(3, 50)
    pools = make_pools(model, 160)
    step(model, pools, [Chunk(ids[:180], 0, rows[0]), Chunk(prompt(90), 0, rows[1]), Chunk(ids[:60], 0, rows[2])])
    chunks = [Chunk(ids[180:], 180, rows[0]), Chunk([7], 90, rows[1]), Chunk(ids[60:199], 60, rows[2])]
    first, _, third = step(model, pools, chunks)
    assert torch.equal(first, whole[180:])
    assert torch.equal(third, whole[60:199])


def test_thread_count_changes_no_bit() -> None:
    ids, blocks = prompt(140), list(range(1, 41))
    one, three = (both(threads)[0] for threads in (1, 3))
    assert torch.equal(*(in_chunks(m, make_pools(m, 42), ids, blocks, [130, 1, 9]) for m in (one, three)))


def test_features_and_logits_where_asked() -> None:
    ours, reference = both()
    token_ids, batch = ragged_batch([Chunk(prompt(30), 0, list(range(1, 10)))])
    at = torch.tensor([29, 3, 3])
    with torch.inference_mode():
        logits, features = ours.forward(token_ids, make_pools(ours, 12), batch, at, (0, 2))
        expected, hidden = reference.forward(token_ids, make_pools(reference, 12), batch, at, (0, 2))
    assert features is not None and hidden is not None
    assert_alike(logits, expected)
    assert_alike(features, hidden)
    assert torch.equal(logits[1], logits[2])


def test_what_drafters_take() -> None:
    model, reference = both()
    ids = torch.tensor([5, 159])
    assert torch.equal(model.embedding, reference.embedding)
    assert torch.equal(model.output_rows(ids), reference.embedding[ids])
    assert torch.allclose(model.head(torch.eye(96))[:, :3], reference.embedding.t()[:, :3])


def test_says_what_it_cannot_serve() -> None:
    config = parse_config(BASE)
    stored = Stored(config, INT4)
    weights = cpu_weights(config, stored.get, stored.has)
    assert weights is not None
    assert why_not(config, weights) is None
    biased = parse_config({**BASE, "attention_bias": True})
    assert "biases" in str(why_not(biased, weights))
    with pytest.raises(ValueError, match="biases"):
        LlamaCpuModel(biased, weights, 512)
    stored.tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 96)
    assert cpu_weights(config, stored.get, stored.has) is None


def test_path_names_format_and_kernel() -> None:
    assert both()[0].linear_path == f"int4-g32-min+int8-group:{ISA}"


def test_whether_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed start has left of them does not count."""
    monkeypatch.setattr("server.quant.cpu.vectors._CACHE", tmp_path)
    assert not LlamaCpuModel.kernels_kept()
    folder = tmp_path / "cpu_0123"
    folder.mkdir()
    (folder / "step.embed-21.py311.1.nbc").touch()
    assert not LlamaCpuModel.kernels_kept()
    (folder / "step.run_step-189.py311.1.nbc").touch()
    assert LlamaCpuModel.kernels_kept()
