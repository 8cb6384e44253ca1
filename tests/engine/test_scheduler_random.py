"""Any mixture of submissions, aborts, holds and steps: nothing leaks, nothing starves, everything ends."""

from __future__ import annotations

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.scheduler import Scheduler
from tests.engine.scheduling import Driver, limits, request


class SchedulerMachine(RuleBasedStateMachine):
    """A pool of 12 blocks of 4 and 3 slots, so that admission waits and preemption happens all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.accepts = 0
        self.driver = Driver(
            Scheduler(limits(max_num_seqs=3, budget=6, max_model_len=40, num_blocks=13)),
            accept=lambda n: min(n, self.accepts),
        )
        self.count = 0
        self.asked: dict[str, int] = {}
        self.aborted: set[str] = set()

    @rule(
        # Few different prompts, so that they share prefixes.
        start=st.integers(0, 1),
        length=st.integers(1, 24),
        max_tokens=st.integers(1, 16),
        enabled=st.booleans(),
        tenant=st.sampled_from("ab"),
        priority=st.integers(0, 1),
    )
    def submit(self, start: int, length: int, max_tokens: int, enabled: bool, tenant: str, priority: int) -> None:
        name = f"r{self.count}"
        self.count += 1
        self.asked[name] = max_tokens
        prompt = list(range(start, start + length))
        self.driver.submit(request(name, prompt, max_tokens, enabled, tenant=tenant, priority=priority))

    @precondition(lambda self: self.driver.scheduler.by_id)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.driver.scheduler.by_id)))
        self.driver.abort(name)
        self.aborted.add(name)

    @precondition(lambda self: self.driver.scheduler.waiting or self.driver.scheduler.running)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        scheduler = self.driver.scheduler
        self.driver.hold(data.draw(st.sampled_from(sorted(scheduler.by_id.keys() - scheduler.held.keys()))))

    @precondition(lambda self: self.driver.scheduler.held)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        scheduler = self.driver.scheduler
        scheduler.resume(data.draw(st.sampled_from(sorted(scheduler.held))))

    @rule(k=st.sampled_from([0, 1, 3, 7]), accepts=st.integers(0, 7), count=st.integers(1, 5))
    def step(self, k: int, accepts: int, count: int) -> None:
        self.driver.k, self.accepts = k, accepts
        for _ in range(count):
            self.driver.step()

    @invariant()
    def nothing_is_lost(self) -> None:
        scheduler = self.driver.scheduler
        scheduler.check_integrity()
        # The cache knows exactly the blocks that are kept.
        assert set(scheduler.cache._key_of) == scheduler.pool._kept
        # A block that two sequences share is one that the cache knows: nobody writes to it any more.
        for seq in scheduler.running:
            writable = seq.blocks[seq.num_computed // scheduler.limits.block_size :]
            assert all(scheduler.pool.refs(block) == 1 for block in writable)

    def teardown(self) -> None:
        for name in list(self.driver.scheduler.held):
            self.driver.scheduler.resume(name)
        self.driver.run()
        scheduler = self.driver.scheduler
        assert scheduler.pool.num_used == 0
        assert scheduler.slots.num_free == 3
        for name, max_tokens in self.asked.items():
            if name not in self.aborted:
                assert len(self.driver.emitted[name]) == max_tokens


TestScheduler = SchedulerMachine.TestCase


@pytest.mark.parametrize("seed", range(6))
def test_a_crowd_in_a_small_pool_all_ends(seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(
        Scheduler(limits(max_num_seqs=6, budget=10, max_model_len=48, num_blocks=rng.choice([13, 16, 24]))),
        accept=lambda n: rng.randint(0, n),
    )
    for i in range(60):
        prompt = [7] * rng.randint(0, 9) + [rng.randint(0, 2) for _ in range(rng.randint(1, 20))]
        driver.submit(request(f"r{i}", prompt, rng.randint(1, 18)))
    while driver.scheduler.has_work:
        driver.k = rng.choice([0, 1, 3, 7])
        driver.step()
        if rng.random() < 0.05 and driver.scheduler.by_id:
            driver.abort(rng.choice(sorted(driver.scheduler.by_id)))
        assert len(driver.plans) < 5000
    assert driver.scheduler.counters.num_preemptions > 0
    assert driver.scheduler.counters.num_cached_tokens > 0
    assert driver.scheduler.pool.num_used == 0
