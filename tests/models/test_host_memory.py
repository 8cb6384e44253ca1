"""Large zeroed tensors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from server.models import host_memory
from server.models.base import KVLayer
from server.models.paging import make_pools


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def finished() -> None:
    for thread in threading.enumerate():
        if thread.name == "host-memory":
            thread.join(60)


def test_what_is_written_while_pages_come_stays() -> None:
    size = 3 * host_memory.LARGE_BYTES // 4 + 1000
    tensor = host_memory.zeros((2, size // 4, 2), torch.float32)
    tensor[:, ::500] = 7
    finished()
    assert bool((tensor[:, ::500] == 7).all())
    tensor[:, ::500] = 0
    assert not tensor.any() and tensor.shape == (2, size // 4, 2)


def test_memory_is_there_before_it_is_needed() -> None:
    before = resident()
    tensor = host_memory.zeros((2 * host_memory.LARGE_BYTES,), torch.uint8)
    finished()
    assert resident() - before > 0.9 * tensor.nbytes


def test_without_the_systems_help_pages_come_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_POPULATE_WRITE", 9999)
    before = resident()
    tensor = host_memory.zeros((2 * host_memory.LARGE_BYTES,), torch.uint8)
    finished()
    assert resident() - before < 0.5 * tensor.nbytes
    assert not tensor.any()


@pytest.mark.parametrize("places", [8, 200_000])
@pytest.mark.parametrize("heads", [(2, 2), (1, 2)])
def test_pools(places: int, heads: tuple[int, int]) -> None:
    layers = [KVLayer(num, 64) for num in heads]
    pools = make_pools(layers, places, torch.bfloat16, torch.device("cpu"))
    assert [tuple(pool.shape) for pool in pools] == [(places, 2 * num, 64) for num in heads]
    assert all(pool.dtype == torch.bfloat16 and not pool[:: places // 8].any() for pool in pools)
