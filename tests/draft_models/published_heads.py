"""One random head in the layout of every project that publishes such, for a small random target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config, parse_config
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_ops import TorchOps
from draft_models.eagle_heads import load_head
from server.kernels.paged import PagedRows
from server.models.config import parse_config as parse_target
from server.models.llama import LlamaModel
from server.models.loader import tensors_of
from server.models.random_weights import llama_weights
from server.models.shapes import shape
from server.models.source import resolve

CPU = torch.device("cpu")
NUM_LAYERS, MAX_POSITIONS = 8, 32
TARGET = {**shape("tiny"), "num_hidden_layers": NUM_LAYERS, "hidden_size": 32, "vocab_size": 64}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
    "hidden_act": "silu",
    "vocab_size": 64,
}

Layout = tuple[dict[str, Any], dict[str, Tensor]]
"""`config.json` and the tensors."""


def target() -> LlamaModel:
    config = parse_target(TARGET)
    weights = llama_weights(config, torch.float32, CPU)
    return LlamaModel(config, weights.get, weights.has, MAX_POSITIONS)


def renamed(tensors: dict[str, Tensor], change: Callable[[str], str], drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in tensors.items() if name not in drop}


def as_layers(name: str) -> str:
    return name.replace("midlayer.", "layers.0.")


def write(path: Path, layout: Layout) -> Path:
    raw, tensors = layout
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw))
    return path


def read(path: Path, model: LlamaModel, kernels: bool = False) -> Eagle3Network | Eagle3CpuNetwork:
    """As the engine loads it; with `kernels` the GPU's network, its operations in torch."""
    source = resolve(str(path))
    head = parse_config(source.config, NUM_LAYERS)
    return load_head(
        head, tensors_of(source, CPU, torch.float32), model, MAX_POSITIONS, TorchOps() if kernels else None
    )


def chain_logits(network: Eagle3Network | Eagle3CpuNetwork, tokens: list[int], features: Tensor, k: int) -> Tensor:
    """Logits [k, C] of greedy drafts behind `tokens` [L], of which `features` [L - 1, F] are known."""
    pool = torch.zeros(MAX_POSITIONS, 2 * network.config.num_kv_heads, network.config.head_dim)
    x = torch.cat([torch.zeros(1, network.config.hidden_size), network.fuse(features)])
    ids, at, said = list(tokens), torch.arange(len(tokens)), []
    for _ in range(k):
        new = torch.tensor(ids[-len(at) :])
        x, logits = _run(network, new, x, at, pool)
        said.append(logits[0])
        ids.append(int(network.target_ids[logits[0].argmax()]))
        at = at[-1:] + 1
    return torch.stack(said)


def _run(
    network: Eagle3Network | Eagle3CpuNetwork, ids: Tensor, x: Tensor, at: Tensor, pool: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass over tokens at positions `at` -> (the last one's output [1, H], its logits [1, C])."""
    c, last, nobody = network.config, int(at[-1]), torch.zeros(1, dtype=torch.int64)
    if isinstance(network, Eagle3Network):
        queries, residual = network.remember(ids, x.clone(), at, at, pool)
        rows = PagedRows(nobody, at[-1:], torch.zeros(1, 1, dtype=torch.int32), MAX_POSITIONS, last + 1, width=1)
        return network.attend(queries[-1:].clone(), residual[-1:].clone(), pool, rows, nobody)
    qkv, residual = network.project(ids, x, at)
    pool[at] = qkv[:, c.num_heads :]
    keys, values = pool[: last + 1].transpose(0, 1).chunk(2)
    query = qkv[-1, : c.num_heads].view(c.num_kv_heads, -1, c.head_dim)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    return network.finish(mixed.reshape(1, -1), residual[-1:])


def eagle3_layouts(config: Eagle3Config, tensors: dict[str, Tensor], embedding: Tensor) -> dict[str, Layout]:
    """`tensors` are `Eagle3Weights.state_dict`'s; the head fuses the layers that EAGLE takes, 1, 3 and 4 of 8."""
    assert config.feature_layers == (1, 3, 4)
    raw = {**SHAPE, "draft_vocab_size": config.draft_vocab_size}
    nested = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
    modelopt = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False}
    speculators = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "default_proposal_method": "greedy"},
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": False,
        "embed_requires_grad": False,
        "target_hidden_size": None,
        "transformer_layer_config": {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    }
    ids = "eagle_aux_hidden_state_layer_ids"
    residual = {"norm_before_residual": config.norm_before_residual}
    layers = renamed(tensors, as_layers)
    copy = {**tensors, "embed_tokens.weight": embedding}
    kept = {"verifier_norm.weight": torch.ones(32), "verifier_lm_head.weight": torch.ones(24, 32)}
    return {
        "outpace": (
            {
                **raw,
                **residual,
                "architectures": ["LlamaForCausalLMEagle3"],
                "feature_layers": [1, 3, 4],
                ids: [2, 4, 5],
            },
            tensors,
        ),
        "eagle": ({**raw, **residual, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}, copy),
        "specforge": ({**raw, **residual, "architectures": ["LlamaForCausalLMEagle3"], "eagle_config": nested}, copy),
        "modelopt": (
            {**raw, **residual, "architectures": ["LlamaForCausalLMEagle3"], "eagle_config": {**nested, **modelopt}},
            renamed(tensors, as_layers, ("t2d",)),
        ),
        "speculators": ({**speculators, ids: [2, 4, 5]}, {**layers, **kept}),
        "speculators-without-layers": ({**speculators, ids: None}, layers),
        "speculators-of-specforge": ({**speculators, ids: [1, 3, 4]}, copy),
        "vllm": ({**raw, **residual, "architectures": ["Eagle3LlamaForCausalLM"], ids: [2, 4, 5]}, fused(tensors)),
        "t2d-only": ({**raw, **residual, "architectures": ["LlamaForCausalLM"]}, renamed(tensors, str, ("d2t",))),
        "t2d-empty": (
            {**raw, **residual, "architectures": ["LlamaForCausalLM"]},
            {**tensors, "t2d": torch.zeros(64, dtype=torch.bool), "d2t": tensors["d2t"].int()},
        ),
    }


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What vLLM makes of a checkpoint."""
    attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
    qkv = torch.cat([tensors[f"{attention}{n}_proj.weight"] for n in "qkv"])
    gate_up = torch.cat([tensors[f"{mlp}{n}_proj.weight"] for n in ("gate", "up")])
    inside = [f"{attention}{n}" for n in "qkv"] + [f"{mlp}gate", f"{mlp}up"]
    parts = tuple(f"{name}_proj.weight" for name in inside)
    rest = {**tensors, f"{attention}qkv_proj.weight": qkv, f"{mlp}gate_up_proj.weight": gate_up}
    outside = {"d2t": "draft_id_to_target_id", "t2d": "t2d", "lm_head.weight": "lm_head.weight"}
    return renamed(rest, lambda name: outside.get(name) or as_layers(f"model.{name}"), parts)
