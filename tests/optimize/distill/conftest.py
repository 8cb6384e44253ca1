"""A random target with four layers and a tokenizer, small enough to train a head on in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from draft_models.eagle3_config import Eagle3Config, config_for
from optimize.distill.shards import ANSWER, CONTINUATION, TEMPLATE, USER, Document
from server.models.config import ModelConfig, parse_config
from server.models.llama import LlamaModel
from server.models.loader import load_model
from server.models.random_weights import llama_shapes, llama_weights
from server.models.shapes import shape

MAX_POSITIONS = 160


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """An engine built in this process switches them off for good."""
    with torch.enable_grad():
        yield


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A Hugging Face directory."""
    path = tmp_path_factory.mktemp("distill-target")
    raw = {**shape("tiny"), "num_hidden_layers": 4, "vocab_size": 288, "max_position_embeddings": 128}
    config = parse_config(raw)
    weights = llama_weights(config, torch.float32, torch.device("cpu"))
    tensors = {name: weights.get(name) for name in llama_shapes(config)}
    tensors["lm_head.weight"] *= 4  # peaked enough that greedy text does not hang on rounding
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, path / name)
    return path


@pytest.fixture(scope="session")
def target_config(target_dir: Path) -> ModelConfig:
    return parse_config(json.loads((target_dir / "config.json").read_text()))


@pytest.fixture(scope="session")
def model(target_dir: Path) -> LlamaModel:
    raw = json.loads((target_dir / "config.json").read_text())
    loaded = load_model(target_dir, raw, torch.device("cpu"), torch.float32, MAX_POSITIONS)
    assert isinstance(loaded, LlamaModel)
    return loaded


@pytest.fixture
def head_config(target_config: ModelConfig) -> Eagle3Config:
    return config_for(target_config, 96)


def document(length: int, seed: int, temperature: float = 0.8) -> Document:
    """Random tokens: a template's, a user's, an answer's."""
    generator = np.random.default_rng(seed)
    kinds = np.array([TEMPLATE] * 3 + [USER] * 4 + [ANSWER] * max(0, length - 7), np.uint8)[:length]
    if seed % 3 == 0:
        kinds = np.full(length, CONTINUATION, np.uint8)
        kinds[0] = TEMPLATE
    return Document(generator.integers(3, 288, length).astype(np.int32), kinds, temperature)
