"""How likely the next draft token is accepted, learned online per class of draft and per position.

Counts are of draft tokens only, never of the bonus token, and a position counts only where verification reached it:
the estimate is the conditional P(draft j accepted | drafts before j accepted) of Leviathan et al. (arXiv 2211.17192),
without their assumption that it is the same at every position.
"""

from __future__ import annotations

from collections.abc import Mapping


class _ClassStatistics:
    """Exponentially forgotten trials and acceptances of one class, per draft position."""

    __slots__ = ("accepted", "survival", "trials")

    def __init__(self) -> None:
        self.trials: list[float] = []
        self.accepted: list[float] = []
        self.survival: list[float] = []


class AcceptanceTracker:
    """EWMA of conditional acceptance with a prior.

    `window` is the effective sample size: how many recent trials of a position the estimate remembers. The prior weighs
    as much as `prior_strength` trials. At the first position it is the class's own of `priors`, else `prior`; at later
    ones the estimate of the position before, but at least `prior`, since text that follows a source tends to go on
    following it. Positions that a step did not reach forget too, `stale_factor` times more slowly: what is no longer
    drafted drifts back to the prior, is tried again and so can not stay condemned by old evidence.
    """

    def __init__(
        self,
        prior: float = 0.5,
        priors: Mapping[str, float] | None = None,
        prior_strength: float = 3.0,
        window: int = 64,
        stale_factor: int = 8,
    ) -> None:
        self._prior = prior
        self._priors = dict(priors or {})
        for name, value in {"prior": prior, **self._priors}.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: {value} is not valid; use 0 to 1")
        self._strength = prior_strength
        self._keep = 1.0 - 1.0 / window
        self._keep_stale = 1.0 - 1.0 / (window * stale_factor)
        self._classes: dict[str, _ClassStatistics] = {}

    def update(self, cls: str, num_drafted: int, num_accepted: int, count: int = 1) -> None:
        """A row's verdict, or that of `count` rows: of `num_drafted` drafts of class `cls` the first `num_accepted`
        were accepted."""
        if not 0 <= num_accepted <= num_drafted:
            raise ValueError(f"num_accepted: {num_accepted} is not valid; use 0 to num_drafted ({num_drafted})")
        if num_drafted == 0:
            return
        statistics = self._classes.get(cls)
        if statistics is None:
            statistics = self._classes[cls] = _ClassStatistics()
        trials, accepted = statistics.trials, statistics.accepted
        while len(trials) < num_drafted:
            trials.append(0.0)
            accepted.append(0.0)
        keep, stale = self._keep**count, self._keep_stale**count
        new = (1.0 - keep) / (1.0 - self._keep) if self._keep < 1.0 else float(count)
        for position in range(num_accepted):
            trials[position] = trials[position] * keep + new
            accepted[position] = accepted[position] * keep + new
        num_reached = num_accepted
        if num_accepted < num_drafted:
            trials[num_accepted] = trials[num_accepted] * keep + new
            accepted[num_accepted] *= keep
            num_reached += 1
        for position in range(num_reached, len(trials)):
            trials[position] *= stale
            accepted[position] *= stale
        statistics.survival = []

    def survival(self, cls: str, k: int) -> list[float]:
        """P(draft j is accepted) for j = 0 … k - 1: cumulative products of the conditional estimates."""
        statistics = self._classes.get(cls)
        if statistics is None:
            statistics = self._classes[cls] = _ClassStatistics()
        if len(statistics.survival) < k:
            statistics.survival = self._survival(statistics, self._priors.get(cls, self._prior), k)
        return statistics.survival[:k]

    def _survival(self, statistics: _ClassStatistics, prior: float, k: int) -> list[float]:
        result: list[float] = []
        product, known = 1.0, len(statistics.trials)
        for position in range(k):
            estimate = prior
            if position < known:
                accepted, trials = statistics.accepted[position], statistics.trials[position]
                estimate = (accepted + prior * self._strength) / (trials + self._strength)
            product *= estimate
            result.append(product)
            prior = max(estimate, self._prior)
        return result

    def conditional(self, cls: str, position: int) -> float:
        """The estimate of P(draft `position` accepted | those before it accepted)."""
        survival = self.survival(cls, position + 1)
        before = survival[position - 1] if position else 1.0
        return survival[position] / before if before > 0.0 else 0.0

    def classes(self) -> list[str]:
        """Names of the classes seen so far."""
        return list(self._classes)
