"""Penalties, biases and withheld ends of a whole step: what `server.sampling.process` does before the temperature.

Four ways to change a position's logits, in this order and each rounded as torch rounds it:

1. repetition (Keskar et al. 2019, CTRL): of a token in prompt or output, a positive logit is divided, another
   multiplied;
2. presence and frequency (OpenAI's): subtracted once if the token is in the output, and once per occurrence;
3. biases, added;
4. ends of the answer, -inf while the output is shorter than min_tokens.

Offset j of a row follows its history and its first j drafts, which count as output: the state that plain decoding would
have had there.

Three launches. The first counts every slot's tokens in a table over the vocabulary, the second reads the table once a
row, writes every position and leaves the table zeroed for the next step, the third visits the few tokens that have a
bias or are ends. Rows without penalties are not counted, and copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime
from server.kernels.slots import min_tokens_of, penalties_of

COUNT_BLOCK = 32 if runtime.INTERPRETED else 1024
ADJUST_BLOCK = 64 if runtime.INTERPRETED else 1024
"""Four tokens a thread: what is read in 16 bits then has the layout of what is written in 32."""
_COUNT_PROGRAMS_PER_SM = 1 if runtime.INTERPRETED else 8
IN_PROMPT = tl.constexpr(1 << 30)
"""Beside a token's number of occurrences in the output: it is in the prompt."""


@triton.jit
def _has_penalty(repetition, presence, frequency):  # type: ignore[no-untyped-def]
    return (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)


@triton.jit
def _count_kernel(
    slots, floats, history, history_stride, num_tokens, prompt_len, counts, V, step,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Adds a row's history to its slot's `counts`: 1 for a token of the output, IN_PROMPT for one of the prompt."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + row)
    repetition, presence, frequency = penalties_of(floats, slot)
    if _has_penalty(repetition, presence, frequency):
        known = tl.load(num_tokens + slot).to(tl.int32)
        prompt = tl.load(prompt_len + slot).to(tl.int32)
        begin = tl.where(repetition != 1.0, 0, prompt)  # presence and frequency do not look at the prompt
        for first in range(begin + tl.program_id(1) * BLOCK, known, step):
            at = first + tl.arange(0, BLOCK)
            token = tl.load(history + slot * history_stride + at, mask=at < known, other=-1)
            is_token = (token >= 0) & (token < V)
            to = counts + slot * V + tl.where(is_token, token, 0)
            tl.atomic_add(to, 1, mask=is_token & (at >= prompt), sem="relaxed")
            tl.atomic_or(to, IN_PROMPT, mask=is_token & (at < prompt), sem="relaxed")


@triton.jit
def _penalised(x, in_prompt, num_output, repetition, presence, frequency):  # type: ignore[no-untyped-def]
    """Float32 logits after the penalties. Products must not be fused with the subtractions: torch rounds them."""
    scaled = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
    x = tl.where(in_prompt | (num_output > 0), scaled, x)
    x -= tl.where(num_output > 0, presence, 0.0)
    return x - frequency * num_output.to(tl.float32)


@triton.jit
def _adjust_kernel(
    logits, stride, V, drafts, drafts_stride, slots, floats, counts, adjusted, W,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """A block of the vocabulary at all W positions of a row, penalised; its counts are zero afterwards."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + row)
    repetition, presence, frequency = penalties_of(floats, slot)
    is_penalised = _has_penalty(repetition, presence, frequency)
    found = tl.zeros((BLOCK,), tl.int32)
    if is_penalised:
        found = tl.load(counts + slot * V + columns, mask=inside, other=0)
    in_prompt, num_output = (found & IN_PROMPT) != 0, found & (IN_PROMPT - 1)
    at = logits + row * W * stride + columns
    raw = tl.load(at, mask=inside, other=0.0)
    for j in range(W):
        at += stride
        ahead = tl.load(at, mask=inside & (j + 1 < W), other=0.0)  # under way while this position is computed
        x = raw.to(tl.float32)
        if is_penalised:
            draft = tl.load(drafts + row * drafts_stride + j - 1, mask=j > 0, other=-1).to(tl.int32)
            num_output += (columns == draft).to(tl.int32)
            x = _penalised(x, in_prompt, num_output, repetition, presence, frequency)
        tl.store(adjusted + (row * W + j) * V + columns, x, mask=inside)
        raw = ahead
    if is_penalised:
        tl.store(counts + slot * V + columns, 0, mask=inside & (found != 0))


@triton.jit
def _patch_kernel(
    adjusted, V, slots, ints, num_tokens, prompt_len, bias_ids, bias_values, B, end_ids, E, W,
    BP: tl.constexpr, EP: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Biases and withheld ends of one position, in place."""
    position = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + position // W)
    num_output = tl.load(num_tokens + slot) - tl.load(prompt_len + slot) + position % W
    is_early = num_output < min_tokens_of(ints, slot)
    b = tl.arange(0, BP)
    bias = tl.load(bias_values + slot * B + b, mask=b < B, other=0.0)
    is_biased = bias != 0.0  # padding is not, so no two of these name one token
    to = adjusted + position * V + tl.load(bias_ids + slot * B + b, mask=is_biased, other=0)
    tl.store(to, tl.load(to, mask=is_biased, other=0.0) + bias, mask=is_biased)
    if is_early:
        tl.debug_barrier()  # an end may have a bias
        e = tl.arange(0, EP)
        to = adjusted + position * V + tl.load(end_ids + slot * E + e, mask=e < E, other=0)
        x = tl.load(to, mask=e < E, other=0.0)
        # A NaN or inf stays, and tells verification that the position is broken.
        tl.store(to, tl.full((EP,), -float("inf"), tl.float32), mask=(e < E) & (x < float("inf")))


def make_counts(num_slots: int, vocab_size: int, device: torch.device) -> Tensor:
    """What `adjust_by_slot` counts in, [S, V] int32 zeros. RuntimeError: a graph is being captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a step before capturing one: counts cannot be made inside a graph")
    return torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)


def adjust_by_slot(
    logits: Tensor,
    drafts: Tensor,
    slots: Tensor,
    floats: Tensor,
    ints: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    end_ids: Tensor,
    history: Tensor,
    num_tokens: Tensor,
    prompt_len: Tensor,
    counts: Tensor,
    *,
    pdl: bool = False,
) -> Tensor:
    """Logits [R * W, V] float32 with penalties, biases and withheld ends; rows that ask for nothing keep theirs.

    `logits` [R * W, V], float32 or 16 bits, rows contiguous; `drafts` [R, W - 1] int64. `slots` [R] int64 index all
    that is by slot, contiguous: `floats` [S, 6], `ints` [S, 5] (`server.kernels.slots`), `bias_ids` [S, B] int64 and
    `bias_values` [S, B] float32 (0.0 where there is none), `end_ids` [S, E] int64 (padded with ends), `history` [S, L],
    `num_tokens` [S] and `prompt_len` [S] int64. Rows with penalties have different slots. `counts` [S, V] int32 is zero
    before and after. A NaN or inf is still one at its position, so the result is as broken as the logits are, unless a
    penalty takes a finite one past float32. ValueError: shapes that do not fit.
    """
    num_rows, width = drafts.shape[0], drafts.shape[1] + 1
    vocab_size, device = logits.shape[1], logits.device
    if logits.shape[0] != num_rows * width or logits.stride(1) != 1:
        raise ValueError(f"logits: {tuple(logits.shape)} is not valid; use [{num_rows * width}, V], contiguous rows")
    if counts.shape != (num_tokens.shape[0], vocab_size) or not counts.is_contiguous():
        raise ValueError(f"counts: {tuple(counts.shape)} is not valid; use [{num_tokens.shape[0]}, {vocab_size}]")
    adjusted = torch.empty(num_rows * width, vocab_size, dtype=torch.float32, device=device)
    options = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    wanted = runtime.ceil_div(_COUNT_PROGRAMS_PER_SM * runtime.num_sms(device), max(1, num_rows))
    programs = max(1, min(wanted, runtime.ceil_div(history.shape[1], COUNT_BLOCK)))
    _count_kernel[(num_rows, programs)](
        slots, floats, history, history.stride(0), num_tokens, prompt_len, counts, vocab_size, programs * COUNT_BLOCK,
        BLOCK=COUNT_BLOCK, num_warps=4, **options,
    )  # fmt: skip
    _adjust_kernel[(num_rows, runtime.ceil_div(vocab_size, ADJUST_BLOCK))](
        logits, logits.stride(0), vocab_size, drafts, drafts.stride(0), slots, floats, counts, adjusted, width,
        BLOCK=ADJUST_BLOCK, num_warps=8, enable_fp_fusion=False, **options,
    )  # fmt: skip
    num_biases, num_ends = bias_ids.shape[1], end_ids.shape[1]
    _patch_kernel[(num_rows * width,)](
        adjusted, vocab_size, slots, ints, num_tokens, prompt_len, bias_ids, bias_values, num_biases, end_ids, num_ends,
        width, BP=runtime.next_power_of_2(num_biases), EP=runtime.next_power_of_2(num_ends), num_warps=4, **options,
    )  # fmt: skip
    return adjusted


def adjust_reference(
    logits: Tensor,
    drafts: Tensor,
    slots: Tensor,
    floats: Tensor,
    ints: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    end_ids: Tensor,
    history: Tensor,
    num_tokens: Tensor,
    prompt_len: Tensor,
) -> Tensor:
    """What `adjust_by_slot` computes, position by position on the host."""
    adjusted = logits.float().clone().view(drafts.shape[0], -1, logits.shape[1])
    for row, slot in enumerate(slots.tolist()):
        repetition, presence, frequency = floats[slot, 3:]
        prompt, known = int(prompt_len[slot]), int(num_tokens[slot])
        for j, x in enumerate(adjusted[row]):
            output = torch.cat([history[slot, prompt:known], drafts[row, :j]])
            num_output = output.bincount(minlength=x.shape[0])
            occurs = (history[slot, :prompt].bincount(minlength=x.shape[0]) + num_output) > 0
            x.copy_(torch.where(occurs, torch.where(x > 0, x / repetition, x * repetition), x))
            x.sub_(presence * (num_output > 0)).sub_(frequency * num_output)
            x.index_add_(0, bias_ids[slot], bias_values[slot])
            if len(output) < int(ints[slot, 4]):
                x[end_ids[slot]] = -torch.inf
    return adjusted.view(-1, logits.shape[1])
