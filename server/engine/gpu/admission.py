"""Fills the slots of sequences that are admitted together: one upload and a dozen device operations for all of them.

One by one a request cost 0.26 ms of the host on an H100: 66 ms before the first prefill step of 256. What is sent is a
head of `_HEAD` integers a sequence, then the tokens of all:

    slot | num_tokens | prompt_len | first place - first token | floats, two to an integer | ints || tokens ...

A sequence's tokens go to consecutive places of the flattened history.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import pack_into

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.gpu.staging import BulkUpload
from server.engine.gpu.state import DeviceState
from server.engine.sequence import Sequence
from server.sampling.state import NUM_FLOATS, NUM_INTS

_PLACED = 4
_FLOATS = NUM_FLOATS // 2
_HEAD = _PLACED + _FLOATS + NUM_INTS
_USUAL_SIZE = 1 << 18
"""Integers an upload: 2 MiB, prompts of 512 tokens for 496 sequences; more of them go in several, at most as many as
the KV pool can need."""


def most_uploads(state: DeviceState, size: int) -> int:
    """How many uploads of `size` integers fill every slot with as many tokens as the KV pool holds.

    Sequences are not divided, but two uploads in a row are more than one full one. Only prefixes that many sequences
    share can take more.
    """
    num_slots, width = state.slots.history.shape
    tokens = min(state.pools[0].shape[0], num_slots * width)
    return 1 + 2 * -(-(tokens + num_slots * _HEAD) // size)


class Admission:
    """Writes to `state`. Not thread-safe; called by the runner between steps."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state
        size = max(_USUAL_SIZE, state.max_context + _HEAD)
        self._upload = BulkUpload(size, most_uploads(state, size), state.block_tables.device)

    def fill(self, sequences: list[Sequence]) -> Iterator[tuple[Tensor, Tensor]]:
        """Slots [A] and numbers of known tokens [A], int64 on the device and good until the next ones, of as many at
        a time as one upload holds.

        ValueError: as SamplingState.set.
        """
        batch: list[Sequence] = []
        size = 0
        for seq in sequences:
            if batch and size + _HEAD + seq.num_tokens > self._upload.size:
                yield self._fill(batch, size)
                batch, size = [], 0
            batch.append(seq)
            size += _HEAD + seq.num_tokens
        if batch:
            yield self._fill(batch, size)

    def _fill(self, sequences: list[Sequence], size: int) -> tuple[Tensor, Tensor]:
        self._pack(sequences, self._upload.begin()[:size])
        sent = self._upload.send(size)
        count, state = len(sequences), self._state
        head, tokens = sent[: count * _HEAD].view(count, _HEAD), sent[count * _HEAD :]
        slots, num_tokens, prompt_lens, shifts = head[:, :_PLACED].t().contiguous().unbind(0)
        floats = head.view(torch.float32)[:, 2 * _PLACED : 2 * _PLACED + NUM_FLOATS]
        state.sampling.write(slots, floats, head[:, _PLACED + _FLOATS :])
        known = state.slots
        known.num_tokens.index_copy_(0, slots, num_tokens)
        known.prompt_len.index_copy_(0, slots, prompt_lens)
        places = shifts.repeat_interleave(num_tokens, output_size=len(tokens))
        places += torch.arange(len(tokens), device=tokens.device)
        known.history.view(-1).index_copy_(0, places, tokens)
        return slots, num_tokens

    def _pack(self, sequences: list[Sequence], room: NDArray[np.int64]) -> None:
        width, count = self._state.slots.history.shape[1], len(sequences)
        lines: list[tuple[int, ...]] = []
        floats: list[tuple[float, ...]] = []
        at = first = count * _HEAD
        memory = room.data
        for seq in sequences:
            request, slot, num_tokens = seq.request, seq.slot, seq.num_tokens
            ends = seq.ends if seq.early else ()
            fractions, ints = self._state.sampling.prepare(
                slot, request.sampling, request.choice, request.min_tokens, ends
            )
            lines.append((slot, num_tokens, seq.prompt_len, slot * width - (at - first), *ints))
            floats.append(fractions)
            pack_into(f"{num_tokens}q", memory, 8 * at, *seq.token_ids)  # half of what numpy takes for a list
            at += num_tokens
        head = room[:first].reshape(count, _HEAD)
        found = np.array(lines, dtype=np.int64)
        head[:, :_PLACED] = found[:, :_PLACED]
        head[:, _PLACED + _FLOATS :] = found[:, _PLACED:]
        head[:, _PLACED : _PLACED + _FLOATS] = np.array(floats, dtype=np.float32).view(np.int64)
