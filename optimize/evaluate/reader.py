"""A served network reads windows of text: the engine's own forward pass on the paged KV pool, whose kernels it judges.

Several windows go side by side, in steps of as many tokens as memory allows, so the logits of a step are all that is
held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimize.evaluate.texts import Window
from server.models.base import TargetModel
from server.models.paged_forward import PagedForward
from server.models.paging import Span, make_pools, ragged_batch

BLOCK = 16
CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 1 << 27, 1 << 30
"""Of one network's logits in a step. Comparing two takes about four times as much."""
MOST_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Step:
    """Positions `start .. end` of each window of a group that is that long; `group` are the windows' numbers."""

    group: range
    start: int
    end: int


def tokens_a_step(vocab_size: int, device: torch.device) -> int:
    """Whole blocks, as many as memory allows."""
    budget = GPU_LOGITS_BYTES if device.type == "cuda" else CPU_LOGITS_BYTES
    return max(1, min(MOST_TOKENS, budget // (4 * vocab_size)) // BLOCK) * BLOCK


def steps(windows: Sequence[Window], tokens: int) -> Iterator[Step]:
    """Groups of windows whose blocks hold `tokens` tokens (whole blocks) at most, or one window in several steps."""
    first = 0
    while first < len(windows):
        end, held = first, 0
        while end < len(windows) and (end == first or held + num_blocks(windows[end]) * BLOCK <= tokens):
            held += num_blocks(windows[end]) * BLOCK
            end += 1
        longest = max(window.num_tokens for window in windows[first:end])
        for start in range(0, longest, tokens):
            yield Step(range(first, end), start, min(start + tokens, longest))
        first = end


def num_blocks(window: Window) -> int:
    """Of the pool."""
    return -(-window.num_tokens // BLOCK)


class Reader:
    """Runs a network on windows of at most `longest` tokens, `tokens` of them a step."""

    def __init__(
        self,
        model: TargetModel,
        longest: int,
        tokens: int,
        forward: PagedForward | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`forward`: the network by kernels; None on a CPU, where it is its own. `kv_dtype`: None for the network's."""
        self.model, self._forward = model, forward
        self._most_blocks = -(-longest // BLOCK)
        places = (1 + max(self._most_blocks, tokens // BLOCK)) * BLOCK  # the first block is nobody's
        self._pools = make_pools(model.kv_layers, places, kv_dtype or model.dtype, model.device)

    @torch.inference_mode()
    def logits(self, windows: Sequence[Window], step: Step) -> Tensor:
        """float32 [N, V]: of the positions of `step`, window by window. Steps of a group must come in order."""
        spans, parts, block = [], [], 1
        for window in windows[step.group.start : step.group.stop]:
            ids = window.ids[:-1][step.start : step.end]
            held = num_blocks(window)
            if len(ids):
                parts.append(ids)
                spans.append(Span(step.start, len(ids), list(range(block, block + held)), contiguous=True))
            block += held
        read = torch.from_numpy(np.concatenate(parts))
        if self._forward is None:
            return self._by_itself(read, spans)
        return self._by_kernels(self._forward, read.to(self.model.device), spans)

    def _by_itself(self, ids: Tensor, spans: list[Span]) -> Tensor:
        count, device = len(ids), self.model.device
        short = max(0, self.model.min_rows - count)
        batch = ragged_batch(spans, BLOCK, short).to(device)
        wanted = torch.arange(count + short, device=device)
        wanted[count:] = 0
        padded = torch.cat([ids, ids.new_zeros(short)]).to(device)
        return self.model.forward(padded, self._pools, batch, wanted)[0][:count].float()

    def _by_kernels(self, forward: PagedForward, ids: Tensor, spans: list[Span]) -> Tensor:
        from server.kernels.paged import PagedRows

        device = ids.device
        table = torch.zeros(len(spans), self._most_blocks, dtype=torch.int32)
        for row, span in enumerate(spans):
            table[row, : len(span.blocks)] = torch.tensor(span.blocks, dtype=torch.int32)
        batch = ragged_batch(spans, BLOCK)
        lengths = torch.tensor([0, *(span.length for span in spans)])
        rows = PagedRows(
            slots=torch.arange(len(spans), device=device),
            starts=torch.tensor([span.start for span in spans], device=device),
            block_tables=table.to(device),
            block_size=BLOCK,
            max_context=max(span.start + span.length for span in spans),
            offsets=lengths.cumsum(0).to(torch.int32).to(device),
            max_width=int(lengths.max()),
        )
        places, positions = batch.slot_mapping.to(device), batch.positions.to(device)
        return forward(ids, self._pools, rows, positions, places, torch.arange(len(ids), device=device), ())[0].float()
