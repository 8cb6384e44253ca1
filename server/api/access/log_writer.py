"""Writes lines in batches on a thread of its own: a slow disk or a full pipe never stops the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from pathlib import Path

from server.config import ConfigError

logger = logging.getLogger(__name__)

STDERR, OFF = "stderr", "off"
_FLUSH_S = 0.2
_MAX_BACKLOG_BYTES = 16 * 2**20
_CLOSE_S = 2.0


class LogWriter:
    """Lines go out at most 0.2 s after they came, one write a batch. Several processes may append to one file.

    `target` is `stderr` or a file, which is opened for appending. Where the writing falls 16 MiB behind, lines are
    dropped and counted in `num_dropped`. Raises ConfigError where the file cannot be opened.
    """

    def __init__(self, target: str) -> None:
        self._path = None if target == STDERR else Path(target)
        self._descriptor = _open(self._path)
        self._lines: list[bytes] = []
        self._flush: asyncio.TimerHandle | None = None
        self._batches: queue.SimpleQueue[bytes | int | None] = queue.SimpleQueue()
        self._num_handed = self._num_written = 0  # bytes; one writer each: the loop and the thread
        self._failed = False
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._work, name="access-log", daemon=True)
        self._thread.start()

    @classmethod
    def from_setting(cls, access_log: str) -> LogWriter | None:
        """None for `off`."""
        return None if access_log == OFF else cls(access_log)

    def write(self, line: bytes) -> None:
        """Takes one line with its newline. On the event loop."""
        if self._num_handed - self._num_written > _MAX_BACKLOG_BYTES:
            self.num_dropped += 1
            return
        self._lines.append(line)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Hands what has come so far to the thread."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        if self._lines:
            batch = b"".join(self._lines)
            self._lines.clear()
            self._num_handed += len(batch)
            self._batches.put(batch)

    def reopen(self) -> str | None:
        """After a rotation: goes on in a new file of the same name. What is wrong, if it cannot be opened."""
        if self._path is None:
            return None
        try:
            descriptor = _open(self._path)
        except ConfigError as error:
            logger.error("the access log is not reopened, it goes on in the old file: %s", error)
            return str(error)
        self.flush()
        self._batches.put(descriptor)
        return None

    def close(self) -> None:
        """Writes what is left; waits at most 2 s for it."""
        self.flush()
        self._batches.put(None)
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        while (item := self._batches.get()) is not None:
            if isinstance(item, int):
                self._close_file()
                self._descriptor = item
            else:
                self._write_out(item)
                self._num_written += len(item)
        self._close_file()

    def _write_out(self, batch: bytes) -> None:
        rest = memoryview(batch)
        try:
            while rest:  # a pipe may take less than all
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self.num_dropped += bytes(rest).count(b"\n")
            if not self._failed:
                logger.error("the access log cannot be written, its lines are lost: %s", error.strerror or error)
            self._failed = True
        else:
            self._failed = False

    def _close_file(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)


def _open(path: Path | None) -> int:
    if path is None:
        return 2
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ConfigError(
            f"access_log: {str(path)!r} cannot be opened ({error.strerror}); use stderr, off or a file"
        ) from error
