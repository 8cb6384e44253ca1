"""A head's directory: `config.json` and `model.safetensors` in the published layout, and a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import TENSOR_NAMES, Eagle3Weights, weight_shapes
from optimize.distill.evaluate import Acceptance, table
from server.config import ConfigError
from server.models.config import ModelConfig
from server.models.safetensors_index import INDEX_NAME, SINGLE_NAME

ARCHITECTURE = "LlamaForCausalLMEagle3"
_HEADER_BYTES = 8192
"""More than the header of a file with a head's tensors takes."""


@dataclass(frozen=True, slots=True)
class Card:
    """What the model card says beside the shape. `losses` are (update, loss) in order."""

    target: str
    target_licence: str
    command: str
    version: str
    machine: str
    corpus: str
    training: str
    losses: Sequence[tuple[int, float]]
    acceptance: Sequence[Acceptance]


def published_config(config: Eagle3Config, target: ModelConfig) -> dict[str, Any]:
    """`config.json` of a head. Readers that count layer *inputs* find theirs one higher than our outputs."""
    scaling = config.rope.scaling
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": dict(scaling) if scaling else None,
        "max_position_embeddings": target.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "share_lm_head": config.share_lm_head,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "feature_layers": list(config.feature_layers),
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config.feature_layers],
    }


def export(
    out: Path,
    weights: Eagle3Weights,
    config: Eagle3Config,
    target: ModelConfig,
    card: Card,
    max_file_bytes: int | None = None,
) -> None:
    """Writes the directory; each file is replaced at once. Weights are stored as bfloat16.

    With `max_file_bytes` the tensors are spread over as many files as it takes, beside an index of them.
    """
    tensors = weights.state_dict(config.share_lm_head)
    readme = _title(config, card, num_parameters(tensors)) + card_body(card)
    write_checkpoint(out, tensors, published_config(config, target), readme, max_file_bytes)


def num_parameters(tensors: dict[str, Tensor]) -> int:
    """Weights in a checkpoint, maps of token ids apart."""
    return sum(t.numel() for t in tensors.values() if t.is_floating_point())


def write_checkpoint(
    out: Path, tensors: dict[str, Tensor], config: dict[str, Any], readme: str, max_file_bytes: int | None = None
) -> None:
    """Writes `config.json`, the model card and the tensors, floating point as bfloat16; see `export`."""
    out.mkdir(parents=True, exist_ok=True)
    stored = {name: (t.to(torch.bfloat16) if t.is_floating_point() else t).contiguous() for name, t in tensors.items()}
    _write_tensors(out, spread_over_files(stored, max_file_bytes))
    _write(out / "README.md", readme)
    _write(out / "config.json", json.dumps(config, indent=2) + "\n")


def check_file_size(config: Eagle3Config, max_file_bytes: int | None) -> None:
    """ConfigError: a tensor of the head is larger than a file may be."""
    shapes = weight_shapes(config)
    if config.share_lm_head:
        del shapes["lm_head"]
    field = max(shapes, key=lambda f: prod(shapes[f]))
    needed = 2 * prod(shapes[field]) + _HEADER_BYTES
    if max_file_bytes is not None and needed > max_file_bytes:
        raise ConfigError(
            f"max_shard_mb: {max_file_bytes // 1_000_000} is not valid; use {-(-needed // 1_000_000)} or more, "
            f"since {TENSOR_NAMES[field]} goes into one file"
        )


def spread_over_files(tensors: dict[str, Tensor], max_bytes: int | None) -> list[dict[str, Tensor]]:
    """The tensors in as many parts as it takes for files of `max_bytes`, in order; one larger than that is alone."""
    parts: list[dict[str, Tensor]] = [{}]
    size = _HEADER_BYTES
    for name, tensor in tensors.items():
        if max_bytes is not None and parts[-1] and size + tensor.nbytes > max_bytes:
            parts.append({})
            size = _HEADER_BYTES
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def _write_tensors(out: Path, parts: list[dict[str, Tensor]]) -> None:
    """One file, or several and their index; files of an earlier export go."""
    count = len(parts)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else SINGLE_NAME for i in range(count)]
    for name, tensors in zip(names, parts, strict=True):
        temporary = out / f".model.{os.getpid()}.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
        temporary.replace(out / name)
    if count > 1:
        where = {tensor: name for name, tensors in zip(names, parts, strict=True) for tensor in tensors}
        total = sum(t.nbytes for tensors in parts for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write(out / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    else:
        (out / INDEX_NAME).unlink(missing_ok=True)
    for file in out.glob("model*.safetensors"):
        if file.name not in names:
            file.unlink()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _title(config: Eagle3Config, card: Card, size: int) -> str:
    head = "; the output layer is the target's own" if config.share_lm_head else ""
    return f"""# EAGLE-3 drafter for {card.target}

One decoder layer that drafts for {card.target} (EAGLE-3, arXiv 2503.01840). {size / 1e6:.1f} M parameters,
{config.draft_vocab_size:,} of {config.vocab_size:,} tokens can be drafted; fuses the outputs of target layers
{", ".join(map(str, config.feature_layers))} (0-based){head}.
"""


def card_body(card: Card) -> str:
    """What a model card says below the drafter's shape."""
    losses = "\n".join(f"| {step:,} | {loss:.4f} |" for step, loss in card.losses)
    return f"""
    {card.command}

{card.version}; {card.machine}.

## Data

{card.corpus} No other text was used.

## Training

{card.training}

| update | loss |
| --- | --- |
{losses}

## Acceptance

On held-out text of the target's own, teacher-forced: how often a draft is accepted if those before it were, and tokens
that a verify step emits, the bonus token included.

{table(card.acceptance) if card.acceptance else "Not measured."}

## Licence

That of the target, whose text it has learned from and whose weights it started from: {card.target_licence}.
"""
