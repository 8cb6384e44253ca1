"""Thresholds found by searching are those found by sorting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.kernels.threshold import filter_threshold_by_slot, filter_threshold_reference
from server.sampling.process import process
from server.spec.types import SlotState
from tests.kernels.conftest import ON_GPU
from tests.kernels.sampling import random_step

FILTERS = [
    SamplingParams(top_k=1), SamplingParams(top_k=3), SamplingParams(top_k=70), SamplingParams(top_p=0.9),
    SamplingParams(top_p=1e-6), SamplingParams(top_p=0.5, top_k=5), SamplingParams(top_p=0.99, top_k=60),
    SamplingParams(min_p=0.05), SamplingParams(min_p=1.0), SamplingParams(min_p=0.2, top_p=0.95, top_k=20),
    SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=1e-5, top_p=0.7),
    SamplingParams(temperature=3.0, top_p=0.8), SamplingParams(temperature=0.3, top_p=0.999999),
]  # fmt: skip
WIDTH = 3 if ON_GPU else 1
VOCABS = [1000, 49_152, 128_256] if ON_GPU else [150]


def kept(logits: Tensor, temperature: Tensor, threshold: Tensor) -> Tensor:
    return logits.float() / temperature[:, None] >= threshold[:, None]


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("peak", [0.05, 1.0, 6.0] if ON_GPU else [0.05, 6.0])
def test_equals_sorting(device: torch.device, dtype: torch.dtype, vocab_size: int, peak: float) -> None:
    step = random_step(FILTERS, WIDTH, vocab_size, dtype, device, peak)
    step.logits[::3, 1 : vocab_size // 2 : 2] = step.logits[::3, :1]  # many ties
    step.logits[1::4, vocab_size // 3 :] = -torch.inf
    got = filter_threshold_by_slot(step.logits, WIDTH, *step.by_slot[:3])
    wanted = filter_threshold_reference(step.logits, WIDTH, *step.filters)
    heat = step.batch.temperature.repeat_interleave(WIDTH)
    same = (kept(step.logits, heat, got) == kept(step.logits, heat, wanted)).all(1)
    # exp of the interpreter and of torch's CPU code differ in the last place: a mass may end one token later.
    assert same.float().mean() >= (1.0 if ON_GPU else 0.9), torch.stack([got, wanted], 1)[~same]
    assert same[: 3 * WIDTH].all()  # top_k is exact everywhere


def test_equal_logits_are_all_kept(device: torch.device, dtype: torch.dtype) -> None:
    step = random_step(FILTERS, 1, VOCABS[0], dtype, device)
    step.logits.fill_(2.5)
    got = filter_threshold_by_slot(step.logits, 1, *step.by_slot[:3])
    assert kept(step.logits, step.batch.temperature, got).all()


def test_keeps_what_the_sampler_keeps(device: torch.device) -> None:
    step = random_step(FILTERS, WIDTH, VOCABS[-1], torch.float32, device)
    processed = process(
        step.logits, step.layout, step.as_drafts(), step.batch, _no_state(len(FILTERS), device),
        torch.arange(len(FILTERS), device=device), 1,
    )  # fmt: skip
    got = filter_threshold_by_slot(step.logits, WIDTH, *step.by_slot[:3])
    survive = kept(step.logits, step.batch.temperature.repeat_interleave(WIDTH), got)
    sampled = ~step.batch.greedy.repeat_interleave(WIDTH)
    differing = (processed.to_dense().isfinite() != survive).sum(1)[sampled]
    # On the CPU the sampler estimates the total mass where a sort would sum it: a nucleus of 0.999999 may end later.
    assert differing.max() <= 1 and (differing > 0).float().mean() <= 0.1


def _no_state(num_rows: int, device: torch.device) -> SlotState:
    one = torch.ones(num_rows, dtype=torch.int64, device=device)
    return SlotState(torch.zeros(num_rows, 1, dtype=torch.int64, device=device), one, one)


def test_broken_rows_end(device: torch.device, dtype: torch.dtype) -> None:
    step = random_step([SamplingParams(top_p=0.9, top_k=20, min_p=0.1)] * 4, 1, VOCABS[0], dtype, device)
    step.logits[0, 5] = torch.nan
    step.logits[1, 6] = torch.inf
    step.logits[2] = -torch.inf
    step.logits[3] = torch.nan
    filter_threshold_by_slot(step.logits, 1, *step.by_slot[:3])
