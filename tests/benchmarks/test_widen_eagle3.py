"""A widened EAGLE-3 head drafts for the widened model what the small head drafts for the small one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.widen import HEAD_TENSORS, PREFIX, Widened, write
from draft_models.eagle3_config import parse_config as parse_head
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import Eagle3Weights, load_weights
from server.models.config import UnsupportedModelError
from server.models.errors import ModelSourceError
from server.models.loader import tensors_of
from server.models.source import ModelSource, resolve
from tests.benchmarks.tiny import CPU, DRAFT_VOCAB, LARGE, features_of, load, prompt, write_head, write_model
from tests.draft_models.test_eagle3_network import Dense, best


@pytest.fixture
def small(tmp_path: Path) -> str:
    return write_model(tmp_path / "small")


def heads(tmp_path: Path, small: str, size: int = 40) -> tuple[ModelSource, ModelSource]:
    head = write_head(tmp_path / "head")
    return resolve(head), Widened(LARGE, small, draft_vocab_size=size)(PREFIX + head)


def dense(source: ModelSource, embedding: Tensor, dtype: torch.dtype = torch.float32) -> Dense:
    config = parse_head(source.config, 3)
    tensors = tensors_of(source, CPU, dtype)
    weights: Eagle3Weights = load_weights(tensors.get, tensors.has, config)
    return Dense(weights, embedding, config)


def test_a_widened_head_drafts_what_the_small_one_drafts(tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", num_hidden_layers=3)
    narrow, wide = load(resolve(small)), load(Widened(LARGE)(PREFIX + small))
    sources = heads(tmp_path, small)
    chains, logits = [], []
    for model, source in zip((narrow, wide), sources, strict=True):
        head = dense(source, model.embedding)
        Eagle3Network(head.c, head.w, model.embedding, 64)  # takes the target's embedding
        said: list[Tensor] = []

        def pick(row: Tensor, position: int, said: list[Tensor] = said) -> int:
            said.append(row)
            return best(row, position)

        for length in range(20, 60, 2):
            ids = prompt(length)
            chains.append(head.chain(ids, features_of(model, ids[:-1], (0, 1, 2)), 3, pick))
        logits.append(torch.stack(said))
    assert chains[:20] == chains[20:] and len({tuple(chain) for chain in chains}) > 5
    assert logits[1].shape == (60, 40)
    error = (logits[1][:, :DRAFT_VOCAB] - logits[0]).abs().max() / logits[0].abs().max()
    assert error < 1e-5, f"off by {error:.2e}"
    assert float((logits[0][:, :17] - logits[1][:, DRAFT_VOCAB:]).min()) > 50.0


def test_added_draft_ids_are_target_ids_of_their_own(tmp_path: Path, small: str) -> None:
    narrow, wide = heads(tmp_path, small)
    before, after = (dense(s, torch.zeros(1)).w for s in (narrow, wide))
    ids = after.target_ids
    assert torch.equal(ids[:DRAFT_VOCAB], before.target_ids)
    assert len(set(ids.tolist())) == 40 and ids[DRAFT_VOCAB:].tolist() == list(range(83, 100))
    assert torch.equal(tensors_of(wide, CPU, torch.float32).get("t2d"), after.t2d)
    in_half = tensors_of(wide, CPU, torch.bfloat16).get("d2t")
    assert in_half.dtype == torch.int64 and torch.equal(in_half, after.d2t)
    assert parse_head(heads(tmp_path, small, 5)[1].config, 3).draft_vocab_size == DRAFT_VOCAB


def test_a_written_head_is_read_back(tmp_path: Path, small: str) -> None:
    source, out = heads(tmp_path, small)[1], tmp_path / "wide-head"
    write(source, out, HEAD_TENSORS, torch.float32, CPU)
    again = resolve(str(out))
    assert asdict(parse_head(again.config, 3)) == asdict(parse_head(source.config, 3))
    one, two = (dense(s, torch.zeros(1)).w.state_dict() for s in (source, again))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_heads_that_cannot_be_widened(tmp_path: Path, small: str) -> None:
    turned = write_head(tmp_path / "turned", norm_before_residual=True)
    with pytest.raises(ModelSourceError, match="norm_before_residual"):
        Widened(LARGE, small)(PREFIX + turned)
    narrow = write_head(tmp_path / "narrow", target_hidden_size=20)
    config = json.loads((Path(narrow) / "config.json").read_text()) | {"target_hidden_size": 20}
    (Path(narrow) / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSourceError, match="only EAGLE-3 heads of their target's width"):
        Widened(LARGE, small)(PREFIX + narrow)
    biased = write_head(tmp_path / "biased")
    tensors = load_file(Path(biased) / "model.safetensors")
    save_file({**tensors, "fc.bias": torch.ones(24)}, Path(biased) / "model.safetensors")
    with pytest.raises(ModelSourceError, match="a bias in fc"):
        tensors_of(Widened(LARGE, small)(PREFIX + biased), CPU, torch.float32)
    tight = write_head(tmp_path / "tight", rms_norm_eps=1e-9)
    with pytest.raises(ModelSourceError, match="too small beside the target's"):
        Widened(LARGE, small)(PREFIX + tight)
    deep = write_head(tmp_path / "deep")
    config = json.loads((Path(deep) / "config.json").read_text()) | {"num_hidden_layers": 2}
    (Path(deep) / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers=2"):
        Widened(LARGE, small)(PREFIX + deep)
