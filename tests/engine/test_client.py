"""A real engine process on a tiny model: start, stream, abort, death, restart, end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from server.config import EngineConfig
from server.core import FinishReason, Request, SamplingParams, StepOutput
from server.engine.client import EngineClient
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineStats

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE_S = 60.0
LONG = 400


def settings(model: Path | str) -> EngineConfig:
    return EngineConfig(
        model=str(model), adaptive=False, num_threads=1, max_num_seqs=4, kv_cache_tokens=2048, max_waiting=8
    )


def request(name: str, max_tokens: int = 8, prompt: list[int] | None = None) -> Request:
    sampling = SamplingParams(temperature=0.0)
    return Request(name, prompt or [5, 6, 7, 8], sampling, max_tokens=max_tokens, ignore_eos=True)


async def collect(client: EngineClient, req: Request) -> list[StepOutput]:
    return [output async for output in client.stream(req)]


def tokens(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(int(PATIENCE_S / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE_S} s in vain: {what}")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tiny_llama_dir: Path) -> AsyncIterator[EngineClient]:
    """One engine for the module; a test that kills it leaves the restarted one behind."""
    client = EngineClient(settings(tiny_llama_dir))
    await client.start()
    await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    yield client
    await client.close()


async def test_it_says_what_it_is(client: EngineClient) -> None:
    info = await client.wait_ready()
    assert (info.vocab_size, info.max_model_len, info.kv_cache_tokens, info.drafter) == (288, 512, 2048, "suffix")
    assert client.ready
    assert client.failure is None
    assert client.pid is not None
    assert alive(client.pid)


async def test_streams_end_and_repeat(client: EngineClient) -> None:
    seen: list[EngineStats] = []
    client.on_stats = seen.append
    before = client.stats.num_emitted
    requests = [request(f"r{i}", 4 + i, [5 + i, 6, 7]) for i in range(8)]
    crowd = await asyncio.gather(*(collect(client, r) for r in requests))
    alone = [await collect(client, request(f"again{i}", 4 + i, [5 + i, 6, 7])) for i in range(8)]
    for i, (outputs, once_more) in enumerate(zip(crowd, alone, strict=True)):
        assert len(tokens(outputs)) == 4 + i
        assert tokens(outputs) == tokens(once_more)
        assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert outputs[0].num_cached is not None
    client.on_stats = None
    assert client.num_in_flight == 0
    assert seen[-1].num_emitted - before == 2 * sum(range(4, 12))


async def test_a_refusal_is_the_only_output(client: EngineClient) -> None:
    (output,) = await collect(client, request("long", 600))
    assert output.finish_reason is FinishReason.ERROR
    assert "context of 512" in str(output.error)
    assert client.num_in_flight == 0


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_a_client_that_goes_away_frees_its_blocks(client: EngineClient, how: str) -> None:
    started = asyncio.Event()

    async def watch(name: str) -> None:
        stream = client.stream(request(name, LONG))
        async with contextlib.aclosing(stream):
            async for _ in stream:
                started.set()
                if how == "close":
                    return

    tasks = [asyncio.create_task(watch(f"{how}{i}")) for i in range(3)]
    await started.wait()
    if how == "cancel":
        for task in tasks:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert client.num_in_flight == 0
    await until(lambda: client.stats.num_running == client.stats.kv_blocks_used == 0, "the abort reaches the engine")
    assert client.stats.num_waiting == 0
    assert len(tokens(await collect(client, request("after")))) == 8


async def test_an_abort_does_not_disturb_others(client: EngineClient) -> None:
    expected = tokens(await collect(client, request("alone", 60)))
    stays = asyncio.create_task(collect(client, request("stays", 60)))
    goes = client.stream(request("goes", LONG, [9, 9, 9]))
    await anext(goes)
    await goes.aclose()
    assert tokens(await stays) == expected


async def test_an_id_in_flight_can_not_be_used_twice(client: EngineClient) -> None:
    first = client.stream(request("same", 40))
    await anext(first)
    with pytest.raises(ValueError, match="'same' is in flight"):
        await collect(client, request("same", 40))
    rest = [output async for output in first]
    assert rest[-1].finish_reason is FinishReason.LENGTH


async def test_drain_waits_for_what_is_in_flight(client: EngineClient) -> None:
    task = asyncio.create_task(collect(client, request("slow", 100)))
    await until(lambda: client.num_in_flight == 1, "the request is in flight")
    await client.drain(0.0)
    assert not task.done()
    await client.drain(PATIENCE_S)
    assert client.num_in_flight == 0
    assert len(tokens(await task)) == 100


async def test_a_killed_engine_fails_what_ran_keeps_what_waited_and_comes_back(client: EngineClient) -> None:
    """Four sequences fit: two of six requests have not begun, and nobody saw anything of them."""
    expected = tokens(await collect(client, request("calm", 40)))
    restarts, pid = client.num_restarts, client.pid
    assert pid is not None
    doomed = [asyncio.create_task(collect(client, request(f"doomed{i}", LONG))) for i in range(4)]
    await until(lambda: client.stats.num_running == 4, "they run")
    waiting = [asyncio.create_task(collect(client, request(f"waiting{i}", 40))) for i in range(2)]
    await until(lambda: client.stats.num_waiting == 2, "they wait")
    os.kill(pid, signal.SIGKILL)
    results = await asyncio.wait_for(asyncio.gather(*doomed, return_exceptions=True), PATIENCE_S)
    assert all(isinstance(r, EngineUnavailable) and "died" in str(r) for r in results)
    assert not client.ready
    assert "exit code -9" in str(client.failure)
    with pytest.raises(EngineUnavailable, match="restarting"):
        await collect(client, request("too early"))
    for task in waiting:
        assert tokens(await asyncio.wait_for(task, PATIENCE_S)) == expected
    assert client.ready
    assert client.num_restarts == restarts + 1
    assert client.failure is None
    assert client.pid != pid
    assert client.num_in_flight == 0


async def test_a_hung_step_is_a_dead_engine(tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client = EngineClient(replace(settings(tiny_llama_dir), step_timeout_s=1.0))
    await client.start()
    await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    pid = client.pid
    assert pid is not None
    task = asyncio.create_task(collect(client, request("r", LONG)))
    await until(lambda: client.stats.num_running > 0, "it runs")
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineUnavailable, match="died"):
        await asyncio.wait_for(task, PATIENCE_S)
    assert "hung: no step ended for 1 s" in str(client.failure)
    assert client.supervisor.num_hangs == 1
    await until(lambda: client.ready, "the engine comes back")
    assert not alive(pid)
    assert len(tokens(await collect(client, request("after")))) == 8
    await client.close()


async def test_a_pause_of_this_process_is_not_the_engines(tiny_llama_dir: Path) -> None:
    client = EngineClient(replace(settings(tiny_llama_dir), step_timeout_s=1.0))
    await client.start()
    await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    time.sleep(2.5)  # noqa: ASYNC251 - what is tested is a loop that stands still
    await asyncio.sleep(1.5)
    assert client.num_restarts == 0
    assert client.ready
    await client.close()


async def test_signals_to_the_whole_group_leave_the_engine_alone(client: EngineClient) -> None:
    assert client.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(client.pid, number)
    assert len(tokens(await collect(client, request("after")))) == 8


SHORT_LIVED = """
import json, pathlib, sys
lives = pathlib.Path(sys.argv[1])
count = int(lives.read_text()) if lives.exists() else 0
lives.write_text(str(count + 1))
if count == 0:
    sys.argv = ["engine", sys.argv[2]]
    import runpy
    runpy.run_module("server.engine.process", run_name="__main__")
elif count < 3:
    print(json.dumps({"ready": True}), flush=True)
else:
    sys.argv = ["engine", sys.argv[2]]
    import runpy
    runpy.run_module("server.engine.process", run_name="__main__")
"""


async def test_an_engine_that_dies_as_soon_as_it_is_ready_is_started_again(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    script = tmp_path / "engine.py"
    script.write_text(SHORT_LIVED)
    client = EngineClient(settings(tiny_llama_dir), (str(script), str(tmp_path / "lives")))
    await client.start()
    await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client.num_restarts >= 3 and client.ready, "the fourth life works")
    assert len(tokens(await collect(client, request("after")))) == 8
    await client.close()


async def test_an_idle_engine_does_not_hang(tiny_llama_dir: Path) -> None:
    client = EngineClient(replace(settings(tiny_llama_dir), step_timeout_s=1.0))
    await client.start()
    await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    await asyncio.sleep(2.5)
    assert client.ready
    assert client.num_restarts == 0
    await client.close()


async def test_hold_frees_the_engine_and_resume_changes_nothing(client: EngineClient) -> None:
    expected = tokens(await collect(client, request("calm", LONG)))
    stream = client.stream(request("slow", LONG))
    outputs = [await anext(stream)]
    client.hold("slow")
    await until(lambda: client.stats.num_held == 1, "it is held")
    assert client.stats.num_running == client.stats.kv_blocks_used == 0
    client.resume("slow")
    outputs += [output async for output in stream]
    assert tokens(outputs) == expected


async def test_frames_that_can_not_be_handled_do_not_hang_requests(client: EngineClient) -> None:
    """An error while a frame is handled is as bad as a dead engine: said, not swallowed."""

    def broken(stats: EngineStats) -> None:
        raise RuntimeError("a broken listener")

    client.on_stats = broken
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(collect(client, request("r")), PATIENCE_S)
    client.on_stats = None
    await until(lambda: client.ready, "the engine comes back")
    assert len(tokens(await collect(client, request("after")))) == 8


# -- engines of their own ----------------------------------------------------------------------------------


async def test_a_bad_model_path_is_told(tmp_path: Path) -> None:
    client = EngineClient(settings(tmp_path / "nothing-here"))
    await client.start()
    directory = client.supervisor.directory
    with pytest.raises(EngineUnavailable, match="nothing-here"):
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    assert not client.ready
    assert client.num_restarts == 0
    with pytest.raises(EngineUnavailable, match="nothing-here"):
        await collect(client, request("r"))
    await client.close()
    assert directory is not None
    assert not directory.exists()


async def test_close_while_loading_leaves_nothing_behind_and_nobody_waiting(tiny_llama_dir: Path) -> None:
    client = EngineClient(settings(tiny_llama_dir))
    await client.start()
    waiting = asyncio.create_task(client.wait_ready())
    await until(lambda: client.pid is not None, "the process starts")
    pid, directory = client.pid, client.supervisor.directory
    await client.close()
    with pytest.raises(EngineUnavailable, match="stopped before it was ready"):
        await asyncio.wait_for(waiting, PATIENCE_S)
    assert pid is not None
    assert not alive(pid)
    assert directory is not None
    assert not directory.exists()


async def test_close_fails_what_is_in_flight_and_leaves_nothing_behind(tiny_llama_dir: Path) -> None:
    client = EngineClient(settings(tiny_llama_dir))
    await client.start()
    await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    pid, directory = client.pid, client.supervisor.directory
    stream = client.stream(request("r", LONG))
    await anext(stream)
    await client.close()
    with pytest.raises(EngineUnavailable, match="shutting down"):
        async for _ in stream:
            pass
    assert client.num_in_flight == 0
    assert client.supervisor.process is not None
    assert client.supervisor.process.returncode == 0, "asked to stop, not killed"
    assert pid is not None
    assert not alive(pid)
    assert directory is not None
    assert not directory.exists()
    await client.close()  # once more does no harm


async def test_closing_what_was_never_started_is_nothing(tiny_llama_dir: Path) -> None:
    await EngineClient(settings(tiny_llama_dir)).close()


PARENT = """
import asyncio, json, sys
from server.config import EngineConfig
from server.engine.client import EngineClient

async def main():
    client = EngineClient(EngineConfig(**json.loads(sys.argv[1])))
    await client.start()
    await client.wait_ready()
    print(client.pid, any(name.split(".")[0] in ("torch", "transformers") for name in sys.modules), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_dead_parent_takes_the_engine_with_it(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fields = {"model": str(tiny_llama_dir), "adaptive": False, "num_threads": 1, "kv_cache_tokens": 512}
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, json.dumps(fields)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("p"))},  # nobody is left to remove its socket
    )
    assert parent.stdout is not None
    pid_text, imported_torch = (await parent.stdout.readline()).split()
    pid = int(pid_text)
    assert alive(pid)
    assert imported_torch == b"False", "the API process never imports torch"
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(pid), "the engine dies with its parent")
