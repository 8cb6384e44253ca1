"""A program on a pseudo-terminal: what a person at it would type and see."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0
CTRL_C, CTRL_D = "\x03", "\x04"
# In the child: a hook before exec is no option where this process has threads.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Nothing of the developer's own keys, history or colour settings."""
    dropped = ("OPENAI_API_KEY", "OUTPACE_API_KEY", "NO_COLOR", "INPUTRC", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "OUTPACE_CACHE": str(home), "TERM": "xterm", "INPUTRC": os.devnull, **variables}


class Terminal:
    """`outpace chat` with a terminal of its own, whose Ctrl-C sends SIGINT as a real one does."""

    def __init__(self, home: Path, *arguments: str, **variables: str) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, sys.executable, "-m", "server", "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=environment(home, **variables),
            start_new_session=True,
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def expect(self, text: str) -> str:
        """Waits until `text` appears; returns what came before it and drops both."""
        end = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            assert time.monotonic() < end, f"waited in vain for {text!r}; there is {self.seen!r}"
            if not self._read():
                await asyncio.sleep(0.005)
        before, _, self.seen = self.seen.partition(text)
        return before

    async def exit_status(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            while self._process.poll() is None:
                self._read()
                await asyncio.sleep(0.005)
        while self._read():
            pass
        return self._process.returncode

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _read(self) -> bool:
        try:
            data = os.read(self._master, 65536)
        except BlockingIOError:
            return False
        except OSError:  # EIO: the program is gone
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)
