"""Drives a Scheduler without a model: a fake runner that emits what the test says."""

from __future__ import annotations

from collections.abc import Callable

from server.core import Phase, Request, SpeculationParams, StepPlan
from server.engine.limits import Limits
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence

Accept = Callable[[int], int]
"""How many of n drafts the target takes."""


def limits(
    max_num_seqs: int = 4,
    budget: int = 8,
    max_model_len: int = 64,
    block_size: int = 4,
    num_blocks: int = 33,
    prefix_cache: bool = True,
) -> Limits:
    return Limits(max_num_seqs, budget, max_model_len, block_size, num_blocks, prefix_cache)


def request(
    name: str,
    prompt: int | list[int] = 5,
    max_tokens: int = 8,
    enabled: bool = True,
    max_drafts: int | None = None,
    tenant: str = "",
    priority: int = 0,
) -> Request:
    """`prompt` as a number is that many tokens that no other request shares."""
    if isinstance(prompt, int):
        base = 1000 * (1 + sum(map(ord, name)))
        prompt = list(range(base, base + prompt))
    speculation = SpeculationParams(enabled, max_drafts)
    return Request(name, prompt, speculation=speculation, max_tokens=max_tokens, tenant=tenant, priority=priority)


class Driver:
    """A scheduler and its fake runner. `tokens` are what each request has emitted, `plans` all plans so far."""

    def __init__(self, scheduler: Scheduler, k: int = 3, accept: Accept = lambda n: n) -> None:
        self.scheduler, self.k, self.accept = scheduler, k, accept
        self.emitted: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.plans: list[StepPlan] = []
        self._slots: dict[int, Sequence] = {}

    def submit(self, *requests: Request) -> None:
        for req in requests:
            assert self.scheduler.refusal(req) is None
            self.scheduler.submit(req)
            self.emitted[req.request_id] = []

    def abort(self, name: str) -> None:
        self.scheduler.finish(self.scheduler.by_id[name])
        self.host_events()

    def hold(self, name: str) -> None:
        self.scheduler.hold(self.scheduler.by_id[name])
        self.host_events()

    def host_events(self) -> None:
        """Follows slots as the runner does, and finds out if two sequences ever share one."""
        scheduler = self.scheduler
        for slot in scheduler.released:
            self._slots.pop(slot, None)
        scheduler.released.clear()
        for seq in scheduler.admitted:
            if seq.running:
                assert seq.slot not in self._slots
                self._slots[seq.slot] = seq
        scheduler.admitted.clear()
        assert self._slots == {seq.slot: seq for seq in scheduler.running}

    def step(self) -> StepPlan | None:
        scheduled = self.scheduler.schedule(lambda rows, eligible: self.k)
        self.host_events()
        self.scheduler.check_integrity()
        if scheduled is None:
            return None
        plan, sequences = scheduled
        self.check(plan, sequences)
        self.plans.append(plan)
        for row, seq in zip(plan.rows, sequences, strict=True):
            count = (1 + self.accept(row.max_drafts) if plan.phase is Phase.VERIFY else 1) if row.samples else 0
            assert count <= seq.num_left, "a step may not emit more than the request asked for"
            new = [10**6 + seq.num_tokens + i for i in range(count)]
            self.scheduler.commit(seq, count if plan.phase is Phase.VERIFY else row.num_tokens, new)
            self.emitted[seq.request.request_id] += new
            seq.announced = seq.announced or bool(new)
            if seq.num_left == 0:
                self.scheduler.finish(seq, complete=True)
                self.finished.add(seq.request.request_id)
        self.host_events()
        self.scheduler.check_integrity()
        return plan

    def check(self, plan: StepPlan, sequences: list[Sequence]) -> None:
        """What every plan must satisfy."""
        size = self.scheduler.limits.block_size
        assert plan.rows
        assert len({row.slot for row in plan.rows}) == len(plan.rows) == len(sequences)
        for row, seq in zip(plan.rows, sequences, strict=True):
            assert row.slot == seq.slot
            assert row.start == seq.num_computed
            assert len(seq.blocks) * size >= row.start + row.num_tokens + row.max_drafts, "every token has a place"
            if plan.phase is Phase.VERIFY:
                assert (row.num_tokens, row.samples) == (1, True)
                assert row.start == seq.num_tokens - 1
                assert 0 <= row.max_drafts <= plan.num_draft_tokens
            else:
                assert row.max_drafts == 0
                assert row.num_tokens >= 1
                assert row.samples == (row.start + row.num_tokens == seq.num_tokens)
                assert seq.num_tokens - row.start > 1, "one token left is a verify row"
        if plan.phase is Phase.PREFILL:
            assert sum(row.num_tokens for row in plan.rows) <= self.scheduler.limits.max_num_batched_tokens

    def run(self, max_steps: int = 2000) -> None:
        """Until nothing is left; a scheduler that stops making progress fails here."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps")


def drive(k: int = 3, accept: Accept = lambda n: n, **sizes: int | bool) -> Driver:
    return Driver(Scheduler(limits(**sizes)), k, accept)  # type: ignore[arg-type]


def rows_of(driver: Driver) -> list[tuple[str, int, int, int]]:
    """(phase, start, tokens, drafts) of the first row of every plan."""
    return [(p.phase.value, p.rows[0].start, p.rows[0].num_tokens, p.rows[0].max_drafts) for p in driver.plans]
