"""The parity cases that every network must pass, whoever defined it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from server.models.base import TargetModel
from tests.models.paging import Chunk, contiguous_blocks, in_chunks, make_pools, scattered_blocks, step

LENGTHS = (23, 9, 14)
BLOCKS_EACH = 8
TOLERANCE = 1e-4
"""Absolute, relative to the largest logit: float32 sums in another order."""


def spelled_for_installed(changes: dict[str, Any]) -> dict[str, Any]:
    """Transformers 4 knows rope parameters as `rope_theta` and `rope_scaling`."""
    if int(transformers.__version__.split(".")[0]) >= 5 or "rope_parameters" not in changes:
        return changes
    scaling = dict(changes["rope_parameters"])
    return {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}


def random_prompts(vocab_size: int, seed: int = 3) -> list[list[int]]:
    """Three prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def expected_logits(reference: Any, prompts: list[list[int]]) -> list[Tensor]:
    """What transformers computes for each prompt alone, [L, V] each."""
    with torch.inference_mode():
        return [reference(torch.tensor([p]), use_cache=False).logits[0].float() for p in prompts]


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Largest difference within `tolerance` of the largest logit."""
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-3)
    assert error < tolerance, f"{what}: off by {error:.2e} of the largest logit"


def check_parity(model: TargetModel, reference: Any) -> None:
    """Whole and chunked prefill, decode, verify, mixed ragged rows and the padded form, all against `reference`."""
    prompts = random_prompts(model.vocab_size)
    expected = expected_logits(reference, prompts)
    _check_alone(model, prompts[0], expected[0])
    _check_together(model, prompts, expected)
    _check_padded(model, prompts, expected)


def _check_alone(model: TargetModel, prompt: list[int], expected: Tensor) -> None:
    n = len(prompt)
    ways = {
        "whole prefill": [n],
        "chunked prefill": [7, 1, n - 8],
        "long chunk on a short prefix": [3, n - 3],
        "decode": [5] + [1] * (n - 5),
        "verify": [6, 4, 4, 4, n - 18],
    }
    for what, sizes in ways.items():
        for padding, layout in ((0, contiguous_blocks), (3, scattered_blocks)):
            pools = make_pools(model, BLOCKS_EACH + 1)
            actual = in_chunks(model, pools, prompt, layout(1, BLOCKS_EACH)[0], sizes, padding=padding)
            assert_close(actual, expected, f"{what}, {layout.__name__}, {padding} padding tokens")


def _check_together(model: TargetModel, prompts: list[list[int]], expected: list[Tensor]) -> None:
    for layout in (contiguous_blocks, scattered_blocks):
        blocks = layout(len(prompts), BLOCKS_EACH)
        pools = make_pools(model, len(prompts) * BLOCKS_EACH + 1)
        starts = [11, 0, 9]
        step(model, pools, [Chunk(p[:s], 0, b) for p, b, s in zip(prompts, blocks, starts, strict=True) if s])
        ends = [12, len(prompts[1]), 14]
        chunks = [Chunk(p[s:e], s, b) for p, b, s, e in zip(prompts, blocks, starts, ends, strict=True)]
        for actual, whole, s, e in zip(step(model, pools, chunks, padding=2), expected, starts, ends, strict=True):
            assert_close(actual, whole[s:e], f"mixed rows {s}:{e}, {layout.__name__}")


def _check_padded(model: TargetModel, prompts: list[list[int]], expected: list[Tensor]) -> None:
    blocks = scattered_blocks(len(prompts), BLOCKS_EACH)
    for width, padding in ((1, 0), (4, 0), (4, 3)):
        starts = [len(p) - width for p in prompts]
        pools = make_pools(model, len(prompts) * BLOCKS_EACH + 1)
        step(model, pools, [Chunk(p[:s], 0, b) for p, b, s in zip(prompts, blocks, starts, strict=True)])
        chunks = [Chunk(p[s:], s, b) for p, b, s in zip(prompts, blocks, starts, strict=True)]
        actual = step(model, pools, chunks, padding=padding, padded=True)
        for a, whole, s in zip(actual, expected, starts, strict=True):
            assert_close(a, whole[s:], f"padded width {width} from {s}, {padding} padding tokens")
