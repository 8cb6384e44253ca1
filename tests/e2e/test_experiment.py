"""Experiments on real engines: one that outlives kill -9, and canaries that are promoted and rolled back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.api.access.keys import digest_of

PATIENCE_S = 600.0
SETTINGS = 'max_num_seqs = 4\nkv_cache_tokens = 2048\nnum_threads = 1\nadaptive = false\ndrafter = "ngram"\n'
ADMIN, KEY = "sk-outpace-admin", "sk-outpace-user"
CANARY_SERVER = str(Path(__file__).with_name("canary_server.py"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Running:
    """A server in a process of its own; `said` is what it has printed."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.said: list[str] = []
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.said.append(line)

    def until_said(self, pattern: str) -> str:
        until(lambda: any(re.search(pattern, line) for line in list(self.said)), f"it says {pattern}", self.said)
        return next(found[found.lastindex or 0] for line in self.said if (found := re.search(pattern, line)))

    @property
    def url(self) -> str:
        return self.until_said(r"Ready at (http://\S+)/v1")

    def engines(self) -> list[int]:
        """Process ids of its engines."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                is_child = f"PPid:\t{self.process.pid}\n" in (entry / "status").read_text()
                if is_child and "server.engine.process" in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except (OSError, ValueError):
                continue
        return sorted(found)

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return json.load(response)

    def experiment(self) -> dict[str, Any]:
        (found,) = self.get("/v1/experiments")["data"]
        assert isinstance(found, dict)
        return found

    def arm_of(self, user: str, max_tokens: int = 2) -> str:
        """The arm that answers; every answer is a good one."""
        body = {"prompt": "the other", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "user": user}
        with self.post("/v1/completions", body, KEY) as response:
            assert json.load(response)["usage"]["completion_tokens"] == max_tokens
            return str(response.headers.get("x-outpace-arm", "alone"))

    def post(self, path: str, body: Any, key: str) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=PATIENCE_S)


@contextmanager
def running(command: list[str]) -> Iterator[Running]:
    server = Running(command)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(30)
        finally:
            server.process.kill()
            server.process.wait()
            server.listener.join(30)


def until(condition: Callable[[], bool], what: str, said: list[str] | None = None) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s in vain: {what}: {said}"
        time.sleep(0.1)


def served(tmp_path: Path, content: str) -> list[str]:
    file = tmp_path / "outpace.toml"
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[admin]\nsha256 = "{digest_of(ADMIN)}"\n[[key]]\nname = "user"\nsha256 = "{digest_of(KEY)}"\n')
    paths = f'experiment_ledger = "{tmp_path / "ledger"}"\napi_keys = "{keys}"\n'
    file.write_text(f'access_log = "off"\n{paths}{SETTINGS}{content}')
    return ["--port", "0", "--config", str(file)]


def test_kill_9_in_the_middle_goes_on_at_the_same_stage_with_the_same_keys(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    flags = served(
        tmp_path,
        f'model = "{tiny_llama_dir}"\n[[arms]]\nname = "new"\ndrafter = "none"\n'
        '[experiment]\nname = "kill"\ncandidate = "new"\n'
        "stages = [{share = 20, min_samples = 5, min_time_s = 1}, {share = 30, min_samples = 100000}, {share = 100}]\n",
    )
    command = [sys.executable, "-m", "server", "serve", *flags]
    keys = [f"user-{number}" for number in range(200)]
    with running(command) as server:
        server.until_said("Arm baseline serves")
        until(lambda: server.experiment()["status"] == "running", "it begins")
        for key in keys:
            server.arm_of(key)
        until(lambda: server.experiment()["stage"] == 1, "the second stage")
        before = [server.arm_of(key) for key in keys]
        assert set(before) == {"control", "new", "baseline"}
        time.sleep(2.5)  # two looks: what was seen is in the ledger
        told, events = server.experiment(), server.get("/v1/experiments/events")["data"]
        engines = server.engines()
        assert len(engines) == 3
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in engines), "its engines end as well")
    with running(command) as server:
        server.until_said("Experiment kill goes on: running")
        server.until_said("Arm baseline serves")
        again = server.experiment()
        same = ("status", "stage", "stage_started", "started", "weights", "num_candidate", "num_baseline")
        assert {name: again[name] for name in same} == {name: told[name] for name in same}
        assert [server.arm_of(key) for key in keys] == before
        until(lambda: server.experiment()["num_candidate"] > told["num_candidate"], "evidence grows")
        assert server.get("/v1/experiments/events")["data"] == events, "no decision was made twice or lost"


def test_a_canary_takes_the_controls_place(tiny_llama_dir: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(tiny_llama_dir, artifact)
    flags = served(tmp_path, f'model = "{tiny_llama_dir}"\n[experiment]\nstages = [{{share = 40}}, {{share = 100}}]\n')
    command = [sys.executable, CANARY_SERVER, str(artifact), *flags]
    with running(command) as server:
        server.until_said("Arm baseline serves")
        old = server.engines()
        assert len(old) == 3
        until(lambda: server.experiment()["status"] == "running", "it begins")
        assert {server.arm_of(f"user-{number}") for number in range(40)} == {"control", "canary", "baseline"}
        number = 0
        server.post("/admin/experiment/promote", {}, ADMIN).close()
        assert server.experiment()["status"] == "promoted"
        server.until_said("Arm canary is the control now")
        while len(server.engines()) > 1:
            number += 1
            assert number < 20000
            assert server.arm_of(f"user-{number}") == "alone"
        info = server.get("/server_info")
        assert info["ready"] and info["arms"] == {} and set(server.engines()) < set(old)
        with urllib.request.urlopen(
            urllib.request.Request(server.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        ) as response:
            metrics = response.read().decode()
        assert re.findall(r'outpace_engine_ready\{arm="(\w+)"\} (\S+)', metrics) == [("control", "1.0")]
        verdict = json.loads((artifact / "verdict.json").read_text())
        assert (verdict["status"], verdict["attempt"]) == ("promoted", 1)
        assert [model["id"] for model in server.get("/v1/models")["data"]] == ["tiny-llama0"]
    with running(command) as server:
        server.until_said(r"Experiment artifact-1 is over: promoted")
        assert server.url and len(server.engines()) == 1
        assert server.arm_of("user-1") == "alone"
        assert server.experiment()["status"] == "promoted"
        assert server.get("/v1/models")["data"][0]["root"] == str(artifact)


def test_a_canary_that_crashes_is_stopped_and_not_tried_again(tiny_llama_dir: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(tiny_llama_dir, artifact)
    flags = served(tmp_path, f'model = "{tiny_llama_dir}"\n[experiment]\nstages = [{{share = 40}}, {{share = 100}}]\n')
    command = [sys.executable, CANARY_SERVER, str(artifact), *flags]
    with running(command) as server:
        server.until_said("Arm canary serves")
        control_and_canary = server.engines()
        server.until_said("Arm baseline serves")
        until(lambda: server.experiment()["status"] == "running", "it begins")
        os.kill(control_and_canary[1], signal.SIGKILL)
        server.until_said("marked as rolled back: .* `outpace artifacts retry artifact`")
        until(lambda: server.engines() == control_and_canary[:1], "only the control's engine is left")
        assert {server.arm_of(f"user-{number}") for number in range(20)} == {"alone"}
        verdict = json.loads((artifact / "verdict.json").read_text())
        assert verdict["status"] == "rolled_back" and "engine restarts" in verdict["reason"]
    with running(command) as server:
        server.until_said(r"Experiment artifact-1 is over: rolled back")
        assert server.arm_of("user-1") == "alone" and len(server.engines()) == 1
        assert server.get("/v1/models")["data"][0]["root"] == str(tiny_llama_dir)
