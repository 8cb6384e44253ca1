"""EAGLE-1 heads as published: against a dense network, through both drafters, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.eagle1 import Eagle1CpuNetwork, Eagle1Network, Eagle1Weights, eagle1_shapes
from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.eagle3_config import Eagle3Config, parse_config
from draft_models.eagle3_cpu import Eagle3CpuDrafter
from draft_models.eagle3_weights import TENSOR_NAMES
from server.models.config import RopeConfig, UnsupportedModelError
from server.models.llama import LlamaModel
from server.models.loader import WeightsError
from server.models.norm import RMSNorm
from server.quant.dense import Linear
from tests.draft_models.eagle3_cpu_world import AsDevice, CpuWorld
from tests.draft_models.published_heads import (
    NUM_LAYERS,
    SHAPE,
    Layout,
    as_layers,
    chain_logits,
    read,
    renamed,
    target,
    write,
)
from tests.draft_models.test_eagle3 import BLOCK_SIZE, MAX_DRAFTS, NUM_BLOCKS, NUM_SLOTS, World
from tests.draft_models.test_eagle3_network import Dense
from tests.models.paging import Chunk, contiguous_blocks, make_pools, ragged_batch

CONFIG = Eagle3Config(
    32, 4, 2, 8, 48, 64, 64, 1e-5, RopeConfig(20000.0, {}), (NUM_LAYERS - 1,), version=1
)  # fmt: skip
TOKENS = [3, 60, 7, 9, 9]
FINAL_EPS = 1e-5


class Dense1(Dense):
    """eagle/model/cnets1.py, every position from scratch. Features are as the target's last layer leaves them."""

    w: Any

    def normed(self, features: Tensor) -> Tensor:
        norm: RMSNorm = self.w.final_norm
        return features / (features.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    def inputs(self, features: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, self.c.hidden_size), self.normed(features[:, : self.c.hidden_size])])

    def entered(self, tokens: list[int], inputs: Tensor) -> Tensor:
        both = torch.cat([self.embedding[tokens], inputs], dim=-1)
        out: Tensor = F.linear(both, self.w.fc, self.w.fc_bias)
        return out

    def projected(self, tokens: list[int], inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.entered(tokens, inputs)
        parts = (self.w.q_proj, self.w.k_proj, self.w.v_proj)
        q, k, v = ((x @ p.T).view(len(tokens), -1, self.c.head_dim) for p in parts)
        return self.rotate(q), self.rotate(k), v

    def hidden(self, tokens: list[int], inputs: Tensor, first: int = 0) -> Tensor:
        c, w = self.c, self.w
        q, k, v = self.projected(tokens, inputs)
        k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / c.head_dim**0.5
        at = torch.arange(len(tokens))
        scores = scores.masked_fill((at > at[:, None]) | (at < first) & (at != at[:, None]), -float("inf"))
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(tokens), -1)
        residual: Tensor = self.entered(tokens, inputs) + mixed @ w.o_proj.T
        y = self.norm(residual, w.post_attention_layernorm)
        return residual.add((F.silu(y @ w.gate_proj.T) * (y @ w.up_proj.T)) @ w.down_proj.T)

    def logits(self, hidden: Tensor) -> Tensor:
        weight: Tensor = self.w.output.plain_weight()
        return hidden @ weight.T


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    made = target()
    weight = 1.0 + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(8))
    made.norm = RMSNorm(weight, FINAL_EPS)
    return made


def tensors_of_head(config: Eagle3Config = CONFIG, bias: bool = False) -> dict[str, Tensor]:
    """Random, by the names of eagle3_weights; without an output layer."""
    generator = torch.Generator().manual_seed(9)
    shapes = {TENSOR_NAMES[f]: shape for f, shape in eagle1_shapes(config).items() if f != "lm_head"}
    if bias:
        shapes["fc.bias"] = (config.hidden_size,)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t * t.shape[1] ** -0.5 if t.dim() > 1 else 1.0 + 0.3 * t for name, t in drawn.items()}


def weights_of(tensors: dict[str, Tensor], final_norm: RMSNorm, output: Tensor) -> Eagle1Weights:
    fields = {f: tensors[name] for f, name in TENSOR_NAMES.items() if name in tensors and f != "lm_head"}
    return Eagle1Weights(
        **fields, final_norm=final_norm, output=Linear(output), fc_bias=tensors.get("fc.bias")
    )  # fmt: skip


def expected(tensors: dict[str, Tensor], model: LlamaModel, output: Tensor | None = None) -> Tensor:
    """Of the dense network: logits [3, V]."""
    said: list[Tensor] = []

    def pick(logits: Tensor, position: int) -> int:
        said.append(logits)
        return int(logits.argmax())

    weights: Any = weights_of(tensors, model.norm, model.head.plain_weight() if output is None else output)
    Dense1(weights, model.embedding, CONFIG).chain(TOKENS, features(), 3, pick)
    return torch.stack(said)


def features() -> Tensor:
    return torch.randn(len(TOKENS) - 1, 32, generator=torch.Generator().manual_seed(7))


def layouts(tensors: dict[str, Tensor], embedding: Tensor) -> dict[str, Layout]:
    layers = renamed(tensors, as_layers)
    transformer = renamed(tensors, lambda n: n.replace("midlayer.", "transformer.").replace("fc.", "fusion_fc."))
    inverse = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    speculators = {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "speculators_model_type": "eagle",
        "speculators_config": {"algorithm": "eagle"},
        "layernorms": False,
        "fusion_bias": "fc.bias" in tensors,
        "transformer_layer_config": {**SHAPE, "model_type": "llama"},
    }
    nested = {"architectures": ["EAGLEModel"], "model_type": "eagle", "model": SHAPE, "truncated_vocab_size": 64}
    return {
        "eagle": (
            {**SHAPE, "architectures": ["LlamaForCausalLM"], "bias": "fc.bias" in tensors},
            {**layers, **inverse, "embed_tokens.weight": embedding},
        ),
        "sglang": ({**SHAPE, "architectures": ["LlamaForCausalLMEagle"]}, renamed(layers, lambda n: f"model.{n}")),
        "vllm": ({**SHAPE, "architectures": ["EagleLlamaForCausalLM"]}, layers),
        "vllm-nested": (nested, layers),
        "speculators": (speculators, transformer),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["eagle", "sglang", "vllm", "vllm-nested", "speculators"])
def test_every_layout_drafts_the_same(name: str, bias: bool, model: LlamaModel, tmp_path: Path) -> None:
    tensors = tensors_of_head(bias=bias)
    raw, stored = layouts(tensors, model.embedding)[name]
    assert parse_config(raw, NUM_LAYERS) == CONFIG
    path, said = write(tmp_path, (raw, stored)), expected(tensors, model)
    for kernels, kind in ((False, Eagle1CpuNetwork), (True, Eagle1Network)):
        network = read(path, model, kernels)
        assert type(network) is kind and network.embedding is model.embedding
        torch.testing.assert_close(chain_logits(network, TOKENS, features(), 3), said, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True])
def test_an_output_layer_of_its_own(kernels: bool, model: LlamaModel, tmp_path: Path) -> None:
    tensors, own = tensors_of_head(), torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    raw, stored = layouts(tensors, model.embedding)["vllm"]
    network = read(write(tmp_path, (raw, {**stored, "lm_head.weight": own})), model, kernels)
    said = chain_logits(network, TOKENS, features(), 3)
    torch.testing.assert_close(said, expected(tensors, model, own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True])
def test_the_feature_is_what_the_targets_output_layer_reads(kernels: bool, model: LlamaModel, tmp_path: Path) -> None:
    network = read(write(tmp_path, layouts(tensors_of_head(), model.embedding)["eagle"]), model, kernels)
    blocks = contiguous_blocks(1, 2)[0]
    ids, attn = ragged_batch([Chunk(TOKENS, 0, blocks)])
    layers = network.config.feature_layers
    assert layers == (NUM_LAYERS - 1,)
    logits, found = model.forward(ids, make_pools(model, 3), attn, torch.arange(len(TOKENS)), layers)
    assert found is not None and found.shape == (len(TOKENS), 32)
    torch.testing.assert_close(model.head(network.fuse(found)), logits)
    assert not torch.allclose(model.head(found), logits, rtol=0.1), "as the layer leaves it, it is something else"


def worlds(kind: type[World], network: type[Any], bias: bool) -> Any:
    """World's sequences with an EAGLE-1 head; of World's 3 H features it reads the first H."""

    class Sliced(network):  # type: ignore[misc]
        def fuse(self, features: Tensor) -> Tensor:
            return super().fuse(features[:, : self.config.hidden_size])  # type: ignore[no-any-return]

    world: Any = kind(3)
    config = replace(CONFIG, rope=world.config.rope, target_hidden_size=3 * CONFIG.hidden_size)
    norm = RMSNorm(1.0 + 0.3 * world.normal(32), FINAL_EPS)
    weights: Any = weights_of(tensors_of_head(bias=bias), norm, world.normal(64, 32))
    world.dense = Dense1(weights, world.dense.embedding, config)
    made = Sliced(config, weights, world.dense.embedding, 256)
    if kind is CpuWorld:
        world.cpu = Eagle3CpuDrafter(made, NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, "coupled")
        world.drafter = AsDevice(world.cpu, world)
    else:
        shape = ChainShape(NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_DRAFTS)
        world.drafter = Eagle3Drafter(made, shape, TorchSampler(64, "coupled"))
    return world


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "network"), [(World, Eagle1Network), (CpuWorld, Eagle1CpuNetwork)])
def test_the_drafters_run_it(kind: type[World], network: type[Any], bias: bool) -> None:
    """Prompts in chunks, chains of every length, rejected drafts: each chain is the dense network's."""
    world = worlds(kind, network, bias)
    for slot, length in ((0, 9), (2, 17)):
        world.admit(slot, length)
    world.prefill({0: 4, 2: 10})
    world.prefill({0: 5, 2: 7})
    for k, accepted in ((3, [3, 0]), (1, [0, 1]), (5, [2, 5]), (2, [0, 0])):
        step = world.step([0, 2])
        drafts = world.drafter.draft(step, k)
        assert drafts.tokens.tolist() == [world.expected(0, k), world.expected(2, k)]
        world.check_pool(0)
        world.verify(step, drafts, accepted)
    assert len({*world.tokens[0], *world.tokens[2]}) > 10


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"num_hidden_layers": 30}, "EAGLE-1 head with num_hidden_layers=30: only 1 is supported"),
        ({"qkv_bias": True}, "EAGLE-1 head with qkv_bias=True"),
        ({"target_hidden_size": 64}, "EAGLE-1 head with target_hidden_size=64: only 32"),
        ({"add_para_norm": True}, "EAGLE-1 head with add_para_norm=True"),
        (
            {"speculators_model_type": "eagle", "layernorms": True, "transformer_layer_config": SHAPE},
            "EAGLE-1 head with layernorms=True",
        ),
    ],
)
def test_configs_that_are_refused(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        parse_config({**SHAPE, **extra}, NUM_LAYERS)


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("midlayer.hidden_norm.weight", "EAGLE-1 head with tensor 'midlayer.hidden_norm.weight'"),
        ("embed_layernorm.weight", "no such norm"),
        ("layers.0.input_layernorm.weight", "no such norm"),
    ],
)
def test_tensors_that_are_refused(added: str, words: str, model: LlamaModel, tmp_path: Path) -> None:
    raw, stored = layouts(tensors_of_head(), model.embedding)["eagle"]
    with pytest.raises(UnsupportedModelError, match=words):
        read(write(tmp_path, (raw, {**stored, added: torch.ones(32)})), model)


def test_damaged_heads(model: LlamaModel, tmp_path: Path) -> None:
    raw, stored = layouts(tensors_of_head(bias=True), model.embedding)["eagle"]
    stored["fc.bias"][3] = torch.nan
    with pytest.raises(WeightsError, match=r"model\.safetensors: fc\.bias holds values that are not finite"):
        read(write(tmp_path / "nan", (raw, stored)), model)
    stored = renamed(stored, str, ("layers.0.mlp.up_proj.weight", "fc.bias"))
    with pytest.raises(WeightsError, match=r"'layers\.0\.mlp\.up_proj\.weight' is missing"):
        read(write(tmp_path / "cut", (raw, stored)), model)
    wide = {**stored, "fc.weight": torch.ones(32, 96), "layers.0.mlp.up_proj.weight": torch.ones(48, 32)}
    with pytest.raises(UnsupportedModelError, match=r"fc\.weight is \(32, 96\), config\.json says \(32, 64\)"):
        read(write(tmp_path / "wide", (raw, wide)), model)
