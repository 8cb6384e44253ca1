"""Directories with quantised layers: what is loaded, with which kernels, and what is wrong with damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.models.config import parse_config
from server.models.llama import LlamaModel
from server.models.llama_cpu import LlamaCpuModel
from server.models.loader import WeightsError, load_model, load_source, tensors_of
from server.models.random_weights import llama_weights
from server.models.source import resolve
from server.quant.build import Joined
from server.quant.cpu.vectors import ISA
from server.quant.dense import Linear
from server.quant.formats import LinearFormat
from tests.models.paging import Chunk, contiguous_blocks, make_pools, ragged_batch
from tests.quant.rounding import Choose, write_quantized

CPU, FLOAT = torch.device("cpu"), torch.float32
RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
INT8, INT4 = LinearFormat("int8", "int8"), LinearFormat("int4", group_size=32, minimum=True)
GROUPS = LinearFormat("int8", group_size=32)
NATIVE4, NATIVE8 = LinearFormat("int4", "int8-group", 32, minimum=True), LinearFormat("int8", "int8-group", 32)
CHOICES: dict[str, Choose] = {
    "int8": lambda name: INT8 if "proj" in name else None,
    "int4": lambda name: INT4 if "proj" in name else None,
    "fp8": lambda name: LinearFormat("fp8", "fp8") if "proj" in name else None,
    "smooth": lambda name: LinearFormat("int8", smooth=True) if "proj" in name else None,
    "mixed": lambda name: INT8 if "k_proj" in name or "up_proj" in name else INT4 if "proj" in name else None,
    "one-high": lambda name: INT8 if "proj" in name and "v_proj" not in name else None,
    "tables": lambda name: GROUPS,
    "head": lambda name: INT8 if name == "lm_head" else None,
}


def plain_dir(path: Path, **changes: Any) -> Path:
    raw = RAW | changes
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    weights = llama_weights(config, FLOAT, CPU)
    names = [n for n in weights._shapes if n != "lm_head.weight" or not config.tie_word_embeddings]
    tensors = {name: weights.get(name) for name in names}
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_file(tensors, path / "model.safetensors")
    return path


def quantised_dir(tmp_path: Path, choose: Choose, **changes: Any) -> Path:
    return write_quantized(plain_dir(tmp_path / "plain", **changes), tmp_path / "quantised", choose)


def loaded(path: Path, dtype: torch.dtype = FLOAT) -> Any:
    return load_source(resolve(str(path)), CPU, dtype, 128)


def logits(model: Any, tokens: list[int]) -> Tensor:
    ids, attn = ragged_batch([Chunk(tokens, 0, contiguous_blocks(1, 8)[0])])
    with torch.inference_mode():
        found: Tensor = model.forward(ids, make_pools(model, 9), attn, torch.arange(len(tokens)))[0]
    return found


TOKENS = [5, 77, 3, 40, 41, 9, 60]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CHOICES)
def test_logits_are_those_of_the_dequantised_weights(case: str, tied: bool, tmp_path: Path) -> None:
    """Joined or not, rows turned: what activations in 8 bits change is small beside what a wrong row would."""
    if tied and case == "head":
        pytest.skip("a tied model has no head of its own")
    path = quantised_dir(tmp_path, CHOICES[case], tie_word_embeddings=tied)
    model = loaded(path)
    source = resolve(str(path))
    tensors = tensors_of(source, CPU, FLOAT)
    reference = LlamaModel(parse_config(source.config), tensors.get, tensors.has, 128)
    found, wanted = logits(model, TOKENS), logits(reference, TOKENS)
    activations = case in ("int8", "fp8", "mixed", "one-high", "head")
    error = float((found - wanted).abs().max() / wanted.std())
    assert error < (0.2 if activations else 1e-4)
    assert model.num_parameters == reference.num_parameters
    assert torch.equal(model.output_rows(torch.tensor([4, 90])), reference.output_rows(torch.tensor([4, 90])))
    assert torch.equal(model.embedding, reference.embedding)


def test_parts_of_one_format_are_joined_and_others_are_not(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    same = loaded(quantised_dir(tmp_path / "a", CHOICES["int8"]))
    mixed = loaded(quantised_dir(tmp_path / "b", CHOICES["mixed"]))
    assert not isinstance(same.layers[0].qkv, Joined)
    assert isinstance(mixed.layers[1].qkv, Joined) and len(mixed.layers[1].qkv.parts) == 3
    assert isinstance(mixed.layers[1].gate_up, Joined)
    assert mixed.layer_paths()["model.layers.1.mlp.gate_up_proj"][0] == f"{INT4.name} | {INT8.name}"


def test_what_the_model_says_of_its_layers(tmp_path: Path) -> None:
    model = loaded(quantised_dir(tmp_path, CHOICES["int4"]))
    paths = model.layer_paths()
    assert len(paths) == 4 * 2 + 1 and paths["lm_head"] == ("float32", model.head.path)
    form, path = paths["model.layers.0.self_attn.qkv_proj"]
    assert form == INT4.name and path.endswith("-dequantised") and path in model.linear_path
    assert model.min_rows == model.layers[0].qkv.min_rows and model.dtype == FLOAT


def test_bfloat16(tmp_path: Path) -> None:
    path = quantised_dir(tmp_path, CHOICES["int4"])
    model, wanted = loaded(path, torch.bfloat16), logits(loaded(path), TOKENS)
    assert model.dtype == torch.bfloat16 and model.layers[0].down.plain_weight().dtype == torch.bfloat16
    assert float((logits(model, TOKENS) - wanted).abs().max() / wanted.std()) < 0.2


@pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")
def test_a_network_that_has_a_compiled_step_gets_it(tmp_path: Path) -> None:
    choose: Choose = lambda name: NATIVE4 if "proj" in name else NATIVE8  # noqa: E731
    path = quantised_dir(tmp_path, choose, attention_bias=False, tie_word_embeddings=True)
    model = loaded(path)
    assert isinstance(model, LlamaCpuModel)
    assert model.layer_paths()["lm_head"] == (NATIVE8.name, f"compiled:{ISA}")
    assert model.layer_paths()["model.layers.1.mlp.down_proj"] == (NATIVE4.name, f"compiled:{ISA}")
    config = parse_config(resolve(str(path)).config)
    tensors: Any = tensors_of(resolve(str(path)), CPU, FLOAT)
    general = LlamaModel(config, tensors.stored, tensors.has, 128)
    assert general.layers[0].qkv.path.endswith(f":{ISA}")
    assert torch.allclose(logits(model, TOKENS), logits(general, TOKENS), atol=0.05)


def damage(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    return path


DOWN = "model.layers.1.mlp.down_proj"


def replaced(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DOWN}.weight_scale"), rf"quantised: tensor '{DOWN}.weight_scale' is missing"),
        (lambda t: t.pop(f"{DOWN}.weight_min"), rf"tensor '{DOWN}.weight_min' is missing"),
        (lambda t: t.pop(f"{DOWN}.weight"), rf"tensor '{DOWN}.weight' is missing"),
        (replaced(f"{DOWN}.weight_scale", lambda s: s[:, :1]), rf"model.safetensors: tensor '{DOWN}.weight'.*scales"),
        (replaced(f"{DOWN}.weight_scale", lambda s: s * torch.nan), r"model.safetensors: .*weight_scale' .*not finite"),
        (replaced(f"{DOWN}.weight_min", lambda s: s / 0), r"weight_min' .*not finite"),
        (replaced(f"{DOWN}.weight_min", lambda s: s.to(torch.int32)), r"weight_min' .*not floating"),
        (replaced(f"{DOWN}.weight", lambda w: w.float()), r"is float32 \[64, 64\], but config.json says int4-g32-min"),
    ],
)
def test_damaged_tensors_are_named(change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    path = damage(quantised_dir(tmp_path, CHOICES["int4"]), change)
    with pytest.raises(WeightsError, match=message):
        loaded(path)


def changed_config(path: Path, **changes: Any) -> Path:
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 7}, "version 7"),
        ({"layers": {DOWN: {"weights": "int3"}}}, rf"layer '{DOWN}': weights: 'int3'"),
        ({"layers": {DOWN: {"weights": "int8", "colour": 1}}}, rf"layer '{DOWN}'.*colour"),
        ({"layers": {"model.norm": {"weights": "int8"}}}, "model.norm.weight"),
    ],
)
def test_configurations_that_are_not_valid(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = changed_config(quantised_dir(tmp_path, CHOICES["int4"]), **changes)
    with pytest.raises(WeightsError, match=message):
        loaded(path)


def test_load_model_takes_directories_too(tmp_path: Path) -> None:
    path = quantised_dir(tmp_path, CHOICES["int8"])
    raw = json.loads((path / "config.json").read_text())
    model = load_model(path, raw, CPU, FLOAT, 128)
    assert isinstance(model, LlamaModel) and not isinstance(model.layers[0].down, Linear)
