"""Shadows before several API workers: the owner's book has what every worker compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.pool.test_pool import NUM_WORKERS, Pool, pool

FILE = """
[[arms]]
name = "plain"
drafter = "none"
[shadow]
arm = "plain"
share = 1.0
"""
NUM_REQUESTS = 20

pytestmark = pytest.mark.timeout(180)


async def pair_of(server: Pool) -> dict[str, Any]:
    status, text = await server.get("/v1/shadow")
    assert status == 200
    (pair,) = json.loads(text)["pairs"]
    assert isinstance(pair, dict)
    return pair


async def test_every_workers_comparisons_count_whichever_is_asked(embedded_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "outpace.toml"
    file.write_text(FILE)
    with pool("--config", str(file), last="Arm plain serves") as server:

        async def loaded() -> bool:
            """Every worker has the arm's text."""
            await server.post(2)
            return bool((await pair_of(server))["compared"] >= 2 * NUM_WORKERS)

        await server.until(loaded, "copies are compared")
        answers = [await server.post(3) for _ in range(NUM_REQUESTS)]
        assert [status for status, _ in answers] == [200] * NUM_REQUESTS
        asked = await server.metric('outpace_requests_total{arm="control",finish_reason="length"}')

        async def all_told() -> bool:
            pair = await pair_of(server)
            return bool(pair["compared"] + pair["dropped"] == asked)

        await server.until(all_told, "each request's copy is on the books")
        for _ in range(4):  # whichever worker is asked
            pair = await pair_of(server)
            assert (pair["diverged"], pair["compared"] >= NUM_REQUESTS) == (0, True)
            assert await server.metric('outpace_shadow_compared_total{arm="plain",of="control"}') == pair["compared"]
        assert await server.metric('outpace_requests_total{arm="plain",finish_reason="length"}') == 0
