"""Reading checkpoints: single files, shards, damaged and incomplete ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server.models.config import UnsupportedModelError
from server.models.loader import Checkpoint, WeightsError, load_model, pick_device, pick_dtype

CPU = torch.device("cpu")


def checkpoint(directory: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint(directory, dtype, CPU)


def test_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    c = checkpoint(tmp_path)
    assert c.has("a") and c.has("b") and not c.has("c")
    assert torch.equal(c.get("a"), torch.arange(3.0))


def test_whole_numbers_keep_their_values(tmp_path: Path) -> None:
    """An EAGLE-3 head's d2t holds offsets that bfloat16 would round."""
    save_file({"d2t": torch.tensor([257, 16385]), "fc": torch.ones(2)}, tmp_path / "model.safetensors")
    c = checkpoint(tmp_path, torch.bfloat16)
    assert c.get("d2t").tolist() == [257, 16385] and c.get("fc").dtype == torch.bfloat16


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / names[0])
    save_file({"b": torch.ones(1)}, tmp_path / names[1])
    assert checkpoint(tmp_path).get("b") == 1
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint(tmp_path).get("a") == 0 and checkpoint(tmp_path).get("b") == 1


def test_tensors_come_in_the_targets_dtype(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3).half()}, tmp_path / "model.safetensors")
    assert checkpoint(tmp_path, torch.bfloat16).get("a").dtype == torch.bfloat16


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"tensor 'norm.weight' is missing"):
        checkpoint(tmp_path).get("norm.weight")


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no safetensors file"):
        checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b'\x08\0\0\0\0\0\0\0{"a": 1'])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable safetensors file"):
        checkpoint(tmp_path)


def test_a_shard_named_by_the_index_but_absent_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(WeightsError, match=r"gone\.safetensors"):
        checkpoint(tmp_path).get("a")


def test_device_and_dtype() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", CPU) == torch.float16


def test_an_unknown_architecture_is_refused_before_any_file_is_read(tmp_path: Path) -> None:
    raw = {"architectures": ["MysteryForCausalLM"], "model_type": "mystery"}
    with pytest.raises(UnsupportedModelError, match="MysteryForCausalLM is not supported"):
        load_model(tmp_path / "absent", raw, CPU, torch.float32, 16)
