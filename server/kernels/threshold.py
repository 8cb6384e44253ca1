"""top_k, top_p and min_p as one threshold on logit / temperature, without a sort: `server.sampling.filters` in kernels.

Three launches. The first takes the largest logit of every group of neighbours. The second adds up all mass where top_p
needs it. The third, one program a position, looks at the few hundred groups with the largest maxima: they hold every
logit above the largest maximum left out. Where those decide, which they nearly always do on text, the search runs in
registers; a flat distribution is searched by reading the vocabulary a few times more.

Masses are integers (`server.kernels.masses`), so a threshold depends neither on the batch nor on who adds what.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime
from server.kernels.argmax import BLOCK, chunks
from server.kernels.masses import COUNT, MASS, joined, load_scaled, mass_halves, search_all, search_block, sum_above
from server.kernels.noise import log

GROUP = 8 if runtime.INTERPRETED else 64
NUM_CANDIDATES = 4 if runtime.INTERPRETED else 256
"""Groups that are looked at before the whole vocabulary is."""
_SEARCH_BLOCK = 128 if runtime.INTERPRETED else 8192
_SEARCH_WARPS = 16


@triton.jit
def _groups_kernel(
    logits, stride, V, tops, G, num_blocks, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def] # fmt: skip
    """Largest finite logit of each group, [T, G] float32; -inf if there is none."""
    position = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK // GROUP)
    for i in range(num_blocks):
        first = (tl.program_id(1) * num_blocks + i) * (BLOCK // GROUP)
        columns = (first + groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(logits + position * stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        x = tl.where(tl.abs(x) < float("inf"), x, -float("inf"))
        tl.store(tops + position * G + first + groups, tl.max(x, 1), mask=first + groups < G)


@triton.jit
def _mass_kernel(
    logits, stride, V, tops, G, temperature, greedy, top_k, top_p, masses, W, num_blocks,
    GP: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Mass of each chunk of a position, [T, CP] int64, where top_p works on the whole vocabulary."""
    position = tl.program_id(0).to(tl.int64)
    row = position // W
    wanted = (tl.load(greedy + row) == 0) & (tl.load(top_p + row) < 1.0) & (tl.load(top_k + row) >= V)
    if wanted:
        heat = tl.load(temperature + row)
        g = tl.arange(0, GP)
        peak = tl.div_rn(tl.max(tl.load(tops + position * G + g, mask=g < G, other=-float("inf")), 0), heat)
        peak = tl.maximum(peak, -3.4e38)  # a broken position's
        upper = tl.zeros((BLOCK,), tl.int32)
        lower = tl.zeros((BLOCK,), tl.int32)
        for i in range(num_blocks):
            columns = (tl.program_id(1) * num_blocks + i) * BLOCK + tl.arange(0, BLOCK)
            x = load_scaled(logits + position * stride, columns, V, heat)
            more_upper, more_lower = mass_halves(x, peak)
            upper += more_upper
            lower += more_lower
        tl.store(masses + position * CP + tl.program_id(1), tl.sum(joined(upper, lower), 0))


@triton.jit
def _candidates(logits, V, tops, G, heat, chosen, NUM: tl.constexpr, GP: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every scaled logit above the bound, [NUM, GROUP] with -inf between them."""
    g = tl.arange(0, GP)
    x = tl.div_rn(tl.load(tops + g, mask=g < G, other=-float("inf")), heat)
    # The largest value of which NUM + 1 maxima are not below; at most NUM are above it.
    bound = -float("inf")
    one = (x > -float("inf")).to(tl.int32)
    if tl.sum(one, 0) > NUM:
        bound = search_block(x, one * 0, one, (tl.sum(one, 0) * 0 + NUM + 1).to(tl.float64))
    is_chosen = x > bound
    place = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(chosen + place, g, mask=is_chosen)
    tl.debug_barrier()  # other threads read it
    n = tl.arange(0, NUM)
    group = tl.load(chosen + n, mask=n < tl.sum(is_chosen.to(tl.int32), 0), other=V)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    columns = tl.where(group[:, None] < V, columns, V)
    found = load_scaled(logits, columns, V, heat)
    return tl.where(found > bound, found, -float("inf"))


@triton.jit
def _among_candidates(x, peak, top_k, top_p, total, is_limited, is_nucleus):  # type: ignore[no-untyped-def]
    """Threshold of top_k and top_p within the block `x`, and whether the block was enough to know it."""
    present = (x > -float("inf")).to(tl.int32)
    threshold = -float("inf")
    num = tl.sum(present)
    decided = (is_limited == 0) | (num >= top_k)
    if is_limited & decided:
        threshold = search_block(x, present * 0, present, top_k.to(tl.float64))
    if is_nucleus & decided:
        left = tl.where(x >= threshold, x, -float("inf"))
        upper, lower = mass_halves(left, peak)
        mass = tl.sum(joined(upper, lower))
        wanted = top_p.to(tl.float64) * tl.where(is_limited, mass, total).to(tl.float64)
        decided = mass.to(tl.float64) >= wanted
        if decided:
            threshold = search_block(left, upper, lower, wanted)
    return threshold, decided


@triton.jit
def _among_all(logits, V, heat, peak, top_k, top_p, total, is_limited, is_nucleus, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same threshold, searched in the whole vocabulary."""
    threshold = -float("inf")
    if is_limited:
        threshold = search_all(logits, V, heat, peak, threshold, top_k.to(tl.float64), COUNT, BLOCK)
    if is_nucleus:
        mass = total
        if is_limited:
            mass, _, _ = sum_above(logits, V, heat, peak, threshold, threshold, MASS, BLOCK)
        wanted = top_p.to(tl.float64) * mass.to(tl.float64)
        threshold = search_all(logits, V, heat, peak, threshold, wanted, MASS, BLOCK)
    return threshold


@triton.jit
def _threshold_kernel(
    logits, stride, V, tops, G, temperature, greedy, top_k, top_p, min_p, masses, num_chunks, chosen, thresholds, W,
    NUM: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    row = position // W
    k, p, m = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    is_limited, is_nucleus = k < V, p < 1.0
    threshold = -float("inf")
    if (tl.load(greedy + row) == 0) & (is_limited | is_nucleus | (m > 0.0)):
        logits += position * stride
        tops += position * G
        heat = tl.load(temperature + row)
        g = tl.arange(0, GP)
        peak = tl.div_rn(tl.max(tl.load(tops + g, mask=g < G, other=-float("inf")), 0), heat)
        if (is_limited | is_nucleus) & (peak > -float("inf")):
            c = tl.arange(0, CP)
            counted = tl.where(is_nucleus & (is_limited == 0), num_chunks, 0)
            total = tl.sum(tl.load(masses + position * CP + c, mask=c < counted, other=0), 0)
            x = _candidates(logits, V, tops, G, heat, chosen + position * NUM, NUM, GP, GROUP)
            threshold, decided = _among_candidates(x, peak, k, p, total, is_limited, is_nucleus)
            if not decided:
                threshold = _among_all(logits, V, heat, peak, k, p, total, is_limited, is_nucleus, BLOCK)
        if m > 0.0:
            threshold = tl.maximum(threshold, peak + log(m))
    tl.store(thresholds + position, threshold)


def filter_threshold(
    logits: Tensor, width: int, temperature: Tensor, greedy: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Threshold [T] float32 on logit / temperature of every position: tokens at or above it are kept, ties too.

    `logits` [T, V], float32 or 16 bits, `width` positions a row; the rest is by row, [R]: `temperature`, `top_p`,
    `min_p` float32, `greedy` bool, `top_k` int64 (V: off). -inf where a row is greedy or filters nothing. A position
    with a NaN or inf is broken and its threshold means nothing. The reference is `server.sampling.filters`.
    """
    num_positions, vocab_size = logits.shape
    device = logits.device
    num_chunks, num_blocks, bound = chunks(num_positions, vocab_size, device)
    num_groups = runtime.ceil_div(vocab_size, GROUP)
    tops = torch.empty(num_positions, num_groups, dtype=torch.float32, device=device)
    masses = torch.empty(num_positions, bound, dtype=torch.int64, device=device)
    chosen = torch.empty(num_positions, NUM_CANDIDATES, dtype=torch.int32, device=device)
    thresholds = torch.empty(num_positions, dtype=torch.float32, device=device)
    power = runtime.next_power_of_2(num_groups)
    shared = (logits, logits.stride(0), vocab_size, tops, num_groups)
    grid = (num_positions, num_chunks)
    _groups_kernel[grid](*shared, num_blocks, GROUP=GROUP, BLOCK=BLOCK)
    _mass_kernel[grid](
        *shared, temperature, greedy, top_k, top_p, masses, width, num_blocks, GP=power, CP=bound, BLOCK=BLOCK
    )
    _threshold_kernel[(num_positions,)](
        *shared, temperature, greedy, top_k, top_p, min_p, masses, num_chunks, chosen, thresholds, width,
        NUM=NUM_CANDIDATES, GROUP=GROUP, GP=power, CP=bound, BLOCK=_SEARCH_BLOCK, num_warps=_SEARCH_WARPS,
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
