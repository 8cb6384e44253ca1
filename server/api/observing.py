"""What a request that ended says of its arm, for whoever compares arms."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.generation import Part
from server.core import FinishReason
from server.routing.evidence.observation import Observation, key_number
from server.routing.evidence.quality import read

ITL_QUANTILE = 0.95


def observation(key: str, finished_s: float, running: int, parts: Sequence[Part]) -> Observation | None:
    """Of the request's first choice; an error is an error whichever choice had it. None: it never began.

    A client that left tells how long it had waited by then, for its first token or for all of them: who is made to wait
    gives up, and an arm that makes people give up must not look quick for it. How long its answer was tells nothing.

    Parts must have been made with `keep_text` and `keep_gaps`.
    """
    reasons = {part.timer.reason for part in parts}
    number = key_number(key)
    if FinishReason.ERROR in reasons:
        return Observation(number, finished_s, running, error=True)
    if not parts or None in reasons:
        return None
    left = FinishReason.ABORT in reasons
    timer, text = parts[0].timer, "".join(parts[0].text.kept or ())
    quality = read(text)
    num_after, decode_s = timer.num_tokens - 1, timer.decode_s
    tpot_s = decode_s / num_after if num_after > 0 else None
    return Observation(
        key=number,
        finished_s=finished_s,
        running=running,
        ttft_ms=_ms(timer.e2e_s if left and timer.ttft_s is None else timer.ttft_s),
        itl_ms=_ms(_quantile(timer.gaps or (), ITL_QUANTILE)),
        tpot_ms=_ms(tpot_s),
        e2e_ms=_ms(timer.e2e_s),
        tokens_per_s=1 / tpot_s if tpot_s else None,
        output_tokens=None if left else float(timer.num_tokens),
        compression_ratio=None if left else quality.compression_ratio,
        garbled=quality.garbled,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _quantile(gaps: Sequence[tuple[float, int]], share: float) -> float | None:
    """Of intervals: n tokens after a gap g are n intervals of g / n."""
    intervals = sorted((gap / count, count) for gap, count in gaps)
    wanted, seen = share * sum(count for _, count in intervals), 0
    for interval, count in intervals:
        seen += count
        if seen >= wanted:
            return interval
    return None
