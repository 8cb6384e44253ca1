"""Who is served next: the lowest priority number first, among equals fairly between tenants. Pure bookkeeping.

Fairness is the Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), section
4: a tenant's counter grows by the tokens it is served, and the waiting tenant with the lowest counter is next. Who
comes back after an idle time is lifted to the lowest counter that waits (or, if nobody does, to that of the tenant
which left the queue last), so that idling earns no credit. Prompt and emitted tokens weigh the same. Between two
tenants that wait all the time the service then differs by a bounded amount, whatever either of them sends.

Each priority has counters of its own: what is served first anyway is not charged to what comes after. One tenant's
requests are first come, first served, and with one tenant and one priority all this is a plain queue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator

from server.engine.sequence import Sequence

MAX_IDLE_TENANTS = 1024
MAX_IDLE_PRIORITIES = 16
"""Bounds on what is remembered of tenants and priorities that nobody waits for."""

Line = OrderedDict[Sequence, None]
"""A queue from whose middle a sequence can be taken in O(1)."""


class _Priority:
    """The waiting sequences of one priority and its tenants' counters."""

    __slots__ = ("first", "last_tenant", "lines", "served")

    def __init__(self) -> None:
        self.first: Line = OrderedDict()
        self.lines: dict[str, Line] = {}
        self.served: dict[str, int] = {}
        self.last_tenant = ""

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.first
        for tenant in sorted(self.lines, key=self.served.__getitem__):
            yield from self.lines[tenant]

    @property
    def empty(self) -> bool:
        return not self.first and not self.lines

    def line(self, tenant: str) -> Line:
        """The tenant's line; one that was not waiting joins with its counter lifted (algorithm 2 of the paper)."""
        line = self.lines.get(tenant)
        if line is None:
            served = self.served
            floor = min([served[t] for t in self.lines]) if self.lines else served.get(self.last_tenant, 0)
            served[tenant] = max(served.get(tenant, 0), floor)
            line = self.lines[tenant] = OrderedDict()
            if len(served) > len(self.lines) + 2 * MAX_IDLE_TENANTS:
                self._forget_idle()
        return line

    def next(self) -> Sequence:
        if self.first:
            return next(iter(self.first))
        return next(iter(self.lines[min(self.lines, key=self.served.__getitem__)]))

    def remove(self, seq: Sequence) -> None:
        if seq in self.first:
            del self.first[seq]
            return
        tenant = seq.request.tenant
        line = self.lines[tenant]
        del line[seq]
        if not line:
            del self.lines[tenant]
            self.last_tenant = tenant

    def _forget_idle(self) -> None:
        """Drops the lowest counters of tenants that do not wait: those are the first to be lifted anyway."""
        idle = [t for t in self.served if t not in self.lines and t != self.last_tenant]
        idle.sort(key=self.served.__getitem__)
        for tenant in idle[: len(idle) - MAX_IDLE_TENANTS]:
            del self.served[tenant]


class WaitingQueue:
    """Sequences that wait for a slot. Iteration is in the order in which they would be served as things stand.

    Every operation takes O(1), or O(tenants that wait) where the next one is looked for.
    """

    def __init__(self) -> None:
        self._priorities: dict[int, _Priority] = {}
        self._waiting: list[int] = []  # priorities that somebody waits in, lowest first
        self._size = 0
        self.num_tokens = 0
        """Prompt tokens of all that wait."""

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        for priority in self._waiting:
            yield from self._priorities[priority]

    def append(self, seq: Sequence) -> None:
        """Behind all others of its tenant."""
        self._enter(seq).line(seq.request.tenant)[seq] = None

    def append_first(self, seq: Sequence) -> None:
        """Before all others of its priority: it was served already, and gave up its place."""
        first = self._enter(seq).first
        first[seq] = None
        first.move_to_end(seq, last=False)

    def append_front(self, seq: Sequence) -> None:
        """Before all others of its tenant."""
        line = self._enter(seq).line(seq.request.tenant)
        line[seq] = None
        line.move_to_end(seq, last=False)

    def peek(self) -> Sequence:
        """Who is next. Raises IndexError if nobody waits."""
        return self._priorities[self._waiting[0]].next()

    def remove(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it stands. Raises KeyError if it does not wait."""
        number = seq.request.priority
        priority = self._priorities[number]
        priority.remove(seq)
        if priority.empty:
            del self._waiting[bisect_left(self._waiting, number)]
        self._size -= 1
        self.num_tokens -= seq.prompt_len

    def charge(self, seq: Sequence, num_tokens: int) -> None:
        """The sequence's tenant was served this many tokens."""
        priority = self._priorities.get(seq.request.priority)
        if priority is not None and seq.request.tenant in priority.served:
            priority.served[seq.request.tenant] += num_tokens

    def check_integrity(self) -> None:
        """Raises AssertionError if the books are wrong."""
        found = list(self)
        if len(found) != self._size or sum(seq.prompt_len for seq in found) != self.num_tokens:
            raise AssertionError(f"{len(found)} sequences wait, {self._size} are on the books")
        if self._waiting != sorted(n for n, priority in self._priorities.items() if not priority.empty):
            raise AssertionError(f"somebody waits in other priorities than {self._waiting}")

    def _enter(self, seq: Sequence) -> _Priority:
        number = seq.request.priority
        priority = self._priorities.get(number)
        if priority is None:
            self._forget_idle()
            priority = self._priorities[number] = _Priority()
        if priority.empty:
            insort(self._waiting, number)
        self._size += 1
        self.num_tokens += seq.prompt_len
        return priority

    def _forget_idle(self) -> None:
        if len(self._priorities) - len(self._waiting) < MAX_IDLE_PRIORITIES:
            return
        for number in [n for n, priority in self._priorities.items() if priority.empty][: -MAX_IDLE_PRIORITIES + 1]:
            del self._priorities[number]
