"""An experiment over real processes: all workers follow it, a crash of the candidate ends it, a restart knows."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from server.api.access.keys import digest_of
from tests.api.pool.test_pool import Pool, pool
from tests.api.pool.test_pool_arms import USERS, arm_of

FILE = """
experiment_ledger = "{ledger}"
[[arms]]
name = "candidate"
[experiment]
name = "crash"
candidate = "candidate"
stages = [{{share = 40, min_samples = 100000}}, {{share = 100, min_samples = 0}}]
"""

pytestmark = pytest.mark.timeout(240)


async def told(server: Pool) -> dict[str, Any]:
    """What `/v1/experiments` says of it."""
    status, answer = await server.get("/v1/experiments")
    assert status == 200
    (found,) = json.loads(answer)["data"]
    assert isinstance(found, dict)
    return found


async def ended(server: Pool) -> bool:
    return bool((await told(server))["status"] == "rolled_back")


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_crash_of_the_candidate_ends_it(embedded_model_dir: Path, tmp_path: Path, workers: int) -> None:
    file = tmp_path / "outpace.toml"
    file.write_text(FILE.format(ledger=tmp_path / "ledger"))
    flags = ("--config", str(file), "--api-workers", str(workers))

    def serving() -> Any:
        return pool(*flags, last="Arm baseline serves")

    with serving() as server:

        async def begun() -> bool:
            return bool((await told(server))["status"] == "running")

        async def spread() -> bool:
            found = {(await arm_of(server, user=user))[1] for user in USERS}
            return found == {"control", "candidate", "baseline"}

        await server.until(begun, "the experiment begins")
        await server.until(spread, "every worker follows")
        first = [await arm_of(server, user=user) for user in USERS]
        assert [await arm_of(server, user=user) for user in USERS] == first, "another worker says the same"

        async def counted() -> bool:
            return bool((await told(server))["num_candidate"])

        await server.until(counted, "what workers saw arrives")
        candidate = sorted(server.pids("scripted_engine.py"), key=_started)[1]
        os.kill(candidate, signal.SIGKILL)
        await server.until(lambda: ended(server), "it is rolled back")
        assert "engine restarts" in (await told(server))["reason"]

        async def controls() -> bool:
            return {(await arm_of(server, user=user))[1] for user in USERS} == {"control"}

        await server.until(controls, "all is the control's again")
    with serving() as server:
        assert await ended(server), "the ledger knows"
        assert {(await arm_of(server, user=user))[1] for user in USERS} == {"control"}
        events = json.loads((await server.get("/v1/experiments/events"))[1])["data"]
        assert [event["kind"] for event in events] == ["start", "roll_back"]


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().split()[21])


RETIRE = """
experiment_ledger = "{ledger}"
api_keys = "{keys}"
[[arms]]
name = "candidate"
[experiment]
name = "retire"
candidate = "candidate"
retire = true
stages = [{{share = 40, min_samples = 100000}}, {{share = 100, min_samples = 0}}]
"""
ADMIN, USER = "sk-outpace-admin", "sk-outpace-user"


async def test_after_the_verdict_every_worker_has_one_engine(embedded_model_dir: Path, tmp_path: Path) -> None:
    keys, file = tmp_path / "keys.toml", tmp_path / "outpace.toml"
    keys.write_text(f'[admin]\nsha256 = "{digest_of(ADMIN)}"\n[[key]]\nname = "user"\nsha256 = "{digest_of(USER)}"\n')
    file.write_text(RETIRE.format(ledger=tmp_path / "ledger", keys=keys))
    headers = {"Authorization": f"Bearer {USER}"}

    async def arms(server: Pool, count: int = 24) -> set[str]:
        found = set()
        for number in range(count):
            body = {"prompt": [1000], "max_tokens": 2, "ignore_eos": True, "user": f"user-{number}"}
            async with (
                aiohttp.ClientSession(headers=headers) as http,
                http.post(server.url + "/v1/completions", json=body) as response,
            ):
                assert response.status == 200, await response.text()
                found.add(response.headers.get("x-outpace-arm", "alone"))
        return found

    with pool("--config", str(file), last="Arm baseline serves") as server:

        async def spread() -> bool:
            return await arms(server) == {"control", "candidate", "baseline"}

        await server.until(spread, "every worker follows")
        engines = set(server.pids("scripted_engine.py"))
        admin = {"Authorization": f"Bearer {ADMIN}"}
        url = server.url + "/admin/experiment/promote"
        async with aiohttp.ClientSession() as http, http.post(url, json={}, headers=admin) as response:
            assert response.status == 200, await response.text()

        async def one_engine() -> bool:
            assert await arms(server, 4) <= {"alone", "candidate", "control", "baseline"}, "nobody is turned away"
            return len(server.pids("scripted_engine.py")) == 1

        await server.until(one_engine, "the other engines stop")
        assert set(server.pids("scripted_engine.py")) < engines
        assert await arms(server) == {"alone"}
        os.kill(server.workers[0], signal.SIGKILL)

        async def two_workers() -> bool:
            return len(server.workers) == 2 and await arms(server) == {"alone"}

        await server.until(two_workers, "a new worker knows one arm")
        async with aiohttp.ClientSession(headers=headers) as http, http.get(server.url + "/metrics") as response:
            metrics = await response.text()
        assert 'outpace_engine_ready{arm="control"} 1' in metrics and 'engine_ready{arm="candidate"}' not in metrics
        assert 'outpace_experiment_verdict{experiment="retire"} 1' in metrics
