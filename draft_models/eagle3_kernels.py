"""What an EAGLE-3 head computes beside its linears, as Triton kernels; the references are TorchOps and FeatureRing.

Imported only where kernels run. Those of `server/kernels` are used where there is one; the rest is here, each
in one launch: what a chain's first pass reads and what it goes on with, where features go, and the layer's input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from draft_models.eagle3_ring import FeatureRing, Window
from server.kernels.activation import silu_mul
from server.kernels.attention import decode_attention
from server.kernels.attention_plan import Splits, Workspace, decode_tile, partials_needed, plan_splits
from server.kernels.norm import add_rms_norm_
from server.kernels.paged import PagedRows
from server.kernels.rope import rope_write
from server.kernels.runtime import next_power_of_2, num_sms, pdl_options, supports_pdl
from server.spec.device import DeviceStep

_COPY_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _copy(source: tl.tensor, target: tl.tensor, wanted: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    for start in range(0, WIDTH, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = (offsets < WIDTH) & wanted
        tl.store(target + offsets, tl.load(source + offsets, mask=inside, other=0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _window_kernel(
    slots_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    history_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    known_from_ptr: tl.tensor,
    valid_from_ptr: tl.tensor,
    written_ptr: tl.tensor,
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
    block = position // BLOCK_SIZE
    writable = (position >= tl.load(known_from_ptr + slot)) & (position < known) & (block < num_blocks)
    table = tables_ptr + slot * tables_stride
    place = tl.load(table + block, mask=writable, other=0).to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    out = row * W + column
    tl.store(places_ptr + out, tl.where(writable, place, 0))
    tl.store(positions_ptr + out, position)
    tl.store(token_ids_ptr + out, tl.load(history_ptr + slot * history_stride + position))
    _copy(ring_ptr + (slot * RING + position % RING) * HIDDEN, features_ptr + out * HIDDEN, True, HIDDEN, BLOCK)
    if column == 0:
        draft = tl.arange(0, BLOCK_K)
        end = known - 1 + draft
        end_block = end // BLOCK_SIZE
        fed = (draft < K) & (draft <= tl.load(limits_ptr + row)) & (end_block < num_blocks)
        end_place = tl.load(table + end_block, mask=fed, other=0).to(tl.int64) * BLOCK_SIZE + end % BLOCK_SIZE
        tl.store(ends_ptr + draft * num_rows + row, end, mask=draft <= K)
        tl.store(end_places_ptr + draft * num_rows + row, tl.where(fed, end_place, 0), mask=draft < K)
        tl.store(last_ptr + row, row * W + known - 1 - start)
        tl.store(first_ptr + row, tl.load(valid_from_ptr + slot))
        tl.store(written_ptr + slot, known)


@triton.jit  # type: ignore[untyped-decorator]
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
        _copy(queries_ptr + at * queries_stride, out_queries_ptr + row * QUERIES, True, QUERIES, BLOCK)
    else:
        _copy(x_ptr + at * x_stride, out_x_ptr + row * HIDDEN, True, HIDDEN, BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _store_kernel(
    slots_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    num_emitted_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    fused_ptr: tl.tensor,
    ring_ptr: tl.tensor,
    by_block_ptr: tl.tensor,
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
    position = tl.maximum(known - tl.load(num_emitted_ptr + row).to(tl.int64) + column, 0)
    source = fused_ptr + (row * WIDTH + column) * HIDDEN
    _copy(source, ring_ptr + (slot * RING + position % RING) * HIDDEN, True, HIDDEN, BLOCK)
    before = tl.maximum(position - 1, 0) // BLOCK_SIZE
    full = (position % BLOCK_SIZE == 0) & (position > 0) & (column <= tl.load(limits_ptr + row)) & (before < num_blocks)
    owner = tl.load(tables_ptr + slot * tables_stride + before, mask=full, other=0).to(tl.int64)
    _copy(source, by_block_ptr + owner * HIDDEN, full, HIDDEN, BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _embed_norm_kernel(
    ids_ptr: tl.tensor,
    table_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    x_ptr: tl.tensor,
    x_norm_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if half == 0:
        token = tl.load(ids_ptr + row).to(tl.int64)
        x = tl.load(table_ptr + token * WIDTH + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + row * x_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(x_norm_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps) * weight
    out = out_ptr + (2 * row + half) * WIDTH + offsets
    tl.store(out, normed.to(out_ptr.dtype.element_ty), mask=inside)


class KernelOps:
    """Implements Eagle3Ops.

    `first` is not looked at: paged attention has no lower bound, so after a pause a row also sees what its blocks hold
    from earlier owners. Drafts may be worse for it, output is not.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], tuple[Splits, Workspace | None]] = {}

    def window(self, ring: FeatureRing, step: DeviceStep, k: int) -> Window:
        """See FeatureRing.window. `step.limits` and `step.slots` are contiguous int64, block tables int32."""
        num_rows, width, hidden = step.num_rows, ring.width, ring.ring.shape[2]

        def ids(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device=step.slots.device)

        count = num_rows * width
        found = Window(
            token_ids=ids(count),
            positions=ids(count),
            places=ids(count),
            features=ring.ring.new_empty(count, hidden),
            last=ids(num_rows),
            ends=ids(k + 1, num_rows),
            end_places=ids(k, num_rows),
            first=ids(num_rows),
        )
        _window_kernel[(num_rows, width)](
            step.slots, step.limits, step.state.num_tokens, step.state.history, step.block_tables,
            ring.known_from, ring.valid_from, ring.written, ring.ring,
            found.token_ids, found.positions, found.places, found.features, found.last, found.ends, found.end_places,
            found.first, num_rows, step.state.history.stride(0), step.block_tables.stride(0),
            step.block_tables.shape[1], W=width, K=k, BLOCK_K=next_power_of_2(k + 1), **_sizes(ring),
        )  # fmt: skip
        return found

    def store(self, ring: FeatureRing, step: DeviceStep, num_emitted: Tensor, fused: Tensor) -> None:
        """See FeatureRing.store."""
        num_rows, width = fused.shape[:2]
        _store_kernel[(num_rows, width)](
            step.slots, step.limits, step.state.num_tokens, num_emitted, step.block_tables,
            fused, ring.ring, ring.by_block, step.block_tables.stride(0), step.block_tables.shape[1],
            WIDTH=width, **_sizes(ring),
        )  # fmt: skip

    def embed_norm(self, ids: Tensor, table: Tensor, norm: Tensor, x: Tensor, x_norm: Tensor, eps: float) -> Tensor:
        """See Eagle3Ops."""
        num_tokens, width = x.shape
        out = x.new_empty(num_tokens, 2 * width)
        block = next_power_of_2(width)
        _embed_norm_kernel[(num_tokens, 2)](
            ids, table, norm, x, x_norm, out, x.stride(0), eps,
            WIDTH=width, BLOCK=block, num_warps=min(max(block // 256, 1), 8), **pdl_options(x.device),
        )  # fmt: skip
        return out

    def select(self, queries: Tensor, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """See Eagle3Ops. One launch, and `at` is read by nothing but a kernel."""
        (_, heads, dim), width = queries.shape, x.shape[1]
        found = queries.new_empty(at.shape[0], heads, dim), x.new_empty(at.shape[0], width)
        block = min(next_power_of_2(max(heads * dim, width)), _COPY_BLOCK)
        _select_kernel[(at.shape[0], 2)](
            at, queries, x, *found, queries.stride(0), x.stride(0),
            QUERIES=heads * dim, HIDDEN=width, BLOCK=block, **pdl_options(x.device),
        )  # fmt: skip
        return found

    def add_rms_norm_(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Eagle3Ops."""
        return add_rms_norm_(x, delta, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See Eagle3Ops."""
        return silu_mul(gate_up)

    def rope_write(
        self, qkv: Tensor, pool: Tensor, positions: Tensor, places: Tensor, rotations: Tensor, heads: int
    ) -> None:
        """See Eagle3Ops."""
        rope_write(qkv, pool, positions, places, rotations, heads, pool.shape[1] // 2, pool.shape[2])

    def attention(self, q: Tensor, pool: Tensor, rows: PagedRows, first: Tensor) -> Tensor:
        """See Eagle3Ops, and the class for `first`."""
        splits, workspace = self._plan(q, pool, rows)
        return decode_attention(
            q, pool, rows, scale=q.shape[2] ** -0.5, splits=splits, workspace=workspace, pdl=supports_pdl(q.device)
        )

    def _plan(self, q: Tensor, pool: Tensor, rows: PagedRows) -> tuple[Splits, Workspace | None]:
        """RuntimeError: first asked for while a graph is captured, which would own the workspace."""
        num_rows, heads, dim = q.shape
        key = (num_rows, heads, pool.shape[1], dim, rows.max_context)
        found = self._plans.get(key)
        if found is None:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("run a chain before capturing one: a workspace cannot be made inside a graph")
            kv_heads = pool.shape[1] // 2
            tile = decode_tile(1, heads // kv_heads, dim, q.dtype, pool.dtype, False)
            splits = plan_splits(
                num_rows, 1, heads, kv_heads, rows.max_context, num_sms(q.device), block_n=tile.block_n
            )
            workspace = None
            if splits.partials > 1:
                needed = partials_needed(num_rows, 1, heads, kv_heads, splits, tile.block_m)
                workspace = Workspace.allocate(q.device, needed, dim, num_rows * heads)
            found = self._plans[key] = (splits, workspace)
        return found


def _sizes(ring: FeatureRing) -> dict[str, Any]:
    hidden = ring.ring.shape[2]
    return {
        "RING": ring.size,
        "BLOCK_SIZE": ring.block_size,
        "HIDDEN": hidden,
        "BLOCK": min(next_power_of_2(hidden), _COPY_BLOCK),
        **pdl_options(ring.ring.device),
    }
