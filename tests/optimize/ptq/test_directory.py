from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from optimize.errors import OptimizeError
from optimize.ptq.assemble import Item
from optimize.ptq.convert import quantize_weight
from optimize.ptq.directory import read_model, write_model
from optimize.recipe import LayerFormat
from server.models.source import ModelSource
from server.quant.formats import QuantizedWeight

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return ModelSource(tmp_path, "tiny", {"architectures": ["LlamaForCausalLM"]}, "directory")


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may have 4 KB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_is_read_back_in_any_number_of_files(source: ModelSource, tmp_path: Path) -> None:
    weight = quantize_weight(torch.randn(8, 64), LayerFormat("int4", group_size=32, minimum=True))
    items: list[Item] = [(LAYER, weight), ("model.norm.weight", torch.ones(8))]
    for shard_bytes, count in ((1 << 20, 1), (64, 3)):
        out = tmp_path / f"out-{count}"
        write_model(items, source, out, shard_bytes=shard_bytes)
        assert len(list(out.glob("*.safetensors"))) == count
        found = dict(read_model(out))
        item = found[LAYER]
        assert isinstance(item, QuantizedWeight) and item.format == weight.format
        assert torch.equal(item.dequantize(), weight.dequantize()) and "model.norm.weight" in found


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_an_error_that_names_the_file(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(OptimizeError, match=r"part-00000\.safetensors: cannot be written: .*File too large.*full\?"):
        write_model([("model.norm.weight", torch.ones(4096))], source, tmp_path / "out")
