"""Messages between processes: whole whatever the stream's cuts, never blocking, and an end that is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.kinds import GONE
from server.engine.wire import Frames, Hub, Line, frame

MESSAGES = st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=300)), max_size=6)


@given(messages=MESSAGES, cuts=st.lists(st.integers(1, 50), max_size=60))
def test_any_cut_of_the_stream_gives_the_same_messages(messages: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    data = b"".join(frame(kind, payload) for kind, payload in messages)
    frames = Frames()
    found: list[tuple[bytes, bytes]] = []
    for cut in cuts:
        found += frames.feed(data[:cut])
        data = data[cut:]
    found += frames.feed(data)
    assert found == messages


async def until(hub: Hub, count: int) -> list[tuple[bytes, bytes, bytes]]:
    found: list[tuple[bytes, bytes, bytes]] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            await asyncio.sleep(0.001)
            found += hub.receive()
    return found


async def test_both_ways_in_order_whatever_the_size(tmp_path: Path) -> None:
    """Payloads beyond what the kernel buffers: neither side ever blocks."""
    hub = Hub(str(tmp_path / "hub"))
    heard: list[tuple[bytes, bytes]] = []
    line = Line(str(tmp_path / "hub"), b"me", lambda kind, payload: heard.append((kind, payload)))
    payloads = [bytes([i]) * size for i, size in enumerate((0, 5, 3_000_000, 1, 2_000_000))]
    for payload in payloads:
        line.send(b"up", payload)
    assert await until(hub, 5) == [(b"me", b"up", payload) for payload in payloads]
    for payload in payloads:
        hub.send(b"me", b"down", payload)
    async with asyncio.timeout(10):
        while len(heard) < 5:
            await asyncio.sleep(0.001)
            hub.receive()
    assert heard == [(b"down", payload) for payload in payloads]
    line.close()
    hub.close()


async def test_an_end_is_told_and_a_peer_that_is_gone_is_ignored(tmp_path: Path) -> None:
    hub = Hub(str(tmp_path / "hub"))
    first = Line(str(tmp_path / "hub"), b"first", lambda *_: None)
    second = Line(str(tmp_path / "hub"), b"second", lambda *_: None)
    first.send(b"x", b"1")
    assert await until(hub, 1) == [(b"first", b"x", b"1")]
    first.close()
    first.close()
    first.send(b"x", b"2")
    assert await until(hub, 1) == [(b"first", GONE, b"")]
    hub.send(b"first", b"x", b"")
    hub.send(b"nobody", b"x", b"")
    hub.close()
    await asyncio.sleep(0.05)
    second.send(b"x", b"")  # the hub is gone: that is for somebody else to notice
    second.close()


async def test_a_hub_waits_for_messages(tmp_path: Path) -> None:
    hub = Hub(str(tmp_path / "hub"))
    assert not hub.poll(1)
    line = Line(str(tmp_path / "hub"), b"me", lambda *_: None)
    assert hub.poll(1000)
    assert hub.fileno() >= 0
    line.close()
    hub.close()
    with pytest.raises(OSError, match=r"nobody listens at .*hub"):
        Line(str(tmp_path / "hub"), b"me", lambda *_: None)


def test_a_path_that_is_too_long_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="set TMPDIR to a shorter folder"):
        Hub(str(tmp_path / ("x" * 120)))


def test_its_file_goes_with_it(tmp_path: Path) -> None:
    hub = Hub(str(tmp_path / "hub"))
    hub.close()
    assert not (tmp_path / "hub").exists()


async def test_what_was_handled_is_never_handled_again(tmp_path: Path) -> None:
    """A handler that fails loses its own message and no other."""
    hub = Hub(str(tmp_path / "hub"))
    heard: list[bytes] = []
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    def handle(kind: bytes, payload: bytes) -> None:
        heard.append(payload)
        if payload == b"2":
            raise ValueError("a bug")

    line = Line(str(tmp_path / "hub"), b"me", handle)
    line.send(b"", b"hello")
    await until(hub, 1)
    for number in b"1234":
        hub.send(b"me", b"", bytes([number]))
    async with asyncio.timeout(10):
        while not failures:  # noqa: ASYNC110 - a test polls
            await asyncio.sleep(0.001)
    hub.send(b"me", b"", b"5")
    async with asyncio.timeout(10):
        while b"5" not in heard:  # noqa: ASYNC110 - a test polls
            await asyncio.sleep(0.001)
    assert len(set(heard)) == len(heard)
    line.close()
    hub.close()
