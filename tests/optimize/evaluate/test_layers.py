from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from optimize.evaluate.layers import LlamaSwap, make_swap, sensitivity
from optimize.evaluate.texts import Window
from server.models.base import TargetModel
from server.models.llama import LlamaModel
from server.models.loader import load_source
from server.models.source import resolve
from tests.optimize.evaluate.conftest import changed, noise
from tests.optimize.evaluate.tables_model import TableModel


def load(path: Path) -> TargetModel:
    return load_source(resolve(str(path)), torch.device("cpu"), torch.float32, 128)


def windows() -> list[Window]:
    draw = np.random.default_rng(0)
    return [Window(i, i, draw.integers(3, 288, 80)) for i in range(12)]


@pytest.mark.parametrize(
    ("tensor", "layer", "part"),
    [
        ("layers.1.mlp.down_proj", "model.layers.1", "model.layers.1.mlp.down_proj"),
        ("layers.0.self_attn.k_proj", "model.layers.0", "model.layers.0.self_attn.[qkv]_proj"),
        ("lm_head", "lm_head", "lm_head"),
        ("embed_tokens", "model.embed_tokens", "model.embed_tokens"),
    ],
)
def test_the_layer_that_is_worse_is_found(
    tiny_llama_dir: Path, tmp_path: Path, tensor: str, layer: str, part: str
) -> None:
    base, candidate = load(tiny_llama_dir), load(changed(tiny_llama_dir, tmp_path / "worse", noise(tensor, 0.3)))
    before = {name: getattr(base, name) for name in ("head", "embedding")}
    found = sensitivity(base, candidate, windows(), 30.0)
    assert found is not None and found.complete
    assert {cost.name for cost in found.layers if cost.divergence > 1e-9} == {layer}
    assert [cost.name for cost in found.worst if cost.divergence > 1e-9] == [part]
    assert all(getattr(base, name) is value for name, value in before.items()), "the base is as it was"


def test_networks_of_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=288, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    worse = changed(tmp_path / "gpt2", tmp_path / "worse", noise("h.1.mlp.c_fc.weight", 0.3))
    found = sensitivity(load(tmp_path / "gpt2"), load(worse), windows(), 30.0)
    assert found is not None
    assert [cost.name for cost in found.worst if cost.divergence > 1e-9] == ["transformer.h.1.mlp.c_fc"]


def test_no_time_is_said(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base, candidate = load(tiny_llama_dir), load(changed(tiny_llama_dir, tmp_path / "worse", noise("layers", 0.3)))
    found = sensitivity(base, candidate, windows(), 1e-9)
    assert found is not None and not found.complete and not found.layers


def test_layers_that_cannot_be_exchanged(tiny_llama_dir: Path) -> None:
    table = TableModel(torch.zeros(288, 288))
    assert make_swap(load(tiny_llama_dir), table) is None
    assert sensitivity(table, table, windows(), 1.0) is None


def test_a_fault_leaves_the_base_as_it_was(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base, other = load(tiny_llama_dir), load(tiny_llama_dir)
    assert isinstance(base, LlamaModel) and isinstance(other, LlamaModel)
    mine = base.layers[0].down
    swapped = LlamaSwap(base, other).swapped("model.layers.0")
    swapped.__enter__()
    assert base.layers[0].down is other.layers[0].down
    with pytest.raises(RuntimeError):
        swapped.gen.throw(RuntimeError())
    assert base.layers[0].down is mine
