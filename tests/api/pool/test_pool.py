"""Several API workers on one port, before an engine that only speaks: one server to whoever looks at it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 60.0
NUM_WORKERS = 2
WAITING = 'outpace_requests_waiting{arm="control"}'

pytestmark = pytest.mark.timeout(180)


@dataclass
class Pool:
    """A running pool."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pids(self, name: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                is_child = f"PPid:\t{self.process.pid}\n" in (entry / "status").read_text()
                if is_child and name in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except (OSError, ValueError):
                continue
        return found

    @property
    def workers(self) -> list[int]:
        return self.pids("server.api.pool.worker")

    @property
    def engine(self) -> int:
        (pid,) = self.pids("scripted_engine.py")
        return pid

    async def post(self, max_tokens: int = 2, key: str | None = None, **fields: Any) -> tuple[int, Any]:
        """One request on a connection of its own: the kernel chooses the worker."""
        body = {"prompt": [1000], "max_tokens": max_tokens, "ignore_eos": True, **fields}
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with (
            aiohttp.ClientSession() as http,
            http.post(self.url + "/v1/completions", json=body, headers=headers) as response,
        ):
            text = await response.text()
            return response.status, text if fields.get("stream") else json.loads(text)

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as http, http.get(self.url + path) as response:
            return response.status, await response.text()

    async def metric(self, name: str) -> float:
        """The value of a sample, labels included in `name`."""
        status, text = await self.get("/metrics")
        assert status == 200
        match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert match is not None, name
        return float(match[1])

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                result = condition()
                if asyncio.iscoroutine(result):
                    result = await result
                if result:
                    return
            except (aiohttp.ClientError, ValueError):
                pass
            await asyncio.sleep(0.02)
        raise AssertionError(f"waited {PATIENCE_S} s in vain: {what}")


@contextmanager
def pool(*flags: str, step_ms: str = "2", last: str = "API workers") -> Iterator[Pool]:
    """`last` is in the line after which it serves."""
    command = [sys.executable, str(ROOT / "benchmarks" / "scripted_server.py"), step_ms, "--port", "0"]
    command += ["--api-workers", str(NUM_WORKERS), "--access-log", "off", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if last in line:
                break
        match = re.search(r"http://127\.0\.0\.1:(\d+)", "".join(lines))
        assert match is not None, f"it did not start: {lines}"
        yield Pool(process, int(match[1]))
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def running(embedded_model_dir: Path) -> Iterator[Pool]:
    """One pool for the tests that leave it as it was."""
    with pool() as started:
        yield started


async def test_workers_share_the_port_and_metrics_are_the_sum(running: Pool) -> None:
    before = await running.metric('outpace_requests_total{arm="control",finish_reason="length"}')
    assert len(running.workers) == NUM_WORKERS
    for _ in range(20):
        status, answer = await running.post()
        assert (status, answer["usage"]["completion_tokens"]) == (200, 2)
    for _ in range(4):  # whichever worker is asked
        assert await running.metric('outpace_requests_total{arm="control",finish_reason="length"}') == before + 20
    assert await running.metric('outpace_engine_ready{arm="control"}') == 1


async def test_a_killed_worker_is_replaced_and_nothing_it_counted_or_held_is_lost(running: Pool) -> None:
    for _ in range(6):
        await running.post()
    counted = await running.metric('outpace_requests_total{arm="control",finish_reason="length"}')
    streams = [asyncio.create_task(running.post(4000, stream=True)) for _ in range(8)]
    await running.until(lambda: running.metric('outpace_requests_running{arm="control"}'), "they run")
    first = running.workers
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    results = await asyncio.gather(*streams, return_exceptions=True)
    assert all(isinstance(result, aiohttp.ClientError) for result in results)
    await running.until(lambda: len(set(running.workers) - set(first)) == NUM_WORKERS, "others take their places")
    await running.until(lambda: _is_ready(running), "they serve")
    assert (await running.post())[0] == 200
    await running.until(lambda: _nothing_runs(running), "nobody generates for a dead worker")
    assert await running.metric('outpace_requests_total{arm="control",finish_reason="length"}') >= counted


async def test_quantiles_are_those_of_all_workers_together(running: Pool) -> None:
    before = await _measured(running)
    for _ in range(20):
        await running.post(6)
    now = before
    for _ in range(4):  # whichever worker is asked
        now = await _measured(running)
        assert now["e2e"]["count"] == before["e2e"]["count"] + 20
        assert now["itl"]["count"] == before["itl"]["count"] + 100
        assert 0 < now["itl"]["p50_s"] <= now["itl"]["p95_s"] <= now["itl"]["p99_s"] < PATIENCE_S
    name = 'outpace_inter_token_latency_quantile_seconds{arm="control",quantile="0.5",window="1h"}'
    assert await running.metric(name) == pytest.approx(now["itl"]["p50_s"])
    assert await running.metric('vllm:num_requests_running{engine="0",model_name="smollm2-135m"}') >= 0


async def _measured(running: Pool) -> Any:
    status, text = await running.get("/v1/stats")
    assert status == 200
    return json.loads(text)["arms"]["control"]["latency"]["1h"]


async def _is_ready(running: Pool) -> bool:
    return (await running.get("/ready"))[0] == 200


async def _nothing_runs(running: Pool) -> bool:
    return await running.metric('outpace_requests_running{arm="control"}') == 0


async def test_every_workers_streams_end_when_the_engine_dies_and_it_comes_back(running: Pool) -> None:
    streams = [asyncio.create_task(running.post(4000, stream=True)) for _ in range(8)]
    await running.until(lambda: _count_is(running, 'outpace_requests_running{arm="control"}', 8), "they run")
    restarts = await running.metric('outpace_engine_restarts_total{arm="control"}')
    os.kill(running.engine, signal.SIGKILL)
    for status, text in await asyncio.wait_for(asyncio.gather(*streams), PATIENCE_S):
        assert status == 200
        assert '"code":"engine_unavailable"' in text
        assert "[DONE]" not in text
    await running.until(lambda: _is_ready(running), "it is ready again")
    for _ in range(6):
        assert (await running.post())[0] == 200
    assert await running.metric('outpace_engine_restarts_total{arm="control"}') == restarts + 1


async def _count_is(running: Pool, name: str, value: float) -> bool:
    return await running.metric(name) == value


async def test_the_queue_is_one_for_all_workers(embedded_model_dir: Path) -> None:
    with pool("--max-num-seqs", "2", "--max-waiting", "3", step_ms="20") as running:
        # Answers of three seconds: on a busy machine the last of twelve requests comes a second after the first.
        results = await asyncio.gather(*(running.post(150) for _ in range(12)))
        assert sorted(status for status, _ in results) == [200] * 5 + [429] * 7


async def test_a_keys_limit_holds_over_all_workers_and_keys_are_reloaded(
    embedded_model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    key, other = "sk-outpace-" + "a" * 43, "sk-outpace-" + "b" * 43
    admin = "sk-outpace-" + "c" * 43
    file.write_text(f'[admin]\nsha256 = "{_sha256(admin)}"\n' + _entry("alice", key, "requests_per_minute = 5"))
    with pool("--api-keys", str(file)) as running:
        assert (await running.post())[0] == 401
        statuses = [(await running.post(key=key))[0] for _ in range(12)]
        assert statuses == [200] * 5 + [429] * 7
        assert (await running.post(key=other))[0] == 401
        file.write_text(file.read_text() + _entry("bob", other, ""))
        running.process.send_signal(signal.SIGHUP)

        async def reloaded() -> bool:
            return [(await running.post(key=other))[0] for _ in range(6)] == [200] * 6

        await running.until(reloaded, "every worker knows the new key")
        file.write_text("no = toml = at all")
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {admin}"}) as http,
            http.post(running.url + "/admin/reload") as response,
        ):
            assert response.status == 500
            assert (await response.json())["error"]["code"] == "reload_failed"
        assert (await running.post(key=key))[0] == 429
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {admin}"}) as http,
            http.get(running.url + "/admin/keys") as response,
        ):
            used = {entry["name"]: entry["used"]["requests"] for entry in (await response.json())["data"]}
        assert used["alice"] == 5
        assert used["bob"] >= 6


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _entry(name: str, key: str, more: str) -> str:
    return f'[[key]]\nname = "{name}"\nsha256 = "{_sha256(key)}"\n{more}\n'


async def test_sigterm_loses_nothing_that_was_admitted(embedded_model_dir: Path) -> None:
    with pool("--max-num-seqs", "4", "--drain-timeout-s", "60", step_ms="10") as running:
        first = running.workers
        os.kill(first[0], signal.SIGKILL)  # an earlier death must not make the stop believe that all is done
        await running.until(lambda: len(running.workers) == NUM_WORKERS and running.workers != first, "another one")
        await running.until(lambda: _serve_all(running), "it serves")
        streams = [asyncio.create_task(running.post(160, stream=True)) for _ in range(16)]
        await running.until(lambda: _count_is(running, WAITING, 12), "all are admitted")
        workers, engine = running.workers, running.engine
        running.process.send_signal(signal.SIGTERM)
        await running.until(lambda: _refuses(running), "new work is refused")
        for status, text in await asyncio.gather(*streams):
            assert status == 200
            assert text.endswith("data: [DONE]\n\n")
            assert text.count('"text"') == 160
        assert running.process.wait(PATIENCE_S) == 0
        assert not any(alive(pid) for pid in [*workers, engine])


async def _serve_all(running: Pool) -> bool:
    """Of connections that the kernel spreads over the workers."""
    return all([(await running.post())[0] == 200 for _ in range(8)])


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def _refuses(running: Pool) -> bool:
    return (await running.get("/ready"))[0] == 503 and (await running.post())[0] == 503


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--api-keys", "no-such-file.toml"), "no-such-file.toml"),
        (("--tls-certificate", "nothing.pem", "--tls-key", "nothing.pem"), "nothing.pem"),
        (("--model", "no-such-model-directory"), "no-such-model-directory"),
        (("--access-log", "/no/such/folder/log"), "/no/such/folder"),
    ],
)
def test_what_is_wrong_is_one_line(flags: tuple[str, ...], reason: str) -> None:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--api-workers", "2", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("outpace serve: ")]
    assert reason in line
