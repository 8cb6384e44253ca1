"""Which form a GGUF file is run in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from server.api.load_text import load_text
from server.config import cache_dir
from server.models.gguf_form import COMPILED, FormOn, compiled
from server.models.gguf_write import DEQUANTISED, NATIVE, TEXT, Form
from server.models.loader import load_source
from server.models.source import resolve
from server.quant.cpu.vectors import ISA
from tests.models.gguf_files import Spec, write_gguf

KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FOUR_BITS = Spec(types={**dict.fromkeys(KINDS, Type.Q4_1), "token_embd": Type.Q8_0}, vocabulary=272)
needs_kernels = pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")


def written(tmp_path: Path, spec: Spec) -> Path:
    path = tmp_path / "m.gguf"
    write_gguf(path, spec)
    return path


@needs_kernels
@pytest.mark.parametrize(
    ("weights", "device", "dtype", "form"),
    [
        ("auto", "cpu", "auto", COMPILED),
        ("auto", "cpu", "float32", COMPILED),
        ("auto", "cpu", "bfloat16", DEQUANTISED),
        ("auto", "cuda", "auto", DEQUANTISED),
        ("native", "cpu", "auto", COMPILED),
        ("native", "cpu", "bfloat16", NATIVE),
        ("native", "cuda", "auto", NATIVE),
        ("dequantised", "cpu", "auto", DEQUANTISED),
    ],
)
def test_the_form_suits_the_device(tmp_path: Path, weights: str, device: str, dtype: str, form: Form) -> None:
    assert FormOn(weights, device, dtype)(written(tmp_path, FOUR_BITS)) == form


@needs_kernels
@pytest.mark.parametrize(
    "spec",
    [
        replace(FOUR_BITS, types={**FOUR_BITS.types, "ffn_down": Type.F16}),
        replace(FOUR_BITS, types={**FOUR_BITS.types, "ffn_down": Type.Q5_1}),  # 8 bits with a minimum
        replace(FOUR_BITS, types={**FOUR_BITS.types, "token_embd": Type.F32}),
        replace(FOUR_BITS, architecture="qwen2", biases=("attn_q", "attn_k", "attn_v")),
        replace(FOUR_BITS, architecture="qwen3", norms=True),
        replace(FOUR_BITS, vocabulary=264),
    ],
    ids=["half", "minimum", "embedding", "biases", "norms", "outputs"],
)
def test_what_the_kernels_do_not_take_runs_dequantised(tmp_path: Path, spec: Spec) -> None:
    path = written(tmp_path, spec)
    assert FormOn("auto", "cpu")(path) == DEQUANTISED
    assert FormOn("native", "cpu")(path) == NATIVE


@needs_kernels
def test_what_is_said_to_be_compiled_is(tmp_path: Path) -> None:
    """The choice is made from the file's header; the loader looks at the weights."""
    path = written(tmp_path, FOUR_BITS)
    assert compiled(path)
    source = resolve(str(path), form=FormOn("auto", "cpu"))
    model = load_source(source, torch.device("cpu"), torch.float32, 64)
    assert type(model).__name__ == "LlamaCpuModel"


def test_no_kernels_on_this_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.quant.cpu.vectors.ISA", None)
    assert FormOn("auto", "cpu")(written(tmp_path, FOUR_BITS)) == DEQUANTISED


def test_the_text_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that read and write text do not wait for weights to be converted, nor choose their form."""
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path, FOUR_BITS)
    text, name = load_text(str(path))
    assert name == "m" and text.encode("hello")
    (only,) = (cache_dir() / "models").glob("m-*")
    assert only.name.endswith("_text") and (only / "model.safetensors").stat().st_size < 100


def test_any_form_has_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path, FOUR_BITS)
    whole = resolve(str(path)).directory
    assert resolve(str(path), form=TEXT).directory == whole
    assert resolve(str(path), form=NATIVE).directory != whole
