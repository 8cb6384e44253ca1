"""What the ledger keeps, through a kill as well."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from server.routing.evidence.metrics import Finding
from server.routing.evidence.observation import Observation
from server.routing.experiment import Reading, act, start
from server.routing.ledger import Ledger
from server.routing.plan import Plan

PLAN = Plan("faster", "candidate", "baseline")
UNKNOWN = Finding("tpot", "undecided", math.nan, -math.inf, math.inf, 0.005, 0, 0, 0.0)


def test_state_and_events_come_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    state, event = start(PLAN, "salt", 5.0, "root")
    ledger.append("faster", [event])
    assert ledger.state("faster") == state and ledger.state("another") is None
    after, events = act(PLAN, state, "roll_back", Reading((UNKNOWN,)), 7.0, "root")
    ledger.append("faster", events)
    ledger.close()
    again = Ledger(tmp_path / "ledger.db")
    assert again.state("faster") == after
    exported = json.loads(again.export("faster"))["events"]
    assert [e["kind"] for e in exported] == ["start", "roll_back"]
    assert exported[1]["evidence"]["findings"][0]["upper"] is None and exported[1]["actor"] == "root"
    assert exported[1]["weights"] == {"control": 100.0, "baseline": 0.0, "candidate": 0.0}
    assert [e["kind"] for e in again.events(after=exported[0]["id"])] == ["roll_back"]
    again.close()


def test_events_cannot_be_changed_or_taken_away(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.append("faster", [start(PLAN, "salt", 5.0)[1]])
    for statement in ("DELETE FROM events", "UPDATE events SET reason = ''"):
        with pytest.raises(sqlite3.IntegrityError, match="only grow"):
            ledger._database.execute(statement)
    ledger.close()


def test_evidence_comes_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    seen = [Observation(7, 1.0, 3, ttft_ms=20.0), Observation(8, 2.0, error=True)]
    ledger.append_observations("faster", seen, candidate=True, stage=2)
    ledger.append_observations("faster", [Observation(9, 2.5, tpot_ms=4.0)], candidate=False, stage=2)
    assert next(iter(ledger.observations("faster"))) == (seen, True, 2)
    evidence, ours, theirs = ledger.restore("faster", 0.0, 1000, 4)
    assert (ours, theirs, evidence.candidate.size, evidence.baseline.size) == (2, 1, 1, 1)
    assert evidence.candidate.values("ttft_ms").tolist() == [20.0]
    evidence, ours, theirs = ledger.restore("faster", 0.0, 1000, 2)
    assert (ours, theirs, evidence.candidate.size, evidence.baseline.size) == (2, 1, 0, 0), "nobody to compare with"
    ledger.close()


CHILD = """
import os, signal, sys
from pathlib import Path
from server.routing.experiment import Reading, start, step
from server.routing.ledger import Ledger
from server.routing.plan import Plan
ledger, plan = Ledger(Path(sys.argv[1])), Plan("faster", "candidate", "baseline")
state, event = start(plan, "salt", 0.0)
ledger.append(plan.name, [event])
state, events = step(plan, state, Reading(num_candidate=30, num_baseline=30), 1000.0)
ledger.append(plan.name, events)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    path = tmp_path / "ledger.db"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], env={**os.environ, "PYTHONPATH": root}, check=False
    )
    assert child.returncode == -signal.SIGKILL
    ledger = Ledger(path)
    state = ledger.state("faster")
    assert state is not None and (state.stage, state.salt, state.status) == (1, "salt", "running")
    ledger.close()
