"""Exports loaded by transformers with the package compressed-tensors, against the network that they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimize.export.options import ExportOptions
from optimize.export.run import export
from server.quant.formats import LinearFormat
from tests.optimize.export.artifacts import everywhere, reference_logits, relative_error, write_artifact

IDS = torch.arange(40).view(2, 20) * 7 % 280


def exported(artifact: Path, out: Path, **options: Any) -> list[str]:
    said: list[str] = []
    export(ExportOptions(str(artifact), out, **{"format": "compressed-tensors"} | options), said.append)
    return said


def loaded_logits(directory: Path) -> Tensor:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(directory).decode([70, 71]) != ""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.filterwarnings("ignore")  # of the package's own
@pytest.mark.parametrize(
    "form",
    [
        LinearFormat("fp8", "fp8"),
        LinearFormat("fp8"),
        LinearFormat("int8"),
        LinearFormat("int8", minimum=True),
        LinearFormat("int8", "int8", smooth=True),
        LinearFormat("int8", group_size=32),
        LinearFormat("int4", group_size=32, smooth=True),
        LinearFormat("int4", group_size=32, minimum=True, smooth=True),
        LinearFormat("int4", group_size=16, minimum=True),
        LinearFormat("int4"),
        LinearFormat("int4", "int8", group_size=32),
    ],
    ids=lambda form: form.name,
)
def test_transformers_computes_the_same(form: LinearFormat, tiny_llama_dir: Path, tmp_path: Path) -> None:
    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form))
    said = exported(tmp_path / "artifact", tmp_path / "out")
    wanted = reference_logits(tiny_llama_dir, layers, IDS, halves=True)
    # Where activations are quantised, a rounding of theirs may fall the other way.
    assert relative_error(loaded_logits(tmp_path / "out"), wanted) < (2e-5 if form.activations == "none" else 2e-2)
    assert any("moved into those before" in line for line in said) is form.smooth


@pytest.mark.filterwarnings("ignore")
def test_factors_move_into_biases_too_and_tied_heads_stay_tied(tmp_path: Path, tiny_llama_dir: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Qwen2ForCausalLM(config)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    model.save_pretrained(tmp_path / "original")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "original" / name).write_bytes((tiny_llama_dir / name).read_bytes())
    form = LinearFormat("int8", smooth=True)
    layers = write_artifact(tmp_path / "artifact", tmp_path / "original", everywhere(form))
    exported(tmp_path / "artifact", tmp_path / "out")
    wanted = reference_logits(tmp_path / "original", layers, IDS)
    assert relative_error(loaded_logits(tmp_path / "out"), wanted) < 2e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.filterwarnings("ignore")
def test_layers_of_several_formats(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def choose(name: str) -> LinearFormat | None:
        if "self_attn" in name:
            return LinearFormat("int8")
        return LinearFormat("int4", group_size=32) if "layers.1.mlp" in name else None

    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, choose)
    exported(tmp_path / "artifact", tmp_path / "out")
    assert relative_error(loaded_logits(tmp_path / "out"), reference_logits(tiny_llama_dir, layers, IDS)) < 2e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert len(config["config_groups"]) == 2
    assert set(config["ignore"]) == {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")} | {"lm_head"}


@pytest.mark.filterwarnings("ignore")
def test_factors_that_cannot_move_are_refused_or_stored_in_16_bits(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from optimize.export.errors import ExportError

    form = LinearFormat("int4", group_size=32, smooth=True)
    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form), unlike_heads=True)
    with pytest.raises(ExportError, match=r"2 of 14 layers; first .*o_proj .*factors.*--allow-16bit"):
        exported(tmp_path / "artifact", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = exported(tmp_path / "artifact", tmp_path / "out", allow_16bit=True)
    assert any("2 layers are stored in bfloat16" in line for line in said)
    wanted = reference_logits(tiny_llama_dir, layers, IDS)
    assert relative_error(loaded_logits(tmp_path / "out"), wanted) < 1e-2


@pytest.mark.filterwarnings("ignore")
def test_what_we_read_back_is_what_we_wrote(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from server.quant.foreign.detect import foreign_layers
    from tests.quant.foreign.layouts import Stored

    form = LinearFormat("int4", group_size=32, minimum=True)
    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form))
    exported(tmp_path / "artifact", tmp_path / "out")
    dialect = foreign_layers(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert dialect is not None
    stored = Stored(load_file(tmp_path / "out" / "model.safetensors"))
    for name, weight in layers.items():
        found = dialect.weight(stored, name)
        assert found is not None
        assert torch.equal(found.values, weight.values)
        assert torch.allclose(found.dequantize(), weight.dequantize(), rtol=1e-6, atol=1e-7)
    assert dialect.weight(stored, "lm_head") is None
