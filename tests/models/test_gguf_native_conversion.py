"""The native conversion: a directory whose layers give exactly the weights of the dequantised one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors import safe_open
from torch import Tensor

from server.models import gguf_write
from server.models.conversion_cache import converted
from server.models.gguf import GgufFile
from server.models.gguf_convert import convert, load_blocks, lost_line
from server.models.gguf_weights import quantized_weight
from server.models.gguf_write import DEQUANTISED, Form
from server.models.peek import peek
from server.models.source import load_index, resolve
from server.quant.checkpoint import MINIMUMS, SCALES, VALUES, layers_of
from server.quant.formats import LinearFormat, QuantizedWeight
from tests.models.gguf_files import LAYERS, Spec, Type, write_gguf
from tests.models.test_gguf import MIXED, SPECS

NATIVE = Form(native=True)
WITH_INT8 = Form(native=True, activations="int8-group")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    if "embedded_model_dir" not in request.fixturenames:
        monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors(directory: Path) -> dict[str, Tensor]:
    with safe_open(str(directory / "model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def quantised(stored: dict[str, Tensor], layer: str, fields: dict[str, Any]) -> QuantizedWeight:
    """Takes the layer's tensors out of `stored`."""
    values, scales = stored.pop(f"{layer}.{VALUES}"), stored.pop(f"{layer}.{SCALES}")
    return QuantizedWeight(LinearFormat(**fields), values, scales, stored.pop(f"{layer}.{MINIMUMS}", None))


def assert_same_model(native: Path, plain: Path) -> None:
    """Every tensor bit for bit in float32, nothing more and nothing less."""
    stored, wanted = tensors(native), tensors(plain)
    layers = layers_of(config_of(native))
    assert layers is not None
    mine = {f"{layer}.weight": quantised(stored, layer, fields).dequantize() for layer, fields in layers.items()}
    mine |= {name: tensor.float() for name, tensor in stored.items()}
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(mine[name].view(torch.int32), tensor.view(torch.int32)), name
    plain_config = config_of(plain)
    assert config_of(native) == plain_config | {"quantization_config": config_of(native)["quantization_config"]}


def both(source: Path, form: Form = NATIVE) -> tuple[Path, Path]:
    return converted(source, "m", form=form), converted(source, "m")


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("chunk", [200, 1 << 21])
def test_the_same_weights(tmp_path: Path, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_write, "VALUES_PER_CHUNK", chunk)
    spec = SPECS[name] if SPECS[name].types else Spec(biases=SPECS[name].biases, tied=False, types=MIXED)
    write_gguf(tmp_path / "m.gguf", spec)
    assert_same_model(*both(tmp_path / "m.gguf"))


def test_what_is_kept_and_what_is_not(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", Spec(types=MIXED))
    native, _ = both(tmp_path / "m.gguf")
    layers = layers_of(config_of(native)) or {}
    formats = {layer.removeprefix("model."): LinearFormat(**fields).name for layer, fields in layers.items()}
    expected = {"embed_tokens": "int8-g32"}
    for i in range(LAYERS):
        expected |= {
            f"layers.{i}.self_attn.q_proj": "int8-g32",
            f"layers.{i}.self_attn.k_proj": "int4-g32",
            f"layers.{i}.self_attn.o_proj": "int4-g32-min",
            f"layers.{i}.mlp.gate_proj": "int8-g32",
            f"layers.{i}.mlp.up_proj": "int8-g32-min",
        }
    assert formats == expected
    stored = tensors(native)
    assert stored["model.layers.0.self_attn.v_proj.weight"].dtype == torch.float16
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert stored["model.norm.weight"].dtype == torch.float32
    assert stored["model.layers.1.input_layernorm.weight"].dtype == torch.float32
    assert stored["model.layers.0.self_attn.k_proj.weight_scale"].dtype == torch.float16
    assert lost_line(native) is None
    load_index(native)  # offsets and sizes are in order


def test_tensors_lie_at_multiples_of_their_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However odd the numbers of items are: whoever maps the file reads them without copying."""

    class Odd(gguf_write.Output):
        def stored(self) -> list[gguf_write.Stored]:
            return [gguf_write.Stored(f"{self.name}.{dtype}", dtype, (3,)) for dtype in ("U8", "F16", "F32")]

    monkeypatch.setattr(gguf_write, "_write", lambda *_: iter(()))
    path = tmp_path / "model.safetensors"
    write_gguf(tmp_path / "m.gguf", Spec())
    gguf_write.write_weights(GgufFile(tmp_path / "m.gguf"), [Odd("a", (3,), None)], path, lambda what, fraction: None)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    sizes = {"F32": 4, "F16": 2, "U8": 1}
    entries = [entry for name, entry in json.loads(content[8:]).items() if name != "__metadata__"]
    assert length % 8 == 0 and len(entries) == 3
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries)


@pytest.mark.parametrize("form", [NATIVE, WITH_INT8])
def test_activations_are_the_directorys(tmp_path: Path, form: Form) -> None:
    write_gguf(tmp_path / "m.gguf", Spec(types=MIXED))
    native, plain = both(tmp_path / "m.gguf", form)
    layers = layers_of(config_of(native)) or {}
    assert {fields["activations"] for fields in layers.values()} == {form.activations}
    assert_same_model(native, plain)


def test_forms_live_side_by_side(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    write_gguf(source, Spec(types=MIXED))
    directories = [converted(source, "m", form=form) for form in (DEQUANTISED, NATIVE, WITH_INT8)]
    assert len(set(directories)) == 3
    assert [converted(source, "m", form=form) for form in (DEQUANTISED, NATIVE, WITH_INT8)] == directories
    moved = source.rename(tmp_path / "moved.gguf")
    assert [converted(moved, "m", form=form) for form in (WITH_INT8, NATIVE, DEQUANTISED)] == directories[::-1]
    weights = [directory / "model.safetensors" for directory in directories]
    assert weights[1].samefile(weights[2])  # they differ in config.json only
    assert not weights[0].samefile(weights[1])
    record = json.loads((directories[2] / "outpace.json").read_text())
    assert record["form"] == {"weights": "native", "activations": "int8-group"}


def test_a_record_without_a_form_is_dequantised(tmp_path: Path) -> None:
    """Conversions of earlier versions stay valid."""
    source = tmp_path / "m.gguf"
    write_gguf(source, Spec(types=MIXED))
    directory = converted(source, "m")
    record = json.loads((directory / "outpace.json").read_text())
    inode = directory.stat().st_ino
    del record["form"]
    (directory / "outpace.json").write_text(json.dumps(record))
    assert converted(source, "m") == directory and directory.stat().st_ino == inode
    assert converted(source, "m", form=NATIVE) != directory


def test_truncated_native_weights_are_made_again(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    write_gguf(source, Spec(types=MIXED))
    native, plain = both(source)
    os.truncate(native / "model.safetensors", 1000)
    assert converted(source, "m", form=NATIVE) == native
    assert_same_model(native, plain)


def test_blocks_stay_reachable_and_are_the_stored_values(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", Spec(types=MIXED))
    native, _ = both(tmp_path / "m.gguf")
    layer = "model.layers.1.self_attn.k_proj"
    raw = load_blocks(native, f"{layer}.weight")
    assert raw is not None and raw.row_order is not None
    weight = quantized_weight(raw, "int8-group")
    assert weight is not None and weight.format.name == "int4-g32+int8-group"
    stored = tensors(native)
    assert torch.equal(weight.values, stored[f"{layer}.{VALUES}"])
    assert torch.equal(weight.scales, stored[f"{layer}.{SCALES}"])


def with_type(path: Path, suffix: str, type_id: GGMLQuantizationType) -> None:
    """Rewrites a file that has BF16 where another type of two bytes a value shall be claimed.

    gguf can not quantise to the types that matter here, so the header is patched: blocks are whatever bytes were there.
    """
    content = bytearray(path.read_bytes())
    at = content.index(suffix.encode()) + len(suffix)
    dimensions = int.from_bytes(content[at : at + 4], "little")
    place = at + 4 + 8 * dimensions
    assert int.from_bytes(content[place : place + 4], "little") == Type.BF16
    content[place : place + 4] = int(type_id).to_bytes(4, "little")
    path.write_bytes(content)


def test_types_without_a_format_are_dequantised_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MXFP4's blocks of 32 values fit rows of 64; they take fewer bytes than the BF16 that is really there."""
    source = tmp_path / "m.gguf"
    write_gguf(source, Spec(types=MIXED | {"ffn_gate": Type.BF16}))
    with_type(source, "blk.1.ffn_gate.weight", GGMLQuantizationType.MXFP4)
    assert GGML_QUANT_SIZES[GGMLQuantizationType.MXFP4] == (32, 17)
    native = converted(source, "m", form=NATIVE, progress=lambda what, fraction: None)
    line = (
        "m.gguf: stored in float32, because no format of the kernels holds such blocks exactly: "
        "MXFP4 (1 tensors, first model.layers.1.mlp.gate_proj.weight)"
    )
    assert line in capsys.readouterr().err
    assert "model.layers.1.mlp.gate_proj" not in (layers_of(config_of(native)) or {})
    assert tensors(native)["model.layers.1.mlp.gate_proj.weight"].dtype == torch.float32
    assert_same_model(native, converted(source, "m"))


def test_a_file_without_any_quantised_tensor_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", Spec())
    native, plain = both(tmp_path / "m.gguf")
    assert config_of(native) == config_of(plain)
    assert tensors(native).keys() == tensors(plain).keys()


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", Spec(types=MIXED))
    (tmp_path / "hf").mkdir()
    seen: list[float] = []
    convert(GgufFile(tmp_path / "m.gguf"), tmp_path / "hf", form=NATIVE, progress=lambda _, part: seen.append(part))
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_a_sketch_has_the_stored_tensors(tmp_path: Path) -> None:
    """`outpace plan` sees the shapes and widths that a native conversion writes, without making it."""
    path = tmp_path / "m.gguf"
    write_gguf(path, Spec(types=MIXED))
    sketched = peek(str(path), NATIVE)
    assert sketched.tensors is not None
    found = sketched.tensors(torch.float32, torch.device("meta"))
    native = resolve(str(path), form=NATIVE)
    assert sketched.config == native.config
    for name, tensor in tensors(native.directory).items():
        wanted = torch.float32 if tensor.is_floating_point() else tensor.dtype
        assert (found.get(name).shape, found.get(name).dtype) == (tensor.shape, wanted)


def test_sources_come_in_the_form_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, Spec(types=MIXED))
    assert layers_of(resolve(str(path)).config) is None
    native = resolve(str(path), form=Form(True, "int8-group"))
    layers = layers_of(native.config) or {}
    assert len(layers) == 1 + 5 * LAYERS
    assert resolve(str(path), form=NATIVE).directory != native.directory
    assert (native.name, native.kind) == ("m", "gguf")


def test_the_embedded_model_is_the_same_in_both_forms(embedded_model_dir: Path) -> None:
    source = resolve("smollm2-135m", form=NATIVE)
    assert_same_model(source.directory, embedded_model_dir)
    layers = layers_of(source.config) or {}
    names = {LinearFormat(**fields).name for fields in layers.values()}
    assert (len(layers), names) == (211, {"int4-g32-min", "int8-g32"})
    assert LinearFormat(**layers["model.embed_tokens"]).name == "int8-g32"
    size, plain = ((d / "model.safetensors").stat().st_size for d in (source.directory, embedded_model_dir))
    assert size < 0.19 * plain
    assert np.isclose(size / 2**20, 92.2, atol=0.5)
