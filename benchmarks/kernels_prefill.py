"""Attention of prompts on one GPU: TFLOP/s, whether the default tile is the best, and deterministic mode's bits.

    python benchmarks/kernels_prefill.py

Prefill of 16 x 2048 tokens for the heads of Llama-3.1-8B and SmolLM2-135M: TFLOP/s of causal attention (half the
square) for the paged kernel with a few tiles, the default first, in deterministic mode, and for torch's `varlen_attn`.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.kernels_attention import BLOCK, DEVICE, DTYPE, SHAPES, Heads
from server.kernels.attention import Tile, Workspace, decode_attention, plan_splits
from server.kernels.attention_prefill import prefill_attention, prefill_tile
from server.kernels.paged import PagedRows
from server.kernels.runtime import num_sms

BATCH, LENGTH = 16, 2048


def microseconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of `repeats`, without a graph: for calls that are long beside a launch."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(min(times))


def prompt_rows(batch: int, length: int) -> PagedRows:
    tables = (torch.randperm(batch * length // BLOCK, device=DEVICE) + 1).int().view(batch, -1)
    offsets = torch.arange(batch + 1, device=DEVICE).int() * length
    starts = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    slots = torch.arange(batch, device=DEVICE)
    return PagedRows(slots, starts, tables, BLOCK, length, offsets=offsets, max_width=length)


def flash(q: Tensor, k: Tensor, v: Tensor, rows: PagedRows, scale: float) -> Tensor:
    """The same from torch's FlashAttention: keys [N, kv_heads, D] and values are contiguous, prompts whole."""
    from torch.nn.attention.varlen import varlen_attn

    # Newer torch wants grouped heads asked for by name; older torch takes them as they come.
    grouped: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    assert rows.offsets is not None
    offsets, longest = rows.offsets, rows.max_width
    found = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0), **grouped)
    assert isinstance(found, Tensor)
    return found.flatten(1)


def prefill(shape: Heads, pool: Tensor, batch: int = BATCH, length: int = LENGTH) -> None:
    """TFLOP/s, 4 D flops a visible pair of tokens and head; and that all ways agree."""
    rows = prompt_rows(batch, length)
    kv = torch.randn(batch * length, shape.heads + 2 * shape.kv_heads, shape.dim, device=DEVICE, dtype=DTYPE)
    q, k, v = kv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
    at = torch.arange(length, device=DEVICE)
    places = rows.block_tables.long()[:, at // BLOCK] * BLOCK + at % BLOCK
    pool[places.flatten()] = kv[:, shape.heads :]
    flops = 4 * shape.dim * shape.heads * batch * length * (length + 1) / 2
    scale = shape.dim**-0.5

    def paged(tile: Tile | None = None, deterministic: bool = False) -> Tensor:
        return prefill_attention(q, pool, rows, scale=scale, tile=tile, deterministic=deterministic)

    first = prefill_tile(shape.dim, DTYPE, len(q) * shape.heads, num_sms(DEVICE))
    knobs = [(64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)]
    options = [first, *(t for t in (Tile(*k) for k in knobs) if t != first)]
    named: dict[str, Callable[[], Tensor]] = {str(t): partial(paged, t) for t in options}
    named["deterministic"] = lambda: paged(deterministic=True)
    named["varlen_attn"] = partial(flash, q, k, v, rows, scale)

    def compiled(tile: Tile) -> None:
        with suppress(Exception):  # reported when its turn comes
            paged(tile)

    with ThreadPoolExecutor(8) as compiling:
        list(compiling.map(compiled, options))
    expected = None
    for name, call in named.items():
        try:
            found = call().float()
            us = microseconds(call)
        except Exception as refused:  # noqa: BLE001  one refused configuration must not end the run
            print(f"prefill {shape.name} {name}: {type(refused).__name__}: {str(refused)[:200]}")
            continue
        expected = found if expected is None else expected
        error = float((found - expected).norm() / expected.norm())
        print(f"prefill {shape.name} {us:9.1f} us {flops / us / 1e6:6.1f} TFLOP/s  {name}  (differs {error:.1e})")


def bits(shape: Heads, pool: Tensor) -> None:
    """Deterministic mode: a prompt's last tokens, decoded and verified, have the prompt's bits."""
    rows = prompt_rows(2, 2048)
    q = torch.randn(4096, shape.heads, shape.dim, device=DEVICE, dtype=DTYPE)
    how = {"scale": shape.dim**-0.5}
    whole = prefill_attention(q, pool, rows, deterministic=True, **how)
    workspace = Workspace.allocate(DEVICE, 1 << 14, shape.dim, 4096)
    for width in (1, 3, 5, 16):
        for last in (600, 1537, 2048):
            few = replace(rows, starts=rows.starts + last - width, offsets=None, width=width)
            index = (torch.arange(2)[:, None] * 2048 + torch.arange(last - width, last)).flatten().to(DEVICE)
            splits = plan_splits(2, width, shape.heads, shape.kv_heads, last, num_sms(DEVICE), deterministic=True)
            found = decode_attention(q[index], pool, few, splits=splits, workspace=workspace, **how)
            if not torch.equal(found, whole[index]):
                print(f"BITS DIFFER {shape.name} W={width} context {last}: {int((found != whole[index]).sum())} values")


def main() -> None:
    begin = time.perf_counter()
    for shape in SHAPES:
        pool = shape.pool(BATCH * LENGTH + BLOCK)
        bits(shape, pool)
        prefill(shape, pool)
        print(f"{shape.name}: {time.perf_counter() - begin:.1f} s so far", flush=True)


if __name__ == "__main__":
    main()
