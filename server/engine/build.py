"""From settings to a running engine: model, memory, drafter, cost table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

import torch

from draft_models.ngram import NgramDrafter
from draft_models.protocol import Drafter
from draft_models.small_lm import SmallLMDrafter
from draft_models.suffix import SuffixDrafter
from server.config import ConfigError, EngineConfig
from server.engine.core import EngineCore
from server.engine.costs import load_or_measure
from server.engine.limits import Limits
from server.engine.memory import plan_memory
from server.engine.messages import EngineInfo
from server.engine.runner import Runner, RunnerShape
from server.engine.speculation import Speculation
from server.models.base import TargetModel
from server.models.loader import load_model, pick_device, pick_dtype
from server.models.source import ModelSource, resolve

Say = Callable[[str], None]

CPU_BATCHED_TOKENS = 256
GPU_BATCHED_TOKENS = 2048
"""Default budget of a prefill step: on two CPU cores 256 tokens of a 135M model stall decoding for a third of a
second."""
WAITING_KV_CACHES = 8
"""Default bound of the prompts that wait, in full KV caches."""


def build_engine(config: EngineConfig, say: Say) -> tuple[EngineCore, EngineInfo]:
    """Loads everything. Raises ConfigError, ModelSourceError, UnsupportedModelError or WeightsError with the reason."""
    started = time.perf_counter()
    torch.set_grad_enabled(False)
    torch.set_num_threads(config.num_threads or _num_cores())
    device = pick_device(config.device)
    source = resolve(config.model)
    say(f"loading {source.name} on {device}")
    max_len = _max_model_len(config, source)
    model = load_model(
        source.directory, source.config, device, pick_dtype(config.dtype, device), max_len + config.max_draft_tokens + 2
    )
    draft_model = _load_draft_model(config, model, max_len, say)
    memory = plan_memory(config, model, draft_model)
    shape = RunnerShape(
        config.max_num_seqs, max_len, config.max_draft_tokens, config.block_size, memory.num_blocks, config.verification
    )
    drafter = make_drafter(config, shape, draft_model)
    runner = Runner(model, drafter, shape)
    budget = config.max_num_batched_tokens or (CPU_BATCHED_TOKENS if device.type == "cpu" else GPU_BATCHED_TOKENS)
    limits = Limits(config.max_num_seqs, budget, max_len, config.block_size, memory.num_blocks, config.prefix_cache)
    if limits.kv_tokens < max_len:
        say(
            f"the KV cache holds {limits.kv_tokens} tokens, less than the context of {max_len}: "
            "longer requests are refused"
        )
    costs = load_or_measure(runner, source, say) if drafter is not None and config.adaptive else None
    trims = runner.ragged and drafter is not None and not drafter.has_distribution
    speculation = Speculation(costs, config.max_draft_tokens if drafter is not None else 0, trims)
    core = EngineCore(
        runner,
        limits,
        speculation,
        _eos(source) or model.eos_token_ids,
        config.max_waiting,
        config.max_waiting_tokens or WAITING_KV_CACHES * limits.kv_tokens,
    )
    info = EngineInfo(
        model=source.name,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        max_model_len=max_len,
        vocab_size=model.vocab_size,
        kv_cache_tokens=limits.kv_tokens,
        kv_cache_bytes=memory.num_blocks * memory.bytes_per_block,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        drafter=config.drafter if drafter is not None else "none",
        max_draft_tokens=config.max_draft_tokens if drafter is not None else 0,
        verification=config.verification,
        linear_path=model.linear_path,
        num_threads=torch.get_num_threads(),
        load_s=time.perf_counter() - started,
    )
    return core, info


def _num_cores() -> int:
    """Cores this process may use; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _max_model_len(config: EngineConfig, source: ModelSource) -> int:
    own = int(source.config.get("max_position_embeddings") or source.config.get("n_positions") or 2048)
    wanted = config.max_model_len
    if wanted is not None and wanted > own:
        raise ConfigError(f"max_model_len: {wanted} is too large; {source.name} was trained for {own} positions")
    return wanted or own


def _eos(source: ModelSource) -> tuple[int, ...]:
    """`generation_config.json` may name more end-of-sequence tokens than `config.json`."""
    file = source.directory / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    found = source.config.get("eos_token_id") if found is None else found
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)


def _load_draft_model(config: EngineConfig, target: TargetModel, max_len: int, say: Say) -> TargetModel | None:
    if config.drafter != "small-lm" or config.draft_model is None:
        return None
    source = resolve(config.draft_model)
    say(f"loading the draft model {source.name}")
    draft = load_model(
        source.directory, source.config, target.device, target.dtype, max_len + config.max_draft_tokens + 2
    )
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft_model: {source.name} has a vocabulary of {draft.vocab_size} tokens, the target "
            f"{target.vocab_size}; a small-LM drafter must share the target's vocabulary"
        )
    if draft.max_position_embeddings < max_len:
        raise ConfigError(
            f"draft_model: {source.name} has a context of {draft.max_position_embeddings}, less than {max_len}; "
            "lower max_model_len"
        )
    return draft


def make_drafter(config: EngineConfig, shape: RunnerShape, draft_model: TargetModel | None) -> Drafter | None:
    """The drafter that the settings name; None for `none` or no draft tokens."""
    if config.drafter == "none" or config.max_draft_tokens == 0:
        return None
    if config.drafter == "ngram":
        return NgramDrafter()
    if config.drafter == "suffix":
        return SuffixDrafter(recent_outputs=config.recent_outputs)
    assert draft_model is not None
    return SmallLMDrafter(draft_model, shape.max_num_seqs, shape.num_blocks, shape.block_size, shape.rule)
