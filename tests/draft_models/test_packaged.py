from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from draft_models.packaged import WEIGHTS, packaged_head
from server.config import EngineConfig
from server.core import Request, SamplingParams
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.defaults import with_defaults
from server.models.embedded import EMBEDDED_NAME
from server.models.peek import peek
from server.models.source import resolve
from server.text.chat_template import ChatTemplate, encode_chat
from server.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
LARGEST_FILE, ALL_FILES = 16_000_000, 32_000_000


def test_weights_are_small_enough_for_a_repository_and_packed() -> None:
    sizes = {file: file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()}
    assert max(sizes.values()) <= LARGEST_FILE and sum(sizes.values()) <= ALL_FILES
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert packaged["draft_models"] == ["weights/**/*"]


def test_every_tensor_of_the_index_has_its_file() -> None:
    head = packaged_head(EMBEDDED_NAME)
    assert head is not None and (head / "README.md").is_file()
    index = json.loads((head / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in head.glob("*.safetensors")}


def test_others_have_none() -> None:
    assert packaged_head("llama") is None


def emitted_per_step(core: EngineCore, prompts: list[list[int]], num_tokens: int) -> float:
    greedy = SamplingParams(temperature=0.0)
    requests = [Request(str(i), ids, greedy, max_tokens=num_tokens) for i, ids in enumerate(prompts)]
    outputs = [output for output in core.generate(requests) if output.error is None]
    assert all(len(output.token_ids) >= 1 for output in outputs)
    num_emitted = sum(len(output.token_ids) for output in outputs) - len(prompts)
    return num_emitted / (len(outputs) - len(prompts))


@pytest.mark.timeout(300)
def test_serving_the_embedded_model_drafts_with_its_head() -> None:
    """Words that are not in the prompt: copying alone emits 1.08 a step here, a head that is read wrongly no more."""
    core, info = build_engine(
        EngineConfig(max_draft_tokens=4, adaptive=False, kv_cache_tokens=2048, max_model_len=512, device="cpu"),
        lambda text: None,
    )
    assert info.drafter == "hybrid" and info.max_draft_tokens == 4
    tokenizer = Tokenizer.from_directory(resolve(EMBEDDED_NAME).directory)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    texts = ("Why is the sky blue?", "Describe a rainy day in a small town.", "What does a carpenter do?")
    prompts = [encode_chat(tokenizer, template, [{"role": "user", "content": text}]) for text in texts]
    assert emitted_per_step(core, prompts, 48) > 1.3


def test_without_a_head_suffix_drafts() -> None:
    source = peek("llama-3.1-8b")
    settled = with_defaults(EngineConfig(model="llama-3.1-8b"), torch.device("cpu"), source)
    assert (settled.drafter, settled.draft_model) == ("suffix", None)
    settled = with_defaults(EngineConfig(model="llama-3.1-8b", draft_model="x"), torch.device("cpu"), source)
    assert (settled.drafter, settled.draft_model) == ("hybrid", "x")
    settled = with_defaults(EngineConfig(), torch.device("cuda"), peek(EMBEDDED_NAME))
    assert (settled.drafter, settled.draft_model) == ("eagle3", str(packaged_head(EMBEDDED_NAME)))
    settled = with_defaults(EngineConfig(drafter="eagle3"), torch.device("cpu"), peek(EMBEDDED_NAME))
    assert settled.drafter == "eagle3" and settled.draft_model == str(packaged_head(EMBEDDED_NAME))
