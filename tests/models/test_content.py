from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.models import content
from server.models.content import content_identity
from server.models.source import ModelSource


def source(directory: Path, config: dict[str, Any] | None = None) -> ModelSource:
    return ModelSource(directory, "m", config or {"hidden_size": 8}, "directory")


def write(directory: Path, weights: torch.Tensor) -> ModelSource:
    directory.mkdir(exist_ok=True)
    save_file({"w": weights}, directory / "model.safetensors")
    return source(directory)


@pytest.mark.parametrize("whole", [True, False])
def test_the_identity_is_that_of_weights_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(content, "WHOLE_BYTES", 1000)
    weights = torch.arange(400_000.0)
    one, same = write(tmp_path / "a", weights), write(tmp_path / "b", weights)
    assert content_identity(one) == content_identity(same)
    found = {
        content_identity(one),
        content_identity(write(tmp_path / "c", weights * 1.01)),
        content_identity(write(tmp_path / "c", weights.half())),
        content_identity(write(tmp_path / "c", weights.view(2, -1))),
        content_identity(replace(one, config={"hidden_size": 8, "quantization_config": {"bits": 4}})),
    }
    assert len(found) == 5


def test_one_value_of_a_head_is_enough(tmp_path: Path) -> None:
    weights = torch.zeros(100_000)
    before = content_identity(write(tmp_path / "a", weights))
    weights[77_777] = 1.0
    assert content_identity(write(tmp_path / "a", weights)) != before


def test_drawn_weights_are_known_by_shape(tmp_path: Path) -> None:
    drawn = ModelSource(tmp_path / "x", "m", {"hidden_size": 8}, "random")
    assert content_identity(drawn) == content_identity(replace(drawn))
    assert content_identity(drawn) != content_identity(replace(drawn, config={"hidden_size": 16}))
