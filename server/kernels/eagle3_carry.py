"""What the slots of an EAGLE-3 drafter carry from step to step: what a chain reads of it, and what a verdict leaves.

Position p holds token p and the features of token p - 1. `ring` [S, C, H] keeps the latter for the last C positions of
slot s, position p at `ring[s, p % C]`; `by_block` [num_blocks, H] what the position after each full block reads.
`marks` [4, S] int64 say which of it is right (`draft_models.eagle3_ring`): steps that the drafter does not see leave
all of this as it is, and the next one that it sees finds by its position what is missing. Entries of a block table
behind the row's last block are stale, so nothing is written for drafts past a row's limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gather import COPY_BLOCK, copy_values
from server.kernels.paged import chain_ends, places
from server.kernels.runtime import next_power_of_2, pdl_options

KNOWN_FROM, KNOWN_TO, VALID_FROM, VALID_TO = range(4)
"""Lines of `marks`: of a slot, the ring has right features of positions `KNOWN_FROM` … `KNOWN_TO` - 1 (as far back as
it reaches), and the pool right keys and values of positions `VALID_FROM` … `VALID_TO` - 1."""
_KNOWN_FROM, _KNOWN_TO = tl.constexpr(KNOWN_FROM), tl.constexpr(KNOWN_TO)
_VALID_FROM, _VALID_TO = tl.constexpr(VALID_FROM), tl.constexpr(VALID_TO)


@dataclass(slots=True)
class Window:
    """The last W known tokens of each row, and where the chain goes on.

    Row-major, [R * W] each: `token_ids`, `positions`, `places` (the null block where keys and values must stay as they
    are); `features` [R * W, H]. `last` [R] is the index among these of the last known token. `ends` [k + 1, R] are
    positions: the last known token's, then those of the k drafts; `end_places` [k, R] are the former ones in the pool
    (the null block past a row's limit). `first` [R] is the first position that attention should see.
    """

    token_ids: Tensor
    positions: Tensor
    places: Tensor
    features: Tensor
    last: Tensor
    ends: Tensor
    end_places: Tensor
    first: Tensor


@triton.jit
def _place_of(
    table: tl.tensor, position: tl.tensor, wanted: tl.tensor, num_blocks: tl.tensor, BLOCK_SIZE: tl.constexpr
):
    """The place of `position` (int64) in the pool, and whether it has one: 0 unless `wanted` and within the table."""
    index = position // BLOCK_SIZE
    wanted = wanted & (index < num_blocks)
    block = tl.load(table + index, mask=wanted, other=0).to(tl.int64)
    return tl.where(wanted, block * BLOCK_SIZE + position % BLOCK_SIZE, 0), wanted


@triton.jit
def _window_kernel(
    slots_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    history_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    marks_ptr: tl.tensor,
    ring_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    places_ptr: tl.tensor,
    features_ptr: tl.tensor,
    last_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    end_places_ptr: tl.tensor,
    first_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    history_stride: tl.tensor,
    tables_stride: tl.tensor,
    num_blocks: tl.tensor,
    W: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    known = tl.load(num_tokens_ptr + slot).to(tl.int64)
    start = tl.maximum(known - W, 0)
    position = start + column
    known_from = tl.load(marks_ptr + _KNOWN_FROM * num_slots + slot)
    fresh = tl.load(marks_ptr + _KNOWN_TO * num_slots + slot) == known
    right = tl.where(fresh, tl.maximum(start, known_from), known)
    writable = (position >= tl.minimum(right, known - 1)) & (position < known)
    table = tables_ptr + slot * tables_stride
    out = row * W + column
    place, writable = _place_of(table, position, writable, num_blocks, BLOCK_SIZE)
    tl.store(places_ptr + out, place)
    tl.store(positions_ptr + out, position)
    tl.store(token_ids_ptr + out, tl.load(history_ptr + slot * history_stride + position))
    source = ring_ptr + (slot * RING + position % RING) * HIDDEN
    for at in range(0, HIDDEN, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        values = tl.load(source + offsets, mask=(offsets < HIDDEN) & (position >= right), other=0.0)
        tl.store(features_ptr + out * HIDDEN + offsets, values, mask=offsets < HIDDEN)
    if column == 0:
        draft = tl.arange(0, BLOCK_K)
        end = known - 1 + draft
        fed = (draft < K) & (draft <= tl.load(limits_ptr + row))
        end_place, fed = _place_of(table, end, fed, num_blocks, BLOCK_SIZE)
        tl.store(ends_ptr + draft * num_rows + row, end, mask=draft <= K)
        tl.store(end_places_ptr + draft * num_rows + row, end_place, mask=draft < K)
        tl.store(last_ptr + row, row * W + known - 1 - start)
        reaches = tl.load(marks_ptr + _VALID_TO * num_slots + slot) >= right
        valid = tl.where(reaches, tl.load(marks_ptr + _VALID_FROM * num_slots + slot), right)
        tl.store(first_ptr + row, tl.minimum(valid, known - 1))
        tl.store(marks_ptr + _VALID_FROM * num_slots + slot, valid)
        tl.store(marks_ptr + _VALID_TO * num_slots + slot, known)


@triton.jit
def _store_kernel(
    slots_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    num_emitted_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    fused_ptr: tl.tensor,
    ring_ptr: tl.tensor,
    by_block_ptr: tl.tensor,
    marks_ptr: tl.tensor,
    num_slots: tl.tensor,
    tables_stride: tl.tensor,
    num_blocks: tl.tensor,
    WIDTH: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    known = tl.load(num_tokens_ptr + slot).to(tl.int64)
    first = known - tl.load(num_emitted_ptr + row).to(tl.int64)
    position = tl.maximum(first + column, 0)
    source = fused_ptr + (row * WIDTH + column) * HIDDEN
    copy_values(source, ring_ptr + (slot * RING + position % RING) * HIDDEN, True, HIDDEN, BLOCK)
    before = tl.maximum(position - 1, 0)
    full = (position % BLOCK_SIZE == 0) & (position > 0) & (column <= tl.load(limits_ptr + row))
    kept, full = _place_of(tables_ptr + slot * tables_stride, before, full, num_blocks, BLOCK_SIZE)
    copy_values(source, by_block_ptr + kept // BLOCK_SIZE * HIDDEN, full, HIDDEN, BLOCK)
    if column == 0:
        if tl.load(marks_ptr + _KNOWN_TO * num_slots + slot) != first:  # steps in between were not seen
            tl.store(marks_ptr + _KNOWN_FROM * num_slots + slot, first)
        tl.store(marks_ptr + _KNOWN_TO * num_slots + slot, known)


def _sizes(ring: Tensor, block_size: int) -> dict[str, Any]:
    hidden = ring.shape[2]
    block = min(next_power_of_2(hidden), COPY_BLOCK)
    return {
        "RING": ring.shape[1], "BLOCK_SIZE": block_size, "HIDDEN": hidden, "BLOCK": block, **pdl_options(ring.device)
    }  # fmt: skip


def read_window(
    slots: Tensor,
    limits: Tensor,
    history: Tensor,
    num_tokens: Tensor,
    block_tables: Tensor,
    ring: Tensor,
    marks: Tensor,
    block_size: int,
    width: int,
    k: int,
) -> Window:
    """What the first pass of a chain of k drafts runs, windows of `width` tokens; `marks` count them as written.

    `slots`, `limits` [R] int64, `history` [S, L] and `num_tokens` [S] int64, `block_tables` [S, NB] int32; the rest as
    above. Rows with fewer tokens than the window start at 0. In the pool nothing goes to positions whose features are
    not known, but for the row's last token: where even its own are missing it is run without (zeros), seen by this
    chain alone.
    """
    num_rows, hidden = slots.shape[0], ring.shape[2]

    def ids(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=slots.device)

    count = num_rows * width
    found = Window(
        token_ids=ids(count),
        positions=ids(count),
        places=ids(count),
        features=ring.new_empty(count, hidden),
        last=ids(num_rows),
        ends=ids(k + 1, num_rows),
        end_places=ids(k, num_rows),
        first=ids(num_rows),
    )
    _window_kernel[(num_rows, width)](
        slots, limits, num_tokens, history, block_tables, marks, ring,
        found.token_ids, found.positions, found.places, found.features, found.last, found.ends, found.end_places,
        found.first, num_rows, marks.shape[1], history.stride(0), block_tables.stride(0), block_tables.shape[1],
        W=width, K=k, BLOCK_K=next_power_of_2(k + 1), **_sizes(ring, block_size),
    )  # fmt: skip
    return found


def read_window_reference(
    slots: Tensor,
    limits: Tensor,
    history: Tensor,
    num_tokens: Tensor,
    block_tables: Tensor,
    ring: Tensor,
    marks: Tensor,
    block_size: int,
    width: int,
    k: int,
) -> Window:
    """`read_window` in torch operations."""
    known, by_row = num_tokens[slots], slots[:, None]
    starts = (known - width).clamp(min=0)
    positions = starts[:, None] + torch.arange(width, device=slots.device)
    known_from, known_to, valid_from, valid_to = marks[:, slots]
    right = torch.where(known_to == known, torch.maximum(starts, known_from), known)
    writable = (positions >= torch.minimum(right, known - 1)[:, None]) & (positions < known[:, None])
    ends, end_places = chain_ends(block_tables, slots, known, limits, block_size, k)
    valid = torch.where(valid_to >= right, valid_from, right)
    marks[VALID_FROM, slots] = valid
    marks[VALID_TO, slots] = known
    each = torch.arange(width - 1, width * slots.shape[0], width, device=slots.device)
    features = ring[by_row, positions % ring.shape[1]]
    return Window(
        token_ids=history[by_row, positions].view(-1),
        positions=positions.view(-1),
        places=places(block_tables, slots, positions, block_size, writable).view(-1),
        features=torch.where((positions >= right[:, None])[:, :, None], features, 0.0).flatten(0, 1),
        last=each - (width - known).clamp(min=0),
        ends=ends,
        end_places=end_places,
        first=torch.minimum(valid, known - 1),
    )


def store_features(
    slots: Tensor,
    limits: Tensor,
    num_tokens: Tensor,
    num_emitted: Tensor,
    block_tables: Tensor,
    fused: Tensor,
    ring: Tensor,
    by_block: Tensor,
    marks: Tensor,
    block_size: int,
) -> None:
    """Keeps the features `fused` [R, 1 + k, H] (contiguous) of the tokens that the target has just verified.

    `num_tokens` [S] counts the `num_emitted` [R] of this step already. Where several tokens belong to the null block,
    any of them stays there.
    """
    num_rows, width = fused.shape[:2]
    _store_kernel[(num_rows, width)](
        slots, limits, num_tokens, num_emitted, block_tables, fused, ring, by_block, marks, marks.shape[1],
        block_tables.stride(0), block_tables.shape[1], WIDTH=width, **_sizes(ring, block_size),
    )  # fmt: skip


def store_features_reference(
    slots: Tensor,
    limits: Tensor,
    num_tokens: Tensor,
    num_emitted: Tensor,
    block_tables: Tensor,
    fused: Tensor,
    ring: Tensor,
    by_block: Tensor,
    marks: Tensor,
    block_size: int,
) -> None:
    """`store_features` in torch operations."""
    known = num_tokens[slots]
    first = known - num_emitted  # the position that reads the features of the one before
    offsets = torch.arange(fused.shape[1], device=slots.device)
    positions = (first[:, None] + offsets).clamp_(min=0)
    ring[slots[:, None], positions % ring.shape[1]] = fused
    ends_block = (positions % block_size == 0) & (positions > 0) & (offsets <= limits[:, None])
    before = places(block_tables, slots, (positions - 1).clamp(min=0), block_size, ends_block)
    by_block[before // block_size] = fused
    marks[KNOWN_FROM, slots] = torch.where(marks[KNOWN_TO, slots] == first, marks[KNOWN_FROM, slots], first)
    marks[KNOWN_TO, slots] = known
