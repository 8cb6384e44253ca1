"""The comparison of a native network with its dequantised weights: that it is exact, and that it sees differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.native_gate import CPU, ReferenceLinear, compare, load, logits, reference_model, topics_ids
from server.models.base import TargetModel
from server.models.gguf_write import Form
from server.models.llama import LlamaModel
from server.models.loader import load_source
from server.models.source import ModelSource, resolve
from tests.models.gguf_files import TOKENS, Spec, Type, write_gguf

QUANTISED = {
    "attn_q": Type.Q4_1, "attn_k": Type.Q4_1, "attn_v": Type.Q8_0, "attn_output": Type.Q4_0, "ffn_gate": Type.Q4_1,
    "ffn_up": Type.F16, "ffn_down": Type.Q5_1, "token_embd": Type.Q8_0,
}  # fmt: skip
IDS = torch.randint(3, len(TOKENS), (150,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", Spec(types=QUANTISED))
    return tmp_path / "m.gguf"


def network(source: ModelSource) -> TargetModel:
    return load_source(source, CPU, torch.float32, 64)


def native(gguf: Path, activations: str = "none") -> LlamaModel:
    source = resolve(str(gguf), form=Form(True, activations))
    return reference_model(source.directory, 64)


def test_native_layers_say_what_their_weights_say(gguf: Path) -> None:
    found = compare(native(gguf), network(resolve(str(gguf))), IDS, window=64)
    assert found.num_tokens == len(IDS) - 3
    assert found.max_relative_error < 1e-5
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert found.top1_agreement == 1.0


def test_int8_activations_cost_a_little(gguf: Path) -> None:
    found = compare(native(gguf, "int8-group"), network(resolve(str(gguf))), IDS, window=64)
    assert 1e-4 < found.max_relative_error < 0.2
    assert found.perplexity_ratio == pytest.approx(1, abs=0.02)


def test_a_wrong_weight_shows(gguf: Path) -> None:
    model = native(gguf)
    layer = model.layers[1].qkv
    assert isinstance(layer, ReferenceLinear)
    layer.parts = [layer.parts[1], layer.parts[0], layer.parts[2]]
    assert compare(model, network(resolve(str(gguf))), IDS, window=64).max_relative_error > 0.01


def test_perplexity_is_that_of_the_next_token(gguf: Path) -> None:
    model = network(resolve(str(gguf)))
    found = compare(model, model, IDS[:20], window=20)
    each = torch.log_softmax(logits(model, IDS[:20]), 1)[torch.arange(19), torch.tensor(IDS[1:20])]
    assert found.perplexity == found.reference_perplexity == pytest.approx(float(torch.exp(-each.mean())), rel=1e-5)
    assert (found.max_relative_error, found.top1_agreement) == (0.0, 1.0)


def test_a_directory_without_native_layers_is_refused(gguf: Path) -> None:
    with pytest.raises(ValueError, match="no native checkpoint"):
        load(resolve(str(gguf)), "reference", 64)


def test_the_text(gguf: Path) -> None:
    directory = resolve(str(gguf)).directory
    assert len(topics_ids(directory, 100)) == 100
    with pytest.raises(ValueError, match="is too large; the text has"):
        topics_ids(directory, 10**9)
