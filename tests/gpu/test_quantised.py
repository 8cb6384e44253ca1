"""Quantised targets on a GPU: low-bit kernels run, text does not depend on drafts, graphs say what eager steps say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.gpu import kernel_forward
from server.engine.linear_layers import linear_layers
from server.models.llama_tuning import tune
from server.quant import low
from server.quant.formats import LinearFormat
from server.quant.low import LowLinear
from tests.engine.tiny import request, run
from tests.gpu.small import MIXED, Engines, gpu, prompts, save_head
from tests.quant.rounding import write_quantized

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTH = 32
FORMATS = {
    "fp8": LinearFormat("fp8", "fp8"),
    "int8": LinearFormat("int8", "int8"),
    "int8-weights": LinearFormat("int8"),
    "w4a8": LinearFormat("int4", "int8", 64),
    "int4": LinearFormat("int4", group_size=64),
    "int4-min": LinearFormat("int4", group_size=32, minimum=True),
}


@pytest.fixture(scope="module", params=FORMATS)
def quantised(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """Engines on the target with quantised projections; the fp8 one has a quantised head too, as its EAGLE head has."""
    form, only = FORMATS[request.param], LinearFormat("fp8")
    whole = request.param == "fp8"
    root = tmp_path_factory.mktemp(request.param)
    low_ones = ("proj", "lm_head") if whole else ("proj",)
    path = write_quantized(model_dir, root / "model", lambda n: form if n.endswith(low_ones) else None)
    head = save_head(root / "head")
    if whole:
        ends = ("proj", "fc", "lm_head")
        head = write_quantized(head, root / "low-head", lambda n: only if n.endswith(ends) else None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernel_forward, "tune", lambda *_: None)
        yield Engines(path, head)


def counted(monkeypatch: pytest.MonkeyPatch, name: str, calls: list[str]) -> None:
    inner: Callable[..., Any] = getattr(low, name)

    def call(*args: Any, **named: Any) -> Any:
        calls.append(name)
        return inner(*args, **named)

    monkeypatch.setattr(low, name, call)


def test_low_bit_kernels_are_called(quantised: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """By decoding and by prompts; every projection says so, and memory holds no wide copy."""
    core = quantised.get(cuda_graphs=False)
    groups = linear_layers(core.runner.model, core.runner.linear_path)
    assert sum(g.num_layers for g in groups if g.path.startswith("triton-")) >= 16
    assert not any(group.dequantised for group in groups)
    layer = core.runner.model.layers[0].gate_up  # type: ignore[attr-defined]
    assert isinstance(layer, LowLinear)
    assert layer.weight.values.nbytes <= layer.out_features * layer.in_features
    calls: list[str] = []
    monkeypatch.setattr(low, "SKINNY_TOKENS", 128)  # a chunk of these tests has 256
    for name in ("qkv_rope8", "linear8_parts", "gate_up8", "large_parts"):
        counted(monkeypatch, name, calls)
    run(core, [request("r", prompts(1, low=300, high=400)[0], 4)])
    assert set(calls) == {"qkv_rope8", "linear8_parts", "gate_up8", "large_parts"}


@pytest.mark.parametrize("drafter", ["suffix", "small-lm"])
def test_deterministic_text_does_not_depend_on_drafts(quantised: Engines, drafter: str) -> None:
    """Bit for bit in bfloat16, every kind of sampling, together and alone."""
    batch = [
        request(f"r{i}", prompt, LENGTH, sampling=MIXED[i % len(MIXED)])
        for i, prompt in enumerate(prompts(10, seed=4, high=120))
    ]
    plain = run(quantised.get("none", 5, deterministic=True), batch)
    drafted = run(quantised.get(drafter, 5, deterministic=True), batch)
    assert dict(drafted) == dict(plain)
    assert drafted.num_drafted > 0 and (drafter == "suffix" or drafted.num_accepted > 0)
    alone = quantised.get("none", 5, deterministic=True)
    for wanted in batch[:3]:
        assert run(alone, [wanted])[wanted.request_id] == plain[wanted.request_id]


@pytest.mark.parametrize("drafter", ["ngram", "eagle3"])
def test_greedy_text_does_not_depend_on_drafts(quantised: Engines, drafter: str) -> None:
    """Float32: the order of sums may still move an activation by one step of its 8 bits, and so, rarely, a token."""
    batch = [request(f"r{i}", prompt, LENGTH) for i, prompt in enumerate(prompts(8, seed=2))]
    plain = run(quantised.get("none", 3, dtype="float32"), batch)
    drafted = run(quantised.get(drafter, 3, dtype="float32"), batch)
    same = sum(drafted[name] == plain[name] for name in plain)
    assert same >= len(plain) - 1, f"{len(plain) - same} of {len(plain)} differ"
    assert drafted.num_drafted > 0


@pytest.mark.parametrize("drafter", ["none", "eagle3"])
def test_graphs_and_eager_steps_agree(quantised: Engines, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, eager = quantised.get(drafter), quantised.get(drafter, cuda_graphs=False)
    assert gpu(captured).executor.graphs.stats.num_graphs > 0
    tiers = gpu(captured).executor.prompts.tiers
    monkeypatch.setattr(gpu(eager).executor.prompts, "tiers", tiers)  # padded alike: the same bits
    batch = [
        request(f"r{i}", prompt, LENGTH, sampling=MIXED[i % len(MIXED)])
        for i, prompt in enumerate(prompts(11, seed=7, high=300))
    ]
    assert dict(run(captured, batch)) == dict(run(eager, batch))
    assert captured.stats().num_graph_misses == eager.stats().num_graph_misses == 0


def test_kernels_that_were_measured(quantised: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is served: the fastest tiles, an fp8 cache, prompts from graphs."""
    monkeypatch.setattr(kernel_forward, "tune", tune)
    monkeypatch.setattr(kernel_forward, "cache_root", lambda: tmp_path)
    core = quantised.build("suffix", 3, kv_cache_dtype="fp8", max_num_seqs=4)
    assert "llama-low/qkv/m4" in (tmp_path / "choices.json").read_text()
    batch = [request(f"r{i}", prompt, LENGTH) for i, prompt in enumerate(prompts(6, seed=11, high=300))]
    found = run(core, batch)
    assert all(len(found[wanted.request_id]) == LENGTH for wanted in batch)
    assert found.num_accepted > 0
    assert core.stats().num_graph_misses == 0
