from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimize.export.errors import ExportError
from optimize.export.options import ExportOptions
from optimize.export.run import export
from server.config import ConfigError
from server.models.errors import ModelSourceError
from server.models.safetensors_index import load_index
from server.quant.formats import LinearFormat
from tests.optimize.export.artifacts import everywhere, write_artifact

INT4 = LinearFormat("int4", group_size=32)


@pytest.fixture
def artifact(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(INT4))
    return tmp_path / "artifact"


def run(artifact: Path, out: Path, **options: Any) -> str:
    said: list[str] = []
    export(ExportOptions(str(artifact), out, **options), said.append)
    return "\n".join(said)


def test_an_engine_picks_the_format_and_the_table_is_told(artifact: Path, tmp_path: Path) -> None:
    said = run(artifact, tmp_path / "out", engine="vllm")
    assert "14 layers: int4-g32" in said
    assert "writing compressed-tensors for vllm" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_pair_that_cannot_work_is_refused_with_one_that_does(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"vllm does not take .*int4 as modelopt; what works: vllm with compressed"):
        run(artifact, tmp_path / "out", engine="vllm", format="modelopt")
    with pytest.raises(ExportError, match="no kernels for groups of 32 columns"):
        run(artifact, tmp_path / "out", engine="tensorrt-llm")
    assert not (tmp_path / "out").exists()


def test_everything_that_a_model_needs_is_there(artifact: Path, tmp_path: Path) -> None:
    run(artifact, tmp_path / "out", format="awq")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).is_file()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    (artifact / "generation_config.json").unlink()
    run(artifact, tmp_path / "out2", format="awq")
    assert json.loads((tmp_path / "out2" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_files_are_bounded_and_indexed(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(artifact, tmp_path / "one", format="awq")
    monkeypatch.setattr("optimize.export.run.MEGABYTE", 20_000)
    run(artifact, tmp_path / "several", format="awq", max_shard_mb=1)
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert load_index(tmp_path / "several").keys() == one.keys()
    for name, entry in load_index(tmp_path / "several").items():
        assert torch.equal(load_file(entry.file)[name], one[name])


def test_what_is_there_stays_unless_forced(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run(artifact, out, format="awq")
    with pytest.raises(ConfigError, match=r"out: .* not empty \(--force replaces it\)"):
        run(artifact, out, format="awq")
    (out / "old").write_text("")
    run(artifact, out, format="compressed-tensors", force=True)
    assert not (out / "old").exists()
    assert (out / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "out"]


def test_nothing_is_left_of_an_export_that_fails(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    run(artifact, tmp_path / "out", format="awq")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr("optimize.export.shards.ShardWriter.close", full)
    with pytest.raises(OSError, match="No space left"):
        run(artifact, tmp_path / "out", format="compressed-tensors", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_dtype_is_that_of_all_other_tensors(artifact: Path, tmp_path: Path) -> None:
    run(artifact, tmp_path / "out", format="compressed-tensors", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_layers_that_an_engine_joins_must_be_alike(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def choose(name: str) -> LinearFormat | None:
        return None if name.endswith("k_proj") or "layers" not in name else INT4

    write_artifact(tmp_path / "artifact", tiny_llama_dir, choose)
    with pytest.raises(ExportError, match=r"q_proj \(int4-g32\).*k_proj \(16 bits\); a recipe that treats them alike"):
        run(tmp_path / "artifact", tmp_path / "out", engine="vllm")
    run(tmp_path / "artifact", tmp_path / "out", engine="transformers")


def test_only_our_own_models_are_exported(tiny_llama_dir: Path, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"not a model that Outpace quantised; outpace optimize"):
        run(tiny_llama_dir, tmp_path / "out", format="awq")
    with pytest.raises(ConfigError, match="artifact: 'nowhere' is not valid; use a directory"):
        run(Path("nowhere"), tmp_path / "out", format="awq")
    tensors = load_file(artifact / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, artifact / "model.safetensors")
    with pytest.raises(ExportError, match=r"up_proj\.weight_scale is missing"):
        run(artifact, tmp_path / "out", format="awq")
    file = artifact / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelSourceError, match="cut off"):
        run(artifact, tmp_path / "out", format="awq")


def test_what_the_optimiser_writes_can_be_exported(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from optimize.ptq.convert import quantize_weight
    from optimize.ptq.directory import write_model
    from optimize.recipe import LayerFormat
    from server.models.source import resolve
    from server.quant.foreign.detect import foreign_layers
    from tests.quant.foreign.layouts import Stored

    tensors = load_file(tiny_llama_dir / "model.safetensors")
    form = LayerFormat("int4", group_size=32)
    layers = {
        name.removesuffix(".weight"): quantize_weight(tensor, form)
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and "layers" in name
    }
    rest = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in layers}
    write_model([*layers.items(), *rest.items()], resolve(str(tiny_llama_dir)), tmp_path / "artifact", kv_cache="fp8")
    said = run(tmp_path / "artifact", tmp_path / "out", format="awq")
    assert "the KV cache (fp8 in the recipe) is a setting of the engine" in said
    dialect = foreign_layers(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert dialect is not None
    stored = Stored(load_file(tmp_path / "out" / "model.safetensors"))
    for name, weight in layers.items():
        found = dialect.weight(stored, name)
        assert found is not None
        assert torch.equal(found.dequantize(), weight.dequantize())


def test_a_damaged_artifact_is_not_exported(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimize.artifact import DamagedError

    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    size = (artifact / "model.safetensors").stat().st_size
    files = {"model.safetensors": {"size": size, "sha256": "0" * 64}}
    (artifact / "artifact.json").write_text(json.dumps({"files": files}))
    with pytest.raises(DamagedError, match=r"model\.safetensors: its content has changed"):
        run(artifact, tmp_path / "out", format="awq")


def test_an_artifact_is_found_by_its_name(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "artifacts").mkdir(parents=True)
    artifact.rename(tmp_path / "cache" / "artifacts" / "tiny-int4-0123")
    run(Path("tiny-int4-0123"), tmp_path / "out", format="awq")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"format: missing; use --format compressed-tensors\|awq\|modelopt, or --engine vllm"),
        ({"format": "gguf"}, "format: 'gguf' is not valid; use one of compressed-tensors, awq, modelopt"),
        ({"engine": "ollama"}, "engine: 'ollama' is not valid; use one of vllm"),
        ({"format": "awq", "dtype": "int8"}, "dtype: 'int8' is not valid"),
        ({"format": "awq", "max_shard_mb": 0}, "max_shard_mb: 0 is not valid; use 1 or more"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        ExportOptions("x", tmp_path / "out", **options)


def test_the_command_line(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from server.cli import main

    assert main(["export", "--table"]) == 0
    assert "tensorrt-llm" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["export", str(artifact), "--engine", "vllm", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["export", str(artifact), "--engine", "vllm", "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (
        main(["export", str(artifact), "--engine", "vllm", "--format", "modelopt", "--out", str(out), "--force"]) == 1
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("outpace export: vllm does not take")
    assert main(["export", str(artifact), "--engine", "vllm"]) == 2
    assert "out: missing" in capsys.readouterr().err
