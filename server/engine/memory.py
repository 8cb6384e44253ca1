"""What of a device's memory the KV pool gets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from server.config import ConfigError, EngineConfig
from server.models.base import KVLayer, TargetModel


@dataclass(frozen=True, slots=True)
class Memory:
    """Blocks of the KV pool (null block included) and what one costs, drafter's layers included."""

    num_blocks: int
    bytes_per_block: int


def plan_memory(
    config: EngineConfig, model: TargetModel, draft_layers: list[KVLayer], draft_values_per_block: int = 0
) -> Memory:
    """How many blocks fit the stated share of what is free now, weights being loaded. One block is the null block.

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
    free = free_memory(model.device)
    # More than every sequence at full context can never be used.
    useful = (config.max_num_seqs or 1) * -(
        -(config.max_model_len or model.max_position_embeddings) // config.block_size
    )
    num_blocks = min(int(free * (config.kv_memory_share or 1.0)) // per_block, useful)
    if num_blocks < 1:
        raise ConfigError(
            f"kv_memory_share: {config.kv_memory_share} of {free >> 20} MiB free holds not one block of "
            f"{per_block >> 10} KiB; free memory or raise the share"
        )
    return Memory(1 + num_blocks, per_block)


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
