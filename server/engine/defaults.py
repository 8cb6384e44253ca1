"""Settings whose default depends on the device or the model, settled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from draft_models.packaged import WEIGHTS as PACKAGED
from draft_models.packaged import packaged_head
from server.config import ConfigError, EngineConfig
from server.models.gguf_form import FormOn
from server.models.loader import pick_device
from server.models.source import ModelSource

CPU_BATCHED_TOKENS = 256
GPU_BATCHED_TOKENS = 2048
"""Default budget of a prefill step: on two CPU cores 256 tokens of a 135M model stall decoding for a third of a
second."""
CPU_NUM_SEQS, GPU_NUM_SEQS = 16, 64
CPU_KV_SHARE, GPU_KV_SHARE = 0.25, 0.85


def with_defaults(config: EngineConfig, device: torch.device, source: ModelSource) -> EngineConfig:
    """`config` without None in what decides how much memory is needed.

    Raises ConfigError for a GPU's settings on a CPU, and for a context that the model was not trained for.
    """
    on_gpu = device.type == "cuda"
    for name, neutral in (("deterministic", False), ("kv_cache_dtype", "auto")):
        if not on_gpu and getattr(config, name) != neutral:
            raise ConfigError(f"{name}: {getattr(config, name)!r} is a setting for GPUs; this engine runs on {device}")
    drafter, draft_model = _drafter(config, device, source)
    return replace(
        config,
        drafter=drafter,
        draft_model=draft_model,
        max_model_len=_max_model_len(config, source),
        max_num_seqs=config.max_num_seqs or (GPU_NUM_SEQS if on_gpu else CPU_NUM_SEQS),
        max_num_batched_tokens=config.max_num_batched_tokens or (GPU_BATCHED_TOKENS if on_gpu else CPU_BATCHED_TOKENS),
        kv_memory_share=config.kv_memory_share or (GPU_KV_SHARE if on_gpu else CPU_KV_SHARE),
    )


def form_for(config: EngineConfig) -> FormOn:
    """In which form the engine runs GGUF files. Raises ConfigError for a device that is not there."""
    return FormOn(config.weights, pick_device(config.device).type, config.dtype)


def _drafter(config: EngineConfig, device: torch.device, source: ModelSource) -> tuple[str, str | None]:
    """Drafter and draft model, the head that comes with the embedded model where nothing else is named.

    On a GPU that head drafts by itself: there eagle3 was measured to be faster than suffix, hybrid not yet.
    """
    drafter, draft_model = config.drafter, config.draft_model
    if drafter in ("auto", "eagle3", "hybrid") and draft_model is None and source.kind == "embedded":
        head = packaged_head(source.name)
        draft_model = None if head is None else str(head)
    packaged = draft_model is not None and Path(draft_model).is_relative_to(PACKAGED)
    if drafter == "auto" and draft_model is None:
        drafter = "suffix"
    elif drafter == "auto":
        drafter = "eagle3" if packaged and device.type == "cuda" else "hybrid"
    return drafter, draft_model


def max_positions(config: EngineConfig) -> int:
    """Positions that a network must know: a row that has ended may run one step more. `config` has its defaults."""
    return (config.max_model_len or 1) + 2 * (config.max_draft_tokens + 1) + 2


def _max_model_len(config: EngineConfig, source: ModelSource) -> int:
    own = int(source.config.get("max_position_embeddings") or source.config.get("n_positions") or 2048)
    wanted = config.max_model_len
    if wanted is not None and wanted > own:
        raise ConfigError(f"max_model_len: {wanted} is too large; {source.name} was trained for {own} positions")
    return wanted or own
