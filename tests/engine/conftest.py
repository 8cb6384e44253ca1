"""Tiny target and draft models, loaded once, and what transformers says they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Greedy = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose time on more; and nothing here trains."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def loopy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.engine.tiny import save_loopy_llama

    return save_loopy_llama(tmp_path_factory.mktemp("loopy"), seed=20240517)


@pytest.fixture(scope="session")
def model(loopy_dir: Path) -> Any:
    return _load(loopy_dir)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Another random model with the same vocabulary: as a drafter nearly always wrong."""
    from tests.engine.tiny import save_loopy_llama

    return _load(save_loopy_llama(tmp_path_factory.mktemp("other"), seed=7, num_layers=1))


def _load(path: Path) -> Any:
    import json

    import torch

    from server.models.loader import load_model

    raw = json.loads((path / "config.json").read_text())
    return load_model(path, raw, torch.device("cpu"), torch.float32, 160)


@pytest.fixture(scope="session")
def reference(loopy_dir: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(loopy_dir).eval()


@pytest.fixture(scope="session")
def greedy(reference: Any) -> Greedy:
    """transformers' greedy answer to a prompt. Fails where two logits are so close that either would be right."""
    import torch

    from tests.engine.tiny import SMALLEST_GAP

    known: dict[tuple[int, ...], list[int]] = {}

    def generate(prompt: list[int], max_tokens: int) -> list[int]:
        key = tuple(prompt)
        if len(known.get(key, ())) < max_tokens:
            with torch.inference_mode():
                ids = torch.tensor([prompt])
                out = reference.generate(
                    ids, max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
                )
                best = reference(out).logits[0, len(prompt) - 1 : -1].topk(2).values
            gap = float((best[:, 0] - best[:, 1]).min())
            assert gap > SMALLEST_GAP, f"a near tie ({gap:.1e}) in the answer to {prompt}: choose another prompt"
            known[key] = out[0, len(prompt) :].tolist()
        return known[key][:max_tokens]

    return generate
