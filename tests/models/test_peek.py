"""Models seen through their headers: every kind of source, and nothing written, fetched or read besides."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from server.engine.footprint import as_on, tensor_bytes
from server.models.errors import ModelSourceError
from server.models.loader import WeightsError, load_source, tensors_of
from server.models.peek import peek
from server.models.shapes import SHAPES
from server.models.source import ModelSource, resolve
from tests.models.gguf_files import HEAD_DIM, Spec, Type, write_gguf

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sketch(source: ModelSource, dtype: torch.dtype = torch.float32) -> Any:
    found = load_source(source, META, dtype, 64)
    as_on(CPU, found)
    return found


def write_sparse(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 whose data is a hole: to read it all would take a while."""
    at, header = 0, {}
    for name, shape in tensors.items():
        end = at + 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)


def test_the_embedded_model_is_not_converted(cache: Path) -> None:
    source = peek("smollm2-135m")
    assert (source.name, source.kind) == ("smollm2-135m", "embedded")
    found = sketch(source)
    assert (found.num_parameters, found.max_position_embeddings, found.dtype) == (134_515_008, 8192, torch.float32)
    tied = 49_152 * 576 * 4  # the head's packed copy of the embedding
    assert 0 <= tensor_bytes(found) - (found.num_parameters * 4 + tied) < 1 << 20
    assert not cache.exists()


@pytest.mark.parametrize(
    "spec",
    [
        Spec(types={"attn_q": Type.Q4_0}),
        Spec(biases=("attn_q", "attn_k", "attn_v"), tied=False),
        Spec("qwen3", norms=True, metadata={"qwen3.attention.key_length": HEAD_DIM}),
    ],
    ids=["mixed", "biases", "qwen3"],
)
def test_a_gguf_file(tmp_path: Path, cache: Path, spec: Spec) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, spec)
    source = peek(str(path))
    found = sketch(source)
    assert (source.name, source.kind, cache.exists()) == ("small", "gguf", False)
    converted = resolve(str(path), progress=lambda what, fraction: None)
    assert source.config == converted.config
    assert tensor_bytes(found) == tensor_bytes(load_source(converted, CPU, torch.float32, 64))


def test_shards_of_many_gigabytes(tmp_path: Path) -> None:
    """The 8B shape in two files of holes: only their headers can have been read in this time."""
    from server.models.config import parse_config
    from server.models.random_weights import llama_shapes

    raw = SHAPES["llama-3.1-8b"]
    shapes = llama_shapes(parse_config(raw))
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = {name: {t: s for i, (t, s) in enumerate(shapes.items()) if i % 2 == j} for j, name in enumerate(names)}
    for name, tensors in parts.items():
        write_sparse(tmp_path / name, tensors)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = peek(str(tmp_path))
    assert (source.name, source.kind) == (tmp_path.name, "directory")
    found = sketch(source, torch.bfloat16)
    assert 0 <= tensor_bytes(found) - 2 * 8_030_261_248 < 1 << 20
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelSourceError, match="1 of 2 shards missing"):
        peek(str(tmp_path))


def test_a_missing_tensor_is_noticed_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    save_file({"model.embed_tokens.weight": torch.zeros(256, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"tensor 'model.layers.0.input_layernorm.weight' is missing"):
        sketch(peek(str(tmp_path)))


@pytest.mark.parametrize("name", SHAPES)
def test_a_named_shape(name: str) -> None:
    source = peek(name)
    assert source.name == name and source.kind == ("embedded" if name == "smollm2-135m" else "random")
    assert sketch(source, torch.bfloat16).kv_layers[0].head_dim == SHAPES[name]["head_dim"]


def test_a_directory_that_has_no_weights_yet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    source = peek(str(tmp_path))
    assert (source.name, source.kind) == (tmp_path.name, "directory")
    assert tensor_bytes(sketch(source)) == tensor_bytes(sketch(peek("tiny")))


def test_a_directory_without_weights_of_a_network_of_transformers(tmp_path: Path) -> None:
    raw = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "vocab_size": 120, "n_positions": 64}))
    assert len(sketch(peek(str(tmp_path))).kv_layers) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "name is empty"),
        ("nowhere", "no such file or directory; use smollm2-135m, .* or one of the shapes llama-3.1-8b"),
        ("nowhere/model.gguf", "no such file or directory"),
    ],
)
def test_what_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ModelSourceError, match=message):
        peek(name)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ModelSourceError, match="name the directory that holds it"):
        peek(str(tmp_path / "model.safetensors"))


def never_fetched(*_: Any, **options: Any) -> str:
    assert options["local_files_only"]
    raise LocalEntryNotFoundError("not here")


def test_a_hub_id_costs_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    real = load_source(peek("tiny"), META, torch.float32, 64)
    from server.models.config import parse_config
    from server.models.random_weights import llama_shapes

    tensors = {
        name: SimpleNamespace(dtype="BF16", shape=list(shape))
        for name, shape in llama_shapes(parse_config(SHAPES["tiny"])).items()
    }
    tensors["d2t"] = SimpleNamespace(dtype="I64", shape=[3])
    files = {"a": SimpleNamespace(tensors=tensors)}
    monkeypatch.setattr("huggingface_hub.snapshot_download", never_fetched)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda hub_id, name: str(tmp_path / name))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda _: SimpleNamespace(files_metadata=files))
    source = peek("someone/tiny")
    assert (source.name, source.kind) == ("tiny", "hub")
    assert tensor_bytes(load_source(source, META, torch.float32, 64)) == tensor_bytes(real)
    held = tensors_of(source, META, torch.bfloat16)
    assert (held.get("d2t").dtype, held.get("lm_head.weight").dtype) == (torch.int64, torch.bfloat16)
    assert held.has("d2t") and not held.has("t2d")
    with pytest.raises(ModelSourceError, match="someone/tiny: tensor 't2d' is missing"):
        held.get("t2d")


def test_a_hub_id_that_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    source = peek("someone/tiny")
    assert (source.name, source.kind, source.directory) == ("tiny", "hub", tmp_path.resolve())


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> str:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never_fetched)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(ModelSourceError, match=r"someone/tiny: its configuration cannot be read .* no route to host; "):
        peek("someone/tiny")
