"""A quantised target and a draft model by kernels inside the GPU's steps: the same text with drafts as without."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported

# isort: split

from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.small_lm_device import SmallLMDeviceDrafter
from server.engine.core import EngineCore
from server.engine.gpu.ops import TorchOps
from server.engine.gpu.runner import GpuParts, GpuRunner
from server.engine.limits import Limits
from server.engine.speculation import Speculation
from server.engine.step_runner import RunnerShape
from server.kernels.runtime import INTERPRETED
from server.models.llama import LlamaModel
from server.models.llama_low import LlamaLowKernels
from tests.engine.tiny import request, run
from tests.models.test_llama_low import build

if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("kernels were imported without the interpreter", allow_module_level=True)

K, LENGTH, BLOCKS, BLOCK = 2, 48, 40, 4


def engine(model: LlamaModel, *, drafts: bool) -> EngineCore:
    shape = RunnerShape(2, LENGTH, K, BLOCK, BLOCKS)
    drafter = None
    if drafts:
        chain, sampler = ChainShape(3, BLOCKS, BLOCK, K), TorchSampler(model.vocab_size, "coupled")
        forward = LlamaLowKernels(model, deterministic=True)
        drafter = SmallLMDeviceDrafter(forward, model.kv_layers, model.dtype, model.device, chain, sampler)
    forward = LlamaLowKernels(model, deterministic=True)
    runner = GpuRunner(model, GpuParts(forward, TorchOps("coupled"), drafter), shape, (K,) if drafts else ())
    limits = Limits(2, 16, LENGTH, BLOCK, BLOCKS, False)
    return EngineCore(runner, limits, Speculation(None, K if drafts else 0, False), (95,))


@pytest.mark.parametrize("choice", ["fp8", "int8", "w4a8"] if torch.cuda.is_available() else ["fp8"])
def test_text_does_not_depend_on_drafts(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model is the target: what it drafts is accepted."""
    model = build("llama", choice, monkeypatch)
    batch = [request(f"r{i}", list(range(3 + i, 6 + 3 * i)), 7) for i in range(2)]
    plain = run(engine(model, drafts=False), batch)
    drafted = run(engine(model, drafts=True), batch)
    assert dict(drafted) == dict(plain) and all(len(set(tokens)) > 1 for tokens in plain.values())
    assert drafted.num_accepted >= 6
