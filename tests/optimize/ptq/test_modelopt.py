"""The real calibrator on a tiny random Llama; `make test-optimize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimize.plan import plan_layers
from optimize.ptq.directory import read_model
from optimize.ptq.job import CHOICE, Job
from optimize.ptq.network import install
from optimize.recipe import CalibrationSettings, LayerRule, Recipe
from optimize.recipe_file import parse_recipe, recipe_fields
from server.models.source import resolve
from server.quant.formats import QuantizedWeight

pytestmark = [pytest.mark.optimize, pytest.mark.filterwarnings("ignore")]


class Quiet:
    def progress(self, what: str, fraction: float) -> None: ...

    def say(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def stages() -> Any:
    pytest.importorskip("modelopt", exc_type=ImportError)
    from optimize.ptq import stages

    return stages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif "proj" in name:
            parameter.data.mul_(5.0)
    directory = tmp_path_factory.mktemp("model")
    network.save_pretrained(directory)
    return directory


def quantized(stages: Any, model: Path, work: Path, **fields: Any) -> tuple[Job, Recipe]:
    calibration = CalibrationSettings(sequence=32, tokens=512, batch=4)
    recipe = parse_recipe(recipe_fields(Recipe("test", calibration=calibration, **fields)))
    job = Job(str(model), recipe_fields(recipe), str(work / "content"), str(work), device="cpu", dtype="float32")
    ids = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))
    save_file({"rows": ids[:8].contiguous(), "held_out": ids[8:].contiguous()}, job.texts)
    if recipe.method == "auto":
        (work / CHOICE).write_text(json.dumps(stages.choose(job, Quiet())))
    stages.quantize(job, Quiet())
    return job, recipe


def relative_error(model: Path, job: Job) -> float:
    ids = torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(9))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = network(input_ids=ids).logits
        install(network, read_model(Path(job.content)))
        after = network(input_ids=ids).logits
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({"weights": "int8"}, 0.05),
        ({"weights": "fp8", "activations": "fp8"}, 0.2),
        ({"method": "smoothquant", "weights": "int8", "activations": "int8"}, 0.05),
        ({"method": "awq", "weights": "int4", "group_size": 32}, 0.5),
        ({"method": "awq", "weights": "int4", "group_size": 32, "activations": "int8", "minimum": True}, 0.5),
    ],
)
def test_the_directory_computes_nearly_what_the_original_does(
    stages: Any, model: Path, tmp_path: Path, fields: dict[str, Any], bound: float
) -> None:
    job, recipe = quantized(stages, model, tmp_path, **fields)
    found = {name: item for name, item in read_model(Path(job.content)) if isinstance(item, QuantizedWeight)}
    plan = plan_layers(recipe, resolve(str(model)))
    assert found.keys() == plan.layers.keys() and len(found) == 14
    for name, weight in found.items():
        form = plan.layers[name]
        smooth = recipe.method != "max" and name.endswith(("o_proj", "down_proj"))
        assert (weight.format.weights, weight.format.group_size) == (form.weights, form.group_size)
        assert weight.format.smooth == smooth, name
    assert 0.0 < relative_error(model, job) < bound


def test_folding_alone_changes_nothing(stages: Any, model: Path, tmp_path: Path) -> None:
    """All layers but one are kept, so whatever differs comes from factors that went into norms."""
    rules = (LayerRule("*_proj", keep=True), LayerRule("*.0.self_attn.q_proj", weights="int8"))
    job, _ = quantized(stages, model, tmp_path, method="smoothquant", weights="int8", activations="int8", layers=rules)
    source = resolve(str(model))
    norm = "model.layers.0.input_layernorm.weight"
    written = dict(read_model(Path(job.content)))[norm]
    original = AutoModelForCausalLM.from_pretrained(source.directory).get_parameter(norm)
    assert isinstance(written, torch.Tensor) and not torch.allclose(written, original)
    assert relative_error(model, job) < 0.02


@pytest.mark.parametrize("search", ["gradient", "kl_div"])
def test_auto_stays_within_its_bits_and_uses_both_formats(
    stages: Any, model: Path, tmp_path: Path, search: str
) -> None:
    auto = {"bits": 6.0, "search": search, "score_steps": 2}
    fields = parse_recipe({"name": "x", "auto": auto}).auto
    job, _ = quantized(stages, model, tmp_path, method="auto", auto=fields)
    found = [item for _, item in read_model(Path(job.content)) if isinstance(item, QuantizedWeight)]
    bits = sum(w.format.bits * w.shape[0] * w.shape[1] for w in found) / sum(w.shape[0] * w.shape[1] for w in found)
    assert len(found) == 14 and bits <= 6.0
    assert {w.format.weights for w in found} == {"int4", "int8"}


def test_its_largest_values_are_ours(stages: Any) -> None:
    from optimize.ptq.calibrate import find_amax
    from optimize.ptq.convert import largest
    from optimize.recipe import LayerFormat

    weight = torch.randn(6, 64)
    for form in (LayerFormat("int8"), LayerFormat("fp8"), LayerFormat("int4", group_size=32)):
        assert torch.equal(find_amax(weight, form), largest(weight, form))
