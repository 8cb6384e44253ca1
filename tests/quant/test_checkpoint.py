"""What `config.json` says of quantised layers."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from server.quant.checkpoint import layers_of, quantization_config
from server.quant.formats import LinearFormat


def test_what_is_written_is_read() -> None:
    form = LinearFormat("int4", "int8-group", 32, minimum=True)
    config = {"hidden_size": 8, "quantization_config": quantization_config({"a.b": asdict(form)})}
    found = layers_of(config)
    assert found is not None and LinearFormat(**found["a.b"]) == form


@pytest.mark.parametrize("found", [None, {}, {"quant_method": "gptq"}])
def test_others_are_not_ours(found: dict[str, object] | None) -> None:
    assert layers_of({"quantization_config": found}) is None and layers_of({}) is None


def test_an_unknown_version_is_refused() -> None:
    config = {"quantization_config": {**quantization_config({}), "version": 2}}
    with pytest.raises(ValueError, match="version 2"):
        layers_of(config)
