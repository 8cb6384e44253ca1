"""Five thousand cases against a real server with a tiny model; `make fuzz CASES=100000` for more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import campaign, server
from tests.fuzz.process import ServerProcess
from tests.fuzz.raw import make_case

NUM_CASES = 5000
SEED = 1

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.fixture(scope="module")
def fuzzed(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = server.start(tiny_llama_dir, tmp_path_factory.mktemp("fuzz") / "server.log")
    yield running
    running.stop()


async def test_nothing_that_is_sent_takes_the_server_down(fuzzed: ServerProcess, tmp_path: Path) -> None:
    """No server error, no silence, no error in a shape of its own, nothing left behind, the engine never restarted."""
    cases = (make_case(SEED, index) for index in range(NUM_CASES))
    verdict = await campaign.run(fuzzed.url, cases, limit_s=60.0, pid=fuzzed.pid)
    saved = campaign.save_faults(verdict, tmp_path)
    assert verdict.clean, f"{verdict.summary()}\nsaved {[str(path) for path in saved]}"
    assert verdict.num_cases == NUM_CASES
    assert verdict.statuses[200] > NUM_CASES / 10, "else next to nothing got as far as the engine"
    assert verdict.statuses[400] > NUM_CASES / 10
    assert "Traceback" not in fuzzed.output()
