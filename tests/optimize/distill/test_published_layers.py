"""A trained head that comes back in another project's convention reads the layers that it was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draft_models.eagle3_config import Eagle3Config, parse_config
from draft_models.eagle3_weights import load_weights, random_weights
from draft_models.eagle_tensors import HeadTensors
from optimize.distill.evaluate import evaluate
from optimize.distill.export import Card, export
from optimize.distill.head import Eagle3Head
from optimize.distill.packing import make_batch, pack
from optimize.distill.schedule import Schedule
from optimize.distill.shards import ANSWER, TEMPLATE, Document
from optimize.distill.target import LlamaTeacher
from optimize.distill.train import Trainer, TrainSettings
from optimize.distill.ttt import Eagle3Student
from server.models.config import ModelConfig
from server.models.llama import LlamaModel
from server.models.loader import Checkpoint
from server.models.source import resolve
from tests.optimize.distill.conftest import MAX_POSITIONS

LAYERS, LENGTH, STEPS = (0, 1, 2), 24, 2
CARD = Card("target", "none", "outpace distill", "Outpace", "CPU", "Text.", "Long.", [(1, 2.0)], [])
SETTINGS = TrainSettings(
    corpus="c",
    seed=1,
    chain_steps=STEPS,
    batch_rows=6,
    accumulate=1,
    learning_rate=3e-3,
    ema=0.0,
    train_lm_head=True,
    draft_vocab_size=288,
    optimizer="adamw",  # it learns the texts by heart in fewer updates
)


def greedy_texts(model: LlamaModel, count: int) -> list[Document]:
    """What the target says after random beginnings of three tokens."""
    ids = torch.randint(3, 288, (count, LENGTH), generator=torch.Generator().manual_seed(4)).numpy().astype(np.int32)
    kinds = np.array([TEMPLATE] * 3 + [ANSWER] * (LENGTH - 3), np.uint8)
    teacher = LlamaTeacher(model, LAYERS)
    for t in range(2, LENGTH - 1):
        packed = pack([Document(row, kinds, 0.0) for row in ids], LENGTH)
        batch = make_batch(packed, np.arange(packed.num_rows), 1, torch.device("cpu"))
        ids[:, t + 1] = teacher.logits(teacher.hidden(batch)[1][:, t]).argmax(-1).numpy()
    return [Document(row, kinds, 0.0) for row in ids]


@pytest.fixture(scope="module")
def texts(model: LlamaModel) -> list[Document]:
    return greedy_texts(model, 36)


@pytest.fixture(scope="module")
def trained(model: LlamaModel, texts: list[Document], target_config: ModelConfig) -> Eagle3Head:
    """It knows the texts by heart, and knows them by the outputs of LAYERS."""
    c = target_config
    config = Eagle3Config(
        c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, 288, 288, 1e-5, c.rope, LAYERS
    )
    head = Eagle3Head(config, torch.arange(288), MAX_POSITIONS)
    head.load(random_weights(config, 0))
    trainer = Trainer(student(head, model, LAYERS), pack(texts, LENGTH), SETTINGS, Schedule(120, None))
    with torch.enable_grad():
        while trainer.share < 1.0:
            trainer.update()
    return head


def student(head: Eagle3Head, model: LlamaModel, layers: tuple[int, ...]) -> Eagle3Student:
    return Eagle3Student(head, LlamaTeacher(model, layers), STEPS, train_lm_head=True)


def emitted(head: Eagle3Head, model: LlamaModel, texts: list[Document], layers: tuple[int, ...]) -> float:
    return evaluate(student(head, model, layers), texts, 0.0, STEPS, LENGTH).emitted_per_step


@pytest.mark.parametrize("dialect", ["vllm", "specforge"])
def test_acceptance_is_the_published_way_round(
    dialect: str,
    model: LlamaModel,
    trained: Eagle3Head,
    texts: list[Document],
    target_config: ModelConfig,
    tmp_path: Path,
) -> None:
    """Layer inputs at the top level (vLLM, speculators) or outputs under `eagle_config` (SpecForge, modelopt)."""
    export(tmp_path, trained.weights(), trained.config, target_config, CARD)
    raw: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    del raw["feature_layers"]
    assert raw["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3], "the layers that read them"
    if dialect == "specforge":
        del raw["eagle_aux_hidden_state_layer_ids"]
        raw["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(raw))

    source = resolve(str(tmp_path))
    config = parse_config(source.config, target_config.num_layers)
    assert config == trained.config
    files = HeadTensors(Checkpoint(source.directory, torch.float32, torch.device("cpu")), config)
    again = Eagle3Head(config, torch.arange(288), MAX_POSITIONS)
    again.load(load_weights(files.get, files.has, config))

    before = emitted(trained, model, texts, LAYERS)
    found = emitted(again, model, texts, config.feature_layers)
    assert before > 2.0 and found == pytest.approx(before, abs=0.05), "but for the file's bfloat16"
    shifted = replace(config, feature_layers=tuple(i + 1 for i in config.feature_layers))
    assert emitted(again, model, texts, shifted.feature_layers) < found - 0.5
