"""What a user names as a model: every kind, and a clear error for everything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from server.models.source import ModelSourceError, load_index, resolve
from tests.models.gguf_files import Spec, write_gguf

A, B = np.zeros((2, 3), np.float32), np.ones(4, np.float16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "My-Model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": A, "b": B}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def shard(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors").unlink()
    save_file({"a": A}, directory / "model-1.safetensors")
    save_file({"b": B}, directory / "model-2.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_directory(directory: Path) -> None:
    source = resolve(str(directory))
    assert (source.directory, source.name, source.kind) == (directory, "My-Model", "directory")
    assert source.config == {"model_type": "llama"}
    index = load_index(directory)
    assert {name: (e.file.name, e.dtype, e.shape) for name, e in index.items()} == {
        "a": ("model.safetensors", "F32", (2, 3)),
        "b": ("model.safetensors", "F16", (4,)),
    }


def test_a_relative_path_has_a_name(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    assert resolve(".").name == "My-Model"


def test_a_sharded_directory(directory: Path) -> None:
    shard(directory, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    resolve(str(directory))
    assert {name: e.file.name for name, e in load_index(directory).items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
    }


def test_safetensors_of_other_names(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    assert set(load_index(directory)) == {"a", "b"}
    save_file({"b": B}, directory / "more.safetensors")
    with pytest.raises(ModelSourceError, match="b is in two safetensors files"):
        load_index(directory)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors", "b": "model-3.safetensors"}, r"1 of 2 shards missing, first model-3"),
        ({"a": "model-2.safetensors"}, r"says that a is in model-2\.safetensors, where it is not"),
        ({"a": "../model-1.safetensors"}, "names a file outside its directory"),
        ([], "cannot be read as an index"),
    ],
)
def test_a_wrong_index(directory: Path, weight_map: Any, message: str) -> None:
    shard(directory, weight_map)
    with pytest.raises(ModelSourceError, match=message):
        resolve(str(directory))


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header claims 0 bytes"),
        (b"\xff" * 64, "its header claims"),
        (header(b"{" + b" " * 20), "not JSON"),
        (header(b"[1]"), "not a JSON object"),
        (header({"a": ENTRY}, b"1234"), "a ends at byte 8 of the data, which has 4: the file is cut off"),
        (header({"a": ENTRY | {"dtype": "F99"}}, b"12345678"), "malformed"),
        (header({"a": 3}), "malformed"),
        (header({"a": ENTRY | {"shape": [3]}}, b"12345678"), "do not fit its shape"),
        (header({"a": ENTRY | {"data_offsets": [8, 0]}}, b"12345678"), "do not fit its shape"),
    ],
)
def test_damaged_safetensors(directory: Path, content: bytes, message: str) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelSourceError, match=message) as error:
        resolve(str(directory))
    assert "model.safetensors" in str(error.value)


def test_directories_that_are_no_models(directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors").rename(tmp_path / "model.gguf")
    with pytest.raises(ModelSourceError, match="the download may be incomplete"):
        resolve(str(directory))
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(ModelSourceError, match=r"pytorch_model\.bin is of a format that can run code"):
        resolve(str(directory))
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelSourceError, match="cannot be read as JSON"):
        resolve(str(directory))
    (directory / "config.json").write_text("[]")
    with pytest.raises(ModelSourceError, match="not a JSON object"):
        resolve(str(directory))
    (directory / "config.json").unlink()
    with pytest.raises(ModelSourceError, match=r"no config\.json in it; it is no Hugging Face model directory"):
        resolve(str(directory))
    with pytest.raises(ModelSourceError, match=r"name the file itself: .*model\.gguf"):
        resolve(str(tmp_path))


def test_a_gguf_file(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "Tiny Model.Q4_0.gguf"
    write_gguf(path, Spec())
    source = resolve(str(path))
    assert (source.name, source.kind) == ("Tiny Model.Q4_0", "gguf")
    assert source.directory.parent == cache / "models"
    assert source.directory.name.startswith("tiny-model.q4-0-")
    assert source.config["model_type"] == "llama"
    assert "converting Tiny Model.Q4_0.gguf (once): 100 %" in capsys.readouterr().err
    assert resolve(str(path)) == source
    assert capsys.readouterr().err == ""


def test_a_gguf_file_of_another_suffix(cache: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "blob", Spec())
    assert resolve(str(tmp_path / "blob")).kind == "gguf"


@pytest.mark.parametrize("name", ["cut.gguf", "wrong.gguf", "empty.gguf"])
def test_a_damaged_gguf_file_leaves_nothing_behind(cache: Path, tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "whole.gguf", Spec())
    whole = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / name
    path.write_bytes({"cut.gguf": whole[:-999], "wrong.gguf": b"GGLA" + whole[4:], "empty.gguf": b""}[name])
    with pytest.raises(ModelSourceError, match=name):
        resolve(str(path))
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "the model's name is empty; use smollm2-135m"),
        ("no-such-model", "there is no such file or directory; use smollm2-135m, a Hugging Face directory"),
        ("/no/such/model.gguf", "there is no such file or directory"),
        ("models/missing.gguf", "there is no such file or directory"),
    ],
)
def test_names_that_lead_nowhere(spec: str, message: str) -> None:
    with pytest.raises(ModelSourceError, match=message):
        resolve(spec)


def test_files_that_are_no_models(directory: Path) -> None:
    with pytest.raises(ModelSourceError, match="name the directory that holds it"):
        resolve(str(directory / "model.safetensors"))
    (directory / "notes.txt").write_text("hello")
    with pytest.raises(ModelSourceError, match="not a GGUF file; use smollm2-135m"):
        resolve(str(directory / "notes.txt"))


def test_a_hub_id(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = resolve("someone/some-model")
    assert (source.name, source.kind) == ("some-model", "hub")
    assert asked[0][0] == "someone/some-model"
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked[0][1])


def test_a_hub_id_without_a_network() -> None:
    with pytest.raises(ModelSourceError, match=r"cannot be fetched from the Hugging Face hub.*hf download a/b --local"):
        resolve("a/b")


def test_a_hub_id_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelSourceError, match="needs the package huggingface_hub"):
        resolve("a/b")


@pytest.mark.parametrize("spec", ["smollm2-135m", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_the_embedded_model(embedded_model_dir: Path, spec: str) -> None:
    source = resolve(spec)
    assert (source.directory, source.name, source.kind) == (embedded_model_dir, "smollm2-135m", "embedded")
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    index = load_index(source.directory)
    assert len(index) == 272
    assert index["model.embed_tokens.weight"].shape == (49152, 576)


def test_resolving_imports_neither_torch_nor_transformers(embedded_model_dir: Path) -> None:
    code = (
        "import sys; from server.models.source import resolve; from server.text.chat_template import encode_chat; "
        "resolve('smollm2-135m'); print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "[]"
