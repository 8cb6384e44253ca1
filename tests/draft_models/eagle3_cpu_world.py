"""The sequences of test_eagle3 driven through the CPU's drafter, by the calls of its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from draft_models.eagle3_cpu import Eagle3CpuDrafter
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from server.core import SamplingParams
from server.kernels.paged import PagedRows
from server.sampling.state import SamplingBatch
from server.spec.device import CachedDrafts, DeviceStep
from server.spec.types import Carry, Drafts, Verdict
from tests.draft_models.test_eagle3 import BLOCK_SIZE, NUM_BLOCKS, NUM_SLOTS, PADDING, World
from tests.draft_models.test_eagle3_network import CONFIG


class AsDevice:
    """The CPU's drafter with the calls that World makes."""

    def __init__(self, drafter: Eagle3CpuDrafter, world: CpuWorld) -> None:
        self.cpu, self.world = drafter, world
        self.pools = drafter.pools
        self.paused = False

    def admit_slots(self, slots: Tensor, num_tokens: Tensor, cached: CachedDrafts | None = None) -> None:
        for slot in slots.tolist():
            self.cpu.admit(slot, self.world.tokens[slot], len(self.world.tokens[slot]))

    def carry(self, step: DeviceStep, chunks: list[tuple[int, int]]) -> Carry:
        slots, limits = step.slots.tolist(), step.limits.tolist()
        known = [len(self.world.tokens[slot]) for slot in slots]
        owned = [-(-(n + limit) // BLOCK_SIZE) for n, limit in zip(known, limits, strict=True)]
        return Carry(
            slots=slots,
            slot_ids=step.slots,
            state=step.state,
            max_tokens_host=max(known),
            limits=limits,
            block_tables=step.block_tables[step.slots].long(),
            blocks=[step.block_tables[slot, :n].tolist() for slot, n in zip(slots, owned, strict=True)],
            tokens_host=known,
            chunks=chunks,
        )

    def prefill_chunk(self, step: DeviceStep, token_ids: Tensor, rows: PagedRows, features: Tensor) -> None:
        assert rows.offsets is not None
        lengths = rows.offsets.diff().tolist()
        carry = self.carry(step, list(zip(rows.starts.tolist(), lengths, strict=True)))
        num = sum(lengths)
        if self.paused:
            self.cpu.keep(carry, lengths, features[:num])
        else:
            self.cpu.prefill(carry, token_ids[:num], rows.starts, rows.starts, features[:num])

    def draft(self, step: DeviceStep, k: int) -> Drafts:
        self.paused = False
        carry = self.carry(step, [(len(self.world.tokens[slot]) - 1, 1) for slot in step.slots.tolist()])
        return self.cpu.propose(carry, k, self.world.sampling(carry.slots))

    def after_verify(self, step: DeviceStep, drafts: Drafts, verdict: Verdict, features: Tensor) -> None:
        emitted = verdict.num_emitted.tolist()
        slots = step.slots.tolist()
        starts = [len(self.world.tokens[s]) - n - 1 for s, n in zip(slots, emitted, strict=True)]
        carry = self.carry(step, [(start, 1) for start in starts])
        if self.paused:
            self.cpu.keep(carry, emitted, torch.cat([features[r, :n] for r, n in enumerate(emitted)]))
        else:
            self.cpu.commit(carry, drafts, verdict, features)
        for slot, n in zip(slots, emitted, strict=True):
            self.cpu.observe(slot, self.world.tokens[slot][-n:])

    def pause(self) -> None:
        self.paused = True
        self.cpu.pause()


class CpuWorld(World):
    """Two of the slots own blocks that lie side by side."""

    def __init__(self, seed: int = 0, config: Any = CONFIG, rule: str = "coupled") -> None:
        super().__init__(seed, config, rule)
        self.temperature = 0.0
        weights, embedding = self.dense.w, self.dense.embedding
        network = Eagle3CpuNetwork(config, weights, embedding, 256)
        cpu = Eagle3CpuDrafter(network, NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, rule)
        cpu.pools[0].copy_(self.drafter.pools[0])
        for slot in (0, 1):
            self.tables[slot, :15] = torch.arange(15) + 1 + 15 * slot
        others = torch.randperm(NUM_BLOCKS - 31, generator=torch.Generator().manual_seed(seed)) + 31
        for i, slot in enumerate((2, 3)):
            self.tables[slot, :15] = others[15 * i : 15 * i + 15]
        self.cpu = cpu
        self.drafter: Any = AsDevice(cpu, self)

    def prefill(self, chunks: dict[int, int], padding: int = 0, seen: bool = True) -> None:
        before = {slot: len(self.tokens[slot]) for slot in chunks}
        super().prefill(chunks, padding, seen)
        for slot, length in before.items():
            self.cpu.observe(slot, self.tokens[slot][length:])

    def sampling(self, slots: list[int]) -> SamplingBatch:
        """As `sampling_tables` has it: slot s has seed s + 7."""
        params = [SamplingParams(temperature=self.temperature, seed=slot + 7) for slot in range(PADDING + 1)]
        return SamplingBatch.of([params[slot] for slot in slots], self.config.vocab_size)


def cpu_ready(lengths: dict[int, int], seed: int = 0, **kind: Any) -> CpuWorld:
    """Every prompt prefilled whole."""
    world = CpuWorld(seed, **kind)
    for slot, length in lengths.items():
        world.admit(slot, length)
    world.prefill(lengths)
    return world
