"""An online suffix automaton that remembers how often, and how recently, each context was followed by what.

Construction: Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985). A state is a
class of substrings that end at the same positions; its suffix link leads to the longest suffix that also ends
elsewhere. Hence the longest suffix of the text that occurred before is `link[last]`, found in O(1).
Following the most frequent transition is the greedy path of SuffixDecoding (arXiv 2411.04975, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_ROOT = 0
_NO_STATE = -1


class Continuation(NamedTuple):
    """Predicted tokens and the evidence for them.

    `match_length` is how many tokens of context matched. `position` is where `tokens[0]` last followed that context
    (-1: no match); `is_majority` says that it did so more often than all other tokens together.
    """

    tokens: list[int]
    match_length: int
    position: int
    is_majority: bool


class SuffixAutomaton:
    """Suffix automaton over one growing token sequence: amortised O(1) a token, at most two states a token.

    Occurrence counts and last positions are exact on the first `max_chain` suffix links of every position and
    lower bounds beyond: a text that loops has chains as long as itself, which would make a token cost O(length).
    """

    __slots__ = ("_count", "_end", "_last", "_length", "_link", "_max_chain", "_next", "_size")

    def __init__(self, tokens: Iterable[int] = (), max_chain: int = 32) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [_NO_STATE]
        self._length: list[int] = [0]
        self._count: list[int] = [0]
        self._end: list[int] = [-1]
        self._last = _ROOT
        self._size = 0
        self._max_chain = max_chain
        self.extend(tokens)

    def __len__(self) -> int:
        """Number of tokens read so far."""
        return self._size

    @property
    def num_states(self) -> int:
        return len(self._next)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append `tokens` to the text."""
        # Local names: this loop runs for every token of every prompt.
        nexts, link, length, count, end = self._next, self._link, self._length, self._count, self._end
        last, size, max_chain = self._last, self._size, self._max_chain
        for token in tokens:
            current = len(nexts)
            nexts.append({})
            link.append(_ROOT)
            length.append(size + 1)
            count.append(1)
            end.append(size)
            state = last
            while state != _NO_STATE and token not in nexts[state]:
                nexts[state][token] = current
                state = link[state]
            if state != _NO_STATE:
                suffix = nexts[state][token]
                if length[suffix] != length[state] + 1:
                    suffix = self._split(state, token, suffix)
                link[current] = suffix
                for _ in range(max_chain):
                    if suffix == _ROOT:
                        break
                    count[suffix] += 1
                    end[suffix] = size
                    suffix = link[suffix]
            last = current
            size += 1
        self._last, self._size = last, size

    def _split(self, state: int, token: int, target: int) -> int:
        """Split the substrings of `target` that `state` reaches by `token` off into a clone, and return it."""
        clone = len(self._next)
        self._next.append(self._next[target].copy())
        self._link.append(self._link[target])
        self._length.append(self._length[state] + 1)
        self._count.append(self._count[target])
        self._end.append(self._end[target])
        self._link[target] = clone
        while state != _NO_STATE and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def match_length(self) -> int:
        """Length of the longest suffix of the text that also ends somewhere earlier; 0 if there is none."""
        return self._length[self._link[self._last]] if self._last != _ROOT else 0

    def follow(self, num_tokens: int) -> Continuation:
        """The most likely continuation of the text: `num_tokens` tokens, or none where no suffix occurred before.

        From the longest match on, each token is the most frequent successor of the context so far, among equals
        the most recent one. A path that reaches the end of the text goes on from the text's own longest match,
        so that a loop of any period is continued for ever.
        """
        start = self._link[self._last]
        if self._last == _ROOT or start == _ROOT or num_tokens <= 0:
            return Continuation([], 0, -1, False)
        nexts = self._next
        token, state = self._most_frequent(start)
        position = self._end[state]
        is_majority = 2 * self._count[state] > sum([self._count[follower] for follower in nexts[start].values()])
        path = [token]
        while len(path) < num_tokens:
            followers = nexts[state]
            if len(followers) == 1:
                [(token, state)] = followers.items()
            elif followers:
                token, state = self._most_frequent(state)
            else:
                # Only `_last` has no successor: every other state ends somewhere before the end of the text.
                state = start
                continue
            path.append(token)
        return Continuation(path, self._length[start], position, is_majority)

    def _most_frequent(self, state: int) -> tuple[int, int]:
        """The token that followed `state` most often, among equals most recently, and the state it leads to."""
        count, end = self._count, self._end
        best_token = best_state = best_count = -1
        for token, follower in self._next[state].items():
            times = count[follower]
            if times > best_count or (times == best_count and end[follower] > end[best_state]):
                best_token, best_state, best_count = token, follower, times
        return best_token, best_state
