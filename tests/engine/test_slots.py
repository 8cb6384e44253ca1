"""Slots are handed out lowest first and none is lost."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.slots import SlotPool


def test_the_lowest_free_slot_comes_first() -> None:
    pool = SlotPool(4)
    assert [pool.acquire() for _ in range(4)] == [0, 1, 2, 3]
    assert pool.num_free == 0
    for slot in (3, 1, 2):
        pool.release(slot)
    assert [pool.acquire() for _ in range(3)] == [1, 2, 3]


def test_there_is_no_slot_beyond_the_last() -> None:
    pool = SlotPool(1)
    pool.acquire()
    with pytest.raises(IndexError):
        pool.acquire()


def test_a_slot_is_released_once() -> None:
    pool = SlotPool(2)
    slot = pool.acquire()
    pool.release(slot)
    with pytest.raises(KeyError):
        pool.release(slot)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool.acquire(), "in use"),
        (lambda pool: pool.release(0), "in use"),
        (lambda pool: pool._free.pop(), "lost or doubled"),
        (lambda pool: pool._free.append(0), "lost or doubled"),
    ],
)
def test_integrity_finds_what_is_wrong(damage: Any, message: str) -> None:
    pool = SlotPool(3)
    pool.acquire()
    pool.check_integrity({0})
    damage(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity({0})
