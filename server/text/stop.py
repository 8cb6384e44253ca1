"""Stop strings in a stream of text.

One Aho-Corasick automaton (Aho & Corasick, 1975) over all stop strings: a character costs amortised constant time
however many they are, and its state is at any moment the longest tail of the text that could still become one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(slots=True)
class _Node:
    depth: int
    next: dict[str, int] = field(default_factory=dict)
    fail: int = 0
    match: str | None = None
    """The longest stop string that ends here."""


class StopMatcher:
    """Cuts a stream at the stop string that begins first; of several that begin together, at the shortest.

    How the text is split into pieces makes no difference. Text that could begin a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("stop: an empty string would match everywhere; remove it")
        self._nodes = _automaton(tuple(stops))
        self._state = 0
        self._held = ""
        self._matched: str | None = None
        # A stop string that is complete while one that began before it may still become complete.
        self._candidate: tuple[int, str] | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found; the text before it is all that was and will be emitted."""
        return self._matched

    def feed(self, text: str) -> str:
        """The text that is now known to come before any stop string. Empty once one was found."""
        if self._matched is not None:
            return ""
        if len(self._nodes) == 1:
            return text
        start = len(self._held)
        self._held += text
        for end in range(start + 1, len(self._held) + 1):
            self._advance(self._held[end - 1], end)
            if self._decided(end):
                return self._cut()
        if self._candidate is not None:
            return ""
        out = len(self._held) - self._nodes[self._state].depth
        emitted, self._held = self._held[:out], self._held[out:]
        return emitted

    def flush(self) -> str:
        """The stream has ended: what was held back, up to a stop string that is in it."""
        if self._candidate is not None:
            return self._cut()
        emitted, self._held, self._state = self._held, "", 0
        return emitted

    def _advance(self, char: str, end: int) -> None:
        nodes, state = self._nodes, self._state
        while state and char not in nodes[state].next:
            state = nodes[state].fail
        self._state = nodes[state].next.get(char, 0)
        match = nodes[self._state].match
        if match is not None:
            begin = end - len(match)
            if self._candidate is None or begin < self._candidate[0]:
                self._candidate = (begin, match)

    def _decided(self, end: int) -> bool:
        return self._candidate is not None and end - self._nodes[self._state].depth >= self._candidate[0]

    def _cut(self) -> str:
        assert self._candidate is not None
        begin, self._matched = self._candidate
        emitted, self._held, self._candidate = self._held[:begin], "", None
        return emitted


@lru_cache(maxsize=16)
def _automaton(stops: tuple[str, ...]) -> list[_Node]:
    """Nobody writes to it once it is built: choices of one request, and requests with the same strings, share it."""
    nodes = [_Node(depth=0)]
    for stop in stops:
        at = 0
        for char in stop:
            if char not in nodes[at].next:
                nodes[at].next[char] = len(nodes)
                nodes.append(_Node(depth=nodes[at].depth + 1))
            at = nodes[at].next[char]
        nodes[at].match = stop
    queue = deque(nodes[0].next.values())  # breadth first: a node's failure node is shallower, hence finished
    while queue:
        node = nodes[queue.popleft()]
        for char, child in node.next.items():
            queue.append(child)
            fail = node.fail
            while fail and char not in nodes[fail].next:
                fail = nodes[fail].fail
            target = nodes[fail].next.get(char, 0)
            nodes[child].fail = target if target != child else 0
            if nodes[child].match is None:
                nodes[child].match = nodes[nodes[child].fail].match
    return nodes
