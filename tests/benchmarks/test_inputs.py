"""Result files say by content what they were made with."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import common, inputs
from benchmarks.common import Row, load_prompts, write_result
from benchmarks.engine import build
from benchmarks.text.conversations import load_conversations
from server.bench import machine
from tests.benchmarks.test_emitted import write_prompts


@pytest.fixture(autouse=True)
def _nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_noted", {})


def result(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    monkeypatch.setattr(common, "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", [str(Path(common.__file__))])
    found: dict[str, Any] = json.loads(write_result("r", [Row("c", 1.0, "x")]).read_text())
    return found


def test_prompts_and_the_head_are_known_by_their_hashes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    sha = hashlib.sha256(prompts.read_bytes()).hexdigest()
    for load in (load_prompts, load_conversations):
        inputs._noted.clear()
        load(prompts)
        assert result(monkeypatch, tmp_path)["inputs"] == {"prompts": {"file": "prompts.jsonl", "sha256": sha}}
    draft = shutil.copytree(tiny_llama_dir, tmp_path / "head")
    seen = []
    for _ in range(2):
        file = next(draft.glob("*.safetensors"))
        build(
            "small-lm", model=str(tiny_llama_dir), draft_model=str(draft), adaptive=False, device="cpu",
            kv_cache_tokens=512, max_num_seqs=1,
        )  # fmt: skip
        found = result(monkeypatch, tmp_path)["inputs"]
        assert set(found) == {"prompts", "head", tiny_llama_dir.name}
        assert found["head"]["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
        seen.append(found)
        tensors = load_file(file)
        next(iter(tensors.values())).mul_(2.0)
        save_file(tensors, file)
    assert seen[0]["head"] != seen[1]["head"]
    assert seen[0][tiny_llama_dir.name] == seen[1][tiny_llama_dir.name]


@pytest.mark.parametrize(
    ("status", "expected"),
    [("", []), ("M server/core.py\n?? benchmarks/new.py", ["server/core.py", "benchmarks/new.py"])],
)
def test_a_changed_tree_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, expected: list[str]
) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "_run", lambda command: status if "status" in command else "1234567")
    assert result(monkeypatch, tmp_path)["changed_files"] == expected


def test_without_a_checkout_it_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert result(monkeypatch, tmp_path)["changed_files"] is None
