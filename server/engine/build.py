"""From settings to a running engine: model, memory, drafter, cost table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from draft_models.ngram import NgramDrafter
from draft_models.protocol import Drafter
from draft_models.small_lm import SmallLMDrafter
from draft_models.suffix import SuffixDrafter
from server.config import ConfigError, EngineConfig
from server.engine.core import EngineCore
from server.engine.costs import load_or_measure
from server.engine.messages import EngineInfo
from server.engine.runner import Runner, RunnerShape
from server.engine.scheduler import Limits
from server.engine.speculation import Speculation
from server.models.base import TargetModel
from server.models.loader import load_model, pick_device, pick_dtype
from server.models.source import ModelSource, resolve

Say = Callable[[str], None]

CPU_BATCHED_TOKENS = 256
GPU_BATCHED_TOKENS = 2048
"""Default budget of a prefill step: on two CPU cores 256 tokens of a 135M model stall decoding for a third of a second."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Blocks of the KV pool (null block included) and what one costs, drafter's layers included."""

    num_blocks: int
    bytes_per_block: int


def build_engine(config: EngineConfig, say: Say) -> tuple[EngineCore, EngineInfo]:
    """Loads everything. Raises ConfigError, ModelSourceError, UnsupportedModelError or WeightsError with the reason."""
    started = time.perf_counter()
    torch.set_grad_enabled(False)
    torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    device = pick_device(config.device)
    source = resolve(config.model, progress=say)
    say(f"loading {source.name} on {device}")
    max_len = _max_model_len(config, source)
    model = load_model(source.directory, source.config, device, pick_dtype(config.dtype, device), max_len + config.max_draft_tokens + 2)
    draft_model = _load_draft_model(config, model, max_len, say)
    memory = plan_memory(config, model, draft_model)
    shape = RunnerShape(
        config.max_num_seqs, max_len, config.max_draft_tokens, config.block_size, memory.num_blocks, config.verification
    )
    drafter = make_drafter(config, shape, draft_model)
    runner = Runner(model, drafter, shape)
    budget = config.max_num_batched_tokens or (CPU_BATCHED_TOKENS if device.type == "cpu" else GPU_BATCHED_TOKENS)
    limits = Limits(
        config.max_num_seqs, budget, max_len, config.block_size, memory.num_blocks, config.prefix_cache
    )
    if limits.kv_tokens < max_len:
        say(f"the KV cache holds {limits.kv_tokens} tokens, less than the context of {max_len}: longer requests are refused")
    costs = load_or_measure(runner, source, say) if drafter is not None and config.adaptive else None
    trims = runner.ragged and drafter is not None and not drafter.has_distribution
    speculation = Speculation(costs, config.max_draft_tokens if drafter is not None else 0, trims)
    core = EngineCore(runner, limits, speculation, model.eos_token_ids or _eos(source), config.max_waiting)
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
    source = resolve(config.draft_model, progress=say)
    say(f"loading the draft model {source.name}")
    draft = load_model(source.directory, source.config, target.device, target.dtype, max_len + config.max_draft_tokens + 2)
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft_model: {source.name} has a vocabulary of {draft.vocab_size} tokens, the target {target.vocab_size}; "
            "a small-LM drafter must share the target's vocabulary"
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


def plan_memory(config: EngineConfig, model: TargetModel, draft_model: TargetModel | None) -> Memory:
    """How many blocks fit the stated share of what is free now, weights being loaded. One block is the null block."""
    layers = [*model.kv_layers, *(draft_model.kv_layers if draft_model is not None else [])]
    item = torch.empty(0, dtype=model.dtype).element_size()
    per_block = sum(2 * kv.num_kv_heads * kv.head_dim for kv in layers) * item * config.block_size
    if config.kv_cache_tokens is not None:
        return Memory(1 + -(-config.kv_cache_tokens // config.block_size), per_block)
    free = free_memory(model.device)
    # More than every sequence at full context can never be used.
    useful = config.max_num_seqs * -(-(config.max_model_len or model.max_position_embeddings) // config.block_size)
    num_blocks = min(int(free * config.kv_memory_share) // per_block, useful)
    if num_blocks < 1:
        raise ConfigError(
            f"kv_memory_share: {config.kv_memory_share} of {free >> 20} MiB free holds not one block of "
            f"{per_block >> 10} KiB; free memory or raise the share"
        )
    return Memory(1 + num_blocks, per_block)


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; on the CPU what the kernel calls available, or the control group's rest if that is less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else pages
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return min(available, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return available
