"""What of a device's memory the KV pool gets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from server.config import ConfigError, EngineConfig
from server.engine.drafters import DraftNeeds
from server.engine.working_memory import StepSizes, hidden_size, working_bytes
from server.models.base import KVLayer, TargetModel
from server.quant.build import parts_of
from server.quant.layer import LinearLayer

SMALLER_STEPS = "max_num_seqs, max_draft_tokens or max_num_batched_tokens"
CUDA_CONTEXT_BYTES = 560 << 20
"""What a process on a GPU takes before it allocates anything, of a device that is not there to be asked: an H100 held
790 to 810 MiB outside of torch, a quarter GiB of them kernels and graphs (counted with the steps)."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device: all of them and those that are free. `assumed`: somebody said so, nothing was measured."""

    type: str
    name: str
    total: int
    free: int
    assumed: bool = False


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What one block costs: the target's keys and values, the drafter's, and what else the drafter keeps with it."""

    target: int
    draft: int
    draft_extra: int

    @property
    def total(self) -> int:
        return self.target + self.draft + self.draft_extra


@dataclass(frozen=True, slots=True)
class Memory:
    """Blocks of the KV pool (null block included), what one costs, and what else is set aside.

    `step_bytes` are for activations, logits and CUDA graphs (an estimate; 0 on a CPU, where the share leaves room),
    `least_step_bytes` the same for the smallest settings, `slot_bytes` for what the drafter keeps a slot. No block but
    the null block: there is no room for one.
    """

    num_blocks: int
    block: BlockBytes
    step_bytes: int
    least_step_bytes: int
    slot_bytes: int

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block.total


def plan_memory(
    config: EngineConfig, model: TargetModel, draft: DraftNeeds, device_type: str, available: int
) -> Memory:
    """How the `available` bytes that weights leave are divided. One block is the null block.

    The KV pool gets the stated share, or the stated tokens. On a GPU the share is of what steps leave
    (`working_memory`); on a CPU it is small enough to leave them room. `config` has its defaults settled; `draft` is
    what the drafter keeps, in the network's own dtype.
    """
    item = model.dtype.itemsize
    kv_item = 1 if config.kv_cache_dtype == "fp8" else item
    block = BlockBytes(
        _kv_values(model.kv_layers) * config.block_size * kv_item,
        _kv_values(draft.kv_layers) * config.block_size * item,
        draft.values_per_block * item,
    )
    on_gpu = device_type == "cuda"
    sizes = step_sizes(config, model)
    smallest = replace(sizes, num_rows=1, num_drafts=0, num_tokens=config.block_size)
    widened = _widened_bytes(model)
    steps, least = (working_bytes(sizes) + widened, working_bytes(smallest) + widened) if on_gpu else (0, 0)
    num_slots = (config.max_num_seqs or 1) + (1 if on_gpu else 0)  # padding has one
    slots = num_slots * draft.values_per_slot * item
    if config.kv_cache_tokens is not None:
        return Memory(1 + -(-config.kv_cache_tokens // config.block_size), block, steps, least, slots)
    free = max(0, available - steps - slots)
    shared = int(free * (config.kv_memory_share or 1.0)) // block.total
    # More than every sequence at full context can never be used.
    useful = (config.max_num_seqs or 1) * -(
        -(config.max_model_len or model.max_position_embeddings) // config.block_size
    )
    num_blocks = max(0, min(shared, free // block.total - 1, useful))
    return Memory(1 + num_blocks, block, steps, least, slots)


def _widened_bytes(model: TargetModel) -> int:
    """The most that a quantised layer needs for itself in a step of many tokens (`server.quant.cuda`)."""
    linears: dict[str, LinearLayer] = getattr(model, "linears", dict)()
    return max((getattr(part, "widened_bytes", 0) for one in linears.values() for part in parts_of(one)), default=0)


def _kv_values(layers: Sequence[KVLayer]) -> int:
    """Values that a token leaves in these layers."""
    return sum(2 * kv.num_kv_heads * kv.head_dim for kv in layers)


def step_sizes(config: EngineConfig, model: TargetModel) -> StepSizes:
    """The largest steps of an engine; `config` has its defaults settled."""
    drafts = config.max_draft_tokens if config.drafter != "none" else 0
    return StepSizes(
        num_rows=config.max_num_seqs or 1,
        num_drafts=drafts,
        num_tokens=config.max_num_batched_tokens or 1,
        context=config.max_model_len or model.max_position_embeddings,
        vocab_size=model.vocab_size,
        hidden_size=hidden_size(model.num_parameters, max(1, len(model.kv_layers))),
        item=model.dtype.itemsize,
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


def measure(device: torch.device) -> DeviceMemory:
    """This machine's memory, now.

    Free on a CPU is what the kernel calls available, or the control group's rest if that is less.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left to the allocator is free
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory("cuda", torch.cuda.get_device_name(device), int(total), int(free))
    total, free = _system_memory()
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        rest = limit - used + int(stat["inactive_file"])  # page cache gives way
        return DeviceMemory("cpu", "CPU", min(total, limit), max(0, min(free, rest)))
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        return DeviceMemory("cpu", "CPU", total, free)


def assume(total: int, device: torch.device) -> DeviceMemory:
    """The memory of a device of `total` bytes that serves nobody else."""
    on_gpu = device.type == "cuda"
    free = max(0, total - CUDA_CONTEXT_BYTES) if on_gpu else total
    return DeviceMemory(device.type, "GPU" if on_gpu else "CPU", total, free, assumed=True)


def within(memory: DeviceMemory, share: float | None) -> DeviceMemory:
    """What an engine that may take that share of the device finds there, whatever else is free."""
    if share is None:
        return memory
    own = CUDA_CONTEXT_BYTES if memory.type == "cuda" else 0  # its process has that already
    return replace(memory, free=min(memory.free, max(0, int(share * memory.total) - own)))


def _system_memory() -> tuple[int, int]:
    """(all, available) bytes of the machine."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            return total, min(total, int(fields["MemAvailable"].split()[0]) * 1024)
    return total, total // 2
