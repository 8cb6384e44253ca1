"""Generator processes: each drives its share of the load and hands over what it saw."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import aiohttp

from loadtest.generator import Generator, Health, Progress
from loadtest.plan import Job, Server, job_of
from loadtest.record import Record
from loadtest.settings import Settings


@dataclass(slots=True)
class Run:
    """What all processes saw of one run."""

    records: list[Record] = field(default_factory=list)
    health: list[Health] = field(default_factory=list)


async def generate(job: Job, start: float, tell: Callable[[Progress], None]) -> tuple[list[Record], Health]:
    """One job in this process's event loop."""
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Content-Type": "application/json", **job.settings.target.headers}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as http:
        generator = Generator(job, start, http, tell)
        await asyncio.sleep(max(0.0, start - time.monotonic()))
        await generator.run()
    return generator.records, generator.health


def _loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def work(settings: Settings, server: Server, seed: int, share: int, pipe: Connection) -> None:
    """A generator process's life: says that it is ready, waits for the start, runs, hands over."""
    job = job_of(settings, server, seed, share)
    pipe.send("ready")
    start = pipe.recv()
    with asyncio.Runner(loop_factory=_loop) as runner:
        pipe.send(runner.run(generate(job, start, pipe.send)))


def run_processes(settings: Settings, server: Server, seed: int, show: Callable[[int, Progress], None]) -> Run:
    """One run by `settings.processes` processes. Raises RuntimeError if one of them dies."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, int] = {}
    children = []
    for share in range(settings.processes):
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(settings, server, seed, share, theirs), daemon=True)
        child.start()
        theirs.close()  # so that its death is an end of file here
        children.append(child)
        pipes[ours] = share
    try:
        for pipe in pipes:
            _receive(pipe)
        start = time.monotonic() + 0.1
        for pipe in pipes:
            pipe.send(start)
        return _collect(pipes, show)
    finally:
        for child in children:
            child.terminate()
            child.join()


def _collect(pipes: dict[Connection, int], show: Callable[[int, Progress], None]) -> Run:
    run, open_pipes = Run(), dict(pipes)
    while open_pipes:
        for pipe in wait(list(open_pipes)):
            assert isinstance(pipe, Connection)
            told = _receive(pipe)
            if isinstance(told, Progress):
                show(open_pipes[pipe], told)
            else:
                records, health = told
                run.records += records
                run.health.append(health)
                del open_pipes[pipe]
    run.records.sort(key=lambda record: (record.intended, record.session, record.turn))
    return run


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a generator process died; its error is above") from None
