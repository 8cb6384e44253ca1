"""Two arms with an engine process each, before one API process and before two: who answers, and who when one dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from server.api.access.keys import digest_of
from server.api.arms import ARM_HEADER
from tests.api.pool import test_pool
from tests.api.pool.test_pool import Pool, pool

ADMIN, USER = "sk-outpace-admin", "sk-outpace-user"
FILE = """
[routing]
salt = "a"
[[arms]]
name = "canary"
weight = 50
"""
USERS = [f"user-{number}" for number in range(24)]

pytestmark = pytest.mark.timeout(240)


@asynccontextmanager
async def served(tmp_path: Path, workers: int) -> AsyncIterator[Pool]:
    """Both arms serve."""
    path = tmp_path / "outpace.toml"
    path.write_text(FILE)
    with pool("--config", str(path), "--api-workers", str(workers), last="Arm canary serves") as started:
        await started.until(lambda: all_ready(started), "the canary serves")
        yield started


async def all_ready(server: Pool) -> bool:
    """In every worker: each loads the arm's tokenizer by itself."""
    return all([(await arm_of(server, model="canary"))[0] == 200 for _ in range(12)])


async def arms_ready(server: Pool) -> bool:
    told = json.loads((await server.get("/server_info"))[1])
    return bool(told["ready"]) and bool(told["arms"]["canary"]["ready"])


async def arm_of(server: Pool, **fields: Any) -> tuple[int, str]:
    """On a connection of its own: the kernel chooses the worker."""
    body = {"prompt": [1000], "max_tokens": 2, "ignore_eos": True, **fields}
    async with aiohttp.ClientSession() as http, http.post(server.url + "/v1/completions", json=body) as response:
        await response.read()
        return response.status, response.headers.get(ARM_HEADER, "")


def engines(server: Pool) -> list[int]:
    """The control's, which starts first, and the canary's."""
    return sorted(
        server.pids("scripted_engine.py"), key=lambda pid: int(Path(f"/proc/{pid}/stat").read_text().split()[21])
    )


@pytest.mark.parametrize("workers", [1, 2])
async def test_sticky_until_an_engine_dies_and_again_after(
    embedded_model_dir: Path, tmp_path: Path, workers: int
) -> None:
    async with served(tmp_path, workers) as server:
        first = [await arm_of(server, user=user) for user in USERS]
        assert {status for status, _ in first} == {200}
        assert {arm for _, arm in first} == {"control", "canary"}
        assert [await arm_of(server, user=user) for user in USERS] == first, "another worker says the same"
        control, canary = engines(server)
        os.kill(canary, signal.SIGKILL)

        async def gone() -> bool:
            return not await arms_ready(server)

        await server.until(gone, "the canary's death is noticed")
        theirs = USERS[[arm for _, arm in first].index("canary")]
        assert await arm_of(server, user=theirs) == (200, "control"), "the control takes the canary's keys"
        assert (await arm_of(server, model="canary"))[0] == 503
        assert (await server.get("/ready"))[0] == 200
        await server.until(lambda: all_ready(server), "the canary is back")
        assert [await arm_of(server, user=user) for user in USERS] == first
        assert engines(server)[0] == control != canary
        told = json.loads((await server.get("/server_info"))[1])
        assert (told["num_engine_restarts"], told["arms"]["canary"]["num_engine_restarts"]) == (0, 1)


async def test_a_stop_waits_for_every_arm(embedded_model_dir: Path, tmp_path: Path) -> None:
    async with served(tmp_path, 2) as server:
        asked = [asyncio.ensure_future(arm_of(server, model=arm, max_tokens=200)) for arm in ("control", "canary")]
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert [status for status, _ in await asyncio.gather(*asked)] == [200, 200]
        assert await asyncio.to_thread(server.process.wait, test_pool.PATIENCE_S) == 0
        assert not engines(server)


@pytest.mark.parametrize("workers", [1, 2])
async def test_weights_are_everybodys(embedded_model_dir: Path, tmp_path: Path, workers: int) -> None:
    """Of every worker, a worker that comes later among them."""
    keys, file = tmp_path / "keys.toml", tmp_path / "outpace.toml"
    keys.write_text(f'[admin]\nsha256 = "{digest_of(ADMIN)}"\n[[key]]\nname = "user"\nsha256 = "{digest_of(USER)}"\n')
    file.write_text(f'api_keys = "{keys}"\n' + FILE)

    async def asked(path: str, key: str, body: Any) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession() as http, http.post(server.url + path, json=body, headers=headers) as answer:
            text = await answer.text()
            return answer.status, answer.headers.get(ARM_HEADER, "") if path.startswith("/v1") else text

    async def arms() -> set[str]:
        body = {"prompt": [1000], "max_tokens": 1, "ignore_eos": True}
        found = [await asked("/v1/completions", USER, {**body, "user": f"user-{i}"}) for i in range(30)]
        assert {status for status, _ in found} == {200}
        return {arm for _, arm in found}

    with pool("--config", str(file), "--api-workers", str(workers), last="Arm canary serves") as server:

        async def both() -> bool:
            return await arms() == {"control", "canary"}

        await server.until(both, "both arms answer")
        assert (await asked("/admin/weights", USER, {"weights": {"canary": 0}}))[0] == 403
        status, text = await asked("/admin/weights", ADMIN, {"weights": {"canary": 101}})
        assert status == 400 and "use 0 to 100" in text
        status, text = await asked("/admin/weights", ADMIN, {"weights": {"canary": 0}})
        assert (status, json.loads(text)) == (200, {"weights": {"control": 100.0, "canary": 0.0}})
        assert await arms() == {"control"}
        if workers > 1:
            os.kill(server.pids("server.api.pool.worker")[0], signal.SIGKILL)
            await asyncio.sleep(1.0)

            async def again() -> bool:
                return len(server.pids("server.api.pool.worker")) == workers

            await server.until(again, "another worker comes")
            assert [await arms() for _ in range(4)] == [{"control"}] * 4
        assert (await asked("/admin/weights", ADMIN, {"weights": {"canary": 100}}))[0] == 200
        assert await arms() == {"canary"}
