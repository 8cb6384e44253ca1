from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from server.api.access import log_writer
from server.api.access.log_writer import LogWriter
from server.config import ConfigError
from tests.api.access.live import until


def size(path: Path) -> int:
    return path.stat().st_size


def read(path: Path) -> bytes:
    return path.read_bytes()


def rename(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


async def test_lines_arrive_soon_and_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "access.log"
    writes: list[int] = []
    write = os.write

    def counted(descriptor: int, data: memoryview) -> int:
        writes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    writer = LogWriter(str(path))
    for number in range(100):
        writer.write(b"%d\n" % number)
    assert size(path) == 0
    await until(lambda: size(path) > 0)
    assert read(path).split() == [b"%d" % number for number in range(100)]
    assert len(writes) == 1
    writer.close()


async def test_closing_writes_what_is_left_and_ends_the_thread(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    for _ in range(2):  # the second is appended
        writer = LogWriter(str(path))
        writer.write(b"last\n")
        writer.close()
    assert read(path) == b"last\nlast\n"
    assert not [thread for thread in threading.enumerate() if thread.name == "access-log"]


async def test_rotation(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    writer = LogWriter(str(path))
    writer.write(b"old\n")
    rotated = rename(path, "access.log.1")
    assert writer.reopen() is None
    writer.write(b"new\n")
    writer.close()
    assert (read(rotated), read(path)) == (b"old\n", b"new\n")


async def test_a_file_that_cannot_be_reopened_leaves_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    writer = LogWriter(str(folder / "access.log"))
    moved = rename(folder, "moved")
    problem = writer.reopen()
    assert problem is not None and problem.startswith("access_log: ")
    assert "goes on in the old file" in caplog.text
    writer.write(b"line\n")
    writer.close()
    assert read(moved / "access.log") == b"line\n"


async def test_a_pipe_that_nobody_reads_costs_lines_not_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "_MAX_BACKLOG_BYTES", 200_000)
    monkeypatch.setattr(log_writer, "_CLOSE_S", 0.1)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = LogWriter(str(path))
    line = b"x" * 999 + b"\n"
    for _ in range(600):
        writer.write(line)
        writer.flush()
    assert 200 < writer.num_dropped < 500
    received = 0
    while received < (600 - writer.num_dropped) * 1000:
        try:
            received += len(os.read(reader, 2**16))
        except BlockingIOError:
            await asyncio.sleep(0.005)
    writer.close()
    os.close(reader)


async def test_what_is_written_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "_MAX_BACKLOG_BYTES", 5000)
    path = tmp_path / "access.log"
    writer = LogWriter(str(path))
    for number in range(1, 21):
        writer.write(b"x" * 999 + b"\n")
        writer.flush()
        await until(lambda number=number: size(path) == number * 1000)
    writer.close()
    assert writer.num_dropped == 0


async def test_a_full_disk_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    writer = LogWriter("/dev/full")
    for count in (1, 2):
        writer.write(b"line\n")
        writer.flush()
        await until(lambda count=count: writer.num_dropped == count)
    writer.close()
    assert len(caplog.records) == 1
    assert "cannot be written, its lines are lost: No space left" in caplog.text


def test_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert LogWriter.from_setting("off") is None
    with pytest.raises(ConfigError, match=r"access_log: '.*none/log' cannot be opened \(No such file or directory\)"):
        LogWriter.from_setting(str(tmp_path / "none" / "log"))

    async def log() -> None:
        writer = LogWriter.from_setting("stderr")
        assert writer is not None and writer.reopen() is None
        writer.write(b"to stderr\n")
        writer.close()

    asyncio.run(log())
    assert capfd.readouterr().err == "to stderr\n"
