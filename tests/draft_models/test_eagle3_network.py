"""The EAGLE-3 network: its config and weights as published, and one pass against a dense one of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config, config_for, default_feature_layers, parse_config
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import Eagle3Weights, load_weights, random_weights
from server.kernels.paged import PagedRows
from server.models.config import RopeConfig, UnsupportedModelError
from server.models.config import parse_config as parse_target
from server.models.loader import WeightsError

HIDDEN = 32
CONFIG = Eagle3Config(
    hidden_size=HIDDEN,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=64,
    draft_vocab_size=24,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0, {}),
    feature_layers=(0, 1, 2),
)
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "draft_vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 1,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}

Pick = Callable[[Tensor, int], int]
"""Draft id by logits [C] and the absolute position that is drafted."""


class Dense:
    """The network as the paper has it: rotary halves, no pages, every position from scratch."""

    def __init__(self, weights: Eagle3Weights, embedding: Tensor, config: Eagle3Config = CONFIG) -> None:
        self.w, self.embedding, self.c = weights, embedding, config

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt() * weight

    def rotate(self, x: Tensor) -> Tensor:
        """x [L, heads, D] at positions 0 … L - 1."""
        half = x.shape[2] // 2
        angles = torch.arange(len(x))[:, None] / self.c.rope.theta ** (torch.arange(half) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def projected(self, tokens: list[int], inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both turned) and values, [L, heads, D] each."""
        embedded = self.norm(self.embedding[tokens], self.w.input_layernorm)
        both = torch.cat([embedded, self.norm(inputs, self.w.hidden_norm)], dim=-1)
        projections = (self.w.q_proj, self.w.k_proj, self.w.v_proj)
        q, k, v = ((both @ p.T).view(len(tokens), -1, self.c.head_dim) for p in projections)
        return self.rotate(q), self.rotate(k), v

    def inputs(self, features: Tensor) -> Tensor:
        """[L + 1, H]: what each position takes of the token before it, from the target's features [L, 3 H]."""
        return torch.cat([torch.zeros(1, self.c.hidden_size), features @ self.w.fc.T])

    def hidden(self, tokens: list[int], inputs: Tensor, first: int = 0) -> Tensor:
        """The layer's output [L, H]; positions before `first` are not seen by others."""
        c, w = self.c, self.w
        q, k, v = self.projected(tokens, inputs)
        k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / c.head_dim**0.5
        at = torch.arange(len(tokens))
        scores = scores.masked_fill((at > at[:, None]) | (at < first) & (at != at[:, None]), -float("inf"))
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(tokens), -1)
        stream = self.norm(inputs, w.hidden_norm) if c.norm_before_residual else inputs
        residual = stream + mixed @ w.o_proj.T
        y = self.norm(residual, w.post_attention_layernorm)
        return residual + (F.silu(y @ w.gate_proj.T) * (y @ w.up_proj.T)) @ w.down_proj.T

    def logits(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden, self.w.norm) @ self.w.lm_head.T

    def chain(self, tokens: list[int], features: Tensor, k: int, pick: Pick, first: int = 0) -> list[int]:
        """k drafts after `tokens` [L], from the target's features [L - 1, 3 H] of all but the last."""
        inputs, known = self.inputs(features), len(tokens)
        tokens = list(tokens)
        for _ in range(k):
            out = self.hidden(tokens, inputs, first)[-1]
            tokens.append(int(self.w.target_ids[pick(self.logits(out), len(tokens))]))
            inputs = torch.cat([inputs, out[None]])
        return tokens[known:]


def best(logits: Tensor, position: int) -> int:
    return int(logits.argmax())


def test_a_published_config() -> None:
    config = parse_config(PUBLISHED, 32)
    assert config.feature_layers == (1, 15, 28), "inputs of layers 2, 16, 29 are the outputs of those before"
    assert (config.head_dim, config.num_kv_heads, config.draft_vocab_size) == (128, 8, 32000)
    assert config.rope == RopeConfig(500000.0, {}) and not config.norm_before_residual


@pytest.mark.parametrize(
    ("extra", "layers"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [2, 9, 20]}, (1, 8, 19)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 9, 20]}}, (2, 9, 20)),
        ({"feature_layers": [0, 1, 2]}, (0, 1, 2)),
    ],
)
def test_feature_layers_by_dialect(extra: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert parse_config({**PUBLISHED, **extra}, 32).feature_layers == layers


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=2: only 1"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"target_hidden_size": 5120}, "target_hidden_size=5120: only 4096"),
        ({"feature_layers": [3, 3, 4]}, "three rising target layers"),
        ({"draft_vocab_size": 200000}, "draft_vocab_size: 200000 is not valid; use 1 to 128256"),
    ],
)
def test_heads_that_are_not_ours(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse_config({**PUBLISHED, **extra}, 32)


def test_a_head_of_the_targets_shape() -> None:
    target = parse_target({**PUBLISHED, "num_hidden_layers": 30})
    config = config_for(target, 32000)
    assert config.feature_layers == (2, 15, 27) and config.hidden_size == 4096
    assert config_for(target, 10**6).draft_vocab_size == 128256
    assert default_feature_layers(4) == (0, 2, 3)
    with pytest.raises(UnsupportedModelError, match="three layers to fuse"):
        default_feature_layers(2)


def test_weights_keep_their_published_names() -> None:
    weights = random_weights(CONFIG, 3)
    state = weights.state_dict()
    assert {"fc.weight", "midlayer.self_attn.q_proj.weight", "norm.weight", "lm_head.weight", "d2t"} < state.keys()
    assert state["midlayer.self_attn.k_proj.weight"].shape == (16, 2 * HIDDEN)
    again = load_weights(state.__getitem__, state.__contains__, CONFIG)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(weights.t2d.nonzero().squeeze(1), weights.target_ids)
    assert torch.equal(random_weights(CONFIG, 3).fc, weights.fc)


def test_checkpoints_that_do_not_fit() -> None:
    state = random_weights(CONFIG, 3).state_dict()
    with pytest.raises(UnsupportedModelError, match=r"gate_proj.weight is \(48, 32\), config.json says \(47, 32\)"):
        load_weights(state.__getitem__, state.__contains__, replace(CONFIG, intermediate_size=47))
    with pytest.raises(UnsupportedModelError, match="without the map 'd2t'"):
        load_weights(state.__getitem__, lambda name: False, CONFIG)
    whole = replace(CONFIG, draft_vocab_size=64)
    again = load_weights(random_weights(whole, 0).state_dict().__getitem__, lambda name: False, whole)
    assert torch.equal(again.target_ids, torch.arange(64)) and bool(again.t2d.all())


def test_a_head_that_shares_the_targets_output_layer() -> None:
    config = parse_config({**PUBLISHED, "share_lm_head": True}, 32)
    assert config.share_lm_head and not parse_config(PUBLISHED, 32).share_lm_head
    shared, output = replace(CONFIG, share_lm_head=True), torch.randn(CONFIG.vocab_size, HIDDEN)
    weights = random_weights(CONFIG, 3)
    state = weights.state_dict(share_lm_head=True)
    assert weights.state_dict().keys() - state.keys() == {"lm_head.weight"}
    again = load_weights(state.__getitem__, state.__contains__, shared, lambda ids: output[ids])
    assert torch.equal(again.lm_head, output[weights.target_ids])
    with pytest.raises(KeyError, match="lm_head"):  # what a checkpoint's get raises names the file
        load_weights(state.__getitem__, state.__contains__, CONFIG, lambda ids: output[ids])
    with pytest.raises(UnsupportedModelError, match="the target has none to share"):
        load_weights(state.__getitem__, state.__contains__, shared)
    state = weights.state_dict()
    with pytest.raises(WeightsError, match=r"lm_head.weight is there, but config.json says share_lm_head"):
        load_weights(state.__getitem__, state.__contains__, shared, lambda ids: output[ids])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "midlayer.mlp.up_proj.weight",
            torch.nan,
            r"head\.st: midlayer\.mlp\.up_proj\.weight holds values that are not",
        ),
        ("norm.weight", -torch.inf, r"head\.st: norm\.weight holds .* \(NaN or infinity in float32\)"),
        ("d2t", 60, r"head\.st: d2t leads draft id 5 to token 65; the target's are 0 to 63"),
        ("d2t", -6, r"d2t leads draft id 5 to token -1"),
        ("d2t", 3, r"d2t leads draft ids \d and \d to the same token 8"),
    ],
)
def test_damaged_tensors(name: str, value: float, words: str) -> None:
    state = random_weights(CONFIG, 3).state_dict()
    state[name].view(-1)[5] = value
    with pytest.raises(WeightsError, match=words):
        load_weights(state.__getitem__, state.__contains__, CONFIG, file_of=lambda _: "head.st")


def test_a_map_of_another_length() -> None:
    state = random_weights(CONFIG, 3).state_dict()
    state["d2t"] = state["d2t"][:-1]
    with pytest.raises(UnsupportedModelError, match=r"head.st: d2t is \(23,\), config.json says \(24,\)"):
        load_weights(state.__getitem__, state.__contains__, CONFIG, file_of=lambda _: "head.st")


def test_an_embedding_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embedding: \(64, 16\) is not valid; the head needs \(64, 32\)"):
        Eagle3Network(CONFIG, random_weights(CONFIG, 0), torch.zeros(64, 16), 8)


def test_one_pass_is_the_dense_networks() -> None:
    torch.manual_seed(0)
    weights, embedding = random_weights(CONFIG, 1), torch.randn(64, HIDDEN)
    network, dense = Eagle3Network(CONFIG, weights, embedding, 16), Dense(weights, embedding)
    tokens, features = [5, 60, 7, 8, 33], torch.randn(4, 3 * HIDDEN)
    inputs = dense.inputs(features)
    torch.testing.assert_close(network.fuse(features), inputs[1:])
    pool, at = torch.zeros(8, 4, 8), torch.arange(5)
    queries, residual = network.remember(torch.tensor(tokens), inputs.clone(), at, at, pool)
    nobody = torch.zeros(1, dtype=torch.int64)
    rows = PagedRows(nobody, torch.tensor([4]), torch.zeros(1, 1, dtype=torch.int32), 8, 5, width=1)
    hidden, logits = network.attend(queries[-1:], residual[-1:], pool, rows, nobody)
    expected = dense.hidden(tokens, inputs)[-1:]
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(logits, dense.logits(expected))
