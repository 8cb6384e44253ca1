"""Layers in the layouts of other projects, each value placed by hand as their documents say.

Written apart from `server.quant.foreign`: nothing of it is used here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class Stored:
    """Implements RawTensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def has(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def on_meta(self) -> Stored:
        return Stored({name: tensor.to("meta") for name, tensor in self.tensors.items()})


def words(rows: np.ndarray, bits: int, order: list[int] | None = None) -> Tensor:
    """Unsigned integers [R, C] as int32 [R, C · bits / 32]: column `order[i]` of a word's in its i-th place."""
    count = 32 // bits
    order = order or list(range(count))
    packed = np.zeros((rows.shape[0], rows.shape[1] // count), dtype=np.uint64)
    for word in range(packed.shape[1]):
        for place in range(count):
            packed[:, word] |= rows[:, word * count + order[place]].astype(np.uint64) << np.uint64(place * bits)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def random_grouped(
    rows: int, columns: int, group: int, bits: int, seed: int = 0, centre: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(q [O, K] unsigned, zeros [O, G] from 1 on, scales [O, G] float16, w [O, K] float64)."""
    generator = np.random.default_rng(seed)
    groups = columns // group
    q = generator.integers(0, 1 << bits, (rows, columns))
    zeros = np.full((rows, groups), 1 << (bits - 1))
    if not centre:
        zeros = generator.integers(1, (1 << bits) - 1, (rows, groups))
    scales = generator.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)
    index = np.arange(columns) // group
    weight = scales[:, index].astype(np.float64) * (q - zeros[:, index])
    return q, zeros, scales, weight


def awq_layer(name: str, q: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, Tensor]:
    return {
        f"{name}.qweight": words(q.T, 4, AWQ_ORDER),
        f"{name}.qzeros": words(zeros.T, 4, AWQ_ORDER),
        f"{name}.scales": torch.from_numpy(scales.T.copy()),
    }


def gptq_layer(
    name: str, q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, offset: int = 1
) -> dict[str, Tensor]:
    columns, groups = q.shape[1], zeros.shape[1]
    return {
        f"{name}.qweight": words(q, bits).T.contiguous(),
        f"{name}.qzeros": words(zeros.T - offset, bits),
        f"{name}.scales": torch.from_numpy(scales.T.copy()),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }
