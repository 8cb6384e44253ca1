"""Loops, and the order that prompts run in."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks.text.conversations import by_category, interleaved, load_conversations, loops

VARIED = random.Random(1).sample(range(10_000), 256)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], False),
        ([7], False),
        (VARIED, False),
        ([7] * 47, False),
        ([7] * 48, True),
        (VARIED[:100] + [1, 2, 3] * 16, True),
        (VARIED[:100] + [1, 2, 3] * 15 + [1, 2], False),  # 47 tokens
        (VARIED[:60] + VARIED[:60] + VARIED[:59], False),  # not quite three copies
        (VARIED[:60] * 3, True),
        (VARIED[:60] * 3 + VARIED[60:120], True),  # it got out of it, but was in it
        (VARIED[:40] + VARIED[100:120] * 2 + VARIED[40:80] + VARIED[100:120] * 2, False),
    ],
)
def test_loops(tokens: list[int], expected: bool) -> None:
    assert loops(tokens) is expected


def write(path: Path, categories: str) -> Path:
    lines = [{"id": f"{c}{i}", "category": c, "turns": [f"say {i}"]} for i, c in enumerate(categories)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_categories_take_turns(tmp_path: Path) -> None:
    conversations = load_conversations(write(tmp_path / "p.jsonl", "aaabccb"))
    assert [c.name for c in interleaved(conversations)] == ["a0", "b3", "c4", "a1", "b6", "c5", "a2"]
    assert {k: len(v) for k, v in by_category(conversations).items()} == {"a": 3, "b": 2, "c": 2}


def test_some_of_each_category(tmp_path: Path) -> None:
    found = load_conversations(write(tmp_path / "p.jsonl", "aaabccb"), per_category=1)
    assert [c.name for c in found] == ["a0", "b3", "c4"]
    with pytest.raises(FileNotFoundError, match=r"no such file.*turns"):
        load_conversations(tmp_path / "other.jsonl")
