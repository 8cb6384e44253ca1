"""Models that are rounded as they are made: what they are made of, that engines run on them, and how they compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.headline import OWN, PEER, rows_of, ways
from benchmarks.nvml import energy_counter
from benchmarks.quantised import FORMATS, RANDOM_HEAD, Quantised, find_shape
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.memory import assume
from server.engine.plan import plan_engine
from server.models.loader import load_source
from server.models.shapes import RANDOM
from server.models.source import resolve
from server.quant.formats import QuantizedWeight
from tests.benchmarks.tiny import LARGE, write_head, write_model
from tests.engine.tiny import prompts, request, run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(SHAPE))
    return RANDOM + str(tmp_path / "shape")


def engine(find: Callable[[str], Any], **options: Any) -> EngineCore:
    config = EngineConfig(device="cpu", num_threads=1, max_num_seqs=4, kv_cache_tokens=400, adaptive=False, **options)
    return build_engine(config, lambda text: None, find=find)[0]


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form is not None])
def test_weights_are_rounded_to_nearest(shape: str, name: str) -> None:
    form = FORMATS[name]
    assert form is not None
    plain = load_source(find_shape(shape), CPU, torch.float32, 64)
    source = Quantised(find_shape, form, target=shape)(shape)
    made = load_source(source, CPU, torch.float32, 64)
    paths = made.layer_paths()  # type: ignore[attr-defined]
    assert {form for n, (form, _) in paths.items() if n != "lm_head"} == {form.name} and paths["lm_head"][
        0
    ] == "float32"
    mine, theirs = (m.linears()["model.layers.1.mlp.down_proj"].plain_weight() for m in (made, plain))  # type: ignore[attr-defined]
    error = float((mine - theirs).norm() / theirs.norm())
    assert 0 < error < {"fp8": 0.04, "int8": 0.02, "int4": 0.15}[form.weights]
    assert source.tensors is not None
    sketch = source.tensors(torch.bfloat16, torch.device("meta"))
    assert sketch.get("model.layers.0.mlp.up_proj.weight").dtype == sketch_dtype(form.weights)


def sketch_dtype(weights: str) -> torch.dtype:
    return {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[weights]


def test_a_target_and_its_random_head(shape: str) -> None:
    """Drafted or not the same text; the head's layers are rounded, and the plan knows all of it."""
    find = Quantised(find_shape, FORMATS["int8"], FORMATS["int8"], FORMATS["fp8-weights"], shape)
    batch = [request(f"r{i}", [token % 64 for token in prompt], 20) for i, prompt in enumerate(prompts(3, low=1))]
    drafted = engine(find, model=shape, drafter="eagle3", draft_model=RANDOM_HEAD, max_draft_tokens=3)
    assert dict(run(drafted, batch)) == dict(run(engine(find, model=shape, drafter="none"), batch))
    assert drafted.stats().num_draft_steps > 0
    source = find(RANDOM_HEAD)
    assert source.tensors is not None and "quantization_config" in source.config

    def planned(find: Callable[[str], Any]) -> tuple[int, int]:
        config = EngineConfig(
            model=shape, drafter="eagle3", draft_model=RANDOM_HEAD, kv_cache_tokens=400, max_model_len=128
        )
        plan = plan_engine(config, GPU, assume(8 << 30, GPU), find)
        return plan.target_bytes, plan.draft_bytes

    mine, plain = planned(find), planned(Quantised(find_shape, None, target=shape))
    assert mine[0] < 0.7 * plain[0] and mine[1] < 0.7 * plain[1]


def test_widened_models_and_files_are_rounded_too(tmp_path: Path) -> None:
    from benchmarks.widen import PREFIX, Widened

    small = write_model(tmp_path / "small", num_hidden_layers=3)
    head = write_head(tmp_path / "head")
    large = LARGE | {"hidden_size": 48, "intermediate_size": 64}
    find = Quantised(Widened(large, small), FORMATS["int8"], None, FORMATS["fp8-weights"], PREFIX + small)
    made = load_source(find(PREFIX + small), CPU, torch.float32, 64)
    assert made.layer_paths()["model.layers.2.mlp.gate_up_proj"][0] == "int8+int8"  # type: ignore[attr-defined]
    tensors = find(PREFIX + head).tensors
    assert tensors is not None
    assert tensors(torch.float32, CPU).get("midlayer.mlp.down_proj.weight").dtype == torch.float8_e4m3fn
    files = Quantised(resolve, FORMATS["int8"], target=small)(small)
    loaded = load_source(files, CPU, torch.float32, 64)
    assert loaded.layer_paths()["model.layers.0.mlp.down_proj"][0] == "int8+int8"  # type: ignore[attr-defined]


def test_the_headline_compares_each_way_with_both_others() -> None:
    assert ways(["int4"]) == [PEER, OWN, "int4", "int4-eagle3"]
    own = {"latency": 6.0, "throughput": 100.0, "size": 13.5, "memory": 14.0, "energy": 2.0}
    mine = {"latency": 2.0, "throughput": 150.0, "size": 4.5, "memory": 7.0, "energy": 1.0}
    slow = {name: 2 * value for name, value in own.items() if name != "energy"}
    rows = {row.case: row.value for row in rows_of("gpu", {PEER: slow, OWN: own, "int4": mine}, "")}
    at = "gpu/headline_7b"
    assert rows[f"{at}/latency/int4"] == rows[f"{at}/size/int4"] == 3.0 and rows[f"{at}/throughput/int4"] == 1.5
    assert rows[f"{at}/memory/int4"] == rows[f"{at}/energy/int4"] == -50.0
    assert rows[f"{at}/latency/int4/vs-transformers"] == 6.0
    assert f"{at}/energy/int4/vs-transformers" not in rows
    assert rows["gpu/headline_7b_raw/bf16/size"] == 13.5


def test_energy_is_left_out_where_nothing_counts_it() -> None:
    counter = energy_counter()
    assert counter is None or counter.joules() >= 0


def test_a_weight_on_the_meta_device_has_its_shape() -> None:
    from benchmarks.quantised import rounded

    for form in FORMATS.values():
        if form is None:
            continue
        found, sketch = (rounded(torch.ones(4, 256, device=device), form) for device in ("cpu", "meta"))
        for weight in (found, sketch):
            assert isinstance(weight, QuantizedWeight)
        assert (found.values.shape, found.scales.shape) == (sketch.values.shape, sketch.scales.shape)
