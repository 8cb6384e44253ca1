"""The engine process's manners: one line on standard output, a clear exit."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from server.config import EngineConfig
from server.engine.kinds import FRAME, HELLO, INFO, STOP, SUBMIT
from server.engine.messages import EngineFrame, EngineInfo
from server.engine.wire import Frames, frame
from tests.engine.tiny import request

NOISY = """
import os, sys
import server.engine.build as build
from server.engine import process

def build_engine(config, say):
    print("a library says hello")
    os.write(1, b"and C code does too\\n")
    say("progress")
    raise {error}

build.build_engine = build_engine
sys.exit(process.main())
"""


@pytest.mark.parametrize(
    ("error", "expected", "traceback"),
    [
        ("__import__('server.config').config.ConfigError('no such model')", "no such model", False),
        ("KeyError('a bug')", "KeyError: 'a bug'", True),
        ("RuntimeError()", "RuntimeError", True),
    ],
)
def test_a_failure_is_one_line_on_standard_output(error: str, expected: str, traceback: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISY.format(error=error), "ipc://nowhere"],
        input=msgspec.json.encode(EngineConfig()),
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    failure = json.loads(line)["failure"]
    assert failure == expected or failure.startswith(f"{expected}:")
    assert b"progress" in done.stderr
    assert b"a library says hello" in done.stderr
    assert (b"Traceback" in done.stderr) == traceback


def read(line: socket.socket) -> Iterator[tuple[bytes, bytes]]:
    frames = Frames()
    while data := line.recv(65536):
        yield from frames.feed(data)


def test_it_serves_until_asked_to_stop(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C in the terminal reaches the whole process group: it is the server's to decide, not the engine's."""
    endpoint = str(tmp_path / "e")
    config = EngineConfig(model=str(tiny_llama_dir), adaptive=False, num_threads=1, kv_cache_tokens=512)
    with subprocess.Popen(
        [sys.executable, "-m", "server.engine.process", endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(config))
        process.stdin.close()
        assert json.loads(process.stdout.readline()) == {"ready": True}
        process.send_signal(signal.SIGINT)
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(60)
            line.connect(endpoint)
            line.sendall(frame(b"", b"me") + frame(HELLO, b""))
            messages = read(line)
            kind, payload = next(messages)
            assert kind == INFO
            assert msgspec.msgpack.decode(payload, type=EngineInfo).vocab_size == 288
            line.sendall(frame(SUBMIT, msgspec.msgpack.encode(request("r", [5, 6], 3))))
            count = 0
            while count < 3:
                kind, payload = next(messages)
                assert kind == FRAME
                count += sum(len(o.token_ids) for o in msgspec.msgpack.decode(payload, type=EngineFrame).outputs)
            time.sleep(0.6)  # longer than an idle poll: it waits rather than leaves
            assert process.poll() is None
            line.sendall(frame(STOP, b""))
            assert process.wait(60) == 0
        assert process.stdout.read() == b""
