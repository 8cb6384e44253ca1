"""How much to draft where a hybrid drafter copies or predicts row by row. Host only.

Acceptance is learned of copies, per class of match, and of the chain apart, so neither spoils the other's estimate: a
draft that copied m tokens and went on with the chain tells of its first m only. On ragged batches the chain's length
is chosen after the matches are known and rows are cut afterwards; elsewhere one k holds for copies and chain alike,
chosen for the matches that the host knows when it plans the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from draft_models.hybrid import LEARNED, HybridDrafter
from draft_models.hybrid_device import HybridDeviceDrafter
from draft_models.suffix import CLASS_NAMES, Match
from server.core import Phase
from server.engine.gpu.runner import GpuRunner
from server.engine.result import StepResult
from server.engine.runner import Runner
from server.engine.speculation import ANY, Speculation
from server.spec.acceptance import AcceptanceTracker
from server.spec.cost_table import CostTable
from server.spec.mixture import Mixture, choose_mixture, loss_of_copying, plan_chain, plan_mixture, take_copy

_FIRST_ACCEPTANCE = {"start": 0.5, "1": 0.3, "2": 0.45, "3-4": 0.6, "5-8": 0.75, "9+": 0.85}
"""Of copies by length of the match, before anything is known: about what SmolLM2-135M accepts. The longest are tried at
once, the shortest where the chain is no good."""

_PROBE_DRAFTS = 2
_ANY_LENGTH = -1


def _prior(name: str) -> float:
    length = name.partition(":")[2]
    return _FIRST_ACCEPTANCE.get(length.removesuffix("?"), 0.5) * (0.6 if length.endswith("?") else 1.0)


class MixedSpeculation(Speculation):
    """Speculation of a hybrid drafter, and its Arbiter (see draft_models.hybrid)."""

    def __init__(
        self, costs: CostTable | None, max_draft_tokens: int, drafter: HybridDrafter | HybridDeviceDrafter, ragged: bool
    ) -> None:
        super().__init__(costs, max_draft_tokens, trims=ragged)
        self.drafter = drafter
        self.acceptance = AcceptanceTracker(priors={name: _prior(name) for name in CLASS_NAMES})
        self._probing: set[int] = set()
        self._chain = (0, 0)
        self._lengths: dict[tuple[int, int], int] = {}
        drafter.arbiter = self

    # -- one k for all rows --------------------------------------------------------------------------------

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        """See Speculation; says to the drafter whether its chain runs in that step."""
        self._lengths.clear()
        if not isinstance(self.drafter, HybridDeviceDrafter) or self.costs is None or num_eligible == 0:
            return super().num_draft_tokens(num_rows, num_eligible)
        mixture = self._mixture(self.drafter, num_rows, num_eligible)
        planned, self._state = plan_mixture(self._state, self.costs, mixture, self.tiers)
        self.drafter.chain = planned.chain
        self.paused = self._state.previous_k == 0
        return planned.k

    def _mixture(self, drafter: HybridDeviceDrafter, num_rows: int, num_eligible: int) -> Mixture:
        known = Counter(match.name for match in drafter.foreseen())
        # Which of the sequences have rows is not known here; beyond as many as there are rows, each counts for less.
        share = min(1.0, num_eligible / max(1, known.total()))
        copies = [(self._survival(name), count * share) for name, count in known.items()]
        return Mixture(num_rows, num_eligible, copies, self._survival(LEARNED), self._context)

    def _survival_of_any(self) -> list[float]:
        """Of the chain: what it is paid for."""
        return self._survival(LEARNED)

    def follows(self, phase: Phase, num_rows: int) -> bool:
        """See Speculation. Prompts are the chain's: it sees them if it is what would draft for `num_rows` rows, or, on
        a CPU, what drafted in the last step.
        """
        if phase is Phase.VERIFY or self.costs is None or not isinstance(self.drafter, HybridDeviceDrafter):
            return super().follows(phase, num_rows) and (phase is Phase.VERIFY or self.drafter.chain)
        mixture = self._mixture(self.drafter, num_rows, num_rows)
        self.drafter.chain = choose_mixture(self._state, self.costs, mixture, self.tiers).chain
        return self.drafter.chain

    def lengths(self, match: Match, k: int) -> int:
        """See Arbiter. A probe is of the length that is known here: what it turns out to be is no better."""
        found = self.lengths_of(match.family, k)
        if not found >> min(match.length, 9) & 1 and self._takes(
            match.name, self._survival(match.name)[:k], self._survival(LEARNED)[:k]
        ):
            return _ANY_LENGTH
        return found

    def lengths_of(self, family: int, k: int) -> int:
        """See Arbiter."""
        key = family, k
        if key not in self._lengths:
            self._lengths[key] = self._worth_copying(family, self._survival(LEARNED)[:k])
        return self._lengths[key]

    def _worth_copying(self, family: int, learned: Sequence[float]) -> int:
        names = CLASS_NAMES[family : family + 10]
        losses = [loss_of_copying(self._survival(name)[: len(learned)], learned) for name in names]
        return sum(1 << length for length, loss in enumerate(losses) if loss <= 0.0)

    # -- ragged batches ------------------------------------------------------------------------------------

    def divide(self, matches: Sequence[Match | None], limits: Sequence[int], context: float) -> tuple[int, list[bool]]:
        """See Arbiter."""
        learned = self._survival(LEARNED)
        copies = [[] if m is None else self.acceptance.survival(m.name, len(m.tokens)) for m in matches]
        self._probing.clear()
        copying: list[bool] = []
        for r, (match, copy, limit) in enumerate(zip(matches, copies, limits, strict=True)):
            takes = match is not None and self._takes(match.name, copy, learned[:limit])
            if takes and sum(copy) < sum(learned[:limit]):
                self._probing.add(r)
            copying.append(takes)
        if self.costs is None:
            return self.max_draft_tokens, copying
        chained = [[] if takes else learned[:limit] for takes, limit in zip(copying, limits, strict=True)]
        before = self._state
        length, self._state = plan_chain(before, self.costs, copies, chained, context, self.tiers)
        self._chain = (sum(map(bool, chained)), length)
        if length and self._state.previous_k == 0:
            self._probing.update(r for r, row in enumerate(chained) if row)
        return length, copying

    def _worth(self, costs: CostTable, classes: Sequence[str], valid: Sequence[int], context: float) -> list[int]:
        """Probes are cut to few drafts at most: what those cost is paid for already."""
        counts = super()._worth(costs, classes, valid, context)
        least = [min(n, _PROBE_DRAFTS) if r in self._probing else 0 for r, n in enumerate(valid)]
        return [max(pair) for pair in zip(counts, least, strict=True)]

    # -- what was accepted ---------------------------------------------------------------------------------

    def _survival(self, name: str) -> list[float]:
        return self.acceptance.survival(name, self.max_draft_tokens)

    def _takes(self, name: str, copy: Sequence[float], learned: Sequence[float]) -> bool:
        takes, self._state = take_copy(self._state, name, copy, learned)
        return takes

    def _verdicts(
        self, result: StepResult, counts: Sequence[bool], pairs: Mapping[tuple[int, int], int]
    ) -> Mapping[tuple[str, int, int], int]:
        if result.classes is None:
            return super()._verdicts(result, counts, pairs)
        found: Counter[tuple[str, int, int]] = Counter()
        for row, (name, drafted, accepted) in enumerate(
            zip(result.classes, result.num_drafted, result.num_accepted, strict=True)
        ):
            if drafted and counts[row]:
                copied = drafted if name == LEARNED or result.num_copied is None else result.num_copied[row]
                found[name, min(drafted, copied), min(accepted, copied)] += 1
        return found

    def _probes_of(self, name: str) -> tuple[str | None, ...]:
        if name == ANY:
            return super()._probes_of(name)
        return name, f"copy {name}" if name != LEARNED else "chain"

    def _chain_of(self, result: StepResult) -> tuple[int, int]:
        """See Speculation. A step that nothing was to be drafted in has not asked how long its chain is to be."""
        return self._chain if self.trims and any(result.num_drafted) else super()._chain_of(result)

    def _verify_ms(self, costs: CostTable, result: StepResult) -> float:
        """Where steps are timed whole, with the chain, its part is what it was measured to be."""
        if not isinstance(self.drafter, HybridDeviceDrafter) or not result.chain_tokens:
            return result.verify_ms
        ms = result.verify_ms - costs.draft_ms(len(result.emitted), result.chain_tokens)
        return max(ms, 0.1 * result.verify_ms)


def make_speculation(costs: CostTable | None, max_draft_tokens: int, runner: Runner | GpuRunner) -> Speculation:
    """Draft-length control for the drafter of `runner`."""
    drafter = runner.drafter
    if isinstance(drafter, HybridDrafter | HybridDeviceDrafter):
        return MixedSpeculation(costs, max_draft_tokens, drafter, runner.ragged)
    trims = runner.ragged and drafter is not None and not drafter.has_distribution
    return Speculation(costs, max_draft_tokens if drafter is not None else 0, trims)
