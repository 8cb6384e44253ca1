"""What is said of the layers and their kernels."""

from __future__ import annotations

from server.engine.linear_layers import grouped, one_line
from server.engine.messages import LayerPaths


def test_groups_and_the_line() -> None:
    named = {f"model.layers.{i}.mlp.down_proj": ("int4-g64", "torch-dequantised") for i in range(3)}
    named |= {f"model.layers.{i}.mlp.up_proj": ("int4-g64", "torch-dequantised") for i in range(3)}
    groups = grouped({**named, "lm_head": ("bfloat16", "triton+cublas")})
    patterns = ["model.layers.*.mlp.down_proj", "model.layers.*.mlp.up_proj"]
    assert groups == [
        LayerPaths(patterns, 6, "int4-g64", "torch-dequantised", True),
        LayerPaths(["lm_head"], 1, "bfloat16", "triton+cublas", False),
    ]
    assert one_line(groups) == (
        "linear layers: 6 int4-g64 torch-dequantised (mlp.down_proj, mlp.up_proj), 1 bfloat16 triton+cublas (lm_head); "
        "6 of 7 have no low-bit kernel here and were dequantised"
    )
    assert "dequantised" not in one_line(groups[1:])


def test_parts_of_which_one_is_dequantised() -> None:
    (group,) = grouped({"qkv": ("int8 | int4-g32", "onednn-int8 | torch-dequantised")})
    assert group.dequantised
