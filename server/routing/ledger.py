"""What experiments decided and on what evidence: a file that only grows, and from which a restart goes on.

SQLite in WAL mode, one row an event, committed before the decision takes effect; the observations beside it, so
that a restart neither forgets evidence nor looks at new evidence as if it were the first (which would be a further
chance to be wrong). Triggers refuse changes and deletions of events.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from server.routing.evidence.evidence import Evidence
from server.routing.evidence.observation import Observation
from server.routing.experiment import Event, State

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY,
    experiment TEXT NOT NULL,
    kind TEXT NOT NULL,
    at_s REAL NOT NULL,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    state TEXT NOT NULL,
    weights TEXT NOT NULL,
    evidence TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_of ON events (experiment, id);
CREATE TRIGGER IF NOT EXISTS events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events only grow'); END;
CREATE TRIGGER IF NOT EXISTS events_last BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events only grow'); END;
CREATE TABLE IF NOT EXISTS observations (
    id INTEGER PRIMARY KEY,
    experiment TEXT NOT NULL,
    candidate INTEGER NOT NULL,
    stage INTEGER NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS observations_of ON observations (experiment, id);
CREATE TABLE IF NOT EXISTS terms (experiment TEXT PRIMARY KEY, body TEXT NOT NULL);
"""
BUSY_S = 0.5
"""How long a write waits for another process that holds the file; nothing else happens in this process meanwhile."""
_COLUMNS = "id, experiment, kind, at_s, actor, reason, state, weights, evidence"


class Ledger:
    """Events and observations of experiments, by name. One process writes; any may read. Errors are sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")  # a decision outlasts a power cut
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def append(self, experiment: str, events: Sequence[Event]) -> None:
        """Writes events, all or none, and returns once they are on the disk."""
        rows = [
            (
                experiment,
                event.kind,
                event.at_s,
                event.actor,
                event.reason,
                _json(asdict(event.state)),
                _json(dict(event.weights)),
                _json(event.evidence),
            )
            for event in events
        ]
        self._many(f"INSERT INTO events ({_COLUMNS[4:]}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def state(self, experiment: str) -> State | None:
        """The state after the last event; None: there was none."""
        found = self._database.execute(
            "SELECT state FROM events WHERE experiment = ? ORDER BY id DESC LIMIT 1", (experiment,)
        ).fetchone()
        return State(**json.loads(found[0])) if found else None

    def write_terms(self, experiment: str, terms: Mapping[str, Any]) -> None:
        """Writes what an experiment that is about to begin compares, in place of what was written before."""
        self._many("INSERT OR REPLACE INTO terms (experiment, body) VALUES (?, ?)", [(experiment, _json(dict(terms)))])

    def terms(self, experiment: str) -> dict[str, Any] | None:
        """What `write_terms` was given last; None: nothing."""
        found = self._database.execute("SELECT body FROM terms WHERE experiment = ?", (experiment,)).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def events(self, experiment: str | None = None, *, after: int = 0) -> list[dict[str, Any]]:
        """Events in their order, of one experiment or all, as JSON objects; those with an `id` above `after`."""
        rows = self._database.execute(
            f"SELECT {_COLUMNS} FROM events WHERE id > ? AND (? IS NULL OR experiment = ?) ORDER BY id",
            (after, experiment, experiment),
        )
        names = _COLUMNS.split(", ")
        return [
            {name: json.loads(value) if name in ("state", "weights", "evidence") else value for name, value in pairs}
            for pairs in (zip(names, row, strict=True) for row in rows)
        ]

    def export(self, experiment: str | None = None) -> str:
        """The events as a JSON document; bounds that are not known are null."""
        return json.dumps({"events": self.events(experiment)}, indent=1)

    def append_observations(self, experiment: str, seen: Sequence[Observation], *, candidate: bool, stage: int) -> None:
        """Writes observations of one arm, as given to `Evidence.add`: a batch each second or so, not one each."""
        if seen:
            body = _json([astuple(one) for one in seen])
            row = (experiment, candidate, stage, body)
            self._many("INSERT INTO observations (experiment, candidate, stage, body) VALUES (?, ?, ?, ?)", [row])

    def observations(self, experiment: str) -> Iterator[tuple[list[Observation], bool, int]]:
        """What `append_observations` was given, in its order: observations, whether the candidate's, stage."""
        rows = self._database.execute(
            "SELECT candidate, stage, body FROM observations WHERE experiment = ? ORDER BY id", (experiment,)
        )
        for candidate, stage, body in rows:
            try:
                seen = [Observation(*values) for values in json.loads(body)]
            except TypeError as error:
                raise sqlite3.DataError(f"observations of {experiment!r} are of another version: {error}") from error
            yield seen, bool(candidate), stage

    def restore(self, experiment: str, start_s: float, limit: int, last_stage: int) -> tuple[Evidence, int, int]:
        """The evidence as it was, and the requests of candidate and baseline, those of `last_stage` among them, which
        are no evidence."""
        evidence = Evidence(start_s, limit=limit)
        counts = [0, 0]
        for seen, candidate, stage in self.observations(experiment):
            if stage < last_stage:
                evidence.add(seen, candidate=candidate, stage=stage)
            counts[0 if candidate else 1] += len(seen)
        return evidence, counts[0], counts[1]

    def _many(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._database.executemany(statement, rows)
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def _json(value: object) -> str:
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
