"""Tiles of the skinny kernels of low-precision weights: what can be chosen, and candidates to be measured at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.kernels.int4_product import WORD
from server.kernels.runtime import INTERPRETED, ceil_div, dot_precision, next_power_of_2
from server.kernels.skinny_tiles import MAX_TOKENS, SHARED_LIMIT, Kind, block_m

MAX_WHOLE_K = 2048
MAX_WHOLE_ELEMENTS = 8 << 20
_ALL_SHARED = 227 << 10
"""Of a Hopper program; tiles of words need nothing beside their stages."""
BYTE = 2
"""Groups that share a byte of eightbit_product.pack_groups."""
_LEAST_K = 32
"""The least K that 8-bit tensor cores take at once."""


@dataclass(frozen=True, slots=True)
class Weight:
    """W [N, K] as kernels read it.

    8 bits: `values` [N, K] of int8 or float8_e4m3fn, `scales` [N] float32, `group` 0. 4 bits: what
    eightbit_product.pack_groups returned for groups of `group` columns, or int4_product.pack_quads, which knows groups
    with a `minimum` too.
    """

    values: Tensor
    scales: Tensor
    columns: int
    group: int = 0
    minimum: bool = False

    @property
    def per(self) -> int:
        """Groups whose columns share an element of `values`."""
        return WORD if self.values.dtype == torch.int16 else BYTE

    @property
    def rows(self) -> int:
        """N."""
        return len(self.values)


@dataclass(frozen=True, slots=True)
class EightTile:
    """One way to cut a product into programs: as skinny_tiles.TileConfig, and

    `parts` programs share K; `swap`: transposed (eightbit_product.py says why), then `split` is 1. With 4-bit weights
    `block_k` is all groups of an element whatever it says. `rows` is the least height of the tile of x.
    """

    block_n: int
    block_k: int
    parts: int = 1
    split: int = 1
    swap: bool = False
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 2048
    rows: int = 0

    @property
    def name(self) -> str:
        """Says all of it, for a table or a cache of measurements."""
        way = "swap" if self.swap else f"split{self.split}"
        shape = f"n{self.block_n} k{self.block_k} parts{self.parts} {way}" + (f" rows{self.rows}" if self.rows else "")
        return f"{shape} warps{self.num_warps} stages{self.num_stages} prefetch{self.prefetch}"


def _shared_bytes(tile: EightTile, kind: Kind, num_tokens: int, k: int, x_size: int) -> int:
    rows = tile.block_n * (2 if kind is Kind.GATE_UP else 1)
    stages = 1 if tile.block_k >= k else tile.num_stages
    return (rows + block_m(num_tokens) * x_size) * min(tile.block_k, next_power_of_2(k)) * stages


def candidates(
    kind: Kind, num_tokens: int, n: int, k: int, x_size: int = 1, group: int = 0, per: int = BYTE
) -> list[EightTile]:
    """Candidates for x [num_tokens, k] of `x_size` bytes each and a result of `n` columns, the likeliest first.

    `group` and `per` as in Weight.

    RESIDUAL's may have parts; the others' results need whole sums.
    """
    if group and per == WORD:
        return _quads(kind, num_tokens, k, x_size, group)
    if group:
        found = _grouped(kind)
    elif n * k <= MAX_WHOLE_ELEMENTS and k <= MAX_WHOLE_K and num_tokens <= 32 and kind is not Kind.HEAD:
        found = _small(kind, k)
    else:
        found = _large(kind, num_tokens, k)
    fitting = [t for t in found if _shared_bytes(t, kind, num_tokens, k, x_size) <= SHARED_LIMIT]
    possible = [t for t in fitting if group or t.block_k < k or not (t.swap or t.parts > 1)]
    return possible or [EightTile(16, 64, num_stages=2)]


def _small(kind: Kind, k: int) -> list[EightTile]:
    """All latency: weights held whole, loaded while the kernel before still runs."""
    whole = next_power_of_2(max(k, 128))
    if kind is Kind.GATE_UP:
        return [EightTile(8, whole, split=4, num_stages=1), EightTile(16, whole, split=4, num_stages=1)]
    return [EightTile(16, whole, split=4, num_stages=1), EightTile(8, whole, split=4, num_stages=1)]


def _large(kind: Kind, num_tokens: int, k: int) -> list[EightTile]:
    """All bandwidth: transposed on wgmma, or narrow tiles of mma.sync, with enough bytes in flight.

    With 64 rows x is what wgmma takes 64 of, and narrow tiles use it as well.
    """
    tall = num_tokens > 32
    if kind is Kind.GATE_UP:
        narrow = [EightTile(16, 128, num_stages=8)] if tall else [EightTile(8, 1024, split=4)]
        return [
            EightTile(32, 128, swap=True, num_stages=8),
            EightTile(32, 256, swap=True, num_stages=5),
            EightTile(64, 128, swap=True, num_stages=6),
            *narrow,
        ]
    narrow = [EightTile(32, 128, num_stages=8)] if tall else [EightTile(16, 1024, split=4)]
    if kind is Kind.HEAD:
        return [
            EightTile(64, 256, swap=True, num_stages=5),
            EightTile(128, 128, swap=True, num_stages=6),
            EightTile(128, 128, swap=True, num_warps=8, num_stages=6),
            *narrow,
        ]
    if kind is Kind.QKV:
        wide = [] if tall else [EightTile(32, 512, split=4)]
        return [
            EightTile(64, 256, swap=True, num_stages=8),
            EightTile(64, 128, swap=True, num_stages=10),
            EightTile(64, 128, swap=True, num_stages=6),
            *narrow,
            *wide,
        ]
    parts = 4 if k >= 8192 else 2
    return [
        EightTile(64, 256, parts=parts, swap=True, num_stages=6),
        EightTile(64, 256, parts=2 * parts, swap=True, num_stages=4),
        EightTile(64, 128, parts=parts, swap=True, num_stages=10),
        EightTile(64, 128, parts=2 * parts, swap=True, num_stages=6),
        *narrow,
    ]


def _grouped(kind: Kind) -> list[EightTile]:
    if kind is Kind.GATE_UP:
        return [
            EightTile(32, 256, swap=True, num_stages=6),
            EightTile(64, 256, swap=True, num_stages=4),
            EightTile(16, 256, num_stages=6),
        ]
    parts = (2, 4) if kind is Kind.RESIDUAL else (1, 1)
    return [
        EightTile(64, 256, parts=parts[0], swap=True, num_stages=6),
        EightTile(64, 256, parts=parts[1], swap=True, num_stages=4),
        EightTile(32, 256, parts=parts[0], num_stages=6),
    ][:: 1 if kind is Kind.RESIDUAL else 2]


def _quads(kind: Kind, num_tokens: int, k: int, x_size: int, group: int) -> list[EightTile]:
    """Rows of W, warps, stages and parts, as they were fastest on an H100 (benchmarks/kernels_int4_tiles.py).

    Up to eight tokens, or with two warps, mma.sync takes rows of W sixteen at a time; else wgmma does, 64 at a time.
    """
    if num_tokens <= 8:
        shapes = [(32, 2, 4, 4), (64, 4, 3, 4), (128, 4, 4, 4), (64, 4, 2, 7)]
        if kind is Kind.GATE_UP:
            shapes = [(64, 4, 3, 1), (32, 2, 2, 1), (64, 2, 3, 1), (128, 4, 3, 1)]
    elif num_tokens <= 32:
        shapes = [(64, 4, 3, 4), (32, 2, 3, 4), (128, 4, 3, 4), (64, 4, 2, 4)]
    else:
        shapes = [(128, 8, 2, 4), (64, 4, 3, 4), (64, 4, 2, 4), (64, 4, 3, 2)]
    height = 8 if num_tokens <= 8 else block_m(num_tokens)
    found = []
    for rows, warps, stages, parts in shapes:
        shared = (2 * rows * (stages - 1) + WORD * x_size * height * stages) * group
        steps = ceil_div(k, WORD * group)
        share = ceil_div(steps, min(parts, steps) if kind is Kind.RESIDUAL else 1)
        split = ceil_div(steps, share)  # no part without a step
        block = rows // 2 if kind is Kind.GATE_UP else rows
        tile = EightTile(block, WORD * group, parts=split, swap=True, num_warps=warps, num_stages=stages)
        if shared <= _ALL_SHARED and tile not in found:
            found.append(tile)
    return found or [EightTile(16, WORD * group, num_stages=1)]


def _pieces(tile: EightTile, k: int) -> tuple[int, int]:
    """(block, tail) of weights that are held whole (skinny_tiles.py), else (block_k, 0)."""
    least = _LEAST_K * tile.split
    block = next_power_of_2(k + 1) // 2
    if tile.block_k < k or block < least:
        return tile.block_k, 0
    rest = max(least, next_power_of_2(k - block)) if k > block else 0
    return (block, rest) if rest < block else (tile.block_k, 0)


def _height(tile: EightTile, weight: Weight, num_tokens: int) -> int:
    """Rows of the tile of x. Of transposed words eight are enough: mma.sync takes W as its rows and x as columns."""
    few = tile.swap and weight.per == WORD and num_tokens <= 8
    return 8 if few else block_m(num_tokens)


def constants(tile: EightTile, x: Tensor, weight: Weight, num_tokens: int, pdl: bool) -> dict[str, Any]:
    """Compile-time arguments that every kernel takes for x [M, K], and the launch's options.

    Raises ValueError if M is too large, or the tile cannot be.
    """
    k = weight.columns
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"a skinny kernel takes 1 to {MAX_TOKENS} tokens, not {num_tokens}")
    whole = tile.block_k >= k and not weight.group
    if ((tile.swap or tile.parts > 1) and whole) or (tile.swap and tile.split > 1):
        raise ValueError(f"tile {tile.name}: with {k} columns, what is transposed or in parts is streamed")
    per = weight.per
    block, tail = (per * weight.group, 0) if weight.group else _pieces(tile, k)
    share = ceil_div(ceil_div(k, tile.parts), block) * block
    ahead = min(tile.prefetch, share, k - share * (tile.parts - 1)) // (per if weight.group else 1)
    stride = weight.values.shape[1]
    size = weight.values.element_size()
    aligned = ahead > 0 and stride * size % 16 == 0 and ahead * size % 16 == 0 and tile.block_k % 16 == 0
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    return {
        "K": k,
        "STRIDE": stride,
        "GROUP": weight.group,
        "MINIMUM": weight.minimum,
        "BLOCK_M": max(tile.rows, _height(tile, weight, num_tokens)),
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block,
        "TAIL": tail,
        "SHARE": share if tile.parts > 1 else max(share, block + tail),
        "SPLIT": tile.split,
        "SWAP": tile.swap,
        "ROW_SCALES": x.element_size() == 1,
        "PRECISION": dot_precision(x.dtype),
        "PACKED": not INTERPRETED,
        "PREFETCH": ahead if aligned else 0,
        "THREADS": 32 * tile.num_warps,
        "PDL": pdl,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **options,
    }


def weight8(values: Tensor, scales: Tensor) -> Weight:
    """Of int8 or float8_e4m3fn values [N, K] and scales [N]."""
    return Weight(values.contiguous(), scales.to(torch.float32).contiguous(), values.shape[1])
