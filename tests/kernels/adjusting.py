"""Random steps whose rows have penalties, biases and withheld ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.core import SamplingParams
from server.kernels.penalties import adjust_by_slot, make_counts
from server.sampling.process import process
from server.sampling.state import SamplingState
from server.spec.types import Drafts, Layout, SlotState
from tests.kernels.conftest import ON_GPU

NUM_ROWS = 33 if ON_GPU else 7
LENGTH = 3000 if ON_GPU else 90
NUM_BIASES, NUM_ENDS = (300, 272) if ON_GPU else (5, 3)
PLAIN = SamplingParams(temperature=0.0)
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(slots=True)
class Case:
    """R rows of W positions on S slots, the last one nobody's; every tensor on the device under test."""

    logits: Tensor
    drafts: Tensor
    slots: Tensor
    state: SlotState
    sampling: SamplingState
    counts: Tensor

    @property
    def arguments(self) -> Arguments:
        floats, ints, bias_ids, bias_values, end_ids = self.sampling.tables()
        state = self.state
        return (
            self.logits, self.drafts, self.slots, floats, ints, bias_ids, bias_values, end_ids, state.history,
            state.num_tokens, state.prompt_len,
        )  # fmt: skip

    def run(self) -> Tensor:
        return adjust_by_slot(*self.arguments, self.counts)

    def expected(self) -> Tensor:
        """By `process`: with every row greedy it ends before the temperature."""
        num_rows, width = self.drafts.shape[0], self.drafts.shape[1] + 1
        at = torch.arange(num_rows * width, device=self.logits.device)
        layout = Layout(at // width, at % width, num_rows, width)
        drafts = Drafts(self.drafts, torch.full_like(self.slots, width - 1))
        batch = self.sampling.on_device(self.slots, sampled=False, filtered=False, full=True)
        length = self.state.history.shape[1]
        return process(self.logits.float(), layout, drafts, batch, self.state, self.slots, length).logits


def kinds(vocab_size: int) -> list[tuple[SamplingParams, int]]:
    """Ways to adjust and numbers of tokens that must come first."""
    bias = {token: (-1.5) ** token for token in range(min(vocab_size, NUM_BIASES))}
    last = {vocab_size - 1: 100.0, 0: -3.25}
    return [
        (SamplingParams(repetition_penalty=1.3), 0),
        (PLAIN, 0),
        (SamplingParams(presence_penalty=0.7), 10**9),
        (SamplingParams(frequency_penalty=-0.3), 0),
        (SamplingParams(repetition_penalty=0.7, presence_penalty=-1.1, frequency_penalty=0.37, logit_bias=last), 12),
        (SamplingParams(logit_bias=bias), 0),
        (SamplingParams(temperature=0.0, frequency_penalty=1.9, logit_bias=bias), 10),
    ]


def make(
    rows: list[tuple[SamplingParams, int]],
    width: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    padding: int = 1,
    length: int = LENGTH,
) -> Case:
    """Random histories, with tokens that repeat, that are in the prompt only and in the output only."""
    num_rows = len(rows)
    num_slots = num_rows + 3
    sampling = SamplingState(num_slots, vocab_size, device)
    sampling.reserve(NUM_BIASES, NUM_ENDS)
    slots = num_slots - 2 - torch.randperm(num_rows)
    for slot, (params, min_tokens) in zip(slots.tolist(), rows, strict=True):
        ends = torch.randint(vocab_size, (NUM_ENDS - 1,)).tolist()
        sampling.set(slot, SamplingParams(logit_bias={0: 5.0}), 0, 3, [0])  # its predecessor's
        sampling.set(slot, params, 0, min_tokens, sorted(set(ends)))
    often = torch.randint(vocab_size, (8,))
    history = torch.randint(vocab_size, (num_slots, length))
    history = torch.where(torch.rand(history.shape) < 0.6, often[torch.randint(8, history.shape)], history)
    num_tokens = torch.randint(2, length - width, (num_slots,))
    prompt_len = (torch.rand(num_slots) * num_tokens).long().clamp(1)
    num_tokens[-1], prompt_len[-1] = 1, 1
    known = torch.arange(length) < num_tokens[:, None]
    history = torch.where(known, history, 2**62)  # nobody may look there
    drafts = often[torch.randint(4, (num_rows, width - 1))]
    fresh = torch.randint(vocab_size, drafts.shape)
    drafts = torch.where(torch.rand(drafts.shape) < 0.7, drafts, fresh)
    slots = torch.cat([slots, torch.full((padding,), num_slots - 1)])
    drafts = torch.cat([drafts, torch.zeros(padding, width - 1, dtype=torch.int64)])
    logits = (torch.randn(slots.shape[0] * width, vocab_size) * 4).to(dtype)
    state = SlotState(history.to(device), num_tokens.to(device), prompt_len.to(device))
    counts = make_counts(num_slots, vocab_size, device)
    return Case(logits.to(device), drafts.to(device), slots.to(device), state, sampling, counts)


def many(vocab_size: int) -> list[tuple[SamplingParams, int]]:
    every = kinds(vocab_size)
    return [every[i % len(every)] for i in range(NUM_ROWS)]
