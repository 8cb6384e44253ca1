"""A memory plan for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.engine.plan import MemoryPlan, size

SCHEMA = 1
"""Of the JSON; a field that changes its meaning or goes raises it, a new one does not."""
_TABLE_UNITS = (("MiB", 1 << 20, 0), ("GiB", 1 << 30, 2))


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """Sizes in bytes; those of `memory` add up to the device's `total_bytes`."""
    config, device = plan.config, plan.device
    return {
        "schema": SCHEMA,
        "fits": plan.shortage() is None,
        "reason": plan.shortage(),
        "model": {
            "name": plan.model,
            "kind": plan.kind,
            "architecture": plan.architecture,
            "num_parameters": plan.num_parameters,
            "dtype": plan.dtype,
        },
        "drafter": {
            "name": plan.drafter,
            "model": plan.draft_model,
            "max_draft_tokens": config.max_draft_tokens if plan.drafter != "none" else 0,
        },
        "device": {
            "type": device.type,
            "name": device.name,
            "assumed": device.assumed,
            "total_bytes": device.total,
            "free_bytes": device.free,
        },
        "memory": {f"{name}_bytes": value for name, value in plan.parts().items()},
        "kv_cache": {
            "dtype": _kv_dtype(plan),
            "block_size": config.block_size,
            "num_blocks": plan.num_blocks,
            "block_bytes": plan.memory.block.total,
            "num_tokens": plan.kv_tokens,
        },
        "context": {
            "max_model_len": plan.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "num_full_sequences": plan.full_sequences,
        },
    }


def as_text(plan: MemoryPlan) -> str:
    """A table whose columns add up, what that means for requests, and whether it fits."""
    return "\n".join([_title(plan), "", *_table(plan), "", *_meaning(plan), _verdict(plan)])


def _title(plan: MemoryPlan) -> str:
    device = plan.device
    where = f"a {device.name} of {size(device.total)}" if device.assumed else f"this machine's {device.name}"
    parameters = f"{plan.num_parameters / 1e6:,.1f} M" if plan.num_parameters < 1e9 else f"{_billions(plan)} B"
    return f"{plan.model} ({plan.architecture}, {parameters} parameters, {plan.dtype}) on {where}"


def _billions(plan: MemoryPlan) -> str:
    return f"{plan.num_parameters / 1e9:,.2f}"


def _table(plan: MemoryPlan) -> list[str]:
    notes = _notes(plan)
    labels = [label for label, _ in notes.values()]
    parts = [plan.parts()[name] for name in notes]
    columns = []
    for unit, scale, digits in _TABLE_UNITS:
        cells = [f"{value:,.{digits}f}" for value in rounded([*parts, plan.device.total], scale, digits)]
        shown = ["–" if value == 0 else cell for cell, value in zip(cells, [*parts, 1], strict=True)]
        columns.append([unit, *shown])
    names = ["", *labels, "total"]
    widths = [max(map(len, column)) for column in columns]
    left = max(map(len, names))
    lines = []
    for i, name in enumerate(names):
        numbers = "  ".join(column[i].rjust(width) for column, width in zip(columns, widths, strict=True))
        note = ["", *(note for _, note in notes.values()), ""][i]
        lines.append(f"  {name.ljust(left)}  {numbers}   {note}".rstrip())
    rule = "  " + "-" * (left + 2 + sum(widths) + 2 * (len(widths) - 1))
    return [*lines[:-1], rule, lines[-1]]


def _notes(plan: MemoryPlan) -> dict[str, tuple[str, str]]:
    """Label and remark of every part of `MemoryPlan.parts`."""
    config, on_gpu, drafter = plan.config, plan.device.type == "cuda", plan.drafter
    block, tokens = plan.memory.block, config.block_size
    without = "no drafter" if drafter == "none" else f"{drafter}: none"
    steps = "activations, logits, CUDA graphs: an estimate" if on_gpu else "on a CPU part of what is left"
    context = plan.device.assumed and on_gpu
    missing = plan.parts()["left"] < 0
    if missing:
        left = ""
    elif config.kv_cache_tokens is not None:
        left = "kv_cache_tokens is given"
    elif plan.full_sequences >= (config.max_num_seqs or 1):
        left = "every sequence already has its full context"
    else:
        left = f"kv_memory_share {config.kv_memory_share:g}"
    return {
        "in_use": ("CUDA context", "an estimate") if context else ("in use already", ""),
        "target_weights": ("target weights", ""),
        "drafter_weights": ("drafter weights", plan.draft_model or drafter if plan.draft_bytes else without),
        "steps": ("steps", steps),
        "target_kv": ("KV cache, target", f"{size(block.target // tokens)} a token, {_kv_dtype(plan)}"),
        "drafter_kv": ("KV cache, drafter", f"{size(block.draft // tokens)} a token" if block.draft else without),
        "drafter_features": (
            "drafter features",
            "the target's, kept with blocks and sequences" if block.draft_extra else without,
        ),
        "left": ("missing" if missing else "left", left),
    }


def _kv_dtype(plan: MemoryPlan) -> str:
    return "float8_e4m3fn" if plan.config.kv_cache_dtype == "fp8" else plan.dtype


def _meaning(plan: MemoryPlan) -> list[str]:
    config = plan.config
    if plan.num_blocks == 0:
        return []
    drafts = "" if plan.drafter == "none" else f", up to {config.max_draft_tokens} draft tokens each ({plan.drafter})"
    lines = [
        f"KV cache   {plan.kv_tokens:,} tokens in {plan.num_blocks - 1:,} blocks of {config.block_size}",
        f"context    {plan.max_model_len:,} tokens; {plan.full_sequences:,} such sequences fit at once",
        f"sequences  up to {config.max_num_seqs:,} at once{drafts}",
    ]
    if plan.kv_tokens < plan.max_model_len:
        lines.append(f"           requests of more than {plan.kv_tokens:,} tokens are refused")
    return lines


def _verdict(plan: MemoryPlan) -> str:
    reason = plan.shortage()
    return "It fits." if reason is None else f"It does not fit: {reason}"


def rounded(values: Sequence[int], unit: int, digits: int) -> list[float]:
    """Parts and, last, their sum, in `unit` to `digits` digits: rounded so that the parts still add up.

    The largest remainders are rounded up (Hare's method).
    """
    *parts, total = [value * 10**digits for value in values]
    floors = [part // unit for part in parts]
    whole = (total + unit // 2) // unit
    by_remainder = sorted(range(len(parts)), key=lambda i: floors[i] * unit - parts[i])
    for i in by_remainder[: whole - sum(floors)]:
        floors[i] += 1
    return [value / 10**digits for value in (*floors, whole)]
