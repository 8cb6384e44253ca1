"""Tiny models: one that says something, and copies of it with worse weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

Worse = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """An engine built in this process switches them off for good."""
    with torch.enable_grad():
        yield


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.engine import build

    monkeypatch.setattr(build, "_num_cores", lambda: 1)


def changed(source: Path, path: Path, change: Worse) -> Path:
    """A copy of a model directory with other weights."""
    shutil.copytree(source, path)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    return path


def noise(name: str, size: float) -> Worse:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(3)
        for key, tensor in tensors.items():
            if name in key:
                tensor.add_(size * tensor.std() * torch.randn(tensor.shape, generator=generator))

    return change


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    draw = torch.Generator().manual_seed(0)
    words = ["the", "and", "ring", "of", "an", "hour", "anther", "tea", "other", "all", "ill", "then"]
    lines = []
    for _ in range(24):
        picked = torch.randint(0, len(words), (30,), generator=draw).tolist()
        lines.append(json.dumps({"text": " ".join(words[i] for i in picked)}))
    path.write_text("\n".join(lines))
    return path
