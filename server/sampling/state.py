"""Sampling parameters as tensors: resident by slot, gathered for the rows of a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.core import SamplingParams

MIN_TEMPERATURE = 1e-5
"""Smaller positive temperatures act like this one: the quotient must stay within float32."""


NUM_FLOATS, NUM_INTS = 6, 5
"""Values of a slot's lines in SamplingState."""


@dataclass(slots=True)
class SamplingBatch:
    """How the R rows of a step sample. Tensors are [R]; flags are known to the host without a sync.

    Greedy rows have neutral temperature and filters, except `top_k` 1. `bias_ids` [R, B] int64 and `bias_values`
    [R, B] float32 are padded with (0, 0.0) and None if no row has a bias. `max_logprobs` is the largest number of
    alternatives that a row wants reported, None if no row wants log-probabilities. `end_ids` [R, E] int64 are tokens
    that a row may not sample as one of its first `min_tokens` [R]; None if every row is past them.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    top_k: Tensor
    seeds: Tensor
    choices: Tensor
    greedy: Tensor
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    min_tokens: Tensor | None = None
    end_ids: Tensor | None = None
    all_greedy: bool = True
    any_greedy: bool = True
    all_filtered: bool = False
    any_top_k: bool = False
    any_top_p: bool = False
    any_min_p: bool = False
    any_repetition: bool = False
    any_presence_or_frequency: bool = False
    max_logprobs: int | None = None

    @property
    def any_filter(self) -> bool:
        return self.any_top_k or self.any_top_p or self.any_min_p

    @property
    def any_penalty(self) -> bool:
        return self.any_repetition or self.any_presence_or_frequency

    @property
    def any_bias(self) -> bool:
        return self.bias_ids is not None

    @staticmethod
    def of(params: list[SamplingParams], vocab_size: int, choices: list[int] | None = None) -> SamplingBatch:
        """A batch outside an engine (tests, tools): row r samples by `params[r]`."""
        state = SamplingState(len(params), vocab_size, torch.device("cpu"))
        for slot, row in enumerate(params):
            state.set(slot, row, choices[slot] if choices else 0)
        slots = list(range(len(params)))
        return state.gather(slots, torch.arange(len(params)))


class SamplingState:
    """Slot-resident sampling parameters: S slots, a line of floats and one of integers each.

    `set` fills a slot. Where many are filled at once, `prepare` does the host's part of each, and the lines it returns
    go to the device together (`write`).
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        neutral = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
        self._floats = neutral.repeat(max_slots, 1).to(device)
        self._ints = torch.tensor([1, 0, 0, 1, 0]).repeat(max_slots, 1).to(device)  # greedy
        self._bias_ids = torch.zeros(max_slots, 0, dtype=torch.int64, device=device)
        self._bias_values = torch.zeros(max_slots, 0, dtype=torch.float32, device=device)
        self._end_ids = torch.zeros(max_slots, 0, dtype=torch.int64, device=device)
        self._num_ends: dict[int, int] = {}
        self._biased: set[int] = set()
        self._params: list[SamplingParams | None] = [None] * max_slots
        self._cached: tuple[tuple[int, ...], SamplingBatch] | None = None

    def set(
        self, slot: int, params: SamplingParams, choice: int, min_tokens: int = 0, end_ids: Collection[int] = ()
    ) -> None:
        """`slot` samples by `params` from now on, and none of `end_ids` as one of its first `min_tokens` tokens.

        ValueError: a biased token or an end is not in the vocabulary.
        """
        floats, ints = self.prepare(slot, params, choice, min_tokens, end_ids)
        self._write(self._floats, slot, floats)
        self._write(self._ints, slot, ints)

    def prepare(
        self, slot: int, params: SamplingParams, choice: int, min_tokens: int = 0, end_ids: Collection[int] = ()
    ) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """All of `set` but the slot's lines of NUM_FLOATS and NUM_INTS values, which are still to be written.

        Biases and ends are rare, so they go to the device one by one.
        """
        for name, ids in (("logit_bias", params.logit_bias), ("end_ids", end_ids)):
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                bad = next(token for token in ids if not 0 <= token < self.vocab_size)
                raise ValueError(f"{name}: token id {bad} is not valid; use 0 to {self.vocab_size - 1}")
        if params.logit_bias:
            self._set_bias(slot, params.logit_bias)
        elif slot in self._biased:
            self._bias_values[slot].zero_()  # its predecessor's; captured graphs gather without asking
            self._biased.remove(slot)
        self._num_ends.pop(slot, None)
        if min_tokens > 0 and end_ids:
            self._set_ends(slot, list(end_ids))
        self._params[slot] = params
        self._cached = None
        return _floats_of(params), _ints_of(params, choice, min_tokens if end_ids else 0, self.vocab_size)

    def write(self, slots: Tensor, floats: Tensor, ints: Tensor) -> None:
        """Lines that `prepare` returned: `floats` [A, NUM_FLOATS] and `ints` [A, NUM_INTS] of `slots` [A], each once.

        All on the device, `slots` and `ints` int64, `floats` float32.
        """
        self._floats.index_copy_(0, slots, floats)
        self._ints.index_copy_(0, slots, ints)

    def _write(self, table: Tensor, slot: int, values: Sequence[float]) -> None:
        """One slot's line, through pinned memory where that spares waiting for the device."""
        row = torch.tensor(values, dtype=table.dtype, pin_memory=table.is_cuda)
        table[slot].copy_(row, non_blocking=True)

    def reserve(self, num_biases: int, num_ends: int) -> None:
        """Makes room for requests of that many biased tokens and ends, so that the tables stay where they are."""
        slots = self._floats.shape[0]
        self._biased.clear()
        self._bias_ids = torch.zeros(slots, num_biases, dtype=torch.int64, device=self.device)
        self._bias_values = torch.zeros(slots, num_biases, dtype=torch.float32, device=self.device)
        self._end_ids = torch.zeros(slots, num_ends, dtype=torch.int64, device=self.device)

    def tables(self) -> tuple[Tensor, ...]:
        """What `on_device` reads: a captured graph is of no use once one of them has moved."""
        return self._floats, self._ints, self._bias_ids, self._bias_values, self._end_ids

    def on_device(
        self, slot_ids: Tensor, *, sampled: bool, filtered: bool, full: bool, num_logprobs: int = 0
    ) -> SamplingBatch:
        """Parameters of `slot_ids` [R], of which the host says only what may be among them: nothing depends on values.

        `full`: penalties, biases and ends that are not allowed yet; neutral where a row has none. Any slot will do,
        also one that was never set.
        """
        floats = self._floats.index_select(0, slot_ids).t().contiguous()
        ints = self._ints.index_select(0, slot_ids).t().contiguous()
        temperature, top_p, min_p, repetition, presence, frequency = floats.unbind(0)
        return SamplingBatch(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            top_k=ints[0],
            seeds=ints[1],
            choices=ints[2],
            greedy=ints[3] != 0,
            bias_ids=self._bias_ids.index_select(0, slot_ids) if full else None,
            bias_values=self._bias_values.index_select(0, slot_ids) if full else None,
            min_tokens=ints[4] if full else None,
            end_ids=self._end_ids.index_select(0, slot_ids) if full else None,
            all_greedy=not sampled,
            any_greedy=True,
            all_filtered=False,
            any_top_k=filtered,
            any_top_p=filtered,
            any_min_p=filtered,
            any_repetition=full,
            any_presence_or_frequency=full,
            max_logprobs=num_logprobs if full else None,
        )

    @property
    def early_slots(self) -> Collection[int]:
        """Slots of which `end_freely` has not said yet that they have their `min_tokens`."""
        return self._num_ends.keys()

    def end_freely(self, slot: int) -> None:
        """`slot` has its `min_tokens`: steps need not look after its ends any more."""
        self._num_ends.pop(slot, None)
        self._cached = None

    def clear(self, slot: int) -> None:
        """`slot` is free; its tensors are overwritten by the next `set`."""
        self._params[slot] = None
        self._num_ends.pop(slot, None)
        self._cached = None

    def _set_bias(self, slot: int, bias: dict[int, float]) -> None:
        self._biased.add(slot)
        width = self._bias_ids.shape[1]
        if len(bias) > width:
            grow = max(8, len(bias), 2 * width) - width
            self._bias_ids = torch.nn.functional.pad(self._bias_ids, (0, grow))
            self._bias_values = torch.nn.functional.pad(self._bias_values, (0, grow))
            width += grow
        padding = [0] * (width - len(bias))
        self._write(self._bias_ids, slot, [*bias, *padding])
        self._write(self._bias_values, slot, [*bias.values(), *padding])

    def _set_ends(self, slot: int, end_ids: list[int]) -> None:
        width = self._end_ids.shape[1]
        if len(end_ids) > width:
            grow = max(8, len(end_ids), 2 * width) - width
            padding = self._end_ids[:, :1] if width else self._end_ids.new_zeros(self._end_ids.shape[0], 1)
            self._end_ids = torch.cat([self._end_ids, padding.expand(-1, grow)], 1)
            width += grow
        # Padding repeats an end of the row: another token would be masked too.
        self._write(self._end_ids, slot, end_ids + end_ids[:1] * (width - len(end_ids)))
        self._num_ends[slot] = len(end_ids)

    def gather(self, slots: list[int], slot_ids: Tensor) -> SamplingBatch:
        """Parameters of the rows in `slots` (host) = `slot_ids` [R] (device). KeyError: a slot is not set.

        The last batch is kept: while the same rows run, step after step, gathering is free.
        """
        key = tuple(slots)
        if self._cached is not None and self._cached[0] == key:
            return self._cached[1]
        batch = self._gather(slots, slot_ids)
        self._cached = (key, batch)
        return batch

    def _gather(self, slots: list[int], slot_ids: Tensor) -> SamplingBatch:
        rows = [self._row(slot) for slot in slots]
        sampled = [row for row in rows if not row.greedy]
        floats = self._floats.index_select(0, slot_ids).t().contiguous()
        ints = self._ints.index_select(0, slot_ids).t().contiguous()
        temperature, top_p, min_p, repetition, presence, frequency = floats.unbind(0)
        width = max((len(row.logit_bias) for row in rows), default=0)
        num_ends = max((self._num_ends.get(slot, 0) for slot in slots), default=0) if self._num_ends else 0
        wanted = [row.logprobs for row in rows if row.logprobs is not None]
        return SamplingBatch(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            top_k=ints[0],
            seeds=ints[1],
            choices=ints[2],
            greedy=ints[3] != 0,
            bias_ids=self._gather_bias(self._bias_ids, rows, slot_ids, width),
            bias_values=self._gather_bias(self._bias_values, rows, slot_ids, width),
            min_tokens=ints[4] if num_ends else None,
            end_ids=self._end_ids[:, :num_ends].index_select(0, slot_ids) if num_ends else None,
            all_greedy=not sampled,
            any_greedy=len(sampled) < len(rows),
            all_filtered=all(self._is_filtered(row) for row in sampled),
            any_top_k=any(0 < row.top_k < self.vocab_size for row in sampled),
            any_top_p=any(row.top_p < 1.0 for row in sampled),
            any_min_p=any(row.min_p > 0.0 for row in sampled),
            any_repetition=any(row.repetition_penalty != 1.0 for row in rows),
            any_presence_or_frequency=any(row.presence_penalty or row.frequency_penalty for row in rows),
            max_logprobs=max(wanted, default=None),
        )

    def _gather_bias(self, table: Tensor, rows: list[SamplingParams], slot_ids: Tensor, width: int) -> Tensor | None:
        if width == 0:
            return None
        has_bias = torch.tensor([bool(row.logit_bias) for row in rows]).to(self.device, non_blocking=True)
        # A slot whose present request has no bias still holds its predecessor's.
        return table[:, :width].index_select(0, slot_ids).mul_(has_bias[:, None])

    def _is_filtered(self, row: SamplingParams) -> bool:
        return 0 < row.top_k < self.vocab_size or row.top_p < 1.0 or row.min_p > 0.0

    def _row(self, slot: int) -> SamplingParams:
        params = self._params[slot]
        if params is None:
            raise KeyError(f"slot {slot} has no sampling parameters")
        return params


def _floats_of(params: SamplingParams) -> tuple[float, ...]:
    greedy = params.greedy
    return (
        1.0 if greedy else max(params.temperature, MIN_TEMPERATURE),
        1.0 if greedy else params.top_p,
        0.0 if greedy else params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )


def _ints_of(params: SamplingParams, choice: int, min_tokens: int, vocab_size: int) -> tuple[int, ...]:
    top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    seed = (params.seed + 2**63) % 2**64 - 2**63
    return (1 if params.greedy else top_k, seed, choice, int(params.greedy), min_tokens)
