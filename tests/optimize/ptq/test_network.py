from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimize.ptq.network import Batches, is_out_of_memory


class Network:
    """Bears `most` rows at a time."""

    def __init__(self, most: int, error: Exception | None = None) -> None:
        self.most, self.error = most, error or torch.OutOfMemoryError("CUDA out of memory")
        self.sizes: list[int] = []
        self.embedding = nn.Embedding(1, 1)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.most:
            raise self.error
        return input_ids


def run(network: Network, size: int = 8) -> list[int]:
    seen: list[int] = []

    def use(rows: Tensor, output: Any) -> None:
        seen.extend(rows[:, 0].tolist())

    Batches(torch.arange(10).view(10, 1), size, lambda what, fraction: None, "").run(network, use)
    return seen


def test_where_memory_runs_out_the_batch_is_halved_and_every_row_is_seen_once() -> None:
    network = Network(most=3)
    assert run(network) == list(range(10))
    assert network.sizes == [8, 4, 2, 2, 2, 2, 2]


def test_what_one_row_alone_raises_is_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run(Network(most=0))


def test_other_errors_are_no_reason_for_smaller_batches() -> None:
    network = Network(most=0, error=RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(network)
    assert network.sizes == [8]


def test_a_host_without_memory_says_so_in_words() -> None:
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_progress_is_of_all_passes() -> None:
    heard: list[float] = []
    batches = Batches(torch.zeros(4, 1), 2, lambda what, fraction: heard.append(fraction), "", passes=2)
    for _ in range(2):
        batches.run(Network(most=2))
    assert heard == [0.25, 0.5, 0.75, 1.0]
