"""Pieces of an argmax: order, ties, and how a vocabulary is shared out."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from server.kernels import argmax
from server.kernels.argmax import argmax_reference, best_of, chunks, counters, token_of, unordered


@triton.jit
def _best_kernel(scores, tokens, values, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    x = tl.load(scores + row * V + columns, mask=columns < V, other=-float("inf"))
    piece = best_of(x, columns)
    tl.store(tokens + row, token_of(piece))
    tl.store(values + row, unordered((piece >> 32).to(tl.int32)))


def test_piece_holds_largest_score_and_lowest_id(device: torch.device) -> None:
    inf = float("inf")
    scores = torch.randn(9, 50, device=device)
    scores[1] = 0.0
    scores[2, ::2] = -0.0
    scores[2, 1::2] = 0.0  # equal to -0.0
    scores[3] = -inf
    scores[4] = -5.0 - torch.arange(50, device=device)
    scores[5, 33] = scores[5, 7] = inf
    scores[6] = -1e-42
    scores[7, 49] = 3e38
    tokens = torch.full((9,), -1, dtype=torch.int64, device=device)
    values = torch.full((9,), float("nan"), device=device)
    _best_kernel[(9,)](scores, tokens, values, 50, BLOCK=64)
    assert torch.equal(tokens, argmax_reference(scores))
    assert torch.equal(values, scores.amax(1))


@pytest.mark.parametrize("num_positions", [1, 2, 5, 64, 320, 4096])
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 2048, 2049, 49_152, 128_256])
def test_chunks_cover_the_vocabulary_once(device: torch.device, num_positions: int, vocab_size: int) -> None:
    num_chunks, num_blocks, bound = chunks(num_positions, vocab_size, device)
    covered = num_chunks * num_blocks * argmax.BLOCK
    assert covered >= vocab_size > (num_chunks - 1) * num_blocks * argmax.BLOCK
    assert bound >= num_chunks and bound & (bound - 1) == 0


def test_counters_are_bounded(device: torch.device) -> None:
    assert not counters(5, device).any()
    with pytest.raises(ValueError, match="counters: 100000"):
        counters(100_000, device)
