"""How much the generator can drive from one core."""

from __future__ import annotations

import pytest

from benchmarks.loadtest_capacity import measure
from tests.loadtest.conftest import Reference


@pytest.mark.slow
def test_one_core_drives_two_thousand_streams_and_twenty_thousand_chunks_a_second(server: Reference) -> None:
    """Chunks for each second of the generator's own CPU time: the server, and other work, may share its core."""
    found = measure(server.url, streams=2000, chunks_per_s=20_000, seconds=8.0)
    assert found["ended_well"] == 2000
    assert found["streams_at_once"] == 2000
    assert found["chunks_per_cpu_s"] >= 20_000, found
