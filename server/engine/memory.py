"""What of a device's memory the KV pool gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from server.config import ConfigError, EngineConfig
from server.engine.working_memory import StepSizes, hidden_size, working_bytes
from server.models.base import KVLayer, TargetModel

SMALLER_STEPS = "max_num_seqs, max_draft_tokens or max_num_batched_tokens"


@dataclass(frozen=True, slots=True)
class Memory:
    """Blocks of the KV pool (null block included) and what one costs, drafter's layers included."""

    num_blocks: int
    bytes_per_block: int


def plan_memory(
    config: EngineConfig, model: TargetModel, draft_layers: list[KVLayer], draft_values_per_block: int = 0
) -> Memory:
    """How many blocks fit the stated share of what is free now, weights being loaded. One block is the null block.

    On a GPU the share is of what steps leave (`working_memory`); on a CPU it is small enough to leave them room.
    `config` has its defaults settled; `draft_layers` are the drafter's, in the network's own dtype, as are
    `draft_values_per_block`, what else it keeps with a block.
    """
    item = torch.empty(0, dtype=model.dtype).element_size()
    target_item = 1 if config.kv_cache_dtype == "fp8" else item
    per_token = sum(2 * kv.num_kv_heads * kv.head_dim for kv in model.kv_layers) * target_item
    per_token += sum(2 * kv.num_kv_heads * kv.head_dim for kv in draft_layers) * item
    per_block = per_token * config.block_size + draft_values_per_block * item
    if config.kv_cache_tokens is not None:
        return Memory(1 + -(-config.kv_cache_tokens // config.block_size), per_block)
    found = free_memory(model.device)
    reserved = working_bytes(_step_sizes(config, model, item)) if model.device.type == "cuda" else 0
    free = max(0, found - reserved)
    # More than every sequence at full context can never be used.
    useful = (config.max_num_seqs or 1) * -(
        -(config.max_model_len or model.max_position_embeddings) // config.block_size
    )
    num_blocks = min(int(free * (config.kv_memory_share or 1.0)) // per_block, useful)
    if num_blocks < 1:
        steps = f" less {reserved >> 20} MiB for steps" if reserved else ""
        remedy = "; free memory or raise the share" + (f", or lower {SMALLER_STEPS}" if reserved else "")
        raise ConfigError(
            f"kv_memory_share: {config.kv_memory_share} of {found >> 20} MiB free{steps} holds not one block of "
            f"{per_block >> 10} KiB{remedy}"
        )
    return Memory(1 + num_blocks, per_block)


def _step_sizes(config: EngineConfig, model: TargetModel, item: int) -> StepSizes:
    drafts = config.max_draft_tokens if config.drafter != "none" else 0
    return StepSizes(
        num_rows=config.max_num_seqs or 1,
        num_drafts=drafts,
        num_tokens=config.max_num_batched_tokens or 1,
        context=config.max_model_len or model.max_position_embeddings,
        vocab_size=model.vocab_size,
        hidden_size=hidden_size(model.num_parameters, max(1, len(model.kv_layers))),
        item=item,
        graphs=config.cuda_graphs,
        ratio=config.verification == "ratio",
        network=config.drafter not in ("none", "ngram", "suffix"),
    )


@contextmanager
def explained(kv_tokens: int) -> Iterator[None]:
    """Within, a GPU is made ready; if its memory does not suffice that is a ConfigError naming what would help."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"the GPU's memory is full: it does not hold a KV cache of {kv_tokens} tokens, the activations of steps "
            f"and CUDA graphs; lower kv_memory_share (or kv_cache_tokens), {SMALLER_STEPS}, or switch cuda_graphs off"
        ) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what began it: a capture that is broken off fails once more when it is closed."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_memory(device: torch.device) -> int:
    """Bytes free on the device. On the CPU: what the kernel calls available, or the control group's rest if less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _meminfo_available()
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(available, limit - used + int(stat["inactive_file"]))  # page cache gives way
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        return available


def _meminfo_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") // 2 * os.sysconf("SC_PAGE_SIZE")
