"""The beginning of a step on the device: changes of the block tables, and what every row feeds the network.

Also the gathering of rows, where a pass over more tokens leaves some to go on with.

Padding rows name the last slot, which is nobody's: it holds one token, and its block table is all 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import next_power_of_2, pdl_options

COPY_BLOCK = 1024
"""The most values that a program copies at a time."""


@triton.jit
def _gather_inputs_kernel(
    slots_ptr: tl.tensor,
    drafts_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    history_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    drafts_stride: tl.tensor,
    history_stride: tl.tensor,
    tables_stride: tl.tensor,
    num_blocks: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIMITED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    start = tl.load(num_tokens_ptr + slot).to(tl.int64) - 1
    committed = tl.load(history_ptr + slot * history_stride + start).to(tl.int64)
    tokens = tl.zeros((BLOCK,), tl.int64) + committed
    if WIDTH > 1:
        is_draft = inside & (column > 0)
        drafted = tl.load(drafts_ptr + row * drafts_stride + column - 1, mask=is_draft, other=0)
        tokens = tl.where(is_draft, drafted.to(tl.int64), tokens)
    positions = start + column
    block = positions // BLOCK_SIZE
    # Drafts may reach past the longest sequence a slot can hold: those go to block 0, which is nobody's.
    known = inside & (block < num_blocks)
    if LIMITED:  # nor has the row blocks for more drafts than it may get: its table may name another's there
        known = known & (column <= tl.load(limits_ptr + row))
    table = tl.load(tables_ptr + slot * tables_stride + block, mask=known, other=0).to(tl.int64)
    place = table * BLOCK_SIZE + positions % BLOCK_SIZE
    tl.store(starts_ptr + row, start)
    out = row * WIDTH + column
    tl.store(token_ids_ptr + out, tokens, mask=inside)
    tl.store(positions_ptr + out, positions, mask=inside)
    tl.store(slot_mapping_ptr + out, place, mask=inside)


def gather_inputs(
    slots: Tensor,
    drafts: Tensor | None,
    history: Tensor,
    num_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of a step of R rows with k drafts each: the first kernel of a step.

    `slots` [R] int64, `drafts` [R, k] int64 (None: k = 0), `history` [S, L] int64, `num_tokens` [S] int64 (at least 1),
    `block_tables` [S, NB] int32. Returns `token_ids` [R (1 + k)] (each row's last known token, then its drafts),
    `starts` [R] (the position of that token), `positions` and `slot_mapping` [R (1 + k)] (place in the pool), all
    int64. Tokens past the end of the block table go to block 0, as do drafts beyond their row's `limits` [R] int64.
    """
    num_rows = slots.shape[0]
    width = 1 if drafts is None else 1 + drafts.shape[1]
    starts = torch.empty(num_rows, dtype=torch.int64, device=slots.device)
    token_ids, positions, slot_mapping = (
        torch.empty(num_rows * width, dtype=torch.int64, device=slots.device) for _ in range(3)
    )
    if num_rows:
        _gather_inputs_kernel[(num_rows,)](
            slots,
            slots if drafts is None else drafts,
            slots if limits is None else limits,
            history,
            num_tokens,
            block_tables,
            token_ids,
            starts,
            positions,
            slot_mapping,
            0 if drafts is None else drafts.stride(0),
            history.stride(0),
            block_tables.stride(0),
            block_tables.shape[1],
            WIDTH=width,
            BLOCK=next_power_of_2(width),
            BLOCK_SIZE=block_size,
            LIMITED=limits is not None,
            num_warps=1,
            **pdl_options(slots.device),
        )
    return token_ids, starts, positions, slot_mapping


def gather_inputs_reference(
    slots: Tensor,
    drafts: Tensor | None,
    history: Tensor,
    num_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gather_inputs` in torch operations."""
    starts = num_tokens[slots] - 1
    tokens = history[slots, starts].unsqueeze(1)
    if drafts is not None:
        tokens = torch.cat([tokens, drafts], dim=1)
    positions = starts.unsqueeze(1) + torch.arange(tokens.shape[1], device=slots.device)
    block = positions // block_size
    known = block < block_tables.shape[1]
    if limits is not None:
        known &= torch.arange(tokens.shape[1], device=slots.device) <= limits.unsqueeze(1)
    table = block_tables[slots.unsqueeze(1), block.clamp(max=block_tables.shape[1] - 1)].long() * known
    places = table * block_size + positions % block_size
    return tokens.reshape(-1), starts, positions.reshape(-1), places.reshape(-1)


@triton.jit
def _apply_block_updates_kernel(
    updates_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    tables_stride: tl.tensor,
    num_updates: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    update = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = update < num_updates
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(updates_ptr + 3 * update, mask=inside, other=0).to(tl.int64)
    index = tl.load(updates_ptr + 3 * update + 1, mask=inside, other=0)
    block = tl.load(updates_ptr + 3 * update + 2, mask=inside, other=0)
    tl.store(tables_ptr + slot * tables_stride + index, block, mask=inside)


def apply_block_updates(updates: Tensor, block_tables: Tensor) -> None:
    """`block_tables[slot, index] = block` for every (slot, index, block) of updates [U, 3] int32 (contiguous).

    An entry is named at most once, but for padding: (last slot, 0, 0), any number of times.
    """
    num_updates = updates.shape[0]
    if num_updates == 0:
        return
    block = min(next_power_of_2(num_updates), 256)
    _apply_block_updates_kernel[(-(-num_updates // block),)](
        updates,
        block_tables,
        block_tables.stride(0),
        num_updates,
        BLOCK=block,
        num_warps=min(max(block // 32, 1), 4),
        **pdl_options(updates.device),
    )


def apply_block_updates_reference(updates: Tensor, block_tables: Tensor) -> None:
    """`apply_block_updates` in torch operations."""
    slot, index, block = updates.long().unbind(1)
    block_tables[slot, index] = block.to(block_tables.dtype)


@triton.jit
def copy_values(
    source: tl.tensor, target: tl.tensor, wanted: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Copies WIDTH values if `wanted`, BLOCK at a time."""
    for start in range(0, WIDTH, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = (offsets < WIDTH) & wanted
        tl.store(target + offsets, tl.load(source + offsets, mask=inside, other=0.0), mask=inside)


@triton.jit
def _select_kernel(
    at_ptr: tl.tensor,
    queries_ptr: tl.tensor,
    x_ptr: tl.tensor,
    out_queries_ptr: tl.tensor,
    out_x_ptr: tl.tensor,
    queries_stride: tl.tensor,
    x_stride: tl.tensor,
    QUERIES: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.load(at_ptr + row).to(tl.int64)
    if tl.program_id(1) == 0:
        copy_values(queries_ptr + at * queries_stride, out_queries_ptr + row * QUERIES, True, QUERIES, BLOCK)
    else:
        copy_values(x_ptr + at * x_stride, out_x_ptr + row * HIDDEN, True, HIDDEN, BLOCK)


def select_rows(queries: Tensor, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `at` [R] int64 of queries [N, heads, D] and of x [N, H], contiguous: one launch.

    Rows of `queries` and `x` may lie apart. `at` is read by nothing but the kernel.
    """
    (_, heads, dim), width = queries.shape, x.shape[1]
    found = queries.new_empty(at.shape[0], heads, dim), x.new_empty(at.shape[0], width)
    block = min(next_power_of_2(max(heads * dim, width)), COPY_BLOCK)
    _select_kernel[(at.shape[0], 2)](
        at, queries, x, *found, queries.stride(0), x.stride(0),
        QUERIES=heads * dim, HIDDEN=width, BLOCK=block, **pdl_options(x.device),
    )  # fmt: skip
    return found


def select_rows_reference(queries: Tensor, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """`select_rows` in torch operations."""
    return queries[at], x[at]
