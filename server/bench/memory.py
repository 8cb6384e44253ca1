"""What the engine's memory goes to. On a GPU the allocator is asked, on the CPU the system."""

from __future__ import annotations

import resource
import sys

import torch

from server.bench.engine import Bench
from server.bench.report import Row, Table, number
from server.engine.footprint import tensor_bytes

_MIB = 2**20
_DEFAULT_POOL = (0, 0)


def memory(bench: Bench) -> tuple[Table, list[Row]]:
    """Weights, KV pools and CUDA graphs in MiB, and the peak of the whole run so far."""
    models = [bench.core.runner.model, *draft_networks(bench.core.runner.drafter)]
    parts: list[tuple[str, float, str]] = [
        ("weights", tensor_bytes(models), "target and draft model" if len(models) > 1 else "target"),
        ("kv", bench.info.kv_cache_bytes, f"{bench.info.kv_cache_tokens} tokens"),
        *(_gpu_parts(bench) if bench.device.type == "cuda" else _cpu_parts()),
    ]
    table = Table("memory", ["", "MiB", "of"], [], num_names=1)
    rows = []
    for name, size, note in parts:
        table.lines.append([name, number(round(size / _MIB, 1)), note])
        rows.append(Row(bench.names.case("memory_mib", name), round(size / _MIB, 1), "MiB", None, note))
    return table, rows


def draft_networks(drafter: object) -> list[object]:
    """What a drafter draws drafts with, wherever it keeps it; none for one that copies."""
    forward = getattr(drafter, "forward", None)  # on a GPU a draft model runs by kernels, which hold it
    found = [getattr(drafter, "model", None), getattr(drafter, "network", None), getattr(forward, "model", None)]
    learned = getattr(drafter, "learned", None)
    return [network for network in found if network is not None] + (draft_networks(learned) if learned else [])


def _gpu_parts(bench: Bench) -> list[tuple[str, float, str]]:
    """Private pools are those of captured graphs. The rest that torch did not reserve is CUDA's own."""
    device, num_misses = bench.device, bench.core.stats().num_graph_misses
    private = [s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != _DEFAULT_POOL]
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return [
        ("graphs", sum(private), f"pools of {bench.info.num_graphs} CUDA graphs; {num_misses} steps had none"),
        ("peak", torch.cuda.max_memory_allocated(device), "most ever allocated"),
        ("reserved", torch.cuda.max_memory_reserved(device), "most ever reserved by torch"),
        ("cuda", outside, "outside torch: context, kernels, instantiated graphs, other processes"),
    ]


def _cpu_parts() -> list[tuple[str, float, str]]:
    unit = 1 if sys.platform == "darwin" else 1024
    return [
        ("graphs", 0, "none on a CPU"),
        ("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set of the whole process"),
    ]
