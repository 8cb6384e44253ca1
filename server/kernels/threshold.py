"""top_k, top_p and min_p as one threshold on logit / temperature, without a sort: `server.sampling.filters` in kernels.

Five launches over all positions. Four of them (`server.kernels.levels`) read the logits three times and leave a list of
those that the threshold is one of; the last searches that list, one program a position. Where the list is too long
(thousands of equal logits, a distribution that a sample does not show) it searches the vocabulary itself: slower, as
exact.

Masses are integers (`server.kernels.masses`), so a threshold depends neither on the batch nor on who adds what.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import levels, runtime
from server.kernels.argmax import BLOCK, chunks
from server.kernels.levels import CAPACITY, FEW, GROUP, LEVELS, NOTHING, WEIGHED, bracket
from server.kernels.masses import COUNT, MASS, joined, mass_halves, search_all, search_block, sum_above
from server.kernels.noise import log
from server.kernels.slots import filters_of, is_greedy, temperature_of

SUM_BLOCK = 32 if runtime.INTERPRETED else 512
_SEARCH_BLOCK = 128 if runtime.INTERPRETED else 8192
_SEARCH_WARPS = 16
_EXTRA = CAPACITY // 4


@triton.jit
def _nucleus_of_all(logits, V, heat, peak, least, p, total, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """top_p's threshold within the logits of at least `least`, by reading the vocabulary; total 0: not known yet."""
    mass = total
    if total == 0:
        mass, _, _ = sum_above(logits, V, heat, peak, least, least, MASS, BLOCK)
    return search_all(logits, V, heat, peak, least, p.to(tl.float64) * mass.to(tl.float64), MASS, BLOCK)


@triton.jit
def _search(
    logits, V, mode, heat, peak, k, p, levels, sums, num_sums, num, found,
    CAPACITY: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Threshold of top_k and top_p at one position, from its list of `num` where that is all of it."""
    _, _, above, total, wanted, is_reached = bracket(mode, levels, sums, num_sums, k, p, SP)
    places = tl.arange(0, CAPACITY)
    is_listed = (num > 0) & (num <= CAPACITY)
    x = tl.load(found + places, mask=(places < num) & is_listed, other=-float("inf"))
    upper, lower = mass_halves(x, peak)
    present = (x > -float("inf")).to(tl.int32)
    threshold = -float("inf")
    if mode == WEIGHED:
        if is_listed:
            threshold = search_block(x, upper, lower, wanted, above)
        else:
            threshold = _nucleus_of_all(logits, V, heat, peak, threshold, p, total, BLOCK)
    else:
        if is_listed:
            if is_reached & (above + num >= k):
                threshold = search_block(x, present * 0, present, wanted, above)
        elif is_reached:
            threshold = search_all(logits, V, heat, peak, threshold, wanted, COUNT, BLOCK)
        if p < 1.0:
            if is_listed & (mode == FEW):
                left = tl.where(x >= threshold, x, -float("inf"))
                upper, lower = mass_halves(left, peak)
                wanted = p.to(tl.float64) * tl.sum(joined(upper, lower), 0).to(tl.float64)
                threshold = search_block(left, upper, lower, wanted, above)
            else:
                threshold = _nucleus_of_all(logits, V, heat, peak, threshold, p, above * 0, BLOCK)
    return threshold


@triton.jit
def _threshold_kernel(
    logits, stride, V, slots, floats, ints, modes, peaks, levels, sums, num_sums, lengths, found, thresholds, W,
    CAPACITY: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + position // W)
    k, p, m = filters_of(floats, ints, slot)
    mode = tl.load(modes + position)
    threshold = -float("inf")
    if (is_greedy(ints, slot) == 0) & ((mode != NOTHING) | (m > 0.0)):
        peak = tl.load(peaks + position)
        if mode != NOTHING:
            threshold = _search(
                logits + position * stride, V, mode, temperature_of(floats, slot), peak, k, p,
                levels + position * LEVELS, sums + position * num_sums * LEVELS, num_sums,
                tl.load(lengths + position), found + position * CAPACITY, CAPACITY, SP, BLOCK,
            )  # fmt: skip
        if m > 0.0:
            threshold = tl.maximum(threshold, peak + log(m))
    tl.store(thresholds + position, threshold)


def filter_threshold_by_slot(
    logits: Tensor, width: int, slots: Tensor, floats: Tensor, ints: Tensor, *, pdl: bool = False
) -> Tensor:
    """Threshold [T] float32 on logit / temperature of every position: tokens at or above it are kept, ties too.

    `logits` [T, V], float32 or 16 bits, `width` positions a row; `slots` [R] int64 index `floats` [S, 6] and `ints`
    [S, 5] (`server.kernels.slots`). -inf where a row is greedy or filters nothing. A position with a NaN or inf is
    broken and its threshold means nothing. The reference is `server.sampling.filters`.
    """
    num_positions, vocab_size = logits.shape
    device = logits.device
    num_groups = runtime.ceil_div(vocab_size, GROUP)
    num_chunks, num_blocks, _ = chunks(num_positions, vocab_size, device)
    num_sums, sum_blocks, _ = chunks(num_positions, vocab_size, device, SUM_BLOCK)
    tops = torch.empty(num_positions, num_groups, dtype=torch.float32, device=device)
    found = torch.empty(num_positions, CAPACITY, dtype=torch.float32, device=device)
    peaks, thresholds = torch.empty(2, num_positions, dtype=torch.float32, device=device).unbind(0)
    modes, lengths = torch.empty(2, num_positions, dtype=torch.int32, device=device).unbind(0)
    level = torch.empty(num_positions, LEVELS.value, dtype=torch.float32, device=device)
    sums = torch.empty(num_positions, num_sums, LEVELS.value, dtype=torch.int64, device=device)
    options = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    steps = (logits, logits.stride(0), vocab_size)
    rows = (slots, floats, ints)
    power = runtime.next_power_of_2(num_sums)
    levels.groups_kernel[(num_positions, num_chunks)](
        *steps, tops, num_groups, *rows, width, num_blocks, GROUP=GROUP, BLOCK=BLOCK, **options
    )
    levels.plan_kernel[(num_positions,)](
        *steps, tops, num_groups, *rows, modes, peaks, level, lengths, width, NUM=levels.NUM_SAMPLES, GROUP=GROUP,
        GP=runtime.next_power_of_2(num_groups), EXTRA=_EXTRA, num_warps=8, **options,
    )  # fmt: skip
    levels.sums_kernel[(num_positions, num_sums)](
        *steps, slots, floats, modes, peaks, level, sums, width, sum_blocks, num_sums, BLOCK=SUM_BLOCK, num_warps=4,
        **options,
    )  # fmt: skip
    levels.collect_kernel[(num_positions, num_chunks)](
        *steps, tops, num_groups, *rows, modes, level, sums, num_sums, lengths, found, width, num_blocks, GROUP=GROUP,
        CAPACITY=CAPACITY, SP=power, BLOCK=BLOCK, num_warps=8, **options,
    )  # fmt: skip
    _threshold_kernel[(num_positions,)](
        *steps, *rows, modes, peaks, level, sums, num_sums, lengths, found, thresholds, width, CAPACITY=CAPACITY,
        SP=power, BLOCK=_SEARCH_BLOCK, num_warps=_SEARCH_WARPS, **options,
    )  # fmt: skip
    return thresholds


def filter_threshold_reference(
    logits: Tensor, width: int, temperature: Tensor, greedy: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The same thresholds [T] by sorting, as `server.sampling.filters` finds them on a GPU."""
    vocab_size = logits.shape[1]
    heat, k, p, m, is_greedy = (
        part.repeat_interleave(width)[:, None] for part in (temperature, top_k, top_p, min_p, greedy)
    )
    values = (logits.float() / heat).sort(-1, descending=True).values
    kth = torch.where(k >= vocab_size, -torch.inf, values.gather(1, k.clamp(max=vocab_size) - 1))
    mass = (values - values[:, :1]).exp_().mul_(2.0**40).to(torch.int64).mul_(values >= kth)
    running = mass.cumsum(1)
    last = (running < p.double() * running[:, -1:]).sum(1, keepdim=True).clamp_(max=vocab_size - 1)
    nucleus = torch.where(p >= 1.0, -torch.inf, values.gather(1, last))
    threshold = torch.maximum(torch.maximum(kth, nucleus), values[:, :1] + m.log())
    return torch.where(is_greedy, -torch.inf, threshold).squeeze(1)
