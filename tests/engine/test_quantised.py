"""Engines on quantised models: greedy text with a drafter is the text without, and the plan counts their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.footprint import tensor_bytes
from server.engine.memory import assume
from server.engine.plan import MemoryPlan, plan_engine
from server.models.llama import LlamaModel
from server.models.loader import load_source
from server.models.peek import peek
from server.quant import cuda
from server.quant.build import parts_of
from server.quant.cpu.vectors import ISA
from server.quant.formats import LinearFormat, QuantizedWeight
from server.quant.sketch import LinearSketch
from tests.engine.tiny import prompts, request, run
from tests.quant.rounding import rounded, write_quantized

CPU = torch.device("cpu")
FORMATS = {
    "int8": LinearFormat("int8", "int8"),
    "int8-weights": LinearFormat("int8"),
    "fp8": LinearFormat("fp8", "fp8"),
    "int4": LinearFormat("int4", group_size=32, minimum=True),
    "w4a8": LinearFormat("int4", "int8", 32),
    "native": LinearFormat("int8", "int8-group", 32),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))


def engine(path: Path, said: list[str] | None = None, **options: Any) -> Any:
    config = EngineConfig(
        model=str(path), num_threads=1, max_num_seqs=4, kv_cache_tokens=400, adaptive=False, **options
    )
    lines: list[str] = [] if said is None else said
    return build_engine(config, lines.append)


@pytest.mark.parametrize("name", FORMATS)
def test_greedy_text_does_not_depend_on_the_drafter(name: str, loopy_dir: Path, tmp_path: Path) -> None:
    if name == "native" and ISA is None:
        pytest.skip("this processor lacks AVX2")
    path = write_quantized(loopy_dir, tmp_path / "q", lambda layer: FORMATS[name] if "proj" in layer else None)
    batch = prompts(4, low=1)
    texts: dict[str, dict[str, list[int]]] = {}
    for drafter in ("none", "suffix", "ngram"):
        core, _ = engine(path, drafter=drafter, max_draft_tokens=4)
        together = run(core, [request(f"r{i}", prompt, 40) for i, prompt in enumerate(batch)])
        alone = run(core, [request("alone", batch[2], 40)])
        assert alone["alone"] == together["r2"]
        texts[drafter] = dict(together)
        assert drafter == "none" or core.stats().num_draft_steps > 0
    assert texts["suffix"] == texts["none"] == texts["ngram"]


def test_what_it_says_and_plans(loopy_dir: Path, tmp_path: Path) -> None:
    form = FORMATS["int8"]
    path = write_quantized(loopy_dir, tmp_path / "q", lambda layer: form if "proj" in layer else None)
    said: list[str] = []
    core, info = engine(path, said, drafter="none")
    groups = {group.format: group for group in info.linear_layers}
    assert groups[form.name].num_layers == 8 and groups["float32"].layers == ["lm_head"]
    assert groups[form.name].path in info.linear_path
    assert sum("linear layers: 8 int8+int8" in line for line in said) == 1
    config = EngineConfig(model=str(path), num_threads=1, max_num_seqs=4, kv_cache_tokens=400, drafter="none")
    plan = plan_engine(config, CPU, assume(1 << 30, CPU), peek)
    assert plan.num_parameters == info.num_parameters
    assert abs(plan.target_bytes - tensor_bytes(core.runner.model)) < 4096
    plain = plan_engine(
        EngineConfig(model=str(loopy_dir), num_threads=1, max_num_seqs=4, kv_cache_tokens=400, drafter="none"),
        CPU, assume(1 << 30, CPU), peek,
    )  # fmt: skip
    assert plan.target_bytes < plain.target_bytes


@pytest.mark.parametrize("name", ["fp8", "int8", "int8-weights", "w4a8", "int4"])
def test_a_gpu_holds_what_is_planned(name: str, loopy_dir: Path, tmp_path: Path) -> None:
    """Of each layer as many bytes as its kernel's tensors have; what weights free is the KV pool's."""
    form = FORMATS[name]
    path = write_quantized(loopy_dir, tmp_path / "q", lambda layer: form if "proj" in layer else None)
    gpu = torch.device("cuda")

    def plan(model: Path) -> MemoryPlan:
        config = EngineConfig(model=str(model), max_num_seqs=4096, max_num_batched_tokens=64, cuda_graphs=False)
        return plan_engine(config, gpu, assume(1 << 30, gpu), peek)

    weight = rounded(torch.randn(96, 64), form)
    for bias in (None, torch.zeros(96)):
        layer = cuda.on_cuda(weight, bias, torch.bfloat16)
        sketch = sum(tensor.nbytes for tensor in cuda.held(weight.to(torch.device("meta")), torch.bfloat16))
        assert tensor_bytes(layer) == sketch + (0 if bias is None else bias.nbytes)
        assert cuda.widened_bytes(weight, torch.bfloat16) == getattr(layer, "widened_bytes", 0)
    mine, plain = plan(path), plan(loopy_dir)
    saved = plain.target_bytes - mine.target_bytes
    assert saved > 0
    widened = max(cuda.widened_bytes(weight, torch.bfloat16) for weight in stored(path))
    assert mine.memory.step_bytes == plain.memory.step_bytes + widened
    block = mine.memory.block.total
    assert abs((mine.num_blocks - plain.num_blocks) * block - (saved - widened)) <= 2 * block


def stored(path: Path) -> list[QuantizedWeight]:
    """Layers of a quantised checkpoint as they are joined."""
    source = peek(str(path))
    assert source.tensors is None
    model = load_source(source, torch.device("meta"), torch.bfloat16, 64)
    assert isinstance(model, LlamaModel)
    layers = [part for layer in model.linears().values() for part in parts_of(layer)]
    return [layer._weight for layer in layers if isinstance(layer, LinearSketch) and layer._weight is not None]
