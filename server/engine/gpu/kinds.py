"""Sampling classes: what a step's rows ask of verification, all together. One captured graph each."""

from __future__ import annotations

from enum import IntEnum

from server.core import SamplingParams


class SamplingClass(IntEnum):
    """Rising demands: a step runs as the highest class of its rows, and what a row does not ask for is neutral."""

    GREEDY = 0
    SAMPLED = 1
    FILTERED = 2
    ADJUSTED = 3
    FULL = 4


def class_of(params: SamplingParams, early: bool) -> SamplingClass:
    """`early`: the row may not end yet (min_tokens), so its ends are masked."""
    if params.logprobs is not None:
        return SamplingClass.FULL
    if params.has_penalties or params.logit_bias or early:
        return SamplingClass.ADJUSTED
    if params.greedy:
        return SamplingClass.GREEDY
    if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
        return SamplingClass.FILTERED
    return SamplingClass.SAMPLED
