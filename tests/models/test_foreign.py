"""Exports of ours, which are in the layouts of other projects, served again."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimize.export.options import ExportOptions
from optimize.export.run import export
from server.models.config import UnsupportedModelError
from server.models.errors import WeightsError
from server.models.loader import load_source
from server.models.source import resolve
from server.quant.formats import LinearFormat
from tests.models.paging import Chunk, contiguous_blocks, make_pools, ragged_batch
from tests.optimize.export.artifacts import everywhere, reference_logits, relative_error, write_artifact

IDS = [(7 * i) % 280 for i in range(20)]


def logits_of(directory: Path) -> Tensor:
    model = load_source(resolve(str(directory)), torch.device("cpu"), torch.float32, 64)
    ids, attn = ragged_batch([Chunk(IDS, 0, contiguous_blocks(1, 8)[0])])
    with torch.inference_mode():
        found: Tensor = model.forward(ids, make_pools(model, 9), attn, torch.arange(len(IDS)))[0]
    return found


@pytest.mark.parametrize(
    ("form", "written"),
    [
        (LinearFormat("int4", group_size=32, minimum=True), "awq"),
        (LinearFormat("int4", group_size=32), "modelopt"),
        (LinearFormat("int4", group_size=32), "compressed-tensors"),
        (LinearFormat("int8"), "compressed-tensors"),
        (LinearFormat("int8", "int8"), "compressed-tensors"),
        (LinearFormat("fp8", "fp8"), "modelopt"),
    ],
    ids=lambda value: value.name if isinstance(value, LinearFormat) else value,
)
def test_what_was_exported_is_served(form: LinearFormat, written: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form))
    export(ExportOptions(str(tmp_path / "artifact"), tmp_path / "out", written), lambda text: None)
    wanted = reference_logits(tiny_llama_dir, layers, torch.tensor([IDS]))[0]
    assert relative_error(logits_of(tmp_path / "out"), wanted) < (2e-5 if form.activations == "none" else 3e-2)
    sketched = load_source(resolve(str(tmp_path / "out")), torch.device("meta"), torch.bfloat16, 64)
    assert sketched.vocab_size == 288


def test_the_log_says_what_is_computed_otherwise(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(LinearFormat("fp8", "fp8")))
    export(ExportOptions(str(tmp_path / "artifact"), tmp_path / "out", "modelopt"), lambda text: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "FP8"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO):
        logits_of(tmp_path / "out")
    assert "in the layout of ModelOpt" in caplog.text
    assert "one scale a token" in caplog.text


def test_what_cannot_be_read_is_refused_by_name(tiny_llama_dir: Path, tmp_path: Path) -> None:
    write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(LinearFormat("int4", group_size=32)))
    out = tmp_path / "out"
    export(ExportOptions(str(tmp_path / "artifact"), out, "awq"), lambda text: None)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(WeightsError, match=r"out: AutoAWQ: model\.layers\.1\.mlp\.up_proj\.scales: is missing"):
        logits_of(out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"config\.json: .*bits 3 is not supported for AutoAWQ; 4 works"):
        logits_of(out)
