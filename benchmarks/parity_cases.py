"""What `gpu_parity.py` says of its cases: whether one was what it claims to be, and why answers differ."""

from __future__ import annotations

from dataclasses import dataclass, fields

from benchmarks.common import Row
from server.engine.core import EngineCore

Tokens = list[list[int]]
MISSING = "DID NOT HAPPEN:"


@dataclass(frozen=True)
class Counts:
    """What an engine counted during one case."""

    preemptions: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, core: EngineCore) -> Counts:
        stats = core.stats()
        drafted, accepted = sum(stats.drafted_per_position), sum(stats.accepted_per_position)
        return cls(stats.num_preemptions, stats.num_cached_tokens, drafted, accepted)

    def missing(self, k: int, content: str) -> str | None:
        """What a case with `k` drafts of that content claims and did not have."""
        if k and not self.accepted:
            return "no draft was accepted"
        if content == "hit" and not self.cached:
            return "no token was cached"
        if content == "preempted" and not self.preemptions:
            return "nothing was preempted"
        return None


class Seen:
    """Differences of an engine's counters between cases."""

    def __init__(self) -> None:
        self._core: EngineCore | None = None
        self._before = Counts()

    def of(self, core: EngineCore) -> Counts:
        """What `core` counted since it was last asked for; another engine than before starts from nothing."""
        before = self._before if core is self._core else Counts()
        now = Counts.of(core)
        self._core, self._before = core, now
        return Counts(*(getattr(now, f.name) - getattr(before, f.name) for f in fields(Counts)))


def case(where: tuple[str, str], how: str, got: Tokens, expected: Tokens, counts: Counts) -> Row:
    """The row of one way to run; its note ends in `MISSING` and why if the way was not what its name says."""
    batch, content = how.split("/")
    name = f"h100/parity/smollm2-deterministic/{where[0]}/{batch}/{where[1]}/{content}"
    note = f"{counts.preemptions} preemptions, {counts.cached} cached tokens"
    if counts.drafted:
        note += f", {counts.accepted} of {counts.drafted} drafts accepted"
    missing = counts.missing(int(where[0].rpartition("k")[2]), content)
    if missing is not None:
        note += f"; {MISSING} {missing}"
    return Row(name, sum(a != b for a, b in zip(got, expected, strict=False)), f"of {len(got)} differ", None, note)


def failed(row: Row) -> bool:
    """Whether a row of deterministic mode differs, or is of a case that did not happen."""
    return "/smollm2-deterministic/" in row.case and (row.value != 0 or MISSING in row.note)


def causes_in_words(pairs: list[tuple[int, int]], gaps: list[float | None], bound: float) -> str:
    """How many differences are ties, and which are not.

    `gaps`: how far the first token of each pair truly leads, None where one was not scored. Two runs part only if one
    of them has moved the gap by its whole size, the other perhaps by nothing; so a tie is a gap of at most `bound`,
    what rounding moves one run's gaps by.
    """
    scored = [(abs(gap), pair) for gap, pair in zip(gaps, pairs, strict=True) if gap is not None]
    beyond = [(gap, pair) for gap, pair in scored if gap > bound]
    note = f"{len(scored) - len(beyond)} of {len(pairs)} differences are ties (gap at most {bound:.3f} nats)"
    if scored:
        sizes = sorted(gap for gap, _ in scored)
        note += f"; gaps median {sizes[len(sizes) // 2]:.4f}, largest {sizes[-1]:.4f}"
    if beyond:
        note += "; no ties: " + ", ".join(f"tokens {a}/{b} {gap:.3f}" for gap, (a, b) in beyond)
    if len(scored) < len(pairs):
        note += f"; {len(pairs) - len(scored)} with a token that was not scored"
    return note
