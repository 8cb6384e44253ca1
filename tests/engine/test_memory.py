"""How much of a device the KV pool gets, in plain numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.config import ConfigError, EngineConfig
from server.engine.drafters import DraftNeeds
from server.engine.memory import (
    CUDA_CONTEXT_BYTES,
    DeviceMemory,
    Memory,
    assume,
    explained,
    measure,
    plan_memory,
    within,
)
from server.engine.working_memory import StepSizes, hidden_size, working_bytes
from server.models.base import KVLayer

GIB = 1 << 30
NOTHING = DraftNeeds()
LLAMA_8B = 8_030_261_248
CONFIG = EngineConfig(
    max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192, kv_memory_share=0.85, max_draft_tokens=4
)
SIZES = StepSizes(64, 4, 2048, 8192, 128_256, 4096, 2, graphs=True, ratio=False)


def llama_8b() -> Any:
    return SimpleNamespace(
        vocab_size=128_256,
        max_position_embeddings=131_072,
        kv_layers=[KVLayer(8, 128)] * 32,
        dtype=torch.bfloat16,
        num_parameters=LLAMA_8B,
    )


def plan(device: str, free: int, config: EngineConfig = CONFIG, draft: DraftNeeds = NOTHING) -> Memory:
    return plan_memory(config, llama_8b(), draft, device, free)


def test_a_share_of_what_steps_leave() -> None:
    found = plan("cuda", 8 * GIB)
    assert found.block.total == 2 * 32 * 8 * 128 * 2 * 16
    pool = (found.num_blocks - 1) * found.block.total
    assert 8 * GIB - pool > 2.5 * GIB, "graphs and activations would not fit"
    assert pool > 4 * GIB


@pytest.mark.parametrize(
    "smaller", [{"max_num_seqs": 16}, {"max_draft_tokens": 0}, {"drafter": "none"}, {"max_num_batched_tokens": 256}]
)
def test_smaller_steps_leave_more(smaller: dict[str, Any]) -> None:
    before = plan("cuda", 8 * GIB).num_blocks
    assert plan("cuda", 8 * GIB, replace(CONFIG, **smaller)).num_blocks > before


def test_a_cpu_keeps_its_share() -> None:
    found = plan("cpu", 8 * GIB)
    assert found.num_blocks == 1 + int(8 * GIB * 0.85) // found.block.total


@pytest.mark.parametrize(("device", "free"), [("cuda", GIB), ("cpu", 1 << 20), ("cuda", -GIB)])
def test_no_room_at_all(device: str, free: int) -> None:
    assert plan(device, free).num_blocks == 1


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_tokens_that_are_asked_for_are_given_whether_there_is_room_or_not(tokens: int) -> None:
    assert plan("cuda", 0, replace(CONFIG, kv_cache_tokens=tokens)).num_blocks == 1 + -(-tokens // 16)


def test_a_whole_share_leaves_room_for_the_null_block() -> None:
    whole = replace(CONFIG, kv_memory_share=1.0)
    block = plan("cpu", GIB, whole).block.total
    assert plan("cpu", 10 * block, whole).pool_bytes == 10 * block


def test_what_a_drafter_keeps_costs_blocks() -> None:
    needs = DraftNeeds((KVLayer(8, 128),), 4096, 10 * 4096)
    with_drafter, alone = plan("cuda", 8 * GIB, draft=needs), plan("cuda", 8 * GIB)
    assert with_drafter.block.draft == 2 * 8 * 128 * 2 * 16
    assert with_drafter.block.draft_extra == 4096 * 2
    assert with_drafter.slot_bytes == 65 * 10 * 4096 * 2  # padding has a slot
    assert with_drafter.num_blocks < alone.num_blocks
    assert plan("cpu", 8 * GIB, draft=needs).slot_bytes == 64 * 10 * 4096 * 2


def test_an_fp8_cache_halves_what_the_target_keeps_alone() -> None:
    needs = DraftNeeds((KVLayer(8, 128),))
    half, full = plan("cuda", GIB, replace(CONFIG, kv_cache_dtype="fp8"), needs), plan("cuda", GIB, draft=needs)
    assert (2 * half.block.target, half.block.draft) == (full.block.target, full.block.draft)


def test_the_smallest_steps_are_smaller() -> None:
    found = plan("cuda", 8 * GIB)
    assert 0 < found.least_step_bytes < found.step_bytes
    assert plan("cpu", 8 * GIB).step_bytes == plan("cpu", 8 * GIB).least_step_bytes == 0


def test_a_device_that_is_not_there() -> None:
    assert assume(GIB, torch.device("cpu")) == DeviceMemory("cpu", "CPU", GIB, GIB, assumed=True)
    found = assume(GIB, torch.device("cuda"))
    assert (found.total, found.free) == (GIB, GIB - CUDA_CONTEXT_BYTES)
    assert assume(1, torch.device("cuda")).free == 0


def test_this_machine() -> None:
    found = measure(torch.device("cpu"))
    assert 0 < found.free <= found.total and (found.type, found.assumed) == ("cpu", False)


def test_no_more_than_can_be_used() -> None:
    assert plan("cuda", 1000 * GIB).num_blocks == 1 + 64 * 8192 // 16


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


def test_a_share_of_the_device_bounds_what_an_engine_finds_free() -> None:
    gpu = DeviceMemory("cuda", "GPU", total=80 << 30, free=70 << 30)
    assert within(gpu, None) == gpu
    assert within(gpu, 0.5).free == (40 << 30) - CUDA_CONTEXT_BYTES
    assert within(replace(gpu, free=10 << 30), 0.5).free == 10 << 30
    assert within(DeviceMemory("cpu", "CPU", 8 << 30, 8 << 30), 0.25).free == 2 << 30
