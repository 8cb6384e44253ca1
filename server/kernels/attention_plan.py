"""How paged attention is cut up: tile shapes, splits of the context, and the memory that partial results live in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.runtime import ceil_div, next_power_of_2

DETERMINISTIC_TOKENS = 512
"""Length of a run of tokens in deterministic mode, from position 0 on: part of what defines the bits."""

_FLOAT8 = (torch.float8_e4m3fn,)
_MAX_SPLITS = 64
_FEW_PROGRAMS = 16
_MANY_PROGRAMS = 32
_LONG_TOKENS = 2048
_WHOLE_TOKENS = 256
_FEWEST_TOKENS = 128
_FUSED_ROWS = 32
_CROWDED = 2
_CROWDED_TOKENS = 2048
_TWO_RESIDENT = 128
"""Registers a thread that let two programs of eight warps share a multiprocessor."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape of a program: BLOCK_M packed query rows, BLOCK_N tokens a tile, and Triton's two knobs.

    `max_registers` a thread, so that more programs share a multiprocessor; 0: as many as it wants. `early`: a decode
    row's last tokens are a tile of their own that is read before the queries are there, where that is allowed. It
    hides latency where few programs run, and takes registers that many would rather have.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int = 0
    early: bool = True


@dataclass(frozen=True, slots=True)
class Splits:
    """How a row's tokens are divided among programs.

    `num_splits` programs a (row, key head, query tile). `split_tokens` None: a row's tiles are divided evenly among
    them, at least `min_tiles` each, and programs left without any leave at once; a row of up to `whole_tiles` has one.
    `split_tokens` n: the row is cut at every multiple of n, and only whole cuts are divided. `partials`: the most
    partial results a (row, key head, query tile) can have. `fused`: the last program to arrive adds them up; else a
    second kernel does.
    """

    num_splits: int
    split_tokens: int | None = None
    partials: int = 1
    min_tiles: int = 2
    fused: bool = True
    whole_tiles: int = 1

    @property
    def deterministic(self) -> bool:
        return self.split_tokens is not None


@dataclass(frozen=True, slots=True)
class Workspace:
    """Partial results of all programs of one launch, float32, and a counter a (row, key head, query tile), int32, which
    every launch leaves at zero. One serves every layer and shape of a stream; two streams need two.

    `weighted` [n * head_dim], `maxima` [n], `sums` [n], `counters` [c].
    """

    weighted: Tensor
    maxima: Tensor
    sums: Tensor
    counters: Tensor

    @classmethod
    def allocate(cls, device: torch.device, num_partials: int, head_dim: int, num_counters: int) -> Workspace:
        """`num_partials`: the most `partials_needed` of any launch; `num_counters`: the most rows times heads."""

        def floats(n: int) -> Tensor:
            return torch.empty(n, dtype=torch.float32, device=device)

        counters = torch.zeros(num_counters, dtype=torch.int32, device=device)
        return cls(floats(num_partials * head_dim), floats(num_partials), floats(num_partials), counters)

    def check(self, num_partials: int, head_dim: int, num_counters: int) -> None:
        """Raises ValueError where a launch needs more than there is."""
        have = (self.weighted.numel() // head_dim, self.maxima.numel(), self.counters.numel())
        if have[0] < num_partials or have[1] < num_partials or have[2] < num_counters:
            raise ValueError(
                f"workspace: {num_partials} partial results of {head_dim} and {num_counters} counters are needed, "
                f"{min(have[:2])} and {have[2]} are there"
            )


def partials_needed(num_rows: int, width: int, heads: int, kv_heads: int, splits: Splits, block_m: int) -> int:
    """Partial results (of head_dim values each) that one launch may write."""
    group = heads // kv_heads
    tile = queries_a_tile(width, group, block_m)
    return num_rows * kv_heads * ceil_div(width, tile) * splits.partials * tile * group


def queries_a_tile(width: int, group: int, block_m: int) -> int:
    """Queries whose packed heads fill a tile; `width` 0: rows of any length."""
    return min(width, block_m // group) if width else block_m // group


def is_crowded(num_rows: int, kv_heads: int, num_sms: int) -> bool:
    """Whether unsplit rows alone give every multiprocessor several programs."""
    return num_rows * kv_heads >= _CROWDED * num_sms


def decode_tile(
    width: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    pool: torch.dtype,
    exact: bool,
    programs: int = 0,
) -> Tile:
    """The tile of `width` queries a row. `exact` (deterministic): one shape whatever the width and the phase.

    `programs`: rows times key heads. More than a few hide each other's latency, and keep more bytes in flight if small
    ones share a multiprocessor, than large ones that read ahead.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles, or registers spill
        return Tile(16, 16, 4, 2)
    wide = head_dim > 128
    if exact:
        return Tile(16, 32, 4, 3) if wide else Tile(64, 64, 4, 3)
    block_m = min(64, max(16, next_power_of_2(width * group)))
    if wide:
        return Tile(min(block_m, 32), 32, 4, 3)
    if programs > _FEW_PROGRAMS and block_m <= 32 and pool not in _FLOAT8:
        return Tile(block_m, 64, 4, 3, early=False)
    if head_dim <= 64:
        return Tile(block_m, 128, 8, 3, _TWO_RESIDENT if block_m <= 32 else 0)
    return Tile(block_m, 64, 8 if block_m > 32 else 4, 4 if pool in _FLOAT8 else 3)


def plan_splits(
    num_rows: int,
    width: int,
    heads: int,
    kv_heads: int,
    max_context: int,
    num_sms: int,
    deterministic: bool = False,
    block_n: int = 64,
) -> Splits:
    """Splits for up to `num_rows` rows of `width` queries that see at most `max_context` tokens, in tiles of `block_n`.

    A few rows: one program a multiprocessor, of which each row gets its share; more rows: two, and where contexts are
    long four, so that rows of different lengths balance. How many of them a row uses follows from its true length, on
    the device: putting partial results together costs as much as a few hundred more tokens, and where unsplit rows fill
    the chip several times over (`is_crowded`) only rows past 2048 tokens are split at all.
    """
    group = heads // kv_heads
    block_m = min(64, max(16, next_power_of_2(width * group)))
    packed = queries_a_tile(width, group, block_m) * group
    programs = num_rows * kv_heads * ceil_div(width, packed // group)
    fill = max(1, (1 if programs <= _FEW_PROGRAMS and not deterministic else 2) * num_sms // programs)
    wanted = min(_MAX_SPLITS, fill if num_rows == 1 else max(fill, min(2 * fill, ceil_div(max_context, _LONG_TOKENS))))
    if deterministic:
        partials = ceil_div(max_context, DETERMINISTIC_TOKENS)
        return Splits(min(wanted, partials), DETERMINISTIC_TOKENS, partials)
    tiles, whole = ceil_div(max_context, block_n), ceil_div(_WHOLE_TOKENS, block_n)
    if is_crowded(num_rows, kv_heads, num_sms):
        whole, wanted = ceil_div(_CROWDED_TOKENS, block_n), min(wanted, ceil_div(max_context, _CROWDED_TOKENS))
    fewest = ceil_div(_FEWEST_TOKENS if programs <= _MANY_PROGRAMS else 4 * _FEWEST_TOKENS, block_n)
    num_splits = 1 if tiles <= whole else max(1, min(wanted, ceil_div(tiles, fewest)))
    return Splits(num_splits, None, num_splits, fewest, packed <= _FUSED_ROWS or num_splits <= 4, whole)


def bytes_moved(
    num_rows: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    dtype: torch.dtype,
    pool: torch.dtype | None = None,
    window: int | None = None,
) -> int:
    """Bytes that one call must move at least: each row's keys and values once, queries in, output out.

    `context`: tokens that a row's last query sees.
    """
    seen = context if window is None else min(context, window + width - 1)
    keys_and_values = num_rows * seen * 2 * kv_heads * head_dim * (pool or dtype).itemsize
    return keys_and_values + 2 * num_rows * width * heads * head_dim * dtype.itemsize
