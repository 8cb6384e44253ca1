"""Sequences in the slots of a small-LM drafter, for its tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.small_lm_device import SmallLMDeviceDrafter
from server.kernels.paged import PagedRows
from server.models.paged_forward import TorchForward
from server.spec.device import DeviceStep
from server.spec.types import SlotState
from tests.draft_models.sampling_tables import sampling_tables

BLOCK_SIZE = 4
NUM_BLOCKS = 61
NUM_SLOTS = 4
PADDING = NUM_SLOTS - 1
MAX_DRAFTS = 5


class World:
    """Sequences in slots, with shuffled blocks."""

    def __init__(self, model: Any, rule: str = "coupled", seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        shape = ChainShape(NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_DRAFTS)
        self.model = model
        self.drafter = SmallLMDeviceDrafter(
            TorchForward(model), model.kv_layers, model.dtype, model.device, shape, TorchSampler(model.vocab_size, rule)
        )
        for pool in self.drafter.pools:
            pool.normal_(generator=self.random)  # what earlier owners left
        self.state = SlotState(
            history=torch.randint(0, 288, (NUM_SLOTS, 90), generator=self.random),
            num_tokens=torch.ones(NUM_SLOTS, dtype=torch.int64),
            prompt_len=torch.ones(NUM_SLOTS, dtype=torch.int64),
        )
        self.tables = torch.zeros(NUM_SLOTS, 24, dtype=torch.int32)
        order = torch.randperm(NUM_BLOCKS - 1, generator=self.random).to(torch.int32) + 1
        self.tables[:PADDING, :20] = order.view(PADDING, 20)
        self.tokens: dict[int, list[int]] = {}
        self.run: dict[int, int] = {}

    def admit(self, slot: int, length: int) -> None:
        self.tokens[slot] = torch.randint(3, 288, (length,), generator=self.random).tolist()
        self.run[slot] = 0
        self.drafter.admit(slot, self.tokens[slot], length)

    def step(self, slots: list[int], limits: list[int] | None = None, temperature: float = 0.0) -> DeviceStep:
        rows = len(slots)
        return DeviceStep(
            slots=torch.tensor(slots),
            limits=torch.tensor(limits or [MAX_DRAFTS] * rows),
            state=self.state,
            block_tables=self.tables,
            **sampling_tables(PADDING + 1, temperature),
            uploads=None,
            max_context=max([len(self.tokens[s]) for s in slots if s != PADDING] + [1]),
            block_size=BLOCK_SIZE,
        )

    def prefill(self, chunks: dict[int, int]) -> None:
        ids = [t for s, n in chunks.items() for t in self.tokens[s][self.run[s] : self.run[s] + n]]
        rows = PagedRows(
            slots=torch.tensor(list(chunks)),
            starts=torch.tensor([self.run[s] for s in chunks]),
            block_tables=self.tables,
            block_size=BLOCK_SIZE,
            max_context=80,
            offsets=F.pad(torch.tensor(list(chunks.values())).cumsum(0), (1, 0)).to(torch.int32),
            max_width=max(chunks.values()),
        )
        self.drafter.prefill_chunk(self.step(list(chunks)), torch.tensor(ids), rows, None)
        for slot, length in chunks.items():
            self.run[slot] += length
            if self.run[slot] == len(self.tokens[slot]):
                self.emit(slot, [slot + 3])

    def emit(self, slot: int, tokens: list[int]) -> None:
        self.tokens[slot] = self.tokens[slot] + tokens
        known = self.tokens[slot]
        self.state.history[slot, : len(known)] = torch.tensor(known)
        self.state.num_tokens[slot] = len(known)


def ready(model: Any, lengths: dict[int, int], rule: str = "coupled") -> World:
    world = World(model, rule)
    for slot, length in lengths.items():
        world.admit(slot, length)
    world.prefill(lengths)
    return world


def greedy(reference: Any, tokens: list[int], k: int) -> list[int]:
    ids = torch.tensor([tokens])
    out = reference.generate(ids, max_new_tokens=k, do_sample=False, eos_token_id=None, pad_token_id=0)
    found: list[int] = out[0, len(tokens) :].tolist()
    return found
