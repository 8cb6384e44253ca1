"""What a soak finds: its judgement of ends, and a real server under it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.record import Record
from loadtest.soak.run import Soaked
from loadtest.soak.settings import SoakSettings
from loadtest.soak.verdict import checks, lines
from loadtest.soak.watch import Held, engine_of, held, rss_growth, tree
from loadtest.soak.ways import End, Outages, way_of_status, way_of_stream
from server.cli import main

AWAY = Outages([[10.0, 20.0]])
REST = {"outpace_requests_running": 0.0, "outpace_requests_waiting": 0.0, "outpace_kv_cache_usage_ratio": 0.0}
SECONDS = float(os.environ.get("OUTPACE_SOAK_S", "60"))
KILLING_S = float(os.environ.get("OUTPACE_SOAK_S", "8"))
"""With an engine that is killed."""
MODEL = os.environ.get("OUTPACE_SOAK_MODEL")
"""`make soak` and `make soak-long` set them; by themselves the tests take a tiny random model."""


@pytest.mark.parametrize(
    ("end", "ended", "way"),
    [
        ("ok", 5.0, "answered"),
        ("cancelled", 5.0, "left"),
        ("http_429", 5.0, "refused"),
        ("http_503", 5.0, "refused"),
        ("stream_engine_unavailable", 5.0, "undefined"),
        ("stream_engine_unavailable", 12.0, "failed"),
        ("http_500", 5.0, "undefined"),
        ("http_500", 15.0, "failed"),
        ("http_400", 15.0, "undefined"),
        ("incomplete", 15.0, "undefined"),
        ("timeout", 15.0, "undefined"),
        ("bad_event", 15.0, "undefined"),
    ],
)
def test_a_good_request_has_one_of_the_defined_ends(end: str, ended: float, way: str) -> None:
    assert way_of_stream(Record(4.0, sent=4.0, ended=ended, end=end), AWAY)[0] == way


@pytest.mark.parametrize(
    ("status", "has_error", "wrong", "way"),
    [
        (200, False, False, "answered"),
        (200, False, True, "undefined"),
        (400, True, True, "rejected"),
        (400, False, True, "undefined"),
        (400, True, False, "undefined"),
        (429, True, True, "refused"),
        (500, True, True, "undefined"),
    ],
)
def test_a_wrong_request_is_rejected_with_an_error_object(status: int, has_error: bool, wrong: bool, way: str) -> None:
    assert way_of_status(status, has_error, wrong, away=False) == way


def soaked() -> Soaked:
    """A soak without fault."""
    ends = [End("stream", "answered", "ok", at, at + 0.5) for at in (0.0, 2.0, 3.0)]
    counts = [{"outpace_requests_total stop": at, "outpace_requests_total length": 0.0, **REST} for at in (1.0, 3.0)]
    samples = [Held(float(at), 10**9 + at, 30, (1, 2)) for at in range(40)]
    return Soaked(ends, 3, [], samples, [[0.5], [0.6]], [samples[0], samples[-1]], counts, 0.1)


def failing(seen: Soaked) -> list[str]:
    found = checks(seen, SoakSettings())
    assert lines(seen, found)
    return [check.name for check in found if check.holds is False]


def test_a_soak_without_fault_holds() -> None:
    assert failing(soaked()) == []


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ({"begun": 4}, "every request has an end"),
        ({"ends": [End("stream", "undefined", "timeout", 0.0, 1.0)] * 3}, "every end is a defined one"),
        ({"rested_s": None}, "no blocks, slots or requests are held"),
        ({"samples": [Held(float(at), 10**9 + at * 10**6, 30, (1,)) for at in range(100)]}, "memory does not grow"),
        ({"idle": [Held(0.0, 1, 30, (1,)), Held(9.0, 1, 60, (1,))]}, "file descriptors are given back"),
        ({"alone": [[0.5], [1.5]]}, "latency recovers"),
        ({"kills": [[1.0, float("inf")]]}, "a killed engine comes back"),
    ],
)
def test_each_fault_fails_its_check(fault: dict[str, object], name: str) -> None:
    assert name in failing(replace(soaked(), **fault))  # type: ignore[arg-type]


def test_the_servers_count_must_be_what_the_client_saw() -> None:
    seen = soaked()
    seen.metrics[1]["outpace_requests_total stop"] = 5.0
    assert failing(seen) == ["the server counts what the client saw"]


def test_blocks_that_are_still_held_are_a_leak() -> None:
    seen = soaked()
    seen.metrics[1]["outpace_kv_cache_usage_ratio"] = 0.01
    assert failing(seen) == ["no blocks, slots or requests are held"]


def test_memory_is_judged_while_the_processes_are_the_same() -> None:
    before = [Held(float(at), 2 * 10**9, 30, (1, 2)) for at in range(20)]
    after = [Held(20.0 + at, 10**9 + (5 * 10**8 if at < 10 else 7 * 10**8), 30, (1, 3)) for at in range(60)]
    assert rss_growth([*before, *after]) == 0.0  # the new engine has grown only while it was warming up
    assert rss_growth(before[:5]) != rss_growth(before[:5])  # too little is known


def test_a_tree_of_processes_is_what_is_below() -> None:
    code = "import subprocess, sys; print(1, flush=True); subprocess.run(['sleep', '60'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while len(pids := tree(process.pid)) < 2:
            pass
        assert engine_of(process.pid) == pids[1]
        assert held(process.pid, 1.0).rss > 10**6
        os.kill(pids[1], signal.SIGKILL)


@pytest.fixture(scope="module")
def outpace(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A server with a queue of 8, its URL and process."""
    log = tmp_path_factory.mktemp("soak") / "log"
    small = ("--max-num-seqs", "4", "--kv-cache-tokens", "2048", "--max-model-len", "512", "--max-waiting", "8")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "server",
                "serve",
                MODEL or str(tiny_llama_dir),
                "--port",
                "0",
                "--no-adaptive",
                *small,
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"Ready at (http://\S+)/v1", line):
                yield found[1], process.pid
                break
        else:
            raise AssertionError(log.read_text())
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def test_a_server_comes_through_a_soak(outpace: tuple[str, int], capfd: pytest.CaptureFixture[str]) -> None:
    """In its first minutes an engine still grows into what its libraries keep, such as oneDNN's primitives for each
    shape of step: a quarter in a minute of the tiny model, half of that with four primitives. Twenty tell a leak.
    """
    url, pid = outpace
    growth = "0.02" if SECONDS >= 600 else "0.5"
    load = ("--duration-s", str(SECONDS), "--concurrency", "4", "--input-tokens", "10-60", "--output-tokens", "4-32")
    chaos = ("--burst", "40", "--burst-every-s", str(max(2.0, SECONDS / 20)), "--max-rss-growth", growth)
    code = main(["loadtest", url, "--endpoint", "completions", "--soak", *load, *chaos, "--server-pid", str(pid)])
    said = capfd.readouterr()
    assert code == 0, said
    assert said.out.count("holds: ") == 7
    assert re.search(r"burst .*refused", said.out)  # the queue's limit was met
    for kind in ("stream", "whole", "cancel", "vanish", "malformed", "oversize"):
        assert re.search(rf"^{kind} ", said.out, re.MULTILINE), kind


def test_a_server_whose_engine_is_killed_comes_through_a_soak(
    outpace: tuple[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    url, pid = outpace
    load = ("--duration-s", str(KILLING_S), "--concurrency", "4", "--input-tokens", "10-60", "--output-tokens", "4-32")
    chaos = ("--burst", "10", "--kill-engine-every-s", str(max(2.0, KILLING_S / 10)), "--max-rss-growth", "0.5")
    code = main(["loadtest", url, "--endpoint", "completions", "--soak", *load, *chaos, "--server-pid", str(pid)])
    said = capfd.readouterr()
    assert code == 0, said
    assert "holds: a killed engine comes back" in said.out
