"""An engine as it is served: kernels chosen by measurement, rule `ratio` over a draft model, an fp8 KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.engine.gpu import kernel_forward
from server.models.llama_tuning import tune
from tests.engine.tiny import request
from tests.gpu.small import MIXED, VOCAB_SIZE, Engines, finish, gpu, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTH = 40
K = 3


def test_measured_kernels_ratio_and_fp8(engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model is the target itself, but for the target's keys and values, which are rounded."""
    monkeypatch.setattr(kernel_forward, "tune", tune)  # the other tests do without
    monkeypatch.setattr(kernel_forward, "cache_root", lambda: tmp_path)
    core = engines.build("small-lm", K, verification="ratio", kv_cache_dtype="fp8", max_num_seqs=4)
    assert (tmp_path / "choices.json").exists()
    runner = gpu(core)
    assert {pool.dtype for pool in runner.pools} == {torch.float8_e4m3fn}
    wanted = [
        request(f"r{i}", prompt, LENGTH, sampling=MIXED[i % len(MIXED)])
        for i, prompt in enumerate(prompts(10, seed=11, high=300))
    ]
    found = finish(core, wanted)
    assert {name: len(tokens) for name, tokens in found.items()} == {r.request_id: LENGTH for r in wanted}
    assert all(0 <= token < VOCAB_SIZE for tokens in found.values() for token in tokens)
    assert found.num_accepted > 0.3 * found.num_drafted > 0
    assert core.stats().num_graph_misses == 0
    assert all(bool(pool[: runner.shape.block_size].float().isfinite().all()) for pool in runner.pools)
