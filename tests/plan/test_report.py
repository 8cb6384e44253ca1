from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import EngineConfig
from server.engine.plan import MemoryPlan
from server.plan.options import PlanOptions
from server.plan.report import as_json, as_text, rounded
from server.plan.run import plan_for

GIB = 1 << 30
SCHEMA: dict[str, dict[str, type]] = {
    "model": {"name": str, "kind": str, "architecture": str, "num_parameters": int, "dtype": str},
    "drafter": {"name": str, "model": str, "max_draft_tokens": int},
    "device": {"type": str, "name": str, "assumed": bool, "total_bytes": int, "free_bytes": int},
    "memory": dict.fromkeys(
        (
            "in_use_bytes",
            "target_weights_bytes",
            "drafter_weights_bytes",
            "steps_bytes",
            "target_kv_bytes",
            "drafter_kv_bytes",
            "drafter_features_bytes",
            "left_bytes",
        ),
        int,
    ),
    "kv_cache": {"dtype": str, "block_size": int, "num_blocks": int, "block_bytes": int, "num_tokens": int},
    "context": dict.fromkeys(
        ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_full_sequences"),
        int,
    ),
}
CASES: dict[str, tuple[str | None, int | None, dict[str, Any]]] = {
    "this machine": ("cpu", None, {"model": "smollm2-135m"}),
    "80 GiB": ("cuda", 80, {}),
    "16 GiB": ("cuda", 16, {}),
    "eagle3": ("cuda", 80, {"drafter": "eagle3"}),
    "small-lm": ("cuda", 80, {"drafter": "small-lm", "draft_model": "llama-3.2-1b"}),
    "fp8": ("cuda", 80, {"kv_cache_dtype": "fp8"}),
    "tokens": ("cuda", 24, {"kv_cache_tokens": 100_000}),
    "tight": ("cuda", 18, {"max_model_len": 8192, "max_draft_tokens": 0}),
    "all": ("cuda", 80, {"model": "tiny"}),
}


def made(case: str) -> MemoryPlan:
    device, gib, options = CASES[case]
    engine = EngineConfig(**{"model": "llama-3.1-8b", "device": device, **options})
    return plan_for(PlanOptions(engine, None if gib is None else gib * GIB, json=False))


@pytest.mark.parametrize("case", CASES)
def test_the_json_has_its_fields_and_no_others(case: str) -> None:
    found = as_json(made(case))
    assert found.keys() == {"schema", "fits", "reason", *SCHEMA}
    assert found["schema"] == 1 and found["fits"] is (found["reason"] is None)
    for part, kinds in SCHEMA.items():
        assert found[part].keys() == kinds.keys()
        for name, kind in kinds.items():
            value = found[part][name]
            assert type(value) is kind or (name == "model" and value is None), (part, name)
    assert sum(found["memory"].values()) == found["device"]["total_bytes"]
    assert found["fits"] is (case not in ("16 GiB", "tokens"))


@pytest.mark.parametrize("case", CASES)
def test_the_columns_of_the_table_add_up_and_line_up(case: str) -> None:
    lines = as_text(made(case)).splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == ["MiB", "GiB"])
    rule = next(i for i, line in enumerate(lines) if set(line.strip()) == {"-"})
    ends = [match.end() for match in re.finditer(r"\S+", lines[head])]
    for end in ends:
        cells = [line[:end].rsplit("  ", 1)[-1].strip().replace(",", "") for line in lines[head + 1 :]]
        numbers = [0.0 if cell == "–" else float(cell) for cell in cells[: rule - head - 1]]
        assert sum(numbers) == pytest.approx(float(cells[rule - head]), abs=1e-6)
    assert rule - head - 1 == 8


def test_what_it_says() -> None:
    fits, short = as_text(made("eagle3")), as_text(made("16 GiB"))
    assert fits.startswith("llama-3.1-8b (LlamaForCausalLM, 8.03 B parameters, bfloat16) on a GPU of 80.00 GiB\n")
    for words in ("CUDA context", "4 KiB a token", "kv_memory_share 0.85", "up to 7 draft tokens each (eagle3)"):
        assert words in fits
    assert re.search(r"context +131,072 tokens; 3 such sequences fit at once", fits)
    assert fits.endswith("\nIt fits.")
    assert "It does not fit: not enough memory for llama-3.1-8b: the GPU has 15.45 GiB free of 16.00 GiB" in short
    assert "missing" in short and "sequences  up to" not in short
    assert "requests of more than" in as_text(made("tight"))
    assert "every sequence already has its full context" in as_text(made("all"))
    assert "float8_e4m3fn" in as_text(made("fp8")) and "no drafter" in as_text(made("tight"))
    assert "on this machine's CPU" in as_text(made("this machine"))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=9), st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_rounded_parts_add_up_and_stay_close(parts: list[int], left: int, digits: int) -> None:
    values = [*parts, left, sum(parts) + left]
    *shown, total = rounded(values, 1 << 30, digits)
    assert sum(shown) == pytest.approx(total, abs=1e-6)
    step = 10.0**-digits
    assert all(abs(s - v / GIB) <= step * 1.0001 for s, v in zip([*shown, total], values, strict=True))
