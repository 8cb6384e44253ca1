"""A target with enough layers for an EAGLE-3 head, and a head that has learned its answers by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draft_models.eagle3_config import config_for
from draft_models.eagle3_weights import Eagle3Weights, random_weights
from optimize.distill.head import Eagle3Head
from optimize.distill.packing import pack
from optimize.distill.schedule import Schedule
from optimize.distill.shards import ANSWER, Document
from optimize.distill.target import LlamaTeacher
from optimize.distill.train import Trainer, TrainSettings
from optimize.distill.ttt import Eagle3Student
from server.models.loader import load_model
from tests.engine.tiny import VOCAB_SIZE, engine, prompts, request, run, save_loopy_llama

MAX_POSITIONS = 256
LENGTH = 40


def deep_target(path: Path) -> Any:
    """Four layers: an EAGLE-3 head fuses three."""
    save_loopy_llama(path, 0, 4)
    raw = json.loads((path / "config.json").read_text())
    return load_model(path, raw, torch.device("cpu"), torch.float32, MAX_POSITIONS)


def learned_head(target: Any, steps: int = 60) -> Eagle3Weights:
    """Trained on the target's greedy answers to `prompts(16)`: about half of its drafts of these are accepted."""
    with torch.inference_mode():
        asked = [request(f"r{i}", prompt, LENGTH) for i, prompt in enumerate(prompts(16))]
        answers = run(engine(target), asked)
    texts = [[*req.prompt_ids, *answers[req.request_id]] for req in asked]
    documents = [Document(np.array(t, np.int32), np.full(len(t), ANSWER, np.uint8), 0.0) for t in texts] * 2
    config = config_for(target.config, VOCAB_SIZE)
    weights = random_weights(config, 0)
    head = Eagle3Head(config, weights.target_ids, MAX_POSITIONS)
    head.load(weights)
    settings = TrainSettings(
        corpus="answers",
        seed=0,
        chain_steps=2,
        batch_rows=8,
        accumulate=1,
        learning_rate=1e-2,
        ema=0.0,
        train_lm_head=True,
        draft_vocab_size=VOCAB_SIZE,
        optimizer="adamw",  # it learns the answers by heart in fewer updates
    )
    trainer = Trainer(
        Eagle3Student(head, LlamaTeacher(target, config.feature_layers), settings.chain_steps, train_lm_head=True),
        pack(documents, 64),
        settings,
        Schedule(steps, None),
    )
    with torch.inference_mode(False), torch.enable_grad():
        while trainer.share < 1.0:
            trainer.update()
    return head.weights()
