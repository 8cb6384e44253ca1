"""A small LM: which layers, what it computes, and what it learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from optimize.distill.evaluate import evaluate
from optimize.distill.packing import Batch, make_batch, pack
from optimize.distill.schedule import Schedule
from optimize.distill.shards import ANSWER, TEMPLATE, Document
from optimize.distill.small_lm import SmallLM
from optimize.distill.small_lm_config import chosen_layers, small_config
from optimize.distill.small_lm_student import SmallLMStudent
from optimize.distill.target import LlamaTeacher, teacher_of
from optimize.distill.train import Trainer, TrainSettings
from server.config import ConfigError
from server.models.config import parse_config
from server.models.llama import LlamaModel
from server.models.loader import Checkpoint, load_source
from server.models.source import resolve
from tests.optimize.distill.conftest import MAX_POSITIONS, document

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
FAMILY = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE, **WINDOWS, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layers=[1, 1, 0, 1, 0], pad_token_id=0),
}
"""Whatever the family's networks differ in."""
SETTINGS = TrainSettings(
    corpus="c",
    seed=1,
    chain_steps=1,
    batch_rows=2,
    accumulate=2,
    learning_rate=3e-3,
    ema=0.0,
    train_lm_head=False,
    draft_vocab_size=288,
    kind="small-lm",
    layers=(0, 3),
)


def test_layers_spread_evenly_with_first_and_last() -> None:
    assert chosen_layers(30, None) == (0, 6, 12, 17, 23, 29)
    assert chosen_layers(16, 4) == (0, 5, 10, 15) and chosen_layers(32, 2) == (0, 31)
    for n in range(3, 40):
        for wanted in range(2, n):
            layers = chosen_layers(n, wanted)
            assert len(layers) == wanted and layers[0] == 0 and layers[-1] == n - 1
            assert set(np.diff(layers)) <= {(n - 1) // (wanted - 1), -(-(n - 1) // (wanted - 1))}
    for wanted in (1, 5, 9):
        with pytest.raises(ConfigError, match=f"layers: {wanted} is not valid; use 2 to 4"):
            chosen_layers(5, wanted)
    with pytest.raises(ConfigError, match="keeps at least 2 layers, the target has 2"):
        chosen_layers(2, None)


@pytest.mark.parametrize("name", FAMILY)
def test_it_is_what_transformers_and_the_server_compute(name: str, tmp_path: Path) -> None:
    """Each document of a packed row by itself, through the exported configuration."""
    torch.manual_seed(3)
    net = AutoModelForCausalLM.from_config(FAMILY[name]).float().eval()
    net.save_pretrained(tmp_path / "target")
    source, layers = resolve(str(tmp_path / "target")), (0, 2, 4)
    raw = small_config(source.config, layers)
    config, target = parse_config(raw), parse_config(source.config)
    assert config.sliding_window == tuple(target.sliding_window[i] for i in layers)
    assert config.rope_layers == tuple(target.rope_layers[i] for i in layers)
    small = SmallLM(config, MAX_POSITIONS)
    small.load(Checkpoint(source.directory, torch.float32, CPU).get, layers)
    batch = make_batch(pack([document(30, 1), document(21, 2)], 64), np.arange(1), 1, CPU)
    chosen = net.state_dict()["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(small.tensors()["model.layers.1.mlp.up_proj.weight"], chosen)
    (tmp_path / "small").mkdir()
    save_file(small.tensors(), tmp_path / "small" / "model.safetensors")
    (tmp_path / "small" / "config.json").write_text(json.dumps(raw))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert reference.config.num_hidden_layers == 3
    teacher = teacher_of(load_source(resolve(str(tmp_path / "small")), CPU, torch.float32, MAX_POSITIONS))
    logits = teacher.logits(teacher.hidden(batch)[1][0])
    with torch.no_grad():
        got = small.hidden(batch)[0] @ small.output_weight.T
        for part in (slice(0, 30), slice(30, 51)):
            expected = reference(batch.ids[:, part]).logits[0]
            torch.testing.assert_close(got[part], expected, atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(logits[part], expected, atol=2e-4, rtol=2e-4)


def student(target_dir: Path, model: LlamaModel, layers: tuple[int, ...], tables: bool = False) -> SmallLMStudent:
    source = resolve(str(target_dir))
    small = SmallLM(parse_config(small_config(source.config, layers)), MAX_POSITIONS)
    small.load(Checkpoint(source.directory, torch.float32, CPU).get, layers)
    return SmallLMStudent(small, LlamaTeacher(model, ()), tables)


def trainer(learner: SmallLMStudent, documents: list[Document], steps: int) -> Trainer:
    return Trainer(learner, pack(documents, 64), SETTINGS, Schedule(steps, None))


def greedy(model: LlamaModel, count: int, seed: int, length: int = 60) -> list[Document]:
    """Greedy texts of the target behind random beginnings."""
    teacher = LlamaTeacher(model, ())
    ids = np.stack([document(8, 3 * (seed + i) + 1).ids for i in range(count)])
    while ids.shape[1] < length:
        given = [Document(row, np.zeros(len(row), np.uint8), 0.0) for row in ids]
        batch = make_batch(pack(given, ids.shape[1]), np.arange(count), 1, CPU)
        best = teacher.logits(teacher.hidden(batch)[1][:, -1]).argmax(-1).numpy().astype(np.int32)
        ids = np.concatenate([ids, best[:, None]], axis=1)
    kinds = np.array([TEMPLATE] * 8 + [ANSWER] * (length - 8), np.uint8)
    return [Document(row, kinds, 0.0) for row in ids]


def test_it_learns_to_be_accepted_on_text_it_has_not_seen(target_dir: Path, model: LlamaModel) -> None:
    learner = student(target_dir, model, (0, 3))
    t = trainer(learner, greedy(model, 40, 0), steps=60)
    held_out = greedy(model, 10, 100)
    tables = [p.detach().clone() for p in learner.model.vocabulary()]
    before = evaluate(learner, held_out, 0.0, 3, 64)
    t.update()
    first = t.progress()
    while t.share < 1.0:
        t.update()
    last, after = t.progress(), evaluate(learner, held_out, 0.0, 3, 64)
    assert last.loss < first.loss and last.agreement[0] > first.agreement[0]
    assert after.conditional[0] > before.conditional[0] + 0.1
    assert after.emitted_per_step > before.emitted_per_step
    assert all(torch.equal(a, b) for a, b in zip(tables, learner.model.vocabulary(), strict=True))


def test_a_training_that_is_gone_on_with_is_the_same(target_dir: Path, model: LlamaModel, tmp_path: Path) -> None:
    texts = [document(30, s) for s in range(12)]
    whole, first, second = (trainer(student(target_dir, model, (0, 3), True), texts, 4) for _ in range(3))
    before = whole.network.state_dict()["model.embed_tokens.weight"].clone()
    for t, steps in ((whole, 4), (first, 2)):
        for _ in range(steps):
            t.update()
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    for _ in range(2):
        second.update()
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name
    assert not torch.equal(before, whole.network.state_dict()["model.embed_tokens.weight"]), "--train-lm-head"


class Stepwise(SmallLMStudent):
    """Runs a chain step by step."""

    stateless = False

    def outputs(self, batch: Batch, features: Tensor, steps: int) -> Iterator[Tensor]:
        hidden = self.model.hidden(batch)
        for s in range(steps):
            yield F.pad(hidden[:, s:], (0, 0, 0, s))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_chain_is_one_pass_read_at_several_places(temperature: float, target_dir: Path, model: LlamaModel) -> None:
    held_out = [document(30, s, temperature) for s in (1, 2, 4, 5)]
    one = student(target_dir, model, (0, 3))
    stepwise = Stepwise(one.model, one.teacher, False)
    assert evaluate(stepwise, held_out, temperature, 3, 64) == evaluate(one, held_out, temperature, 3, 64)


def test_the_target_itself_is_always_right(target_dir: Path, model: LlamaModel) -> None:
    same = student(target_dir, model, (0, 1, 2, 3))
    assert evaluate(same, greedy(model, 2, 1), 0.0, 3, 64).conditional == [1.0, 1.0, 1.0]
    drawn = [document(30, s, 0.8) for s in (1, 2, 4, 5)]
    assert evaluate(same, drawn, 0.8, 3, 64).conditional == [1.0, 1.0, 1.0], "rule `coupled`"
