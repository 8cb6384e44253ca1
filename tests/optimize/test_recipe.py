from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from optimize.recipe import ACTIVATIONS, WEIGHTS, LayerFormat, LayerRule, Recipe
from optimize.recipe_file import load_recipe, parse_recipe, recipe_fields, recipe_names
from server.config import ConfigError
from server.quant.formats import ActivationKind, WeightKind


def test_valid_values_are_those_of_the_formats() -> None:
    assert get_args(WeightKind) == WEIGHTS
    assert get_args(ActivationKind) == ACTIVATIONS


@pytest.mark.parametrize(
    "name", ["fp8", "int8-smoothquant", "int8-weight-only", "int4-awq", "int4-awq-g32", "w4a8-awq", "auto"]
)
def test_a_packaged_recipe_reads_back_from_its_fields(name: str) -> None:
    assert name in recipe_names()
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert parse_recipe(recipe_fields(recipe)) == recipe


def test_the_gate_defaults() -> None:
    gate = Recipe("x").gate
    assert (gate.max_perplexity_ratio, gate.min_top1_agreement) == (1.03, 0.95)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weights": "int5"}, "weights: 'int5' is not valid; use one of fp8, int8, int4"),
        ({"colour": 1}, "colour: there is no such field; valid fields are name"),
        ({"group_size": 48}, "group_size: 48 is not valid; use one of 16, 32"),
        ({"group_size": "64"}, "group_size: '64' is not valid; use a whole number"),
        ({"minimum": 1}, "minimum: 1 is not valid; use true or false"),
        ({"gate": {"min_top1_agreement": 1.5}}, "gate.min_top1_agreement: 1.5 is not valid; use 0 to 1"),
        ({"gate": {"faster_at": [0]}}, "gate.faster_at: 0 is not valid"),
        ({"gate": {"faster_at_cpu": [0]}}, "gate.faster_at_cpu: 0 is not valid"),
        ({"gate": 3}, "gate: 3 is not valid; use a table"),
        ({"smoothing": {"alpha": [0.5, 2.0]}}, "smoothing.alpha: 2.0 is not valid; use 0 to 1"),
        ({"smoothing": {"alpha": []}}, r"smoothing.alpha: \[\] is not valid"),
        ({"auto": {"bits": 3.0}}, "auto.bits: 3.0 is not valid; use more than 4"),
        ({"auto": {"candidates": [{"weights": "int8"}]}}, "auto.candidates: 1 is not valid; use two or more"),
        ({"auto": {"candidates": [{"weights": "x"}, {}]}}, r"auto.candidates\[0\].weights: 'x' is not valid"),
        ({"layers": [{"keep": True}]}, r"layers\[0\].pattern: missing"),
        ({"layers": [{"pattern": "a", "keep": True, "weights": "int8"}]}, "keep: true is not valid beside a format"),
        ({"layers": [{"pattern": "a", "axis": "column"}]}, "axis: 'column' is not valid; use one of row, group"),
        ({"layers": [{"pattern": "a", "axis": "group"}]}, "group_size: missing; axis 'group' needs one"),
        ({"layers": [{"pattern": "a", "axis": "row", "group_size": 64}]}, "group_size: 64 is not valid with axis"),
        ({"method": "smoothquant", "weights": "fp8"}, "method: 'smoothquant' is not valid for"),
        ({"method": "awq"}, "method: 'awq' is not valid for weights 'int8'"),
        ({"activations": "int8-group"}, "group_size: missing"),
        ({"weights": "fp8", "minimum": True}, "minimum: true is not valid for fp8"),
        ({"calibration": {"sequence": 8}}, "calibration.sequence: 8 is not valid"),
    ],
)
def test_an_error_names_field_value_and_valid_values(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_recipe({"name": "mine", **content})


def test_a_file_of_ones_own_and_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('weights = "int4"\ngroup_size = 32\n[smoothing]\nalpha = 1\n')
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.base, recipe.smoothing.alpha) == ("mine", LayerFormat("int4", group_size=32), (1.0,))
    path.write_text('weights = "int4')
    with pytest.raises(ConfigError, match=r"mine\.toml: cannot be read as TOML"):
        load_recipe(str(path))
    with pytest.raises(ConfigError, match="recipe: 'nothing' is not valid; use one of auto, fp8"):
        load_recipe("nothing")


def test_the_last_matching_rule_wins_and_wildcards_leave_head_and_embedding_alone() -> None:
    rules = (
        LayerRule("*.mlp.*", weights="int4", group_size=64),
        LayerRule("*.layers.0.*", keep=True),
        LayerRule("*.layers.0.mlp.down_proj", weights="int8", axis="row"),
        LayerRule("*", activations="int8"),
    )
    recipe = Recipe("x", layers=rules[:3])
    assert recipe.format_for("model.layers.1.mlp.up_proj") == LayerFormat("int4", group_size=64)
    assert recipe.format_for("model.layers.0.mlp.up_proj") is None
    assert recipe.format_for("model.layers.0.mlp.down_proj") == LayerFormat("int8")
    assert Recipe("x", layers=rules).format_for("lm_head") is None
    assert Recipe("x", layers=(LayerRule("lm_head", weights="int8"),)).format_for("lm_head") == LayerFormat("int8")
