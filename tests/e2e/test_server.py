"""`outpace serve` on the embedded model, asked by the real `openai` client. One server for the module."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

PATIENCE_S = 110.0
QUESTION = [{"role": "user", "content": "What is the capital of Germany?"}]
LIST = [{"role": "user", "content": "Repeat this line five times: one two three four five six"}]

pytestmark = pytest.mark.timeout(300)


@dataclass
class Server:
    """A server process; `lines` is what it printed up to its readiness."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Sum over labels."""
        found = re.findall(rf"^outpace_{name}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]


def start(*arguments: str) -> Server:
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if found := re.search(r"Ready at (http://\S+)/v1", line):
            lines.append(process.stdout.readline())
            return Server(process, found[1], lines)
    raise AssertionError(f"the server left with {process.wait()} before it was ready: {lines}")


def stop(server: Server) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(PATIENCE_S)
        finally:
            server.process.kill()
    if server.process.stdout is not None:
        server.process.stdout.close()


@pytest.fixture(scope="module")
def server(embedded_model_dir: Path) -> Iterator[Server]:
    """The embedded model, default drafter; not adaptive: no costs are measured, and every draft is verified."""
    server = start("--no-adaptive", "--max-num-seqs", "4", "--kv-cache-tokens", "4096", "--max-model-len", "1024")
    yield server
    stop(server)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s in vain: {what}"
        time.sleep(0.05)


def chat(server: Server, messages: Any = QUESTION, **fields: Any) -> Any:
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, **fields}
    return server.client.chat.completions.create(model="smollm2-135m", messages=messages, **options)


def test_it_says_what_it_serves(server: Server) -> None:
    text = "\n".join(server.lines)
    assert "smollm2-135m" in text
    assert "curl" in text
    assert server.get("/ready")[0] == server.get("/health")[0] == 200
    assert [model.id for model in server.client.models.list()] == ["smollm2-135m"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_api_process_never_loads_torch(server: Server) -> None:
    def mapped(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    (engine,) = server.children()
    assert "libtorch" in mapped(engine), "else this test looks for the wrong thing"
    assert "libtorch" not in mapped(server.process.pid)


def test_chat(server: Server) -> None:
    answer = chat(server)
    assert "Berlin" in answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_the_whole_answer_says(server: Server) -> None:
    whole = chat(server, LIST, max_tokens=24)
    chunks = list(chat(server, LIST, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions(server: Server) -> None:
    answer = server.client.completions.create(
        model="smollm2-135m", prompt="1, 2, 3, 4, 5, 6,", max_tokens=6, temperature=0.0
    )
    assert answer.choices[0].text.startswith(" 7, 8")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_choices_differ_and_a_seed_repeats_them(server: Server) -> None:
    def answers(seed: int) -> list[str]:
        found = chat(server, n=4, temperature=1.0, seed=seed, max_tokens=8)
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in found.choices]

    first = answers(7)
    assert len(set(first)) > 1
    assert answers(7) == first
    assert answers(8) != first


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_changes_no_token(server: Server, temperature: float) -> None:
    accepted = server.metric("accepted_draft_tokens_total")
    texts = [
        chat(server, LIST, max_tokens=24, temperature=temperature, top_p=0.95, seed=5, extra_body={"speculative": wish})
        for wish in ({"enabled": True}, {"enabled": False}, {"max_draft_tokens": 1})
    ]
    assert len({answer.choices[0].message.content for answer in texts}) == 1
    if temperature == 0.0:
        assert server.metric("accepted_draft_tokens_total") > accepted


def test_a_stop_string_ends_the_answer_before_it(server: Server) -> None:
    answer = server.client.completions.create(
        model="smollm2-135m", prompt="1, 2, 3, 4, 5, 6,", max_tokens=24, temperature=0.0, stop=[" 9"]
    )
    assert answer.choices[0].text == " 7, 8,"
    assert answer.choices[0].finish_reason == "stop"


def test_what_does_not_fit_is_a_400_with_the_numbers(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="1024"):
        chat(server, max_tokens=2000)


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    stream = chat(server, LIST, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    until(lambda: server.metric("kv_cache_usage_ratio") > 0, "it runs")
    stream.close()
    until(lambda: server.metric("kv_cache_usage_ratio") == 0, "the blocks are free")
    assert server.metric("requests_running") == 0


def test_a_killed_engine_is_a_503_and_comes_back(server: Server) -> None:
    (engine,) = server.children()
    stream = chat(server, LIST, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(stream)
    with contextlib.suppress(openai.APIStatusError):  # it may be back already
        chat(server, max_tokens=1)
    assert server.get("/health")[0] == 200
    until(lambda: server.get("/ready")[0] == 200, "the engine comes back")
    assert "Berlin" in chat(server).choices[0].message.content


def test_sigterm_lets_requests_finish_and_refuses_new_ones(server: Server) -> None:
    """Last: it ends the module's server."""
    children = server.children()
    stream = chat(server, LIST, max_tokens=40, stream=True, extra_body={"ignore_eos": True})
    chunks = iter(stream)
    received = [next(chunks)]
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.get("/ready")[0] == 503, "it says that it leaves")
    with pytest.raises(openai.InternalServerError):
        chat(server, max_tokens=1)
    received += chunks
    assert received[-1].choices[0].finish_reason == "length"
    assert server.process.wait(PATIENCE_S) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
