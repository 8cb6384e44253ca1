"""EAGLE-3 heads as other projects publish them: the same weights draft the same, what is not supported is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config, parse_config
from draft_models.eagle3_weights import Eagle3Weights, random_weights
from server.models.config import RopeConfig, UnsupportedModelError
from server.models.llama import LlamaModel
from server.models.loader import WeightsError
from tests.draft_models.published_heads import (
    NUM_LAYERS,
    SHAPE,
    Layout,
    chain_logits,
    eagle3_layouts,
    read,
    renamed,
    target,
    write,
)
from tests.draft_models.test_eagle3_network import Dense

CONFIG = Eagle3Config(32, 4, 2, 8, 48, 64, 24, 1e-5, RopeConfig(20000.0, {}), (1, 3, 4))
TOKENS = [3, 60, 7, 9, 9]
LAYOUTS = (
    "outpace",
    "eagle",
    "specforge",
    "modelopt",
    "speculators",
    "speculators-without-layers",
    "speculators-of-specforge",
    "vllm",
    "t2d-only",
    "t2d-empty",
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    return target()


def head(config: Eagle3Config = CONFIG) -> Eagle3Weights:
    weights = random_weights(config, 5)
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm", "norm"):
        getattr(weights, name).mul_(1.0 + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(6)))
    return weights


def features(config: Eagle3Config = CONFIG) -> Tensor:
    return torch.randn(len(TOKENS) - 1, config.feature_width, generator=torch.Generator().manual_seed(7))


def expected(weights: Eagle3Weights, embedding: Tensor, config: Eagle3Config = CONFIG, k: int = 3) -> Tensor:
    """Of the dense network: logits [k, C]."""
    said: list[Tensor] = []

    def pick(logits: Tensor, position: int) -> int:
        said.append(logits)
        return int(logits.argmax())

    Dense(weights, embedding, config).chain(TOKENS, features(config), k, pick)
    return torch.stack(said)


def layout(name: str, model: LlamaModel, config: Eagle3Config = CONFIG) -> Layout:
    return eagle3_layouts(config, head(config).state_dict(), model.embedding)[name]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_drafts_the_same(name: str, residual: bool, model: LlamaModel, tmp_path: Path) -> None:
    config = replace(CONFIG, norm_before_residual=residual)
    raw, tensors = layout(name, model, config)
    assert parse_config(raw, NUM_LAYERS) == config
    path = write(tmp_path, (raw, tensors))
    said = expected(head(config), model.embedding, config)
    for kernels in (False, True):
        network = read(path, model, kernels)
        torch.testing.assert_close(chain_logits(network, TOKENS, features(), 3), said, rtol=1e-4, atol=1e-5)
        assert network.embedding is model.embedding, "a copy of the target's takes no memory"
        assert torch.equal(network.target_ids, head().target_ids)


def test_all_layouts_are_tested(model: LlamaModel) -> None:
    assert tuple(eagle3_layouts(CONFIG, head().state_dict(), model.embedding)) == LAYOUTS


@pytest.mark.parametrize("kernels", [False, True])
def test_a_head_with_an_embedding_of_its_own(kernels: bool, model: LlamaModel, tmp_path: Path) -> None:
    raw, tensors = layout("eagle", model)
    own = model.embedding.flip(0)
    network = read(write(tmp_path, (raw, {**tensors, "embed_tokens.weight": own})), model, kernels)
    said = chain_logits(network, TOKENS, features(), 3)
    torch.testing.assert_close(said, expected(head(), own), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(said[0], expected(head(), model.embedding)[0], rtol=1e-2)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_head_of_another_width_than_its_target(kernels: bool, model: LlamaModel, tmp_path: Path) -> None:
    config = replace(CONFIG, target_hidden_size=20)
    raw, tensors = layout("eagle", model, config)
    raw = {**raw, "target_hidden_size": 20}
    assert parse_config(raw, NUM_LAYERS) == config and tensors["fc.weight"].shape == (32, 60)
    network = read(write(tmp_path / "own", (raw, tensors)), model, kernels)
    said = expected(head(config), model.embedding, config)
    torch.testing.assert_close(chain_logits(network, TOKENS, features(config), 3), said, rtol=1e-4, atol=1e-5)
    del tensors["embed_tokens.weight"]
    with pytest.raises(
        UnsupportedModelError, match=r"for a target of width 20: it needs embed_tokens.weight of its own"
    ):
        read(write(tmp_path / "none", (raw, tensors)), model, kernels)


def test_a_bias_of_the_fusing_layer(model: LlamaModel, tmp_path: Path) -> None:
    raw, tensors = layout("specforge", model)
    bias = torch.arange(32) / 32
    path = write(tmp_path, ({**raw, "bias": True}, {**tensors, "fc.bias": bias}))
    for kernels in (False, True):
        network, plain = read(path, model, kernels), features() @ tensors["fc.weight"].T
        torch.testing.assert_close(network.fuse(features()), plain + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_whole_vocabulary_without_an_output_layer(kernels: bool, model: LlamaModel, tmp_path: Path) -> None:
    config = replace(CONFIG, draft_vocab_size=64)
    raw, tensors = layout("modelopt", model, config)
    tensors = renamed(tensors, str, ("lm_head.weight", "d2t"))
    network = read(write(tmp_path, (raw, tensors)), model, kernels)
    weights = head(config)
    weights.lm_head = model.head.plain_weight()
    said = expected(weights, model.embedding, config)
    torch.testing.assert_close(chain_logits(network, TOKENS, features(), 3), said, rtol=1e-4, atol=1e-5)
    assert torch.equal(network.target_ids, torch.arange(64))


@pytest.mark.parametrize(
    ("extra", "layers"),
    [
        ({}, (1, 15, 28)),
        ({"eagle_aux_hidden_state_layer_ids": [2, 16, 29]}, (1, 15, 28)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}, (1, 15, 28)),  # outputs, lifted by a converter
        ({"eagle_aux_hidden_state_layer_ids": [1, 16, 28]}, (0, 15, 27)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}}, (1, 15, 28)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 16, 29]}}, (2, 16, 29)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": None}}, (1, 15, 28)),
        ({"feature_layers": [4, 5, 31], "eagle_aux_hidden_state_layer_ids": [2, 16, 29]}, (4, 5, 31)),
    ],
)
def test_layers_are_outputs_or_inputs_by_who_names_them(extra: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert parse_config({**SHAPE, "draft_vocab_size": 24, **extra}, 32).feature_layers == layers


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"speculators_model_type": "dflash"}, "speculators head of type 'dflash': only 'eagle' and 'eagle3'"),
        ({"speculators_model_type": "eagle3", "transformer_layer_config": SHAPE}, "lacks norm_before_residual"),
        ({"speculators_model_type": "eagle3", "norm_before_residual": True}, "lacks transformer_layer_config"),
        ({"architectures": ["MedusaModel"]}, "MedusaModel is not an EAGLE head"),
        ({"norm_before_fc": True}, "EAGLE-3 head with norm_before_fc=True: only False is supported"),
        ({"fc_norm": [1, 2]}, r"with fc_norm=\[1, 2\]"),
        ({"norm_output": True}, "with norm_output=True"),
        ({"qkv_bias": True}, "with qkv_bias=True"),
        ({"mlp_bias": True}, "with mlp_bias=True"),
        ({"hidden_act": "gelu"}, "with hidden_act='gelu': only 'silu'"),
        ({"sliding_window": 4096}, "with sliding_window=4096"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "with quantization_config="),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "with eagle_config.use_aux_hidden_state=False"),
        ({"eagle_config": {"parallel_draft_step": 4}}, "with eagle_config.parallel_draft_step=4"),
        (
            {"eagle_aux_hidden_state_layer_ids": [0, 4, 9]},
            r"three rising target layers; feature_layers is \(-1, 3, 8\)",
        ),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3]}}, r"three rising target layers"),
        ({"intermediate_size": None}, "lacks the number intermediate_size"),
        ({"model_type": "eagle", "model": SHAPE, "truncated_vocab_size": 20}, "truncated_vocab_size=20"),
    ],
)
def test_configs_that_are_refused(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        parse_config({**SHAPE, "draft_vocab_size": 24, **extra}, NUM_LAYERS)


def test_a_window_that_is_not_used() -> None:
    raw = {**SHAPE, "draft_vocab_size": 24, "sliding_window": 9, "use_sliding_window": False}
    assert parse_config(raw, NUM_LAYERS) == CONFIG


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("layers.1.mlp.up_proj.weight", "'layers.1.mlp.up_proj.weight': heads of several layers"),
        ("midlayer.self_attn.q_proj.weight_scale", "quantised heads"),
        ("layers.0.self_attn.q_norm.weight", "normalised queries and keys"),
        ("layers.0.self_attn.q_proj.bias", "biases are supported in fc only"),
        ("layers.0.self_attn.kv_a_proj_with_mqa.weight", "latent attention"),
        ("midlayer.mlp.experts.0.up_proj.weight", "experts"),
        ("input_norm.weight", "no such norm"),
        ("mask_hidden", "draft in parallel"),
        ("something.weight", "no such tensor is known"),
        ("model.norm.weight", "'model.norm.weight' and 'norm.weight' are the same tensor"),
        ("midlayer.self_attn.qkv_proj.weight", "'midlayer.self_attn.q_proj.weight' is in 'midlayer.self_attn.qkv"),
    ],
)
def test_tensors_that_are_refused(added: str, words: str, model: LlamaModel, tmp_path: Path) -> None:
    raw, tensors = layout("eagle", model)
    with pytest.raises(UnsupportedModelError, match=words):
        read(write(tmp_path, (raw, {**tensors, added: torch.ones(3)})), model)


def test_what_is_missing_or_wrong_is_named_as_in_its_file(model: LlamaModel, tmp_path: Path) -> None:
    raw, tensors = layout("modelopt", model)
    cut = renamed(tensors, str, ("layers.0.mlp.down_proj.weight",))
    with pytest.raises(WeightsError, match=r"'layers\.0\.mlp\.down_proj\.weight' is missing"):
        read(write(tmp_path / "cut", (raw, cut)), model)
    raw, tensors = layout("vllm", model)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    with pytest.raises(UnsupportedModelError, match=rf"{name} has 95 rows, config.json says 96"):
        read(write(tmp_path / "short", (raw, {**tensors, name: tensors[name][1:]})), model)
    whole = renamed(tensors, str, ("lm_head.weight",))
    with pytest.raises(WeightsError, match=r"'lm_head\.weight' is missing"):
        read(write(tmp_path / "reduced", (raw, whole)), model)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("d2t", torch.zeros(24, dtype=torch.int64), "d2t is all zero: the head's vocabulary map was never filled in"),
        ("t2d", torch.ones(64, dtype=torch.bool), "t2d does not name the tokens that d2t leads to"),
        ("t2d", torch.ones(60, dtype=torch.bool), r"t2d is \(60,\), config.json says \(64,\)"),
    ],
)
def test_vocabulary_maps_that_are_refused(
    name: str, value: Tensor, words: str, model: LlamaModel, tmp_path: Path
) -> None:
    raw, tensors = layout("eagle", model)
    with pytest.raises((WeightsError, UnsupportedModelError), match=words):
        read(write(tmp_path, (raw, {**tensors, name: value})), model)


def test_a_map_to_the_first_tokens_that_says_so_twice(model: LlamaModel, tmp_path: Path) -> None:
    raw, tensors = layout("eagle", model)
    first = {"d2t": torch.zeros(24, dtype=torch.int64), "t2d": torch.arange(64) < 24}
    network = read(write(tmp_path, (raw, {**tensors, **first})), model)
    assert network.target_ids.tolist() == list(range(24))


def test_only_t2d_of_another_size(model: LlamaModel, tmp_path: Path) -> None:
    raw, tensors = layout("t2d-only", model)
    tensors["t2d"][tensors["t2d"].nonzero()[0]] = False
    with pytest.raises(UnsupportedModelError, match=r"t2d is \(23,\), config.json says \(24,\)"):
        read(write(tmp_path, (raw, tensors)), model)
