from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.quant.foreign.base import ForeignCheckpointError
from server.quant.foreign.detect import foreign_layers
from tests.quant.foreign.layouts import Stored

NAME = "model.layers.0.mlp.down_proj"


def flat(algorithm: str, **fields: Any) -> dict[str, Any]:
    inner = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt"},
    }
    return {"quantization_config": inner | fields}


def int4_layer(rows: int, columns: int, group: int) -> tuple[dict[str, Tensor], np.ndarray]:
    """Signed integers, two rows a byte, placed one by one; and W."""
    generator = np.random.default_rng(3)
    q = generator.integers(-8, 8, (rows, columns))
    scales = generator.uniform(0.01, 0.1, (rows, columns // group)).astype(np.float32)
    packed = np.zeros((rows // 2, columns), dtype=np.uint8)
    for row in range(rows):
        packed[row // 2] |= ((q[row] & 15) << (4 * (row % 2))).astype(np.uint8)
    tensors = {f"{NAME}.weight": torch.from_numpy(packed), f"{NAME}.weight_scale": torch.from_numpy(scales)}
    return tensors, q * scales[:, np.arange(columns) // group].astype(np.float64)


@pytest.mark.parametrize("smooth", [True, False])
def test_four_bit_layers_are_read_exactly(smooth: bool) -> None:
    tensors, weight = int4_layer(6, 64, 32)
    if smooth:
        tensors[f"{NAME}.pre_quant_scale"] = torch.rand(64, dtype=torch.bfloat16)
    dialect = foreign_layers(flat("W4A16_AWQ"))
    assert dialect is not None
    found = dialect.weight(Stored(tensors), NAME)
    assert found is not None
    assert found.format.name == "int4-g32" + ("-smooth" if smooth else "")
    assert np.abs(found.dequantize().double().numpy() - weight).max() < 1e-7
    assert (found.input_scales is not None) is smooth
    shapes = dialect.weight(Stored(tensors).on_meta(), NAME)
    assert shapes is not None
    assert shapes.format == found.format


@pytest.mark.parametrize(
    ("algorithm", "dtype", "name", "notices"),
    [
        ("FP8", torch.float8_e4m3fn, "fp8+fp8", 1),
        ("FP8_PER_CHANNEL_PER_TOKEN", torch.float8_e4m3fn, "fp8+fp8", 0),
        ("W8A16", torch.int8, "int8", 0),
        ("W8A8_SQ_PER_CHANNEL", torch.int8, "int8+int8-smooth", 1),
    ],
)
def test_eight_bit_layers(algorithm: str, dtype: torch.dtype, name: str, notices: int) -> None:
    numbers = torch.randint(-100, 100, (6, 32)).float().to(dtype)
    scales = torch.tensor(0.25) if algorithm == "FP8" else torch.rand(6)
    tensors = {f"{NAME}.weight": numbers, f"{NAME}.weight_scale": scales, f"{NAME}.input_scale": torch.tensor(0.1)}
    if "SQ" in algorithm:
        tensors[f"{NAME}.pre_quant_scale"] = torch.rand(32)
    dialect = foreign_layers(flat(algorithm))
    assert dialect is not None
    assert len(dialect.notices) == notices
    found = dialect.weight(Stored(tensors), NAME)
    assert found is not None
    assert found.format.name == name
    assert torch.equal(found.dequantize(), numbers.float() * (scales if scales.dim() == 0 else scales[:, None]))


def test_the_older_file_beside_the_configuration_is_read(tmp_path: Path) -> None:
    inner = {"quant_algo": "W4A16_AWQ", "group_size": 32, "exclude_modules": ["lm_head", "*down_proj"]}
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": inner})
    )
    tensors, _ = int4_layer(6, 64, 32)
    dialect = foreign_layers({}, tmp_path)
    assert dialect is not None
    assert dialect.weight(Stored(tensors), NAME) is None  # excluded by a pattern
    other = {name.replace("down", "up"): tensor for name, tensor in tensors.items()}
    assert dialect.weight(Stored(other), NAME.replace("down", "up")) is not None
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(ForeignCheckpointError, match="cannot be read as JSON"):
        foreign_layers({}, tmp_path)


def test_mixed_precision_is_read_a_layer_at_a_time() -> None:
    tensors, _ = int4_layer(6, 64, 32)
    layers = {NAME: {"quant_algo": "W4A16_AWQ", "group_size": 32}, "x": {"quant_algo": "W8A16"}}
    dialect = foreign_layers(flat("MIXED_PRECISION", quantized_layers=layers))
    assert dialect is not None
    found = dialect.weight(Stored(tensors), NAME)
    assert found is not None
    assert found.format.weights == "int4"
    assert dialect.weight(Stored(tensors), "model.layers.0.mlp.up_proj") is None


def test_algorithms_and_types_that_do_not_fit_are_named() -> None:
    with pytest.raises(ForeignCheckpointError, match=r"quant_algo 'NVFP4' of ModelOpt is not supported; FP8, .*work"):
        foreign_layers(flat("NVFP4"))
    tensors, _ = int4_layer(6, 64, 32)
    dialect = foreign_layers(flat("FP8"))
    assert dialect is not None
    with pytest.raises(ForeignCheckpointError, match=r"down_proj\.weight: is torch\.uint8; torch\.float8_e4m3fn works"):
        dialect.weight(Stored(tensors), NAME)
