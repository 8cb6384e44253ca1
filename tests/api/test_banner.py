from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from server.api.banner import banner, curl, drafting, quantity
from server.config import EngineConfig, ServerConfig
from tests.api.fakes import INFO


def test_the_curl_line_is_one_shell_command_with_a_valid_body() -> None:
    words = shlex.split(curl("org/model", "http://127.0.0.1:8000"))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "org/model"


def test_a_name_with_a_quote_survives_the_shell() -> None:
    assert json.loads(shlex.split(curl("it's", "http://x"))[-1])["model"] == "it's"


def test_drafting_says_what_is_really_done() -> None:
    fixed = ServerConfig(engine=EngineConfig(adaptive=False))
    assert drafting(fixed, INFO) == "drafter suffix, up to 7 draft tokens (always that many), rule coupled"
    assert drafting(ServerConfig(), replace(INFO, drafter="none")) == "no speculation"
    assert drafting(ServerConfig(), replace(INFO, max_draft_tokens=0)) == "no speculation"


@pytest.mark.parametrize(
    ("count", "text"), [(950, "950"), (1_500, "1.5 K"), (135_000_000, "135 M"), (8_030_000_000, "8.03 B")]
)
def test_quantity(count: int, text: str) -> None:
    assert quantity(count) == text


def test_threads_are_told_for_a_cpu_only() -> None:
    assert "on cpu, 2 threads" in banner(ServerConfig(), INFO, "m", "http://x")
    assert "on cpu, 1 thread," in banner(ServerConfig(), replace(INFO, num_threads=1), "m", "http://x")
    assert "thread" not in banner(ServerConfig(), replace(INFO, device="cuda:0"), "m", "http://x")
