from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server.quant.foreign.base import ForeignCheckpointError
from server.quant.foreign.detect import foreign_layers
from tests.quant.foreign.layouts import Stored, awq_layer, gptq_layer, random_grouped

NAME = "model.layers.0.mlp.up_proj"
AWQ = {
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
}


def gptq(**fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False} | fields}


@pytest.mark.parametrize(("rows", "columns", "group"), [(8, 32, 32), (24, 96, 48), (16, 160, 32)])
@pytest.mark.parametrize("centre", [False, True])
def test_autoawq_layers_are_read_exactly(rows: int, columns: int, group: int, centre: bool) -> None:
    q, zeros, scales, weight = random_grouped(rows, columns, group, 4, centre=centre)
    dialect = foreign_layers(AWQ)
    assert dialect is not None
    stored = Stored(awq_layer(NAME, q, zeros, scales))
    found = dialect.weight(stored, NAME)
    assert found is not None
    assert found.format.minimum is not centre
    assert found.shape == (rows, columns)
    assert np.abs(found.dequantize().double().numpy() - weight).max() < 1e-6
    shapes = dialect.weight(stored.on_meta(), NAME)
    assert shapes is not None
    assert shapes.shape == found.shape
    assert shapes.values.shape == found.values.shape
    assert dialect.weight(stored, "lm_head") is None


def test_other_layouts_of_awq_are_refused() -> None:
    for field, value in (("bits", 3), ("version", "gemv")):
        config = {"quantization_config": AWQ["quantization_config"] | {field: value}}
        with pytest.raises(ForeignCheckpointError, match=f"{field} .*{value}.*works"):
            foreign_layers(config)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("stored_as", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("centre", [False, True])
def test_gptq_layers_are_read_exactly(bits: int, stored_as: str, offset: int, centre: bool) -> None:
    q, zeros, scales, weight = random_grouped(16, 96, 32, bits, centre=centre)
    dialect = foreign_layers(gptq(bits=bits, checkpoint_format=stored_as, sym=centre))
    assert dialect is not None
    found = dialect.weight(Stored(gptq_layer(NAME, q, zeros, scales, bits, offset)), NAME)
    assert found is not None
    assert found.format.weights == f"int{bits}"
    assert found.format.minimum is not centre
    assert np.abs(found.dequantize().double().numpy() - weight).max() < 2e-6 * (1 << bits)


def test_one_group_a_row_is_a_scale_a_row() -> None:
    q, zeros, scales, weight = random_grouped(8, 64, 64, 4)
    dialect = foreign_layers(gptq(group_size=-1))
    assert dialect is not None
    found = dialect.weight(Stored(gptq_layer(NAME, q, zeros, scales, 4)), NAME)
    assert found is not None
    assert found.format.group_size is None
    assert np.abs(found.dequantize().double().numpy() - weight).max() < 1e-6


def test_an_order_of_columns_is_refused_unless_it_is_the_plain_one() -> None:
    q, zeros, scales, _ = random_grouped(8, 64, 32, 4)
    tensors = gptq_layer(NAME, q, zeros, scales, 4)
    dialect = foreign_layers(gptq(desc_act=True))
    assert dialect is not None
    assert dialect.weight(Stored(tensors), NAME) is not None
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].flip(0)
    with pytest.raises(ForeignCheckpointError, match=r"up_proj\.g_idx: .*desc_act=False works"):
        dialect.weight(Stored(tensors), NAME)


def test_bits_of_a_layer_follow_from_its_shapes() -> None:
    q, zeros, scales, weight = random_grouped(8, 64, 32, 8)
    dialect = foreign_layers(gptq(dynamic={r"+:.*up_proj": {"bits": 8}}))
    assert dialect is not None
    found = dialect.weight(Stored(gptq_layer(NAME, q, zeros, scales, 8)), NAME)
    assert found is not None
    assert np.abs(found.dequantize().double().numpy() - weight).max() < 1e-3


def test_a_zero_point_that_readers_take_for_two_numbers_is_refused() -> None:
    q, zeros, scales, _ = random_grouped(8, 64, 32, 4)
    zeros[3, 1] = 16
    dialect = foreign_layers(gptq())
    assert dialect is not None
    with pytest.raises(ForeignCheckpointError, match=r"qzeros: holds a zero point of 15.*gptq_v2 works"):
        dialect.weight(Stored(gptq_layer(NAME, q, zeros, scales, 4)), NAME)


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_missing_and_misshapen_tensors_are_named(part: str) -> None:
    q, zeros, scales, _ = random_grouped(8, 64, 32, 4)
    for layer, config in ((awq_layer(NAME, q, zeros, scales), AWQ), (gptq_layer(NAME, q, zeros, scales, 4), gptq())):
        dialect = foreign_layers(config)
        assert dialect is not None
        damaged = layer | {f"{NAME}.{part}": layer[f"{NAME}.{part}"][:, :-1]}
        with pytest.raises(ForeignCheckpointError, match=rf"up_proj\.{part}: has shape"):
            dialect.weight(Stored(damaged), NAME)
    dialect = foreign_layers(gptq())
    assert dialect is not None
    layer = gptq_layer(NAME, q, zeros, scales, 4)
    del layer[f"{NAME}.{part}"]
    with pytest.raises(ForeignCheckpointError, match=rf"up_proj\.{part}: is missing"):
        dialect.weight(Stored(layer), NAME)


def test_bits_that_are_not_supported_are_named() -> None:
    for fields, match in (({"bits": 3}, "bits 3 .*4 and 8 work"), ({"checkpoint_format": "marlin"}, "marlin.*gptq")):
        with pytest.raises(ForeignCheckpointError, match=match):
            foreign_layers(gptq(**fields))


def test_plain_models_and_our_own_are_nobodys_dialect() -> None:
    assert foreign_layers({}) is None
    assert foreign_layers({"quantization_config": {"quant_method": "outpace", "version": 1, "layers": {}}}) is None
    with pytest.raises(ForeignCheckpointError, match=r"'hqq' is not supported; awq .*work"):
        foreign_layers({"quantization_config": {"quant_method": "hqq"}})


def test_rows_of_a_read_layer_can_be_moved() -> None:
    q, zeros, scales, weight = random_grouped(8, 64, 32, 4)
    dialect = foreign_layers(AWQ)
    assert dialect is not None
    found = dialect.weight(Stored(awq_layer(NAME, q, zeros, scales)), NAME)
    assert found is not None
    index = torch.tensor([3, 1, 2])
    assert np.abs(found.rows(index).dequantize().double().numpy() - weight[[3, 1, 2]]).max() < 1e-6
