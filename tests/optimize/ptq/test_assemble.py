from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optimize.export.fold import Folding
from optimize.export.source import Source
from optimize.plan import plan_layers
from optimize.ptq.assemble import Calibrated, Original, assemble
from optimize.ptq.convert import quantize_weight
from optimize.ptq.directory import write_model
from optimize.recipe import LayerFormat, Recipe
from server.models.source import ModelSource, resolve
from server.quant.formats import QuantizedWeight


@pytest.mark.parametrize("smoothed", [False, True])
def test_what_scales_o_proj_can_move_into_v_proj(tiny_llama_dir: Path, tmp_path: Path, smoothed: bool) -> None:
    """Whatever calibration found for each query head: an export that has no factors must not be refused."""
    source = resolve(str(tiny_llama_dir))
    assert source.config["num_attention_heads"] > source.config["num_key_value_heads"] > 1
    recipe = Recipe("x", weights="int4", group_size=16, minimum=True)
    plan = plan_layers(recipe, source)
    draw = torch.Generator().manual_seed(0)
    original = Original(source.directory, torch.device("cpu"), "source")
    found = {name: torch.rand(original.get(f"{name}.weight").shape[1], generator=draw) + 0.5 for name in plan.layers}
    calibrated = Calibrated(magnitudes=found) if smoothed else Calibrated(factors=found)
    write_model(assemble(original, plan, calibrated), source, tmp_path / "out")
    written = Source(tmp_path / "out")
    smooth = {name for name, form in written.layers.items() if form.smooth}
    assert {name.rpartition(".")[2] for name in smooth} == {"o_proj", "down_proj"}
    assert Folding(written).folded == smooth


def test_factors_that_harm_the_stored_format_are_left_out(tiny_llama_dir: Path) -> None:
    """Weights that lie on a grid with minimums already lose by any factor; without moments nobody can tell."""
    source, original = on_grid(tiny_llama_dir)
    plan = plan_layers(Recipe("x", weights="int4", group_size=32, minimum=True), source)
    shapes = {name: original.get(f"{name}.weight").shape[1] for name in plan.layers}
    draw = torch.Generator().manual_seed(0)
    factors = {name: torch.rand(columns, generator=draw) + 0.5 for name, columns in shapes.items()}
    moments = {name: torch.ones(columns) for name, columns in shapes.items()}
    kept = dict(assemble(original, plan, Calibrated(factors, moments=moments)))
    for name in plan.layers:
        item = kept[name]
        assert isinstance(item, QuantizedWeight) and not item.format.smooth
        assert torch.allclose(item.dequantize(), original.get(f"{name}.weight"), atol=1e-3)
    untold = dict(assemble(original, plan, Calibrated(factors)))
    item = untold["model.layers.0.mlp.down_proj"]
    assert isinstance(item, QuantizedWeight) and item.format.smooth


def test_factors_that_help_stay(tiny_llama_dir: Path) -> None:
    """A column that is read at a hundred times the others' size wants to be finer."""
    source = resolve(str(tiny_llama_dir))
    name = "model.layers.0.mlp.down_proj"
    plan = plan_layers(Recipe("x", weights="int4", group_size=32), source)
    original = Original(source.directory, torch.device("cpu"), "source")
    columns = original.get(f"{name}.weight").shape[1]
    factors, moments = torch.ones(columns), torch.ones(columns)
    factors[3], moments[3] = 1 / 3, 1e4
    found = dict(assemble(original, plan, Calibrated({name: factors}, moments={name: moments})))[name]
    assert isinstance(found, QuantizedWeight) and found.input_scales is not None
    assert float(found.input_scales[3]) < 1 and float(found.input_scales[4]) == 1


def on_grid(directory: Path) -> tuple[ModelSource, Original]:
    """A model whose weights four bits with minimums hold as they are."""
    source = resolve(str(directory))
    original = Original(source.directory, torch.device("cpu"), "source")
    read, form = original.get, LayerFormat("int4", group_size=32, minimum=True)

    def get(name: str) -> torch.Tensor:
        return quantize_weight(read(name), form).dequantize() if "_proj" in name else read(name)

    original.get = get  # type: ignore[method-assign]
    return source, original
