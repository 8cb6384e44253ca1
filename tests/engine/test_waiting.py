"""Who is next: a plain queue for one tenant, fair between several, priorities first."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core import Request
from server.engine import waiting
from server.engine.sequence import Sequence
from server.engine.waiting import WaitingQueue


def seq(name: str, tenant: str = "", priority: int = 0, num_tokens: int = 1) -> Sequence:
    return Sequence.of(Request(name, [0] * num_tokens, tenant=tenant, priority=priority))


def names(queue: WaitingQueue) -> list[str]:
    return [s.request.request_id for s in queue]


def serve(queue: WaitingQueue, num_tokens: int = 0) -> str:
    """Takes the next one out; it is served this many tokens."""
    found = queue.peek()
    queue.remove(found)
    queue.charge(found, num_tokens)
    queue.check_integrity()
    return found.request.request_id


def drain(queue: WaitingQueue, num_tokens: int = 0) -> list[str]:
    return [serve(queue, num_tokens) for _ in range(len(queue))]


def queue_of(*sequences: Sequence) -> WaitingQueue:
    queue = WaitingQueue()
    for each in sequences:
        queue.append(each)
    queue.check_integrity()
    return queue


# -- one tenant --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["append", "append_first", "serve", "remove"]), st.integers(0, 9))))
def test_with_one_tenant_and_priority_it_is_a_deque(operations: list[tuple[str, int]]) -> None:
    queue, plain = WaitingQueue(), deque[Sequence]()
    for i, (operation, number) in enumerate(operations):
        if operation == "append":
            plain.append(seq(str(i), num_tokens=number))
            queue.append(plain[-1])
        elif operation == "append_first":
            plain.appendleft(seq(str(i), num_tokens=number))
            queue.append_first(plain[0])
        elif plain and operation == "serve":
            assert queue.peek() is plain.popleft()
            serve(queue, number)
        elif plain:
            gone = plain[number % len(plain)]
            plain.remove(gone)
            queue.remove(gone)
        assert list(queue) == list(plain)
        assert len(queue) == len(plain)
        assert queue.num_tokens == sum(s.prompt_len for s in plain)
        queue.check_integrity()


def test_nobody_waits() -> None:
    queue = WaitingQueue()
    assert not queue
    with pytest.raises(IndexError):
        queue.peek()
    with pytest.raises(KeyError):
        queue.remove(seq("a"))
    here = seq("a")
    queue.append(here)
    with pytest.raises(KeyError):
        queue.remove(seq("a"))


# -- priorities --------------------------------------------------------------------------------------------


def test_the_lowest_number_goes_first() -> None:
    queue = queue_of(seq("a"), seq("b", priority=-3), seq("c", priority=5), seq("d"), seq("e", priority=-3))
    assert names(queue) == ["b", "e", "a", "d", "c"]
    assert drain(queue) == ["b", "e", "a", "d", "c"]


def test_one_that_gave_up_its_place_comes_before_all_of_its_priority_and_no_other() -> None:
    queue = queue_of(seq("a", "x"), seq("b", "y"), seq("urgent", "y", -1))
    queue.charge(seq("x", "x"), 100)
    queue.append_first(seq("older", "x"))
    queue.append_first(seq("oldest", "x"))
    queue.append_front(seq("front", "y"))
    assert drain(queue) == ["urgent", "oldest", "older", "front", "b", "a"]


def test_front_is_before_the_own_tenants_only() -> None:
    queue = queue_of(seq("a1", "a"), seq("b1", "b"))
    serve(queue, 10)
    queue.append_front(seq("a0", "a"))
    queue.append(seq("a2", "a"))
    assert drain(queue) == ["b1", "a0", "a2"]


# -- tenants -----------------------------------------------------------------------------------------------


def test_tenants_take_turns_by_what_they_were_served() -> None:
    queue = queue_of(*(seq(f"a{i}", "a") for i in range(4)), *(seq(f"b{i}", "b") for i in range(4)))
    assert [serve(queue, cost) for cost in (30, 10, 10, 20)] == ["a0", "b0", "b1", "b2"]
    assert drain(queue, 15) == ["a1", "b3", "a2", "a3"]


def test_tokens_served_while_running_count() -> None:
    queue = queue_of(seq("a0", "a"), seq("b0", "b"), seq("a1", "a"), seq("b1", "b"))
    running = queue.peek()
    serve(queue, 5)
    queue.charge(running, 7)
    assert [serve(queue, 11), serve(queue)] == ["b0", "b1"]


def test_idling_earns_no_credit() -> None:
    """Who comes back starts where the least served of those that wait stands."""
    queue = queue_of(seq("late0", "late"), *(seq(f"a{i}", "a") for i in range(9)))
    assert serve(queue, 1) == "late0"
    for _ in range(4):
        serve(queue, 100)
    for i in range(1, 5):
        queue.append(seq(f"late{i}", "late"))
    assert drain(queue, 100) == ["a4", "late1", "a5", "late2", "a6", "late3", "a7", "late4", "a8"]


def test_leaving_the_queue_pays_no_debt() -> None:
    queue = queue_of(seq("a0", "a"), *(seq(f"b{i}", "b") for i in range(4)))
    assert serve(queue, 100) == "a0"
    queue.append(seq("a1", "a"))
    assert drain(queue, 40) == ["b0", "b1", "b2", "a1", "b3"]


def test_nor_does_idling_while_nobody_waits() -> None:
    """The queue is empty at low load; the first to come back then starts where the last to leave stands."""
    queue = queue_of(seq("a0", "a"))
    running = queue.peek()
    serve(queue, 10)
    queue.charge(running, 1000)
    queue.append(seq("b0", "b"))
    for i in range(1, 4):
        queue.append(seq(f"a{i}", "a"))
        queue.append(seq(f"b{i}", "b"))
    assert drain(queue, 100) == ["b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_priorities_do_not_share_counters() -> None:
    queue = queue_of(*(seq(f"h{i}", "a", -1) for i in range(3)), seq("a", "a"), seq("b", "b"))
    assert [serve(queue, 1000) for _ in range(3)] == ["h0", "h1", "h2"]
    queue.append(seq("c", "c"))
    assert drain(queue, 5) == ["a", "b", "c"], "what was urgent is not charged to what is not"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("longest_prompts", [(1, 1), (400, 20), (20, 400)])
def test_a_flood_takes_nothing_from_a_tenant_that_waits_all_the_time(
    seed: int, longest_prompts: tuple[int, int]
) -> None:
    """As proved in the paper: while both wait, service differs by at most twice what a full batch is served.

    One tenant has a hundred requests waiting, the other two. Requests run side by side and emit a token a step.
    """
    rng = random.Random(seed)
    longest, slots = 400, 6
    queue, served = WaitingQueue(), {"flood": 0, "meek": 0}
    waits = {"flood": 0, "meek": 0}
    longest_prompt = dict(zip(served, longest_prompts, strict=True))

    def refill() -> None:
        for tenant, wanted in (("flood", 100), ("meek", 2)):
            while waits[tenant] < wanted:
                queue.append(seq("r", tenant, num_tokens=rng.randint(1, longest_prompt[tenant])))
                waits[tenant] += 1

    def charge(each: Sequence, num_tokens: int) -> None:
        queue.charge(each, num_tokens)
        served[each.request.tenant] += num_tokens

    running: list[tuple[Sequence, int]] = []
    widest = 0
    for _ in range(3000):
        refill()
        while len(running) < slots:
            found = queue.peek()
            queue.remove(found)
            waits[found.request.tenant] -= 1
            charge(found, found.prompt_len)
            running.append((found, rng.randint(1, longest)))
            refill()
        for each, _ in running:
            charge(each, 1)
        running = [(each, left - 1) for each, left in running if left > 1]
        widest = max(widest, abs(served["flood"] - served["meek"]))
    bound = 2 * (slots * longest + max(longest_prompts))
    assert sum(served.values()) > 3 * bound
    assert widest <= bound


# -- memory ------------------------------------------------------------------------------------------------


def test_tenants_that_went_idle_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_IDLE_TENANTS", 10)
    queue = queue_of(seq("stays", "stays"))
    heavy = seq("heavy", "heavy")
    queue.append(heavy)
    queue.charge(heavy, 10**6)
    queue.remove(heavy)
    for i in range(1000):
        each = seq(str(i), f"t{i}")
        queue.append(each)
        queue.charge(each, 1 + i % 7)
        queue.remove(each)
        assert len(queue._priorities[0].served) <= 1 + 2 * 10 + 1
    queue.append(seq("again", "heavy"))
    queue.append(seq("new", "new"))
    assert drain(queue) == ["stays", "new", "again"], "who was served most is remembered longest"


def test_priorities_that_went_idle_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_IDLE_PRIORITIES", 4)
    queue = queue_of(seq("stays", priority=0))
    for i in range(1, 100):
        each = seq(str(i), priority=i if i % 2 else -i)
        queue.append(each)
        queue.charge(each, 5)
        queue.remove(each)
        queue.charge(each, 5)
        queue.check_integrity()
        assert len(queue._priorities) <= 1 + 4
    queue.charge(seq("gone", priority=2), 5)
    assert drain(queue) == ["stays"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "append_first", "append_front", "serve", "remove"]),
            st.sampled_from("abc"),
            st.integers(-1, 1),
            st.integers(0, 50),
        ),
        max_size=60,
    )
)
def test_books_hold_and_nobody_is_overtaken_within_a_tenant(operations: list[tuple[str, str, int, int]]) -> None:
    queue = WaitingQueue()
    here: list[Sequence] = []
    for i, (operation, tenant, priority, number) in enumerate(operations):
        if operation.startswith("append"):
            here.append(seq(str(i), tenant, priority, number))
            getattr(queue, operation)(here[-1])
        elif here:
            gone = queue.peek() if operation == "serve" else here[number % len(here)]
            here.remove(gone)
            queue.remove(gone)
            queue.charge(gone, number)
        queue.check_integrity()
        assert set(queue) == set(here)
        order = [s.request.priority for s in queue]
        assert order == sorted(order)
        if here:
            assert queue.peek() is next(iter(queue))
