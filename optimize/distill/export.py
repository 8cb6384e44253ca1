"""A head's directory: `config.json` and `model.safetensors` in the published layout, and a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import Eagle3Weights
from optimize.distill.evaluate import Acceptance, table
from server.models.config import ModelConfig

ARCHITECTURE = "LlamaForCausalLMEagle3"


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
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "feature_layers": list(config.feature_layers),
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config.feature_layers],
    }


def export(out: Path, weights: Eagle3Weights, config: Eagle3Config, target: ModelConfig, card: Card) -> None:
    """Writes the directory; each file is replaced at once. Weights are stored as bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (t.to(torch.bfloat16) if t.is_floating_point() else t).contiguous()
        for name, t in weights.state_dict().items()
    }
    temporary = out / f".model.{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(out / "model.safetensors")
    _write(out / "README.md", _readme(config, card, sum(t.numel() for t in tensors.values() if t.is_floating_point())))
    _write(out / "config.json", json.dumps(published_config(config, target), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _readme(config: Eagle3Config, card: Card, num_parameters: int) -> str:
    losses = "\n".join(f"| {step:,} | {loss:.4f} |" for step, loss in card.losses)
    return f"""# EAGLE-3 drafter for {card.target}

One decoder layer that drafts for {card.target} (EAGLE-3, arXiv 2503.01840). {num_parameters / 1e6:.1f} M parameters,
{config.draft_vocab_size:,} of {config.vocab_size:,} tokens can be drafted; fuses the outputs of target layers
{", ".join(map(str, config.feature_layers))} (0-based).

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
