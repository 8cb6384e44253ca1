"""How much of a device the KV pool gets, in plain numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.config import ConfigError, EngineConfig
from server.engine import memory
from server.engine.memory import explained, plan_memory
from server.engine.working_memory import StepSizes, hidden_size, working_bytes
from server.models.base import KVLayer

GIB = 1 << 30
LLAMA_8B = 8_030_261_248
CONFIG = EngineConfig(
    max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192, kv_memory_share=0.85, max_draft_tokens=4
)
SIZES = StepSizes(64, 4, 2048, 8192, 128_256, 4096, 2, graphs=True, ratio=False)


def llama_8b(device: str) -> Any:
    return SimpleNamespace(
        vocab_size=128_256,
        max_position_embeddings=131_072,
        kv_layers=[KVLayer(8, 128)] * 32,
        dtype=torch.bfloat16,
        device=torch.device(device),
        num_parameters=LLAMA_8B,
    )


def plan(monkeypatch: pytest.MonkeyPatch, device: str, free: int, config: EngineConfig = CONFIG) -> memory.Memory:
    monkeypatch.setattr(memory, "free_memory", lambda _: free)
    return plan_memory(config, llama_8b(device), [])


def test_a_share_of_what_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(monkeypatch, "cuda", 8 * GIB)
    assert found.bytes_per_block == 2 * 32 * 8 * 128 * 2 * 16
    pool = (found.num_blocks - 1) * found.bytes_per_block
    assert 8 * GIB - pool > 2.5 * GIB, "graphs and activations would not fit"
    assert pool > 4 * GIB


@pytest.mark.parametrize(
    "smaller", [{"max_num_seqs": 16}, {"max_draft_tokens": 0}, {"drafter": "none"}, {"max_num_batched_tokens": 256}]
)
def test_smaller_steps_leave_more(monkeypatch: pytest.MonkeyPatch, smaller: dict[str, Any]) -> None:
    before = plan(monkeypatch, "cuda", 8 * GIB).num_blocks
    assert plan(monkeypatch, "cuda", 8 * GIB, replace(CONFIG, **smaller)).num_blocks > before


def test_a_cpu_keeps_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(monkeypatch, "cpu", 8 * GIB)
    assert found.num_blocks == 1 + int(8 * GIB * 0.85) // found.bytes_per_block


def test_no_room_at_all_names_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"1024 MiB free less \d+ MiB for steps holds not one block") as raised:
        plan(monkeypatch, "cuda", GIB)
    assert "max_num_seqs, max_draft_tokens or max_num_batched_tokens" in str(raised.value)


def test_no_more_than_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, "cuda", 1000 * GIB).num_blocks == 1 + 64 * 8192 // 16


def test_working_memory_of_known_cases() -> None:
    plain = StepSizes(256, 0, 2048, 4096, 128_256, 4096, 2, graphs=True, ratio=False)
    assert 1.5 * GIB < working_bytes(plain) < 2.5 * GIB
    assert working_bytes(plain) - working_bytes(replace(plain, num_rows=1)) > 0.6 * GIB  # its 98 graphs took 0.5
    assert working_bytes(StepSizes(16, 4, 256, 2048, 49_152, 576, 2, graphs=True, ratio=False)) < 0.8 * GIB


@pytest.mark.parametrize(
    "larger",
    [
        {"num_rows": 96},
        {"num_drafts": 5},
        {"num_tokens": 4096},
        {"context": 1 << 20},
        {"vocab_size": 150_000},
        {"hidden_size": 5120},
        {"item": 4},
        {"ratio": True},
        {"network": True},
    ],
)
def test_whatever_is_larger_needs_more(larger: dict[str, Any]) -> None:
    assert working_bytes(replace(SIZES, **larger)) > working_bytes(SIZES)
    assert working_bytes(replace(SIZES, graphs=False)) < working_bytes(SIZES)


@pytest.mark.parametrize(
    ("num_parameters", "num_layers", "width"),
    [(LLAMA_8B, 32, 4096), (134_515_008, 30, 576), (1_235_814_400, 16, 2048), (70_553_706_496, 80, 8192)],
)
def test_width_from_the_number_of_parameters(num_parameters: int, num_layers: int, width: int) -> None:
    assert width <= hidden_size(num_parameters, num_layers) < 1.3 * width


def test_a_full_gpu_is_explained() -> None:
    with pytest.raises(ConfigError, match="KV cache of 640 tokens") as raised, explained(640):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.5 GiB")
    for setting in ("kv_memory_share", "kv_cache_tokens", "max_num_seqs", "max_num_batched_tokens", "cuda_graphs"):
        assert setting in str(raised.value)


def test_a_capture_that_broke_off_is_explained() -> None:
    def capture() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(ConfigError, match="memory is full"), explained(1):
        capture()


def test_other_errors_are_not() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explained(1):
        raise RuntimeError("shapes differ")
