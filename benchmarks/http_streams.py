"""Streams of `/v1/completions` at once, by client processes light enough not to matter: they only count events.

`drive` starts this file as `http_streams.py PORT COUNT INPUT OUTPUT VOCAB SEED` several times over.
"""

from __future__ import annotations

import itertools
import json
import random
import selectors
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

NUM_CLIENTS = 4
END = b"0\r\n\r\n"
NOT_TOKENS = 2
"""Events of a stream that are no token's: the last one, which says why it ended, and `[DONE]`."""


@dataclass
class Stream:
    """One answer under way. `stamps` are when its events arrived."""

    connection: socket.socket
    sent: float = 0.0
    stamps: list[float] = field(default_factory=list)
    tail: bytes = b""
    ended: bool = False

    def take(self, data: bytes, now: float) -> None:
        if not self.tail and not data.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(data[:500].decode(errors="replace"))
        count = data.count(b"\n\n") + (self.tail.endswith(b"\n") and data.startswith(b"\n"))
        self.stamps += [now] * count
        self.tail = (self.tail + data)[-len(END) :]
        # A header's last value may end like the body does, so the end is looked for behind the first event only.
        self.ended = bool(self.stamps) and self.tail == END
        if not data and not self.ended:
            raise RuntimeError(f"a stream broke off after {len(self.stamps)} events")


def body(num_input: int, num_output: int, vocab: int, draw: random.Random) -> bytes:
    """A completion of random token ids, greedy, blind to end-of-sequence."""
    fields: dict[str, Any] = {"prompt": draw.choices(range(vocab // 4, vocab), k=num_input), "max_tokens": num_output}
    content = json.dumps({**fields, "ignore_eos": True, "temperature": 0, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


def run_client(port: int, count: int, num_input: int, num_output: int, vocab: int, seed: int) -> None:
    """Connects, waits for a line on standard input, then prints each stream's [sent, stamps]."""
    draw = random.Random(seed)
    requests = [body(num_input, num_output, vocab, draw) for _ in range(count)]
    streams = [Stream(socket.create_connection(("127.0.0.1", port))) for _ in requests]
    selector = selectors.DefaultSelector()
    for stream in streams:
        stream.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(stream.connection, selectors.EVENT_READ, stream)
    print("ready", flush=True)
    sys.stdin.readline()
    for stream, request in zip(streams, requests, strict=True):
        stream.sent = time.perf_counter()
        stream.connection.sendall(request)
    left = count
    while left:
        for key, _ in selector.select(60):
            stream = key.data
            stream.take(stream.connection.recv(65536), time.perf_counter())
            if stream.ended:
                selector.unregister(stream.connection)
                left -= 1
    print(json.dumps([[s.sent, s.stamps] for s in streams]), flush=True)


@dataclass(frozen=True)
class Load:
    """So many streams at once, each of `num_input` prompt tokens and `num_output` generated ones."""

    streams: int
    num_input: int
    num_output: int
    vocab: int


@dataclass(frozen=True)
class Seen:
    """What clients saw of one load, in ms: between tokens while all decode, the slowest gaps, the first token."""

    step_ms: float
    gap_p99_ms: float
    first_ms: float
    events_a_token: float


def drive(port: int, load: Load, seed: int) -> list[tuple[float, list[float]]]:
    """One load by several client processes that begin together: when each request left and its events arrived."""
    num = min(NUM_CLIENTS, load.streams)
    counts = [load.streams // num + (i < load.streams % num) for i in range(num)]
    settings = [str(x) for x in (load.num_input, load.num_output, load.vocab)]
    clients = [
        subprocess.Popen(
            [sys.executable, __file__, str(port), str(count), *settings, str(1000 * seed + i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, count in enumerate(counts)
    ]
    for client in clients:
        assert client.stdout is not None and client.stdin is not None
        if client.stdout.readline().strip() != "ready":
            raise RuntimeError("a client did not start")
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    told = [client.communicate(timeout=240)[0] for client in clients]
    if any(client.returncode for client in clients):
        raise RuntimeError("a client failed")
    return [(sent, stamps) for text in told for sent, stamps in json.loads(text)]


def summary(streams: list[tuple[float, list[float]]], load: Load) -> Seen:
    """The window begins when every stream has its first token and ends when the first one has its last."""
    begin = max(stamps[0] for _, stamps in streams)
    end = min(stamps[-NOT_TOKENS - 1] for _, stamps in streams)
    steps: list[float] = []
    gaps: list[float] = []
    for _, stamps in streams:
        inside = [at for at in stamps[:-NOT_TOKENS] if begin <= at <= end]
        if len(inside) < 2:
            raise RuntimeError(f"streams of {load.num_output} tokens are too short: never do all decode at once")
        a_token = (len(stamps) - NOT_TOKENS) / load.num_output  # some tokens are half a character and wait for more
        steps.append((inside[-1] - inside[0]) / (len(inside) - 1) * a_token)
        gaps += [b - a for a, b in itertools.pairwise(inside)]
    gaps.sort()
    first = statistics.median(stamps[0] - sent for sent, stamps in streams)
    events = sum(len(stamps) - NOT_TOKENS for _, stamps in streams) / (load.streams * load.num_output)
    return Seen(statistics.median(steps) * 1e3, gaps[int(0.99 * len(gaps))] * 1e3, first * 1e3, events)


if __name__ == "__main__":
    run_client(*map(int, sys.argv[1:]))
