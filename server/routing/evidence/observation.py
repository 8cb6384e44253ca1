"""What one finished request says about its arm."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, slots=True)
class Observation:
    """One request of the candidate's or the baseline's arm, handed over when it ends.

    `key` is `key_number` of the routing key, `finished_s` seconds of any one clock, `running` the requests that the
    arm's engine ran when this one was admitted. Times are milliseconds: `ttft_ms` from arrival to the first token,
    `itl_ms` the 95 % quantile of the request's own per-token intervals, `tpot_ms` its mean interval, `e2e_ms` from
    arrival to the end. `tokens_per_s` is output tokens over the decode time. `compression_ratio` and `garbled` come
    from `quality.read`. None: the request has no such number (an error has no times, one token no interval). Of a
    request whose client left, times are how long it had waited by then: less than they would have become.
    """

    key: int
    finished_s: float
    running: int = 1
    error: bool = False
    ttft_ms: float | None = None
    itl_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    tokens_per_s: float | None = None
    output_tokens: float | None = None
    compression_ratio: float | None = None
    garbled: bool = False


def key_number(key: str) -> int:
    """63 bits that stand for `key` in evidence and ledger: who asked is not written down."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
