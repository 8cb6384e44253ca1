"""How much to draft: keeps acceptance and costs current and asks the policy. Host only.

Drafters whose drafts cost nothing (n-gram, suffix) draft first and are trimmed row by row, on ragged batches;
elsewhere one k
for all rows is chosen before anything is drafted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from server.core import Phase
from server.engine.result import StepResult
from server.engine.speculation_report import SpeculationReport
from server.spec.acceptance import AcceptanceTracker
from server.spec.cost_table import CostTable
from server.spec.policy import (
    PolicyState,
    RowsAlike,
    Survivals,
    best_draft,
    charge,
    choose_uniform,
    plan_ragged,
    plan_uniform,
)
from server.spec.policy import record as record_probe
from server.spec.types import Carry, Drafts

ANY = "any"
"""Acceptance class of a uniform choice: whatever the drafter proposes."""
TRIMS_WINDOW, UNIFORM_WINDOW = 64, 256
"""Trials that an estimate of acceptance remembers. One k for all rows is chosen from the trials of all of them: 64
would be those of one step of 64 rows."""
CORRECT_EVERY_MS, CORRECT_EVERY_STEPS = 5.0, 8
"""The cost table learns from a step once steps since the last one that it learned from took so long and are so many,
and from any that is of another kind than the one before. A correction costs the host a tenth of a millisecond, and what
was reckoned with the table before it must be reckoned again."""


def draft_tiers(max_draft_tokens: int) -> tuple[int, ...]:
    """The numbers of drafts that a step may have where all its rows have the same; 0 is one more."""
    return (*(k for k in (1, 2, 3, 5, 7, 10, 15) if k < max_draft_tokens), max_draft_tokens)


class Speculation:
    """Draft-length control of one engine. Without a cost table every step drafts `max_draft_tokens`.

    `trims`: choose per row after drafting rather than one k before it. `paused` says that the last choice was not to
    draft, whatever a probe did.
    """

    def __init__(self, costs: CostTable | None, max_draft_tokens: int, trims: bool) -> None:
        self.costs = costs
        self.max_draft_tokens = max_draft_tokens
        self.trims = trims
        self.acceptance = AcceptanceTracker(window=TRIMS_WINDOW if trims else UNIFORM_WINDOW)
        self.tiers = draft_tiers(max_draft_tokens)
        self.num_draft_steps = 0
        self.drafted_per_position = [0] * max_draft_tokens
        self.accepted_per_position = [0] * max_draft_tokens
        self.paused = False
        self.report = SpeculationReport()
        self._state = PolicyState()
        self._context = 1.0
        self._uncorrected_ms, self._uncorrected_steps = CORRECT_EVERY_MS, CORRECT_EVERY_STEPS
        self._last_kind = 0
        self._chain_rested = False

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        """Most drafts a row for a verify step of `num_rows` rows, `num_eligible` of which may draft at all."""
        if self.costs is None or self.trims or num_eligible == 0:
            return self.max_draft_tokens if num_eligible else 0
        survivals = self._survivals(num_eligible, num_rows)
        k, self._state = plan_uniform(self._state, self.costs, survivals, self._context, self.tiers)
        self.paused = self._state.previous_k == 0
        return k

    def _survivals(self, num_eligible: int, num_rows: int) -> Survivals:
        return RowsAlike(self._survival_of_any(), num_eligible, num_rows)

    def _survival_of_any(self) -> list[float]:
        """Of a draft where all rows have the same k."""
        return self.acceptance.survival(ANY, self.max_draft_tokens)

    def follows(self, phase: Phase, num_rows: int) -> bool:
        """Whether the drafter sees a step without drafts: a verify step that k = 0 was chosen for, or prompt chunks.

        A verify step is one that only looks whether plain decoding is faster, or one of the last before drafts are
        tried again: a chain starts from what the target made of the tokens before, as many as a chain is long.
        Prompts are worth it if drafting pays for `num_rows` rows, which is what will run once they have been read.
        """
        if self.costs is None or self.trims:
            return self.max_draft_tokens > 0
        if phase is Phase.VERIFY:
            return not self.paused or self._state.probe_in <= self.max_draft_tokens + 1
        survivals = self._survivals(num_rows, num_rows)
        return choose_uniform(self.costs, survivals, self._context, self.tiers, self._state.previous_k) > 0

    def trim(self, drafts: Drafts, carry: Carry) -> Drafts:
        """Drafts that are worth verifying: rows are cut to the choice of the policy."""
        valid = drafts.num_valid_host
        if self.costs is None or not self.trims or valid is None or drafts.classes is None or not any(valid):
            return drafts
        counts = self._worth(self.costs, drafts.classes, valid, sum(carry.tokens_host) / len(valid))
        self.paused = not any(counts)
        if counts == valid:
            return drafts
        width = max(counts)
        return replace(
            drafts,
            tokens=drafts.tokens[:, :width],
            num_valid=drafts.num_valid.new_tensor(counts),
            num_valid_host=counts,
            probs=None if drafts.probs is None else drafts.probs[:, :width],
        )

    def _worth(self, costs: CostTable, classes: Sequence[str], valid: Sequence[int], context: float) -> list[int]:
        """How many of its `valid` drafts each row should verify."""
        survivals = [self.acceptance.survival(c, n) for c, n in zip(classes, valid, strict=True)]
        counts, self._state = plan_ragged(self._state, costs, classes, survivals, context)
        return counts

    def record(self, result: StepResult, context: float, counts: Sequence[bool]) -> None:
        """Learns from a verify step of mean length `context`: what it cost without drafting, and what was accepted in
        the rows that count (the others' owners had gone before it was read)."""
        self._context = context
        if self.costs is not None:
            self._report(self.costs, result, context, counts)
            self._learn_costs(self.costs, result, context)
        if any(result.num_drafted):
            self.num_draft_steps += 1
        pairs = Counter(
            (drafted, accepted)
            for drafted, accepted, counted in zip(result.num_drafted, result.num_accepted, counts, strict=True)
            if drafted and counted
        )
        for (name, drafted, accepted), count in self._verdicts(result, counts, pairs).items():
            self.acceptance.update(name, drafted, accepted, count)
            for probe in self._probes_of(name):
                self._state = record_probe(self._state, probe, accepted)
        for (drafted, accepted), count in pairs.items():
            for j in range(drafted):
                self.drafted_per_position[j] += count
            for j in range(accepted):
                self.accepted_per_position[j] += count

    def _learn_costs(self, costs: CostTable, result: StepResult, context: float) -> None:
        """Corrects the table by what a step took; what of it a pause has cost is charged to the probes."""
        num_rows, verify_ms = len(result.emitted), self._verify_ms(costs, result)
        plain_ms, news = costs.step_ms(num_rows, 0, context), False
        if result.followed:  # so that drafts can be tried again, or go on after a step that tried to do without
            follow_ms = costs.follow_ms(num_rows)
            self._state = charge(self._state, follow_ms / plain_ms)
            verify_ms = max(verify_ms - follow_ms, 0.5 * verify_ms)
        if result.caught_up:  # no such step: the table would learn what it is not asked
            usual_ms = costs.verify_ms(num_rows, result.num_tokens_run, context)
            self._state = charge(self._state, (verify_ms - usual_ms) / plain_ms)
        elif news := self._is_news(result, verify_ms):
            costs.observe(num_rows, result.num_tokens_run, context, verify_ms)
        if result.draft_ms > 0.0:  # timed apart
            self._learn_drafting(costs, result, plain_ms, news)

    def _learn_drafting(self, costs: CostTable, result: StepResult, plain_ms: float, news: bool) -> None:
        """The first chain after steps without one also computes what it has missed: that is no price of a chain."""
        rows, k = self._chain_of(result)
        if rows and k and self._chain_rested:
            self._state = charge(self._state, (result.draft_ms - costs.draft_ms(rows, k)) / plain_ms)
        elif rows and k and news:
            costs.observe_draft(rows, k, result.draft_ms)
        self._chain_rested = not (rows and k)

    def _chain_of(self, result: StepResult) -> tuple[int, int]:
        """Rows and drafts a row of the chain that the drafter's network ran in this step; (0, 0): none."""
        return (0, 0) if self.trims else (sum(map(bool, result.num_drafted)), max(result.num_drafted, default=0))

    def _verify_ms(self, costs: CostTable, result: StepResult) -> float:
        """What of a step's time the table has as the cost of verifying."""
        return result.verify_ms

    def _is_news(self, result: StepResult, verify_ms: float) -> bool:
        """Whether the table is to learn from this step."""
        kind = result.num_tokens_run // max(1, len(result.emitted))
        self._uncorrected_ms += verify_ms
        self._uncorrected_steps += 1
        due = self._uncorrected_ms >= CORRECT_EVERY_MS and self._uncorrected_steps >= CORRECT_EVERY_STEPS
        if kind == self._last_kind and not due:
            return False
        self._last_kind, self._uncorrected_ms, self._uncorrected_steps = kind, 0.0, 0
        return True

    def _verdicts(
        self, result: StepResult, counts: Sequence[bool], pairs: Mapping[tuple[int, int], int]
    ) -> Mapping[tuple[str, int, int], int]:
        """How often (class, drafted, accepted) was the verdict on a row that counts; `pairs` say it without classes."""
        if not self.trims or result.classes is None:
            return {(ANY, *pair): count for pair, count in pairs.items()}
        rows = zip(result.classes, result.num_drafted, result.num_accepted, counts, strict=True)
        return Counter((name, drafted, accepted) for name, drafted, accepted, good in rows if drafted and good)

    def _probes_of(self, name: str) -> tuple[str | None, ...]:
        """The policy's names of probes that a class of drafts answers."""
        return (name if self.trims else None,)

    def _report(self, costs: CostTable, result: StepResult, context: float, counts: Sequence[bool]) -> None:
        """Before the step corrects the table, which was asked without knowing it."""
        num_rows, num_counted = len(result.emitted), sum(counts)
        if num_counted:
            emitted = sum(len(tokens) for tokens, good in zip(result.emitted, counts, strict=True) if good)
            plain_ms = costs.step_ms(num_rows, 0, context) * emitted / num_counted
            self.report.took(result.verify_ms + result.draft_ms, plain_ms)
        self.report.chose(self.paused, self._state.speedup, lambda: self._why(costs, num_rows, context))

    def _why(self, costs: CostTable, num_rows: int, context: float) -> str:
        if self.trims:
            return "what was drafted last is not expected to be accepted often enough"
        return best_draft(costs, self._survival_of_any(), num_rows, context, self.tiers)
