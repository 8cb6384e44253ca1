"""Plays one case against a server and judges the answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

from tests.fuzz.answers import Answer, BadAnswerError, check_answer, read_answer
from tests.fuzz.case import Case

PATIENCE_S = 0.1
"""How long a client waits for the first byte where the server may well be waiting for more of the request."""
_READ_LIMIT = 2**20


async def play(case: Case, host: str, port: int, limit_s: float) -> list[int]:
    """The statuses of the answers. Raises BadAnswerError, also where nothing comes within `limit_s` seconds."""
    try:
        async with asyncio.timeout(limit_s):
            return await _play(case, host, port)
    except TimeoutError:
        raise BadAnswerError(f"no end within {limit_s:g} s") from None


async def _play(case: Case, host: str, port: int) -> list[int]:
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=_READ_LIMIT)
    except OSError as error:
        raise BadAnswerError(f"the server takes no connection: {error}") from None
    sending = asyncio.create_task(_send(case, writer))
    try:
        if case.leave_after is not None:
            await sending
            await _read_some(reader, case.leave_after)
            return []
        return await _read_all(case, reader, sending)
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await _close(writer, reset=case.reset)


async def _send(case: Case, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):  # the server need not listen to the end
        for send in case.sends:
            if send.pause_s:
                await asyncio.sleep(send.pause_s)
            writer.write(send.data)
            await writer.drain()


async def _read_some(reader: asyncio.StreamReader, count: int) -> None:
    with contextlib.suppress(ConnectionError):
        while count > 0:
            data = await reader.read(count)
            if not data:
                return
            count -= len(data)


async def _read_all(case: Case, reader: asyncio.StreamReader, sending: asyncio.Task[None]) -> list[int]:
    statuses: list[int] = []
    for method in case.methods:
        answer = await _next(case, reader, sending, method, due=case.must_answer and not statuses)
        if answer is None:
            break
        check_answer(answer, method)
        statuses.append(answer.status)
        if answer.headers.get("connection", "").lower() == "close":
            break
    if case.must_answer and not statuses:
        raise BadAnswerError("the server closes the connection without an answer")
    return statuses


async def _next(
    case: Case, reader: asyncio.StreamReader, sending: asyncio.Task[None], method: str, *, due: bool
) -> Answer | None:
    """An answer that has begun must be complete, however long it takes; without a byte of it nothing may be due."""
    try:
        if due or case.waits:
            first = await reader.read(1)
        else:
            await asyncio.wait({sending})
            first = await _within(PATIENCE_S, reader)
    except ConnectionError:
        return None
    if not first:
        return None
    try:
        return await read_answer(reader, method, first)
    except ConnectionError as error:
        raise BadAnswerError(f"the connection breaks within an answer: {error}") from None


async def _within(seconds: float, reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(seconds):
            return await reader.read(1)
    except TimeoutError:
        return b""


async def _close(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    sock = writer.get_extra_info("socket")
    if reset and sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    with contextlib.suppress(ConnectionError, OSError):
        await writer.wait_closed()
