"""Narrowing the search for a filter's threshold, all of a step's positions at once, in four kernels.

1. The largest logit of every group of neighbours.
2. A plan by position: how far below the largest logit the threshold probably is. The groups' maxima are known exactly,
   the rest is estimated from a sample (stratified sampling: Cochran 1977, "Sampling techniques", section 5). The
   plan is a few rising levels around the estimate; a small top_k needs but one: k groups have a maximum above it.
3. Exact sums above every level. Between two of them lies the threshold.
4. The logits between those two, as a list.

Nothing here can make the threshold wrong: estimates only say how long the list gets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels import runtime
from server.kernels.masses import joined, load_scaled, mass_halves
from server.kernels.slots import filters_of, is_greedy, temperature_of

GROUP = 8 if runtime.INTERPRETED else 64
NUM_SAMPLES = 2
"""Neighbours that stand for the rest of their group."""
CAPACITY = 64 if runtime.INTERPRETED else 8192
"""Logits of a position's list."""
MOST_FEW = tl.constexpr(1024)
"""A top_k beyond this is estimated."""
NOTHING, FEW, COUNTED, WEIGHED = (tl.constexpr(i) for i in range(4))
"""How a position is searched: not at all, among what is above its one level, by counting, by mass."""
LEVELS = tl.constexpr(5)
_PADDED = tl.constexpr(8)
_MAX_DISTANCE = tl.constexpr(28.0)  # exp(-28) is less than one unit of mass
_MARGIN = tl.constexpr(3.5)  # standard deviations of an estimate that the levels span


@triton.jit
def groups_kernel(
    logits, stride, V, tops, G, slots, floats, ints, W, num_blocks,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Largest finite logit of each group, [T, G] float32; -inf if there is none. Where nothing is filtered: garbage."""
    position = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK // GROUP)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + position // W)
    k, p, m = filters_of(floats, ints, slot)
    if (is_greedy(ints, slot) == 0) & ((k < V) | (p < 1.0) | (m > 0.0)):
        for i in range(num_blocks):
            first = (tl.program_id(1) * num_blocks + i) * (BLOCK // GROUP)
            columns = (first + groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            x = tl.load(logits + position * stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            x = tl.where(tl.abs(x) < float("inf"), x, -float("inf"))
            tl.store(tops + position * G + first + groups, tl.max(x, 1), mask=first + groups < G)


@triton.jit
def _above(tops, at_top, samples, at_sample, level):  # type: ignore[no-untyped-def]
    """Estimated sum above `level`."""
    exact = tl.sum(tl.where(tops >= level, at_top, 0.0), 0)
    return exact + tl.sum(tl.sum(tl.where(samples >= level, at_sample, 0.0), 1), 0)


@triton.jit
def _distance(tops, at_top, samples, at_sample, peak, furthest, wanted):  # type: ignore[no-untyped-def]
    """How far below `peak` the estimated sum reaches `wanted`, rounded up; finer the nearer it is."""
    near, far = tl.full((), 0, tl.int32), furthest.to(tl.int32, bitcast=True)
    for _ in range(14):
        middle = near + ((far - near) >> 1)
        got = _above(tops, at_top, samples, at_sample, peak - middle.to(tl.float32, bitcast=True))
        near = tl.where(got >= wanted, near, middle)
        far = tl.where(got >= wanted, middle, far)
    return far.to(tl.float32, bitcast=True)


@triton.jit
def _span(tops, at_top, samples, at_sample, peak, center, furthest, wanted, EXTRA: tl.constexpr, SHARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Distances of the highest level, the lowest that a sum's error explains, and the lowest a list has room for."""
    level = peak - center
    got, total = _above(tops, at_top, samples, at_sample, level), tl.sum(at_top, 0) + tl.sum(tl.sum(at_sample, 1), 0)
    share = got / tl.maximum(total, 1e-30)
    square = at_sample * at_sample
    over = tl.sum(tl.sum(tl.where(samples >= level, square, 0.0), 1), 0)
    under = tl.sum(tl.sum(tl.where(samples >= level, 0.0, square), 1), 0)
    margin = _MARGIN * tl.sqrt((1.0 - share) * (1.0 - share) * over + share * share * under)
    one = (tops > -float("inf")).to(tl.float32)
    ones = tl.where(at_sample > 0.0, SHARE, 0.0)
    room = _above(tops, one, samples, ones, level) + EXTRA
    high, center_low, low, low_far, list_low, list_far = center * 0.0, center, center, furthest, center, furthest
    for _ in range(8):
        middle = (high + center_low) * 0.5
        enough = _above(tops, at_top, samples, at_sample, peak - middle) >= wanted - margin
        high = tl.where(enough, high, middle)
        center_low = tl.where(enough, middle, center_low)
        middle = (low + low_far) * 0.5
        enough = _above(tops, at_top, samples, at_sample, peak - middle) >= wanted + margin
        low = tl.where(enough, low, middle)
        low_far = tl.where(enough, middle, low_far)
        middle = (list_low + list_far) * 0.5
        enough = _above(tops, one, samples, ones, peak - middle) >= room
        list_low = tl.where(enough, list_low, middle)
        list_far = tl.where(enough, middle, list_far)
    return high, low_far, tl.maximum(list_low, low_far)


@triton.jit
def _few_level(x, peak, k):  # type: ignore[no-untyped-def]
    """A level that at least `k` of the groups' maxima reach; -inf if there are fewer groups with one."""
    furthest = tl.max(tl.where(x > -float("inf"), peak - x, 0.0), 0)
    near, far = tl.full((), 0, tl.int32), tl.minimum(furthest, 3.0e38).to(tl.int32, bitcast=True) + 1
    for _ in range(16):
        middle = near + ((far - near) >> 1)
        enough = tl.sum((x >= peak - middle.to(tl.float32, bitcast=True)).to(tl.int32), 0) >= k
        near = tl.where(enough, near, middle)
        far = tl.where(enough, middle, far)
    level = peak - far.to(tl.float32, bitcast=True)
    return tl.where(tl.sum((x >= level).to(tl.int32), 0) >= k, level, -float("inf"))


@triton.jit
def plan_kernel(
    logits, stride, V, tops, G, slots, floats, ints, modes, peaks, levels, lengths, W,
    NUM: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, EXTRA: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """A position's mode [T] int32, largest scaled logit [T], levels [T, 5] float32 rising, and a list's length of 0."""
    position = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + position // W)
    k, p, m = filters_of(floats, ints, slot)
    mode = tl.full((), NOTHING, tl.int32)
    if (is_greedy(ints, slot) == 0) & ((k < V) | (p < 1.0) | (m > 0.0)):
        heat = temperature_of(floats, slot)
        g = tl.arange(0, GP)
        raw = tl.load(tops + position * G + g, mask=g < G, other=-float("inf"))
        x = tl.div_rn(raw, heat)
        peak = tl.max(x, 0)
        tl.store(peaks + position, peak)
        i = tl.arange(0, _PADDED)
        to = levels + position * LEVELS + i
        if (peak > -float("inf")) & (k < V) & (k <= tl.minimum(G // 2, MOST_FEW)):
            mode = tl.full((), FEW, tl.int32)
            tl.store(to, tl.zeros((_PADDED,), tl.float32) + _few_level(x, peak, k), mask=i < LEVELS)
        elif (peak > -float("inf")) & ((k < V) | (p < 1.0)):
            mode = tl.where(k < V, COUNTED, WEIGHED).to(tl.int32)
            offset = NUM * ((g * 7) % (GROUP // NUM))
            columns = (g * GROUP + offset)[:, None] + tl.arange(0, NUM)[None, :]
            sample = tl.load(logits + position * stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            counts = (sample < raw[:, None]) & (sample > -float("inf"))  # a maximum stands for itself
            samples = tl.where(counts, tl.div_rn(sample, heat), -float("inf"))
            furthest = tl.max(tl.max(tl.where(counts, peak - samples, 0.0), 1), 0)
            furthest = tl.minimum(tl.maximum(furthest, tl.max(tl.where(x > -float("inf"), peak - x, 0.0), 0)), 3.0e38)
            at_top = (x > -float("inf")).to(tl.float32)
            at_sample = tl.where(counts, GROUP / NUM, 0.0)
            wanted = k.to(tl.float32)
            if mode == WEIGHED:
                furthest = tl.full((), _MAX_DISTANCE, tl.float32)
                at_top = tl.exp(x - peak)
                at_sample = at_sample * tl.exp(samples - peak)
                wanted = p * (tl.sum(at_top, 0) + tl.sum(tl.sum(at_sample, 1), 0))
            center = _distance(x, at_top, samples, at_sample, peak, furthest, wanted)
            high, low, lowest = _span(x, at_top, samples, at_sample, peak, center, furthest, wanted, EXTRA, GROUP / NUM)
            level = tl.where(i == 0, -float("inf"), tl.where(i == 1, peak - lowest, peak - low))
            level = tl.where(i == 3, peak - (low + high) * 0.5, level)
            level = tl.where(i == 4, peak - high, level)
            tl.store(to, level, mask=i < LEVELS)
    tl.store(modes + position, mode)
    tl.store(lengths + position, 0)


@triton.jit
def _more(upper_sum, lower_sum, x, level, upper, lower):  # type: ignore[no-untyped-def]
    within = x >= level
    return upper_sum + tl.where(within, upper, 0), lower_sum + tl.where(within, lower, 0)


@triton.jit
def sums_kernel(
    logits, stride, V, slots, floats, modes, peaks, levels, sums, W, num_blocks, num_chunks,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Exact sums of each chunk of a position at or above its levels, [T, chunks, 5] int64: of mass, or of ones."""
    position = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mode = tl.load(modes + position)
    if (mode == COUNTED) | (mode == WEIGHED):
        heat, peak = temperature_of(floats, tl.load(slots + position // W)), tl.load(peaks + position)
        at = levels + position * LEVELS
        t1, t2, t3, t4 = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
        nothing = tl.zeros((BLOCK,), tl.int32)
        u0, u1, u2, u3, u4 = nothing, nothing, nothing, nothing, nothing
        l0, l1, l2, l3, l4 = nothing, nothing, nothing, nothing, nothing
        for i in range(num_blocks):
            columns = (tl.program_id(1) * num_blocks + i) * BLOCK + tl.arange(0, BLOCK)
            x = load_scaled(logits + position * stride, columns, V, heat)
            upper, lower = mass_halves(x, peak)
            if mode == COUNTED:
                upper, lower = nothing, (x > -float("inf")).to(tl.int32)
            u0 += upper
            l0 += lower
            u1, l1 = _more(u1, l1, x, t1, upper, lower)
            u2, l2 = _more(u2, l2, x, t2, upper, lower)
            u3, l3 = _more(u3, l3, x, t3, upper, lower)
            u4, l4 = _more(u4, l4, x, t4, upper, lower)
        to = sums + (position * num_chunks + tl.program_id(1)) * LEVELS
        tl.store(to, tl.sum(joined(u0, l0), 0))
        tl.store(to + 1, tl.sum(joined(u1, l1), 0))
        tl.store(to + 2, tl.sum(joined(u2, l2), 0))
        tl.store(to + 3, tl.sum(joined(u3, l3), 0))
        tl.store(to + 4, tl.sum(joined(u4, l4), 0))


@triton.jit
def bracket(mode, levels, sums, num_chunks, k, p, SP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a position's threshold lies, low <= threshold < high, from its levels and sums.

    Also the sum at or above `high` (int64), the sum of everything, the sum that the threshold is to reach (float64),
    and whether everything reaches it.
    """
    i = tl.arange(0, _PADDED)
    level = tl.load(levels + i, mask=i < LEVELS, other=float("inf"))
    low, high, above, total = tl.min(level, 0), float("inf"), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    wanted, is_reached = k.to(tl.float64), mode == FEW
    if mode != FEW:
        c = tl.arange(0, SP)
        is_there = (c < num_chunks)[:, None] & (i < LEVELS)[None, :]
        part = tl.load(sums + c[:, None] * LEVELS + i[None, :], mask=is_there, other=0)
        sum_at = tl.where(i < LEVELS, tl.sum(part, 0), -1)  # nothing reaches what is no level
        total = tl.max(sum_at, 0)
        if mode == WEIGHED:
            wanted = p.to(tl.float64) * total.to(tl.float64)
        last = tl.sum((sum_at.to(tl.float64) >= wanted).to(tl.int32), 0) - 1
        is_reached = last >= 0
        low = tl.max(tl.where(i == last, level, -float("inf")), 0)
        high = tl.min(tl.where(i == last + 1, level, float("inf")), 0)
        above = tl.sum(tl.where((i == last + 1) & (i < LEVELS), sum_at, 0), 0)
    return low, high, above, total, wanted, is_reached


@triton.jit
def collect_kernel(
    logits, stride, V, tops, G, slots, floats, ints, modes, levels, sums, num_sums, lengths, found, W, num_blocks,
    GROUP: tl.constexpr, CAPACITY: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """The scaled logits inside a position's bracket, in any order: `found` [T, CAPACITY] and how many there were."""
    position = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mode = tl.load(modes + position)
    if mode != NOTHING:
        slot = tl.load(slots + position // W)
        heat = temperature_of(floats, slot)
        k, p, _ = filters_of(floats, ints, slot)
        low, high, _, _, _, _ = bracket(
            mode, levels + position * LEVELS, sums + position * num_sums * LEVELS, num_sums, k, p, SP
        )
        least = low - 1e-5 * tl.abs(low) - 1e-30  # of a group's maximum; rounding of the quotient aside
        for i in range(num_blocks):
            columns = (tl.program_id(1) * num_blocks + i) * BLOCK + tl.arange(0, BLOCK)
            top = tl.load(tops + position * G + columns // GROUP, mask=columns < V, other=-float("inf"))
            x = load_scaled(logits + position * stride, tl.where(top / heat >= least, columns, V), V, heat)
            is_taken = (x >= low) & (x < high) & (x > -float("inf"))
            num = tl.sum(is_taken.to(tl.int32), 0)
            if num > 0:
                first = tl.atomic_add(lengths + position, num, sem="relaxed")
                place = first + tl.cumsum(is_taken.to(tl.int32), 0) - 1
                tl.store(found + position * CAPACITY + place, x, mask=is_taken & (place < CAPACITY))
