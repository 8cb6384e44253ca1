"""Tiles of the skinny linear kernels: what can be chosen, and a few candidates for a shape, to be measured at start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from server.kernels.runtime import dot_precision, next_power_of_2
from server.kernels.skinny_scaled import least_columns, prescale

MAX_TOKENS = 64
"""The most tokens a skinny kernel takes: all of them are one tile."""
MAX_WHOLE_K = 2048
"""Up to this K a program may hold its weights whole, loaded while the kernel before it still runs."""
MAX_WHOLE_ELEMENTS = 8 << 20
"""Larger weights are bound by the memory, not by latency."""
SHARED_LIMIT = 220 << 10
"""Bytes of shared memory a candidate may ask for; an H100 gives a program 227 KiB."""


class Kind(Enum):
    """Which linear layer of the decoder; tiles are chosen for each."""

    QKV = "qkv"
    RESIDUAL = "residual"
    GATE_UP = "gate_up"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One way to cut a product of x [M, K] and W [N, K] into programs.

    A program computes `block_n` columns (with GATE_UP as many of gate and of up), `block_k` of K at a time, in `split`
    parts that different warps take. `block_k` >= K: the weights are held whole and nothing is pipelined, else
    `num_stages` tiles are in flight. `prefetch`: elements of each weight row asked into L2 before the kernel before is
    over, where that is allowed.
    """

    block_n: int
    block_k: int
    split: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 1024

    @property
    def name(self) -> str:
        """Says all of it, for a table or a cache of measurements."""
        shape = f"n{self.block_n} k{self.block_k} split{self.split}"
        return f"{shape} warps{self.num_warps} stages{self.num_stages} prefetch{self.prefetch}"

    def shared_bytes(self, kind: Kind, num_tokens: int, k: int, element_size: int) -> int:
        """Upper bound of the shared memory that tiles in flight take."""
        rows = self.block_n * (2 if kind is Kind.GATE_UP else 1) + block_m(num_tokens)
        held = sum(_pieces(self, k)) if self.block_k >= k else self.block_k * self.num_stages
        return rows * held * element_size


def block_m(num_tokens: int) -> int:
    """Height of the tile of x; the tensor cores take 16 rows at least."""
    return max(16, next_power_of_2(num_tokens))


def check_tokens(num_tokens: int) -> None:
    """Raises ValueError unless the tokens fit one tile."""
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"a skinny kernel takes 1 to {MAX_TOKENS} tokens, not {num_tokens}")


def configs_for(kind: Kind, num_tokens: int, n: int, k: int, element_size: int = 2) -> list[TileConfig]:
    """At most 3 candidates for x [num_tokens, k] and a result of `n` columns, the likeliest first.

    They are those that won somewhere on an H100 (benchmarks/kernels_linear.py): each costs a second of start-up. Above
    16 tokens, where cuBLAS is hard to beat, there are 2.
    """
    small = n * k <= MAX_WHOLE_ELEMENTS and kind is not Kind.HEAD
    if num_tokens > 32:
        candidates = _tall(kind, n)
    elif small and k <= MAX_WHOLE_K and element_size == 2:  # float32: registers spill
        candidates = _whole(kind, k)
    else:
        candidates = _streamed(kind, k)
    if 16 < num_tokens <= 32:
        candidates = candidates[::2]  # the second of three is short of registers or threads there
    least = least_columns(n) if kind is Kind.RESIDUAL else 8
    fitting = [c for c in candidates if c.shared_bytes(kind, num_tokens, k, element_size) <= SHARED_LIMIT]
    return [c for c in fitting if c.block_n >= least] or [TileConfig(max(16, least), 64, num_stages=2)]


def _whole(kind: Kind, k: int) -> list[TileConfig]:
    """Weights held whole: a small layer is all latency, so K is cut among the warps and columns among many programs.

    The programs of two kernels or more fit a multiprocessor together: the next ones load while the first compute.
    """
    whole = next_power_of_2(max(k, 128))
    if kind is Kind.GATE_UP:
        return [TileConfig(8, whole, 4, 4, 1), TileConfig(16, whole, 8, 8, 1), TileConfig(16, whole, 4, 4, 1)]
    if whole <= 1024:
        return [TileConfig(16, whole, 4, 4, 1), TileConfig(16, whole, 8, 8, 1), TileConfig(8, whole, 4, 4, 1)]
    return [TileConfig(8, whole, 8, 8, 1), TileConfig(16, 512, 4, 4, 4), TileConfig(16, whole, 8, 8, 1)]


def _streamed(kind: Kind, k: int) -> list[TileConfig]:
    """Weights streamed through shared memory, enough bytes in flight on each multiprocessor to cover the latency."""
    if kind is Kind.HEAD and k <= 1024:
        return [TileConfig(64, 64, 1, 4, 6), TileConfig(64, 128, 1, 4, 5), TileConfig(128, 64, 1, 4, 5)]
    if kind is Kind.HEAD:
        return [TileConfig(64, 128, 1, 4, 5), TileConfig(16, 512, 4, 4, 4), TileConfig(128, 64, 1, 4, 5)]
    if kind is Kind.GATE_UP:
        return [TileConfig(32, 128, 1, 4, 5), TileConfig(8, 512, 4, 4, 4), TileConfig(16, 256, 4, 4, 5)]
    return [TileConfig(16, 512, 4, 4, 4), TileConfig(32, 256, 1, 4, 4), TileConfig(16, 256, 4, 4, 5)]


def _tall(kind: Kind, n: int) -> list[TileConfig]:
    """More than 32 rows of x: tiles large enough that reading x again in every program does not count."""
    if kind is Kind.GATE_UP:
        return [TileConfig(32, 64, 1, 4, 6), TileConfig(64, 64, 1, 8, 4)]
    if n > 8192:
        return [TileConfig(128, 64, 1, 8, 4), TileConfig(64, 64, 1, 4, 6)]
    return [TileConfig(32, 64, 1, 4, 6), TileConfig(32, 128, 1, 4, 5)]


def _pieces(config: TileConfig, k: int) -> tuple[int, int]:
    """(block, tail): what a program takes of K at a time, and the rest after one block where weights are held whole."""
    least = 16 * config.split
    block = next_power_of_2(k + 1) // 2  # the largest that is not beyond k
    if config.block_k < k or block < least:
        return config.block_k, 0
    tail = max(least, next_power_of_2(k - block)) if k > block else 0
    return (block, tail) if tail < block else (config.block_k, 0)


def constants(config: TileConfig, x: Tensor, k: int, pdl: bool) -> dict[str, Any]:
    """Compile-time arguments that every skinny kernel takes for x [M, K], and the launch's options."""
    ahead, (block_k, tail) = min(config.prefetch, k), _pieces(config, k)
    aligned = k * x.element_size() % 16 == 0 and ahead * x.element_size() % 16 == 0
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    return {
        "K": k,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "TAIL": tail,
        "SPLIT": config.split,
        "PRESCALE": prescale(x.dtype),
        "PRECISION": dot_precision(x.dtype),
        "PREFETCH": ahead if aligned else 0,
        "THREADS": 32 * config.num_warps,
        "PDL": pdl,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **options,
    }
