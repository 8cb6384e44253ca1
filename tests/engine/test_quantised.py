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
from server.engine.plan import plan_engine
from server.models.peek import peek
from server.quant.cpu.vectors import ISA
from server.quant.formats import LinearFormat
from tests.engine.tiny import prompts, request, run
from tests.quant.rounding import write_quantized

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
