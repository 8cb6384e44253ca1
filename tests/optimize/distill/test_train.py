from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import random_weights
from optimize.distill.evaluate import evaluate
from optimize.distill.head import Eagle3Head
from optimize.distill.packing import pack
from optimize.distill.schedule import FLOOR, Schedule, learning_rate_factor
from optimize.distill.target import LlamaTeacher
from optimize.distill.train import Trainer, TrainSettings
from optimize.distill.ttt import Eagle3Student
from server.config import ConfigError
from server.models.llama import LlamaModel
from tests.optimize.distill.conftest import MAX_POSITIONS, document

SETTINGS = TrainSettings(
    corpus="c",
    seed=1,
    chain_steps=3,
    batch_rows=2,
    accumulate=1,
    learning_rate=3e-3,
    ema=0.0,
    train_lm_head=True,
    draft_vocab_size=96,
)


def trainer(
    model: LlamaModel, config: Eagle3Config, settings: TrainSettings = SETTINGS, steps: int = 8, documents: int = 12
) -> Trainer:
    weights = random_weights(config, 0)
    head = Eagle3Head(config, weights.target_ids, MAX_POSITIONS)
    head.load(weights)
    packed = pack([document(30, s) for s in range(documents)], 64)
    teacher = LlamaTeacher(model, config.feature_layers)
    student = Eagle3Student(head, teacher, settings.chain_steps, settings.train_lm_head)
    return Trainer(student, packed, settings, Schedule(steps, None))


def head_of(t: Trainer) -> Eagle3Head:
    assert isinstance(t.network, Eagle3Head)
    return t.network


def run(t: Trainer) -> Trainer:
    while t.share < 1.0:
        t.update()
    return t


@pytest.mark.parametrize(("ema", "accumulate"), [(0.0, 1), (0.9, 2)])
def test_a_training_that_is_gone_on_with_is_the_same(
    ema: float, accumulate: int, model: LlamaModel, head_config: Eagle3Config, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, ema=ema, accumulate=accumulate)
    whole = run(trainer(model, head_config, settings))
    first = trainer(model, head_config, settings)
    for _ in range(3):
        first.update()
    first.save(tmp_path / "checkpoint.pt")
    second = trainer(model, head_config, settings)
    second.load(tmp_path / "checkpoint.pt")
    assert second.step == 3 and second.elapsed_s == first.elapsed_s
    run(second)
    whole.swap_average()
    second.swap_average()
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_of_other_settings_is_refused(
    model: LlamaModel, head_config: Eagle3Config, tmp_path: Path
) -> None:
    trainer(model, head_config).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match=r"resume: the checkpoint was made with learning_rate=0\.003, this is 0\.1"):
        trainer(model, head_config, replace(SETTINGS, learning_rate=0.1)).load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("train_lm_head", [True, False])
def test_a_batch_can_be_learned_by_heart(train_lm_head: bool, model: LlamaModel, head_config: Eagle3Config) -> None:
    settings = replace(SETTINGS, train_lm_head=train_lm_head, learning_rate=1e-2)
    t = trainer(model, head_config, settings, steps=60, documents=4)
    before = head_of(t).lm_head.weight.detach().clone()
    t.update()
    first = t.progress()
    run(t)
    last = t.progress()
    assert last.loss < 0.75 * first.loss
    assert sum(last.agreement) > sum(first.agreement) + 0.3
    assert torch.equal(before, head_of(t).lm_head.weight) != train_lm_head


def test_the_average_lags_behind(model: LlamaModel, head_config: Eagle3Config) -> None:
    t = run(trainer(model, head_config, replace(SETTINGS, ema=0.99)))
    now = head_of(t).fc.weight.detach().clone()
    t.swap_average()
    average = head_of(t).fc.weight.detach().clone()
    assert not torch.equal(now, average)
    t.swap_average()
    assert torch.equal(head_of(t).fc.weight, now)
    evaluate(t.student, [document(30, 1)], 0.8, 3, 64)


def test_a_loss_that_is_no_number_is_said(model: LlamaModel, head_config: Eagle3Config) -> None:
    t = trainer(model, head_config)
    head_of(t).fc.weight.data.fill_(torch.nan)
    t.update()
    with pytest.raises(FloatingPointError, match="the loss is nan at update 1"):
        t.progress()


def test_the_schedule() -> None:
    assert Schedule(10, None).share(5, 1e9) == 0.5 and Schedule(None, 2.0).share(10**9, 30.0) == 0.25
    assert learning_rate_factor(0.0) < 0.1 and learning_rate_factor(0.03) == 1.0
    assert learning_rate_factor(1.0) == pytest.approx(FLOOR) == learning_rate_factor(1.7)
    assert learning_rate_factor(0.3) > learning_rate_factor(0.6)
    assert learning_rate_factor(0.3, 0) == pytest.approx(0.1), "slow updates warm up too"
