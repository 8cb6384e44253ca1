"""Held against the project's own compressors, which write the tensors and dequantise them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from server.quant.foreign.base import ForeignCheckpointError
from server.quant.foreign.detect import foreign_layers
from server.quant.formats import QuantizedWeight
from tests.quant.foreign.layouts import Stored, awq_layer, random_grouped

NAME = "model.layers.0.self_attn.o_proj"
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def config_of(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
        | fields
    }


def compressed(config: dict[str, Any], rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors of a random layer as the project stores them, the weight that it dequantises them to)."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = config["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group)
    args = group["weights"]
    generator = torch.Generator().manual_seed(1)
    groups = {"tensor": 0, "channel": 1, "group": columns // args.get("group_size", columns)}[args["strategy"]]
    shape = (rows, groups) if groups else (1,)
    scales = torch.rand(shape, generator=generator) * 0.1 + 0.01
    state = {"weight": torch.randn(rows, columns, generator=generator), "weight_scale": scales}
    if not args.get("symmetric", True):
        low = 1 << (args["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-low, low, shape, generator=generator).to(torch.int8)
    else:
        state["weight_zero_point"] = torch.zeros(shape, dtype=torch.int8)
    if args["type"] == "float":
        del state["weight_zero_point"]
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    stored = compressor.compress(state, scheme)
    return {f"{NAME}.{k}": v for k, v in stored.items()}, compressor.decompress(stored, scheme)["weight"]


def read(config: dict[str, Any], tensors: dict[str, Tensor]) -> QuantizedWeight:
    dialect = foreign_layers(config)
    assert dialect is not None
    found = dialect.weight(Stored(tensors), NAME)
    assert found is not None
    shapes = dialect.weight(Stored(tensors).on_meta(), NAME)
    assert shapes is not None
    if found.format.minimum:
        assert shapes.format == found.format
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("strategy", "group"), [("group", 32), ("group", 48), ("channel", None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers(bits: int, strategy: str, group: int | None, symmetric: bool) -> None:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    config = config_of("pack-quantized", weights | ({"group_size": group} if group else {}))
    tensors, wanted = compressed(config, 10, 96)
    found = read(config, tensors)
    assert found.format.name == f"int{bits}{f'-g{group}' if group else ''}{'' if symmetric else '-min'}"
    assert torch.allclose(found.dequantize(), wanted, rtol=1e-6, atol=1e-5 if bits == 8 else 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_plain_integers_with_activations_of_eight_bits(bits: int, strategy: str) -> None:
    config = config_of("int-quantized", {"num_bits": bits, "type": "int", "strategy": strategy}, TOKEN)
    tensors, wanted = compressed(config, 10, 96)
    found = read(config, tensors)
    assert found.format.name == f"int{bits}+int8"
    assert torch.allclose(found.dequantize(), wanted)


@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("activations", ["fp8", "none"])
def test_floats(form: str, strategy: str, activations: str) -> None:
    inputs = TOKEN | {"type": "float"} if activations == "fp8" else None
    config = config_of(form, {"num_bits": 8, "type": "float", "strategy": strategy}, inputs)
    tensors, wanted = compressed(config, 6, 32)
    found = read(config, tensors)
    assert found.format.weights == "fp8"
    assert found.format.activations == activations
    assert torch.allclose(found.dequantize(), wanted)


def test_what_its_converter_makes_of_an_autoawq_layer_is_what_we_read_there() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    q, zeros, scales, _ = random_grouped(16, 96, 32, 4)
    layer = awq_layer(NAME, q, zeros, scales)
    awq = foreign_layers({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}})
    assert awq is not None
    mine = awq.weight(Stored(dict(layer)), NAME)
    assert mine is not None
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    converted = AutoAWQConverter(group_size=32).process(dict(layer))
    theirs = read(config_of("pack-quantized", weights), converted)
    assert torch.equal(mine.dequantize(), theirs.dequantize())


def test_layers_that_are_ignored_or_not_named_are_not_quantised() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config = config_of("float-quantized", weights)
    tensors, _ = compressed(config, 6, 32)
    for ignore in ([NAME], ["re:.*o_proj"], ["Linear"]):
        dialect = foreign_layers(config_of("float-quantized", weights, ignore=ignore))
        assert dialect is not None
        assert dialect.weight(Stored(tensors), NAME) is None
    dialect = foreign_layers(config)
    assert dialect is not None
    assert dialect.weight(Stored({"model.embed_tokens.weight": torch.zeros(4, 4)}), "model.embed_tokens") is None
    assert dialect.weight(Stored({}), "lm_head") is None


def test_names_go_before_expressions_and_those_before_classes() -> None:
    def group(bits: int, targets: list[str]) -> dict[str, Any]:
        return {"targets": targets, "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}

    groups = {"a": group(8, ["Linear"]), "b": group(4, [r"re:.*o_proj"])}
    config = config_of("int-quantized", {}, config_groups=groups)
    tensors = {f"{NAME}.weight": torch.full((4, 32), 3, dtype=torch.int8), f"{NAME}.weight_scale": torch.ones(4, 1)}
    assert read(config, tensors).format.weights == "int4"
    config["quantization_config"]["config_groups"]["c"] = group(8, [NAME])
    assert read(config, tensors).format.weights == "int8"


@pytest.mark.parametrize(
    ("weights", "inputs", "match"),
    [
        ({"num_bits": 3}, None, r"group_0: weights\.num_bits 3 .*4 and 8"),
        ({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 16}, None, r"num_bits 4 of type float"),
        ({"num_bits": 8, "type": "float", "strategy": "block"}, None, r"weights\.strategy 'block'"),
        ({"num_bits": 8}, TOKEN | {"symmetric": False}, r"input_activations\.symmetric False"),
        ({"num_bits": 8}, TOKEN | {"strategy": "group", "group_size": 64}, r"input_activations\.strategy 'group'"),
        ({"num_bits": 8}, TOKEN | {"num_bits": 4}, r"input_activations of 4 bits"),
    ],
)
def test_schemes_that_cannot_be_represented_are_named(
    weights: dict[str, Any], inputs: dict[str, Any] | None, match: str
) -> None:
    with pytest.raises(ForeignCheckpointError, match=match):
        foreign_layers(config_of("int-quantized", {"type": "int", "strategy": "channel"} | weights, inputs))


def test_other_formats_rotations_and_orders_of_columns_are_refused() -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    with pytest.raises(ForeignCheckpointError, match="format 'marlin-24' is not supported; pack-quantized"):
        foreign_layers(config_of("marlin-24", weights))
    with pytest.raises(ForeignCheckpointError, match="transform_config is not supported"):
        foreign_layers(config_of("pack-quantized", weights, transform_config={"config_groups": {"u": {"type": "h"}}}))
    assert foreign_layers(config_of("pack-quantized", weights, transform_config={}, sparsity_config={}))
    config = config_of("pack-quantized", weights)
    tensors, _ = compressed(config, 8, 64)
    tensors[f"{NAME}.weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(ForeignCheckpointError, match=r"o_proj\.weight_g_idx: .*actorder"):
        read(config, tensors)


def test_static_scales_of_activations_are_said_not_to_be_used() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    dialect = foreign_layers(config_of("float-quantized", weights, static, kv_cache_scheme={"num_bits": 8}))
    assert dialect is not None
    assert "one scale a token" in dialect.notices[0]
    assert "--kv-cache-dtype" in dialect.notices[1]
    plain = foreign_layers(config_of("float-quantized", weights))
    assert plain is not None
    assert plain.notices == ()
