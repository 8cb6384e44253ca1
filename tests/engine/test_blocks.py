"""Block bookkeeping: which block comes next, who owns it, and that a leak does not go unseen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.blocks import BlockPool, OutOfBlocksError


def test_a_lone_sequence_fills_the_pool_from_the_start_in_one_piece() -> None:
    pool = BlockPool(6)
    blocks = [pool.allocate()]
    while pool.num_free:
        blocks.append(pool.allocate(blocks[-1]))
    assert blocks == [1, 2, 3, 4, 5]


def test_a_second_sequence_starts_where_both_can_grow() -> None:
    pool = BlockPool(21)
    first = [pool.allocate()]
    second = [pool.allocate()]
    for _ in range(8):
        first.append(pool.allocate(first[-1]))
        second.append(pool.allocate(second[-1]))
    assert first == list(range(first[0], first[0] + 9))
    assert second == list(range(second[0], second[0] + 9))


def test_a_sequence_hemmed_in_goes_on_in_the_longest_blank_run() -> None:
    pool = BlockPool(12)
    taken = [pool.allocate() for _ in range(1)]
    while pool.num_free:
        taken.append(pool.allocate(taken[-1]))
    for block in (2, 5, 6, 7, 8, 9):
        pool.release(block)
    assert pool.allocate(10) == 7  # the middle of 5 … 9


def test_what_is_said_of_a_blocks_content_goes_with_it() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.mark_drafted(first)
    pool.keep(first)
    pool.release(first)
    pool.acquire(first)  # a prefix hit
    assert pool.is_drafted(first) and not pool.is_drafted(second)
    pool.release(first)
    assert pool.allocate() == first
    assert not pool.is_drafted(first)


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert sorted(pool.allocate() for _ in range(3)) == [1, 2, 3]
    with pytest.raises(OutOfBlocksError, match="no free KV block"):
        pool.allocate()
    with pytest.raises(OutOfBlocksError):
        pool.allocate(after=2)


def test_a_pool_of_the_null_block_alone_has_nothing() -> None:
    pool = BlockPool(1)
    assert (pool.num_free, pool.num_used) == (0, 0)
    with pytest.raises(OutOfBlocksError):
        pool.allocate()


def test_kept_content_outlives_its_owner_and_blank_blocks_go_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(5, evicted.append)
    block = pool.allocate()
    pool.keep(block)
    pool.release(block)
    others = [pool.allocate() for _ in range(3)]
    assert block not in others
    assert evicted == []
    assert pool.allocate() == block
    assert evicted == [block]


def test_kept_blocks_are_given_up_least_recently_released_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(5, evicted.append)
    blocks = [pool.allocate() for _ in range(4)]
    for block in blocks:
        pool.keep(block)
    order = [blocks[2], blocks[0], blocks[3], blocks[1]]
    for block in order:
        pool.release(block)
    pool.acquire(order[0])  # a prefix hit makes it the most recent one
    pool.release(order[0])
    assert [pool.allocate() for _ in range(4)] == [*order[1:], order[0]]
    assert evicted == [*order[1:], order[0]]


def test_an_evicted_block_is_kept_no_more() -> None:
    evicted: list[int] = []
    pool = BlockPool(2, evicted.append)
    for _ in range(2):
        pool.keep(pool.allocate())
        pool.release(1)
    pool.allocate()
    pool.release(1)
    pool.allocate()
    assert evicted == [1, 1], "the last owner kept nothing, so nothing was given up a third time"


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.acquire(block)
    pool.release(block)
    assert (pool.refs(block), pool.num_free, pool.num_used) == (1, 1, 1)
    pool.release(block)
    assert (pool.refs(block), pool.num_free, pool.num_used) == (0, 2, 0)


def test_one_release_too_many_is_an_error() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError, match=f"block {block} released more often"):
        pool.release(block)
    with pytest.raises(AssertionError, match="block 0"):
        pool.release(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool.acquire(1), "2 references, 1 owners"),
        (lambda pool: pool.release(1), "0 references, 1 owners"),
        (lambda pool: pool.allocate(), "1 references, 0 owners"),
        (lambda pool: pool._free.pop(3), "free list disagrees"),
        (lambda pool: pool._free.setdefault(1), "free list disagrees"),
        (lambda pool: pool._blank.__setitem__(3, 0), "blank flag"),
        (lambda pool: pool._blank.__setitem__(1, 1), "blank flag"),
    ],
)
def test_integrity_finds_what_is_wrong(damage: Any, message: str) -> None:
    pool = BlockPool(4)
    assert pool.allocate() == 1
    pool.check_integrity({1: 1})
    damage(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity({1: 1})


class PoolMachine(RuleBasedStateMachine):
    """Random owners against a model that is a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[int] = []
        self.pool = BlockPool(9, self.evicted.append)
        self.owned: dict[int, int] = {}
        self.kept: set[int] = set()

    @precondition(lambda self: self.pool.num_free)
    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        after = data.draw(st.none() | st.sampled_from(sorted(self.owned)) if self.owned else st.none())
        blanks = [b for b in range(1, 9) if b not in self.owned and b not in self.kept]
        block = self.pool.allocate(after)
        assert block not in self.owned
        assert self.evicted == ([] if blanks else [block])
        assert not blanks or block in blanks
        if after is not None and after + 1 in blanks:
            assert block == after + 1
        self.kept -= set(self.evicted)
        self.evicted.clear()
        self.owned[block] = 1

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.owned)))
        self.pool.release(block)
        self.owned[block] -= 1
        if not self.owned[block]:
            del self.owned[block]

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.owned)))
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.owned or self.kept)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({*self.owned, *self.kept})))
        self.pool.acquire(block)
        self.owned[block] = self.owned.get(block, 0) + 1

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_integrity(self.owned)
        assert self.pool.num_used == len(self.owned)
        assert self.pool.num_free == 8 - len(self.owned)


TestBlockPool = PoolMachine.TestCase
