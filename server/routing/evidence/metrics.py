"""Which numbers decide, by which estimator, and what counts as harm. One estimator a metric.

| metric                                | estimator                                                        | harm    |
|---------------------------------------|------------------------------------------------------------------|---------|
| ttft, itl, tpot, e2e                  | 95 % quantile over requests, candidate / baseline - 1            | higher  |
| tokens_per_s                          | mean over requests, candidate / baseline - 1                     | lower   |
| output_tokens, compression            | mean over requests, candidate / baseline - 1                     | either  |
| errors, garbled                       | share of the coin: incidents that are the candidate's, less 1/2  | higher  |

Quantiles and means are standardised over strata (stage and running batch), their variances clustered by routing key
and time block. Multiplicity: every metric's interval has its equal share of `alpha` (Bonferroni, dependence does not
matter), both sides together. Were each interval exact, the probability that any is ever wrong, and with it that an
experiment between two equal arms ever ends in a verdict, would be at most `alpha`. The coin's is exact. Those of
quantiles and means hold as clusters become many: in simulations (benchmarks/ab_simulation.py) tokens_per_s alone is
wrong several times as often as its share, the latencies hardly ever, and all together less often than `alpha`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Estimator = Literal["quantile", "ratio", "difference", "incidents"]
Harm = Literal["higher", "lower", "either"]
Claim = Literal["worse", "better", "undecided"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `column` is where its numbers are, `quantile` which one, `scale` the mixture's standard deviation.

    `scale` has the unit of what is bounded: shares of requests for a quantile, a logarithm of the ratio, nats.
    """

    name: str
    estimator: Estimator
    harm: Harm
    column: str = ""
    quantile: float = 0.0
    scale: float = 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of a metric at a moment. `lower` and `upper` hold at every moment with probability 1 - `alpha`.

    Effects are relative changes (0.2: 20 % higher than the baseline), differences, or shares of incidents less 1/2, as
    the metric's estimator says; infinite bounds mean that too little is known. `clusters` is the effective number
    of independent keys or time blocks of the poorer arm.
    """

    metric: str
    claim: Claim
    estimate: float
    lower: float
    upper: float
    alpha: float
    num_candidate: int
    num_baseline: int
    clusters: float


def _latency(name: str) -> Metric:
    return Metric(name, "quantile", "higher", f"{name}_ms", quantile=0.95, scale=0.05)


METRICS: Final = (
    _latency("ttft"),
    _latency("itl"),
    _latency("tpot"),
    _latency("e2e"),
    Metric("tokens_per_s", "ratio", "lower", "tokens_per_s", scale=0.15),
    Metric("output_tokens", "ratio", "either", "output_tokens", scale=0.2),
    Metric("compression", "ratio", "either", "compression_ratio", scale=0.2),
    Metric("errors", "incidents", "higher"),
    Metric("garbled", "incidents", "higher"),
)
SHARES: Final = 10
"""Parts that `alpha` is divided into: as many as there are metrics, or more."""


def claim_of(harm: Harm, lower: float, upper: float) -> Claim:
    """What an interval of the effect says about a metric."""
    if harm == "either":
        return "worse" if lower > 0 or upper < 0 else "undecided"
    if harm == "lower":
        lower, upper = -upper, -lower
    return "worse" if lower > 0 else "better" if upper < 0 else "undecided"
