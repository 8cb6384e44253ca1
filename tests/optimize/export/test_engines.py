from __future__ import annotations

import pytest

from optimize.export.engines import ENGINES, FORMATS, KINDS, formats_for, summary, table, whole_table, why_not
from server.quant.formats import LinearFormat

FP8 = LinearFormat("fp8", "fp8")
INT8 = LinearFormat("int8", "int8", smooth=True)
W8A16 = LinearFormat("int8")
INT4 = LinearFormat("int4", group_size=64)
W4A8 = LinearFormat("int4", "int8", group_size=64)


@pytest.mark.parametrize(
    ("forms", "wanted"),
    [
        ([FP8], {"vllm": ("compressed-tensors", "modelopt"), "tensorrt-llm": ("modelopt",)}),
        ([INT8], {"vllm": ("compressed-tensors",), "tensorrt-llm": ()}),
        ([W8A16], {"sglang": ("compressed-tensors",), "tensorrt-llm": ("modelopt",)}),
        ([INT4], {"vllm": ("compressed-tensors", "awq"), "tensorrt-llm": ("modelopt",)}),
        ([INT4, W8A16], {"vllm": ("compressed-tensors",), "transformers": ("compressed-tensors",)}),
        ([W4A8], {"sglang": (), "tensorrt-llm": (), "transformers": ("compressed-tensors",)}),
        ([LinearFormat("int4", group_size=16)], {"vllm": (), "transformers": ("compressed-tensors", "awq")}),
        ([LinearFormat("int4", group_size=64, minimum=True)], {"sglang": ("awq",), "tensorrt-llm": ()}),
    ],
)
def test_formats_of_an_engine(forms: list[LinearFormat], wanted: dict[str, tuple[str, ...]]) -> None:
    artifact = summary(forms)
    for engine, formats in wanted.items():
        assert formats_for(engine, artifact) == formats


def test_refusals_name_the_reason_and_a_pair_that_works() -> None:
    assert why_not("tensorrt-llm", None, summary([INT8])) == (
        "tensorrt-llm has no layers of kind int8+int8; what works: vllm with compressed-tensors, "
        "sglang with compressed-tensors, transformers with compressed-tensors"
    )
    assert "vllm does not take layers of kind int4 as modelopt" in why_not("vllm", "modelopt", summary([INT4]))
    small = summary([LinearFormat("int4", group_size=16)])
    assert "no kernels for groups of 16 columns (32, 64, 128 work)" in why_not("vllm", None, small)
    unknown = summary([LinearFormat("int8", "fp8")])
    assert "what works: no engine in the table" in why_not("vllm", None, unknown)


def test_tables_name_every_engine_and_recipe() -> None:
    lines = table(summary([W4A8]))
    assert [line.split()[0] for line in lines] == list(ENGINES)
    assert "CompressedTensorsWNA8Int" in lines[0]
    whole = "\n".join(whole_table())
    for word in (*ENGINES, *FORMATS, *KINDS.values()):
        assert word in whole
