"""The GPU's parity script: a case counts only if it was what its name says."""

from __future__ import annotations

import pytest

from benchmarks.parity_cases import MISSING, Counts, case, causes_in_words, failed

WHOLE = Counts(preemptions=2, cached=30, drafted=9, accepted=4)


@pytest.mark.parametrize(
    ("k", "how", "counts", "why"),
    [
        (0, "b32/miss", Counts(), None),
        (0, "b32/hit", Counts(cached=16), None),
        (0, "b32/hit", Counts(preemptions=1), "no token was cached"),
        (0, "b32/preempted", Counts(preemptions=1), None),
        (0, "b32/preempted", Counts(cached=16), "nothing was preempted"),
        (5, "b32/miss", Counts(drafted=9), "no draft was accepted"),
        (5, "b32/preempted", Counts(drafted=9, accepted=4), "nothing was preempted"),
        (5, "b32/preempted", WHOLE, None),
    ],
)
def test_a_case_must_have_happened(k: int, how: str, counts: Counts, why: str | None) -> None:
    row = case((f"greedy/k{k}", "whole"), how, [[1, 2]], [[1, 2]], counts)
    assert (why is not None) == failed(row) == (MISSING in row.note)
    assert why is None or row.note.endswith(why)


def test_a_difference_fails() -> None:
    row = case(("greedy/k5", "whole"), "b32/hit", [[1, 2], [3]], [[1, 2], [4]], WHOLE)
    assert row.value == 1 and failed(row)
    assert not failed(case(("greedy/k5", "whole"), "b32/hit", [[1, 2]], [[1, 2], [4]], WHOLE)), "fewer were run alone"


def test_what_is_no_tie_is_named() -> None:
    pairs = [(1, 2), (3, 4), (5, 6), (7, 8)]
    note = causes_in_words(pairs, [0.1, -0.2, 0.21, None], 0.2)
    assert note.startswith("2 of 4 differences are ties (gap at most 0.200 nats)")
    assert note.endswith("no ties: tokens 5/6 0.210; 1 with a token that was not scored")
    assert causes_in_words([], [], 0.2) == "0 of 0 differences are ties (gap at most 0.200 nats)"
