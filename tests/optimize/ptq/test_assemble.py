from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optimize.export.fold import Folding
from optimize.export.source import Source
from optimize.plan import plan_layers
from optimize.ptq.assemble import Calibrated, Original, assemble
from optimize.ptq.directory import write_model
from optimize.recipe import Recipe
from server.models.source import resolve


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
