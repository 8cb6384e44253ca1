from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from server.api.access.counters import SharedCounts


def test_one_process_needs_no_file() -> None:
    counts = SharedCounts()
    counts.add(3, 100)
    counts.add(-1)
    assert counts.total() == counts.own() == (2, 100)


def test_workers_see_the_sum(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    SharedCounts.create(path, 3)
    first, second = SharedCounts(path, 3, 0), SharedCounts(path, 3, 1)
    first.add(1, 10)
    second.add(2, 20)
    second.add(0, -5)
    assert first.total() == second.total() == (3, 25)
    code = f"from server.api.access.counters import SharedCounts as C; print(*C({str(path)!r}, 3, 2).total())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "25"]


def test_what_a_dead_worker_held_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    SharedCounts.create(path, 2)
    first, dead = SharedCounts(path, 2, 0), SharedCounts(path, 2, 1)
    first.add(1, 1)
    dead.add(5, 50)
    first.clear(1)
    assert first.total() == (1, 1)
    dead.add(1, 1)
    restarted = SharedCounts(path, 2, 1)
    assert restarted.own() == (0, 0) and first.total() == (1, 1)
